"""Measure data preparation: the time to tokenise a set of MetaMathQA's size, and to start training a second time."""

from __future__ import annotations

import json
import random
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from ..data.config import DataConfig
from ..data.prepare import prepare
from ..errors import UserError, say
from ..io.scratch import scratch_directory
from ..models.config import ModelConfig
from ..models.load import load_tokenizer

ROWS = 395_000
"""Number of rows in MetaMathQA."""
QUERY, RESPONSE = 175, 315
"""Mean number of characters of the fields. With the alpaca template an example has about 250 tokens, as in MetaMathQA.
Invented words take more tokens than English words, so the fields are shorter than MetaMathQA's."""
SPREAD = 0.45
"""Standard deviation of the logarithm of the lengths."""


def measure(tokenizer: str, rows: int = ROWS) -> dict[str, float]:
    """Write ``rows`` rows of text, tokenise and cache them, then start a training run that uses the cache.

    Args:
        tokenizer: hub id or directory of a tokenizer.
    Returns:
        The object that ``rasa-bench --data --json`` prints. ``seconds`` is wall time, ``rows_per_second_and_core`` is
        computed from CPU time.
    Raises:
        UserError: there is no such tokenizer.
    """
    loaded = load_tokenizer(ModelConfig(name="demo", tokenizer=tokenizer))
    if loaded is None:
        raise UserError(f"--tokenizer: {tokenizer} has no tokenizer", key="--tokenizer")
    with scratch_directory("bench") as directory:
        source, cache = directory / "rows.jsonl", directory / "cache"
        _say(f"writing {rows:,} rows")
        write_rows(source, rows)
        _say("tokenising them")
        started, cpu = time.perf_counter(), _cpu_seconds()
        data = prepare(DataConfig(dataset=str(source), cache_dir=str(cache)), loaded)
        seconds, cpu = time.perf_counter() - started, _cpu_seconds() - cpu
        stats, peak, worker_peak = data.stats, _peak(resource.RUSAGE_SELF), _peak(resource.RUSAGE_CHILDREN)
        _say("starting a run on them")
        first_step = _seconds_to_first_step(directory, source, cache, tokenizer, len(loaded))
        return {
            "rows": rows,
            "bytes": source.stat().st_size,
            "tokens": stats.tokens,
            "mean_length": stats.tokens / stats.examples,
            "supervised_share": stats.supervised_tokens / stats.tokens,
            "seconds": seconds,
            "cpu_seconds": cpu,
            "rows_per_second_and_core": rows / cpu,
            "cache_bytes": sum(f.stat().st_size for f in cache.rglob("*") if f.is_file()),
            "peak_memory_bytes": peak,
            "peak_worker_memory_bytes": worker_peak,
            "second_start_seconds_to_first_step": first_step,
        }


def write_rows(path: Path, rows: int) -> None:
    """Write rows with ``query`` and ``response`` of generated prose with numbers and sums, as long in tokens as
    MetaMathQA's. The rows are the same each time."""
    rng = random.Random(0)
    sentences = list(_sentences(rng, 5_000))
    with path.open("w") as file:
        for _ in range(rows):
            row = {"query": _text(rng, sentences, QUERY), "response": _text(rng, sentences, RESPONSE)}
            file.write(json.dumps(row) + "\n")


def _sentences(rng: random.Random, count: int) -> Iterator[str]:
    """Yield sentences in which few words are common and most are rare, as in any language, because the speed of a
    tokenizer's cache depends on the frequencies."""
    syllables = [c + v + e for c in "bcdfglmnprst" for v in "aeiou" for e in ("", "n", "r", "s", "t")]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 3))) for _ in range(10_000)]
    weights = [1 / (rank + 3) for rank in range(len(words))]
    for _ in range(count):
        parts = rng.choices(words, weights, k=rng.randint(6, 16))
        a, b = rng.randint(2, 999), rng.randint(2, 99)
        parts.insert(rng.randrange(len(parts)), str(a))
        if rng.random() < 0.4:
            parts.append(f"${a} + {b} = {a + b}$")
        yield " ".join(parts).capitalize() + ". "


def _text(rng: random.Random, sentences: list[str], mean: int) -> str:
    length = int(mean * rng.lognormvariate(-(SPREAD**2) / 2, SPREAD))
    text = rng.choice(sentences)
    while len(text) < length:
        text += rng.choice(sentences)
    return text[:length]


def _seconds_to_first_step(directory: Path, source: Path, cache: Path, tokenizer: str, vocabulary: int) -> float:
    """Return the seconds from starting ``rasa-train`` to the log line of its first step, with a model so small that its
    own time does not count."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(directory / "model")
    recipe = {
        "model": {"name": str(directory / "model"), "tokenizer": tokenizer, "dtype": "float32"},
        "adapter": {"method": "rasa"},
        "data": {"dataset": str(source), "cache_dir": str(cache)},
        "training": {"max_steps": 1, "batch_size": 4},
        "output_dir": str(directory / "run"),
    }
    (directory / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    started = time.time()
    command = [sys.executable, "-m", "rasa_train.cli.train", str(directory / "recipe.yaml"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the run failed:\n{done.stderr}")
    return (directory / "run" / "metrics.jsonl").stat().st_mtime - started


def _cpu_seconds() -> float:
    """Return the CPU seconds of this process and of the child processes that it has waited for."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _peak(who: int) -> int:
    """Return the peak memory in bytes."""
    return resource.getrusage(who).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _say(what: str) -> None:
    say(what, sys.stderr)
