"""Compute verdicts and metrics from responses. Needs neither a model nor torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from ..data.columns import listed
from ..errors import UserError
from . import generated
from .answers import Checker, given_answer, marked_answer
from .passk import mean_pass_at_k, without_pass_at_k
from .problems import Row, code_problem, load, local_rows, math_problem, program
from .sandbox import Program, Sandbox

Tick = Callable[[int, int], None]
"""Called with (verdicts so far, verdicts in all)."""
SCORED = ("code", "math", "gsm8k", "nlg", *generated.SUITES)
"""Suites whose responses can be scored without a model."""


def score_math(
    problems: Sequence[Row], responses: Sequence[str], tick: Tick | None = None, checker: Checker | None = None
) -> list[Row]:
    """Return a verdict for each response: ``index``, ``correct`` (robust), ``math_sympy`` (the paper's rule),
    ``math_sympy_or_string``, ``answer``, ``gold``, ``reason``. A given ``checker`` is used and left open."""
    pairs = [(p["gold"], marked_answer(text), given_answer(text)) for p, text in zip(problems, responses, strict=True)]
    rows: list[Row] = []
    with nullcontext(checker) if checker else Checker(workers=None if len(pairs) > 50 else 1) as used:
        for index, (pair, same) in enumerate(zip(pairs, used.check(pairs), strict=True)):
            rows.append(
                {
                    "index": index,
                    "correct": same.accuracy,
                    "math_sympy": same.math_sympy,
                    "math_sympy_or_string": same.math_sympy_or_string,
                    "answer": pair[2],
                    "gold": pair[0],
                    "reason": same.reason,
                    **{key: problems[index][key] for key in ("level", "type") if key in problems[index]},
                }
            )
            if tick:
                tick(index + 1, len(pairs))
    return rows


def math_metrics(rows: Sequence[Row]) -> dict[str, float]:
    """Return shares in [0, 1], with ``math_sympy`` by subject and level as well, where the rows have these."""
    metrics = {
        name: _share(row[key] for row in rows)
        for name, key in (
            ("math_sympy", "math_sympy"),
            ("math_sympy_or_string", "math_sympy_or_string"),
            ("accuracy", "correct"),
        )
    }
    for key in ("level", "type"):
        for value in sorted({str(row[key]) for row in rows if key in row}):
            metrics[f"math_sympy/{value}"] = _share(row["math_sympy"] for row in rows if str(row.get(key)) == value)
    return metrics


def score_code(
    programs: Sequence[tuple[str, Program | str]],
    sandbox: Sandbox,
    workers: int | None = None,
    tick: Tick | None = None,
) -> list[Row]:
    """Return a verdict for each (task id, program): ``index``, ``task_id``, ``passed``, ``correct``, ``reason``."""
    rows: list[Row] = []
    verdicts = sandbox.run_all((text for _, text in programs), workers)
    for index, ((task_id, _), verdict) in enumerate(zip(programs, verdicts, strict=True)):
        rows.append(
            {
                "index": index,
                "task_id": task_id,
                "passed": verdict.passed,
                "correct": verdict.passed,
                "reason": verdict.reason,
            }
        )
        if tick:
            tick(index + 1, len(programs))
    return rows


def code_metrics(rows: Sequence[Row]) -> dict[str, float]:
    """Return ``pass@1`` and, with enough samples of every problem, ``pass@10``."""
    return mean_pass_at_k(_counts(rows))


def code_not_measured(rows: Sequence[Row]) -> dict[str, str]:
    """Return why a metric of code is not among ``code_metrics``, by its name."""
    return without_pass_at_k(_counts(rows))


def _counts(rows: Sequence[Row]) -> list[tuple[int, int]]:
    """Return (samples, samples that passed) of each problem."""
    counts: dict[str, tuple[int, int]] = {}
    for row in rows:
        samples, passed = counts.get(row["task_id"], (0, 0))
        counts[row["task_id"]] = (samples + 1, passed + bool(row["passed"]))
    return list(counts.values())


def score_file(
    path: Path,
    suite: str,
    data: str | None,
    make_sandbox: Callable[[], Sandbox],
    workers: int | None = None,
    tick: Tick | None = None,
) -> dict[str, Any]:
    """Score generations that were made elsewhere.

    Args:
        path: JSON lines. Code: ``task_id`` and ``solution`` (a whole program) or ``completion`` (the text after the
            prompt). Mathematics: ``problem``, ``response``, and ``solution`` or ``answer``. ``nlg``, ``samsum`` and
            ``wikisql``: as in ``generated.score_samples``.
        data: file or directory of the code problems; None for the lines' own ``test`` programs, or else for the hub.
            For ``wikisql`` that of the questions.
        make_sandbox: called only for code.
    Returns:
        ``suite``, ``samples``, ``metrics``, ``not_measured`` (why a metric or problems are missing), and ``rows`` with
        a verdict for each line.
    Raises:
        UserError: a line lacks a field, or names an unknown problem.
    """
    if suite not in SCORED:
        raise UserError(f"--score needs --suite {', '.join(SCORED[:-1])} or {SCORED[-1]}, got {suite!r}")
    samples = list(local_rows(_existing(path)))
    if not samples:
        raise UserError(f"{path} has no samples")
    if suite in ("nlg", *generated.SUITES):
        return generated.scored_file(suite, samples, data)
    missing: dict[str, str] = {}
    if suite == "code":
        programs, absent = _programs(samples, data)
        rows = score_code(programs, make_sandbox(), workers, tick)
        metrics, missing = code_metrics(rows), code_not_measured(rows)
        if absent:
            missing["problems"] = f"{len(absent)} have no sample and do not count: {', '.join(absent[:5])}" + (
                ", ..." if len(absent) > 5 else ""
            )
    else:
        problems = [math_problem({key: v for key, v in row.items() if key != "response"}, at) for at, row in samples]
        rows = score_math(problems, [_text(row, "response", where) for where, row in samples], tick)
        metrics = math_metrics(rows)
    return {"suite": suite, "samples": len(rows), "metrics": metrics, "not_measured": missing, "rows": rows}


def _programs(
    samples: Sequence[tuple[str, Row]], data: str | None
) -> tuple[list[tuple[str, Program | str]], list[str]]:
    """Return (task id, program) of each sample, and the ids of the problems that have none."""
    own = all(isinstance(row.get("test"), str) for _, row in samples)
    problems = {} if own and data is None else {row["task_id"]: row for row in load("code", data)}
    programs: list[tuple[str, Program | str]] = []
    for where, row in samples:
        task_id = _text(row, "task_id", where)
        if problems and task_id not in problems:
            raise UserError(f"{where}: task_id {task_id!r} is not among the {len(problems)} problems")
        problem = problems.get(task_id) or code_problem({"prompt": "", **row}, where)
        if isinstance(row.get("solution"), str):
            candidate = row["solution"]
        else:
            candidate = problem["prompt"] + _text(row, "completion", where)
        programs.append((task_id, program(problem, candidate)))
    return programs, sorted(problems.keys() - {task_id for task_id, _ in programs})


def _text(row: Row, key: str, where: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        other = " (or `solution`, a whole program)" if key == "completion" else ""
        raise UserError(f"{where}: `{key}` must be text{other}; the row has {listed(row)}")
    return value


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise UserError(f"--score: {path} is not a file")
    return path


def _share(values: Any) -> float:
    listed = [bool(value) for value in values]
    return sum(listed) / len(listed)
