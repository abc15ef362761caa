"""``rasa-bench`` as it is called, and the parts that it is made of."""

from __future__ import annotations

import json
import sys
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaModel

from rasa_train.bench import data, peers, run
from rasa_train.bench.engines import Choice, Contender, Engine, engines
from rasa_train.bench.report import table
from rasa_train.bench.room import most_tokens, saved_bytes_per_token
from rasa_train.bench.shapes import random_model, shared_copy
from rasa_train.bench.timing import interleaved, peak_in_own_process
from rasa_train.bench.workloads import WORKLOADS, Problem, examples, lengths
from tests.conftest import Cli

ROW = {"engine", "method", "seconds_per_step", "over_base", "tokens_per_second", "peak_memory_bytes"}


def test_json_of_a_comparison(cli: Cli, tiny_llama: Path) -> None:
    arguments = ("--shape", tiny_llama, "--device", "cpu", "--tokens", 64, "--engines", "paper,ours", "--rounds", 1)
    done = cli("bench", *arguments, "--workload", "padded", "--own-stacks", "--profile", "--json", check=True)
    result = json.loads(done.stdout)
    labels = [(row["engine"], row["method"]) for row in result["rows"]]
    methods = ["lora", "rasa", "vera", "mora"]
    assert labels == [("base", None), ("paper", "rasa"), *(("ours", method) for method in methods)]
    assert all(row.keys() >= ROW and row["seconds_per_step"] > 0 for row in result["rows"])
    assert result["rows"][0]["over_base"] == 1.0 and result["failed"] == [] and result["versions"]["torch"]
    for row in result["rows"]:
        profile = row["seconds_by_operation"]
        assert profile["aten::mm"] > 0 and list(profile.values()) == sorted(profile.values(), reverse=True)
    if sys.platform == "linux":
        assert all(row["peak_memory_bytes"] > 0 for row in result["rows"])


def test_the_table_names_the_longest_operations_and_what_has_no_timing() -> None:
    took = {f"aten::op{i}": (9 - i) / 1e3 for i in range(9)} | {"short": 1e-3}
    lora, rasa = ("ours", "lora"), ("ours", "rasa")
    result = run.Comparison(
        shape="s",
        workload="w",
        sizes=[4, 5],
        protocol=run.Protocol(torch.float32, 0.0, own_stacks=False, choice=Choice(), warmup=1, rounds=2),
        device="c",
        verdicts={lora: run.gate.Verdict(1.0, 0.5, 0.25), rasa: run.gate.Verdict(0.0, 0.0, 1.0)},
        timings={rasa: run.Timing(0.05, (0.04, 0.06), 1.0, 180.0, None)},
        profiles={rasa: took},
        skipped={("peft", "lora"): "peft is not installed"},
        misfits={("paper", "rasa"): "out of memory"},
    )
    text = table(result)
    assert text.startswith("s, w: 2 sequences, 9 tokens, float32, dropout 0.0; c; median of 2 rounds\n")
    assert "\nours        rasa         50.0       40.0-60.0      1.000        180         ?\n" in text
    assert text.endswith(
        "NOT TIMED: ours lora is wrong: its loss is off by 1.0e+00, its gradients by 5.0e-01 (cosine 0.2500)\n"
        "does not fit: paper rasa: out of memory\nnot run: peft lora: peft is not installed"
    )
    assert "ours rasa, ms by operation:\n  op0 9, op1 8, op2 7, op3 6, op4 5, op5 4, op6 3, op7 2, others 2\n" in text


def test_json_of_the_counters(cli: Cli, tiny_llama: Path) -> None:
    done = cli("bench", "--counters", "--shape", tiny_llama / "config.json", "--engines", "per-linear", "--json")
    rows = json.loads(done.stdout)["rows"]
    assert [row["engine"] for row in rows] == ["base", "per-linear"]
    assert rows[0]["bytes_per_token_and_layer"] == 0 < rows[1]["bytes_per_token_and_layer"]
    assert 0 < rows[0]["saved_bytes_per_token_and_layer"] < rows[1]["saved_bytes_per_token_and_layer"]
    assert 0 < rows[0]["base_bytes_per_token_and_layer"] == rows[1]["base_bytes_per_token_and_layer"]
    assert 0 < rows[0]["dispatched_ops"] < rows[1]["dispatched_ops"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--shape", "llama-9000"), "linears-1024, llama-3.1-8b"),
        (("--engines", "ours,theirs"), "there is no theirs"),
        (("--methods", "nonsense"), "there is no nonsense; the names are lora, mora, rasa, vera"),
        (("--engines", "paper", "--methods", "lora"), "none of these engines computes one of these methods"),
        (("--tokens", "10"), "Invalid value for '--tokens'"),  # the words after it are typer's, and differ by version
        (("--counters", "--shape", "linears-1024"), "--shape llama-3.1-8b"),
        (("--data",), "--data needs --tokenizer"),
    ],
)
def test_what_is_wrong_is_said(arguments: tuple[str, ...], says: str, cli: Cli) -> None:
    done = cli("bench", *arguments)
    assert done.returncode == 2 and says in done.stderr and not done.stdout
    assert done.stderr.count("\n") == 1, "one line"


def test_no_gpu_is_said(cli: Cli) -> None:
    done = cli("bench", "--device", "cuda")
    assert done.returncode == 2 and "no GPU" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("when", ["building it", "in a step"])
def test_an_engine_that_runs_out_of_memory_is_named(
    when: str, cli: Cli, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The paper's RaSA has no room, when it is built or in a timed step: the others are timed all the same."""

    monkeypatch.setattr(run, "peak_in_own_process", lambda work: None)  # slow, and it would count the calls too
    if when == "building it":
        ready = run._ready

        def no_room_to_build(problem: Problem, engine: Engine, own_stack: bool) -> Contender:
            if engine.name == "paper":
                raise torch.OutOfMemoryError("CUDA out of memory")
            return ready(problem, engine, own_stack)

        monkeypatch.setattr(run, "_ready", no_room_to_build)
    else:
        forward, calls = peers.PaperRaSA.forward, count(1)
        of_gate, of_a_step = 2 * 7, 3 * 7

        def no_room_in_the_third_step(self: peers.PaperRaSA, x: torch.Tensor) -> torch.Tensor:
            if next(calls) > of_gate + 2 * of_a_step:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return forward(self, x)

        monkeypatch.setattr(peers.PaperRaSA, "forward", no_room_in_the_third_step)
    arguments = ("--shape", tiny_llama, "--tokens", 64, "--engines", "paper,ours", "--methods", "rasa", "--rounds", 2)
    result = json.loads(cli("bench", *arguments, "--json", check=True).stdout)
    assert [(row["engine"], row["method"]) for row in result["rows"]] == [("base", None), ("ours", "rasa")]
    assert result["does_not_fit"] == [
        {"engine": "paper", "method": "rasa", "why": f"out of memory {when} with 64 tokens"}
    ]


@pytest.mark.parametrize("when", ["building it", "in a step"])
def test_a_base_that_does_not_fit_is_said(
    when: str, cli: Cli, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(run.gate, "check", lambda *_, **__: run.gate.Verdict(0.0, 0.0, 1.0))
    if when == "building it":
        monkeypatch.setattr(run, "_ready", no_room)
    else:
        monkeypatch.setattr(LlamaModel, "forward", no_room)
    monkeypatch.setattr(run, "peak_in_own_process", lambda work: None)
    done = cli("bench", "--shape", tiny_llama, "--tokens", 256, "--engines", "base")
    assert done.returncode == 2 and done.stderr.endswith("does not fit in memory with 256 tokens; try --tokens 128\n")


def test_as_many_tokens_as_fit() -> None:
    """What a forward pass keeps grows with the tokens, and the engine that keeps most decides."""
    config = LlamaConfig(vocab_size=512, hidden_size=64, intermediate_size=112, num_hidden_layers=2)
    base = random_model(config, torch.float32, torch.device("cpu"))
    every = Choice.read("paper,ours", "rasa").of(engines(64, 0.05))
    own = {engine.name: saved_bytes_per_token(base, engine, own_stacks=False) for engine in every}
    assert own["base"] < own["ours"] < own["paper"], own
    at_once = 2048 * 512 * 10
    assert most_tokens(base, every, False, room=at_once + int(3000 * own["paper"])) == 2560
    assert most_tokens(base, every[:1], False, room=at_once + int(3000.1 * own["base"])) == 2560
    assert most_tokens(base, every, False, room=0) == 512 and most_tokens(base, every, False, room=10**12) == 16_384
    recomputed = saved_bytes_per_token(base, every[1], own_stacks=True)
    assert every[1].name == "paper" and recomputed < own["paper"] / 2


def test_lengths_are_fixed_and_add_up() -> None:
    packed = lengths("packed", 16_384)
    assert packed == lengths("packed", 16_384) and sum(packed) == 16_384
    assert np.mean(packed) == pytest.approx(250, rel=0.1)
    assert lengths("long", 16_384) == [4096] * 4
    assert len(lengths("padded", 64)) == 3
    made = examples(packed, 1000)
    share = np.mean(np.concatenate([example.labels for example in made]) != -100)
    assert share == pytest.approx(0.7, abs=0.01)


def test_automodels_benchmark() -> None:
    """Two sequences, all of whose tokens are supervised except the first, which nothing predicts; rank 16."""
    workload = WORKLOADS["2x4096"]
    assert lengths("2x4096", workload.most_tokens) == [4096, 4096]
    base = random_model(
        LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4),
        torch.float32,
        torch.device("cpu"),
    )
    problem = run._problem(base, "2x4096", [6, 6], torch.float32, torch.device("cpu"))
    made = examples([6, 6], 64, workload.supervised)
    assert all((example.labels == example.input_ids).all() for example in made)
    ids = torch.from_numpy(np.stack([example.input_ids for example in made])).long()
    expected = base(ids, labels=ids).loss
    assert float(problem.loss(shared_copy(base))()) == pytest.approx(float(expected), rel=1e-5)
    ranks = {e.method.r for e in engines(64, workload.dropout, workload.rank) if e.method and e.method.method == "lora"}
    assert ranks == {16} and workload.dropout == 0.1


def test_engines_take_turns() -> None:
    order: list[str] = []

    class Noted:
        def __init__(self, name: str) -> None:
            self.step = partial(order.append, name)
            self.settle = partial(order.append, name.upper())

    contenders = {name: Noted(name) for name in "ab"}
    times = interleaved(contenders, warmup=1, rounds=2, device=torch.device("cpu"), dropped=order.append)
    assert "".join(order) == "aAbB" * 3 and {name: len(t) for name, t in times.items()} == {"a": 2, "b": 2}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_a_process_of_its_own() -> None:
    mib = 2**20
    grown = peak_in_own_process(lambda: b"x" * (64 * mib))
    assert grown is not None and 63 * mib <= grown < 80 * mib  # the kernel's own count is off by some pages
    assert peak_in_own_process(lambda: sys.exit(1)) is None


def test_rows_are_of_metamathqas_length(tmp_path: Path) -> None:
    data.write_rows(tmp_path / "a.jsonl", 500)
    data.write_rows(tmp_path / "b.jsonl", 500)
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert np.mean([len(row["query"]) for row in rows]) == pytest.approx(data.QUERY, rel=0.1)
    assert np.mean([len(row["response"]) for row in rows]) == pytest.approx(data.RESPONSE, rel=0.1)


@pytest.mark.slow
def test_the_data_side(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = Path(__file__).resolve().parents[2]
    monkeypatch.setenv("PYTHONPATH", str(repository))
    done = cli("bench", "--data", "--tokenizer", repository / "rasa_train/demo/model", "--rows", 300, "--json")
    result = json.loads(done.stdout)
    assert result["rows"] == 300 and result["rows_per_second_and_core"] > 0
    assert result["second_start_seconds_to_first_step"] > 0 and result["cache_bytes"] > 4 * result["tokens"]
