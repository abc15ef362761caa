"""``rasa-report``: compare runs on one HTML page."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import say
from .errors import Command, start, user_errors
from .page_file import write_page

if TYPE_CHECKING:
    from ..report.runs import Run

app = typer.Typer(pretty_exceptions_enable=False)


@app.command(cls=Command)
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Run directories, or directories that hold runs, such as a sweep's."),
    ],
    output: Annotated[Path, typer.Option(help="HTML page to write.")] = Path("report.html"),
    figures: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Directory for the charts as PNG and SVG and the tables as CSV, in addition."),
    ] = None,
    live: Annotated[
        bool, typer.Option("--live", help="Rewrite the page until every run is complete; Ctrl-C stops.")
    ] = False,
    every: Annotated[
        float, typer.Option(metavar="SECONDS", min=0.1, help="Seconds between rewrites with --live.")
    ] = 10.0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the data as one JSON object instead of writing a page.")
    ] = False,
) -> None:
    """Compare runs: one self-contained HTML page with tables, curves and heat maps.

    Unfinished and damaged runs are shown as far as they can be read.

        rasa-report runs/lora runs/rasa --output report.html
    """
    with user_errors():
        from ..errors import UserError
        from ..report.page import render, report_json
        from ..report.runs import find_runs, read_runs

        if live and as_json:
            raise UserError("--live writes pages and --json prints one object: give only one of them")
        found = read_runs(find_runs(runs))
        if figures is not None:
            from ..report.figures import write_figures

            write_figures(found, figures)
        if as_json:
            print(json.dumps(report_json(found)))
            return
        while live and any(run.state != "complete" for run in found):
            write_page(output, render(found, reload_seconds=every), option="--output")
            say(f"{output}: {_states(found)}", file=sys.stderr)
            time.sleep(every)
            found = read_runs(find_runs(runs))
        write_page(output, render(found), option="--output")
        say(f"{output}: {_states(found)}")


def main() -> None:
    """Entry point of the console script."""
    start(app)


def _states(runs: list[Run]) -> str:
    complete = sum(run.state == "complete" for run in runs)
    return f"{len(runs)} run{'' if len(runs) == 1 else 's'}, {complete} complete"


if __name__ == "__main__":
    main()
