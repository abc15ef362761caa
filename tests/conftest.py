"""Tests run offline, on small models that they make themselves, with caches of their own."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
if os.environ.get("RASA_TEST_GPU") != "1":
    # What the tests expect to the bit is the CPU's; with a GPU in sight, runs would train on it. Those that are marked
    # ``gpu`` are run by themselves: `make test-gpu`.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import importlib
import json
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job, and all it starts, ignores Ctrl-C
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and under nohup SIGHUP

GOLDEN = Path(__file__).parent / "golden"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Tests of several workers are the longest, and share one group of processes. First, they keep one of pytest's
    # processes busy while the other does the rest; last, the other would be idle for minutes.
    items.sort(key=lambda item: "distributed" not in item.nodeid)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU: make test-gpu"))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    # On a GPU that is lent for minutes the tests may be killed before pytest reports at the end.
    if os.environ.get("RASA_TEST_GPU") == "1" and report.failed:
        print(f"\n{report.nodeid}\n{report.longreprtext}", flush=True)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RASA_TRAIN_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def golden() -> Path:
    """Directory of the reference implementation's trajectories (see its README)."""
    return GOLDEN


Cli = Callable[..., "subprocess.CompletedProcess[str]"]


def run_command(name: str, *args: object, check: bool = False) -> subprocess.CompletedProcess[str]:
    """Run a command of the package in this process: the same code as in a process of its own, without the seconds of
    imports. What is no error of the user's is raised."""
    from accelerate.state import AcceleratorState
    from typer.testing import CliRunner

    AcceleratorState._reset_state(reset_partial_state=True)
    app = importlib.import_module(f"rasa_train.cli.{name}").app
    result = CliRunner().invoke(app, list(map(str, args)))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    if check:
        assert result.exit_code == 0, result.stderr
    return subprocess.CompletedProcess(args, result.exit_code, result.stdout, result.stderr)


RECIPE = """\
model: {{name: {model}, dtype: float32}}
adapter: {{method: rasa, r: 4, k: 1, alpha: 8, dropout: 0.1}}
data: {{dataset: {data}, validation: {{size: 4}}}}
training:
  epochs: 4
  batch_size: 8
  micro_batch_size: 3
  optimizer: {{lr: 2e-2}}
  checkpoint_every: 3
output_dir: run
"""


@pytest.fixture
def recipe(tmp_path: Path, tiny_llama: Path, token_rows: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(model=tiny_llama, data=token_rows))
    return path


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Run a command in ``tmp_path``: ``cli("train", "recipe.yaml", ...)``."""
    monkeypatch.chdir(tmp_path)
    return run_command


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama (3 layers, GQA, fp32) without a tokenizer: pre-tokenised rows need none."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
    )
    path = tmp_path_factory.mktemp("tiny_llama")
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def token_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 pre-tokenised rows of 4 to 23 tokens with a learnable pattern; the first third is not supervised."""
    rows = []
    for i in range(40):
        ids = [1, *[3 + (i + 2 * j) % 60 for j in range(2 + i % 20)], 2]
        prompt = max(1, len(ids) // 3)
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
