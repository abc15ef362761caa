"""Small tokenizers and rows, made here: one token a character (masks are worked out by hand), and a BPE."""

import json
import string
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SENTENCES = [
    "Below is an instruction that describes a task. Write a response that completes the request appropriately.",
    "### Instruction:\nHow many clips did Natalia sell altogether?\n\n### Response:\nShe sold 48 + 24 = 72 clips.",
    "Étienne paid 15 € for three naïve questions; the answer is: 7.",
]


def character_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *string.printable])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", **special)


def byte_level_bpe() -> PreTrainedTokenizerFast:
    """Byte-level BPE that, like Llama's, adds a bos by itself when it is let."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES, trainer)
    backend.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)]),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def rows_of(count: int) -> list[dict[str, str]]:
    """Questions and answers of many lengths, each different."""
    return [
        {
            "query": f"How many clips is {i} and {'one more and ' * (i % 7)}one?",
            "response": f"It is {i + i % 7 + 1}.",
        }
        for i in range(count)
    ]


def write_lines(path: Path, rows: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
