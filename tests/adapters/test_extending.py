"""The method of docs/EXTENDING.md, as it stands there: held to the contract, and trained in a copy of the package."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from rasa_train.adapters.registry import METHODS
from rasa_train.adapters.state import adapters, trainable
from rasa_train.merging.lora import export_lora
from tests.adapters import test_contract as contract
from tests.adapters.test_contract import bases as bases  # a fixture
from tests.doc_pages import ROOT, blocks

NAME, LINE = "lora-fa", '"lora-fa": LoRAFA,'


def source() -> str:
    (found,) = [block.text for block in blocks(ROOT / "docs" / "EXTENDING.md") if block.language == "python"]
    return found + "\n"


@pytest.fixture
def method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type:
    """As if it were a file of the package and a line in METHODS."""
    file = tmp_path / "lora_fa.py"
    file.write_text(source())
    spec = importlib.util.spec_from_file_location("rasa_train.adapters.lora_fa", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    monkeypatch.setitem(METHODS, NAME, module.LoRAFA)
    found: type = module.LoRAFA
    return found


@pytest.mark.parametrize("weight", contract.WEIGHTS)
def test_it_keeps_the_contract(weight: str, method: type, bases: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    case = contract.make_case(method(r=4), bases[weight, "fp32"], torch.float32, tmp_path / "adapter")
    contract.test_the_output_is_the_bases_at_first(case)
    contract.test_forward_is_the_delta(case)
    contract.test_saved_and_loaded_into_a_fresh_model(case)
    contract.test_every_tensor_is_stored_once(case)
    contract.test_a_gradient_reaches_everything_that_is_trained(case)
    contract.test_merged_is_the_base_plus_the_update(case, tmp_path)
    assert {name.rpartition(".")[2] for name in trainable(case.model)} == {"B"}, "A is frozen"
    if weight != "experts":
        report = export_lora(case.directory, tmp_path / "lora")
        assert report.rank == 4 and not report.error
        tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
        for path, adapter in adapters(case.model).items():
            A, B = (tensors[f"base_model.model.{path}.lora_{side}.weight"] for side in "AB")
            assert_close(B @ A, adapter.delta(), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_recipe_may_name_it(tmp_path: Path) -> None:
    assert f"`{LINE}`" in (ROOT / "docs" / "EXTENDING.md").read_text()
    for part in ("rasa_train", "configs"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    package = tmp_path / "rasa_train" / "adapters"
    (package / "lora_fa.py").write_text(source())
    init = (package / "__init__.py").read_text().replace('    "rasa": RaSA,', f'    "rasa": RaSA,\n    {LINE}')
    (package / "__init__.py").write_text(init.replace("from .mora", "from .lora_fa import LoRAFA\nfrom .mora"))
    command = [sys.executable, "-m", "rasa_train.cli.train", "demo", f"adapter.method={NAME}", "training.max_steps=2"]
    done = subprocess.run(
        [*command, "data.fraction=0.01", "output_dir=run"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    config = json.loads((ROOT / "rasa_train/demo/model/config.json").read_text())
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    outputs = 3 * hidden + 2 * hidden // heads * config["num_key_value_heads"] + 2 * config["intermediate_size"]
    count = f"{8 * config['num_hidden_layers'] * outputs:,} trainable"  # B of r = 8 in every linear
    assert done.returncode == 0 and count in done.stderr, done.stderr
