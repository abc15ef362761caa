"""Disks that are full or read-only, clocks that jump, two runs in one place."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rasa_train.training.checkpoint import damage
from tests.test_train import metrics

from .conftest import Whole
from .harness import Command, check_kept, inject, same_result, start

FAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)


def until(condition: Callable[[], bool], command: Command | None = None) -> None:
    end = time.monotonic() + 900
    while not condition():
        assert time.monotonic() < end, command.said if command else ""
        time.sleep(0.01)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 400 kB."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(path)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting needs root")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def fill(disk: Path, leave: int) -> Path:
    """A file that leaves so many bytes."""
    ballast = disk / "ballast"
    free = os.statvfs(disk)
    ballast.write_bytes(bytes(max(free.f_bavail * free.f_frsize - leave, 0)))
    return ballast


def test_a_disk_that_stays_full(disk: Path, whole: Whole) -> None:
    """The run goes to its end without a checkpoint, and says what it cannot write; with room the same command does."""
    ballast = fill(disk, 48 << 10)
    command = start("train", whole.recipe, cwd=disk)
    assert command.wait() == 2, command.said
    assert "No space left on device: no checkpoint of step 2" in command.said
    assert "Make room: the same command goes on from there" in command.said and "Traceback" not in command.said
    inject("disk full")
    check_kept(disk / "run", 10)
    ballast.unlink()
    again = start("train", whole.recipe, "training.keep_last=1", cwd=disk)
    assert again.wait() == 0, again.said
    same_result(disk / "run", whole.run)


@pytest.mark.slow
def test_a_disk_that_has_room_again(disk: Path, whole: Whole, tmp_path: Path) -> None:
    options = ["training.max_steps=60", "training.keep_last=1"]
    quiet = start("train", whole.recipe, *options, cwd=tmp_path)
    assert quiet.wait() == 0, quiet.said
    ballast = fill(disk, 48 << 10)
    command = start("train", whole.recipe, *options, cwd=disk)
    until(lambda: "no checkpoint of step" in command.said, command)
    ballast.unlink()
    assert command.wait() == 0, command.said
    assert "there is room again: the run is saved at step" in command.said
    inject("disk full")
    same_result(disk / "run", tmp_path / "run")


@pytest.mark.slow
def test_a_full_disk_and_two_workers(disk: Path, whole: Whole) -> None:
    """Both go on past the checkpoint that has no room, both end when it is needed, with one message; the checkpoint
    before is kept, and with room the same command goes on from it."""
    options = ["--nproc", "2", "training.micro_batch_size=2", "distributed.timeout_seconds=60"]
    first = start("train", whole.recipe, *options, "training.max_steps=200", cwd=disk)
    saved = disk / "run" / "checkpoints"
    until(lambda: (saved / "step-00000004").exists(), first)
    ballast = fill(disk, 16 << 10)
    assert first.wait() == 2, first.said
    assert first.said.count("error: ") == 1 and "Traceback" not in first.said, first.said
    assert "No space left on device: no checkpoint of step" in first.said and "Make room" in first.said
    inject("disk full, two workers")
    kept = sorted(saved.iterdir())
    assert kept and all(damage(path) is None for path in kept)
    ballast.unlink()
    again = start("train", whole.recipe, *options, "training.max_steps=200", "training.keep_last=1", cwd=disk)
    until(lambda: "resuming from" in again.said or again.process.exitcode is not None, again)
    assert kept[-1].name in again.said
    os.kill(again.process.pid, signal.SIGTERM)
    assert again.wait() == 75, again.said


def test_a_full_disk_and_a_merge(disk: Path, whole: Whole) -> None:
    fill(disk, 16 << 10)
    command = start("merge", whole.run, "--output", "merged", cwd=disk)
    assert command.wait() == 2 and "Traceback" not in command.said, command.said
    assert [path.name for path in disk.iterdir()] == ["ballast"]
    inject("disk full")


@pytest.mark.parametrize("arguments", [["train", "{recipe}"], ["merge", "{run}", "--output", "merged"]])
def test_a_read_only_disk(arguments: list[str], disk: Path, whole: Whole) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    name, *rest = [argument.format(recipe=whole.recipe, run=whole.run) for argument in arguments]
    command = start(name, *rest, cwd=disk)
    assert command.wait() == 2 and "Traceback" not in command.said, command.said
    assert "Read-only file system" in command.said
    inject("read-only disk")


def test_a_complete_run_on_a_read_only_disk_is_shown_and_read(disk: Path, whole: Whole, tmp_path: Path) -> None:
    for name in ("recipe.yaml", "metrics.jsonl", "summary.json"):
        (disk / "run").mkdir(exist_ok=True)
        shutil.copy(whole.run / name, disk / "run")
    shutil.copytree(whole.run / "adapter", disk / "run" / "adapter")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    shown = start("train", whole.recipe, cwd=disk)
    assert shown.wait() == 0 and "run is complete (10 steps" in shown.said, shown.said
    merged = start("merge", "run", "--output", tmp_path / "merged", cwd=disk)
    assert merged.wait() == 0, merged.said
    report = start("report", "run", "--output", tmp_path / "r.html", cwd=disk)
    assert report.wait() == 0 and "1 run, 1 complete" in report.said, report.said
    fresh = start("train", whole.recipe, "--fresh", cwd=disk)
    assert fresh.wait() == 2 and "Read-only file system" in fresh.said and "Traceback" not in fresh.said


@pytest.mark.slow
def test_two_runs_in_one_place(whole: Whole, tmp_path: Path) -> None:
    """The second is refused; when the first is killed, the next one has the place at once."""
    options = ["training.max_steps=40"]
    first = start("train", whole.recipe, *options, cwd=tmp_path)
    until(lambda: (tmp_path / "run" / "metrics.jsonl").exists(), first)
    second = start("train", whole.recipe, *options, cwd=tmp_path)
    assert second.wait() == 2 and "is in use by process" in second.said
    os.kill(first.process.pid, signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    third = start("train", whole.recipe, *options, cwd=tmp_path)
    assert third.wait() == 0, third.said
    inject("second run in one directory")


def jumping(now: float) -> float:
    """An hour back and an hour on, every third of a second."""
    return now + (0, -3600, 3600)[int(now * 3) % 3]


def test_the_time_of_day_jumps_all_the_time(whole: Whole, tmp_path: Path) -> None:
    """Nothing is computed from it, and no duration taken by it."""
    begun = time.monotonic()
    command = start("train", whole.recipe, cwd=tmp_path, clock=jumping)
    assert command.wait() == 0, command.said
    seconds = [row["seconds"] for row in metrics(tmp_path / "run")]
    assert all(each > 0 for each in seconds) and sum(seconds) < time.monotonic() - begun
    inject("clock that jumps")
    same_result(tmp_path / "run", whole.run)


@pytest.mark.slow
@pytest.mark.skipif(FAKETIME is None, reason="needs libfaketime (Debian: faketime)")
def test_the_clock_jumps(whole: Whole, tmp_path: Path) -> None:
    """Back by a year and forward by two while it trains; then it is killed and goes on a year before all its files."""
    now = tmp_path / "now"
    now.write_text("+0d\n")
    command = [sys.executable, "-m", "rasa_train.cli.train", str(whole.recipe), "training.log_every=1"]
    fake = {"LD_PRELOAD": str(FAKETIME), "FAKETIME_TIMESTAMP_FILE": str(now), "FAKETIME_NO_CACHE": "1"}
    env = os.environ | fake | {"FAKETIME_DONT_FAKE_MONOTONIC": "1"}
    lines = tmp_path / "run" / "metrics.jsonl"

    def train() -> subprocess.Popen[bytes]:
        return subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    process = train()
    for steps, jump in ((1, "-365d"), (3, "+365d")):
        until(lambda steps=steps: process.poll() is not None or _lines(lines) >= steps)  # type: ignore[misc]
        now.write_text(f"{jump}\n")
        inject("clock that jumps")
    until(lambda: process.poll() is not None or _lines(lines) >= 5)
    process.kill()
    assert process.wait() in (0, -signal.SIGKILL)
    now.write_text("-365d\n")
    inject("clock that jumps")
    process = train()
    _, said = process.communicate(timeout=900)
    assert process.returncode == 0, said
    same_result(tmp_path / "run", whole.run)


def _lines(path: Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0
