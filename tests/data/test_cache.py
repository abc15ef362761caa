"""Tokenised sets of processes that are killed, and of those that are still at work."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from rasa_train.data.cache import CacheWriter, read_stats
from rasa_train.data.encode import Example

EXAMPLE = Example(np.array([1, 2, 3], np.int32), np.array([-100, 2, 3], np.int32))


def _write_for_ever(directory: Path, ready: Connection) -> None:
    with CacheWriter(directory, "key") as writer:
        writer.add([EXAMPLE])
        ready.send("under way")
        time.sleep(300)


def _start(directory: Path) -> multiprocessing.process.BaseProcess:
    ready, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=_write_for_ever, args=(directory, theirs))
    process.start()
    assert ready.recv() == "under way"
    return process


def _drafts(cache: Path) -> list[str]:
    return [path.name.partition("-")[0] for path in cache.iterdir() if path.name.startswith(".") and path.is_dir()]


def test_what_a_killed_run_has_tokenised_is_removed_by_the_next_and_the_work_of_others_is_not(tmp_path: Path) -> None:
    killed, alive = _start(tmp_path / "one"), _start(tmp_path / "two")
    os.kill(killed.pid or 0, signal.SIGKILL)
    killed.join()
    assert sorted(_drafts(tmp_path)) == [".one", ".two"]
    with CacheWriter(tmp_path / "three", "three") as writer:
        assert sorted(_drafts(tmp_path)) == [".three", ".two"]
        writer.add([EXAMPLE])
        writer.commit({})
    assert read_stats(tmp_path / "three", "three") == {}
    os.kill(alive.pid or 0, signal.SIGKILL)
    alive.join()
    with CacheWriter(tmp_path / "four", "four"):
        assert _drafts(tmp_path) == [".four"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "three"]
