"""Bases and adapters whose files are damaged, or say what no model is: read, or refused in one line."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from rasa_train.adapters.inject import adapt
from rasa_train.adapters.registry import METHODS
from rasa_train.adapters.saved import read_adapter, saved_tensors, write_adapter
from rasa_train.errors import UserError
from rasa_train.io.checkpoint_files import INDEX
from rasa_train.merging.merged import merge
from rasa_train.models.config import ModelConfig
from rasa_train.models.load import check_base, load_model, load_tokenizer

DEMO = Path(__file__).resolve().parents[1] / "rasa_train" / "demo" / "model"
WRONG: list[Any] = [
    *(None, True, 7, -1, 0, 2.5, "two", "", [], [1], ["a"], {}, {"a": 1}, 10**7, 10**12, 10**30, float("nan")),
    [[[1]]],
]
FILES = {
    "config.json": [
        *("architectures", "rope_scaling", "torch_dtype", "quantization_config", "auto_map", "num_labels", "id2label"),
        *("layer_types", "tokenizer_class", "is_encoder_decoder", "text_config"),
    ],
    "generation_config.json": ["temperature", "max_length", "pad_token_id", "suppress_tokens"],
    "tokenizer_config.json": ["chat_template", "added_tokens_decoder", "extra_special_tokens", "auto_map"],
}
"""The configurations of a base, and keys that they may have in addition to those of the demo's."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(DEMO, tmp_path_factory.mktemp("bases") / "base"))


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    method = METHODS["lora"].model_validate({"method": "lora", "r": 2})
    model, _ = adapt(load_model(ModelConfig(name=str(base), dtype="float32")), method)
    (directory := base.parent / "adapter").mkdir()
    write_adapter(directory, method, saved_tensors(model), base_model=str(base), base_revision=None)
    return directory


def outcome(read: Callable[[], object]) -> str:
    """Return the message of the refusal, or nothing. Any other error fails the test."""
    try:
        read()
    except UserError as error:
        message = str(error)
        assert message and "\n" not in message and len(message) < 1_500, message
        return message
    return ""


def read_base(base: Path, adapter: Path, out: Path) -> list[str]:
    config = ModelConfig(name=str(base), dtype="float32")

    def run() -> None:
        with torch.no_grad():
            load_model(config)(input_ids=torch.tensor([[1, 2, 3]]))

    def tokenize() -> None:
        if tokenizer := load_tokenizer(config):
            tokenizer("hello")

    shutil.rmtree(out, ignore_errors=True)
    checked = outcome(lambda: check_base(config))
    # What the check refuses, training does not begin with; what it accepts must run.
    ran = [] if checked else [outcome(run)]
    return [checked, *ran, outcome(tokenize), outcome(lambda: merge(adapter, out))]


def mutations() -> Iterator[tuple[str, str, Any]]:
    for name, more in FILES.items():
        for key in [*json.loads((DEMO / name).read_text()), *more]:
            for value in WRONG:
                yield name, key, value


def try_all(cases: list[tuple[str, str, Any]], base: Path, adapter: Path, out: Path) -> int:
    refused = 0
    for name, key, value in cases:
        good = (base / name).read_text()
        try:
            (base / name).write_text(json.dumps({**json.loads(good), key: value}))
            refused += any(read_base(base, adapter, out))
        except Exception as error:
            raise AssertionError(f"{name}: {key}: {value!r:.60}") from error
        finally:
            (base / name).write_text(good)
    return refused


def test_values_of_the_wrong_type_in_the_configurations_of_a_base(base: Path, adapter: Path, tmp_path: Path) -> None:
    assert not any(read_base(base, adapter, tmp_path / "out")), "as it is, it is read"
    chosen = [
        *(("config.json", "num_hidden_layers", value) for value in ("two", -1, 10**7)),
        *(("config.json", "hidden_size", value) for value in (None, 10**7)),
        ("config.json", "rope_scaling", [1]),
        ("config.json", "quantization_config", 7),
        ("config.json", "model_type", ["a"]),
        ("config.json", "num_labels", 10**9),
        ("config.json", "num_attention_heads", 0),
    ]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert try_all(chosen, base, adapter, tmp_path / "out") == len(chosen)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000, "kilobytes"


@pytest.mark.slow
def test_every_value_of_the_wrong_type_in_the_configurations_of_a_base(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    assert try_all(list(mutations()), base, adapter, tmp_path / "out") > 100


def truncated(path: Path, nbytes: int) -> None:
    path.write_bytes(path.read_bytes()[:nbytes])


def other_vocabulary(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "vocab_size": 700}))


def index_of(names: dict[str, object]) -> Callable[[Path], object]:
    def write(directory: Path) -> None:
        (directory / "model.safetensors").rename(directory / "model-1.safetensors")
        (directory / INDEX).write_text(json.dumps({"weight_map": names}))

    return write


DAMAGE: dict[str, Callable[[Path], object]] = {
    "weights of no bytes": lambda d: truncated(d / "model.safetensors", 0),
    "weights cut in the header": lambda d: truncated(d / "model.safetensors", 100),
    "weights cut in a tensor": lambda d: truncated(d / "model.safetensors", 1_000_000),
    "a header for weights": lambda d: (d / "model.safetensors").write_bytes(b"\xff" * 64),
    "a directory for weights": lambda d: ((d / "model.safetensors").unlink(), (d / "model.safetensors").mkdir()),
    "an index of nothing": index_of({}),
    "an index of numbers": index_of({"a": 7}),
    "an index of absent files": index_of({"model.norm.weight": "other.safetensors"}),
    "an index of other tensors": index_of({"x": "model-1.safetensors"}),
    "a config that is a list": lambda d: (d / "config.json").write_text("[1]"),
    "a config that is cut": lambda d: truncated(d / "config.json", 40),
    "a config that is nested": lambda d: (d / "config.json").write_text('{"a":' * 100_000),
    "a config of bytes": lambda d: (d / "config.json").write_bytes(b"\xff\xfe"),
    "a tokenizer that is cut": lambda d: truncated(d / "tokenizer.json", 5_000),
    "a tokenizer that is a list": lambda d: (d / "tokenizer.json").write_text("[1]"),
    "a tokenizer of another kind": lambda d: (d / "tokenizer.json").write_text('{"model": {"type": "BPE"}}'),
    "settings of a tokenizer that are cut": lambda d: truncated(d / "tokenizer_config.json", 30),
    "settings of generation that are cut": lambda d: truncated(d / "generation_config.json", 30),
    "another vocabulary": other_vocabulary,
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_base_is_refused_in_one_line(base: Path, adapter: Path, tmp_path: Path, what: str) -> None:
    mine = Path(shutil.copytree(base, tmp_path / "base"))
    DAMAGE[what](mine)
    config = ModelConfig(name=str(mine), dtype="float32")
    reads = (lambda: check_base(config), lambda: load_model(config), lambda: load_tokenizer(config))
    assert any([outcome(read) for read in reads])


ILL: dict[str, list[Any]] = {
    **{key: [7, [1], "x", {"a": 1}] for key in ("base_tensors", "targets", "exclude", "method", "format_version")},
    "r": [10**12, 10**30, -1, 0, "two", None, [8], 10**5],
    "k": [-1, 99, 10**12, "x"],
    "alpha": [float("nan"), float("inf"), -1, "x", None],
    "dropout": [float("nan"), 7, "x"],
    "base_model": [7, [], {}],
    "n_basis": [10**12],
}


@pytest.mark.parametrize("key", ILL)
def test_an_adapter_whose_fields_are_of_the_wrong_type(base: Path, adapter: Path, tmp_path: Path, key: str) -> None:
    mine = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    good = json.loads((mine / "adapter_config.json").read_text())
    (mine / "checksums.json").unlink(missing_ok=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for method in ("lora", "rasa", "nola"):
        for value in ILL[key]:
            (mine / "adapter_config.json").write_text(json.dumps({**good, "method": method, key: value}))
            assert outcome(lambda: merge(mine, tmp_path / "out")), (method, value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000, "kilobytes"


ILL_PEFT: list[dict[str, Any]] = [
    *({"r": value} for value in (10**12, 10**6, -1, 0, "two", None, [8])),
    *({"lora_alpha": value} for value in (float("nan"), float("inf"), "x", None)),
    *({"target_modules": value} for value in (5, {"a": 1})),
    *({"rank_pattern": value} for value in (5, {"q_proj": 10**12}, {"q_proj": "x"}, {"q_proj": 10**6}, {"(": 2})),
    *({"base_model_name_or_path": 7}, {"revision": []}, {"peft_type": 3}, {"modules_to_save": 7}),
    {"use_dora": True, "r": 10**6},
    {"peft_type": "LOHA", "r": 10**12},
    {"peft_type": "LOHA", "r": 10**6},
]


@pytest.mark.parametrize("fields", ILL_PEFT, ids=str)
def test_an_adapter_of_peft_whose_fields_are_of_the_wrong_type(
    base: Path, tmp_path: Path, fields: dict[str, Any]
) -> None:
    names = [
        f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_{side}.weight" for i in range(6) for side in "AB"
    ]
    save_file({n: torch.zeros(2, 128) if "_A" in n else torch.zeros(128, 2) for n in names}, tmp_path / "x")
    (tmp_path / "x").rename(tmp_path / "adapter_model.safetensors")
    good = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    config = {**good, "base_model_name_or_path": str(base)}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    read_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **fields}))
    assert outcome(lambda: merge(tmp_path, tmp_path.with_suffix(".out")))
