"""Two workers compute what one process computes, whichever way they share the model."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rasa_train.adapters.saved import read_adapter
from rasa_train.training.checkpoint import damage

from .conftest import Case, Group, difference, metrics

STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp")
# alpha / r at most 2: with the default alpha of 32 and this learning rate LoRA and OLoRA make 1e-5 of a rounding, so
# that one process differs from itself by more than the bound if only its micro-batch size, or a layout, is another.
METHODS: dict[str, dict[str, Any]] = {
    "rasa": {"r": 4, "k": 1, "alpha": 8, "dropout": 0.1},
    "lora": {"r": 4, "alpha": 8, "dropout": 0.1},
    "vera": {"r": 16},
    "mora": {"r": 4},
}
OTHERS: dict[str, dict[str, Any]] = {
    "tied-lora": {},
    "sharelora": {},
    "nola": {},
    "vb-lora": {"vector_length": 16},
    "olora": {"r": 4, "alpha": 4},
    "pissa": {"r": 4},
    "dora": {"r": 4},
    "full": {},
    "bitfit": {},
    "bottleneck": {"kind": "lin", "size": 4},
}
TOLERANCE = {"loss": 2e-6, "grad_norm": 1e-4, "parameter": 2e-5}

# (method, strategy, checkpointing, micro-batches of a worker's step, optimizer, further keys of distributed):
# every strategy, method, optimizer, offload and way of accumulating, and every strategy with both optimizers.
COVERING: list[tuple[str, str, bool, int, str, dict[str, Any]]] = [
    ("rasa", "ddp", True, 4, "lionw", {}),
    ("lora", "ddp", False, 1, "adamw", {}),
    ("rasa", "zero1", False, 4, "adamw", {"offload": "optimizer"}),
    ("mora", "zero1", True, 1, "lionw", {}),
    ("vera", "zero2", True, 4, "adamw", {}),
    ("rasa", "zero2", False, 1, "lionw", {"offload": "optimizer"}),
    ("rasa", "zero3", True, 4, "adamw", {}),
    ("vera", "zero3", False, 1, "lionw", {"offload": "all"}),
    ("rasa", "fsdp", True, 4, "adamw", {}),
    ("mora", "fsdp", False, 1, "lionw", {}),
]
FULL = [
    (*parts, optimizer, {})
    for parts in itertools.product(METHODS, STRATEGIES, (False, True), (1, 4))
    for optimizer in ("adamw",)
]


def case(
    base: Case, method: str, strategy: str, checkpointing: bool, accumulation: int, optimizer: str, **more: Any
) -> Case:
    rate = {"lionw": 2e-2, "adamw": 1e-2}[optimizer] / (20 if method == "full" else 1)
    return {
        **base,
        "adapter": {"method": method, **(METHODS | OTHERS)[method]},
        "training": {
            "max_steps": 20,
            "batch_size": 8,
            "micro_batch_size": 4 // accumulation,
            "optimizer": {"name": optimizer, "lr": rate},
            "activation_checkpointing": checkpointing,
            "checkpoint_every": 100,
        },
        # Nothing stays resident under ZeRO-3: with its default, tensors of this size would hide a missing gather.
        "distributed": {"strategy": strategy, "resident_size": 0, "timeout_seconds": 300, **more},
    }


@pytest.fixture(scope="module")
def base(tiny_llama: Path, token_rows: Path) -> Case:
    # 40 rows: every fifth batch has 4 sequences less, so a worker has empty micro-batches to stand in for.
    return {
        "model": {"name": str(tiny_llama), "dtype": "float32"},
        "data": {"dataset": str(token_rows), "validation": {"size": 4}},
    }


def compare(cases: list[Case], group: Group, path: Path) -> dict[str, dict[str, float]]:
    """Train each case on two workers, and what it computes on one; the differences by the case's name, in order."""
    ones: dict[str, Case] = {}
    for i, many in enumerate(cases):
        key = json.dumps([many["model"], many["adapter"], many["training"]], sort_keys=True)
        alone = {**many, "distributed": {}, "output_dir": str(path / f"one-{len(ones)}")}
        many["one"] = ones.setdefault(key, alone)["output_dir"]
        many["output_dir"] = str(path / f"two-{i}")
    known = {many["output_dir"]: many.pop("one") for many in cases}
    group(list(ones.values()), 1)
    group(cases, 2)
    found = {}
    for i, many in enumerate(cases):
        name = f"{i} {many['adapter']['method']} {many['training']} {many['distributed']}"
        found[name] = difference(known[many["output_dir"]], many["output_dir"])
        one, two = (read_adapter(Path(run) / "adapter") for run in (known[many["output_dir"]], many["output_dir"]))
        assert one.base_tensors and two.base_tensors == one.base_tensors, f"{name}: the base's fingerprint"
    return found


def assert_equal(differences: dict[str, dict[str, float]]) -> None:
    for name, found in differences.items():
        print(name, *(f"{what} {value:.1e}" for what, value in found.items()), sep="  ")
    wrong = {name: d for name, d in differences.items() if any(d[what] > limit for what, limit in TOLERANCE.items())}
    assert not wrong, wrong


@pytest.fixture(scope="module")
def tiny_mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 experts, 2 for each token: workers have other numbers of tokens for an expert, some none."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
    )
    path = tmp_path_factory.mktemp("tiny_mixtral")
    MixtralForCausalLM(config).save_pretrained(path)
    return path


def experts(base: Case, model: Path, *parts: Any) -> Case:
    """A case on experts; no dropout there, and the parts of ``case``."""
    found = case({**base, "model": {"name": str(model), "dtype": "float32"}}, *parts)
    found["adapter"] = {**found["adapter"], "dropout": 0.0}
    return found


def test_covering(base: Case, tiny_mixtral: Path, group: Group, tmp_path: Path) -> None:
    cases = [case(base, *parts, **more) for *parts, more in COVERING]  # type: ignore[misc]
    seen = {(m, s) for m, s, *_ in COVERING}
    assert {m for m, _ in seen} == METHODS.keys() and {s for _, s in seen} == set(STRATEGIES)
    # Adapters stay fp32 over a bf16 base; zero3 reads the base divided, in bf16.
    halves = [case(base, "rasa", strategy, False, 1, "adamw") for strategy in ("zero2", "zero3", "fsdp")]
    for many in halves:
        many["model"] = {**base["model"], "dtype": "bfloat16"}
    # Tokens choose other experts on each worker, in the recomputation of activation checkpointing too.
    mixed = [experts(base, tiny_mixtral, "rasa", strategy, True, 4, "adamw") for strategy in ("zero3", "fsdp")]
    cases += mixed
    for many in [*cases, *halves]:
        many["training"]["max_steps"] = 10  # twice the epoch, with its smaller batch; the full matrix has 20
    differences = compare([*cases, *halves], group, tmp_path)
    in_half = list(differences.values())[len(cases) :]
    assert len(differences) == len(COVERING) + 2 + 3
    assert_equal(dict(list(differences.items())[: len(cases)]))
    rows = metrics(cases[0]["output_dir"])
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.1, "the runs that are compared learn something"
    # Another order of summation is another rounding of the next step's bf16 products (DeepSpeed's linear has its own).
    assert all(found["loss"] < 5e-3 for found in in_half), in_half
    first = [metrics(many["output_dir"])[0]["loss"] for many in halves]
    assert max(first) - min(first) < 1e-6, first


@pytest.mark.parametrize(
    ("tokens", "cases"),
    [
        pytest.param(40, [("rasa", "ddp", False, 2, "adamw"), ("rasa", "zero3", True, 2, "adamw")], id="tokens"),
        pytest.param(
            None,
            [("lora", "fsdp", True, 2, "adamw"), ("full", "zero3", False, 1, "adamw")],
            id="sequences",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_packed(tokens: int | None, cases: list[Any], base: Case, group: Group, tmp_path: Path) -> None:
    """One row without padding, by a budget of tokens and by a number of sequences, with a trained head as well."""
    many = [case(base, *parts) for parts in cases]
    for one in many:
        one["training"] |= {"batching": "packed", "max_steps": 8}
        if tokens:
            del one["training"]["micro_batch_size"]
            one["training"]["micro_batch_tokens"] = tokens
    assert_equal(compare(many, group, tmp_path))


@pytest.mark.slow
def test_full_fine_tuning_across_strategies(base: Case, group: Group, tmp_path: Path) -> None:
    """One process, ZeRO-3, FSDP, ZeRO-1 on two: each goes on from the parts in which those before wrote all weights."""

    def until(step: int, strategy: str, directory: str) -> Case:
        found = case(base, "full", strategy, False, 2, "adamw")
        found["training"] |= {"max_steps": step, "schedule": {"name": "constant", "warmup_steps": 0}}
        return {**found, "output_dir": str(tmp_path / directory)}

    group([until(20, "ddp", "whole"), until(5, "ddp", "run")], 1)
    group([until(10, "zero3", "run"), until(15, "fsdp", "run"), until(20, "zero1", "run")], 2)
    found = difference(tmp_path / "whole", tmp_path / "run")
    assert all(found[what] < limit for what, limit in TOLERANCE.items()), found
    checkpoints = tmp_path / "run" / "checkpoints"
    parts = [f"{name}-0000{i}-of-00002.safetensors" for name in ("adapter", "optimizer") for i in (1, 2)]
    for step in (5, 10, 15, 20):
        files = {path.name for path in (checkpoints / f"step-{step:08d}").iterdir()}
        written = parts if step > 5 else ["adapter.safetensors", "optimizer.safetensors"]
        assert files == {*written, "adapter_config.json", "trainer.json", "checksums.json"}
    last = checkpoints / "step-00000020"
    assert damage(last) is None
    one, two = (load_file(last / name) for name in parts[:2])
    whole = load_file(tmp_path / "run" / "adapter" / "adapter.safetensors")
    assert one.keys().isdisjoint(two) and one.keys() | two.keys() == whole.keys()
    assert all(torch.equal(tensor, (one | two)[name]) for name, tensor in whole.items())
    sizes = [sum(t.nbytes for t in tensors.values()) for tensors in (one, two)]
    assert max(sizes) - min(sizes) <= max(t.nbytes for t in whole.values())
    assert read_adapter(last).tensors.keys() == whole.keys()
    with (last / parts[3]).open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"?")
    assert damage(last) == f"{parts[3]} does not match its checksum"


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_full_matrix(method: str, base: Case, group: Group, tmp_path: Path) -> None:
    cases = [case(base, *parts, **more) for *parts, more in FULL if parts[0] == method]  # type: ignore[misc]
    assert_equal(compare(cases, group, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_experts(strategy: str, base: Case, tiny_mixtral: Path, group: Group, tmp_path: Path) -> None:
    shapes = itertools.product(("rasa", "lora"), (False, True), (1, 4))
    assert_equal(
        compare(
            [experts(base, tiny_mixtral, m, strategy, checkpointing, a, "adamw") for m, checkpointing, a in shapes],
            group,
            tmp_path,
        )
    )


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero2", "zero3", "fsdp"])
def test_other_methods(strategy: str, base: Case, group: Group, tmp_path: Path) -> None:
    """Those that train base weights (full, bitfit) or start from them (pissa, olora, dora) included."""
    assert_equal(compare([case(base, m, strategy, False, 2, "adamw") for m in OTHERS], group, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero3", "fsdp"])
def test_parts_of_fused_linears(strategy: str, base: Case, group: Group, tmp_path: Path) -> None:
    """Queries and values inside GPT-2's c_attn, with pools of their own."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
    config.update({"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0})
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    many = case(
        {**base, "model": {"name": str(tmp_path / "base"), "dtype": "float32"}}, "rasa", strategy, True, 2, "adamw"
    )
    many["adapter"] |= {"targets": ["c_attn.q", "c_attn.v"], "dropout": 0.0}
    many["training"]["max_steps"] = 8
    assert_equal(compare([many], group, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["houlsby", "pfeiffer"])
def test_other_bottlenecks(kind: str, base: Case, group: Group, tmp_path: Path) -> None:
    """Beside ``lin`` among the other methods."""
    cases = [
        case(base, "bottleneck", strategy, strategy == "fsdp", 2, "adamw") for strategy in ("ddp", "zero3", "fsdp")
    ]
    for many in cases:
        many["adapter"]["kind"] = kind
        many["training"]["max_steps"] = 8
    assert_equal(compare(cases, group, tmp_path))
