"""Checksums of the files of a directory, stored beside them: damage is found before the files are used."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from ..errors import UserError, shown
from .atomic import write_json
from .json_file import read_object

CHECKSUMS = "checksums.json"


def sha256(path: Path) -> str:
    if not path.is_file():  # a pipe would be waited for
        raise FileNotFoundError(errno.ENOENT, "there is no such file", str(path))
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_checksums(directory: Path, files: Iterable[Path]) -> None:
    """Write the checksums of ``files`` in ``directory``. The files must be complete."""
    write_json(directory / CHECKSUMS, {path.name: sha256(path) for path in sorted(files)})


def damage(directory: Path, needed: Iterable[str], unread: tuple[str, ...] = ()) -> str | None:
    """Return what is wrong with the files of a directory that has checksums, or None if every file is right.

    Args:
        needed: names of files that must have a checksum.
        unread: beginnings of the names of files that are not compared, because they are not going to be read.
    """
    try:
        checksums = read_object(directory / CHECKSUMS)
        if missing := sorted(set(needed) - checksums.keys()):
            return f"{CHECKSUMS} has no checksum of {missing[0]}"
        for name, expected in checksums.items():
            if os.path.basename(name) != name or name in ("", ".", ".."):
                return f"{CHECKSUMS} must name files beside it, got {shown(name)!r:.100}"
            if not (unread and name.startswith(unread)) and sha256(directory / name) != expected:
                return f"{name} does not match its checksum"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except UserError as error:
        return str(error).replace(f"{directory}{os.sep}", "", 1)
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return None
