"""rasa-train: train what a recipe says."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from .errors import user_errors

app = typer.Typer(
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command()
def train(
    recipe: Annotated[str | None, typer.Argument(help="A YAML recipe, or the name of a shipped one.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[section.key=value]...", help="Values to replace in it.")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Say what the run would be, and do not train.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, and nothing else.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete the run in output_dir and start over.")] = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of recipes, for editors.")] = False,
) -> None:
    """Fine-tune a language model with RaSA, LoRA or a relative, as RECIPE says.

    The same command again resumes a run that was interrupted.

        rasa-train configs/demo.yaml adapter.r=16 training.epochs=2 output_dir=runs/a
    """
    with user_errors():
        if schema:
            from ..recipe.schema import Recipe

            print(json.dumps(Recipe.model_json_schema(), indent=2))
            return
        if recipe is None:
            raise typer.BadParameter("which recipe? For example: rasa-train configs/demo.yaml", param_hint="RECIPE")
        from ..errors import UserError
        from ..recipe import load_recipe

        loaded = load_recipe(recipe, overrides or [])
        try:
            if check:
                _check(loaded.recipe, as_json)
                return
            from ..launch import launch

            summary = launch(loaded.recipe, fresh=fresh)
        except UserError as error:
            raise loaded.explain(error) from None
        _finish(loaded.recipe.output_dir, summary, as_json)


def _finish(output_dir: str, summary: dict[str, Any] | None, as_json: bool) -> None:
    done = summary is None
    if summary is None:
        from pathlib import Path

        summary = json.loads((Path(output_dir) / "summary.json").read_text())
    if as_json:
        print(json.dumps(summary))
    elif done:
        print(f"{output_dir} is complete ({summary['steps']} steps, loss {summary['loss']:.4f}); --fresh starts over")
    else:
        print(f"done: {summary['steps']} steps, loss {summary['loss']:.4f}; the adapter is in {output_dir}/adapter")
        print(f"merge it with: rasa-merge {output_dir} --output {output_dir}/merged")


def _check(recipe: Any, as_json: bool) -> None:
    from ..check import check

    result = check(recipe)
    if as_json:
        print(json.dumps(result.facts))
    else:
        result.show()


def main() -> None:
    app()


if __name__ == "__main__":
    main()
