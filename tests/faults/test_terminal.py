"""Runs whose terminal, reader or log goes away: training goes on, and the exit code is that of the run."""

from __future__ import annotations

import json
import os
import pty
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import Whole
from .harness import Command, same_result, start


def reader_gone() -> int:
    """``| head``, which has ended."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def disk_full() -> int:
    return os.open("/dev/full", os.O_WRONLY)


def terminal_gone() -> int:
    master, terminal = pty.openpty()
    os.close(master)
    return terminal


def nobody_reads() -> int:
    """A full pipe that does not wait, whose reader sleeps."""
    _, writer = os.pipe()
    os.set_blocking(writer, False)
    try:
        while os.write(writer, bytes(4096)):
            pass
    except BlockingIOError:
        return writer


def _put(stdout: int | None, stderr: int | None) -> None:
    for number, descriptor in ((1, stdout), (2, stderr)):
        os.close(number) if descriptor is None else os.dup2(descriptor, number)


def both_closed() -> None:
    _put(None, None)


def head_and_full_disk() -> None:
    _put(disk_full(), reader_gone())


def full_disk_and_head() -> None:
    _put(reader_gone(), disk_full())


def terminal() -> None:
    _put(terminal_gone(), terminal_gone())


def sleeping_reader() -> None:
    _put(reader_gone(), nobody_reads())


MORE = [pytest.param(streams, marks=pytest.mark.slow) for streams in (full_disk_and_head, sleeping_reader)]


@pytest.mark.parametrize("streams", [both_closed, head_and_full_disk, terminal, *MORE])
def test_a_run_goes_on_without_its_terminal(streams: Callable[[], None], whole: Whole, tmp_path: Path) -> None:
    assert start("train", whole.recipe, cwd=tmp_path, setup=streams).wait() == 0
    same_result(tmp_path / "run", whole.run)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 10


def reader_of_stdout_gone() -> None:
    os.dup2(reader_gone(), 1)


def stdout_on_full_disk() -> None:
    os.dup2(disk_full(), 1)


def test_a_report_whose_reader_has_gone_ends_quietly(whole: Whole, tmp_path: Path) -> None:
    command = start("report", whole.run, "--json", cwd=tmp_path, setup=reader_of_stdout_gone)
    assert command.wait() == 0 and command.said == ""


def test_a_report_that_a_full_disk_does_not_take_is_an_error(whole: Whole, tmp_path: Path) -> None:
    command = start("report", whole.run, "--json", cwd=tmp_path, setup=stdout_on_full_disk)
    assert command.wait() == 2
    assert command.said == "error: stdout cannot be written: No space left on device\n"


def small_files() -> None:
    """``ulimit -f 8``"""
    resource.setrlimit(resource.RLIMIT_FSIZE, (8 * 512, 8 * 512))


def test_a_limit_on_the_size_of_files_is_one_line(whole: Whole, tmp_path: Path) -> None:
    command = start("train", whole.recipe, cwd=tmp_path, setup=small_files)
    assert command.wait() == 2
    assert "Traceback" not in command.said
    assert "File too large" in command.said and "ulimit -f" in command.said


def _after_first_checkpoint(command: Command, run: Path) -> None:
    while not list((run / "checkpoints").glob("step-*")):
        assert command.process.exitcode is None, command.said
        time.sleep(0.01)


def test_a_closed_terminal_saves_the_run(whole: Whole, tmp_path: Path) -> None:
    command = start("train", whole.recipe, "training.max_steps=2000", cwd=tmp_path)
    _after_first_checkpoint(command, tmp_path / "run")
    os.kill(command.process.pid, signal.SIGHUP)
    assert command.wait() == 75, command.said
    assert "SIGHUP: saved at step" in command.said


def ignores_hangups() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def test_nohup_goes_on(whole: Whole, tmp_path: Path) -> None:
    command = start("train", whole.recipe, cwd=tmp_path, setup=ignores_hangups)
    _after_first_checkpoint(command, tmp_path / "run")
    os.kill(command.process.pid, signal.SIGHUP)
    assert command.wait() == 0, command.said
