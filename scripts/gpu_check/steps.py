"""The steps in the order of their importance: when time is short the last ones are cut."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from .driver import Judge, Step
from .figures import judge_checks, judge_comparison, judge_tests

ROOT = Path(__file__).resolve().parents[2]
"""The checkout."""
TINY_FACTOR = 4.0
"""Factor by which time limits are longer on a CPU."""
COMPARISONS: dict[str, tuple[float, str]] = {
    "bench_packed": (100, "--workload packed --engines ours --methods lora,rasa"),
    "bench_fused": (90, "--workload packed --engines ours,peft-tuned --methods lora,rasa --kernels liger"),
    "bench_no_dropout": (80, "--workload packed --engines ours --methods lora,rasa --dropout 0"),
    "bench_peers": (90, "--workload packed --engines ours,peft-tuned,per-linear,paper --methods lora,rasa"),
    "bench_long": (70, "--workload long --engines ours --methods lora,rasa"),
    "bench_padded": (60, "--workload padded --engines ours,peft,paper --methods lora,rasa --own-stacks"),
}
"""Time limit in seconds and arguments of each comparison."""
GPU = "--device cuda --warmup 2 --rounds 5"
PEERS = f"--tokens 4096 {GPU}"
"""Without ``--tokens`` rasa-bench takes as many as the free memory allows. The peers keep more activations than ours:
this is what fits for all of them on a card with 80 GB, and with the same number cards can be compared."""
TINY = "--device cpu --shape rasa_train/demo/model --tokens 128 --warmup 1 --rounds 1"


def all_steps(tiny: bool) -> list[Step]:
    """Every step: on the GPU, or ``tiny`` ones on a CPU."""
    listed = [
        _checks("environment", 60),
        _checks("correctness", 150),
        _comparison("bench_packed", tiny),
        _comparison("bench_fused", tiny),
        _checks("training", 140),
        _checks("profile", 60),
        Step("gpu_tests", _tests(), 160, partial(judge_tests, on_gpu=not tiny), captured=True),
        *(_comparison(name, tiny) for name in COMPARISONS if name not in ("bench_packed", "bench_fused")),
        _checks("extras", 90),
        _checks("rates", 90),
    ]
    return [replace(step, limit=TINY_FACTOR * step.limit) for step in listed] if tiny else listed


def _checks(name: str, limit: float) -> Step:
    return Step(name, [sys.executable, "-m", "gpu_check.worker", name], limit, partial(judge_checks, name))


def _comparison(name: str, tiny: bool) -> Step:
    limit, given = COMPARISONS[name]
    more = TINY if tiny else PEERS if name == "bench_peers" else GPU
    given = given.replace("--kernels liger", "") if tiny else given  # these kernels need a GPU
    arguments = shlex.split(f"{given} {more} --json")
    command = [sys.executable, "-m", "rasa_train.cli.bench", *arguments]
    judge: Judge = partial(judge_comparison, name, shlex.join(["rasa-bench", *arguments]))
    return Step(name, command, limit, judge, captured=True)


def _tests() -> Sequence[str]:
    """Return the call of pytest, on the files that have tests for a GPU: others may need packages that are missing."""
    marked = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    files = [str(path.relative_to(ROOT)) for path in marked if path.name != "test_gpu_check.py"]
    pytest = [sys.executable, "-m", "pytest", "--no-header", "-p", "no:cacheprovider", "-m", "gpu"]
    return [*pytest, *(files or ["tests/test_offload.py"])]


NAMES = [step.name for step in all_steps(tiny=False)]
