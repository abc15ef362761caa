"""Files written tensor by tensor, read by the safetensors library."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from rasa_train.adapters.saved import part, read_safetensors
from rasa_train.errors import UserError
from rasa_train.io.tensor_file import DTYPES, TensorFile

TENSORS: dict[str, Tensor] = {
    "wide": torch.arange(6, dtype=torch.float64).view(2, 3),
    "transposed": torch.arange(12, dtype=torch.float32).view(3, 4).t(),
    "step": torch.tensor(7.0),
    'a "quoted" näme': torch.randn(5, dtype=torch.bfloat16),
    "none": torch.zeros(0, 4, dtype=torch.float16),
    "mask": torch.tensor([True, False, True]),
}


def write(path: Path, names: list[str]) -> None:
    with TensorFile(path, TENSORS) as file:
        for name in names:
            file.add(name, TENSORS[name])


def test_the_library_reads_what_was_written(tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors", list(TENSORS))
    read = load_file(tmp_path / "a.safetensors")
    assert read.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor), name
    write(tmp_path / "b.safetensors", [])  # room for all, none came
    assert load_file(tmp_path / "b.safetensors") == {}


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    tensor = torch.tensor([0, 1, 1]).to(dtype)
    with TensorFile(tmp_path / "a.safetensors", ["x"]) as file:
        file.add("x", tensor)
    with safe_open(tmp_path / "a.safetensors", "pt") as opened:
        assert torch.equal(opened.get_tensor("x"), tensor) and opened.get_tensor("x").dtype == dtype


def test_small_dtypes_first_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AssertionError), TensorFile(tmp_path / "a.safetensors", ["a", "b"]) as file:
        file.add("a", torch.ones(3, dtype=torch.bool))
        file.add("b", torch.ones(3))


def test_parts_are_read_as_one_file(tmp_path: Path) -> None:
    path, names = tmp_path / "a.safetensors", list(TENSORS)
    write(part(path, 0, 2), names[:2])
    write(part(path, 1, 2), names[2:])
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"a-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert read_safetensors(path).keys() == TENSORS.keys()
    part(path, 0, 2).unlink()
    with pytest.raises(UserError, match="the parts are not complete"):
        read_safetensors(path)
