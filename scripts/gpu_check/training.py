"""rasa-train for real: two hundred steps, stopped by a signal and resumed, beside a run that nobody stopped."""

from __future__ import annotations

import json
import math
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from .measure import ON_GPU, TINY, Check, Values, Wrong, hold, rounded

STEPS, STOP_AT, BATCH = (8, 3, 4) if TINY else (200, 80, 64)
STOPPED = 75
"""Exit code of a run that was stopped on request, with everything saved."""
LARGEST_DIFFERENCE = 0.05
"""Largest difference of a step's loss. Kernels of a GPU add in an order that changes from run to run; bf16 makes that
differences of 2^-8 in activations, which training carries on from step to step. A lost optimizer state, another
learning rate or other data move the loss of a step by several times as much."""
LAST, MEAN_DIFFERENCE = 20, 0.01
"""Number of steps at the end whose mean loss is compared, and the share by which it may differ. The differences of
single steps have no sign in common, so their mean is far smaller, unless the resumed run is a different run."""


def recipe(directory: Path, name: str, **training: Any) -> Path:
    """Write the recipe of one run."""
    sections = {
        "model": {"name": "demo", "dtype": "bfloat16" if ON_GPU else "float32"},
        "adapter": {"method": "rasa", "r": 8, "k": 1, "alpha": 16, "dropout": 0.05},
        "data": {
            "dataset": "demo",
            "template": "alpaca",
            "supervise": "response",
            "max_length": 192,
            "cache_dir": str(directory / "cache"),
        },
        "training": {
            "max_steps": STEPS,
            "batch_size": BATCH,
            "batching": "packed",
            "optimizer": {"name": "lionw", "lr": 3e-3},
            "checkpoint_every": STEPS // 5,
            "keep_last": 2,
            "log_every": 25,
            **training,
        },
        "output_dir": str(directory / name),
    }
    path = directory / f"{name}.yaml"
    path.write_text(json.dumps(sections, indent=1))
    return path


def start(path: Path) -> subprocess.Popen[str]:
    """Start a run; its notices go to a file beside its recipe."""
    with path.with_suffix(".log").open("a") as log:
        command = [sys.executable, "-m", "rasa_train.cli.train", str(path)]
        return subprocess.Popen(command, stdout=log, stderr=log, text=True)


def finish(path: Path) -> float:
    """Run to the end. Returns the seconds that it took."""
    began = time.monotonic()
    code = start(path).wait()
    if code != 0:
        said = path.with_suffix(".log").read_text()
        print(said)
        last = next((line for line in reversed(said.splitlines()) if line.strip()), "")
        raise Wrong(f"rasa-train {path.stem} ended with {code}: {last[:200]}", {})
    return time.monotonic() - began


def metrics(path: Path) -> list[dict[str, Any]]:
    """A row for each step that the run has done."""
    file = path.with_suffix("") / "metrics.jsonl"
    text = file.read_text() if file.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def stop(path: Path) -> int:
    """Run until ``STOP_AT`` steps are done and ask the run to stop. Returns its exit code."""
    process = start(path)
    while process.poll() is None and len(metrics(path)) < STOP_AT:
        time.sleep(0.05)
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    return process.wait()


def stopped_and_resumed() -> Values:
    """Compare the losses of a run that was stopped and resumed with those of one that was not."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        whole, stopped = (recipe(directory, run, micro_batch_tokens=4096) for run in ("whole", "stopped"))
        seconds = finish(whole)
        code = stop(stopped)
        stopped_at = len(metrics(stopped))
        if code != STOPPED:
            print(stopped.with_suffix(".log").read_text())
            raise Wrong(f"the run that was asked to stop ended with {code}, not {STOPPED}", {"stopped_at": stopped_at})
        finish(stopped)
        undisturbed, resumed = metrics(whole), metrics(stopped)
    return compared(undisturbed, resumed) | {"stopped_at": stopped_at, "seconds": round(seconds, 1)}


def compared(undisturbed: list[dict[str, Any]], resumed: list[dict[str, Any]]) -> Values:
    """Figures of the undisturbed run and how far the resumed one is from it; raises ``Wrong`` if that is too far."""
    losses, others = ([row["loss"] for row in rows] for rows in (undisturbed, resumed))
    counts = {"steps": len(losses), "steps_resumed": len(others)}
    hold(len(losses) == len(others) == STEPS and None not in (*losses, *others), "steps are missing", counts)
    last, last_resumed = statistics.mean(losses[-LAST:]), statistics.mean(others[-LAST:])
    values = {
        **counts,
        "identical": losses == others,
        "largest_difference": rounded(max(abs(a - b) for a, b in zip(losses, others, strict=True))),
        "mean_of_last": rounded(last),
        "mean_of_last_resumed": rounded(last_resumed),
        "first_loss": rounded(losses[0]),
        "tokens_per_second": round(statistics.median(row["tokens_per_second"] for row in undisturbed)),
        "seconds_per_step": rounded(statistics.median(row["seconds"] for row in undisturbed)),
        "peak_memory_bytes": max(row["peak_memory_bytes"] for row in undisturbed),
        "losses": [rounded(loss) for loss in losses[:: max(1, STEPS // 20)]],
    }
    if not ON_GPU:
        return hold(values["identical"], "the resumed run is not bit-identical to the undisturbed one", values)
    near = math.isclose(last, last_resumed, rel_tol=MEAN_DIFFERENCE)
    return hold(near and values["largest_difference"] <= LARGEST_DIFFERENCE, "the resumed run is another one", values)


def found_micro_batch() -> Values:
    """Train a few steps with ``micro_batch_size: auto``. Returns the micro-batch that the run says it found."""
    with tempfile.TemporaryDirectory() as name:
        path = recipe(Path(name), "auto", micro_batch_size="auto", max_steps=3 if TINY else 6, checkpoint_every=3)
        finish(path)
        said = path.with_suffix(".log").read_text()
        steps = len(metrics(path))
    print(said)
    found = re.search(r"[\d,]+ tokens at a time.*", said)
    values = {"steps": steps, "said": found[0] if found else None}
    return hold(not ON_GPU or found is not None, "the run does not say what it found", values)


CHECKS = [Check("stopped and resumed", stopped_and_resumed), Check("micro_batch_size: auto", found_micro_batch)]
