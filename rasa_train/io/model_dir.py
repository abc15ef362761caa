"""Directories of models and adapters that somebody else may have made: nothing outside of them is read."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

from ..errors import UserError
from .checkpoint_files import INDEX, read_index
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
READ = (*TOKENIZER, "config.json", "generation_config.json", "adapter_config.json", "*.safetensors", "*.py", INDEX)
"""Names and patterns of the files that loading a model or an adapter reads."""


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
            raise leads_out(path, directory)
    if (directory / INDEX).is_file():
        read_index(directory / INDEX)
