"""Text of others on the terminal: escape sequences in data, names and answers are shown, not obeyed."""

from __future__ import annotations

import ast
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rasa_train.check.check import CheckResult
from rasa_train.check.examples import Piece, Shown
from rasa_train.errors import say
from rasa_train.training.reporter import Reporter

PACKAGE = Path(__file__).resolve().parents[1] / "rasa_train"
EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m\r\u202eevil"
SHOWN = "\\x1b]0;owned\\x07\\x1b[2J\\x9b31m\\r\\u202eevil"


def harmless(text: str) -> bool:
    return SHOWN in text and not any(c in text for c in "\x1b\x07\x9b\r\u202e")


def test_say_prints_text_of_others(capsys: pytest.CaptureFixture[str]) -> None:
    say(EVIL)
    assert harmless(capsys.readouterr().out)


def test_the_check_of_a_data_set_with_escapes(tmp_path: Path, cli: Any) -> None:
    """In a sample, and in the name of a column that is not used."""
    rows = [{"query": f"Why {EVIL}?", "response": f"{EVIL}!", f"c{EVIL}": 1}] * 4
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "r.yaml").write_text(
        "model: {name: demo, dtype: float32}\nadapter: {method: lora, r: 4}\n"
        "data: {dataset: d.jsonl}\ntraining: {max_steps: 1, batch_size: 2}\noutput_dir: run\n"
    )
    said = cli("train", "check", "r.yaml", check=True)
    assert harmless(said.stdout) and f"c{SHOWN}" in said.stdout


def test_a_check_in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    from rasa_train.check import check

    screen = io.StringIO()
    monkeypatch.setattr(
        check, "Console", lambda **given: Console(file=screen, force_terminal=True, width=500, no_color=True, **given)
    )
    monkeypatch.setattr(check, "_lines", lambda _: [("model", f"[red]{EVIL}")])
    monkeypatch.setattr(check, "_topics", lambda _: [(EVIL, True, EVIL)])
    sample = Shown("", 0, "first", 1, 1, [Piece(EVIL, trained=True)])
    result = object.__new__(CheckResult)
    result.__dict__.update(
        estimate=None, samples=[sample], notes=[EVIL], served={}, problems=[check.Problem("data", EVIL)]
    )
    result.show()
    assert f"[red]{SHOWN}" in screen.getvalue()
    assert screen.getvalue().count(SHOWN) == 6 and "\x1b]" not in screen.getvalue() and "\x07" not in screen.getvalue()


@pytest.mark.slow
def test_the_reason_of_a_wrong_answer(tmp_path: Path, cli: Any) -> None:
    row = {"problem": "1 + 1", "answer": f"2{EVIL}", "response": f"The answer is: {EVIL}"}
    (tmp_path / "s.jsonl").write_text(json.dumps(row) + "\n")
    said = cli("eval", "--score", "s.jsonl", "--suite", "math", check=True)
    assert not any(c in said.stdout + said.stderr for c in "\x1b\x07\x9b\r\u202e")


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("train", ["check", f"r{EVIL}.yaml"]),
        ("train", [f"--x{EVIL}"]),
        ("eval", ["--score", f"s{EVIL}.jsonl"]),
        ("merge", [f"m{EVIL}", "--output", "out"]),
        ("report", [f"r{EVIL}"]),
    ],
)
def test_an_error_that_names_a_file(command: str, arguments: list[str], cli: Any) -> None:
    said = cli(command, *arguments)
    assert said.returncode == 2 and not any(c in said.stdout + said.stderr for c in "\x1b\x07\x9b\r\u202e")
    assert "\\x1b]0;owned" in said.stderr


def test_a_line_above_the_progress_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    reporter = object.__new__(Reporter)
    reporter.console = Console(file=io.StringIO(), force_terminal=True, width=500, highlight=False)
    reporter.say(EVIL)
    assert harmless(reporter.console.file.getvalue())  # type: ignore[attr-defined]


def test_everything_that_is_printed_goes_through_one_function() -> None:
    """``print`` is for JSON, whose control characters are escapes already, and for text that ``shown`` has made."""
    seen = 0
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"):
                continue
            seen += 1
            [argument] = node.args
            branches = [argument.body, argument.orelse] if isinstance(argument, ast.IfExp) else [argument]
            made = [ast.unparse(branch.func) for branch in branches if isinstance(branch, ast.Call)]
            line = path.name == "eval.py" and "line" in ast.unparse(argument)  # made by ``shown`` a few lines above
            assert line or (len(made) == len(branches) and set(made) <= {"json.dumps", "shown"}), (path, node.lineno)
    assert seen > 10
