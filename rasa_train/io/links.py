"""Links in directories that somebody else has made: those that lead out of the directory are not followed."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..errors import UserError, shown


def leaves(directory: Path, path: Path) -> bool:
    """Whether ``path``, somewhere in ``directory``, is a link to something outside of the directory.

    The links of the hub's cache do not count: ``models--NAME/snapshots/COMMIT/FILE`` is a link to
    ``models--NAME/blobs/HASH``, which may in turn be a link to ``blobs/HA/HASH``, where all models share their files.
    """
    try:
        home, target = directory.resolve(), path.resolve()
    except (OSError, RuntimeError):  # a circle of links
        return True
    if target.is_relative_to(home):
        return False
    for snapshots in home.parents:
        if snapshots.name == "snapshots":
            model, cache = snapshots.parent, snapshots.parent.parent
            shared = target.parent.parent == cache / "blobs" and re.fullmatch(r"[0-9a-f]{64}", target.name)
            return not (target.parent == model / "blobs" or shared)
    return True


def links_out(root: Path, names: Iterable[str] | None = None) -> Iterator[Path]:
    """Yield the links below ``root`` that lead out of it. Where the root itself is a link, its target counts.

    Args:
        names: the files and directories in ``root`` that are looked at, the latter with all that is below them; None
            for the files alone.
    """
    return (path for path in _links(root, names) if leaves(root, path))


def refuse_links_out(root: Path, names: Iterable[str] | None = None) -> None:
    """Raise ``UserError`` if a link leads out of ``root``, as ``links_out`` finds it."""
    for path in links_out(root, names):
        raise leads_out(path, root)


def leads_out(path: Path, root: Path) -> UserError:
    """Return the error for a link that leads out of ``root``."""
    return UserError(
        f"{shown(str(path))} is a link to {shown(os.path.realpath(path))}, outside of {shown(str(root))}: whoever made "
        "it could have files read or overwritten that are none of theirs. Put what it leads to in its place (cp -RL), "
        "give the directory that holds the files, or remove the link"
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
