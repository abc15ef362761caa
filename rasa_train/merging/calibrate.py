"""Measure the inputs of the linears of the adapted model on training rows, so that rounding knows which errors matter.

The whole model is in memory, in fp32 on the CPU. The second moments of all inputs are not: a pass over
the rows measures as many linears as fit, and there are as many passes as it takes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ..adapters.fold import fold
from ..adapters.site import Site
from ..data.config import DataConfig
from ..data.prepare import prepare
from ..errors import UserError
from ..io.run_dir import RunDirectory
from ..models.load import load_tokenizer
from ..models.vocabulary import with_words
from ..recipe.load import load_recipe
from .options import Rounding
from .rounding import Feedback, principal_directions
from .source import Source
from .verify import base_model

BYTES = 2_000_000_000
"""Bytes of second moments that are measured in one pass over the rows."""
DIRECTIONS = 2048
"""Largest number of directions of a linear."""


def measured(source: Source, wanted: Rounding) -> dict[str, Feedback]:
    """Return the rounding of each linear for the inputs that it has in the adapted model, by the name of its weight.
    Linears that are no ``nn.Linear`` with a single adapter (experts, parts of fused linears, GPT-2's) are left out.

    Raises:
        UserError: there is no recipe that says how rows become tokens, or the rows cannot be read.
    """
    rows = list(_rows(source, wanted))
    model = base_model(source).eval()
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in source.replaced.items():
            if name in parameters and parameters[name].shape == value.shape:
                parameters[name].copy_(value)
        for site in source.sites:
            fold(site, source.adapters[site.path], parameters)
    used = [site.weight for site in source.sites]
    linears = [
        site
        for site in source.sites
        if used.count(site.weight) == 1
        and site.rows is None
        and not (site.lead or site.transposed)
        and isinstance(model.get_submodule(site.path), nn.Linear)
    ]
    result: dict[str, Feedback] = {}
    for some in _passes(linears):
        for names, H in _moments(model, some, rows):
            if (feedback := principal_directions(H, DIRECTIONS)) is not None:
                result |= dict.fromkeys(names, feedback)
    return result


def data_of(wanted: Rounding) -> DataConfig:
    """Return the data of the run's recipe, or the file that is taken instead, read as the recipe reads its rows.

    Raises:
        UserError: the run has no recipe, or there is no such file.
    """
    if wanted.run is None or not (path := RunDirectory(wanted.run).recipe).is_file():
        raise UserError(
            f"--calibrate needs the output_dir of a run, whose recipe.yaml says how rows become tokens; got "
            f"{wanted.run or 'a sum of adapters'}"
        )
    data = load_recipe(path).recipe.data
    if wanted.file is None:
        return data
    if not wanted.file.exists():
        raise UserError(f"--calibration {wanted.file}: there is no such file")
    kept = data.model_dump(include={"template", "supervise", "max_length", "over_length", "cache_dir"})
    columns = next((one.columns for one in data.sets if one.columns), None)
    return DataConfig(dataset=str(wanted.file), columns=columns, **kept)


def _rows(source: Source, wanted: Rounding) -> Iterator[Tensor]:
    """Yield the tokens of examples that are evenly spread over the data, (1, tokens)."""
    data = data_of(wanted)
    assert wanted.run and wanted.rows
    recipe = load_recipe(RunDirectory(wanted.run).recipe).recipe
    tokenizer = load_tokenizer(recipe.model)
    if tokenizer is not None:
        tokenizer = with_words(tokenizer, source.words, str(source.origins[0]))
    examples = prepare(data, tokenizer, task=recipe.task).train
    number = min(wanted.rows, len(examples))
    for place in range(number):
        yield torch.from_numpy(examples[place * len(examples) // number].input_ids).long()[None]


def _passes(linears: Sequence[Site]) -> Iterator[list[Site]]:
    """Yield the linears in groups whose second moments fit into memory together."""
    some: list[Site] = []
    for site in linears:
        if some and 8 * sum(each.in_features**2 for each in [*some, site]) > BYTES:
            yield some
            some = []
        some.append(site)
    if some:
        yield some


@torch.no_grad()
def _moments(model: nn.Module, some: Sequence[Site], rows: Sequence[Tensor]) -> Iterator[tuple[list[str], Tensor]]:
    """Yield the sums of x x^T over the inputs x of linears, (in, in), fp64, each with the names of the weights that
    have these inputs: linears that are called with one tensor, one after the other (q, k and v), share them."""
    found: list[tuple[list[str], Tensor]] = []
    number: dict[str, int] = {}
    last: list[Tensor] = []

    def add(weight: str, x: Tensor) -> None:
        shared = bool(last) and x is last[0]
        last[:] = [x]
        if weight not in number:
            if not shared:
                found.append(([], torch.zeros(x.shape[-1], x.shape[-1], dtype=torch.float64)))
            number[weight] = len(found) - 1
            found[-1][0].append(weight)
        names, H = found[number[weight]]
        if names[0] == weight:
            flat = x.flatten(0, -2).float()
            H.add_(flat.mT @ flat)

    hooks = [
        model.get_submodule(site.path).register_forward_pre_hook(
            lambda _, inputs, weight=site.weight: add(weight, inputs[0])  # type: ignore[misc]
        )
        for site in some
    ]
    try:
        for tokens in rows:
            last.clear()
            model(input_ids=tokens)
    finally:
        for hook in hooks:
            hook.remove()
    last.clear()
    yield from found
