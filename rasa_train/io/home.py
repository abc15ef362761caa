"""The home directory in a path: ``~`` and ``~user``."""

from __future__ import annotations

import os

from ..errors import UserError


def expanded(text: str) -> str:
    """Return ``text`` with the home directory in place of a leading ``~``; any other text as it is.

    Raises:
        UserError: the text is a path that begins with ``~user``, and there is no such user.
    """
    if not text.startswith("~") or ("/" not in text and text != "~"):
        return text
    path = os.path.expanduser(text)
    if path.startswith("~"):
        raise UserError(f"{text}: no home directory of {path.partition('/')[0][1:] or 'this user'} is known")
    return path
