"""Compare all methods on the demo task, at the parameter budget of LoRA r = 8 where a method can reach it.

    python scripts/shootout.py --output runs/shootout            # everything: about two hours on one core
    python scripts/shootout.py --output runs/shootout --methods lora rasa --seeds 1 2 3

For each method, runs with seed 0 try learning rates a factor of 2 apart, judged on problems that are used for nothing
else, until the best learning rate has a worse one on each side. The best learning rate is then run with every seed and
judged on the demo's held-out problems. Each result is one line of ``results.jsonl``, and runs that have a line are not
repeated. Times are those of one CPU thread, so that other load on the machine counts little. The table is printed in
Markdown.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rasa_train.data.demo_problems import held_out, make_problems, training_problems
from rasa_train.demo.__main__ import exact_match
from rasa_train.launch.launch import launch
from rasa_train.merging.merged import merge
from rasa_train.merging.options import Writing
from rasa_train.recipe.load import load_recipe

FRACTION = 0.5
"""Share of the demo's 3,000 problems to train on; with all of them the better methods are too close to each other."""
FACTOR = 2.0
"""Ratio between neighbouring learning rates."""
METHODS: dict[str, tuple[dict[str, Any], float]] = {
    # method: (hyper-parameters, the first peak learning rate to try)
    "lora": ({"r": 8, "alpha": 16}, 3e-3),
    "rasa": ({"r": 8, "k": 1, "alpha": 16}, 3e-3),
    "vera": ({"r": 256}, 4e-2),  # its cost grows with r: the budget would need r = 2400
    "mora": ({"r": 8}, 3e-3),
    "olora": ({"r": 8, "alpha": 16}, 1.5e-3),
    "pissa": ({"r": 8, "alpha": 16}, 1.5e-3),
    "dora": ({"r": 7, "alpha": 16}, 3e-3),
    "adalora": ({"r": 6, "init_r": 8, "alpha": 16}, 6e-3),
    "prilora": ({"r": 8, "alpha": 16}, 3e-3),
    "tied-lora": ({"r": 44}, 3e-3),
    "sharelora": ({"r": 13, "alpha": 26}, 3e-3),
    "nola": ({"r": 8, "n_basis": 256, "alpha": 16}, 1e-2),  # its cost grows with the bases: the budget is 1335
    "vb-lora": ({"r": 4, "vector_length": 16, "num_vectors": 32}, 1e-2),
    "bitfit": ({}, 1e-2),
    "full": ({}, 5e-4),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare all methods on the demo task.")
    parser.add_argument("--output", type=Path, default=Path("runs/shootout"), help="directory for results and runs")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="methods to compare")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], help="seeds of the final runs")
    parser.add_argument("--most", type=int, default=5, help="largest number of learning rates tried for a method")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.output.mkdir(parents=True, exist_ok=True)
    results = options.output / "results.jsonl"
    # The demo's problems come from seed 1, and its own learning rates were chosen on seed 0; here seed 2 is used.
    trained = {p["query"] for p in load_problems()}
    tuning = [p for p in make_problems(400, seed=2) if p["query"] not in trained][:200]
    for method in options.methods:
        best = tuned(partial(result, results, options.output, method, seed=0, problems=tuning), method, options.most)
        for seed in options.seeds:
            result(results, options.output, method, best, seed=seed, problems=held_out(200))
    print(table(read(results), options.methods, options.seeds))


def tuned(run: Callable[[float], dict[str, Any]], method: str, most: int) -> float:
    """Return the best learning rate by exact match, then by loss: one with a worse neighbour on each side, or the best
    of ``most`` learning rates if no such one is found among them."""

    def solved(row: dict[str, Any]) -> float:
        """Return the exact match, but 0 up to 5%, which is luck, so that the loss decides."""
        share: float = row["exact_match"]
        return share if share > 0.05 else 0.0

    start = METHODS[method][1]
    rows = {lr: run(lr) for lr in (start, start * FACTOR)}
    while True:
        best = max(rows, key=lambda lr: (solved(rows[lr]), -rows[lr]["loss"]))
        beside = best * FACTOR if best == max(rows) else best / FACTOR
        if min(rows) < best < max(rows) or len(rows) >= most:
            return best
        rows[beside] = run(beside)


def load_problems() -> list[dict[str, str]]:
    return [*training_problems(), *held_out()]


def result(
    results: Path, output: Path, method: str, lr: float, *, seed: int, problems: list[dict[str, str]]
) -> dict[str, Any]:
    """Return the line of one run, from the file or by running it."""
    for row in read(results):
        if (row["method"], row["lr"], row["seed"]) == (method, lr, seed):
            return row
    run = output / "run"
    fields = [f"adapter.{key}={value}" for key, value in METHODS[method][0].items()]
    changes = [f"training.optimizer.lr={lr}", f"seed={seed}", f"data.fraction={FRACTION}", f"output_dir={run}"]
    recipe = load_recipe("demo", [f"adapter.method={method}", *fields, *changes, "training.log_every=1000"]).recipe
    began = time.process_time()
    summary = launch(recipe, fresh=True).summary
    seconds = time.process_time() - began
    assert summary is not None
    merge(run, run / "merged", writing=Writing(overwrite=True))
    row = {
        "method": method,
        "lr": lr,
        "seed": seed,
        "exact_match": exact_match(run / "merged", problems, batch_size=200),
        "cpu_seconds": seconds,
        **{key: summary[key] for key in ("trainable_parameters", "loss", "effective_rank")},
    }
    with results.open("a") as file:
        file.write(json.dumps(row) + "\n")
    shutil.rmtree(run)
    print(f"{method} lr {lr:g} seed {seed}: exact match {row['exact_match']:.1%}, {seconds:.0f} CPU s", flush=True)
    return row


def read(results: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def table(rows: list[dict[str, Any]], methods: list[str], seeds: list[int]) -> str:
    lines = [
        "| method | hyper-parameters | trained | rank | lr (of tried) | loss | exact match (range) | CPU seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for method in methods:
        own = [row for row in rows if row["method"] == method and row["seed"] in seeds]
        tried = sorted(row["lr"] for row in rows if row["method"] == method and row["seed"] == 0)
        grid = ", ".join(f"**{lr:g}**" if lr == own[0]["lr"] else f"{lr:g}" for lr in tried)
        matches = [row["exact_match"] for row in own]
        spread = f"{statistics.mean(matches):.1%} ({min(matches):.1%} to {max(matches):.1%})"
        fields = ", ".join(f"{key} {value}" for key, value in METHODS[method][0].items()) or "-"
        cells = [
            method,
            fields,
            f"{own[0]['trainable_parameters']:,}",
            str(max(own[0]["effective_rank"].values(), default="-")),
            grid,
            f"{statistics.mean(row['loss'] for row in own):.3f}",
            spread,
            f"{statistics.mean(row['cpu_seconds'] for row in own):.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
