"""ROUGE-1, ROUGE-2 and ROUGE-L of summaries, with Porter's stemmer, by the package rouge-score."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .nlg import needs

METRICS = ("rouge1", "rouge2", "rougeL")


def score_summaries(
    predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Return a row for each text (``index``, ``prediction``, F1 x 100 by metric) and the means.

    Raises:
        UserError: rouge-score is not installed.
    """
    needs("rouge_score")
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(METRICS), use_stemmer=True)
    rows: list[dict[str, Any]] = []
    for index, (text, targets) in enumerate(zip(predictions, references, strict=True)):
        found = scorer.score_multi(list(targets), text)
        rows.append({"index": index, "prediction": text, **{name: 100 * found[name].fmeasure for name in METRICS}})
    return rows, {name: sum(row[name] for row in rows) / len(rows) for name in METRICS}
