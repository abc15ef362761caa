"""An adapter of which a bit has flipped is read by nobody; one without checksums is read as before."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rasa_train.adapters.saved import TENSORS, read_adapter, write_adapter
from rasa_train.analysis.updates import of_adapter
from rasa_train.errors import UserError
from rasa_train.evaluate.load import Plan, find_subjects, load_lm
from rasa_train.io.checksums import CHECKSUMS
from rasa_train.merging.lora import export_lora
from rasa_train.merging.merged import merge
from rasa_train.merging.peft_format import export_peft
from rasa_train.merging.source import find_adapter


def flip(path: Path, at: int = -2, bit: int = 6) -> None:
    """Flip one bit; by default one of the exponent of the last value."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(content)


def test_one_bit_of_the_exponent_flips(case, tmp_path):
    _, adapter, _ = case(method="lora")
    readers = {
        "merge": lambda: merge(adapter, tmp_path / "out"),
        "lora": lambda: export_lora(adapter, tmp_path / "out"),
        "peft": lambda: export_peft(adapter, tmp_path / "out"),
        "analyze": lambda: of_adapter(adapter),
        "eval": lambda: load_lm(Plan(find_subjects(str(adapter), all_checkpoints=False, output=tmp_path)[0])),
        "init_from, load_adapter, report": lambda: read_adapter(adapter),
    }
    flip(adapter / TENSORS)
    for reader in readers.values():
        with pytest.raises(UserError, match=f"damaged: {TENSORS} does not match its checksum"):
            reader()
    assert not (tmp_path / "out").exists()
    flip(adapter / TENSORS)
    for name in ("merge", "lora", "peft"):
        readers[name]()
        shutil.rmtree(tmp_path / "out")


def test_one_digit_of_alpha_changes(case):
    _, adapter, _ = case()
    config = adapter / "adapter_config.json"
    config.write_text(config.read_text().replace('"alpha": 8', '"alpha": 9'))
    with pytest.raises(UserError, match=f"adapter_config.json does not match.*delete {CHECKSUMS}"):
        read_adapter(adapter)
    (adapter / CHECKSUMS).unlink()  # as an older version and PEFT write adapters
    assert read_adapter(adapter).method.alpha == 9


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{}", "no checksum of adapter.safetensors|no checksum of adapter_config.json"),
        ("[]", "must hold one JSON object"),
        ("", "is not valid JSON"),
        ('{"adapter_config.json": 1, "adapter.safetensors": null}', "does not match its checksum"),
        ('{"adapter_config.json": "", "adapter.safetensors": "", "../../x": ""}', "does not match|files beside it"),
    ],
)
def test_somebody_empties_the_checksums(case, content, said):
    _, adapter, _ = case()
    (adapter / CHECKSUMS).write_text(content)
    with pytest.raises(UserError, match=said):
        read_adapter(adapter)


def test_a_listed_file_is_a_pipe_or_gone(case):
    _, adapter, _ = case()
    (adapter / TENSORS).unlink()
    os.mkfifo(adapter / TENSORS)
    with pytest.raises(UserError, match=f"damaged: {TENSORS} is missing"):
        read_adapter(adapter)


def test_a_value_is_not_finite(case, tmp_path):
    _, adapter, _ = case()
    tensors = load_file(adapter / TENSORS)
    name = sorted(tensors)[3]
    tensors[name].view(-1)[1] = float("inf")
    (adapter / CHECKSUMS).unlink()
    save_file(tensors, adapter / TENSORS, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"damaged: {name} has values that are not finite"):
        merge(adapter, tmp_path / "out")


def test_an_export_is_damaged_too(case, tmp_path):
    _, adapter, _ = case(method="lora")
    for export in (export_lora, export_peft):
        output = tmp_path / export.__name__
        export(adapter, output)
        read_adapter(output)
        flip(output / "adapter_model.safetensors")
        with pytest.raises(UserError, match="does not match its checksum"):
            read_adapter(output)


def test_a_save_over_an_adapter_is_killed_between_its_files(case):
    _, adapter, _ = case()
    saved = read_adapter(adapter)
    before = {path.name: path.read_bytes() for path in adapter.iterdir()}
    method = saved.method.model_copy(update={"alpha": 2.0})
    write_adapter(adapter, method, saved.tensors, base_model="base", base_revision=None)
    assert read_adapter(adapter).method.alpha == 2.0
    (adapter / CHECKSUMS).write_bytes(before[CHECKSUMS])
    with pytest.raises(UserError, match="damaged"):
        read_adapter(adapter)


def test_the_newest_checkpoint_of_a_run_is_half_removed(case, tmp_path, capsys):
    _, adapter, _ = case()
    run = tmp_path / "run"
    for step in (1, 2, 3):
        shutil.copytree(adapter, run / "checkpoints" / f"step-{step:08d}")
    (run / "checkpoints" / "step-00000003" / TENSORS).unlink()
    flip(run / "checkpoints" / "step-00000002" / TENSORS)
    assert find_adapter(run).name == "step-00000001"
    said = capsys.readouterr().err
    assert said.count("is damaged") == 2 and "step-00000003" in said and "step-00000002" in said
    flip(run / "checkpoints" / "step-00000001" / TENSORS)
    with pytest.raises(UserError, match="holds no whole adapter"):
        find_adapter(run)
    assert torch.isfinite(next(iter(read_adapter(adapter).tensors.values()))).all()
    assert json.loads((adapter / CHECKSUMS).read_text()).keys() == {"adapter_config.json", TENSORS}
