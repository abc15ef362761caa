"""Exceptions that end a command without being a bug of the package."""

from __future__ import annotations


class UserError(Exception):
    """The user's input is wrong. Commands print the message alone and exit with code 2.

    A message names the key (or file), the value it had, what is allowed, and what to do about it.
    ``key`` is the dotted recipe key at fault, when there is one: the loader adds the file and line of it.
    """

    def __init__(self, message: str, *, key: str | None = None) -> None:
        super().__init__(message)
        self.key = key


class Stopped(Exception):
    """A stop was asked for (SIGTERM, SIGUSR1) and the state is saved. Commands exit with code 75."""


class DeviceLost(Exception):
    """A GPU answers with errors only. The message says what is saved; the same command goes on from there."""


class WorkerLost(Exception):
    """An exchange among the workers broke off, because some of them, ``ranks``, died, hang or cannot be reached."""

    def __init__(self, message: str, ranks: list[int]) -> None:
        super().__init__(message)
        self.ranks = ranks


def first_line(error: Exception) -> str:
    """The first line of an error's message, or the error's type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
