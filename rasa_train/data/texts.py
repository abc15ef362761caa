"""The meaning of a row of a classification set: a text or a pair of texts, and its answer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ..errors import UserError, some
from ..models.task import Head
from .columns import Row, Variables, kind_of, listed, text_in

_TEXTS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "passage"),
    ("text1", "text2"),
    ("text", "text_pair"),
    ("text",),
    ("sentence",),
)
"""Columns of texts, in the order in which they are looked for."""
_LABELS = ("label", "labels")
_QUIET = {"idx", "id", "guid"}
MOST_LABELS = 10_000
"""Most labels that are taken from the rows; a column with more of them is something else."""


class Text(NamedTuple):
    """The parts of a row."""

    text: str
    pair: str | None
    answer: list[float]
    """As ``Answers`` gives it."""


@dataclass(frozen=True)
class Answers:
    """The numbers that stand for the value of a row's label column: the index of its label (``single_label``), 0 or 1
    for each label (``multi_label``), or the number itself (``regression``).

    A value is the name of a label. It may be the label's place in the list as well, from 0, unless names are numbers.
    """

    head: Head

    def __call__(self, value: object, where: str) -> list[float]:
        """Return the answer of a row.

        Raises:
            UserError: the value is no label of the head, or no number for a regression.
        """
        problem = self.head.problem
        if problem == "regression":
            number = _number(value)
            if number is None:
                raise _wrong(where, value, "must be a finite number for task.problem: regression")
            return [number]
        if problem == "single_label":
            return [float(self._index(value, where))]
        if not isinstance(value, list):
            raise _wrong(where, value, "must be a list of labels for task.problem: multi_label")
        chosen = {self._index(label, where) for label in value}
        return [float(i in chosen) for i in range(len(self.head.labels))]

    def _index(self, value: object, where: str) -> int:
        labels, name = self.head.labels, name_of(value, where)
        if name in labels:
            return labels.index(name)
        if isinstance(value, int | float) and not any(map(_is_number, labels)) and 0 <= int(value) < len(labels):
            return int(value)
        raise _wrong(where, value, f"is not in the list of labels, {some(labels, 20)}")


def name_of(value: object, where: str) -> str:
    """Return the name of a label, which may be an integer.

    Raises:
        UserError: the value cannot be a label.
    """
    if isinstance(value, bool):
        return str(value).lower()
    number = _number(value)
    if number == -1:
        raise UserError(
            f"{where}: the label is -1, which marks rows without a label, as in the test splits of the hub's sets; "
            "name a split with labels, or remove these rows",
            key="data.dataset",
        )
    if number is not None and number.is_integer():
        return str(int(number))
    if isinstance(value, str) and value.strip():
        return value
    if number is not None:
        raise _wrong(where, value, "is no label; for numbers set task.problem: regression")
    if isinstance(value, list):
        raise _wrong(where, value, "is no label; for texts with several labels set task.problem: multi_label")
    raise _wrong(where, value, "must be the name or number of a label")


def found_labels(values: Iterable[tuple[str, Any]], *, several: bool, dataset: str) -> tuple[str, ...]:
    """Return the names of all labels in (place, value of the label column), sorted: as numbers if all are numbers.

    Args:
        several: whether each value is a list of labels.
        dataset: name of the set, for messages.
    Raises:
        UserError: a value cannot be a label, or there are too few or too many labels.
    """
    names: set[str] = set()
    for where, value in values:
        if several and not isinstance(value, list):
            raise _wrong(where, value, "must be a list of labels for task.problem: multi_label")
        names.update(name_of(label, where) for label in (value if several else [value]))
        if len(names) > MOST_LABELS:
            raise UserError(
                f"{where}: there are more than {MOST_LABELS:,} labels up to this row of {dataset}; name another "
                "column with data.columns: {label: ...}, or set task.problem: regression for numbers",
                key="data.columns",
            )
    if len(names) < 2 - several:
        raise single_class(dataset, next(iter(names), None))
    return tuple(sorted(names, key=int) if all(map(_is_number, names)) else sorted(names))


def single_class(dataset: str, name: str | None) -> UserError:
    has = "no row has a label" if name is None else f"all rows have the label {name!r}"
    return UserError(
        f"data.dataset: {has} in {dataset}, so there is nothing to learn; give rows of at least two labels",
        key="data.dataset",
    )


@dataclass(frozen=True)
class TextColumns:
    """Columns of a row that hold a text, perhaps a second text, and the label.

    ``names`` maps ``text``, ``text_pair`` and ``label`` to the file's names.
    """

    names: Mapping[str, str]
    head: Head | None
    """The labels; None while they are looked for."""
    may_be_empty: bool = False
    """Whether a text of a pair may be empty, as it is in rows of the hub's own sets."""
    unused: set[str] = field(default_factory=set)
    absent: frozenset[str] = frozenset()

    def extract(self, row: Row, where: str) -> Text:
        """Return the parts of one row, checked.

        Raises:
            UserError: a column is missing, a text is empty, or the label is none of the head's.
        """
        assert self.head
        texts = [text_in(row, self.names[name], where) for name in ("text", "text_pair") if name in self.names]
        empty = [self.names[name] for name, text in zip(("text", "text_pair"), texts, strict=False) if not text.strip()]
        if empty and not (self.may_be_empty and len(empty) < len(texts)):
            raise UserError(
                f"{where}: column {empty[0]!r} is an empty text; correct or remove this row", key="data.dataset"
            )
        answer = Answers(self.head)(self.value(row, where), where)
        return Text(texts[0], texts[1] if len(texts) > 1 else None, answer)

    def value(self, row: Row, where: str) -> object:
        """Return the value of a row's label column."""
        if (name := self.names["label"]) not in row:
            raise _missing(row, f"there is no column {name!r}", where)
        return row[name]

    def variables(self, row: Row, where: str) -> Variables:
        """Note the columns that are not used. There is nothing else to a text."""
        if len(self.unused) < 1000:
            used = {*self.names.values(), *_QUIET}
            self.unused.update(str(name)[:100] for name, value in row.items() if name not in used and value is not None)
        return {}


def find_text_columns(row: Row, where: str, configured: Mapping[str, str] | None) -> Mapping[str, str]:
    """Find the columns of a set from its first row.

    Args:
        configured: ``data.columns``, or None to recognise the usual names: ``label`` or ``labels``, and sentence1 and
            sentence2, premise and hypothesis, question1 and question2, question and sentence or passage, text1 and
            text2, text and text_pair, text, or sentence.
    Raises:
        UserError: a column is missing, or nothing is recognised.
    """
    if configured is not None:
        for name in configured.values():
            if name not in row:
                raise _missing(row, f"there is no column {name!r}", where)
        return configured
    texts = next((names for names in _TEXTS if set(names) <= row.keys()), None)
    label = next((name for name in _LABELS if name in row), None)
    if texts is None or label is None:
        known = ", ".join(" and ".join(names) for names in _TEXTS)
        raise _missing(
            row,
            f"task: classification needs a text and its label, and no {'label' if texts else 'text'} is recognised "
            f"(known are label, labels; {known})",
            where,
        )
    return dict(zip(("text", "text_pair"), texts, strict=False)) | {"label": label}


def label_counts(head: Head, answers: np.ndarray) -> dict[str, int]:
    """Return the number of texts with each label; empty for a regression.

    Args:
        answers: float64, shape (texts, values), as ``Answers`` makes them.
    """
    if head.problem == "single_label":
        counts = np.bincount(answers[:, 0].astype(int), minlength=len(head.labels))
    else:
        counts = answers.sum(0).astype(int)
    return dict(zip(head.labels, counts.tolist(), strict=False))


def majority(head: Head, answers: np.ndarray) -> float | None:
    """Return the accuracy of the most frequent answer; None for a regression."""
    if head.problem == "regression":
        return None
    return float(np.unique(answers, axis=0, return_counts=True)[1].max() / len(answers))


def _missing(row: Row, what: str, where: str) -> UserError:
    return UserError(
        f"{where}: {what}; this row has {listed(row)}. Name the columns with data.columns: {{text: <column>, label: "
        "<column>}, perhaps with text_pair; or leave out task: classification for rows of queries and responses",
        key="data.columns",
    )


def _wrong(where: str, value: object, what: str) -> UserError:
    shown = kind_of(value).partition(" ")[2] or "null"
    return UserError(
        f"{where}: the label {shown} {what}; correct or remove this row, or correct task.labels",
        key="data.dataset",
    )


def _number(value: Any) -> float | None:
    """Return a finite number as float, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(float_of(value)):
        return None
    return float(value)


def float_of(value: float) -> float:
    try:
        return float(value)
    except OverflowError:  # an integer beyond the range of floats
        return math.inf


def _is_number(name: str) -> bool:
    return name.removeprefix("-").isdecimal() and name.isascii()
