"""``rasa-train inspect``: the examples of a recipe, with what is trained on marked."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..errors import UserError, say
from .errors import stoppable, user_errors
from .page_file import write_page
from .recipe_argument import MISSING, AsJson, Overrides, RecipeName


def inspect(
    recipe: RecipeName = None,
    overrides: Overrides = None,
    samples: Annotated[
        int, typer.Option(metavar="N", min=1, max=1000, help="Number of examples of each data set.")
    ] = 4,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the examples to one HTML page instead of printing them.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show examples as the model will see them, and which of their tokens are trained on.

    The first, the longest, the shortest and random examples of each data set;
    lengths, the share of tokens trained on, whether the end of a text is one.
    Needs the tokenizer of the model, but no weights.

        rasa-train inspect demo --samples 8 --html examples.html
    """
    with user_errors(), stoppable():
        if recipe is None:
            raise UserError(MISSING)
        from ..recipe.load import load_recipe

        loaded = load_recipe(recipe, overrides or [])
        for notice in loaded.notices:
            say(notice, file=sys.stderr)
        from ..check.examples import inspect as inspect_data
        from ..check.examples_text import show

        try:
            found = inspect_data(loaded.recipe, samples)
        except UserError as error:
            raise loaded.explain(error) from None
        if html is not None:
            from ..check.examples_page import page

            write_page(html, page(found), option="--html")
        if as_json:
            print(json.dumps(found.as_json()))
        else:
            show(found, examples=html is None)
        if html is not None:
            say(f"{html}: {len(found.examples)} examples", file=sys.stderr if as_json else sys.stdout)
