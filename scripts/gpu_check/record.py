"""A run's figures as data that is committed: ``benchmark.json``, and its place under benchmarks/."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .results import FAILED, LEFT_OUT, TIMED_OUT, Results, Row

FORMAT = 1
"""Number of the format of benchmark.json. scripts/make_benchmark_tables.py reads this one."""
FILE = "benchmark.json"
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
GROUPS = {"training": "training", "profile": "profile", "extras": "extras", "rates": "rates"}
"""Steps whose checks have a section of their own; those of the others are in ``checks`` and ``facts``."""


class Refused(Exception):
    """This run cannot be recorded."""


def write_benchmark(results: Results, facts: Row) -> Path:
    """Write benchmark.json from everything in the directory.

    Args:
        facts: ``date``, ``command``, ``commit`` and ``tiny``; ``device`` and ``torch``, as found at the start.
    """
    environment = results.checks("environment")
    found: Row = environment.get("versions", {}).get("values") or {}
    ceilings: Row = environment.get("ceilings", {}).get("values") or {}
    steps = results.steps()
    comparisons = {name: row for name in steps if (row := results.comparison(name)) is not None}
    benchmark: Row = {
        "format": FORMAT,
        "device": facts["device"],
        "tiny": facts["tiny"],
        "date": facts["date"],
        "command": facts["command"],
        "commit": facts["commit"],
        "versions": found.get("versions") or {"torch": facts["torch"]},
        "facts": {k: v for k, v in found.items() if k not in ("device", "versions")} | ceilings,
        "steps": {name: {key: row[key] for key in ("outcome", "seconds", "figure")} for name, row in steps.items()},
        "checks": {name: _check(row) for name, row in results.checks("correctness").items()},
        "comparisons": {name: {"command": row["command"], **row["result"]} for name, row in comparisons.items()},
        **{key: {n: _check(r) for n, r in results.checks(step).items()} for key, step in GROUPS.items()},
    }
    path = results.directory / FILE
    path.write_text(json.dumps(benchmark, indent=1) + "\n")
    return path


def _check(row: Row) -> Row:
    return {key: row[key] for key in ("outcome", "why", "values") if row.get(key) is not None}


def record(directories: Sequence[Path], benchmarks: Path = BENCHMARKS) -> Path:
    """Copy benchmark.json to its right name under benchmarks/. Several directories are one run and later runs of some
    of its steps, which replace the earlier ones; each step then names the commit that it is of.

    Raises:
        Refused: there is no benchmark.json, it is that of a tiny run, or the runs do not belong together.
    """
    runs = [_read(directory) for directory in directories]
    merged = runs[0]
    for other in runs[1:]:
        if other["device"] != merged["device"]:
            raise Refused(f"{directories[0]} and others are of two cards: {merged['device']}, {other['device']}")
        merged = _merged(merged, other)
    failed = [name for name, row in merged["steps"].items() if row["outcome"] in (FAILED, TIMED_OUT)]
    path = benchmarks / name_of(merged)
    benchmarks.mkdir(exist_ok=True)
    path.write_text(json.dumps(merged, indent=1) + "\n")
    if failed:
        print(f"recorded with steps that did not end well, and the tables will say so: {', '.join(failed)}")
    return path


def name_of(benchmark: Row) -> str:
    """``nvidia-h100-80gb-hbm3_torch-2.11.0.json``: the card and the version of torch."""
    card = re.sub(r"[^a-z0-9]+", "-", benchmark["device"].lower()).strip("-")
    return f"{card}_torch-{benchmark['versions']['torch'].partition('+')[0]}.json"


def _read(directory: Path) -> dict[str, Any]:
    path = directory / FILE
    try:
        benchmark: dict[str, Any] = json.loads(path.read_text())
    except OSError:
        raise Refused(f"there is no {path}: a run of gpu_check writes it at its end") from None
    except ValueError:
        raise Refused(f"{path} is not JSON") from None
    if benchmark.get("format") != FORMAT:
        raise Refused(f"{path} has format {benchmark.get('format')}, not {FORMAT}")
    if benchmark["tiny"] or benchmark["device"] == "cpu":
        raise Refused(f"{path} is of a tiny run on a CPU: its figures say nothing about a GPU")
    return benchmark


def _merged(first: Row, later: Row) -> Row:
    """One run with what a later one adds; a step that was left out later stays as it was."""
    result = dict(first)
    if first["commit"] != later["commit"]:
        for run in (first, later):
            for row in run["steps"].values():
                row.setdefault("commit", run["commit"])
    for key in ("facts", "checks", "comparisons", *GROUPS):
        result[key] = first[key] | later[key]
    ran = {name: row for name, row in later["steps"].items() if row["outcome"] != LEFT_OUT}
    result["steps"] = later["steps"] | first["steps"] | ran
    return result
