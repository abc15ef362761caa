"""What counts as the same answer: pairs judged by hand, reference solutions, and lm-eval's own scorer."""

from __future__ import annotations

import contextlib
import json
import random
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rasa_train.evaluate.answer_equality import equal
from rasa_train.evaluate.answer_forms import read
from rasa_train.evaluate.answers import (
    Checker,
    Same,
    _math_sympy,
    boxed_answer,
    given_answer,
    gsm8k_answer,
    marked_answer,
    normalize,
)

MATH = Path(__file__).parents[2].parent / "shared/data/math/math_test_minus_math500.jsonl"

PAIRS = [
    tuple(line.split("\t"))
    for line in Path(__file__).with_name("answer_pairs.tsv").read_text().splitlines()
    if line and not line.startswith("#")
]
"""Judged by hand: ``=`` or ``!``, the gold answer, an answer."""


@pytest.fixture(scope="module")
def checker() -> Iterator[Checker]:
    with Checker(workers=1, seconds=3) as made:
        yield made


def judge(checker: Checker, pairs: list[tuple[str, str]]) -> list[Same]:
    return list(checker.check([(gold, answer, answer) for gold, answer in pairs]))


def test_pairs_judged_by_hand_without_evaluating_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """``eval`` sees no text that a model wrote but the digits of a number, whatever reads it. What it is called with is
    recorded, because the parsers catch every exception."""
    assert equal("x + 1", "1 + x") and _math_sympy("x + 1", "1 + x")  # imports may
    evaluated: list[str] = []
    real = eval

    def recorded(code: object, *scopes: Any) -> object:
        evaluated.append(str(code))
        return real(code, *scopes)  # type: ignore[arg-type]

    monkeypatch.setattr("builtins.eval", recorded)
    assert len(PAIRS) >= 500 and sum(verdict == "!" for verdict, _, _ in PAIRS) >= len(PAIRS) // 2
    assert not [pair for pair in PAIRS if equal(pair[1], pair[2]) != (pair[0] == "=")]
    for attack in ("(lambda: 5)()", "__import__('os').system('touch pwned')", "x.__class__", "exit()"):
        assert not equal("5", attack)
        with contextlib.suppress(Exception):
            _math_sympy("5", attack)
    assert not [code for code in evaluated if not re.fullmatch(r"(Integer|Float) ?\('?[\d.]+ ?'?\)", code.strip())]
    assert not Path("pwned").exists()


def test_an_answer_equals_itself_in_every_pair() -> None:
    """A gold answer that cannot be read as mathematics is at least equal to itself."""
    assert not [gold for _, gold, _ in PAIRS if not equal(gold, gold)]


def test_verdicts_do_not_depend_on_a_seed() -> None:
    """sympy decided at random points whether 3/4 - 2^oo is zero: true for 4 seeds of 12."""
    from sympy.core.random import seed

    for i in range(12):
        seed(i)
        random.seed(i)
        assert not equal("\\frac34", "2^\\infty") and equal("\\sin^2 x", "1-\\cos^2 x")


def test_the_papers_rule(checker: Checker) -> None:
    """No string shortcut: what sympy cannot parse is wrong even when it is identical; what it can is compared."""
    pairs = [("\\frac{1}{2}", "0.5"), ("[1,2)", "[1,2)"), ("x^2-1", "(x-1)(x+1)"), ("7", "8")]
    results = judge(checker, pairs)
    assert [same.math_sympy for same in results] == [True, False, True, False]
    assert [same.math_sympy_or_string for same in results] == [True, True, True, False]
    (boxed,) = checker.check([("7", None, "7")])
    assert (boxed.math_sympy, boxed.math_sympy_or_string, boxed.accuracy) == (False, False, True), "marker missing"


def test_the_papers_rule_has_the_oddities_that_the_page_names(checker: Checker) -> None:
    """Published scores were counted so: the rule is not mended, and the page warns of it."""
    right = [("5\\text{ cm}", "5\\text{ m}"), ("12", "1 2"), ("1,2", "12"), ("cat", "act")]
    wrong = [("[1,2)", "[1,2)"), ("50\\%", "0.5"), ("1\\frac{1}{2}", "1 1/2")]
    page = (Path(__file__).parents[2] / "docs/EVALUATION.md").read_text()
    for pair in right:
        assert f"`{pair[0]}` and `{pair[1]}`" in page
    verdicts = judge(checker, right + wrong)
    assert [same.math_sympy for same in verdicts] == [True] * len(right) + [False] * len(wrong)
    assert not any(same.accuracy for same in verdicts[: len(right)]) and all(s.accuracy for s in verdicts[len(right) :])


def test_never_hangs_and_works_off_the_main_thread() -> None:
    found: list[Same] = []
    pairs = [("3", "9^{9^{9^{9^9}}}"), ("4", "2+2")]
    with Checker(workers=1, seconds=1) as quick:
        thread = threading.Thread(target=lambda: found.extend(judge(quick, pairs)))
        thread.start()
        thread.join(900)
    assert not thread.is_alive()
    assert [same.accuracy for same in found] == [False, True], "and the checker goes on after them"


@pytest.mark.parametrize("long", ["\\text{" * 2000, "x" * 12_000, "\\frac{" * 2000, "(" * 12_000, "1," * 6000])
def test_a_long_gold_answer_is_never_compared(long: str) -> None:
    """12 KB of unclosed ``\\text{`` kept a core busy for minutes. Such a pair does not even start a process."""
    with Checker(workers=1) as made:
        gold, answer, both = judge(made, [(long, "5"), ("5", long), (long, long)])
        assert not made._idle
    assert gold.reason == both.reason or both.reason == f"an answer of {len(long)} characters"
    assert gold.reason == f"a gold answer of {len(long)} characters" and not (gold.accuracy or answer.accuracy)
    read(long)  # takes time in proportion to the length


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("So it is 4.\nThe answer is: 4", "4"),
        ("The answer is: 3.\nNo. The answer is: 4.", "4"),
        ("The answer is: 4.\nAnd more", "4"),
        ("The answer is: 0.5", "0.5"),
        ("### Response:\nThe answer is: 1\n### Response:\nnothing", None),
        ("the answer is 4", None),
        ("The answer is: ", None),
    ],
)
def test_the_papers_extraction(text: str, answer: str | None) -> None:
    assert marked_answer(text) == answer


def test_other_extractions() -> None:
    assert boxed_answer("first \\boxed{1}, then $\\boxed{\\frac{1}{2}}$.") == "\\frac{1}{2}"
    assert boxed_answer("$\\boxed 3$") == "3" and boxed_answer("\\fbox{x}") == "x" and boxed_answer("\\boxed{1") is None
    assert gsm8k_answer("a\n#### 1,234") == "1234" and gsm8k_answer("1234") is None
    assert gsm8k_answer("#### 1,234,567") == "1234567" and gsm8k_answer("#### 1,2") == "1,2"
    assert given_answer("\\boxed{1} The answer is: 2") == "2" and given_answer("so \\boxed{1}") == "1"


def test_minervas_normalisation() -> None:
    cases = {"x = 5": "5", "\\frac12": "\\frac{1}{2}", "\\sqrt2": "\\sqrt{2}", "10,000": "10000", "3 \\text{ cm}": "3"}
    assert {text: normalize(text) for text in cases} == cases


def perturb(answer: str) -> str:
    """Another answer of the same form: its first digit is one more."""
    digits = [match.start() for match in re.finditer(r"\d", answer)]
    if not digits:
        return "\\text{none}" if "text" in answer else f"{answer}+1"
    at = digits[0]
    return f"{answer[:at]}{(int(answer[at]) + 1) % 10}{answer[at + 1 :]}"


@pytest.mark.slow
@pytest.mark.skipif(not MATH.exists(), reason="no MATH here")
def test_reference_solutions_and_perturbed_ones_and_lm_eval() -> None:
    """Every 10th problem: gold against itself, against the next number, and beside lm-eval's own verdicts."""
    from lm_eval.tasks.minerva_math.utils import is_equiv, normalize_final_answer

    solutions = [json.loads(line)["solution"] for line in MATH.read_text().splitlines()][::10]
    golds = [boxed_answer(solution) or "" for solution in solutions]
    assert all(golds)
    perturbed = [perturb(gold) for gold in golds]
    others = golds[1:] + golds[:1]
    with Checker() as checker:
        assert all(
            same.accuracy and same.math_sympy_or_string for same in judge(checker, [*zip(golds, golds, strict=True)])
        )
        assert not any(same.accuracy for same in judge(checker, [*zip(golds, perturbed, strict=True)]))
        pairs = [*zip(golds, golds, strict=True), *zip(golds, others, strict=True)]
        ours = judge(checker, pairs)
    theirs = [is_equiv(*map(normalize_final_answer, pair)) for pair in pairs]
    agreement = sum(a.math_sympy_or_string == b for a, b in zip(ours, theirs, strict=True)) / len(pairs)
    assert agreement > 0.98
