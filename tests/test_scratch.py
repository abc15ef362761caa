"""Temporary directories of processes that were killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from rasa_train.io import scratch
from rasa_train.io.scratch import scratch_directory


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    scratch._tidy.cache_clear()
    yield tmp_path
    scratch._tidy.cache_clear()


def stay(pipe: Connection) -> None:
    with scratch_directory("job") as directory:
        (directory / "recipe.yaml").write_text("x")
        pipe.send(directory)
        signal.pause()


def started() -> tuple[Path, int]:
    """The directory of a new process, and the process's number."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=stay, args=(there,), daemon=True)
    process.start()
    assert process.pid
    return here.recv(), process.pid


def kill(number: int) -> None:
    os.kill(number, signal.SIGKILL)
    os.waitpid(number, 0)


def test_the_next_start_removes_what_a_killed_launcher_left(temporary: Path) -> None:
    (left, dead), (used, alive) = started(), started()
    mine = [temporary / name for name in ("rasa-train-job-notes", "rasa-train-abcdefgh", "rasa-train-job-archived")]
    for path in mine:  # names that no start makes, or an older version's, which had no lock
        path.mkdir()
    kill(dead)
    assert left.exists()
    with scratch_directory("job") as directory:
        assert not left.exists() and used.exists() and directory.stat().st_mode & 0o777 == 0o700
    assert not directory.exists() and all(path.exists() for path in mine)
    kill(alive)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to have files of another user")
def test_directories_and_links_of_other_users_stay(temporary: Path) -> None:
    (temporary / "precious").mkdir()
    link, other = (temporary / f"rasa-train-job-0000000{i}" for i in (1, 2))
    link.symlink_to("precious")
    other.mkdir()
    for path in (link, other):
        os.chown(path, 12345, 12345, follow_symlinks=False)
    with scratch_directory("job"):
        pass
    assert link.is_symlink() and other.exists()
    os.chown(link, 0, 0, follow_symlinks=False)
    scratch._tidy.cache_clear()
    with scratch_directory("job"):
        pass
    assert not link.is_symlink() and (temporary / "precious").exists(), "the link itself is removed, not what it names"
