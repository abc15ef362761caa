"""Links in directories that somebody else has made: those that lead out of the directory are not followed."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..errors import UserError, shown


def links_out(root: Path, names: Iterable[str] | None = None) -> Iterator[Path]:
    """Yield the links below ``root`` that lead out of it. Where the root itself is a link, its target counts.

    Links of a download of the Hugging Face hub, ``snapshots/REVISION/file -> ../../blobs/...``, belong to it.

    Args:
        names: the files and directories in ``root`` that are looked at, the latter with all that is below them; None
            for the files alone.
    """
    home, blobs = Path(os.path.realpath(root)), _blobs(root)
    for path in _links(root, names):
        target = Path(os.path.realpath(path))
        if not any(target.is_relative_to(place) for place in (home, blobs) if place is not None):
            yield path


def refuse_links_out(root: Path, names: Iterable[str] | None = None) -> None:
    """Raise ``UserError`` if a link leads out of ``root``, as ``links_out`` finds it."""
    for path in links_out(root, names):
        raise UserError(
            f"{shown(str(path))} is a link to {shown(os.path.realpath(path))}, outside of {root}: whoever made it "
            "could have files read or overwritten that are none of theirs. Put what it leads to in its place "
            "(cp -RL), or remove the link"
        )


def _links(root: Path, names: Iterable[str] | None) -> Iterator[Path]:
    paths = [root / name for name in names] if names is not None else []
    try:
        paths += [path for path in root.iterdir() if not os.path.isdir(path)] if names is None else []
    except OSError:
        return  # whoever reads it says so
    for path in paths:
        if os.path.islink(path):
            yield path
        elif names is not None:
            for parent, directories, files in os.walk(path):
                yield from (each for name in (*directories, *files) if os.path.islink(each := Path(parent, name)))


def _blobs(root: Path) -> Path | None:
    """Return where the files of a download of the hub are, if ``root`` is in one."""
    where = Path(os.path.realpath(root))
    snapshot = next((path for path in (where, *where.parents) if path.parent.name == "snapshots"), None)
    blobs = snapshot.parent.parent / "blobs" if snapshot else None
    return None if blobs is None or blobs.is_symlink() else blobs
