"""What ``rasa-analyze`` prints and draws."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError, say, shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..analysis.against_base import AtRank
    from ..analysis.subspace import Side
    from ..analysis.updates import Updates


def against_base_found(
    runs: Mapping[str, Updates],
    ranks: list[int] | None,
    directions: tuple[int | None, Side],
    plots: Path | None,
    as_json: bool,
) -> None:
    """Print, and draw, the comparison of each update of some runs with the base's weight."""
    from ..analysis.against_base import Wanted, against_base

    wanted = Wanted(ranks, *directions)
    found = [(run, site) for run, updates in runs.items() for site in against_base(updates, wanted)]
    if plots is not None:
        from ..analysis.plots import against_base as picture

        sites = {site.name: site for _, site in found if site.rank}
        figures = {}
        for name, last in sites.items():
            own = {run: site for run, site in found if site.name == name and site.rank and site.sizes == last.sizes}
            grids = {Path(run).name if len(own) > 1 else "dW": site.grid for run, site in own.items()}
            figures[f"against-base-{name}"] = picture({**grids, "random": last.random_grid}, last.sizes, name)
        save(plots, figures)
    if as_json:
        print(json.dumps({"side": wanted.side, "sites": [{"run": run, **site.as_json()} for run, site in found]}))
        return
    columns = ["name", "r", "phi", "random", "|U'WV|", "of W", "of rand.", "factor"]
    for run in runs:
        cells = []
        for site in (site for name, site in found if name == run):
            rows = [
                [str(at.r), f"{at.phi:.3f}", f"{at.random:.3f}", *(f"{x:.3g}" for x in _norms(at))] for at in site.ranks
            ] or [["0", *"------"]]
            cells += [[site.name if not number else "", *row] for number, row in enumerate(rows)]
        title = f"{run}: phi(dW, W, r, r), {wanted.side} singular vectors; ||U'WV|| of dW's, W's and random directions"
        table(f"{title}; factor: ||dW|| / ||U'WV||", columns, cells)


def _norms(at: AtRank) -> tuple[float, ...]:
    return at.projection, at.projection_own, at.projection_random, at.factor


def save(directory: Path, figures: Mapping[str, Figure]) -> None:
    from ..analysis.plots import save

    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, figure in figures.items():
            save(figure, directory / name)
    except OSError as error:
        raise UserError(f"--plots {directory} cannot be written: {error.strerror or error}") from None
    say(f"{2 * len(figures)} pictures in {directory}", file=sys.stderr)


def table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*(escape(shown(cell)) for cell in row))
    Console(highlight=False).print(table)


@contextmanager
def bar(total: int) -> Iterator[Callable[[], None]]:
    """Yield a function that advances a progress bar on stderr, if stderr is a terminal, and does nothing otherwise."""
    if not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    with Progress(
        BarColumn(bar_width=None), MofNCompleteColumn(), TimeRemainingColumn(), console=Console(stderr=True)
    ) as bar:
        task = bar.add_task("", total=total)
        yield lambda: bar.advance(task)
