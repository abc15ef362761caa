"""A run, a merge and an export go on with the base that they were started on, wherever it lies, and with no other."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rasa_train.errors import UserError
from rasa_train.io.base_fingerprint import Comparison, base_identity, compare
from rasa_train.io.checksums import CHECKSUMS, write_checksums
from rasa_train.io.run_dir import RunDirectory
from rasa_train.launch.continued import is_complete
from rasa_train.merging.merged import check_base
from rasa_train.merging.source import open_source
from rasa_train.recipe.load import load_recipe
from tests.conftest import Cli, run_command


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, token_rows: Path) -> Path:
    """Directory with a base, a recipe for it, and a run that was interrupted after two of four steps."""
    home = tmp_path_factory.mktemp("half")
    shutil.copytree(tiny_llama, home / "base")
    recipe: dict[str, Any] = {
        "model": {"name": str(home / "base"), "dtype": "float32"},
        "adapter": {"method": "rasa", "r": 2, "k": 1, "alpha": 4},
        "data": {"dataset": str(token_rows)},
        "training": {"max_steps": 4, "batch_size": 4, "checkpoint_every": 2, "optimizer": {"lr": 0.02}},
        "output_dir": str(home / "run"),
    }
    (home / "recipe.yaml").write_text(json.dumps(recipe))
    run_command("train", home / "recipe.yaml", check=True)
    shutil.copytree(home / "run", home / "whole")
    (home / "run" / "summary.json").unlink()
    shutil.rmtree(home / "run" / "adapter")
    shutil.rmtree(home / "run" / "checkpoints" / "step-00000004")
    return home


@pytest.fixture
def started(half: Path, tmp_path: Path) -> Path:
    """The run of ``half`` in a directory of its own; its recipe names the base there."""
    shutil.copytree(half, tmp_path / "home")
    for path in (tmp_path / "home" / name for name in ("recipe.yaml", "run/recipe.yaml", "whole/recipe.yaml")):
        path.write_text(path.read_text().replace(str(half), str(tmp_path / "home")))
    return tmp_path / "home"


def weights(base: Path, change: Any) -> None:
    save_file(change(load_file(base / "model.safetensors")), base / "model.safetensors", metadata={"format": "pt"})


def noise(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor + 1e-3 * torch.randn_like(tensor) for name, tensor in tensors.items()}


def settings(base: Path, **changed: object) -> None:
    path = base / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))


UP = "model.layers.1.mlp.up_proj.weight"


def scaled(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return tensors | {UP: tensors[UP] * 1.01}


CHANGES: dict[str, tuple[Any, str]] = {
    "noise": (lambda base: weights(base, noise), "sampled tensors do"),
    "one tensor": (lambda base: weights(base, scaled), f"its {UP} differs (1 of 30 sampled tensors do)"),
    "a setting": (lambda base: settings(base, rms_norm_eps=0.1), "its config.json says rms_norm_eps: 0.1, not 1e-06"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_user_changes_the_base_between_start_and_resume(started: Path, cli: Cli, change: str) -> None:
    make, said = CHANGES[change]
    make(started / "base")
    again = cli("train", started / "recipe.yaml")
    assert again.returncode == 2, again.stdout + again.stderr
    assert said in again.stderr and "--fresh" in again.stderr and "model.name" in again.stderr
    assert not (started / "run" / "adapter").exists()
    with pytest.raises(UserError, match="is not the base") as refused:
        open_source(started / "run", str(started / "base"), weights=True)
    assert said in str(refused.value)


def test_a_user_merges_into_a_base_of_which_one_tensor_or_setting_changed(started: Path, cli: Cli) -> None:
    arguments = ("merge", started / "whole", "--base", started / "base", "--output", started / "out")
    weights(started / "base", scaled)
    for form in ("merged", "lora"):
        refused = cli(*arguments, "--format", form)
        assert refused.returncode == 2 and f"its {UP} differs" in refused.stderr
    assert cli(*arguments, "--any-base").returncode == 0


def test_every_tensor_is_looked_at(started: Path) -> None:
    base, names = started / "base", load_file(started / "base" / "model.safetensors")
    recorded = base_identity(str(base))
    assert len(json.dumps(recorded)) < 4000 and compare(recorded, str(base)).compared == len(names)
    for name in names:
        weights(base, lambda tensors, name=name: tensors | {name: tensors[name] * 1.01})
        assert compare(recorded, str(base)).different == [name]
        weights(base, lambda tensors, name=name: tensors | {name: names[name]})
    assert compare(recorded, str(base)).problem is None


def test_a_user_saves_the_same_base_in_shards_and_in_another_dtype(started: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(started / "base", dtype=torch.bfloat16)
    model.save_pretrained(started / "narrow")
    recorded = base_identity(str(started / "narrow"))
    model.float().save_pretrained(started / "wide", max_shard_size="20KB")
    path = started / "wide" / "config.json"  # as the authors of a model write it: without what is the default
    config = {
        key: value for key, value in json.loads(path.read_text()).items() if key not in ("head_dim", "rope_parameters")
    }
    path.write_text(json.dumps(config | {"rope_theta": 10000.0, "eos_token_id": 5, "transformers_version": "4.40.0"}))
    found = compare(recorded, str(started / "wide"))
    assert found.compared == 30 and found.problem is None
    (started / "wide" / "model.safetensors.index.json").unlink()
    assert compare(recorded, str(started / "wide")).compared == 0  # nothing to compare with is no difference


def test_adapters_that_record_a_few_tensors_only_are_still_checked(started: Path) -> None:
    old = {key: value for key, value in base_identity(str(started / "base")).items() if isinstance(value, str)}
    assert len(old) == 8 and compare(old, str(started / "base")) == Comparison([], 8, [])
    weights(started / "base", noise)
    assert sorted(compare(old, str(started / "base")).different) == sorted(old)
    assert compare({}, str(started / "base")) == Comparison([], 0, [])


def test_a_user_moves_the_base_and_goes_on(started: Path, cli: Cli) -> None:
    (started / "base").rename(started / "moved")
    recipe = json.loads((started / "recipe.yaml").read_text())
    recipe["model"]["name"] = str(started / "moved")
    (started / "recipe.yaml").write_text(json.dumps(recipe))
    again = cli("train", started / "recipe.yaml", check=True)
    assert "the same weights, so the run goes on" in again.stderr and "(step 2 of 4)" in again.stderr
    ours, whole = (load_file(started / name / "adapter" / "adapter.safetensors") for name in ("run", "whole"))
    assert all(torch.equal(ours[name], whole[name]) for name in whole)
    assert str(started / "moved") in (started / "run" / "recipe.yaml").read_text()
    weights(started / "moved", noise)
    (started / "moved").rename(started / "again")
    refused = cli("train", started / "recipe.yaml", f"model.name={started / 'again'}")
    assert refused.returncode == 2 and "model.name:" in refused.stderr and "another recipe" in refused.stderr


def test_a_user_analyses_an_adapter_on_another_base(started: Path, cli: Cli) -> None:
    settings(started / "base", rms_norm_eps=0.1)
    adapter = started / "whole" / "adapter"
    for words in (("spectrum", adapter), ("reconstruct", adapter), ("subspace", adapter, "--amplification", "2")):
        refused = cli("analyze", *words, "--base", started / "base")
        assert refused.returncode == 2, words
        assert "is not the base that" in refused.stderr and "--any-base" in refused.stderr
    cli("analyze", "spectrum", adapter, "--base", started / "base", "--any-base", check=True)


def test_a_user_starts_from_an_adapter_of_another_base(started: Path, cli: Cli) -> None:
    words = ("train", started / "recipe.yaml", "training.max_steps=1", f"adapter.init_from={started}/whole/adapter")
    same = cli(*words, f"output_dir={started}/same", check=True)
    assert "note: adapter.init_from" not in same.stderr
    weights(started / "base", scaled)
    other = cli(*words, f"output_dir={started}/other", check=True)
    said = f"note: adapter.init_from: {started}/base is not the base that {started}/whole/adapter was trained on"
    assert said in other.stderr and f"its {UP} differs" in other.stderr
    again = cli(*words, f"output_dir={started}/other", "training.log_every=3", check=True)
    assert "note: adapter.init_from" not in again.stderr


def test_a_pipe_among_the_code_of_a_base_is_not_waited_for(started: Path) -> None:
    settings(started / "base", auto_map={"AutoConfig": "code.Config"})
    (started / "base" / "code.py").write_text("")
    os.mkfifo(started / "base" / "another.py")
    assert "*.py" in base_identity(str(started / "base"))["config"]


@pytest.mark.parametrize("index", [{"weight_map": {UP: 5}}, {"weight_map": [UP]}, [UP], {"weight_map": {UP: ["x"]}}])
def test_an_index_of_the_wrong_types_is_no_traceback(started: Path, index: Any) -> None:
    recorded = base_identity(str(started / "base"))
    (started / "base" / "model.safetensors").unlink()
    (started / "base" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert base_identity(str(started / "base")) == {}
    assert compare(recorded, str(started / "base")).compared == 0
    with pytest.raises(UserError, match=r"weight_map|JSON object"):
        check_base(started / "base")


def test_a_user_keeps_a_checkpoint_of_another_base_beside_the_others(started: Path) -> None:
    recipe, newest = load_recipe(started / "recipe.yaml").recipe, started / "run" / "checkpoints" / "step-00000002"
    copy = newest.with_name("step-00000002-old")
    shutil.copytree(newest, copy)
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps(config | {"base_tensors": {UP: "another"}}))
    assert not is_complete(recipe, RunDirectory(started / "run"))


def replaced(directory: Path, name: str, change: Any) -> None:
    """Change a JSON or safetensors file of a checkpoint, and its checksum, as whoever made the checkpoint can."""
    path = directory / name
    if name.endswith(".json"):
        path.write_text(json.dumps(change(json.loads(path.read_text()))))
    else:
        save_file(change(load_file(path)), path)
    (directory / CHECKSUMS).unlink()
    write_checksums(directory, directory.iterdir())


def first(tensors: dict[str, torch.Tensor], key: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
    return dict(tensors, **{next(name for name in tensors if name.startswith(key)): value})


GIVEN: dict[str, tuple[str, Any, str]] = {
    "step is text": ("trainer.json", lambda o: o | {"step": "2"}, "step: Input should be"),
    "step of another": ("trainer.json", lambda o: o | {"step": 10**9}, "step must be that of step-00000002"),
    "scores": ("trainer.json", lambda o: o | {"evaluation": {"best": 3}}, "evaluation.suite: "),
    "no data": ("trainer.json", lambda o: {"step": 2}, "data_key must be str"),
    "a list": ("trainer.json", lambda o: [1], "must hold one JSON object"),
    "a name": ("optimizer.safetensors", lambda t: t | {"\x1b[2J:x": torch.zeros(1)}, "does not fit this run"),
    "a shape": ("optimizer.safetensors", lambda t: first(t, "exp_avg:", torch.zeros(7)), "of shape (7,)"),
}


@pytest.mark.parametrize("what", GIVEN)
def test_somebody_gives_a_run_with_a_checkpoint_that_they_wrote(started: Path, cli: Cli, what: str) -> None:
    name, change, words = GIVEN[what]
    replaced(started / "run" / "checkpoints" / "step-00000002", name, change)
    again = cli("train", started / "recipe.yaml")
    assert again.returncode == 2 and words in again.stderr and "\x1b" not in again.stderr
