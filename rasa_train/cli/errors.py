"""Exit codes of all commands: 0 done, 2 the user's input is wrong, 75 stopped on request and saved, 130 interrupted."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import Stopped, UserError

USER_ERROR, STOPPED, INTERRUPTED = 2, 75, 130


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn the errors that are nobody's bug into one message on stderr and an exit code."""
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
