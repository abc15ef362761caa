"""The command ``rasa-train``: train as a recipe says."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UserError
from ..recipe import shipped
from .errors import Command, user_errors

if TYPE_CHECKING:
    from ..recipe.schema import Recipe
    from ..training.trainer import Summary

app = typer.Typer(
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _recipes(incomplete: str) -> list[str]:
    """Return what a shell offers after ``rasa-train``: shipped recipes, and existing YAML files and directories."""
    parent = Path(incomplete if incomplete.endswith("/") else Path(incomplete).parent)
    near = sorted(parent.glob("*")) if parent.is_dir() else []
    files = [f"{path}/" if path.is_dir() else str(path) for path in near if path.is_dir() or path.suffix == ".yaml"]
    return [name for name in (*files, *shipped.runnable()) if name.startswith(incomplete)]


@app.command(cls=Command)
def train(
    recipe: Annotated[
        str | None, typer.Argument(help="A YAML recipe, or the name of a shipped one.", autocompletion=_recipes)
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[section.key=value]...", help="Values to replace in the recipe.")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Print what the run would be, and do not train.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, and nothing else.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete the run in output_dir and start over.")] = False,
    nproc: Annotated[
        str, typer.Option("--nproc", metavar="N|auto", help="Number of workers on this machine; auto: one per GPU.")
    ] = "auto",
    nnodes: Annotated[
        int, typer.Option("--nnodes", min=1, help="Number of machines; run the same command on each.")
    ] = 1,
    node_rank: Annotated[int | None, typer.Option("--node-rank", help="Which machine this is, from 0.")] = None,
    rdzv: Annotated[
        str | None, typer.Option("--rdzv", metavar="HOST:PORT", help="Where the machines meet: node 0 and a free port.")
    ] = None,
    max_restarts: Annotated[
        int,
        typer.Option(
            "--max-restarts", min=0, help="Number of restarts from the last checkpoint after a worker has died."
        ),
    ] = 0,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            "--sweep", metavar="KEY=V1,V2,...", help="Start a run for each value, below output_dir (repeat for a grid)."
        ),
    ] = None,
    print_commands: Annotated[
        bool, typer.Option("--print", help="With --sweep: print the command of each run instead of running it.")
    ] = False,
    copy: Annotated[
        bool, typer.Option("--copy", help="Copy the shipped RECIPE to the file or directory that follows it (or here).")
    ] = False,
    list_recipes: Annotated[
        bool, typer.Option("--list", help="List the shipped recipes with parameters and memory of each.")
    ] = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of recipes, for editors.")] = False,
) -> None:
    """Fine-tune a language model with RaSA, LoRA or a relative, as RECIPE says.

    Running the same command again resumes an interrupted run.

        rasa-train configs/demo.yaml adapter.r=16 training.epochs=2 output_dir=runs/a
    """
    with user_errors():
        if list_recipes:
            print(json.dumps({"recipes": shipped.measured()}) if as_json else shipped.table())
            return
        if schema:
            from ..recipe.schema import Recipe

            print(json.dumps(Recipe.model_json_schema(), indent=2))
            return
        if recipe is None:
            raise UserError("RECIPE is missing, for example: rasa-train configs/demo.yaml (--help lists the options)")
        if copy:
            from ..recipe.load import copy_recipe

            if len(overrides or []) > 1:
                raise UserError("--copy takes a recipe and one destination")
            print(copy_recipe(recipe, overrides[0] if overrides else None))
            return
        if nproc != "auto" and not (nproc.isdecimal() and int(nproc) > 0):
            raise UserError(f"--nproc must be a number of processes or auto, got {nproc!r}")
        from ..recipe.load import load_recipe

        if sweep or print_commands:
            given = {"--check": check, "--fresh": fresh}
            flags = [flag for flag, on in given.items() if on]
            valued = {"--nproc": (nproc, "auto"), "--max-restarts": (max_restarts, 0)}
            flags += [f"{name}={value}" for name, (value, default) in valued.items() if value != default]
            if nnodes > 1 or int(os.environ.get("WORLD_SIZE", "1")) > 1:
                raise UserError(
                    "--sweep starts its runs on one machine; --print gives the command of each, for a queue"
                )
            sys.exit(_sweep(recipe, overrides or [], sweep or [], flags, print_commands, as_json))
        try:
            loaded = load_recipe(recipe, overrides or [])
        except UserError:
            if os.environ.get("LOCAL_RANK", "0") != "0":
                sys.exit(2)  # the first worker of this machine reports it
            raise
        try:
            from ..launch.launch import launch, number
            from ..launch.supervisor import Workers, WorkersFailed

            workers = Workers("auto" if nproc == "auto" else int(nproc), nnodes, node_rank, rdzv, max_restarts)
            if check:
                _check(loaded.recipe, number(workers), as_json)
                return
            try:
                finished = launch(loaded.recipe, workers, fresh=fresh)
            except WorkersFailed as error:
                print(f"error: {error}", file=sys.stderr)
                sys.exit(1)
        except UserError as error:
            raise loaded.explain(error) from None
        if finished.summary is not None:
            _finish(loaded.recipe.output_dir, finished.summary, finished.was_complete, as_json)


def _finish(output_dir: str, summary: Summary, was_complete: bool, as_json: bool) -> None:
    if as_json:
        print(json.dumps(summary))
    elif was_complete:
        print(f"{output_dir} is complete ({summary['steps']} steps, loss {summary['loss']:.4f}); --fresh starts over")
    else:
        print(f"done: {summary['steps']} steps, loss {summary['loss']:.4f}; the adapter is in {output_dir}/adapter")
        print(f"merge it with: rasa-merge {output_dir} --output {output_dir}/merged")


def _sweep(
    recipe: str, overrides: list[str], sweeps: list[str], flags: list[str], print_commands: bool, as_json: bool
) -> int:
    """Run or print a sweep. Returns exit code 0 if every run is complete, otherwise that of the first that failed."""
    from ..recipe.sweep import commands, grid, run

    if not sweeps:
        raise UserError("--print needs a sweep: say what to sweep, for example --sweep adapter.r=8,16")
    points = grid(recipe, overrides, sweeps)
    if print_commands:
        lines = commands(points, flags)
        print(json.dumps(lines) if as_json else "\n".join(lines))
        return 0
    flags = [*flags, "--json"] if as_json else flags
    outcomes = run(points, flags, lambda line: print(line, file=sys.stderr, flush=True), capture=as_json)
    failed = [outcome for outcome in outcomes if outcome.exit_code]
    if as_json:
        print(json.dumps({"runs": [outcome.as_json() for outcome in outcomes]}))
    else:
        print(
            f"{len(outcomes) - len(failed)} of {len(outcomes)} runs done",
            *(f"  failed: {o.point.name}" for o in failed),
            sep="\n",
        )
        print(f"compare them with: rasa-report {points[0].output_dir.parent}")
    return failed[0].exit_code if failed else 0


def _check(recipe: Recipe, workers: int, as_json: bool) -> None:
    from ..check.check import check

    result = check(recipe, workers)
    if as_json:
        print(json.dumps(result.as_json()))
    else:
        result.show()
    if result.shortages:
        sys.exit(2)


def main() -> None:
    try:
        app()
    except SystemExit as end:
        torch = sys.modules.get("torch")
        if torch and torch.distributed.is_initialized():
            # Skip the interpreter's shutdown: threads of gloo sometimes abort in it, after all work is done.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(end.code if isinstance(end.code, int) else 1)
        raise


if __name__ == "__main__":
    main()
