"""The files of a model beside its weights: which of them a merge copies into its output."""

from __future__ import annotations

import re
import shutil
from fnmatch import fnmatch
from pathlib import Path

from ..io.json_file import read_object
from ..io.links import leaves
from ..io.model_dir import TOKENIZER
from ..models.config import ModelConfig
from ..models.load import load_tokenizer
from ..models.vocabulary import check_tokenizer, with_words
from .source import Source, find_tokenizer

COPIED = (
    *TOKENIZER,
    *("config.json", "generation_config.json", "*processor_config.json", "audio_tokenizer_config.json"),
    *("tokenizer.model.v[0-9]*", "tekken.json", "*.tiktoken", "*.spm", "spm*.model", "sentencepiece*.model"),
    *("vocab.bpe", "bpe.codes", "encoder.json", "emoji.json", "byte_maps.json", "normalizer.json", "dict.txt"),
)
"""Names and patterns of the files of configurations and tokenizers."""
TEXTS = re.compile(r"(readme|licen[sc]e|notice|copying|use_policy)([-_ ]\w+)*(\.md|\.txt)?", re.IGNORECASE)
"""Names of the texts that go with a model."""
SMALL = 200_000_000
"""Bytes. A larger file beside a model is not a tokenizer and is not copied."""


def copy_small_files(base_dir: Path, output: Path) -> list[str]:
    """Copy the configuration, tokenizer, chat templates, texts and licence of a base, and its code if its configuration
    names code. Links are not followed out of the directory. Returns the names of what is left out, other than weights
    and hidden files."""
    code = any(_names_code(base_dir / name) for name in ("config.json", "tokenizer_config.json"))
    names = (*COPIED, "*.py") if code else COPIED
    left = []
    for path in sorted([*base_dir.iterdir(), *(base_dir / "additional_chat_templates").glob("*.jinja")]):
        template = path.parent != base_dir
        known = template or TEXTS.fullmatch(path.name) or any(fnmatch(path.name, name) for name in names)
        if known and not leaves(base_dir, path) and path.is_file() and path.stat().st_size <= SMALL:
            target = output / path.relative_to(base_dir)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)
        elif not (path.name.startswith(".") or fnmatch(path.name, "*.safetensors*") or _holds_templates(path)):
            left.append(str(path.relative_to(base_dir)))
    return left


def _names_code(path: Path) -> bool:
    return path.is_file() and bool(read_object(path).get("auto_map"))


def _holds_templates(path: Path) -> bool:
    return path.name == "additional_chat_templates" and path.is_dir() and not leaves(path.parent, path)


def copy_tokenizer(source: Source, output: Path) -> str | None:
    """Replace the tokenizer of an output by the one that is stored with the adapter, if any, and else give the base's
    the new words. Returns the directory of the adapter that the tokenizer is from.

    Raises:
        UserError: the tokenizer does not have the adapter's new words under their ids.
    """
    words, label = source.words, str(source.origins[0])
    files = find_tokenizer(source)
    if not files:
        tokenizer = load_tokenizer(ModelConfig(name=str(source.directory))) if words and words.tokens else None
        if tokenizer is not None and words is not None:
            with_words(tokenizer, words, label).save_pretrained(output)
        return None
    for name in TOKENIZER:
        (output / name).unlink(missing_ok=True)
    for path in files:
        shutil.copyfile(path, output / path.name)
    if words and words.tokens:
        tokenizer = load_tokenizer(ModelConfig(name=str(source.directory), tokenizer=str(files[0].parent.absolute())))
        assert tokenizer is not None
        check_tokenizer(tokenizer, words, label)
    return str(files[0].parent)
