"""Run steps one after the other, each in processes of its own, within a budget of time."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from .results import FAILED, LEFT_OUT, OK, TIMED_OUT, Results

RESERVE = 4.0
"""Seconds of the budget that are kept for the end: killing the last step, writing the results."""
LEAST = 15.0
"""Seconds without which a step is not begun, unless its own limit is smaller: importing torch takes that long."""
GRACE = 5.0
"""Seconds between asking the processes of a step to end and killing them."""

Judge = Callable[[Results, int, str], tuple[str, str]]
"""Makes the outcome and the one figure that matters from the results, an exit code, and what the step printed."""


@dataclass(frozen=True)
class Step:
    """One step: a command with a time limit."""

    name: str
    command: Sequence[str]
    limit: float
    """Seconds after which all its processes are killed."""
    judge: Judge
    captured: bool = False
    """Its standard output is a result, and does not go to the log."""


def run_steps(
    steps: Sequence[Step],
    results: Results,
    *,
    deadline: float,
    environment: Mapping[str, str],
    directory: Path,
    say: Callable[[str], None],
) -> None:
    """Run the steps in their order; what each gave is in ``results`` when the next one begins.

    Args:
        deadline: on the clock of ``time.monotonic``. A step that would go on beyond it is cut, and one that has too
            little time left is left out.
        environment: of the steps' processes.
        directory: where they run.
        say: is given one line for each step.
    """
    for step in steps:
        room = deadline - time.monotonic() - RESERVE
        if room < min(LEAST, step.limit):
            outcome, seconds, figure = LEFT_OUT, 0.0, f"{max(room, 0):.0f} s were left"
        else:
            began = time.monotonic()
            outcome, figure = run_step(step, min(step.limit, room), results, environment, directory)
            seconds = time.monotonic() - began
        results.add({"step": step.name, "outcome": outcome, "seconds": round(seconds, 1), "figure": figure})
        say(f"{step.name}: {outcome}, {seconds:.0f} s" + (f"; {figure}" if figure else ""))


def run_step(
    step: Step, limit: float, results: Results, environment: Mapping[str, str], directory: Path
) -> tuple[str, str]:
    """Run one step for at most ``limit`` seconds. Returns its outcome and its figure."""
    with results.log.open("a") as log, tempfile.TemporaryFile("w+") as captured:
        log.write(f"=== {step.name}, at most {limit:.0f} s: {' '.join(step.command)}\n")
        log.flush()
        output = captured if step.captured else log
        with _processes(step.command, output, log, environment, directory) as process:
            try:
                code: int | None = process.wait(limit)
            except subprocess.TimeoutExpired:
                code = None
        captured.seek(0)
        printed = captured.read()
    if code is None:
        _, figure = step.judge(results, 1, printed)
        return TIMED_OUT, f"killed after {limit:.0f} s" + (f"; {figure}" if figure else "")
    outcome, figure = step.judge(results, code, printed)
    return outcome, figure or (f"exit code {code}" if outcome == FAILED else "")


@contextlib.contextmanager
def _processes(
    command: Sequence[str], output: IO[str], log: IO[str], environment: Mapping[str, str], directory: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a group of its own. Nothing of the group is left at the end, whatever happens in between."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=log,
        env=dict(environment),
        cwd=directory,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            _signal(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
        _signal(process.pid, signal.SIGKILL)
        process.wait()


def _signal(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def judge_by_exit_code(results: Results, code: int, printed: str) -> tuple[str, str]:
    """A step is fine if it ended with 0; its figure is the last line that it printed."""
    lines = printed.split("\n")
    return OK if code == 0 else FAILED, next((line for line in reversed(lines) if line.strip()), "")
