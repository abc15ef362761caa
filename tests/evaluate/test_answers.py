"""What counts as the same answer: pairs judged by hand, reference solutions, and lm-eval's own scorer."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from rasa_train.evaluate.answers import (
    Checker,
    Same,
    boxed_answer,
    given_answer,
    gsm8k_answer,
    marked_answer,
    normalize,
)

MATH = Path(__file__).parents[2].parent / "shared/data/math/math_test_minus_math500.jsonl"

SAME = [
    ("\\frac{1}{2}", "1/2"), ("\\frac12", "0.5"), ("\\dfrac{2}{4}", "\\frac{1}{2}"),
    ("\\frac{\\sqrt{2}}{2}", "\\frac{1}{\\sqrt 2}"),
    ("(1,2)", "(1, 2)"), ("[1,2)", "[1,2)"),
    ("(-\\infty, 3]", "(-\\infty,3]"), ("\\{1,2\\}", "\\{2,1\\}"), ("1,2", "2,1"),
    ("(1,2)\\cup(3,4)", "(3,4)\\cup(1,2)"), ("5", "5\\text{ cm}"), ("10", "10 \\text{ inches}"), ("90^\\circ", "90"),
    ("18", "\\$18"), ("18", "\\$18.00"), ("1,000", "1000"), ("x+1", "1+x"), ("(x+1)^2", "x^2+2x+1"), ("12", "x=12"),
    ("\\text{Evelyn}", "Evelyn"), ("\\text{(A)}", "A"), ("2^{10}", "1024"), ("\\sqrt{8}", "2\\sqrt{2}"), ("3", "3.0"),
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}"),
    ("11\\frac{1}{2}", "\\frac{23}{2}"), ("x=12", "12"), ("f(x)=x^2", "x^2"), ("4x-5y=-50", "-4x+5y=50"),
    ("5", "2+3=5"),
    ("\\frac{7}{5}+\\frac{1}{5}i.", "\\frac{1}{5}i+\\frac{7}{5}"), ("10^{-8}", "0.00000001"), ("y = 2x + 1", "y=1+2x"),
]  # fmt: skip
DIFFERENT = [
    ("1", "2"), ("1", "-1"), ("\\frac12", "\\frac13"), ("1/3", "0.33"), ("\\pi", "3.14"), ("2", "2x"),
    ("x+1", "x-1"), ("5", "5i"),
    ("(1,2)", "[1,2]"), ("[1,2)", "(1,2]"), ("(1,2)", "(2,1)"), ("(3,4)", "(3,5)"), ("3,4", "3,5"), ("3", "3,4"),
    ("\\{1,2\\}", "\\{1,3\\}"), ("(1,2)\\cup(3,4)", "(1,4)"), ("(-\\infty,3]", "(-\\infty,3)"), ("x<5", "x>5"),
    ("\\text{Evelyn}", "Evan"), ("\\text{(A)}", "B"), ("1000", "1,001"), ("0", "\\emptyset"), ("2112_6", "2112_7"),
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{pmatrix}2\\\\1\\end{pmatrix}"),
    ("4x-5y=-50", "5x-5y=-50"), ("4x-5y=-50", "-50"), ("x^2+y^2=13", "x^3+y^2=13"), ("a=1,b=2", "a=2,b=2"),
    ("\\frac{7}{5}+\\frac{1}{5}i.", "\\frac{8}{5}+\\frac{1}{5}i."), ("\\frac{1}{2004!}", "\\frac{2}{2004!}"),
    ("10^{-8}", "2\\cdot 10^{-8}"), ("0", "10^{-8}"),
    ("5", "__import__('os').system('touch pwned')"), ("5", "\\frac{1}{"), ("5", "}{"),
]  # fmt: skip


@pytest.fixture(scope="module")
def checker() -> Iterator[Checker]:
    with Checker(workers=1, seconds=3) as made:
        yield made


def judge(checker: Checker, pairs: list[tuple[str, str]]) -> list[Same]:
    return list(checker.check([(gold, answer, answer) for gold, answer in pairs]))


def test_equivalent_pairs(checker: Checker) -> None:
    wrong = [pair for pair, same in zip(SAME, judge(checker, SAME), strict=True) if not same.accuracy]
    assert not wrong


def test_different_pairs(checker: Checker) -> None:
    wrong = [pair for pair, same in zip(DIFFERENT, judge(checker, DIFFERENT), strict=True) if same.accuracy]
    assert not wrong
    assert not Path("pwned").exists()


def test_the_papers_rule(checker: Checker) -> None:
    """No string shortcut: what sympy cannot parse is wrong even when it is identical; what it can is compared."""
    pairs = [("\\frac{1}{2}", "0.5"), ("[1,2)", "[1,2)"), ("x^2-1", "(x-1)(x+1)"), ("7", "8")]
    results = judge(checker, pairs)
    assert [same.math_sympy for same in results] == [True, False, True, False]
    assert [same.math_sympy_or_string for same in results] == [True, True, True, False]
    (boxed,) = checker.check([("7", None, "7")])
    assert (boxed.math_sympy, boxed.math_sympy_or_string, boxed.accuracy) == (False, False, True), "marker missing"


def test_never_hangs_and_works_off_the_main_thread(checker: Checker) -> None:
    found: list[Same] = []
    pairs = [("3", "9^{9^{9^{9^9}}}"), ("1", "10000000!"), ("4", "2+2")]
    thread = threading.Thread(target=lambda: found.extend(judge(checker, pairs)))
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    assert [same.accuracy for same in found] == [False, False, True], "and the checker goes on after them"


def test_model_text_is_not_evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    """math-verify and sympy parse what a model wrote; neither may reach ``eval`` with it."""
    from rasa_train.evaluate import answers

    def forbidden(*arguments: object) -> None:
        raise AssertionError(f"eval of {arguments[0]!r}")

    answers._math_verify("1", "2")  # imports may
    monkeypatch.setattr("builtins.eval", forbidden)
    for gold, answer in [*SAME, *DIFFERENT, ("5", "(lambda: 5)()"), ("2", "1+1")]:
        answers._math_verify(gold, answer)


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
    """Of every 10th problem: gold against itself, against the next number, and beside lm-eval's own verdicts."""
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
