"""Write the charts and tables of a report as files: PNG and SVG for papers and slides, CSV for everything else."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..analysis.plots import COLOURS, DASHES, save
from ..errors import UserError
from ..io.links import refuse_links_out
from .charts import Chart, Series, charts, groups
from .runs import Run
from .tables import differences_table, groups_table, runs_table

matplotlib.use("Agg")


def write_figures(runs: Sequence[Run], directory: Path) -> list[Path]:
    """Write ``runs.csv``, ``seeds.csv``, ``recipes.csv``, ``curves.csv``, and each chart as PNG and SVG. Returns the
    paths.

    Raises:
        UserError: ``directory`` cannot be written.
    """
    drawn = charts(runs)
    tables = {"runs": runs_table(runs), "seeds": groups_table(groups(runs)), "recipes": differences_table(runs)}
    written = []
    try:
        directory.mkdir(parents=True, exist_ok=True)
        refuse_links_out(directory)
        for name, table in tables.items():
            if table is not None:
                written.append(directory / f"{name}.csv")
                written[-1].write_text(table.csv())
        written.append(directory / "curves.csv")
        _write_curves(drawn, written[-1])
        for chart in drawn:
            written += save(draw(chart), directory / _file_name(chart.title))
        for run in runs:
            if run.mixing:
                written += save(draw_mixing(run), directory / _file_name(f"mixing {run.name}"))
    except OSError as error:
        raise UserError(f"--figures {directory} cannot be written: {error.strerror or error}") from None
    return written


def draw(chart: Chart) -> Figure:
    """Draw the last view of a chart (means over seeds, where there are any) by its first axis, with a legend."""
    series = list(chart.views.values())[-1]
    axis = next(iter(series[0].x))
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    plot = figure.add_subplot()
    for i, line in enumerate(one for one in series if axis in one.x):
        _draw_line(plot, line, axis, COLOURS[i % len(COLOURS)], DASHES[i // len(COLOURS) % len(DASHES)])
    if axis in chart.categories:
        plot.set_xticks(range(len(chart.categories[axis])), chart.categories[axis])
    plot.set(title=_plain(chart.title), xlabel=_plain(axis), ylabel=_plain(chart.y))
    if len(series) > 1:
        plot.legend(frameon=False, fontsize=8)
    return figure


def draw_mixing(run: Run) -> Figure:
    """Draw |d| of every layer (row) and shared rank (column), one panel per kind."""
    figure = Figure(figsize=(9, 1.2 + 1.9 * -(-len(run.mixing) // 3)), layout="constrained")
    panels = figure.subplots(-(-len(run.mixing) // 3), 3, squeeze=False).ravel()
    for panel in panels[len(run.mixing) :]:
        panel.set_axis_off()
    for panel, (kind, d) in zip(panels, run.mixing.items(), strict=False):
        image = panel.imshow(d.numpy(), aspect="auto", cmap="Blues", vmin=0, interpolation="nearest")
        panel.set_title(_plain(kind), fontsize=9)
        figure.colorbar(image, ax=panel)
    figure.supxlabel("shared rank", fontsize=9)
    figure.supylabel("layer", fontsize=9)
    return figure


def _draw_line(plot: Axes, line: Series, axis: str, colour: str, dash: str) -> None:
    marker = "o" if len(line.y) <= 40 else None
    plot.plot(
        line.x[axis], line.y, color=colour, linestyle=dash, marker=marker, ms=3.5, lw=1.5, label=_plain(line.name)
    )
    if line.spread:
        low, high = ([y + sign * s for y, s in zip(line.y, line.spread, strict=True)] for sign in (-1, 1))
        plot.fill_between(line.x[axis], low, high, color=colour, alpha=0.16, lw=0)


def _write_curves(drawn: Sequence[Chart], path: Path) -> None:
    """Write all points in long format, with the columns chart, view, line, axis, x, y and spread."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["chart", "view", "line", "axis", "x", "y", "spread"])
        for chart in drawn:
            for view, series in chart.views.items():
                for line in series:
                    spread: Sequence[float | None] = line.spread or [None] * len(line.y)
                    for axis, xs in line.x.items():
                        rows = zip(xs, line.y, spread, strict=True)
                        writer.writerows([chart.title, view, line.name, axis, *row] for row in rows)


def _file_name(title: str) -> str:
    return re.sub(r"[^\w.=-]+", "-", title.lower()).strip("-")[:100]


def _plain(text: str) -> str:
    """Return text with dollar signs escaped, which matplotlib would otherwise read as mathematics."""
    return text.replace("$", r"\$")
