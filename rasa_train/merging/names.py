"""Find the model parameter to which each tensor of a checkpoint belongs.

The names can differ: a file may lack or have the base model's prefix (``h.0...`` for ``transformer.h.0...``),
have names of an older version, or hold one tensor per expert where the model has one stacked parameter. The
mapping from names to parameters comes from transformers itself, so it is the one that loading a model uses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)


@dataclass(frozen=True, slots=True)
class Piece:
    """The part of a parameter that one tensor of a checkpoint holds: all of it, ``parameter[expert, rows]``, or all of
    it with the last two dimensions exchanged."""

    parameter: str
    expert: int | None = None
    rows: tuple[int, int] | None = None
    transposed: bool = False
    unknown: str | None = None
    """Names of the conversions between file and model, if a merge cannot follow them; None otherwise."""

    @property
    def whole(self) -> bool:
        """Whether the tensor is a whole parameter as it is."""
        return self.expert is None and self.rows is None and not self.transposed

    def of(self, parameter: Tensor) -> Tensor:
        """Return a view of this part of the parameter (or of the parameter's update)."""
        if self.transposed:
            return parameter.mT
        part = parameter if self.expert is None else parameter[self.expert]
        return part if self.rows is None else part[slice(*self.rows)]


def locate(model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Piece]:
    """Return the piece of ``model`` that each tensor of a checkpoint holds, by the tensor's name. Tensors that belong
    to no parameter are left out.

    Args:
        model: may be on the meta device.
        shapes: shape of each tensor of the checkpoint, by the tensor's name.
    """
    parameters = model.state_dict()
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    pieces: dict[str, Piece] = {}
    converted: dict[str, dict[str, list[str]]] = {}  # parameter -> source pattern -> names in the file
    for name in sorted(shapes, key=dot_natural_key):
        parameter, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, parameters)
        if parameter not in parameters:
            parameter, pattern = rename_source_key(name, [], [], model.base_model_prefix, parameters)
        if parameter not in parameters:
            continue
        if pattern is None:
            pieces[name] = Piece(parameter)
        else:
            converted.setdefault(parameter, {}).setdefault(pattern, []).append(name)
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    for parameter, sources in converted.items():
        converter = by_pattern[next(iter(sources))]
        if [type(op) for op in converter.operations] == [Transpose]:
            pieces |= _transposed(parameter, tuple(parameters[parameter].shape), sources, shapes)
        else:
            pieces |= _converted(parameter, converter, sources, shapes)
    return pieces


def _transposed(
    parameter: str, wanted: tuple[int, ...], sources: dict[str, list[str]], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Piece]:
    """Return the piece of a parameter that files hold transposed in its last two dimensions, unless its shape in the
    file is the one that is ``wanted``: loading leaves it as it is then."""
    exchanged = (*wanted[:-2], *wanted[:-3:-1])
    return {
        name: Piece(
            parameter,
            transposed=shapes[name] != wanted,
            unknown=None if shapes[name] in (wanted, exchanged) else "Transpose",
        )
        for names in sources.values()
        for name in names
    }


def _converted(
    parameter: str,
    converter: WeightConverter,
    sources: dict[str, list[str]],
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, Piece]:
    """Return the pieces of a parameter that is stacked over experts, concatenated along its output rows, or both."""
    steps = [(type(op), getattr(op, "dim", None)) for op in converter.operations]
    stacked = bool(steps) and steps[0] == (MergeModulelist, 0)
    rest = steps[1:] if stacked else steps
    if rest not in ([], [(Concatenate, 1 if stacked else 0)]):
        unknown = " + ".join(type(op).__name__ for op in converter.operations)
        return {name: Piece(parameter, unknown=unknown) for names in sources.values() for name in names}
    pieces, row = {}, 0
    for pattern in converter.source_patterns:
        names = sources.get(pattern, [])
        for number, name in enumerate(names):  # names are in natural order, so the position is the expert's number
            rows = shapes[name][0] if shapes[name] else 0
            pieces[name] = Piece(parameter, number if stacked else None, (row, row + rows))
            if not stacked:
                row += rows
        row += shapes[names[0]][0] if names and stacked else 0
    return pieces
