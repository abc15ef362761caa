"""What llama.cpp's converter takes from a model directory: files, keys and names. Its own package knows the names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from rasa_train.io.checkpoint_files import INDEX
from rasa_train.merging.merged import merge

from .conftest import load, save_adapter

gguf = pytest.importorskip("gguf")

DEMO = Path(__file__).parents[2] / "rasa_train" / "demo" / "model"
KEYS = (
    "architectures", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "tie_word_embeddings",
)  # fmt: skip
"""Keys of config.json: what the converter reads of a Llama."""


@pytest.mark.parametrize("shards", ["1GB", "300KB"])
def test_a_merged_llama_is_what_the_converter_expects(tmp_path: Path, shards: str) -> None:
    base = tmp_path / "base"
    load(DEMO).save_pretrained(base, max_shard_size=shards)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).write_bytes((DEMO / name).read_bytes())
    save_adapter(tmp_path / "adapter", base)
    merge(tmp_path / "adapter", tmp_path / "merged")
    merged = tmp_path / "merged"
    config = json.loads((merged / "config.json").read_text())
    assert all(key in config for key in KEYS) and config["architectures"] == ["LlamaForCausalLM"]
    assert "quantization_config" not in config and not list(merged.glob("adapter*"))
    # one file, or parts that the index lists to the last tensor; both are found by their names
    parts = sorted(path.name for path in merged.glob("model*.safetensors"))
    tensors = {name: tensor for part in parts for name, tensor in load_file(merged / part).items()}
    assert len(parts) > 1 if shards == "300KB" else parts == ["model.safetensors"]
    if len(parts) > 1:
        assert json.loads((merged / INDEX).read_text())["weight_map"].keys() == tensors.keys()
    # each tensor has a place in the GGUF, none has two, and no layer is left out
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    places = {names.get_name(name, try_suffixes=(".weight", ".bias")) for name in tensors}
    assert None not in places and len(places) == len(tensors)
    a_layer = {place.removeprefix("blk.0.") for place in places if place.startswith("blk.0.")}
    assert len(a_layer) == 9
    wanted = {f"blk.{i}.{name}" for i in range(config["num_hidden_layers"]) for name in a_layer}
    assert places == wanted | {"token_embd.weight", "output_norm.weight"}  # tied: the output is the embedding
    # the vocabulary, its merges and its special tokens
    vocabulary = gguf.SpecialVocab(merged, load_merges=True, n_vocab=config["vocab_size"])
    assert vocabulary.merges and vocabulary.special_token_ids.keys() >= {"bos", "eos"}
