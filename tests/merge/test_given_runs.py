"""Run directories that somebody else has made, or that a killed run has left, given to a merge."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from rasa_train.errors import UserError
from rasa_train.io.checksums import write_checksums
from rasa_train.merging.source import find_adapter


def checkpoint(run: Path, step: int) -> Path:
    path = run / "checkpoints" / f"step-{step:08d}"
    path.mkdir(parents=True)
    for name in ("adapter_config.json", "adapter.safetensors", "optimizer.safetensors", "trainer.json"):
        (path / name).write_text("{}")
    write_checksums(path, path.iterdir())
    return path


@pytest.mark.parametrize("lost", ["adapter.safetensors", "checksums.json", "adapter_config.json"])
def test_the_checkpoint_before_a_half_removed_one_is_taken(lost: str, tmp_path: Path) -> None:
    whole, half = checkpoint(tmp_path, 10), checkpoint(tmp_path, 20)
    assert find_adapter(tmp_path) == half
    (half / lost).unlink()
    assert find_adapter(tmp_path) == whole


@pytest.mark.parametrize("name", ["step-99", "step-00000020-old", "step-new"])
def test_a_copy_of_a_checkpoint_under_another_name_is_not_merged(name: str, tmp_path: Path) -> None:
    newest = checkpoint(tmp_path, 20)
    shutil.copytree(newest, newest.with_name(name))
    assert find_adapter(tmp_path) == newest


@pytest.mark.parametrize("name", ["adapter", "adapter/adapter.safetensors", "adapter/tokenizer.json", "recipe.yaml"])
def test_a_link_out_of_a_run_is_refused(name: str, tmp_path: Path) -> None:
    """``tokenizer.json -> ~/.ssh/id_rsa`` would be copied into the merged model, and pushed with it."""
    run, secret = tmp_path / "run", tmp_path / "secret"
    (run / name).parent.mkdir(parents=True)
    secret.write_text("secret")
    (run / name).symlink_to(secret)
    with pytest.raises(UserError, match=f"{name} is a link to .*secret, outside of"):
        find_adapter(run)


def test_a_link_out_of_an_adapter_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "given").mkdir()
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "given" / "adapter_config.json").write_text("{}")
    (tmp_path / "given" / "tokenizer.json").symlink_to("../secret")
    with pytest.raises(UserError, match=r"tokenizer\.json is a link to .*secret, outside of"):
        find_adapter(tmp_path / "given")
