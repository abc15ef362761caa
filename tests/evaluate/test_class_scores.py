"""Scores of classifiers, against values worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rasa_train.data.built_in import GLUE
from rasa_train.errors import UserError
from rasa_train.evaluate.class_scores import scores
from rasa_train.evaluate.classify import check_suites, configs
from rasa_train.evaluate.run import Options
from rasa_train.models.task import Head


def of_labels(right: list[int], said: list[int], names: str) -> dict[str, float]:
    return scores(Head(tuple(names)), np.array(right, float)[:, None], np.eye(len(names))[said])


def test_two_labels() -> None:
    """3 true and 1 false positives, 2 true and 2 false negatives."""
    found = of_labels([1, 1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 0, 0, 1, 0, 0], "ab")
    matthews = (3 * 2 - 1 * 2) / math.sqrt(4 * 5 * 3 * 4)
    assert found == pytest.approx({"accuracy": 5 / 8, "f1": 6 / 9, "matthews_correlation": matthews, "majority": 5 / 8})


def test_more_labels_have_the_mean_f1() -> None:
    """f1 of a: 2/3, of b: 4/5, of c: 0, although c is never said; its mean counts it. R_k by Gorodkin (2004)."""
    found = of_labels([0, 0, 1, 1, 2], [0, 1, 1, 1, 0], "abc")
    covariance = 3 * 5 - (2 * 2 + 2 * 3 + 1 * 0)
    matthews = covariance / math.sqrt((25 - (4 + 9)) * (25 - (4 + 4 + 1)))
    f1 = (0.5 + 0.8 + 0) / 3
    assert found == pytest.approx({"accuracy": 3 / 5, "f1": f1, "matthews_correlation": matthews, "majority": 2 / 5})


def test_several_labels() -> None:
    answers = np.array([[1, 0], [1, 1], [0, 0], [1, 0]], float)
    logits = np.array([[2, -1], [1, -1], [-1, -1], [0.5, 3]], float)
    found = scores(Head(("a", "b"), "multi_label"), answers, logits)
    assert found == pytest.approx({"accuracy": 0.5, "f1": (1 + 0) / 2, "majority": 0.5})


def test_numbers() -> None:
    """r = 8 / sqrt(10 * 10) for these ranks, which are the values of both."""
    head, answers = Head((), "regression"), np.array([[1], [2], [3], [4], [5.0]])
    logits = np.array([[1], [3], [2], [5], [4.0]])
    assert scores(head, answers, logits) == pytest.approx({"pearson": 0.8, "spearmanr": 0.8})
    assert scores(head, answers, np.exp(logits))["spearmanr"] == pytest.approx(0.8)
    assert scores(head, answers, np.ones((5, 1))) == {"pearson": 0, "spearmanr": 0}, "not NaN, which is no JSON"


def test_all_of_one_kind() -> None:
    found = of_labels([0, 1, 1], [1, 1, 1], "ab")
    assert found["matthews_correlation"] == 0 and found["accuracy"] == found["majority"] == pytest.approx(2 / 3)


def test_suites_fit_the_model() -> None:
    assert check_suites(Options(("math",), "dev.jsonl"), classifier=True).suites == ("classification",)
    assert check_suites(Options(("math",)), classifier=False).suites == ("math",)
    for suites, data, classifier, message in (
        (("math",), None, True, "--suite math does not fit a classifier, which writes no text: use one of classific"),
        (("glue/sst2",), None, False, "--suite glue/sst2 does not fit a language model"),
        (("classification",), None, True, "needs the texts and labels: --data FILE"),
    ):
        with pytest.raises(UserError, match=message):
            check_suites(Options(suites, data), classifier=classifier)


def test_texts_of_a_suite(tmp_path: Path) -> None:
    """MNLI has two sets, of the hub or of a directory; a file has the columns of its set, or those of the run."""
    settings: dict[str, Any] = {"max_length": 99, "columns": {"text": "a", "label": "b"}, "template": "alpaca"}
    found = configs("glue/mnli", None, settings, 50)
    assert {end: (c.dataset, c.split, c.max_length, c.columns) for end, c in found.items()} == {
        "": ("glue/mnli", "validation_matched", 50, None),
        "_mm": ("glue/mnli", "validation_mismatched", 50, None),
    }
    for name in ("validation_matched.jsonl", "validation_mismatched.jsonl"):
        (tmp_path / name).write_text("")
    found = configs("glue/mnli", str(tmp_path), {}, None)
    assert {end: Path(c.dataset).name for end, c in found.items()} == {
        "": "validation_matched.jsonl",
        "_mm": "validation_mismatched.jsonl",
    }
    (one,) = configs("glue/cola", str(tmp_path / "validation_matched.jsonl"), settings, None).values()
    assert one.columns == GLUE["glue/cola"].columns and one.max_length == 99
    (one,) = configs("classification", str(tmp_path / "validation_matched.jsonl"), settings, None).values()
    assert one.columns == settings["columns"]
