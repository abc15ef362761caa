"""Tokenised sets of processes that are killed, and of those that are still at work: what is left is gone on with."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_data import rows_of

from rasa_train.data import cache as cache_module
from rasa_train.data.cache import CacheWriter, read_stats
from rasa_train.data.config import DataConfig
from rasa_train.data.encode import Example
from rasa_train.data.prepare import PreparedData, prepare
from rasa_train.errors import UserError

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


# Sets that are gone on with

CHUNKS, ROWS = 3, 256 * 5
"""Chunks of 256 rows that are tokenised before the process is killed, and rows of the set."""


@pytest.fixture
def rows(tmp_path: Path) -> DataConfig:
    lines = [json.dumps(row | ({"note": i} if i == 7 else {})) for i, row in enumerate(rows_of(ROWS))]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    return DataConfig(dataset=str(tmp_path / "train.jsonl"), cache_dir=str(tmp_path / "one"), num_workers=1)


@pytest.fixture
def encoded(encoded: list[int], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of the rows that are tokenised in this process; every chunk is saved."""
    monkeypatch.setattr(cache_module, "SAVE_EVERY", 0)
    return encoded


def _killed(config: DataConfig, tokenizer: Any, chunks: int = CHUNKS, **options: Any) -> Path:
    """Tokenise in a process that is killed when it has written some chunks. Returns the directory of the sets."""

    def until_killed(done: int) -> None:
        if done >= 256 * chunks:
            os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(
        target=prepare, args=(config, tokenizer), kwargs={"progress": until_killed, **options}
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    return Path(str(config.cache_dir), "tokens")


def _left(directory: Path) -> list[Path]:
    return sorted(path for path in directory.iterdir() if path.is_dir())


def _content(prepared: PreparedData) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in prepared.train.directory.iterdir()}


def test_tokenising_goes_on_after_a_kill_with_the_same_bytes(
    rows: DataConfig, bpe: Any, encoded: list[int], tmp_path: Path
) -> None:
    directory = _killed(rows, bpe)
    [draft] = _left(directory)
    with open(draft / "tokens", "ab") as file:  # what was written after the last saving
        file.write(b"\1\2\3")
    gone_on = prepare(rows, bpe)
    assert encoded == [256] * (ROWS // 256 - CHUNKS)
    assert _left(directory) == [gone_on.train.directory]
    undisturbed = prepare(rows.model_copy(update={"cache_dir": str(tmp_path / "two")}), bpe)
    assert _content(gone_on) == _content(undisturbed)
    assert (gone_on.stats, gone_on.key) == (undisturbed.stats, undisturbed.key)
    assert gone_on.stats.unused_columns == ["note"]  # of a row before the kill
    assert prepare(rows, bpe).stats.rows == ROWS and len(encoded) == ROWS // 256 - CHUNKS + ROWS // 256


def _cut(draft: Path) -> None:
    os.truncate(draft / "labels", 100)


def _flipped(draft: Path) -> None:
    content = bytearray((draft / "tokens").read_bytes())
    content[50] ^= 1
    (draft / "tokens").write_bytes(content)


def _foreign(draft: Path) -> None:
    (draft / "progress.json").write_text("[1, 2")


def _other_key(draft: Path) -> None:
    progress = json.loads((draft / "progress.json").read_text())
    (draft / "progress.json").write_text(json.dumps(progress | {"key": "0" * 64}))


def _linked(draft: Path) -> None:
    (draft / "tokens").rename(draft.parent.parent / "elsewhere")
    (draft / "tokens").symlink_to(draft.parent.parent / "elsewhere")


@pytest.mark.parametrize("damage", [_cut, _flipped, _foreign, _other_key, _linked])
def test_what_is_damaged_or_foreign_is_made_again(
    rows: DataConfig, bpe: Any, encoded: list[int], damage: Callable[[Path], None]
) -> None:
    [draft] = _left(directory := _killed(rows, bpe))
    damage(draft)
    made = prepare(rows, bpe)
    assert (sum(encoded), made.stats.rows, made.stats.examples) == (ROWS, ROWS, ROWS)
    assert _left(directory) == [made.train.directory]
    assert read_stats(made.train.directory, json.loads((made.train.directory / "meta.json").read_text())["key"])


def test_another_set_leaves_it_for_some_days(
    rows: DataConfig, bpe: Any, encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    [draft] = _left(directory := _killed(rows, bpe))
    other = rows.model_copy(update={"max_length": 2000})
    made = prepare(other, bpe).train.directory
    assert _left(directory) == sorted([draft, made])
    days_ago = time.time() - 8 * 24 * 3600
    os.utime(draft / "progress.json", (days_ago, days_ago))
    prepare(rows.model_copy(update={"max_length": 2001}), bpe)
    assert draft not in _left(directory)
    # An interruption in this process keeps what is saved; an error of the rows does not.
    del encoded[:]

    def interrupted(done: int) -> None:
        if done >= 512:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(rows, bpe, progress=interrupted)
    prepare(rows, bpe)
    assert sum(encoded) == ROWS
    Path(str(rows.dataset)).write_text("\n".join([*['{"query": "a", "response": "b"}'] * 600, "{}"]))
    before = _left(directory)
    with pytest.raises(UserError, match=r"train\.jsonl:601"):
        prepare(rows, bpe)
    assert _left(directory) == before
