"""From texts and pairs of texts to tokens, in the form that the tokenizer itself gives them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import UserError
from .config import DataConfig
from .encode import Encoded, EncoderRow, Example, plain_backend

NO_TYPE = -1
"""Token type of all tokens of a tokenizer whose model takes no token types."""


def longest(config: DataConfig, tokenizer: Any) -> int:
    """Return the most tokens of an example: ``data.max_length``, or less if the tokenizer says that its model cannot
    read so many."""
    return min(config.max_length, getattr(tokenizer, "model_max_length", config.max_length))


class TextEncoder:
    """Encoder of texts to classify: with the tokenizer's special tokens and token types, cut from the longer text of a
    pair on.

    Raises:
        UserError: the tokenizer is absent or not fast, or its special tokens alone exceed the limit.
    """

    def __init__(self, config: DataConfig, tokenizer: Any, *, pairs: bool) -> None:
        if tokenizer is None or not tokenizer.is_fast:
            what = "the model has none" if tokenizer is None else f"{type(tokenizer).__name__} has no tokenizer.json"
            raise UserError(f"texts need a fast tokenizer, and {what}: name one in model.tokenizer", key="model.name")
        self.drop, self.limit = config.over_length == "drop", longest(config, tokenizer)
        self.backend = plain_backend(tokenizer)
        self.types = "token_type_ids" in tokenizer.model_input_names
        self.special = self.backend.num_special_tokens_to_add(pairs)
        if self.limit <= self.special:
            raise UserError(
                f"data.max_length: {self.limit} leaves no room for a text beside the tokenizer's {self.special} "
                "special tokens; raise it",
                key="data.max_length",
            )

    def encode(self, rows: Sequence[EncoderRow]) -> Encoded:
        """Encode rows, whose parts are ``texts.Text``.

        Raises:
            UserError: the tokenizer makes no token of a text.
        """
        self.backend.enable_truncation(self.limit, strategy="longest_first")  # the backend is the tokenizer's own
        given = [text.text if text.pair is None else (text.text, text.pair) for _, text, _ in rows]
        examples, over, truncated = list[Example](), 0, 0
        for (where, text, _), encoding in zip(rows, self.backend.encode_batch(given), strict=True):
            if encoding.overflowing and self.drop:
                over += 1
                continue
            truncated += bool(encoding.overflowing)
            if len(encoding) <= self.special:
                raise UserError(
                    f"{where}: the tokenizer makes no token of this text; remove this row", key="data.dataset"
                )
            ids = np.array(encoding.ids, np.int32)
            types = np.array(encoding.type_ids, np.int8) if self.types else np.full(len(ids), NO_TYPE, np.int8)
            examples.append(Example(ids, np.array(text.answer, np.float64), types))
        return Encoded(examples, over, 0, truncated)
