"""Regular expressions that somebody else may have written, matched with names of modules within a bound of time."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

import regex

from ..errors import UserError

SECONDS = 5.0
"""Most seconds that one expression may take for all names of a model together. Usual ones take milliseconds."""


def path_pattern(text: str, key: str) -> Callable[[str], bool]:
    """Return whether a regular expression matches a whole name, as a function of the name.

    The expression has the syntax and the meaning of ``re``, but is matched by ``regex``, which stops in time: ``re``
    takes hours for ``(a+)+$`` and a name of forty letters.

    Args:
        key: the dotted recipe key that holds the expression, for messages.
    Raises:
        UserError: it is no regular expression; or, from the function, it takes too long.
    """
    try:
        re.compile(text)
        pattern = regex.compile(text, regex.VERSION0)
    except (re.error, regex.error, OverflowError, RecursionError) as error:
        raise UserError(f"{key} is not a regular expression: {error}, got {text!r:.200}", key=key) from None
    left = SECONDS

    def matches(name: str) -> bool:
        nonlocal left
        start = time.monotonic()
        try:
            return pattern.fullmatch(name, timeout=left) is not None
        except (TimeoutError, RecursionError, MemoryError):
            raise UserError(
                f"{key} takes more than {SECONDS:g} seconds to match the names of the model's modules: write it "
                f"without a repetition inside a repetition, or give a list of names, got {text!r:.200}",
                key=key,
            ) from None
        finally:
            left = max(left - (time.monotonic() - start), 1e-3)

    return matches
