"""SIGKILL anywhere: no checkpoint is ever half there, and the end is that of an undisturbed run, bit for bit."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from .conftest import EVERY, Whole
from .harness import check_kept, kill_somewhere, same_result, start

CHAINS = [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 20))]


@pytest.mark.parametrize("seed", CHAINS)
def test_training_and_checkpointing(seed: int, whole: Whole, tmp_path: Path) -> None:
    """Eight kills of one run, at most: each goes on from where the one before has left it."""
    luck, run, kills = random.Random(f"train {seed}"), tmp_path / "run", 0
    for _ in range(8):
        if (run / "summary.json").exists():
            break
        kills += kill_somewhere(
            luck, "train", whole.recipe, cwd=tmp_path, changes=whole.changes // 2, seconds=whole.seconds
        )
        check_kept(run, EVERY)
    assert kills, "nothing was killed"
    last = start("train", whole.recipe, cwd=tmp_path)
    assert last.wait() == 0, last.said
    same_result(run, whole.run)


@pytest.mark.parametrize("seed", CHAINS)
def test_merging(seed: int, whole: Whole, tmp_path: Path) -> None:
    """Eight kills of merges into one directory, the later ones over a merge that is there: what has its name is
    whole, whenever it is there."""
    luck, merged, kills = random.Random(f"merge {seed}"), tmp_path / "merged", 0
    command = ["merge", whole.run, "--output", "merged", "--overwrite"]
    expected = contents(whole.merged)
    for _ in range(8):
        kills += kill_somewhere(luck, *command, cwd=tmp_path, changes=whole.merge_changes, seconds=whole.merge_seconds)
        assert not merged.exists() or contents(merged) == expected
        if merged.exists() and luck.random() < 0.5:
            shutil.rmtree(merged)
    assert kills, "nothing was killed"
    last = start(*command, cwd=tmp_path)
    assert last.wait() == 0, last.said
    assert contents(merged) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["merged"], "nothing is left behind"


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}
