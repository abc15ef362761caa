"""Whether a run is complete is judged by what is there: a whole adapter, and the recipe that it was made by."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rasa_train.io.checksums import sha256
from rasa_train.io.run_dir import OWN, RunDirectory
from rasa_train.launch.continued import is_complete
from rasa_train.recipe.load import load_recipe
from rasa_train.training.checkpoint import damage
from tests.conftest import Cli, run_command

SIZE = "adapter/adapter.safetensors"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, token_rows: Path) -> Path:
    """Directory of a complete run and its recipe: six steps, with a checkpoint at each second one."""
    home = tmp_path_factory.mktemp("finished")
    recipe: dict[str, Any] = {
        "model": {"name": str(tiny_llama), "dtype": "float32"},
        "adapter": {"method": "rasa", "r": 2, "k": 1, "alpha": 4},
        "data": {"dataset": str(token_rows), "validation": {"size": 4}},
        "training": {"max_steps": 6, "batch_size": 4, "checkpoint_every": 2, "optimizer": {"lr": 0.02}},
        "output_dir": "run",
    }
    (home / "recipe.yaml").write_text(json.dumps(recipe))
    run_command("train", home / "recipe.yaml", f"output_dir={home / 'run'}", check=True)
    return home


@pytest.fixture
def run(finished: Path, cli: Cli, tmp_path: Path) -> Path:
    """A copy of the complete run, in the working directory."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return tmp_path / "run"


def tear(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 40)


def the_same(run: Path, finished: Path) -> None:
    ours, whole = (load_file(path / SIZE) for path in (run, finished / "run"))
    assert all(torch.equal(ours[name], whole[name]) for name in whole)
    timing = ("seconds", "versions", "peak_memory_bytes")
    facts = [json.loads((path / "summary.json").read_text()) for path in (run, finished / "run")]
    ours, whole = ({key: value for key, value in fact.items() if key not in timing} for fact in facts)
    assert ours == whole


HARM: dict[str, tuple[Any, str]] = {
    "removed": (lambda adapter: shutil.rmtree(adapter), "adapter is missing"),
    "torn": (lambda adapter: tear(adapter / "adapter.safetensors"), "does not match its checksum"),
    "without its config": (
        lambda adapter: (adapter / "adapter_config.json").unlink(),
        "adapter_config.json is missing",
    ),
    "with empty checksums": (lambda adapter: (adapter / "checksums.json").write_text("{}"), "has no checksum of"),
    "with an empty summary": (lambda adapter: (adapter.parent / "summary.json").write_text(""), "not valid JSON"),
}


@pytest.mark.parametrize("harm", HARM)
def test_a_complete_run_is_not_complete_if_its_adapter_is(
    harm: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    do, said = HARM[harm]
    recipe = load_recipe("recipe.yaml").recipe
    assert is_complete(recipe, RunDirectory(run))
    do(run / "adapter")
    assert not is_complete(recipe, RunDirectory(run)) and not (run / "summary.json").exists()
    noted = capsys.readouterr().err
    assert said in noted and "checkpoints/step-00000006" in noted and noted.count("\n") == 1


def test_a_user_starts_a_complete_run_again_whose_adapter_is_torn(run: Path, finished: Path, cli: Cli) -> None:
    tear(run / SIZE)
    again = cli("train", "recipe.yaml", check=True)
    assert "does not match its checksum" in again.stderr and "is complete (" not in again.stdout
    the_same(run, finished)
    assert "is complete (" in cli("train", "recipe.yaml", check=True).stdout


def test_a_user_starts_a_run_again_that_has_no_adapter_and_no_checkpoints(run: Path, cli: Cli) -> None:
    shutil.rmtree(run / "adapter")
    shutil.rmtree(run / "checkpoints")
    again = cli("train", "recipe.yaml")
    assert again.returncode == 2 and "adapter is missing" in again.stderr and "--fresh" in again.stderr
    assert (run / "summary.json").exists()


def test_an_adapter_of_an_older_version_without_checksums_is_complete(run: Path, cli: Cli) -> None:
    (run / "adapter" / "checksums.json").unlink()
    assert "is complete (" in cli("train", "recipe.yaml", check=True).stdout


def test_a_user_starts_another_recipe_where_recipe_yaml_is_gone(run: Path, cli: Cli) -> None:
    (run / "recipe.yaml").unlink()
    for option in ("adapter.alpha=8", "adapter.alpha=4"):
        again = cli("train", "recipe.yaml", option)
        assert again.returncode == 2 and "no recipe.yaml" in again.stderr and "--fresh" in again.stderr
    (run / "summary.json").unlink()
    shutil.rmtree(run / "adapter")
    assert cli("train", "recipe.yaml", "adapter.alpha=8").returncode == 2  # checkpoints are of an unknown run as well
    shutil.rmtree(run / "checkpoints")
    cli("train", "recipe.yaml", "training.max_steps=1", check=True)  # metrics alone do not mislead


class Killed(BaseException):
    pass


def test_a_user_kills_fresh_at_any_moment(run: Path, finished: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before each removal of a file or directory: what is left is a run that is not complete, and goes on."""
    removals = [0, 0]  # left until the kill, and in all

    def remove(*arguments: Any, _remove: Any, **options: Any) -> None:
        if removals[0] == 0:
            raise Killed
        removals[0] -= 1
        removals[1] += 1
        _remove(*arguments, **options)

    for at in range(100):
        shutil.rmtree(run)
        shutil.copytree(finished / "run", run)
        removals[:] = [at, 0]
        with monkeypatch.context() as patch, suppress(Killed):
            patch.setattr(os, "unlink", partial(remove, _remove=os.unlink))
            patch.setattr(os, "rmdir", partial(remove, _remove=os.rmdir))
            RunDirectory(run).clear()
        there = {path.name for path in run.iterdir()}
        assert at == 0 or "summary.json" not in there
        if removals[1] < at:
            break
        assert "recipe.yaml" in there or not there & set(OWN)
        if at in (2, 7):
            again = cli("train", "recipe.yaml", check=True)
            assert "is complete (" not in again.stdout
            the_same(run, finished)
    assert at > 15 and not there & set(OWN)


def test_a_user_resumes_after_lines_of_the_metrics_were_lost(run: Path, finished: Path, cli: Cli) -> None:
    (run / "summary.json").unlink()
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text(lines[0] + "\x00\x00 torn\n" + lines[3])
    again = cli("train", "recipe.yaml", check=True)
    assert "metrics.jsonl lacks 2 of the 4 steps before this start (first: 2)" in again.stderr
    the_same(run, finished)
    (run / "summary.json").unlink()
    (run / "metrics.jsonl").unlink()
    again = cli("train", "recipe.yaml", check=True)
    assert "metrics.jsonl lacks 6 of the 6 steps before this start (first: 1)" in again.stderr
    the_same(run, finished)


def test_counts_and_scores_come_from_the_checkpoint_and_of_older_ones_from_the_metrics(run: Path, cli: Cli) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for step, value in ((1, 0.5), (3, 0.25)):
        lines[step - 1] |= {"skipped": 1, "loss": None, "eval_gsm8k": value}
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    newest = run / "checkpoints" / "step-00000006"
    trainer = json.loads((newest / "trainer.json").read_text())
    assert trainer["skipped"] == 0 and trainer["loss"] == lines[-1]["loss"] and trainer["validation_loss"]
    older = {key: trainer[key] for key in ("step", "samples", "tokens", "supervised_tokens", "seconds", "data_key")}
    (newest / "trainer.json").write_text(json.dumps(older))
    sums = newest / "checksums.json"
    sums.write_text(json.dumps(json.loads(sums.read_text()) | {"trainer.json": sha256(newest / "trainer.json")}))
    assert damage(newest) is None
    (run / "summary.json").unlink()
    cli("train", "recipe.yaml", check=True)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["skipped_steps"] == 2 and summary["loss"] == lines[-1]["loss"]


def test_checkpoints_with_empty_checksums_are_passed_over(run: Path, cli: Cli) -> None:
    (run / "summary.json").unlink()
    (run / "checkpoints" / "step-00000006" / "checksums.json").write_text("{}")
    again = cli("train", "recipe.yaml", check=True)
    assert "step-00000006 is damaged (checksums.json has no checksum of" in again.stderr
    assert "step-00000004 (step 4 of 6)" in again.stderr
