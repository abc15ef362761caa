"""Small files that appear whole or not at all, and what killed processes leave of them. Links are never followed."""

from __future__ import annotations

import fcntl
import glob
import json
import os
import secrets
import shutil
from contextlib import suppress
from pathlib import Path

DRAFT = "?" * 8
"""Pattern of the end of a draft's name, which makes it unique."""


def write_text(path: Path, text: str) -> None:
    """Write a file so that it appears whole or not at all. What processes that were killed here have left is removed.

    Raises:
        OSError: the file cannot be written; nothing is left beside it.
    """
    remove_drafts(path.parent, f".{glob.escape(path.name)}.partial-{DRAFT}")
    beside, descriptor = _draft(path)
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: object) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def remove(path: Path) -> None:
    """Remove a file, a directory or a link, which is not followed. It is no error if there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def draft_name() -> str:
    return secrets.token_hex(len(DRAFT) // 2)


def lock(path: Path) -> int | None:
    """Lock a file or directory until the descriptor that is returned is closed, or this process ends.

    Returns:
        None if another process has locked it, or if the disk has no locks.
    Raises:
        OSError: the path is a link, or cannot be opened.
    """
    kind = os.O_RDONLY | os.O_DIRECTORY if path.is_dir() else os.O_RDWR | os.O_NONBLOCK  # NFS locks what is written
    descriptor = os.open(path, kind | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def remove_drafts(directory: Path, pattern: str, owner: int | None = None) -> None:
    """Remove the files and directories of this pattern that no process has locked. Where the disk has no locks, all of
    them are kept. ``owner``: the user, by number, of those that are removed; None for any."""
    for path in directory.glob(pattern):
        with suppress(OSError):
            if owner is not None and path.lstat().st_uid != owner:
                continue
            if path.is_symlink():
                path.unlink()
            elif (held := lock(path)) is not None:
                try:
                    remove(path)
                finally:
                    os.close(held)


def _draft(path: Path) -> tuple[Path, int]:
    """Return a new locked file beside ``path``, which no other process has, and its descriptor."""
    while True:
        beside = path.with_name(f".{path.name}.partial-{draft_name()}")
        descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
        with suppress(OSError):  # a disk without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:  # else another process took it for one that is left, before it was locked
            return beside, descriptor
        os.close(descriptor)
