"""The GPU tables of docs/BENCHMARKS.md: up to date, and right for figures that are known."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT: dict[str, Any] = runpy.run_path(str(ROOT / "scripts" / "make_benchmark_tables.py"))
PAGE = (ROOT / "docs" / "BENCHMARKS.md").read_text()


def row(engine: str, method: str | None, seconds: float, **more: Any) -> dict[str, Any]:
    gradients = {"gradient_error": 0.0312, "gradient_cosine": 0.9991, "loss_error": 0.0001}
    if method is None:
        gradients = {"gradient_error": 0.0, "gradient_cosine": 1.0, "loss_error": 0.0001}
    return {
        "engine": engine,
        "method": method,
        "seconds_per_step": seconds,
        "seconds_range": [seconds - 0.01, seconds + 0.02],
        "over_base": seconds,
        "tokens_per_second": 16_384 / seconds,
        "peak_memory_bytes": 70 * 10**9,
        **gradients,
        **more,
    }


def compared(name: str, rows: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {
        "command": f"rasa-bench --workload {name} --json",
        "rows": rows,
        "failed": [],
        "skipped": [],
        "does_not_fit": [],
        "workload": {"name": name, "sequences": 66, "tokens": 16_384},
        "dtype": "bfloat16",
        **more,
    }


BASE = row("base", None, 1.0)
OURS = [BASE, row("ours", "lora", 1.05), row("ours", "rasa", 1.0626)]
PEERS = [*OURS, row("peft-tuned", "lora", 1.26), row("per-linear", "lora", 1.05)]
TOO_LARGE = {"engine": "paper", "method": "rasa", "why": "out of memory"}
BENCHMARK: dict[str, Any] = {
    "format": 1,
    "device": "NVIDIA H200",
    "tiny": False,
    "date": "2026-11-27",
    "command": "python scripts/gpu_check --budget 530",
    "commit": "0123456789ab",
    "versions": {"torch": "2.11.0+cu130", "transformers": "5.17.0", "peft": None, "driver": "580.1"},
    "facts": {"memory_gib": 139.8, "bf16_tflops": 790.2, "copy_tb_s": 4.1, "host_us_per_small_op": 4.5},
    "steps": {"environment": {"outcome": "ok"}, "rates": {"outcome": "left out"}},
    "checks": {
        "varlen attention": {"outcome": "ok", "values": {"y": 0.0018, "dq": 0.0026}},
        "nf4 base": {"outcome": "not installed", "why": "bitsandbytes is not installed"},
        "method rasa": {
            "outcome": "ok",
            "values": {
                "fast": {"loss_error": 0.00072, "gradient_error": 0.0683, "gradient_cosine": 0.9977},
                "plain": {"loss_error": 0.00013, "gradient_error": 0.0522, "gradient_cosine": 0.9986},
            },
        },
    },
    "comparisons": {
        "bench_packed": compared("packed", OURS),
        "bench_peers": compared("packed", PEERS, does_not_fit=[TOO_LARGE]),
    },
    "training": {
        "stopped and resumed": {
            "outcome": "ok",
            "values": {
                "steps": 200, "stopped_at": 81, "identical": False, "largest_difference": 0.0031,
                "tokens_per_second": 5120, "mean_of_last": 0.101, "mean_of_last_resumed": 0.1012,
            },
        }
    },
    "profile": {
        "step of RaSA": {
            "outcome": "ok",
            "values": {
                "parts": {"pack": {"device_ms": 4.1, "host_ms": 6.2}, "forward": {"device_ms": 160.0, "host_ms": 40.5}},
                "gaps_ms": 1.5, "peak_gib": 65.2,
            },
        }
    },
}  # fmt: skip


def test_the_page_is_up_to_date() -> None:
    assert SCRIPT["page"](PAGE, SCRIPT["read"]()) == PAGE, "make docs writes it again"


def test_nothing_is_claimed_before_it_is_run() -> None:
    made = SCRIPT["tables"]([])
    assert "no GPU has been at hand" in made and made.count("| not run |") == len(SCRIPT["GOALS"])


def test_tables_of_known_figures() -> None:
    made = SCRIPT["tables"]([BENCHMARK])
    lines = made.splitlines()
    assert lines[0] == "### NVIDIA H200, torch 2.11.0"
    assert "790.2 TFLOP/s" in made and "commit 0123456789ab" in made and "`rates`: left out" in made
    for expected in [
        "| RaSA / LoRA | 1.02 | 1.01 | 1.012 (dropout 0.05): met |",
        "| RaSA over the frozen base | 1.09 | 1.04 | 1.063 (dropout 0.05): met |",
        "| tokens/s, packed | 17,500 | 19,500 | 15,419: missed |",
        "| tokens/s, long | 15,000 | 16,500 | not run |",
        "| over peft-tuned with Liger | 1.1 | 1.15 | 1.200: met, stretch too |",
        "| over per-linear | 1.03 | 1.07 | 1.000: missed |",
        "| peak memory, 16,384 tokens, GB | 75 | 70 | 70: met, stretch too |",
        "    rasa-bench --workload packed",
        "| base | | 1000.0 (990.0-1020.0) | 1.000 | 16,384 | 65.2 | | |",
        "| ours | RaSA | 1062.6 (1052.6-1082.6) | 1.063 | 15,419 | 65.2 | 0.031 | 0.9991 |",
        "| rasa | 0.00072 | 0.068 | 0.00013 | 0.052 |",
        "| varlen attention | ok | y 0.0018, dq 0.0026 |",
        "| nf4 base | not installed | bitsandbytes is not installed |",
        "| RaSA | 4.1 / 6.2 | 160 / 40.5 | 1.5 | 65.2 |",
    ]:
        assert expected in lines, expected
    assert "paper RaSA: does not fit." in made
    assert "within 0.0031 of it at every step" in " ".join(made.split())


def test_each_card_has_a_section_and_other_formats_are_refused(tmp_path: Path) -> None:
    for name in ("NVIDIA H100", "NVIDIA H200"):
        (tmp_path / f"{name}.json").write_text(json.dumps({**BENCHMARK, "device": name}))
    made = SCRIPT["page"](PAGE, SCRIPT["read"](tmp_path))
    assert made.index("### NVIDIA H100, torch") < made.index("### NVIDIA H200, torch") < made.index("## Data")
    assert SCRIPT["page"](made, []) == SCRIPT["page"](PAGE, [])
    (tmp_path / "other.json").write_text(json.dumps({**BENCHMARK, "format": 2}))
    with pytest.raises(ValueError, match="format 2, not 1"):
        SCRIPT["read"](tmp_path)
