from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from tiny_data import byte_level_bpe, character_tokenizer, write_lines
from transformers import PreTrainedTokenizerFast

from rasa_train.data.encode import Encoder


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


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the chunks that were really encoded: none when the cache is used."""
    sizes: list[int] = []
    original = Encoder.encode

    def counting(self: Encoder, rows: Any) -> Any:
        sizes.append(len(rows))
        return original(self, rows)

    monkeypatch.setattr(Encoder, "encode", counting)
    return sizes
