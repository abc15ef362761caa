"""The file that a command writes its page to."""

from __future__ import annotations

from pathlib import Path

from ..errors import UserError


def write_page(path: Path, page: str, *, option: str) -> None:
    """Write a page, in a directory that is made if it is missing.

    Args:
        option: the command's option that names the file, for messages.
    Raises:
        UserError: the file cannot be written.
    """
    from ..io.atomic import write_text

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, page)
    except OSError as error:
        raise UserError(f"{option} {path} cannot be written: {error.strerror or error}") from None
