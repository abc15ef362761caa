"""Checkpoints with a flipped bit, cut off, or torn (zeros where a page did not reach the disk) are never read."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from rasa_train.io.checksums import CHECKSUMS
from rasa_train.training.checkpoint import damage

from .conftest import Whole
from .harness import inject, same_result, start

KINDS = ("bit flipped", "truncated", "torn")


def harm(path: Path, kind: str, luck: random.Random) -> None:
    content = bytearray(path.read_bytes())
    at = luck.randrange(len(content) - 1)  # without its last byte, the newline, JSON says the same
    if kind == "bit flipped":
        content[at] ^= 1 << luck.randrange(8)
    elif kind == "truncated":
        del content[at:]
    else:
        end = min(len(content), at + 4096)
        content[at:end] = bytes(end - at) if any(content[at:end]) else b"\xff" * (end - at)
    path.write_bytes(content)
    inject(f"checkpoint {kind}")


@pytest.mark.parametrize("kind", KINDS)
def test_every_damage_is_seen(kind: str, whole: Whole, tmp_path: Path) -> None:
    luck, sound = random.Random(kind), whole.run / "checkpoints" / "step-00000010"
    names = sorted(path.name for path in sound.iterdir())
    assert CHECKSUMS in names and len(names) >= 4 and damage(sound) is None
    copy = tmp_path / "copy"
    for _ in range(100):
        shutil.copytree(sound, copy)
        name = luck.choice(names)
        harm(copy / name, kind, luck)
        assert damage(copy) is not None, name
        shutil.rmtree(copy)


def test_a_file_in_the_place_of_a_checkpoint_or_of_the_adapter_is_passed_over_and_replaced(
    whole: Whole, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole.run, run)
    (run / "summary.json").unlink()
    for place in (run / "adapter", run / "checkpoints" / "step-00000002", run / "checkpoints" / "step-00000010"):
        shutil.rmtree(place)
        place.write_text("not a directory")
    again = start("train", whole.recipe, "training.keep_last=2", cwd=tmp_path)
    assert again.wait() == 0, again.said
    assert again.said.count("is damaged") == 1
    same_result(run, whole.run)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000008", "step-00000010"]


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 12))])
def test_the_run_goes_on_from_the_one_before(seed: int, whole: Whole, tmp_path: Path) -> None:
    luck, run = random.Random(f"damage {seed}"), tmp_path / "run"
    shutil.copytree(whole.run, run)
    (run / "summary.json").unlink()
    shutil.rmtree(run / "adapter")
    saved = sorted((run / "checkpoints").iterdir())
    harmed = saved[-luck.randint(1, len(saved)) :]
    for checkpoint in harmed:
        harm(luck.choice(sorted(checkpoint.iterdir())), luck.choice(KINDS), luck)
    again = start("train", whole.recipe, cwd=tmp_path)
    assert again.wait() == 0, again.said
    assert again.said.count("is damaged") == len(harmed)
    same_result(run, whole.run)
