"""Guards of training, through the command line: numbers that are not finite, memory and disks that run out."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from rasa_train.data.batching import Limit
from rasa_train.errors import DeviceLost, UserError
from rasa_train.io.run_dir import RunDirectory
from rasa_train.training import checkpoint
from rasa_train.training import step as gradients
from rasa_train.training.fault_handling import Room, Watch, explained, smaller
from tests.conftest import RECIPE, Cli
from tests.test_train import metrics

ADAPTER = "adapter/adapter.safetensors"


@pytest.fixture
def recipe(tmp_path: Path, tiny_llama: Path, token_rows: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(model=tiny_llama, data=token_rows))
    return path


def spoil(monkeypatch: pytest.MonkeyPatch, steps: set[int], where: str) -> None:
    """The loss of these steps (from 0), or one of the gradients it gives, is not a number."""
    plain = gradients.accumulate

    def accumulate(model, train, work, step):  # type: ignore[no-untyped-def]
        loss = plain(model, train, work, step)
        if step not in steps:
            return loss
        if where == "loss":
            return math.nan
        trained = model.engine.parameters
        trained[0].grad = torch.full_like(trained[0], math.inf)
        return loss

    monkeypatch.setattr(gradients, "accumulate", accumulate)


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("method", ["rasa", "adalora"])
def test_a_step_that_is_not_finite_changes_nothing(
    recipe: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch, where: str, method: str
) -> None:
    """Steps 3 and 4 are spoiled: the checkpoints of steps 2, 3 and 4 hold the same tensors, optimizer included."""
    adapter = {"rasa": "{method: rasa, r: 4, k: 1}", "adalora": "{method: adalora, r: 4}"}[method]
    options = ["training.checkpoint_every=1", f"adapter={adapter}", "training.epochs=2"]
    spoil(monkeypatch, {2, 3}, where)
    done = cli("train", recipe, *options, check=True)
    rows = metrics(recipe.parent / "run")
    assert [row["skipped"] for row in rows] == [0, 0, 1, 1, *[0] * 6]
    assert all((row["loss"] is None) == (row["grad_norm"] is None) == bool(row["skipped"]) for row in rows)
    assert "step 4: " in done.stderr and "skipped (2 in a row)" in done.stderr
    saved = [recipe.parent / "run" / "checkpoints" / f"step-{step:08d}" for step in (2, 4, 5)]
    names = [path.name for path in saved[0].glob("*.safetensors")]
    assert len(names) >= 2
    assert all((saved[0] / name).read_bytes() == (saved[1] / name).read_bytes() for name in names)
    assert any((saved[1] / name).read_bytes() != (saved[2] / name).read_bytes() for name in names)
    assert json.loads((recipe.parent / "run" / "summary.json").read_text())["skipped_steps"] == 2


def test_too_many_in_a_row_end_the_run_and_keep_the_batch(
    recipe: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch, token_rows: Path
) -> None:
    spoil(monkeypatch, {1, 4, 5, 6}, "loss")
    done = cli("train", recipe, "training.max_skipped=3", "data.validation=null")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "step-00000007.json" in done.stderr and "saved up to step 6" in done.stderr
    kept = json.loads((recipe.parent / "run" / "skipped" / "step-00000007.json").read_text())
    rows = [json.loads(line) for line in token_rows.read_text().splitlines()]
    assert len(kept["examples"]) == 8
    assert all(rows[one["index"]]["input_ids"] == one["input_ids"] for one in kept["examples"])


def out_of_memory_where(
    monkeypatch: pytest.MonkeyPatch, short: Callable[[int, int], bool]
) -> tuple[list[int], list[int]]:
    """Let a micro-batch run out of memory where ``short(sequences, number of tries before)``. Returns the sequences of
    each try, and of each micro-batch of a validation."""
    plain, tried, validated = gradients.on_device, list[int](), list[int]()

    def on_device(batch, device):  # type: ignore[no-untyped-def]
        if not torch.is_grad_enabled():
            validated.append(len(batch["input_ids"]))
        else:
            tried.append(len(batch["input_ids"]))
            if short(tried[-1], len(tried) - 1):
                raise torch.OutOfMemoryError("no room")
        return plain(batch, device)

    monkeypatch.setattr(gradients, "on_device", on_device)
    return tried, validated


SHORT = ["adapter.dropout=0", "training.epochs=1", "training.micro_batch_size=8"]


def same_numbers(directory: Path) -> None:
    for key in ("loss", "grad_norm"):
        a, b = ([row[key] for row in metrics(directory / name)] for name in ("run", "small"))
        assert a == pytest.approx(b, rel=1e-5), key


def test_less_at_once_where_memory_runs_out(recipe: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than two sequences never fit: the same numbers as with two from the start, and after the third step that
    ran out of memory nothing larger is tried."""
    cli("train", recipe, *SHORT, "training.micro_batch_size=2", "output_dir=small", check=True)
    tried, validated = out_of_memory_where(monkeypatch, lambda sequences, before: sequences > 2)
    done = cli("train", recipe, *SHORT, check=True)
    again = [8, 4, 2, 2, 2, 2]
    assert tried[:18] == again * 3 and max(tried[18:]) == 2 and tried[18:], tried
    assert done.stderr.count("out of memory; the same batch is tried again") == 6
    assert done.stderr.count("3 steps have run out of memory: a worker now computes at most 2 sequences at once") == 1
    assert max(validated) == 2, "validation takes no more than a step"
    same_numbers(recipe.parent)


def test_one_shortage_does_not_last(recipe: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the second step runs out of memory, once; the step after it computes eight sequences at once again."""
    cli("train", recipe, *SHORT, "training.micro_batch_size=2", "output_dir=small", check=True)
    tried, _ = out_of_memory_where(monkeypatch, lambda sequences, before: before == 1)
    done = cli("train", recipe, *SHORT, check=True)
    assert tried[:5] == [8, 8, 4, 4, 8] and "a worker now computes" not in done.stderr
    assert "step 2: out of memory; the same batch is tried again, at most 4 sequences at once" in done.stderr
    same_numbers(recipe.parent)


def test_rare_shortages_do_not_add_up() -> None:
    said: list[str] = []
    room, less = Room(Limit(tokens=4096), said.append), Limit(tokens=2048)
    for step in (1, 90, 101, 200, 201):  # never three of a hundred
        room.finished(step, less)
    assert room.usual == Limit(tokens=4096) and not said
    room.finished(202, less)
    message = "3 steps have run out of memory: a worker now computes at most 2,048 tokens at once"
    assert room.usual == less and said == [message]
    room.finished(203, less)
    assert len(said) == 1, "the usual limit is no shortage"


def test_one_sequence_that_does_not_fit_is_the_users(recipe: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def on_device(batch, device):  # type: ignore[no-untyped-def]
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(gradients, "on_device", on_device)
    done = cli("train", recipe)
    assert done.returncode == 2 and "out of memory with one sequence at a time" in done.stderr


def test_smaller_is_about_half() -> None:
    lengths = np.array([9, 5, 5, 1])
    everything = np.arange(4)
    assert smaller(Limit(examples=8), everything, lengths, 1) == Limit(examples=2)
    assert smaller(Limit(examples=8), everything, lengths, 2) == Limit(examples=2)
    assert smaller(Limit(tokens=40, multiple_of=2), everything, lengths, 1).tokens in (5, 6)
    with pytest.raises(UserError, match="of 9 tokens"):
        smaller(Limit(examples=1), everything, lengths, 1)


def test_a_full_disk_costs_a_checkpoint_not_the_run(recipe: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """No room from step 5 to 8: the checkpoint of step 6 is written at step 9, after retries. (``tests/faults`` fills
    a real disk.)"""
    plain = checkpoint._fsync

    def fsync(path: Path) -> None:
        if 5 <= len(metrics(recipe.parent / "run")) <= 8:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        plain(path)

    monkeypatch.setattr(checkpoint, "_fsync", fsync)
    done = cli("train", recipe, check=True)
    assert done.stderr.count("No space left on device: no checkpoint of step 6") == 1
    assert "step-00000003" in done.stderr and "there is room again: the run is saved at step 9" in done.stderr
    names = sorted(path.name for path in (recipe.parent / "run" / "checkpoints").iterdir())
    assert names == [f"step-{step:08d}" for step in (3, 9, 12, 15, 18, 20)]


def test_what_is_said_of_a_lost_gpu_and_a_full_disk(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    with (
        pytest.raises(DeviceLost, match=r"unspecified launch failure\. The run has no checkpoint yet"),
        explained(directory),
    ):
        raise torch.AcceleratorError("CUDA error: unspecified launch failure\nmore")
    (directory.checkpoints / "step-00000012").mkdir(parents=True)
    with pytest.raises(DeviceLost, match="saved up to step 12"), explained(directory):
        raise torch.AcceleratorError("CUDA error: device-side assert triggered")
    with pytest.raises(UserError, match=r"Disk quota exceeded.*saved up to step 12"), explained(directory):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
    with pytest.raises(UserError, match=r"Read-only.*saved up to step 12.*Check the disk"), explained(directory):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))
    with pytest.raises(PermissionError), explained(directory):
        raise PermissionError(errno.EACCES, "no")


def test_a_spike_is_noticed_once_the_usual_loss_is_known() -> None:
    said: list[str] = []
    watch = Watch(10, said.append)
    losses = [9.0, *[2.0] * 20, 4.1, 2.0]
    assert not any(watch.skipped(step, loss, 1.0) for step, loss in enumerate(losses, 1))
    assert said == ["step 22: the loss has jumped to 4.1000, from about 2.0000"]
