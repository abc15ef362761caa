"""Scores of classifications and regressions, by scikit-learn and SciPy."""

from __future__ import annotations

import math
import warnings
from importlib.util import find_spec

import numpy as np

from ..data.texts import majority
from ..errors import UserError
from ..models.task import Head


def scores(head: Head, answers: np.ndarray, logits: np.ndarray) -> dict[str, float]:
    """Return the scores that fit the problem.

    ``single_label``: ``accuracy``; ``f1``, of the second label if there are two, else the mean over all labels
    (macro); ``matthews_correlation``. ``multi_label``: ``accuracy``, the share of texts whose labels are all right;
    ``f1``, the mean over the labels. Both: ``majority``, the accuracy of the most frequent answer. ``regression``:
    ``pearson`` and ``spearmanr``. A score that is not defined, because all predictions are equal, is 0.

    Args:
        answers: the right answers, as ``data.texts.Answers`` gives them; shape (texts, values).
        logits: shape (texts, outputs). A label of several is given where its logit is above 0.
    """
    if find_spec("sklearn") is None:
        raise UserError("scores of classifiers need scikit-learn: pip install 'rasa_train[eval]'")
    from scipy import stats
    from sklearn import metrics

    if head.problem == "regression":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # constant predictions
            pearson = stats.pearsonr(answers[:, 0], logits[:, 0])[0] if len(answers) > 1 else 0.0
            spearman = stats.spearmanr(answers[:, 0], logits[:, 0])[0] if len(answers) > 1 else 0.0
        return {"pearson": _defined(pearson), "spearmanr": _defined(spearman)}
    most = majority(head, answers)
    assert most is not None
    if head.problem == "multi_label":
        given = logits > 0
        f1 = metrics.f1_score(answers, given, average="macro", zero_division=0.0)
        return {"accuracy": float(metrics.accuracy_score(answers, given)), "f1": float(f1), "majority": most}
    right, said = answers[:, 0].astype(int), logits.argmax(1)
    two = len(head.labels) == 2
    labels = None if two else list(range(len(head.labels)))
    f1 = metrics.f1_score(right, said, labels=labels, average="binary" if two else "macro", zero_division=0.0)
    return {
        "accuracy": float(metrics.accuracy_score(right, said)),
        "f1": float(f1),
        "matthews_correlation": float(metrics.matthews_corrcoef(right, said)),
        "majority": most,
    }


def _defined(value: float) -> float:
    return float(value) if math.isfinite(value) else 0.0
