"""Standard streams that fail, and processes that must not outlive another: light commands in processes of their own."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rasa_train.recipe.sweep import _child

LIST = [sys.executable, "-m", "rasa_train.cli.train", "list"]


@pytest.mark.parametrize(
    ("command", "ascii"),
    [("train", {"PYTHONIOENCODING": "ascii"}), ("report", {"LC_ALL": "C", "PYTHONUTF8": "0"})],
)
def test_help_is_printed_in_a_narrow_terminal_without_unicode(command: str, ascii: dict[str, str]) -> None:
    environment = {**os.environ, **ascii, "COLUMNS": "40", "PYTHONCOERCECLOCALE": "0"}
    help_ = [sys.executable, "-m", f"rasa_train.cli.{command}", "--help"]
    done = subprocess.run(help_, env=environment, capture_output=True, encoding="ascii", check=False)
    assert done.returncode == 0 and done.stderr == "" and "Usage" in done.stdout


def test_a_list_whose_reader_has_gone_ends_quietly() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(LIST, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_file_does_not_get_the_number_of_a_closed_stream(tmp_path: Path) -> None:
    """Or a library's message to stderr would be written into a checkpoint."""
    code = "from rasa_train.io import streams; streams.guard(); import os; print(os.open('x', os.O_CREAT))"
    shell = f'{sys.executable} -c "{code}" 0<&- 2>&-'
    done = subprocess.run(shell, shell=True, stdout=subprocess.PIPE, cwd=tmp_path, check=True, text=True)
    assert int(done.stdout) > 2


def test_an_error_whose_stderr_is_full_keeps_its_exit_code() -> None:
    with open("/dev/full", "w") as full:
        assert subprocess.run([*LIST, "--wrong"], stderr=full, stdout=full, check=False).returncode == 2


CHILD = """
import os, signal, sys, time
from rasa_train.stop import PARENT, die_with
signal.signal(signal.SIGTERM, lambda *_: (open(sys.argv[1] + "/asked", "w"), sys.exit(75)))
die_with(int(os.environ[PARENT]), signal.SIGTERM)
open(sys.argv[1] + "/ready", "w").write(str(os.getpid()))
time.sleep(300)
"""


def _wait_for(path: Path) -> None:
    for _ in range(6000):
        if path.exists():
            return
        time.sleep(0.01)
    raise AssertionError(f"no {path}")


def test_the_run_of_a_killed_sweep_is_asked_to_stop(tmp_path: Path) -> None:
    command = [sys.executable, "-c", CHILD, str(tmp_path)]
    sweep = multiprocessing.get_context("fork").Process(target=_child, args=(command, False))
    sweep.start()
    _wait_for(tmp_path / "ready")
    os.kill(sweep.pid or 0, signal.SIGKILL)
    sweep.join()
    _wait_for(tmp_path / "asked")


def test_a_run_whose_sweep_has_ended_already_does_not_begin() -> None:
    done = subprocess.run(LIST, env={**os.environ, "RASA_TRAIN_PARENT": "1"}, capture_output=True, check=False)
    assert done.returncode == -signal.SIGTERM


def test_a_worker_whose_launcher_has_ended_already_does_not_begin(tmp_path: Path) -> None:
    (tmp_path / "launcher").write_text("1")
    worker = [sys.executable, "-m", "rasa_train.launch.worker_process", str(tmp_path)]
    assert subprocess.run(worker, capture_output=True, check=False).returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == ["launcher"]
