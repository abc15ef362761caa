"""Render a report as one self-contained HTML page, which needs no network and no other file."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from torch import Tensor

from .charts import Chart, charts, groups
from .runs import RECENT, Run
from .tables import Table, differences_table, groups_table, runs_table

HERE = Path(__file__).parent
MIXING_BYTES = 600_000
"""Largest size of the heat maps on a page. Runs beyond it are left out and listed by name."""
LOSS = f"Loss: the mean of the training loss over the last {RECENT} steps."
"""What the tables of a page mean by the loss of a run."""


def render(runs: Sequence[Run], *, reload_seconds: float | None = None) -> str:
    """Return the page as text.

    Args:
        reload_seconds: seconds after which the page reloads itself, for a report of unfinished runs; None: never.
    """
    drawn, grouped = charts(runs), groups(runs)
    maps, left_out = _mixing(runs)
    sections = [
        ("runs", "Runs", f'<p class="note">{LOSS}</p>{_table(runs_table(runs), "Runs")}'),
        ("seeds", "Mean over seeds", _optional(groups_table(grouped), "Mean over seeds")),
        ("problems", "What is missing", _problems(runs)),
        ("curves", "Curves", '<div id="charts"></div>' if drawn else "<p>No run has logged a step yet.</p>"),
        ("mixing", "Mixing weights", _mixing_section(maps, left_out)),
        ("recipes", "Recipe differences", _optional(differences_table(runs), "Recipe differences")),
    ]
    sections = [section for section in sections if section[2]]
    script = (HERE / "page.js").read_text()
    data = {"charts": [asdict(chart) for chart in drawn], "mixing": maps, "reloadSeconds": reload_seconds}
    return Template((HERE / "page.html").read_text()).substitute(
        # The page may run only this script and load nothing, so that a hostile run name can do no harm.
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        style=(HERE / "page.css").read_text(),
        script=script,
        data=embed(data),
        count=f"{len(runs)} run{'' if len(runs) == 1 else 's'}",
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        live='<span class="live">live</span>' if reload_seconds else "",
        nav="".join(f'<a href="#{key}">{title}</a>' for key, title, _ in sections),
        body="\n".join(
            f'<section id="{key}" aria-labelledby="h-{key}"><h2 id="h-{key}">{title}</h2>\n{html}</section>'
            for key, title, html in sections
        ),
    )


def embed(data: Any) -> str:
    """Return JSON that is safe inside a script element: it cannot end the element, whatever names it contains."""
    text = json.dumps(_finite(data), ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def report_json(runs: Sequence[Run]) -> dict[str, object]:
    """Return the data of the page, which ``--json`` prints."""
    drawn: list[Chart] = charts(runs)
    facts = [
        {
            "name": run.name,
            "path": str(run.path),
            "state": run.state,
            "problems": run.problems,
            "method": run.recipe.get("adapter.method", run.summary.get("method")),
            "recipe": run.recipe,
            "summary": run.summary,
            "loss": run.loss,
            "last_loss": run.last_loss,
            "tokens": run.total("tokens"),
            "seconds": run.total("seconds"),
            "scores": {key: {"best": best, "last": last} for key, (best, last) in run.best_and_last().items()},
            "mixing": {kind: d.tolist() for kind, d in run.mixing.items()},
        }
        for run in runs
    ]
    grouped = [{"name": group.name, "runs": [run.name for run in group.runs]} for group in groups(runs)]
    result: dict[str, object] = _finite(
        {"runs": facts, "groups": grouped, "charts": [asdict(chart) for chart in drawn]}
    )
    return result


def _finite(value: Any) -> Any:
    """Return the value with None for NaN and infinities, which JSON cannot express."""
    if isinstance(value, dict):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    if isinstance(value, float) and value - value != 0:
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _optional(table: Table | None, caption: str) -> str:
    return "" if table is None else _table(table, caption)


def _table(table: Table, caption: str) -> str:
    heads = "".join(
        f'<th scope="col"{"" if column.number else " class=text"}>'
        f'<button type="button" title="{escape(column.hint or "sort by " + column.title)}">'
        f"{escape(column.title)}</button></th>"
        for column in table.columns
    )
    rows = []
    for row in table.rows:
        cells = []
        for i, (column, cell) in enumerate(zip(table.columns, row, strict=True)):
            tag = 'th scope="row"' if i == 0 else "td"
            value = "" if cell.value is None else f' data-v="{escape(str(cell.value))}"'
            kind = "" if column.number else " class=text"
            cells.append(f"<{tag}{kind}{value}>{_breakable(cell.text)}</{tag.split()[0]}>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{caption}"><table class="sortable">'
        f"<thead><tr>{heads}</tr></thead>\n<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _problems(runs: Sequence[Run]) -> str:
    items = [
        f"<dt>{_breakable(run.name)}</dt>" + "".join(f"<dd>{escape(problem)}</dd>" for problem in run.problems)
        for run in runs
        if run.problems
    ]
    return f'<dl class="problems">{"".join(items)}</dl>' if items else ""


def _breakable(text: str) -> str:
    """Return escaped text in which a line may break after a comma, for the names of a sweep's runs."""
    return escape(text).replace(",", ",<wbr>")


def _mixing(runs: Sequence[Run]) -> tuple[list[dict[str, object]], list[str]]:
    """Return the heat maps, and the names of the runs for which there is no room. A map is base64 of one byte per
    weight, row by row, where 255 stands for the largest weight."""
    maps: list[dict[str, object]] = []
    left_out, used = [], 0
    for run in runs:
        nbytes = sum(d.numel() for d in run.mixing.values()) * 4 // 3
        if used + nbytes > MIXING_BYTES:
            left_out.append(run.name)
        elif run.mixing:
            used += nbytes
            maps.append({"run": run.name, "kinds": [_heat_map(kind, d) for kind, d in run.mixing.items()]})
    return maps, left_out


def _heat_map(kind: str, d: Tensor) -> dict[str, object]:
    largest = float(d.max()) if d.numel() else 0.0
    levels = (d / (largest or 1.0) * 255).nan_to_num().round().clamp(0, 255).byte()
    values = base64.b64encode(levels.contiguous().numpy().tobytes()).decode()
    return {"kind": kind, "layers": d.shape[0], "ranks": d.shape[1], "largest": largest, "values": values}


def _mixing_section(maps: list[dict[str, object]], left_out: list[str]) -> str:
    if not maps and not left_out:
        return ""
    text = "<p>Which layers use which shared ranks: |d| of each layer (row) and each rank of the pool (column).</p>"
    more = f"<p>There is no room on this page for {escape(', '.join(left_out))}.</p>" if left_out else ""
    return f'{text}<div id="heatmaps"></div>{more}'
