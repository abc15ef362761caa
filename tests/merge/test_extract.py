"""Extraction: the adapter is what the report says it is, by dense algebra on the two checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import PreTrainedModel

from rasa_train.errors import UserError
from rasa_train.lowrank.reconstruct import Reconstruction
from rasa_train.merging import Fit, extract
from rasa_train.merging import extract as function
from rasa_train.merging.merged import merge

from .conftest import load, save_base

KINDS = {"self_attn.q_proj", "mlp.down_proj"}
TARGETS = ["q_proj", "down_proj"]


def finetuned(tmp_path: Path, kind: str = "llama", shards: str = "1GB", change=None) -> tuple[Path, Path]:
    """A base, and one whose linears have a common low-rank change, one of their own, and noise."""
    base = save_base(tmp_path / "base", kind)
    model = load(base)
    torch.manual_seed(7)
    with torch.no_grad():
        (change or common_change)(model)
    model.save_pretrained(tmp_path / "tuned", max_shard_size=shards)
    return base, tmp_path / "tuned"


def common_change(model: PreTrainedModel) -> None:
    common: dict[torch.Size, tuple[torch.Tensor, torch.Tensor]] = {}
    for name, p in model.named_parameters():
        if "layers" in name and p.ndim == 2:
            U, V = common.setdefault(p.shape, (torch.randn(p.shape[0], 2), torch.randn(2, p.shape[1])))
            p += 0.05 * U @ torch.diag(torch.randn(2)) @ V + 0.01 * torch.randn_like(p)
    model.get_input_embeddings().weight[3] += 1.0


def updates(base: Path, tuned: Path, kind: str) -> dict[str, torch.Tensor]:
    old, new = (dict(load(d).named_parameters()) for d in (base, tuned))
    return {n: (new[n] - old[n]).detach() for n in old if kind in n}


@pytest.mark.parametrize("k", [0, 1, 3])
def test_the_errors_are_those_of_what_is_written(tmp_path, k):
    base, tuned = finetuned(tmp_path, shards="20KB")
    report = extract(str(tuned), str(base), tmp_path / "out", Fit(r=3, k=k, sweeps=30, targets=TARGETS))
    merge(tmp_path / "out", tmp_path / "merged")
    assert report.kinds.keys() == KINDS
    for kind, row in report.kinds.items():
        wanted, got = (updates(base, d, kind) for d in (tuned, tmp_path / "merged"))
        assert len(wanted) == 3
        error = sum(float(((wanted[n] - got[n]) ** 2).sum()) for n in wanted)
        lora = sum(float((torch.linalg.svdvals(t)[3:] ** 2).sum()) for t in wanted.values())
        assert_close(row.error, error, rtol=1e-3, atol=1e-7)
        assert_close(row.lora_error, lora, rtol=1e-3, atol=1e-7)
        if k:
            assert row.error < lora
        else:
            assert_close(row.error, row.lora_error)
    assert report.others_changed[0] == "model.embed_tokens.weight" and len(report.others_changed) == 1 + 5 * 3


def test_lora_and_transposed_weights(tmp_path):
    def change(model: PreTrainedModel) -> None:
        for name, p in model.named_parameters():
            if name.endswith("c_attn.weight"):
                p += 0.1 * torch.randn(p.shape[0], 2) @ torch.randn(2, p.shape[1])

    base, tuned = finetuned(tmp_path, "gpt2", change=change)
    report = extract(str(tuned), str(base), tmp_path / "out", Fit(method="lora", r=2, targets=["c_attn"]))
    assert report.total.error < 1e-9 * report.total.norm2 and report.others_changed == []
    merge(tmp_path / "out", tmp_path / "merged")
    want, got = (load_file(d / "model.safetensors") for d in (tuned, tmp_path / "merged"))
    for name in want:
        assert_close(got[name], want[name], rtol=1e-4, atol=1e-5)


def test_large_kinds_are_cut_first_and_stay_below_lora(tmp_path, monkeypatch):
    base, tuned = finetuned(tmp_path)
    module = __import__("sys").modules[function.__module__]
    monkeypatch.setattr(module, "DENSE", 0)
    monkeypatch.setattr(module, "KEPT", 2)
    cut = extract(str(tuned), str(base), tmp_path / "cut", Fit(r=3, k=1, sweeps=30, targets=TARGETS))
    monkeypatch.setattr(module, "DENSE", 1 << 28)
    whole = extract(str(tuned), str(base), tmp_path / "whole", Fit(r=3, k=1, sweeps=30, targets=TARGETS))
    for kind in KINDS:
        assert_close(cut.kinds[kind].lora_error, whole.kinds[kind].lora_error, rtol=1e-4, atol=0.0)
        assert_close(cut.kinds[kind].norm2, whole.kinds[kind].norm2, rtol=1e-5, atol=0.0)
        assert whole.kinds[kind].error < 1.1 * cut.kinds[kind].error < 1.2 * whole.kinds[kind].error

    def misled(M, r, k, sweeps=50, start="best") -> Reconstruction:  # a descent that cutting has led astray
        fitted = real(M, r, k, sweeps=sweeps, start=start)
        return fitted if start == "theorem" else Reconstruction(**{**vars(fitted), "d": 2 * fitted.d})

    real = module.reconstruct
    monkeypatch.setattr(module, "DENSE", 0)
    monkeypatch.setattr(module, "reconstruct", misled)
    safe = extract(str(tuned), str(base), tmp_path / "safe", Fit(r=3, k=1, targets=TARGETS))
    assert all(row.error <= row.lora_error * (1 + 1e-5) for row in safe.kinds.values())


def test_two_architectures(tmp_path):
    base, _ = save_base(tmp_path / "base"), save_base(tmp_path / "gpt2", "gpt2")
    with pytest.raises(UserError, match=r"gpt2 is not a fine-tuned .*q_proj\.weight is absent"):
        extract(str(tmp_path / "gpt2"), str(base), tmp_path / "out")
    save_base(tmp_path / "tied", "tied")
    with pytest.raises(UserError, match=r"k_proj\.weight is \(32, 32\), not \(16, 32\)"):
        extract(str(tmp_path / "tied"), str(base), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_that_cannot_be_read(tmp_path):
    base, tuned = finetuned(tmp_path)
    weights, name = load_file(tuned / "model.safetensors"), "model.layers.1.self_attn.q_proj.weight"
    for value, says in [
        (torch.full((32, 32), float("nan")), "not finite"),
        (torch.zeros(31, 32), r"has shape \(31, 32\)"),
        (torch.zeros(32, 32, dtype=torch.int8), "is I8"),
        (None, "has no tensor for"),
    ]:
        changed = {n: t for n, t in {**weights, name: value}.items() if t is not None}
        save_file(changed, tuned / "model.safetensors", {"format": "pt"})
        with pytest.raises(UserError, match=says):
            extract(str(tuned), str(base), tmp_path / "out", Fit(targets=TARGETS))
    assert not (tmp_path / "out").exists()
