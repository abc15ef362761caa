"""Exit codes of all commands: 0 done, 2 the user's input is wrong, 75 stopped on request and saved, 130 interrupted."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from ..errors import Stopped, UserError, say
from ..io import streams
from ..io.home import expanded
from ..stop import requests

USER_ERROR, STOPPED, INTERRUPTED = 2, 75, 130

USAGE_ERROR: Any = typer.BadParameter.__base__
"""Exception for a command line that cannot be read. It comes from typer: newer versions carry a copy of click."""


def start(app: typer.Typer, *, result_on_stdout: bool = True) -> None:
    """Run a command to its end, as the entry point of a console script.

    Whatever happens to stdout and stderr, the work is done and the exit code says how it ended. Only a command whose
    result is what it prints fails if stdout does not take it, unless the reader has gone away (``| head``).

    Args:
        result_on_stdout: whether what the command prints is its result.
    """
    streams.guard()
    code: object = 0
    try:
        app()
    except SystemExit as end:
        code = end.code
    if error := streams.lost():
        say(f"error: stdout cannot be written: {error.strerror}", file=sys.stderr)
        code = code or (USER_ERROR if result_on_stdout else 0)
    sys.exit(code)  # type: ignore[arg-type]


@contextmanager
def _in_one_line() -> Iterator[None]:
    try:
        yield
    except USAGE_ERROR as error:
        say(f"error: {error.format_message().rstrip('.')} (--help lists the options)", file=sys.stderr)
        sys.exit(USER_ERROR)


def _at_home(argument: str) -> str:
    """Return an argument with the home directory in place of ``~``, which a shell leaves in ``--data=~/questions`` and
    in quotes."""
    key, equals, value = argument.partition("=~")
    with user_errors():
        return f"{key}={expanded(f'~{value}')}" if equals else expanded(argument)


class _InOneLine:
    """What reports wrong options in one line, as all other errors are reported."""

    def make_context(self, info_name: Any, args: list[str], *others: Any, **kwargs: Any) -> Any:
        with _in_one_line():
            at_home = [_at_home(argument) for argument in args]
            return super().make_context(info_name, at_home, *others, **kwargs)  # type: ignore[misc]


class Command(_InOneLine, TyperCommand):
    """A command that reports wrong options in one line."""


class Group(_InOneLine, TyperGroup):
    """A command with verbs, which reports wrong options and unknown verbs in one line."""

    def resolve_command(self, *args: Any, **kwargs: Any) -> Any:
        with _in_one_line():
            return super().resolve_command(*args, **kwargs)


class DefaultVerb(Group):
    """A command whose first verb may be left out: ``rasa-train RECIPE`` is ``rasa-train run RECIPE``.

    A verb stands first and wins against a file of the same name, which ``./NAME`` and the first verb reach.
    """

    @property
    def default(self) -> Any:
        return next(iter(self.commands.values()))

    def make_context(self, info_name: Any, args: list[str], parent: Any = None, **extra: Any) -> Any:
        own = self.get_params(self.context_class(self, **self.context_settings))  # --help and those of completion
        known = {*self.commands, *(option for parameter in own for option in parameter.opts)}
        completes = not args and extra.get("resilient_parsing")  # the first word, which may become a verb
        if completes or (args and args[0] in known):
            return super().make_context(info_name, args, parent, **extra)
        # The context of the default itself, so that its help and its errors do not name a verb that nobody wrote.
        return self.default.make_context(info_name, args, parent, **{**self.context_settings, **extra})

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return [self.subcommand_metavar or ""]  # the options come last, and most belong to the verbs

    def invoke(self, ctx: Any) -> Any:
        return super().invoke(ctx) if ctx.command is self else ctx.command.invoke(ctx)

    def shell_complete(self, ctx: Any, incomplete: str) -> Any:
        """Offer the verbs, and what may stand first without one: options and the first argument of the default."""
        found = super().shell_complete(ctx, incomplete)
        with self.default.make_context(ctx.info_name, [], resilient_parsing=True) as bare:
            found += self.default.shell_complete(bare, incomplete)
            arguments = [p for p in self.default.params if p.param_type_name == "argument"]
            return found if incomplete.startswith("-") else found + arguments[0].shell_complete(bare, incomplete)


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn errors that are not bugs into one message on stderr and an exit code."""
    try:
        yield
    except UserError as error:
        say(f"error: {error}", file=sys.stderr)
        sys.exit(USER_ERROR)
    except Stopped as stop:
        say(stop, file=sys.stderr)
        sys.exit(STOPPED)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


class _StopNow(BaseException):
    """A stop request outside training. Libraries catch an ``Exception``, but not this one."""


@contextmanager
def stoppable() -> Iterator[None]:
    """End the work inside at once when a stop is requested, because it has nothing to save: modules are imported, data
    are prepared. A ``StopSignal`` inside takes over for as long as there is something to save.

    Raises:
        Stopped: a stop was requested.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        for other in before:
            signal.signal(other, signal.SIG_IGN)  # a second request must not break what the first one ends
        raise _StopNow(signal.Signals(number).name)

    before = {number: signal.signal(number, handle) for number in requests()}
    try:
        yield
    except _StopNow as stop:
        raise Stopped(f"{stop}: stopped; the same command goes on from what is saved") from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
