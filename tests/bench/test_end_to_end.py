"""Our training and TRL's on the same rows: the table, and that both compute the same loss."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rasa_train.bench import end_to_end
from rasa_train.bench.end_to_end import EndToEnd, Settings, _costs, sides
from rasa_train.bench.report import ends_table
from tests.conftest import Cli

CPU = torch.device("cpu")
SETTINGS = Settings("s", 2, torch.float32, 0.05, 1, 2, CPU)


def outcome(trl_loss: float) -> EndToEnd:
    """Two timed steps of 500 and 1,000 tokens, after one of 7 that is not timed: ours takes 4 and 5 ms a token, each
    setting of TRL twice as long."""

    def rows(factor: float, loss: float) -> list[dict[str, Any]]:
        return [
            {"cpu_seconds": factor * s, "wall_seconds": 2 * factor * s, "loss": loss, "peak_memory_bytes": 2**30}
            for s in (2.0, 5.0)
        ]

    every = sides(CPU)
    of = {s.label: rows(1.0, 3.0) if s.label[0] == "ours" else rows(2.0, trl_loss) for s in every}
    return EndToEnd(SETTINGS, [500, 1000], _costs(SETTINGS, every, of, [7, 500, 1000]), 0.5)


def test_costs_are_per_token_and_in_pairs() -> None:
    result = outcome(3.0005)
    cost = result.costs["trl", "lora"]
    assert cost.cpu_us_per_token == 9000 and cost.cpu_us_range == (8000, 10_000)
    assert cost.wall_us_per_token == 18_000 and cost.over_ours == 2.0 and cost.over_ours_range == (2.0, 2.0)
    text = ends_table(result)
    assert max(map(len, text.splitlines())) <= 80 and "NO RATIO" not in text
    assert "trl       lora  9 (8-10)            18 (16-20)          2 (2-2)            1,024" in text
    row = result.as_json()["rows"][0]  # type: ignore[index]
    assert row["side"] == "ours" and row["over_ours"] == 1.0 and result.as_json()["mean_tokens"] == 750


def test_no_ratio_where_the_losses_differ() -> None:
    result = outcome(3.002)
    assert result.costs["trl", "lora"].over_ours is None and result.costs["ours", "rasa"].over_ours == 1.0
    text = ends_table(result)
    assert "NO RATIO: the first loss of trl is 3.0020, of ours 3.0000" in text and "2 (2-2)" not in text


def test_a_missing_package_is_said(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = SimpleNamespace(find_spec=lambda name: None if name == "trl" else object())
    monkeypatch.setattr(end_to_end, "importlib", SimpleNamespace(util=absent))
    done = cli("bench", "--peers", "trl")
    assert done.returncode == 2 and "pip install trl" in done.stderr and done.stderr.count("\n") == 1


def test_the_stack_of_linears_cannot_be_trained(cli: Cli) -> None:
    pytest.importorskip("trl")
    done = cli("bench", "--peers", "trl", "--shape", "linears-1024")
    assert done.returncode == 2 and "try --shape llama-42m" in done.stderr


@pytest.mark.slow
def test_both_train_on_the_same_tokens(cli: Cli, tiny_llama: Path) -> None:
    """Every loop starts with the same loss, whatever its padding, and all of them are timed."""
    pytest.importorskip("trl")
    arguments = ("--shape", tiny_llama, "--device", "cpu", "--tokens", 500, "--warmup", 1, "--rounds", 1)
    result = json.loads(cli("bench", "--peers", "trl", *arguments, "--json", check=True).stdout)
    rows = result["rows"]
    assert [row["side"] for row in rows] == ["ours", "ours", "trl", "trl-kept", "trl-flat"]
    losses = [row["first_loss"] for row in rows]
    assert max(losses) - min(losses) < 1e-5
    assert all(row["over_ours"] > 0 and row["cpu_us_per_token"] > 0 for row in rows)
    assert result["sequences"] == 2 and result["versions"]["trl"]
