"""Bases, adapters and runs that somebody else made: nothing outside of their directories is read or copied."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants

from rasa_train.adapters.saved import read_adapter
from rasa_train.errors import UserError
from rasa_train.io.checkpoint_files import INDEX
from rasa_train.merging.merged import merge
from rasa_train.models.config import ModelConfig
from rasa_train.models.load import check_base, load_config, load_model, load_tokenizer

from .conftest import logits, save_adapter, save_base
from .test_command import refused, run

SECRET = "root:x:0:0"


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "elsewhere" / "passwd"
    path.parent.mkdir()
    path.write_text(SECRET)
    return path


def holds_secret(directory: Path) -> list[str]:
    return [p.name for p in directory.rglob("*") if p.is_file() and SECRET.encode() in p.read_bytes()]


def test_a_merge_copies_no_file_from_outside_the_base(case, secret, tmp_path):
    base, adapter, _ = case()
    for name in ("notes.md", "README.md", "LICENSE", "LICENSE.txt"):
        (base / name).symlink_to(secret)
    code, stdout, stderr = run(adapter, "--output", tmp_path / "out", "--push", "me/model")
    assert code == 0 and "not copied from the base: LICENSE, LICENSE.txt, README.md and " in stdout, stdout
    assert holds_secret(tmp_path / "out") == [] and SECRET not in stdout + stderr
    listed = stdout[stdout.index("not uploaded") : stdout.index("not copied")]
    assert "passwd" not in listed and "notes.md" not in listed and "LICENSE" not in listed

    (secret.parent / "tool.jinja").write_text(SECRET)
    (base / "additional_chat_templates").symlink_to(secret.parent)
    code, stdout, stderr = run(adapter, "--output", tmp_path / "other")
    assert code == 2 and "additional_chat_templates" in stderr and SECRET not in stdout + stderr
    assert not (tmp_path / "other").exists()


def test_a_merge_copies_known_names_only(case, tmp_path):
    base, adapter, _ = case()
    left = [
        "optimizer.pkl",
        "x.py",
        "LICENSE.pkl",
        "id_rsa",
        "training_args.bin",
        "notes.md",
        "data.jsonl",
        "more.json",
    ]
    for name in left:
        (base / name).write_text("x")
    (base / "LICENSE.txt").write_text("x")
    (base / "README.md").write_text("x")
    report = merge(adapter, tmp_path / "out")
    assert sorted(report.left_out) == sorted(left)
    there = {path.name for path in (tmp_path / "out").iterdir()}
    assert there == {"LICENSE.txt", "README.md", "config.json", "generation_config.json", "model.safetensors"}

    os.mkfifo(base / "tokenizer.model")  # nobody writes into it, so reading it would never end
    with pytest.raises(UserError, match=r"tokenizer\.model is not a file"):
        merge(adapter, tmp_path / "other")


def test_a_merge_copies_the_code_that_the_config_names(case, tmp_path):
    base, adapter, _ = case()
    (base / "modeling_x.py").write_text("x = 1")
    (base / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["modeling_x.X", null]}}')
    merge(adapter, tmp_path / "out")
    assert (tmp_path / "out" / "modeling_x.py").is_file()


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "generation_config.json", "chat_template.jinja"]
)
def test_a_base_whose_files_are_links_to_other_places_is_refused_by_all_that_read_it(case, secret, tmp_path, name):
    base, adapter, _ = case()
    if (base / name).exists():
        shutil.move(base / name, secret.parent / name)
    else:
        shutil.copy(secret, secret.parent / name)
    (base / name).symlink_to(Path("..") / "elsewhere" / name)
    assert "is a link to " in refused(tmp_path, adapter, "--output", tmp_path / "out")
    for read in (check_base, load_model, load_tokenizer):
        with pytest.raises(UserError, match="is a link to ") as error:
            read(ModelConfig(name=str(base), tokenizer=str(base)))
        assert SECRET not in str(error.value)


@pytest.mark.parametrize("name", ["adapter.safetensors", "adapter_config.json", "tokenizer.json"])
def test_an_adapter_whose_files_are_links_to_other_places_is_refused(case, secret, tmp_path, name):
    _, adapter, _ = case()
    (adapter / "tokenizer.json").write_text("{}")
    shutil.move(adapter / name, secret.parent / name)
    (adapter / name).symlink_to(secret.parent / name)
    assert "is a link to " in refused(tmp_path, adapter, "--output", tmp_path / "out")


def test_links_in_a_circle_are_refused(case, tmp_path):
    base, adapter, _ = case()
    (base / "tokenizer.json").symlink_to(base / "tokenizer.json")
    assert "is a link to " in refused(tmp_path, adapter, "--output", tmp_path / "out")


@pytest.mark.parametrize("shared", [False, True])
def test_a_snapshot_of_the_hubs_cache_is_read_and_copied(tmp_path, shared):
    """Its files are links to the blobs of the model, which are links to blobs of the whole cache in newer versions."""
    repository = tmp_path / "hub" / "models--me--model"
    base = save_base(repository / "snapshots" / "0123abcd", shards="20KB")
    (base / "README.md").write_text("x")
    (repository / "blobs").mkdir()
    for number, path in enumerate(sorted(base.iterdir())):
        blob = repository / "blobs" / f"{number:064x}"
        shutil.move(path, blob)
        path.symlink_to(Path("..") / ".." / "blobs" / blob.name)
        if shared:
            place = tmp_path / "hub" / "blobs" / "00" / blob.name
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(blob, place)
            blob.symlink_to(Path("..") / ".." / "blobs" / "00" / blob.name)
    expected = save_adapter(tmp_path / "adapter", base)
    assert merge(tmp_path / "adapter", tmp_path / "out").left_out == []
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert (tmp_path / "out" / "README.md").read_text() == "x"
    assert (logits(load_model(ModelConfig(name=str(tmp_path / "out"), dtype="float32"))) - expected).abs().max() < 1e-4
    (base / "tokenizer.json").symlink_to(tmp_path / "adapter" / "adapter_config.json")
    with pytest.raises(UserError, match="is a link to "):
        load_model(ModelConfig(name=str(base)))


def cached(tmp_path, monkeypatch):
    """A model in the hub's cache, as another user of the machine may have put it into a cache that they share."""
    repository = tmp_path / "hub" / "models--me--model"
    base = save_base(repository / "snapshots" / "0123abcd", shards="20KB")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abcd")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return base


def test_the_index_of_a_model_in_the_hubs_cache_names_files_beside_it(tmp_path, monkeypatch):
    base, secret = cached(tmp_path, monkeypatch), save_base(tmp_path / "hub" / "private")
    load_config(ModelConfig(name="me/model"))
    index = json.loads((base / INDEX).read_text())
    outside = os.path.relpath(secret / "model.safetensors", base)
    (base / INDEX).write_text(json.dumps({**index, "weight_map": dict.fromkeys(index["weight_map"], outside)}))
    for read in (load_config, load_model, load_tokenizer):
        with pytest.raises(UserError, match="weight_map"):
            read(ModelConfig(name="me/model"))


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json", "additional_chat_templates/tool.jinja"])
def test_a_tokenizer_that_would_fill_the_memory_is_not_parsed(tmp_path, name):
    base = save_base(tmp_path / "base")
    (base / name).parent.mkdir(exist_ok=True)
    (base / name).touch()
    os.truncate(base / name, 1 << 36)
    for read in (load_tokenizer, load_config):
        with pytest.raises(UserError, match=rf"{name} is larger than 67,108,864 bytes"):
            read(ModelConfig(name=str(base)))
    (base / name).unlink()
    os.mkfifo(base / name)
    with pytest.raises(UserError, match=rf"{name} is not a file"):
        load_tokenizer(ModelConfig(name=str(base)))


def test_a_chat_template_is_not_read_from_outside_the_base(secret, tmp_path):
    base = save_base(tmp_path / "base")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool.jinja").symlink_to(secret)
    with pytest.raises(UserError, match="is a link to "):
        load_tokenizer(ModelConfig(name=str(base)))


def test_training_follows_no_index_out_of_the_base(tmp_path):
    base = save_base(tmp_path / "base", shards="20KB")
    save_base(tmp_path / "private")
    index = json.loads((base / INDEX).read_text())
    for name in ("../private/model.safetensors", str(tmp_path / "private" / "model.safetensors")):
        index["weight_map"] = dict.fromkeys(index["weight_map"], name)
        (base / INDEX).write_text(json.dumps(index))
        for read in (load_model, check_base):
            with pytest.raises(UserError, match="weight_map"):
                read(ModelConfig(name=str(base)))


@pytest.mark.parametrize("name", ["recipe.yaml", "summary.json"])
def test_a_model_card_quotes_nothing_from_outside_the_run(case, secret, tmp_path, name):
    _, adapter, _ = case()
    (tmp_path / "run").mkdir()
    shutil.move(adapter, tmp_path / "run" / "adapter")
    secret.write_text(f"{{data: {{dataset: '{SECRET}'}}}}" if name == "recipe.yaml" else f'{{"a": "{SECRET}"}}')
    (tmp_path / "run" / name).symlink_to(secret)
    code, stdout, stderr = run(tmp_path / "run", "--output", tmp_path / "out", "--push", "me/model")
    assert code == 2 and "is a link to " in stderr and SECRET not in stdout + stderr
    assert not (tmp_path / "out").exists() or holds_secret(tmp_path / "out") == []


@pytest.mark.parametrize("text", ["[1", "- 1", "a: &a [*a]", "data: 5", ""])
def test_a_model_card_of_a_run_with_a_damaged_recipe(case, tmp_path, text):
    _, adapter, _ = case()
    (adapter / "recipe.yaml").write_text(text)
    code, _, stderr = run(adapter, "--output", tmp_path / "out", "--push", "me/model", "--verify")
    assert code in (0, 2) and (code == 0 or stderr.startswith("error: "))


def test_tokenizers_of_adapters_in_a_snapshot_are_copied(case, tmp_path):
    _, adapter, _ = case()
    (adapter / "tokenizer.json").write_text("{}")
    shutil.move(adapter / "tokenizer.json", adapter / "blob")
    (adapter / "tokenizer.json").symlink_to("blob")
    assert read_adapter(adapter).method.method == "rasa"
    merge(adapter, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
