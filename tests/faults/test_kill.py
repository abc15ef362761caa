"""SIGKILL anywhere: no checkpoint is ever half there, and the end is that of an undisturbed run, bit for bit."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from .conftest import Whole
from .harness import check_kept, kill_somewhere, same_result, start

CHAINS = [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 20))]


OFTEN = ["training.max_steps=30", "training.checkpoint_every=1", "output_dir=often"]


@pytest.fixture(scope="module")
def often(whole: Whole) -> Path:
    """An undisturbed run with a checkpoint after every step."""
    command = start("train", whole.recipe, *OFTEN, cwd=whole.run.parent)
    assert command.wait() == 0, command.said
    return whole.run.parent / "often"


@pytest.mark.parametrize("seed", CHAINS)
def test_training_and_checkpointing(seed: int, whole: Whole, often: Path, tmp_path: Path) -> None:
    """Eight kills of one run, at most: each goes on from where the one before has left it."""
    luck, run, kills = random.Random(f"train {seed}"), tmp_path / "often", 0
    for _ in range(8):
        if (run / "summary.json").exists():
            break
        kills += kill_somewhere(
            luck,
            "train",
            whole.recipe,
            *OFTEN,
            cwd=tmp_path,
            changes=whole.changes // 2,
            seconds=whole.seconds,
            checkpoints=(6, 0.02),
        )
        check_kept(run, 1)
    assert kills, "nothing was killed"
    last = start("train", whole.recipe, *OFTEN, cwd=tmp_path)
    assert last.wait() == 0, last.said
    same_result(run, often)


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
