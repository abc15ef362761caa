"""Compare methods on small classification sets, with several seeds each, beside the majority label.

    python scripts/compare_classifiers.py ENCODER DATA OUTPUT [--rows 1000] [--seeds 3]

DATA has a directory for each set (sst2, cola, mrpc, rte, stsb) with train.jsonl and validation.jsonl, whose columns are
those of GLUE. OUTPUT gets a run for each set, method and seed; the table is printed at the end. A run that is complete
is not made again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

from rasa_train.launch.launch import launch
from rasa_train.launch.supervisor import Workers
from rasa_train.recipe.load import load_recipe

SETS = {"sst2": "accuracy", "cola": "matthews", "mrpc": "accuracy", "rte": "accuracy", "stsb": "pearson"}
METHODS = {
    "FT": ("{method: full}", 1e-4),
    "BitFit": ("{method: bitfit, add_bias: false}", 3e-3),
    "LoRA": ("{method: lora, r: 8, alpha: 16, targets: [wq, wv]}", 2e-3),
    "RaSA": ("{method: rasa, r: 8, k: 1, alpha: 16, targets: [wq, wv]}", 2e-3),
    "Adapter-H": ("{method: bottleneck, kind: houlsby, size: 16}", 1e-3),
}
"""The section ``adapter:`` and the learning rate of each method."""
RECIPE = """\
task: {{name: classification, problem: {problem}}}
model: {{name: {encoder}, dtype: float32}}
adapter: {adapter}
data:
  dataset: {output}/{name}.jsonl
  max_length: 128
  num_workers: 1
training:
  epochs: {epochs}
  batch_size: 16
  optimizer: {{name: adamw, lr: {lr}, weight_decay: 0.01}}
  schedule: {{name: linear, warmup_ratio: 0.06}}
  evaluate: {{suite: glue/{name}, data: {validation}, every: 100000}}
  checkpoint_every: 100000
output_dir: {run}
seed: {seed}
"""


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def majority(rows: list[dict[str, Any]], metric: str) -> float:
    """Return the score of the most frequent label, or 0 for a correlation."""
    return Counter(row["label"] for row in rows).most_common(1)[0][1] / len(rows) if metric == "accuracy" else 0.0


def score(arguments: argparse.Namespace, name: str, method: str, seed: int) -> float:
    """Train one run, unless it is complete, and return its score after the last epoch."""
    adapter, lr = METHODS[method]
    run = arguments.output / f"{name}-{method}-{seed}"
    if not (run / "summary.json").is_file():
        recipe = run.with_suffix(".yaml")
        places = {"encoder": arguments.encoder, "output": arguments.output, "run": run}
        places["validation"] = arguments.data / name / "validation.jsonl"
        settings = {"name": name, "adapter": adapter, "lr": lr, "seed": seed, "epochs": arguments.epochs}
        settings["problem"] = "regression" if SETS[name] == "pearson" else "single_label"
        recipe.write_text(RECIPE.format(**settings, **places))
        launch(load_recipe(str(recipe)).recipe, Workers(1))
    return float(json.loads((run / "summary.json").read_text())["evaluation"]["last"]["value"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("encoder", "data", "output"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--rows", type=int, default=1000, help="rows of each set to train on (default: 1000)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--sets", default=",".join(SETS), help="sets to run, separated by commas")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    names = arguments.sets.split(",")
    for name in names:
        lines = (arguments.data / name / "train.jsonl").read_text().splitlines()[: arguments.rows]
        (arguments.output / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    lines = ["| | " + " | ".join(f"{name} ({SETS[name]})" for name in names) + " |", "|---|" + "---|" * len(names)]
    scores = [majority(rows_of(arguments.data / name / "validation.jsonl"), SETS[name]) for name in names]
    lines.append("| majority label | " + " | ".join(f"{100 * value:.1f}" for value in scores) + " |")
    found: dict[tuple[str, str], list[float]] = {pair: [] for pair in itertools.product(METHODS, names)}
    for seed, (method, name) in itertools.product(range(arguments.seeds), found):
        found[method, name].append(score(arguments, name, method, seed))
    for method in METHODS:
        cells = [
            f"{100 * statistics.mean(v):.1f} ({100 * min(v):.1f} to {100 * max(v):.1f})"
            for (m, _), v in found.items()
            if m == method
        ]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
