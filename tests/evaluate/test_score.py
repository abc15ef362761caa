"""Rows of the published files, the programs made of them, and the verdicts of ``--score``."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from rasa_train.errors import UserError
from rasa_train.evaluate.problems import (
    code_candidate,
    code_problem,
    corrected,
    instruction,
    load,
    math_problem,
    program,
)
from rasa_train.evaluate.sandbox import Sandbox

SHARED = Path(__file__).parents[2].parent / "shared/data"
PROMPT = "from typing import List\n\ndef add(a: int, b: List[int]=[]) -> int:\n"
PROMPT += '    """ Add one.\n    >>> add(1)\n    2\n    """\n'
PLUS = {
    "task_id": "T/0",
    "prompt": PROMPT,
    "entry_point": "add",
    "canonical_solution": "    return a + 1\n",
    "test": "def check(candidate):\n    assert candidate(1) == 2\n",
    "base_input": [[1]],
    "plus_input": [[5], [-3]],
    "atol": 0,
}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    plain = {key: PLUS[key] for key in ("prompt", "entry_point", "canonical_solution", "test")}
    return write(tmp_path / "HumanEval.jsonl", [{**plain, "task_id": "T/0"}, {**plain, "task_id": "T/1"}])


def test_score_code(cli: Any, tmp_path: Path, problems: Path) -> None:
    samples = [
        {"task_id": "T/0", "completion": "    return a + 1\n"},
        {"task_id": "T/0", "completion": "    return a + 2\n"},
        {"task_id": "T/1", "solution": "def add(a):\n    return a + 1\n"},
        {"task_id": "T/1", "solution": "import os\nos._exit(0)\n"},
    ]
    path = write(tmp_path / "samples.jsonl", samples)
    done = cli("eval", "--score", path, "--suite", "code", "--data", problems, "--json", check=True)
    found = json.loads(done.stdout)
    assert [row["passed"] for row in found["rows"]] == [True, False, True, False]
    assert [row["task_id"] for row in found["rows"]] == ["T/0", "T/0", "T/1", "T/1"]
    assert found["rows"][1]["reason"].startswith("AssertionError")
    assert found["metrics"] == {"pass@1": 0.5} and found["samples"] == 4
    why = "needs 10 samples of every problem; 2 of 2 have fewer, the fewest 2"
    assert found["not_measured"] == {"pass@10": why}
    shown = cli("eval", "--score", write(path, samples[:1]), "--suite", "code", "--data", problems, check=True).stdout
    assert "  pass@10: not measured, needs 10 samples of every problem; 1 of 1 have fewer" in shown
    assert "  problems: not measured, 1 have no sample and do not count: T/1" in shown


def test_score_math(cli: Any, tmp_path: Path) -> None:
    rows = [
        {"problem": "?", "response": "The answer is: \\frac{1}{2}", "solution": "so $\\boxed{0.5}$"},
        {"problem": "?", "response": "so \\boxed{[1,2)}", "answer": "[1,2)"},
        {"problem": "?", "response": "The answer is: 3", "answer": "4"},
        {"question": "?", "response": "no idea", "answer": "2 + 2 = 4\n#### 4"},
    ]
    path = write(tmp_path / "samples.jsonl", rows)
    found = json.loads(cli("eval", "--score", path, "--suite", "math", "--json", check=True).stdout)
    assert [row["correct"] for row in found["rows"]] == [True, True, False, False]
    assert [row["math_sympy"] for row in found["rows"]] == [True, False, False, False]
    assert [row["reason"] for row in found["rows"]] == ["", "", "different", "no answer"]
    assert found["metrics"] == {"math_sympy": 0.25, "math_sympy_or_string": 0.25, "accuracy": 0.5}


@pytest.mark.parametrize(
    ("suite", "row", "message"),
    [
        ("code", {"task_id": "T/9", "completion": ""}, "task_id 'T/9' is not among the 2 problems"),
        ("code", {"task_id": "T/0"}, "`completion` must be text (or `solution`"),
        ("math", {"problem": "?", "answer": "1"}, "`response` must be text"),
        ("math", {"response": "1", "answer": "1"}, "a mathematics problem must have `problem`"),
        ("forgetting", {}, "--score needs --suite code, math, gsm8k, nlg, e2e, samsum or wikisql, got 'forgetting'"),
    ],
)
def test_bad_samples(cli: Any, tmp_path: Path, problems: Path, suite: str, row: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "samples.jsonl", [row])
    done = cli("eval", "--score", path, "--suite", suite, "--data", problems, "--json")
    assert done.returncode == 2 and message in done.stderr and done.stdout == ""


def test_plus_inputs_become_one_test() -> None:
    sandbox, problem = Sandbox(isolated=False), code_problem(PLUS)
    for body, passes in (
        ("return a + 1", True),
        ("return a + 1 if a < 5 else 0", False),
        ("return a + 1 + 1e-9", False),
    ):
        assert sandbox.run(program(problem, f"def add(a):\n    {body}")).passed == passes
    floats = code_problem({**PLUS, "canonical_solution": "    return a / 3\n"})
    for body, passes in (("return a / 3 + 1e-9", True), ("return a / 3 + 1e-3", False)):
        assert sandbox.run(program(floats, f"def add(a):\n    {body}")).passed == passes


def test_the_test_that_nothing_passes_is_corrected() -> None:
    broken = "assert _poly(*candidate(*inp), inp) <= 0.0001"
    assert corrected("HumanEval/32", broken) == "assert abs(_poly(*inp, candidate(*inp))) <= 0.0001"
    assert corrected("HumanEval/31", broken) == broken


def test_instruction_and_completion() -> None:
    described = (
        "Write a Python function `add(a: int, b: List[int]=[]) -> int` to solve the following problem:\nAdd one."
    )
    assert instruction(PROMPT, "add").startswith(described)
    made = code_candidate(code_problem(PLUS), "\n    x = 1\n\n    return a + x\nprint(add(1))\n    no\n")
    assert made == PROMPT.rstrip() + "\n    x = 1\n\n    return a + x"


def test_rows_of_each_published_form(tmp_path: Path) -> None:
    assert math_problem({"problem": "p", "solution": "\\boxed{7}", "answer": "8"})["gold"] == "7"
    assert math_problem({"question": "p", "answer": "x\n#### 1,200"})["gold"] == "1200"
    assert math_problem({"query": "p", "response": "The answer is: 3"})["gold"] == "3"
    assert len(load("gsm8k", "demo")) == 400
    (tmp_path / "humaneval").mkdir()
    with gzip.open(tmp_path / "humaneval" / "HumanEvalPlus.jsonl.gz", "wt") as file:
        file.write(json.dumps(PLUS))
    assert [row["task_id"] for row in load("code", str(tmp_path))] == ["T/0"]
    with pytest.raises(UserError, match="has no file for suite math"):
        load("math", str(tmp_path))


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="no HumanEval here")
@pytest.mark.parametrize("name", ["HumanEval", "HumanEvalPlus", "HumanEvalPlus-OriginFmt"])
def test_canonical_solutions_pass(name: str) -> None:
    rows = load("code", str(SHARED / f"humaneval/{name}.jsonl.gz"))
    programs = [program(row, row["prompt"] + row["canonical_solution"]) for row in rows]
    verdicts = list(Sandbox().run_all(programs))
    assert len(verdicts) == 164
    assert [row["task_id"] for row, v in zip(rows, verdicts, strict=True) if not v.passed] == []


def test_samples_that_do_not_fit_into_memory_together(
    cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rasa_train.evaluate import problems

    monkeypatch.setattr(problems, "MOST", 5 << 20)
    row = {"problem": "1 + 1", "answer": "2", "response": "a" * 1_000_000}
    said = cli("eval", "--score", write(tmp_path / "s.jsonl", [row] * 9), "--suite", "math")
    assert said.returncode == 2 and "s.jsonl:6: the rows up to this one take more than 5 MiB" in said.stderr


def test_a_sample_with_many_columns(cli: Any, tmp_path: Path) -> None:
    said = cli("eval", "--score", write(tmp_path / "s.jsonl", [{f"c{i}": 1 for i in range(20_000)}]), "--suite", "math")
    assert said.returncode == 2 and len(said.stderr) < 2000 and "more" in said.stderr
