"""The labels of a classification set, for ``rasa-train check``."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..data.prepare import PreparedData
from ..data.texts import label_counts, majority
from ..models.task import Head


@dataclass(frozen=True)
class Labels:
    """Counts of the training texts."""

    texts: int
    pairs: int
    """Number of texts that are pairs."""
    counts: dict[str, int]
    """Number of texts with each label; empty for a regression."""
    majority: float | None
    """Accuracy of the answer that most texts have; None for a regression."""

    @classmethod
    def of(cls, data: PreparedData) -> Labels:
        assert data.head
        answers, texts = data.train.answers, len(data.train)
        counts = label_counts(data.head, answers)
        return cls(texts, texts if data.stats.pairs else 0, counts, majority(data.head, answers))

    def as_json(self) -> dict[str, object]:
        return {"texts": self.texts, "pairs": self.pairs, "labels": self.counts, "majority": self.majority}

    def lines(self) -> list[tuple[str, str]]:
        rows = [("texts", f"{self.texts:,}{' pairs' if self.pairs else ''}")]
        most = sorted(self.counts.items(), key=lambda item: -item[1])
        rows += [("labels" if i == 0 else "", f"{name} x {count:,}") for i, (name, count) in enumerate(most[:20])]
        if len(most) > 20:
            rows.append(("", f"and {len(most) - 20} more"))
        if self.majority is not None:
            rows.append(("majority", f"{self.majority:.1%} of the answers are right if all are the most frequent one"))
        return rows


def answer_text(head: Head, answer: np.ndarray) -> str:
    """Return the answer of a text in words."""
    if head.problem == "regression":
        return f"{answer[0]:g}"
    if head.problem == "single_label":
        return head.labels[int(answer[0])]
    return ", ".join(name for name, has in zip(head.labels, answer, strict=True) if has) or "(no label)"
