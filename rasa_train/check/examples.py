"""The examples of a recipe as the model will see them: their text, with what is trained on marked, and their numbers.

Nothing here needs the weights of a model, only its tokenizer and configuration.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from transformers import GenerationConfig
from transformers import PreTrainedTokenizerBase as Tokenizer

from ..data.cache import TokenDataset
from ..data.encode import IGNORE
from ..data.prepare import PreparedData, prepare
from ..data.tokenise import Stats
from ..errors import UserError
from ..models.families import end_tokens
from ..models.load import load_config, load_tokenizer
from ..recipe.schema import Recipe
from .labels import Labels, answer_text

BARS = 12
"""Largest number of bars of a histogram of lengths."""
LOOKED_AT = 50_000
"""Most examples of a set that are looked at for their end token, which are evenly spaced."""


class Piece(NamedTuple):
    """A part of an example's text."""

    text: str
    trained: bool
    """Whether its tokens carry loss."""
    special: bool = False
    """Whether it is one special token."""
    tokens: int = 1


@dataclass(frozen=True)
class Shown:
    """One example."""

    dataset: str
    index: int
    """Its place in the prepared set, from 0."""
    why: str
    """``first``, ``longest``, ``shortest`` or ``random``."""
    tokens: int
    trained_tokens: int
    pieces: list[Piece]
    answer: str | None = None
    """The answer of a text to classify."""


@dataclass(frozen=True)
class DatasetFacts:
    """Numbers of the training examples of one data set."""

    name: str
    examples: int
    tokens: int
    trained_tokens: int
    trained_share: float | None
    """Share of the tokens that carry loss; None for texts to classify."""
    end_trained_share: float | None
    """Share of the examples in which a token that ends a text carries loss; None where no such token is known, and for
    texts to classify."""
    shortest: int
    median: float
    longest: int
    histogram: list[tuple[int, int, int]]
    """Bars of the lengths in tokens, as (least, most, number of examples)."""


@dataclass(frozen=True)
class Inspection:
    """What ``rasa-train inspect`` shows."""

    dataset: str
    """The data as the recipe names them."""
    template: str
    stats: Stats
    facts: list[DatasetFacts]
    """Facts of each data set, in the order of the recipe."""
    end_tokens: list[str]
    """The tokens at which the model ends a text."""
    validation_examples: int
    notes: list[str]
    examples: list[Shown]
    labels: Labels | None = None

    def as_json(self) -> dict[str, object]:
        return {
            "dataset": self.dataset,
            "template": self.template,
            "rows": self.stats.rows,
            "examples": self.stats.examples,
            "validation_examples": self.validation_examples,
            "tokens": self.stats.tokens,
            "trained_tokens": self.stats.supervised_tokens,
            "dropped_over_length": self.stats.dropped_over_length,
            "dropped_unsupervised": self.stats.dropped_unsupervised,
            "truncated": self.stats.truncated,
            "end_tokens": self.end_tokens,
            "datasets": [asdict(facts) for facts in self.facts],
            **(self.labels.as_json() if self.labels else {}),
            "notes": self.notes,
            "samples": [
                {**asdict(example), "pieces": [piece._asdict() for piece in example.pieces]}
                for example in self.examples
            ],
        }


def inspect(recipe: Recipe, samples: int) -> Inspection:
    """Tokenise the data of a recipe, or find them tokenised, and choose ``samples`` examples of each data set.

    Raises:
        UserError: the data cannot be used, or the tokenizer is missing.
    """
    tokenizer = load_tokenizer(recipe.model)
    data = prepare(recipe.data, tokenizer, task=recipe.task)
    ends = [] if data.head else _end_tokens(recipe, tokenizer)
    names = list(data.datasets) if len(data.datasets) > 1 else [str(recipe.data.dataset or data.datasets[0])]
    facts, examples = [], []
    for place, name in enumerate(names):
        mine = np.flatnonzero(data.train.origins == place)
        facts.append(_facts(name, data, mine, ends))
        examples += [
            shown_example(data, tokenizer, index, why, name)
            for index, why in chosen(data.train, mine, samples, recipe.seed)
        ]
    return Inspection(
        dataset=", ".join(names),
        template=recipe.data.template,
        stats=data.stats,
        facts=facts,
        end_tokens=[_name(tokenizer, token) for token in ends],
        validation_examples=len(data.validation or ()),
        notes=data.notes,
        examples=examples,
        labels=Labels.of(data) if data.head else None,
    )


def chosen(train: TokenDataset, mine: np.ndarray, number: int, seed: int) -> list[tuple[int, str]]:
    """Return the examples to show, as (index, why): the first, the longest, the shortest, and then random ones.

    Args:
        mine: the indices to choose from, int64, shape (examples,).
        number: how many to choose, or all if there are fewer.
    """
    if not len(mine):
        return []
    lengths = train.lengths[mine]
    wanted = [(0, "first"), (int(lengths.argmax()), "longest"), (int(lengths.argmin()), "shortest")]
    wanted += [(int(i), "random") for i in np.random.default_rng(seed).permutation(len(mine))[: number + 3]]
    found: dict[int, str] = {}
    for i, why in wanted:
        found.setdefault(int(mine[i]), why)
    return list(found.items())[:number]


def pieces_of(tokenizer: Tokenizer | None, ids: np.ndarray, trained: np.ndarray) -> list[Piece]:
    """Return the text of an example in pieces: each is one special token, or the longest run of others that are all
    trained or all not.

    Args:
        tokenizer: None where rows are tokens already; the numbers of the tokens are then their text.
        ids: token ids, shape (length,).
        trained: whether each token carries loss, bool, shape (length,).
    """
    special = set(tokenizer.all_special_ids) if tokenizer is not None else set[int]()
    if tokenizer is not None:
        special |= {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    kinds = [(bool(on), int(token) if int(token) in special else -1) for token, on in zip(ids, trained, strict=True)]
    pieces, start = list[Piece](), 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or kinds[end] != kinds[start] or kinds[start][1] >= 0:
            text = _decoded(tokenizer, ids[max(0, start - 1) : end].tolist(), int(start > 0))
            pieces.append(Piece(text, kinds[start][0], kinds[start][1] >= 0, end - start))
            start = end
    return pieces


def trained_mask(labels: np.ndarray) -> np.ndarray:
    """Return which tokens carry loss: never the first one, since labels are shifted by one."""
    trained: np.ndarray = labels != IGNORE
    trained[:1] = False
    return trained


def _decoded(tokenizer: Tokenizer | None, ids: Sequence[int], before: int) -> str:
    """Return the text of tokens after the first ``before`` of them, on which it may depend: some tokenizers write a
    space only between two tokens."""
    if tokenizer is None:
        return "".join(f"{token} " for token in ids[before:])

    def text(part: Sequence[int]) -> str:
        return str(tokenizer.decode(part, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    whole, head = text(ids), text(ids[:before])
    if head and whole.startswith(head):
        return whole[len(head) :]
    return text(ids[before:])  # a character is divided between tokens


def shown_example(
    data: PreparedData, tokenizer: Tokenizer | None, index: int, why: str = "first", name: str = ""
) -> Shown:
    """Return an example of a data set as it is shown."""
    example = data.train[index]
    if data.head:
        none = np.zeros(len(example.input_ids), bool)
        answer = answer_text(data.head, example.labels)
        pieces = pieces_of(tokenizer, example.input_ids, none)
        return Shown(name, index, why, len(none), 0, pieces, answer)
    trained = trained_mask(example.labels)
    pieces = pieces_of(tokenizer, example.input_ids, trained)
    return Shown(name, index, why, len(trained), int(trained.sum()), pieces)


def _facts(name: str, data: PreparedData, mine: np.ndarray, ends: list[int]) -> DatasetFacts:
    lengths = data.train.lengths[mine]
    tokens, trained = int(lengths.sum()), int(data.train.supervised[mine].sum(dtype=np.int64))
    ended = None
    if ends and len(mine):
        looked = mine[:: max(1, len(mine) // LOOKED_AT)]
        has = [bool(np.isin(data.train[int(i)].labels[1:], ends).any()) for i in looked]
        ended = sum(has) / len(has)
    some = lengths if len(mine) else np.zeros(1, np.int64)
    return DatasetFacts(
        name=name,
        examples=len(mine),
        tokens=tokens,
        trained_tokens=0 if data.head else trained,
        trained_share=None if data.head or not tokens else trained / tokens,
        end_trained_share=ended,
        shortest=int(some.min()),
        median=float(np.median(some)),
        longest=int(some.max()),
        histogram=histogram(lengths),
    )


def histogram(lengths: np.ndarray) -> list[tuple[int, int, int]]:
    """Return bars of equal width, which is 1, 2 or 5 times a power of ten, as (least, most, number of examples)."""
    if not len(lengths):
        return []
    least, most = int(lengths.min()), int(lengths.max())
    widths = (factor * 10**power for power in range(19) for factor in (1, 2, 5))
    width = next(width for width in widths if most // width - least // width < BARS)
    bars = np.bincount(lengths // width - least // width)
    first = least // width
    return [((first + i) * width, (first + i + 1) * width - 1, int(count)) for i, count in enumerate(bars)]


def _end_tokens(recipe: Recipe, tokenizer: Tokenizer | None) -> list[int]:
    """Return the ids at which the model ends a text, by its configuration or else by its tokenizer."""
    base = recipe.model
    named: Any = SimpleNamespace(config=load_config(base), generation_config=None)
    try:
        named.generation_config = GenerationConfig.from_pretrained(base.name, revision=base.revision)
    except (OSError, ValueError):
        pass  # most models have none
    except (AttributeError, TypeError) as error:
        raise UserError(f"model.name: {base.name}: generation_config.json cannot be read: {error}") from None
    found = end_tokens(named)
    own = getattr(tokenizer, "eos_token_id", None)
    return found or ([own] if isinstance(own, int) else [])


def _name(tokenizer: Tokenizer | None, token: int) -> str:
    return str(token) if tokenizer is None else _decoded(tokenizer, [token], 0) or str(token)
