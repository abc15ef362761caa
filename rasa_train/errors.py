"""Exceptions that end a command although the package has no bug, and words for their messages."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import TextIO


class UserError(Exception):
    """The user's input is wrong. Commands print only the message and exit with code 2.

    A message names the key (or file), its value, what is allowed, and what to do about it.
    ``key`` is the dotted recipe key at fault, if there is one: the loader adds the file and line of that key.
    """

    def __init__(self, message: str, *, key: str | None = None) -> None:
        super().__init__(message)
        self.key = key


class Stopped(Exception):
    """A stop was requested (SIGTERM, SIGUSR1, SIGHUP); what there is to save is saved. Commands exit with code 75."""


class DeviceLost(Exception):
    """A GPU answers every call with an error. The message says what is saved; the same command resumes from there."""


class WorkerLost(Exception):
    """Communication between the workers failed because the workers ``ranks`` died, hang or cannot be reached."""

    def __init__(self, message: str, ranks: list[int]) -> None:
        super().__init__(message)
        self.ranks = ranks


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or the error's type if the message is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def some(names: Sequence[str], most: int = 3) -> str:
    """List the first ``most`` names for a message, and the number of the others."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def shown(text: str) -> str:
    """Return text of others as a terminal may be given it: control characters as escapes such as ``\\x1b``, and those
    that reorder text (bidirectional marks) or cannot be encoded likewise. Newlines, tabs and wide spaces stay."""
    return "".join(c if c.isprintable() or c in _SPACES else _escaped(c) for c in text)


def say(text: object, file: TextIO | None = None) -> None:
    """Print text, in which names or values of others may be, as a terminal may be given it. ``file`` is stdout by
    default."""
    print(shown(str(text)), file=file, flush=True)


_SPACES = {"\n", "\t", *(chr(i) for i in range(0xA0, 0x3001) if unicodedata.category(chr(i)) == "Zs")}


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()
