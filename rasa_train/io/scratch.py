"""Temporary directories of which nothing stays, even if a process was killed: the next process removes what is left."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from .atomic import draft_name, lock, remove_drafts


@contextmanager
def scratch_directory(purpose: str) -> Iterator[Path]:
    """Yield a new temporary directory that only this user can read, locked while this process lives.

    Args:
        purpose: part of the name. Directories of this purpose that killed processes of this user left are removed.
    """
    temporary = Path(tempfile.gettempdir())
    _tidy(temporary, f"rasa-train-{purpose}-{'[0-9a-f]' * 8}")
    directory, held = _new(temporary, f"rasa-train-{purpose}-")
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        if held is not None:
            os.close(held)


@cache
def _tidy(temporary: Path, pattern: str) -> None:
    remove_drafts(temporary, pattern, owner=os.geteuid())


def _new(temporary: Path, prefix: str) -> tuple[Path, int | None]:
    """Return a new directory, and the descriptor of its lock; None on a disk without locks."""
    while True:
        directory = temporary / f"{prefix}{draft_name()}"
        with suppress(FileExistsError):
            directory.mkdir(mode=0o700)
            with suppress(FileNotFoundError):  # another process took it for one that is left, before it was locked
                held = lock(directory)
                if directory.exists():
                    return directory, held
                if held is not None:
                    os.close(held)
