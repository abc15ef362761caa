from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from tiny_data import byte_level_bpe, character_tokenizer, write_lines
from transformers import PreTrainedTokenizerFast


@pytest.fixture
def characters() -> PreTrainedTokenizerFast:
    return character_tokenizer(bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def bpe() -> PreTrainedTokenizerFast:
    return byte_level_bpe()


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[[Iterable[Any]], str]:
    """Writes rows to a .jsonl file and gives its path."""
    return lambda rows: str(write_lines(tmp_path / "train.jsonl", rows))
