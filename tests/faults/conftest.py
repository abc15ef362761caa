"""A run that nothing has disturbed, to compare with; and the tally of faults at the end."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from .harness import INJECTED, start

RECIPE = """\
model: {{name: {model}, dtype: float32}}
adapter: {{method: rasa, r: 4, k: 1, alpha: 8, dropout: 0.1}}
data: {{dataset: {data}}}
training: {{max_steps: 10, batch_size: 8, micro_batch_size: 4, optimizer: {{lr: 2e-2}}, checkpoint_every: 2}}
output_dir: run
"""


@dataclass(frozen=True)
class Whole:
    """The undisturbed run, and what it took."""

    run: Path
    recipe: Path
    merged: Path
    changes: int
    seconds: float
    merge_changes: int
    merge_seconds: float


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, token_rows: Path) -> Whole:
    here = tmp_path_factory.mktemp("whole")
    recipe = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    recipe.write_text(RECIPE.format(model=tiny_llama, data=token_rows))
    assert start("train", recipe, "output_dir=warm", cwd=here).wait() == 0  # fills the cache of the data
    begun = time.monotonic()
    train = start("train", recipe, cwd=here)
    assert train.wait() == 0, train.said
    seconds, begun = time.monotonic() - begun, time.monotonic()
    merge = start("merge", "run", "--output", "merged", cwd=here)
    assert merge.wait() == 0, merge.said
    merge_seconds = time.monotonic() - begun
    return Whole(here / "run", recipe, here / "merged", train.changes, seconds, merge.changes, merge_seconds)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The tally: faults survived / injected, by kind."""
    if not INJECTED:
        return
    failed = {report.nodeid for outcome in ("failed", "error") for report in terminalreporter.stats.get(outcome, [])}
    kinds = sorted({kind for _, kind in INJECTED})
    terminalreporter.section("faults survived / injected")
    for kind in [*kinds, "in all"]:
        counts = [(test, n) for (test, of), n in INJECTED.items() if kind in (of, "in all")]
        survived = sum(n for test, n in counts if test not in failed)
        terminalreporter.line(f"{survived:5} / {sum(n for _, n in counts):5}  {kind}")
