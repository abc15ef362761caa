"""Directories of models and adapters that somebody else may have made: nothing outside of them is read."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

from ..errors import UserError
from .checkpoint_files import INDEX, read_index

VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)
TOKENIZER = (
    *VOCABULARIES,
    *("merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    "chat_template.json",
)
"""Names of the files of a tokenizer."""
READ = (*TOKENIZER, "config.json", "generation_config.json", "adapter_config.json", "*.safetensors", "*.py", INDEX)
"""Names and patterns of the files that loading a model or an adapter reads."""


def leaves(directory: Path, path: Path) -> bool:
    """Whether ``path``, an entry of ``directory``, is a link to something outside of the directory.

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


def check_files(directory: Path, names: Iterable[str] = READ) -> None:
    """Check which files a model's or adapter's directory would have others read, before any of them is read.

    Args:
        names: names and patterns of the files that are looked at.
    Raises:
        UserError: the directory cannot be listed, one of the files is a link out of the directory, or the index names
            files in another directory.
    """
    try:
        found = [path for path in directory.iterdir() if path.is_symlink()]
    except OSError as error:
        raise UserError(f"{directory} cannot be read: {error.strerror}") from None
    for path in sorted(found):
        if any(fnmatch(path.name, name) for name in names) and leaves(directory, path):
            raise UserError(
                f"{path} is a link out of its directory, to {os.readlink(path)}, and is not followed, because a model "
                "that somebody else made could read any file so: put the file itself there, or give the directory that "
                "holds it"
            )
    if (directory / INDEX).is_file():
        read_index(directory / INDEX)
