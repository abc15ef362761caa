"""Exit codes of all commands: 0 done, 2 the user's input is wrong, 75 stopped on request and saved, 130 interrupted."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperCommand

from ..errors import Stopped, UserError

USER_ERROR, STOPPED, INTERRUPTED = 2, 75, 130

USAGE_ERROR: Any = typer.BadParameter.__base__
"""Exception for a command line that cannot be read. It comes from typer: newer versions carry a copy of click."""


class Command(TyperCommand):
    """A command that reports wrong options in one line, as it reports all other errors."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().make_context(*args, **kwargs)
        except USAGE_ERROR as error:
            print(f"error: {error.format_message().rstrip('.')} (--help lists the options)", file=sys.stderr)
            sys.exit(USER_ERROR)


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn errors that are not bugs into one message on stderr and an exit code."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(USER_ERROR)
    except Stopped as stop:
        print(stop, file=sys.stderr)
        sys.exit(STOPPED)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
