"""A base is known again by its values: in other shards and a wider dtype, and not after training."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from rasa_train.io.base_fingerprint import TENSORS, base_samples


def base(directory: Path, shards: str = "1GB", dtype: torch.dtype = torch.bfloat16) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=96, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, bos_token_id=1
    )
    model = AutoModelForCausalLM.from_config(config).bfloat16()
    model.to(dtype).save_pretrained(directory, max_shard_size=shards)
    return directory


def test_shards_and_a_wider_dtype_do_not_matter(tmp_path):
    samples = base_samples(str(base(tmp_path / "one")))
    assert len(samples) == TENSORS and all(len(sample) == 16 for sample in samples.values())
    assert len({name.split(".")[2] for name in samples if ".layers." in name}) == 3  # from all over the model
    assert base_samples(str(base(tmp_path / "shards", "50KB"))) == samples
    assert base_samples(str(base(tmp_path / "wide", dtype=torch.float32))) == samples
    json.dumps(samples)


def test_training_and_other_shapes_do(tmp_path):
    one = base(tmp_path / "one")
    samples = base_samples(str(one))
    weights = load_file(one / "model.safetensors")
    name = next(n for n in samples if "proj" in n)
    for other in (weights[name] * 1.01, weights[name][:-1].contiguous()):
        save_file({**weights, name: other}, one / "model.safetensors", metadata={"format": "pt"})
        changed = base_samples(str(one), only=samples)
        assert {n for n in samples if changed[n] != samples[n]} == {name}


def test_what_cannot_be_read_has_no_samples(tmp_path):
    assert base_samples(str(tmp_path)) == {}
    assert base_samples("nobody/no-such-model") == {}
    one = base(tmp_path / "one")
    assert base_samples(str(one), only=["another.weight"]) == {}
    (one / "model.safetensors").write_bytes(b"torn")
    assert base_samples(str(one)) == {}
