"""Rows of a training set that contain questions of an evaluation set: found while the rows become tokens."""

from __future__ import annotations

import hashlib
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from ..errors import UserError
from .config import DecontaminateConfig
from .encode import Encoded, Encoder, EncoderRow
from .encode_texts import TextEncoder
from .evaluation_sets import evaluation_sets, fingerprint, texts_of
from .sources import Source
from .word_runs import Text, WordRuns

MOST_TOLD = 5
"""Rows that are told, of those that were found."""
_LONGEST_SHOWN = 100  # characters of the words that are shared
_NO_TEXT = {"role", "type", "trained", "weight", "train", "id"}


class Found(NamedTuple):
    """A row of the training set that has a text of evaluation sets."""

    where: str
    sets: tuple[str, ...]
    origin: str
    """Place of the row of the evaluation set."""
    words: str
    """The longest run of words that the two share."""

    def __str__(self) -> str:
        cut = textwrap.shorten(self.words, _LONGEST_SHOWN, placeholder=" ...")
        named = self.origin.startswith(self.sets[0])
        return f'{self.where} has "{cut}", as {self.origin if named else f"{self.sets[0]} ({self.origin})"} has'


def notes(by_set: Mapping[str, int], rows: int, places: Sequence[str], config: DecontaminateConfig) -> list[str]:
    """Return what the user should know about the rows that were found, one line each.

    Args:
        by_set: the number of rows that have texts of each evaluation set.
        rows: the number of rows that have texts of any.
        places: the first of them, one line each.
    """
    if not rows:
        return [f"no training row has a question of {', '.join(by_set)} (data.decontaminate)"]
    done = "left out" if config.action == "remove" else "kept, since data.decontaminate.action is report"
    counts = ", ".join(f"{name} {count:,}" for name, count in by_set.items())
    more = [f"... and {rows - len(places):,} more rows with questions of evaluation sets"] if rows > len(places) else []
    return [f"{rows:,} training rows have questions of evaluation sets and are {done}: {counts}", *places, *more]


@dataclass(frozen=True)
class Screen:
    """The texts of the evaluation sets that a recipe names.

    Raises:
        UserError: a set is unknown, is not here, or has no questions.
    """

    config: DecontaminateConfig

    @cached_property
    def _sources(self) -> dict[str, list[Source]]:
        return evaluation_sets(self.config.sets)

    def identity(self) -> dict[str, Any]:
        """Return what the outcome depends on: the content of the sets, and the settings."""
        contents = [
            hashlib.sha256(fingerprint(name, sources).encode()).hexdigest() for name, sources in self._sources.items()
        ]
        names = list(self._sources)
        return {"rule": _RULE, "names": names, "contents": contents, **self.config.model_dump(exclude={"sets"})}

    def around(self, encoder: Encoder | TextEncoder) -> Screened:
        """Return the encoder of the rows that remain."""
        labels: list[tuple[str, str]] = []
        texts: list[Text] = []
        for name, sources in self._sources.items():
            for where, (text, whole) in texts_of(name, sources):
                if not labels or labels[-1] != (name, where):
                    labels.append((name, where))
                texts.append(Text(text, len(labels) - 1, whole))
        return Screened(encoder, WordRuns.of(texts, self.config.share), labels, self.config.action == "remove")


_RULE = 1
"""Version of the rule by which texts are found: raise it when the rule changes."""


@dataclass(frozen=True)
class ScreenedRows(Encoded):
    """Examples of a chunk of rows, and those of its rows that have texts of evaluation sets."""

    found: tuple[Found, ...] = ()


@dataclass(frozen=True)
class Screened:
    """An encoder that looks for texts of evaluation sets in the rows first.

    Args:
        encoder: the encoder of the rows.
        index: the texts.
        labels: (name of the set, place of the row) of each label of ``index``.
        remove: whether the rows that have such texts are left out.
    """

    encoder: Encoder | TextEncoder
    index: WordRuns
    labels: list[tuple[str, str]]
    remove: bool

    def encode(self, rows: Sequence[EncoderRow]) -> ScreenedRows:
        """Encode rows, as ``Encoder.encode`` does."""
        found = self._found(rows)
        kept = [row for i, row in enumerate(rows) if i not in found] if self.remove else rows
        encoded = self.encoder.encode(kept)
        return ScreenedRows(**{**vars(encoded), "found": tuple(found.values())})

    def _found(self, rows: Sequence[EncoderRow]) -> dict[int, Found]:
        """Return the rows that have texts of evaluation sets, by their places in the chunk."""
        parts, owners = list[str](), list[int]()
        for i, row in enumerate(rows):
            for text in self._texts(row):
                parts.append(text)
                owners.append(i)
        found: dict[int, Found] = {}
        for hit in self.index.hits(parts):
            name, origin = self.labels[hit.label]
            place = owners[hit.part]
            if place not in found:
                found[place] = Found(rows[place][0], (name,), origin, hit.words)
            elif name not in found[place].sets:
                found[place] = found[place]._replace(sets=(*found[place].sets, name))
        return found

    def _texts(self, row: EncoderRow) -> Iterator[str]:
        where, parts, variables = row
        if isinstance(self.encoder, Encoder) and self.encoder.kind == "tokens":
            raise UserError(
                f"{where}: this row is tokens already, in which no text can be looked for; remove data.decontaminate, "
                "or train on the texts",
                key="data.decontaminate",
            )
        for value in [*parts, *variables.values()]:  # a message is a text, and so are a query and a response
            if text := "\n".join(_strings(value)):
                yield text


def _strings(value: object) -> Iterator[str]:
    """Yield the texts in a message, or in any other value that JSON can hold, in their order. Parts of a text, one
    after another, are one text."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            if key not in _NO_TEXT:
                yield from _strings(inner)
    elif isinstance(value, list):
        if value and all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in value):
            yield "".join(part["text"] for part in value)
        else:
            for inner in value:
                yield from _strings(inner)
