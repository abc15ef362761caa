"""The best step of a run: chosen by a measurement, kept, found again by every command; and runs that stop early."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rasa_train import load_adapter
from rasa_train.evaluate.load import find_subjects
from rasa_train.io.run_dir import step_number
from rasa_train.merging.checkpoints import find_checkpoint
from rasa_train.recipe.measures import measures
from rasa_train.recipe.schema import Recipe
from rasa_train.training import checkpoint
from rasa_train.training.best import Watched, superseded
from rasa_train.training.evaluation import Score
from rasa_train.training.trainer import Trainer

from .conftest import Cli

# Lion at this rate soon learns the 36 rows by heart, and the loss of the four others rises again.
STOPS = (
    "training.keep_best=validation_loss",
    "training.early_stopping={patience: 2}",
    "training.validate_every=1",
    "training.keep_last=1",
)


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def decisions(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if "best" in line and line.startswith("step")]


def decided(values: list[float], patience: int) -> tuple[int, int]:
    """The best step and the last one, by the definition: the earliest lowest value, and the first step after
    ``patience`` others that are not lower than those before."""
    for last in range(1, len(values) + 1):
        lowest = values.index(min(values[:last])) + 1
        if last - lowest >= patience:
            return lowest, last
    return values.index(min(values)) + 1, len(values)


def steps_kept(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").iterdir())


def test_the_definition() -> None:
    """Losses: lower is better; scores: higher. Ties keep the earlier step, and NaN is never the best."""

    def judged(measure: str, values: list[float], min_delta: float = 0.0) -> list[tuple[int | None, int]]:
        watched, found = Watched(measure), []
        for step, value in enumerate(values, 1):
            watched = watched.after(Score(step, step / 4, value), min_delta)
            found.append((watched.best and watched.best.step, watched.waited))
        return found

    nan, inf = math.nan, math.inf
    assert judged("validation_loss", [3.0, 2.0, 2.0, 2.5, 1.0]) == [(1, 0), (2, 0), (2, 1), (2, 2), (5, 0)]
    assert judged("eval_gsm8k", [0.1, 0.3, 0.3, 0.2, 0.4]) == [(1, 0), (2, 0), (2, 1), (2, 2), (5, 0)]
    assert judged("validation_loss", [nan, nan, 5.0, -inf, nan]) == [(None, 1), (None, 2), (3, 0), (3, 1), (3, 2)]
    assert judged("eval_math", [nan, inf, 0.0]) == [(None, 1), (None, 2), (3, 0)]
    # each step gains 0.06, so every second one exceeds the difference to the last that did; the best is the best
    slow = [1.0, 0.94, 0.88, 0.82, 0.76]
    assert judged("validation_loss", slow, 0.1) == [(1, 0), (2, 1), (3, 0), (4, 1), (5, 0)]


def start_and_die(cli: Cli, recipe: Path, die: tuple[int, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the command in a process that SIGKILL ends at a step: when the step has been judged and logged, when its
    checkpoint is written but not in its place, or when the checkpoint is there."""
    step, moment = die

    def kill(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if child := os.fork():
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), "it has died"
        return
    logged, saved = Trainer.log, Trainer.checkpoint

    def log(self: Trainer, row: Any) -> None:
        logged(self, row)
        if row["step"] == step and moment == "judged":
            kill()

    def save(self: Trainer, *, needed: bool) -> None:
        if self.progress.step == step and moment == "half":
            monkeypatch.setattr("rasa_train.training.checkpoint._fsync", kill)
        saved(self, needed=needed)
        if self.progress.step == step and moment == "saved":
            kill()

    monkeypatch.setattr(Trainer, "log", log)
    monkeypatch.setattr(Trainer, "checkpoint", save)
    try:
        cli("train", recipe, *STOPS, "output_dir=killed")
    finally:
        os._exit(0)


def test_a_run_that_is_killed_decides_as_an_undisturbed_one(
    recipe: Path, tiny_llama: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = cli("train", recipe, *STOPS, check=True)
    run, killed = recipe.parent / "run", recipe.parent / "killed"
    losses = [row["validation_loss"] for row in rows(run)]
    best, last = decided(losses, 2)
    assert 2 < best < last < 20, "it stops, and before its last step: the test sees something"
    assert len(decisions(done.stderr)) == len(losses) and "the run stops early" in decisions(done.stderr)[-1]
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["steps"], summary["stopped_early"]) == (last, True)
    epoch = rows(run)[best - 1]["epoch"]
    assert summary["best"] == {"step": best, "epoch": epoch, "measure": "validation_loss", "value": losses[best - 1]}
    assert steps_kept(run) == [best, last], "the best is kept, although keep_last is 1"
    assert f"the best is step {best} (validation_loss {losses[best - 1]:.4f})" in done.stdout

    for die in ((best, "judged"), (best, "half"), (last - 1, "judged"), (last, "saved")):
        start_and_die(cli, recipe, die, monkeypatch)
    ended = cli("train", recipe, *STOPS, "output_dir=killed", check=True)
    assert f"resuming from killed/checkpoints/step-{last:08d}" in ended.stderr
    timing = {"seconds", "tokens_per_second", "peak_memory_bytes"}
    assert [{k: v for k, v in row.items() if k not in timing} for row in rows(killed)] == [
        {k: v for k, v in row.items() if k not in timing} for row in rows(run)
    ]
    again = json.loads((killed / "summary.json").read_text())
    assert {k: v for k, v in again.items() if k not in timing} == {k: v for k, v in summary.items() if k not in timing}
    assert steps_kept(killed) == [best, last]
    of_best = f"checkpoints/step-{best:08d}/adapter.safetensors"
    for name in ("adapter/adapter.safetensors", of_best):
        assert (killed / name).read_bytes() == (run / name).read_bytes()

    # What each command takes for the best is that step, bit for bit.
    cli("merge", "run", "--checkpoint", "best", "--output", "of_best", check=True)
    cli("merge", run / f"checkpoints/step-{best:08d}", "--output", "of_step", check=True)
    a, b = (load_file(recipe.parent / name / "model.safetensors") for name in ("of_best", "of_step"))
    cli("merge", "run", "--output", "of_last", check=True)
    c = load_file(recipe.parent / "of_last" / "model.safetensors")
    assert all(torch.equal(a[name], b[name]) for name in a) and not all(torch.equal(a[name], c[name]) for name in a)
    [subject] = find_subjects(str(run), all_checkpoints=False, output=None, checkpoint="best")
    assert (subject.step, subject.path) == (best, str(run / f"checkpoints/step-{best:08d}"))
    model = load_adapter(AutoModelForCausalLM.from_pretrained(tiny_llama), run, checkpoint="best")
    stored = load_file(run / of_best)
    assert all(torch.equal(p, stored[n]) for n, p in model.named_parameters() if n in stored)
    (run / f"checkpoints/step-{last:08d}/trainer.json").write_text("{")  # the newest may be damaged
    [subject] = find_subjects(str(run), all_checkpoints=False, output=None, checkpoint="best")
    assert subject.step == best
    (run / of_best).write_bytes(b"")
    refused = cli("merge", "run", "--checkpoint", "best", "--output", "no")
    assert refused.returncode == 2 and "is damaged" in refused.stderr


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["training.early_stopping={patience: 0}", STOPS[0]], "training.early_stopping.patience"),
        (["training.early_stopping={patience: 2, min_delta: -1}", STOPS[0]], "training.early_stopping.min_delta"),
        (["training.early_stopping={patience: 2, min_delta: .inf}", STOPS[0]], "training.early_stopping.min_delta"),
        (["training.early_stopping={patience: 2}"], "set training.keep_best to validation_loss"),
        (["training.keep_best=loss"], "does not measure 'loss'; set training.keep_best to validation_loss"),
        (["training.keep_best=eval_gsm8k"], "does not measure 'eval_gsm8k'; set training.keep_best to validation_loss"),
        (
            ["training.keep_best=eval_math", "training.evaluate={suite: gsm8k}"],
            "set training.keep_best to validation_loss or eval_gsm8k",
        ),
        ([STOPS[0], "data.validation=null"], "add data.validation"),
    ],
)
def test_what_cannot_be_watched_is_refused(recipe: Path, cli: Cli, changes: list[str], said: str) -> None:
    refused = cli("train", recipe, *changes)
    assert refused.returncode == 2 and said in refused.stderr and "Traceback" not in refused.stderr


def test_the_measures_of_a_classifier(recipe: Path) -> None:
    """Their names are those in metrics.jsonl: the suite's, and for a regression another."""
    data: dict[str, object] = {"dataset": "x", "validation": {"size": 1}}
    evaluate = {"suite": "classification"}
    for problem, name in (("single_label", "eval_classification"), ("regression", "eval_regression")):
        values = {
            "model": {"name": "m"},
            "adapter": {"method": "rasa"},
            "data": data,
            "task": {"name": "classification", "problem": problem},
            "training": {"evaluate": evaluate, "keep_best": name},
            "output_dir": "run",
        }
        assert measures(Recipe.model_validate(values)) == ["validation_loss", name]


def test_no_such_checkpoint(recipe: Path, cli: Cli, tmp_path: Path) -> None:
    cli("train", recipe, "training.max_steps=2", "adapter.targets=[q_proj]", check=True)
    for which, said in (
        ("best", "was trained without training.keep_best, so no step is known as the best; give the number of a step"),
        ("7", "has no checkpoint of step 7; there is 2"),
        ("../../x", "must be best or the number of a step"),
        ("9" * 5000, "must be best or the number of a step"),
    ):
        refused = cli("merge", "run", "--checkpoint", which, "--output", "merged")
        assert refused.returncode == 2 and said in refused.stderr and not (tmp_path / "merged").exists()
    refused = cli("merge", "run/adapter", "--checkpoint", "best", "--output", "merged")
    assert refused.returncode == 2 and "give the output_dir of one" in refused.stderr
    refused = cli("eval", "run", "--checkpoint", "best", "--suite", "gsm8k", "--data", "demo")
    assert refused.returncode == 2 and "without training.keep_best" in refused.stderr
    refused = cli("eval", "run", "--checkpoint", "2", "--all-checkpoints")
    assert refused.returncode == 2 and "not both" in refused.stderr
    cli("merge", "run", "--checkpoint", "2", "--output", "merged", check=True)


def test_checkpoints_of_former_best_steps_go(tmp_path: Path) -> None:
    """Worked out by hand: checkpoints are due at 10, 20, 30; the best steps were 4, 7, 20, 23 and 27."""

    def saved(step: int, best: int | None) -> None:
        path = tmp_path / f"step-{step:08d}"
        path.mkdir(exist_ok=True)
        watched = {"best": best and {"step": best, "epoch": 1.0, "value": 1.0}}
        (path / "trainer.json").write_text(json.dumps({"watched": watched}))

    def left(keep_last: int | None) -> list[int]:
        return sorted(step_number(path) for path in superseded(tmp_path, keep_last, lambda step: step % 10 == 0))

    for step, best in ((4, 4), (7, 7), (10, 7), (20, 20), (23, 23)):
        saved(step, best)
    assert left(None) == [4], "7 is the best of the checkpoint at 10, and 23 is the newest"
    assert left(1) == [4, 7, 10, 20] and left(2) == [4, 7, 10] and left(3) == [4]
    saved(27, 27)
    saved(30, 27)
    assert left(None) == [4, 23] and left(1) == [4, 7, 10, 20, 23]
    (tmp_path / "step-00000030" / "trainer.json").write_text("[")
    saved(40, 27)
    assert left(1) == [4, 7, 10, 20, 23, 30], "what a damaged checkpoint names is not known"


def test_a_best_step_that_the_disk_does_not_take(recipe: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss falls at each of three steps, and there is room for the first only: it stays the best that is there."""
    saved = checkpoint.save

    def save(model: Any, checkpoints: Path, progress: checkpoint.Progress, key: str) -> Path:
        if progress.step > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return saved(model, checkpoints, progress, key)

    monkeypatch.setattr(checkpoint, "save", save)
    options = (*STOPS[:3], "training.max_steps=3", "training.optimizer.lr=1e-3", "training.schedule.name=constant")
    done = cli("train", recipe, *options, "adapter.targets=[q_proj]", check=True)
    run = recipe.parent / "run"
    first, second, third = (row["validation_loss"] for row in rows(run))
    assert third < second < first, "the test sees something"
    assert json.loads((run / "summary.json").read_text())["best"]["step"] == 1 and steps_kept(run) == [1]
    assert find_checkpoint(run, "best").name == "step-00000001"
    assert "no checkpoint of step 2 was written" in done.stderr
