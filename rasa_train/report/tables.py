"""Build the tables of a report as plain values: a cell has a text to show and a value to sort by."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from ..io.atomic_dir import size
from .charts import Group
from .runs import RECENT, Run, headlines, lower_is_better, number


@dataclass(frozen=True)
class Cell:
    """A cell of a table."""

    text: str
    value: float | str | None = None
    """Value for sorting and for CSV; None (unknown) comes last."""


@dataclass(frozen=True)
class Column:
    """A column of a table."""

    title: str
    hint: str = ""
    """Explanation of the title, shown as a tooltip."""
    number: bool = True
    """Whether the cells are numbers."""


@dataclass(frozen=True)
class Table:
    """A table; the first cell of a row is the row's heading."""

    columns: list[Column]
    rows: list[list[Cell]]

    def csv(self) -> str:
        """Return the table as CSV."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(column.title for column in self.columns)
        writer.writerows([cell.text if cell.value is None else cell.value for cell in row] for row in self.rows)
        return out.getvalue()


UNKNOWN = Cell("–")


def runs_table(runs: Sequence[Run]) -> Table:
    """Return a table with one row per run and two columns (BEST, LAST) for the first score of each suite."""
    scores = headlines(runs)
    columns = [
        Column("run", number=False),
        Column("state", number=False),
        Column("method", number=False),
        Column("r", "number of ranks per layer"),
        Column("k", "number of these ranks that are shared"),
        Column("loss", f"training loss, mean of the last {RECENT} steps"),
    ]
    validated = any("validation_loss" in row for run in runs for row in run.metrics)
    columns += [Column("validation", "last validation loss")] if validated else []
    chosen = any(_best_step(run) is not None for run in runs)
    columns += [Column("best step", "step that training.keep_best has chosen, as --checkpoint best")] if chosen else []
    for key in scores:
        way = "lowest" if lower_is_better(key) else "highest"
        columns += [
            Column(f"{key} BEST", f"{way} over the checkpoints"),
            Column(f"{key} LAST", "value of the finished run"),
        ]
    columns += [
        Column("trained", "number of trainable parameters"),
        Column("rank", "largest effective rank of an update"),
        Column("steps"),
        Column("tokens"),
        Column("time"),
        Column("memory", "peak memory of the first worker"),
    ]
    return Table(columns, [_run_row(run, scores, validated, chosen) for run in runs])


def groups_table(groups: Sequence[Group]) -> Table | None:
    """Return a table of mean and standard deviation over the complete runs of each group; None when every group has
    only one run."""
    if all(len(group.runs) < 2 for group in groups):
        return None
    scores = headlines(run for group in groups for run in group.runs)
    columns = [
        Column("runs", number=False),
        Column("seeds", "number of complete runs"),
        Column("loss", f"of the last {RECENT} steps, mean ± standard deviation"),
    ]
    columns += [Column(f"{key} {which}", "mean ± standard deviation") for key in scores for which in ("BEST", "LAST")]
    rows = []
    for group in groups:
        done = [run for run in group.runs if run.summary]
        count = str(len(done)) if len(done) == len(group.runs) else f"{len(done)} of {len(group.runs)}"
        row = [Cell(group.name, group.name), Cell(count, len(done)), _spread([run.loss for run in done])]
        for key in scores:
            pairs = [run.best_and_last().get(key) for run in done]
            row += [_spread([pair and pair[which] for pair in pairs]) for which in (0, 1)]
        rows.append(row)
    return Table(columns, rows)


def differences_table(runs: Sequence[Run]) -> Table | None:
    """Return a table of the recipe keys that differ between runs; None when there are none."""
    known = [run for run in runs if run.recipe]
    keys = list(dict.fromkeys(key for run in known for key in run.recipe))
    differing = [
        key
        for key in keys
        if key != "output_dir" and len({json.dumps(run.recipe.get(key), default=str) for run in known}) > 1
    ]
    if not differing:
        return None
    rows = []
    for key in differing:
        cells = [Cell(_value(run.recipe[key])) if key in run.recipe else UNKNOWN for run in known]
        rows.append([Cell(key, key), *(Cell(cell.text, cell.text) for cell in cells)])
    return Table([Column("key", number=False), *(Column(run.name, number=False) for run in known)], rows)


def _best_step(run: Run) -> float | None:
    best = run.summary.get("best")
    return number(best.get("step")) if isinstance(best, dict) else None


def _run_row(run: Run, scores: list[str], validated: bool, chosen: bool) -> list[Cell]:
    summary, last = run.summary, run.metrics[-1] if run.metrics else {}
    ranks = summary.get("effective_rank")
    found_ranks = [number(rank) for rank in ranks.values()] if isinstance(ranks, dict) else []
    rank = max((rank for rank in found_ranks if rank is not None), default=None)
    peak = max((row.get("peak_memory_bytes", 0) for row in run.metrics), default=0)
    peak = peak or run.fact("peak_memory_bytes") or 0
    steps = run.fact("steps") or last.get("step")
    method = run.recipe.get("adapter.method", summary.get("method"))
    row = [
        Cell(run.name, run.name),
        Cell(run.state, run.state),
        Cell(str(method), str(method)) if method else UNKNOWN,
        _whole(run.recipe.get("adapter.r")),
        _whole(run.recipe.get("adapter.k")),
        _float(run.loss),
    ]
    if validated:
        found = [row["validation_loss"] for row in run.metrics if "validation_loss" in row]
        row.append(_float(found[-1] if found else None))
    row += [_whole(_best_step(run))] if chosen else []
    best_and_last = run.best_and_last()
    for key in scores:
        row += [_float(value) for value in best_and_last.get(key, (None, None))]
    row += [
        _whole(summary.get("trainable_parameters")),
        _whole(rank),
        _whole(steps),
        _whole(run.total("tokens")),
        _time(run.total("seconds")),
        Cell(size(peak), peak) if peak else UNKNOWN,
    ]
    return row


def _whole(value: Any) -> Cell:
    return Cell(f"{value:,.0f}", value) if isinstance(value, int | float) else UNKNOWN


def _float(value: Any) -> Cell:
    return Cell(f"{value:.4g}", value) if isinstance(value, int | float) else UNKNOWN


def _time(seconds: float | None) -> Cell:
    if seconds is None:
        return UNKNOWN
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    text = f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
    return Cell(text, round(seconds, 1))


def _spread(values: Sequence[float | None]) -> Cell:
    present = [value for value in values if value is not None]
    if not present:
        return UNKNOWN
    mean = fmean(present)
    spread = f" ± {stdev(present):.2g}" if len(present) > 1 else ""
    return Cell(f"{mean:.4g}{spread}", mean)


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
