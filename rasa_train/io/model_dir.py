"""Directories of models and adapters that somebody else may have made: nothing outside of them is read."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

from ..errors import UserError
from .checkpoint_files import INDEX, read_index
from .json_file import LARGEST
from .links import leads_out, leaves

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
TEMPLATES = "additional_chat_templates"
"""Directory of more files of a tokenizer."""
READ = (
    *TOKENIZER,
    TEMPLATES,
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "*.safetensors",
    "*.py",
    INDEX,
)
"""Names and patterns of the files that loading a model or an adapter reads."""


def check_files(directory: Path, names: Iterable[str] = READ) -> None:
    """Check which files a model's or adapter's directory would have others read, before any of them is read. Those of a
    tokenizer are parsed whole by other libraries.

    Args:
        names: names and patterns of the files that are looked at.
    Raises:
        UserError: the directory cannot be listed, one of the files is a link out of the directory, a file of a
            tokenizer is too large or no file, or the index names files in another directory.
    """
    try:
        found = [path for path in directory.iterdir() if any(fnmatch(path.name, name) for name in names)]
        if (templates := directory / TEMPLATES) in found and not leaves(directory, templates) and templates.is_dir():
            found += templates.iterdir()
    except OSError as error:
        raise UserError(f"{directory} cannot be read: {error.strerror}") from None
    for path in sorted(found):
        if path.is_symlink() and leaves(directory, path):
            raise leads_out(path, directory)
        if path.name in TOKENIZER or path.parent.name == TEMPLATES:
            _check_size(path)
    if (directory / INDEX).is_file():
        read_index(directory / INDEX)


def _check_size(path: Path) -> None:
    if not os.path.exists(path):  # a link to nothing
        return
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"{path} is not a file")
    if found.st_size > LARGEST:
        raise UserError(f"{path} is larger than {LARGEST:,} bytes, the most that is read")
