"""Load the questions: rows of the published files, local or from the hub, in one form for each suite."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from ..data.columns import listed
from ..data.demo_problems import held_out
from ..data.evaluation_sets import GSM8K, HUMANEVAL, MATH, HubSets
from ..data.hub_source import HubSource
from ..data.sources import find_source
from ..errors import UserError
from ..io.bounded import weight
from .answers import boxed_answer, gsm8k_answer, marked_answer
from .sandbox import Program

Row = dict[str, Any]

MOST = 1 << 30
"""Bytes of questions, or of samples, that are held at a time."""


@dataclass(frozen=True)
class Origin:
    """Where a suite's rows are published, and the names of its files."""

    hub: HubSets
    files: tuple[str, ...]
    """Patterns of files below ``--data DIR``, the preferred one first."""


ORIGINS = {
    "math": Origin(
        MATH,
        ("*math*test*.json*", "math/*test*.json*", "math/*.json*", "MATH/*.json*", "*math*.json*", "test.json*"),
    ),
    "gsm8k": Origin(
        GSM8K,
        ("*gsm8k*test*.json*", "gsm8k/*test*.json*", "gsm8k/*.json*", "*gsm8k*.json*", "test.json*", "train.json*"),
    ),
    "code": Origin(
        HUMANEVAL,
        (
            "*HumanEvalPlus-OriginFmt*",
            "humaneval/HumanEvalPlus-OriginFmt*",
            "*HumanEvalPlus*",
            "humaneval/HumanEvalPlus*",
            "*HumanEval*",
            "humaneval/HumanEval*",
        ),
    ),
}
INSTRUCTIONS = ("bigcode/humanevalpack", "python")
"""Hub id and subset of the set whose ``instruction`` field the paper's prompt quotes."""


def load(suite: str, data: str | None) -> list[Row]:
    """Return the rows of ``math``, ``gsm8k`` or ``code``.

    Args:
        data: a file or directory in the published format, or ``demo`` for the word problems of this package; None
            for the hub.
    Returns:
        For mathematics, rows with ``problem``, ``gold`` and all other fields of the file; for code, rows with
        ``task_id``, ``prompt``, ``entry_point``, ``test`` (a program that defines ``check``) and ``instruction``.
    Raises:
        UserError: the rows cannot be found, or are of another set.
    """
    rows = [(code_problem if suite == "code" else math_problem)(row, where) for where, row in _raw(suite, data)]
    if suite == "code" and data is None:
        described = {f"HumanEval/{row['task_id'].partition('/')[2]}": row for row in _hub("code", (INSTRUCTIONS,))}
        for row in rows:
            row["instruction"] = described[row["task_id"]]["instruction"]
    if not rows:
        raise UserError(f"--data: {data} has no rows")
    return rows


def local_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """Yield the rows of a file and their places. Raises ``UserError`` when they do not fit into memory together."""
    total = 0
    for where, row in find_source(str(path))[0].rows():
        if (total := total + weight(row)) > MOST:
            raise UserError(f"{where}: the rows up to this one take more than {MOST >> 20:,} MiB; split the file")
        yield where, dict(row)


def find_file(suite: str, data: str, patterns: Iterable[str]) -> Path:
    """Return the file that ``--data`` names for a suite. Raises ``UserError`` when there is no such file."""
    path = Path(data).expanduser()
    if path.is_dir():
        for pattern in patterns:
            if found := sorted(p for p in path.glob(pattern) if p.is_file()):
                return found[0]
        raise UserError(f"--data: {data} has no file for suite {suite}; the expected names are {', '.join(patterns)}")
    if not path.is_file():
        raise UserError(f"--data: {data} does not exist")
    return path


def math_problem(row: Row, where: str = "row") -> Row:
    """Return a row of MATH, GSM8K or MetaMathQA with ``problem`` and ``gold`` added."""
    problem = next((row[key] for key in ("problem", "question", "query") if isinstance(row.get(key), str)), None)
    answer, solution = row.get("answer"), row.get("solution", row.get("response"))
    gold = None
    if isinstance(solution, str):
        gold = boxed_answer(solution) or marked_answer(solution)
    if gold is None and isinstance(answer, str | int | float):
        text = str(answer)
        gold = gsm8k_answer(text) or boxed_answer(text) or text.strip()
    if problem is None or not gold:
        raise UserError(
            f"{where}: a mathematics problem must have `problem` (or `question`, `query`), and either `solution` with "
            f"a boxed answer or `answer`; the row has {listed(row)}"
        )
    return {**row, "problem": problem, "gold": gold}


def code_problem(row: Row, where: str = "row") -> Row:
    """Return the problem in a row of HumanEval or HumanEval+ (either format), with a single ``test`` program."""
    if missing := [key for key in ("task_id", "prompt", "entry_point", "test") if not isinstance(row.get(key), str)]:
        raise UserError(
            f"{where}: a row of HumanEval must have task_id, prompt, entry_point and test; {missing[0]} is missing"
        )
    keys = ("task_id", "prompt", "entry_point", "canonical_solution", "instruction")
    problem = {key: row[key] for key in keys if key in row}
    problem["test"] = _test_of_inputs(row) if "plus_input" in row else corrected(row["task_id"], row["test"])
    problem.setdefault("instruction", instruction(row["prompt"], row["entry_point"]))
    return problem


def program(problem: Row, candidate: str) -> Program:
    """Return the program to run, with its test. No imports are added."""
    return Program(candidate, problem["prompt"], problem["test"], problem["entry_point"])


def code_candidate(problem: Row, completion: str) -> str:
    """Return the program that a completion of the paper's prompt makes. The completion's first line continues the
    prompt's last; of the lines after it, those from the first one that is neither empty nor indented are dropped."""
    lines = completion.split("\n")
    kept = [lines[0], *takewhile(lambda line: not line.strip() or line[0] in " \t", lines[1:])]
    return str(problem["prompt"]).rstrip() + "\n".join(kept)


def instruction(prompt: str, entry_point: str) -> str:
    """Return HumanEvalPack's instruction, made from the prompt: the signature, then the docstring unindented."""
    try:
        nodes = [node for node in ast.parse(f"{prompt.rstrip()}\n    pass\n").body if isinstance(node, ast.FunctionDef)]
        function = next(node for node in nodes if node.name == entry_point)
    except (SyntaxError, StopIteration):
        return prompt.strip()
    returns = f" -> {ast.unparse(function.returns)}" if function.returns else ""
    signature = f"{entry_point}({ast.unparse(function.args)}){returns}"
    described = ast.get_docstring(function) or ""
    return f"Write a Python function `{signature}` to solve the following problem:\n{described}"


def corrected(task_id: str, test: str) -> str:
    """Return a test program with its error corrected. In the single-program format, HumanEval+ v0.1.10 has one test
    that nothing can pass: HumanEval/32 evaluates the polynomial with its arguments swapped and without an absolute
    value, where |p(candidate(p))| <= 1e-4 is meant."""
    if task_id != "HumanEval/32":
        return test
    return test.replace("_poly(*candidate(*inp), inp) <=", "abs(_poly(*inp, candidate(*inp))) <=")


def _test_of_inputs(row: Row) -> str:
    """Return a program whose ``check`` compares the candidate with the canonical solution on the base and plus inputs,
    as EvalPlus does."""
    inputs = [*_decoded(row["base_input"]), *_decoded(row["plus_input"])]
    values = {
        "_REFERENCE": row["prompt"] + row["canonical_solution"],
        "_INPUTS": json.dumps(inputs),
        "_ENTRY": row["entry_point"],
        "_ATOL": float(row.get("atol") or 0),
        "_ROOT": row["task_id"] == "HumanEval/32",
    }
    return "".join(f"{name} = {value!r}\n" for name, value in values.items()) + _COMPARE


def _decoded(inputs: Any) -> list[Any]:
    decoded: list[Any] = json.loads(inputs) if isinstance(inputs, str) else inputs
    return decoded


_COMPARE = """
def _floats(x):
    return isinstance(x, float) or (isinstance(x, (list, tuple)) and all(isinstance(i, float) for i in x))

def _close(got, expected, atol):
    if isinstance(expected, (list, tuple)):
        return len(got) == len(expected) and all(_close(g, e, atol) for g, e in zip(got, expected))
    return abs(got - expected) <= atol + 1e-7 * abs(expected)

def check(candidate):
    import copy, json
    reference = {}
    exec(_REFERENCE, reference)
    for inputs in json.loads(_INPUTS):
        if _ROOT:
            assert abs(reference["poly"](*copy.deepcopy(inputs), candidate(*inputs))) <= _ATOL, inputs
            continue
        expected = reference[_ENTRY](*copy.deepcopy(inputs))
        got = candidate(*copy.deepcopy(inputs))
        if got == expected:
            continue
        atol = _ATOL or (1e-6 if _floats(expected) else 0)
        assert atol and _close(got, expected, atol), inputs
"""


def _raw(suite: str, data: str | None) -> Iterable[tuple[str, Row]]:
    if data == "demo" and suite != "code":
        return ((f"demo problem {i + 1}", dict(row)) for i, row in enumerate(held_out()))
    if data is not None:
        return local_rows(find_file(suite, data, ORIGINS[suite].files))
    return ((f"row {i + 1}", row) for i, row in enumerate(_hub(suite, ORIGINS[suite].hub)))


def _hub(suite: str, sets: Iterable[tuple[str, str | None]]) -> list[Row]:
    try:
        return [dict(row) for name, subset in sets for _, row in HubSource(name, subset, "test", None).rows()]
    except UserError as error:
        names = ", ".join(sorted({name for name, _ in sets}))
        raise UserError(
            f"the questions of suite {suite} ({names}) are not on this machine, and the hub cannot be reached or does "
            "not have them. Run the same command once with a network connection, or give files in the published "
            f"format: --data PATH, a file or a directory that has {' or '.join(ORIGINS[suite].files)}\n({error})"
        ) from None
