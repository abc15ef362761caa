"""The command ``rasa-train``: train as a recipe says, and what helps to write a recipe."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UserError, say, shown
from ..recipe import shipped
from ..stop import PARENT, die_with
from .errors import Command, DefaultVerb, start, stoppable, user_errors
from .inspect import inspect
from .recipe_argument import MISSING, AsJson, Overrides, RecipeName

if TYPE_CHECKING:
    from ..recipe.schema import Recipe
    from ..training.summary import Summary

app = typer.Typer(
    cls=DefaultVerb,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    subcommand_metavar="[COMMAND] [RECIPE] [section.key=value]... [OPTIONS]",
    help="""Fine-tune a language model with RaSA, LoRA or a relative, as a recipe says.

    Without a command, rasa-train RECIPE trains:

        rasa-train demo adapter.r=16 training.epochs=2 output_dir=runs/a

    rasa-train run --help lists the options of training.
    """,
)


WORKERS, SWEEPS = "Several workers", "Several runs"
Nproc = Annotated[
    str,
    typer.Option(
        metavar="N|auto", help="Number of workers on this machine; auto: one per GPU.", rich_help_panel=WORKERS
    ),
]
Nnodes = Annotated[
    int,
    typer.Option(metavar="N", min=1, help="Number of machines; run the same command on each.", rich_help_panel=WORKERS),
]
Sweep = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY=V1,V2,...",
        help="Start a run for each value, below output_dir (repeat for a grid). KEY,KEY=V1,V2|W1,W2: together.",
        rich_help_panel=SWEEPS,
    ),
]

TOGETHER = "--sweep-together"
Together = Annotated[
    list[str] | None,
    typer.Option(
        TOGETHER,
        metavar="KEY=V1,V2,... KEY=W1,W2,...",
        help="Start a run for V1 and W1, one for V2 and W2, ...: keys that change together. Ends at the next option.",
        rich_help_panel=SWEEPS,
    ),
]


class Sweeping(Command):
    """A command whose ``--sweep-together`` takes all assignments that follow it."""

    def make_context(self, info_name: Any, args: list[str], *others: Any, **kwargs: Any) -> Any:
        given: list[str] = []
        following = False
        for argument in args:
            named = argument == TOGETHER or argument.startswith(f"{TOGETHER}=")
            following = named or (following and "=" in argument and not argument.startswith("-"))
            again = following and not named and given[-1] != TOGETHER
            given += [TOGETHER, argument] if again else [argument]
        return super().make_context(info_name, given, *others, **kwargs)


@app.command("run", cls=Sweeping)
def run(
    recipe: RecipeName = None,
    overrides: Overrides = None,
    check_only: Annotated[bool, typer.Option("--check", help="Do not train: the same as rasa-train check.")] = False,
    as_json: AsJson = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete the run in output_dir and start over.")] = False,
    nproc: Nproc = "auto",
    nnodes: Nnodes = 1,
    node_rank: Annotated[
        int | None,
        typer.Option(metavar="N", help="Which machine this is, from 0.", rich_help_panel=WORKERS),
    ] = None,
    rdzv: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT", help="Where the machines meet: node 0 and a free port.", rich_help_panel=WORKERS
        ),
    ] = None,
    max_restarts: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            help="Number of restarts from the last checkpoint after a worker has died.",
            rich_help_panel=WORKERS,
        ),
    ] = 0,
    sweep: Sweep = None,
    together: Together = None,
    print_commands: Annotated[
        bool,
        typer.Option(
            "--print", help="With --sweep: print the command of each run instead of running it.", rich_help_panel=SWEEPS
        ),
    ] = False,
    copy_recipe: Annotated[bool, typer.Option("--copy", hidden=True)] = False,
    list_recipes: Annotated[bool, typer.Option("--list", hidden=True)] = False,
    print_schema: Annotated[bool, typer.Option("--schema", hidden=True)] = False,
) -> None:
    """Train as RECIPE says; the word run may be left out.

    Running the same command again resumes an interrupted run.

        rasa-train configs/demo.yaml adapter.r=16 training.epochs=2 output_dir=runs/a
    """
    with user_errors(), stoppable():
        if list_recipes:
            return list_(as_json)
        if print_schema:
            return schema()
        if recipe is None:
            raise UserError(MISSING)
        if copy_recipe:
            if len(overrides or []) > 1:
                raise UserError("--copy takes a recipe and one destination")
            return copy(recipe, *overrides or [])
        if nproc != "auto" and not (nproc.isdecimal() and int(nproc) > 0):
            raise UserError(f"--nproc must be a number of processes or auto, got {nproc!r}")
        from ..recipe.load import load_recipe

        if sweep or together or print_commands:
            given = {"--check": check_only, "--fresh": fresh}
            flags = [flag for flag, on in given.items() if on]
            valued = {"--nproc": (nproc, "auto"), "--max-restarts": (max_restarts, 0)}
            flags += [f"{name}={value}" for name, (value, default) in valued.items() if value != default]
            if nnodes > 1 or int(os.environ.get("WORLD_SIZE", "1")) > 1:
                raise UserError(
                    "--sweep starts its runs on one machine; --print gives the command of each, for a queue"
                )
            if recipe in {verb.name for verb in app.registered_commands}:
                recipe = f"./{recipe}"  # the commands of the runs must not take the file for a verb
            sys.exit(_sweep(recipe, overrides or [], (sweep or [], together or []), flags, print_commands, as_json))
        first = os.environ.get("LOCAL_RANK", "0") == "0"  # of this machine: it reports what all of them see
        try:
            loaded = load_recipe(recipe, overrides or [])
        except UserError:
            if not first:
                sys.exit(2)
            raise
        for notice in loaded.notices if first else ():
            say(notice, file=sys.stderr)
        try:
            from ..launch.launch import launch, number
            from ..launch.supervisor import Workers, WorkersFailed

            workers = Workers("auto" if nproc == "auto" else int(nproc), nnodes, node_rank, rdzv, max_restarts)
            if check_only:
                _check(loaded.recipe, number(workers), nnodes, as_json)
                return
            try:
                finished = launch(loaded.recipe, workers, fresh=fresh)
            except WorkersFailed as error:
                say(f"error: {error}", file=sys.stderr)
                sys.exit(1)
        except UserError as error:
            raise loaded.explain(error) from None
        if finished.summary is not None:
            _finish(loaded.recipe, finished.summary, finished.was_complete, as_json)


@app.command("check", cls=Sweeping)
def check(
    recipe: RecipeName = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
    nproc: Nproc = "auto",
    nnodes: Nnodes = 1,
    sweep: Sweep = None,
    together: Together = None,
) -> None:
    """Print what a run would be: parameters, steps, memory, time.

    Nothing is trained, and nothing is written. The exit code is 2 if the run cannot be made here ("not ready"): data or
    weights are missing, or memory or disk do not suffice. distributed.gpu_memory_gib=80 checks for a GPU elsewhere.

        rasa-train check math_llama8b_r8 --nproc 8
    """
    run(recipe, overrides, check_only=True, as_json=as_json, nproc=nproc, nnodes=nnodes, sweep=sweep, together=together)


app.command("inspect", cls=Command)(inspect)


@app.command("list", cls=Command)
def list_(as_json: AsJson = False) -> None:
    """List the shipped recipes with parameters and memory of each."""
    print(json.dumps({"recipes": shipped.measured()}) if as_json else shown(shipped.table()))


@app.command("copy", cls=Command)
def copy(
    recipe: RecipeName = None,
    destination: Annotated[
        str | None, typer.Argument(metavar="DESTINATION", help="File or directory to write. (default: here)")
    ] = None,
) -> None:
    """Copy a shipped recipe, to start one of your own.

    rasa-train copy math_llama8b_r8 my.yaml
    """
    with user_errors():
        if recipe is None:
            raise UserError(MISSING)
        from ..recipe.load import copy_recipe

        say(copy_recipe(recipe, destination))


@app.command("schema", cls=Command)
def schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    from ..recipe.schema import Recipe

    print(json.dumps(Recipe.model_json_schema(), indent=2))


@app.command("demo_classify", cls=Command)
def demo_classify(
    output: Annotated[Path, typer.Option(help="Directory for the encoder, the texts and the runs.")] = Path(
        "runs/demo_classify"
    ),
    as_json: AsJson = False,
) -> None:
    """Compare methods on a small classifier, in a minute or two.

    Full fine-tuning, BitFit, LoRA and RaSA of an encoder that is made here, on generated reviews. Nothing is
    downloaded.
    """
    with user_errors(), stoppable():
        from ..demo.classify import compare, table

        try:
            results = compare(output, lambda line: say(line, file=sys.stderr))
        except OSError as error:
            raise UserError(
                f"{output} cannot be written: {error.strerror}; give another directory with --output"
            ) from None
        print(json.dumps(results) if as_json else shown(table(results)))


def _finish(recipe: Recipe, summary: Summary, was_complete: bool, as_json: bool) -> None:
    if as_json:
        print(json.dumps(summary))
        return
    output_dir = recipe.output_dir
    loss = "unknown" if summary["loss"] is None else f"{summary['loss']:.4f}"  # every step may have been skipped
    if was_complete:
        say(f"{output_dir} is complete ({summary['steps']} steps, last loss {loss}); --fresh starts over")
    else:
        done = "stopped early after" if summary.get("stopped_early") else "done:"
        say(f"{done} {summary['steps']} steps, last loss {loss}; the adapter is in {output_dir}/adapter")
        if why := recipe.adapter.unmerged:
            say(f"it cannot be merged ({why}); evaluate it inside the base with rasa-eval {output_dir}")
            if recipe.adapter.method == "peft":
                say(f"write it for PEFT with: rasa-merge {output_dir} --format peft --output {output_dir}/peft")
        else:
            say(f"merge it with: rasa-merge {output_dir} --output {output_dir}/merged")
    if best := summary.get("best"):
        say(f"the best is step {best['step']} ({best['measure']} {best['value']:.4f}): add --checkpoint best")


def _sweep(
    recipe: str,
    overrides: list[str],
    sweeps: tuple[list[str], list[str]],
    flags: list[str],
    print_commands: bool,
    as_json: bool,
) -> int:
    """Run or print a sweep. Returns exit code 0 if every run is complete, otherwise that of the first that failed.

    Args:
        sweeps: values of ``--sweep`` and of ``--sweep-together``.
    """
    from ..recipe.sweep import commands, grid, run

    if not any(sweeps):
        raise UserError("--print needs a sweep: say what to sweep, for example --sweep adapter.r=8,16")
    points = grid(recipe, overrides, *sweeps)
    if print_commands:
        lines = commands(points, flags)
        print(json.dumps(lines) if as_json else shown("\n".join(lines)))
        return 0
    flags = [*flags, "--json"] if as_json else flags
    outcomes = run(points, flags, lambda line: say(line, sys.stderr), capture=as_json)
    failed = [outcome for outcome in outcomes if outcome.exit_code]
    if as_json:
        print(json.dumps({"runs": [outcome.as_json() for outcome in outcomes]}))
    else:
        failures = [f"  failed: {o.point.name}" for o in failed]
        say("\n".join([f"{len(outcomes) - len(failed)} of {len(outcomes)} runs done", *failures]))
        say(f"compare them with: rasa-report {points[0].output_dir.parent}")
    return failed[0].exit_code if failed else 0


def _check(recipe: Recipe, workers: int, nodes: int, as_json: bool) -> None:
    from ..check.check import check

    result = check(recipe, workers, nodes)
    if as_json:
        print(json.dumps(result.as_json()))
    else:
        result.show()
    if not result.ready:
        sys.exit(2)


def main() -> None:
    """Entry point of the console script."""
    if parent := os.environ.pop(PARENT, None):
        die_with(int(parent), signal.SIGTERM)
    try:
        start(app, result_on_stdout=False)  # the result is in the run directory
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
