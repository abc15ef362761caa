"""The rows of new words in what a merge or an export writes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..adapters.contract import PeftConfig
from ..errors import UserError
from ..io.checkpoint_files import Stored
from ..models.words import ROWS, places, rows_before
from .source import Source
from .tally import Tally, norm2
from .tied import only_names

BLOCK = 1 << 20
"""Values of an embedding that are read at a time."""


@dataclass(frozen=True)
class NewRows:
    """Rows that replace those of a weight from ``first``, or follow its last row."""

    first: int
    rows: Tensor
    """(n, width), or (n) for a bias."""

    @property
    def end(self) -> int:
        """The number after that of the last row."""
        return self.first + len(self.rows)


def weight_of(name: str) -> str:
    """Return the name of the weight that a trained parameter of the base is part of."""
    return f"{name.removesuffix(ROWS)}weight" if name.rpartition(".")[2] == ROWS else name


def rows_of(source: Source) -> dict[str, NewRows]:
    """Return the rows that the embedding, the head and the head's bias get from an adapter with new words, by the name
    of the parameter. A weight that is trained whole gets all its rows."""
    found: dict[str, NewRows] = {}
    if source.words is None:
        return found
    before, names = rows_before(source.model), only_names(source.model)
    for path, module in places(source.model).items():
        for leaf, parameter in module.named_parameters(recurse=False):
            name = f"{path}.{leaf}"
            name = names.get(name, name)
            if leaf == ROWS and name in source.replaced:
                found[weight_of(name)] = NewRows(source.words.first, source.replaced[name])
            elif leaf != ROWS and name in source.replaced:
                found[name] = NewRows(0, source.replaced[name])
            elif leaf == "bias" and len(parameter) > before:
                found[name] = NewRows(before, torch.zeros(len(parameter) - before))
    return found


def with_rows(tensor: Stored, new: NewRows, dtype: torch.dtype, tally: Tally) -> Iterator[Tensor]:
    """Yield a stored embedding, head or bias with its new rows, in blocks of rows: the values of all other rows are
    those of the base, in ``dtype``."""
    height = tensor.shape[0]
    flat = len(tensor.shape) == 1
    blocks = [(slice(0, height), tensor.read())] if flat else tensor.blocks(max(1, BLOCK // max(tensor.shape[1], 1)))
    for where, W in blocks:
        stored = W.to(dtype, copy=True)
        start, stop = max(where.start, new.first), min(where.stop, new.end)
        if start < stop:
            rows = new.rows[start - new.first : stop - new.first].float()
            place = slice(start - where.start, stop - where.start)
            stored[place] = rows.to(dtype)
            tally.update2 += norm2(rows - W[place].float())
            tally.error2 += norm2(rows - stored[place].float())
        yield stored
    if new.end > height:
        rows = new.rows[max(height - new.first, 0) :].float()
        tally.update2 += norm2(rows)
        tally.error2 += norm2(rows - rows.to(dtype).float())
        yield rows.to(dtype)


def for_peft(source: Source) -> tuple[dict[str, Tensor], PeftConfig]:
    """Return the rows of new words by PEFT's names, fp32, and the keys of PEFT's configuration that say what they are:
    ``trainable_token_indices``, or ``modules_to_save`` where the whole embedding and head are trained.

    Raises:
        UserError: the head is tied to the embedding and trained whole, or has a bias that grows.
    """
    rows = rows_of(source)
    if source.words is None or not rows:
        return {}, {}
    tied, tensors, indices, saved = only_names(source.model), dict[str, Tensor](), dict[str, list[int]](), list[str]()
    for path, module in places(source.model).items():
        name = f"{path}.weight"
        if "bias" in dict(module.named_parameters(recurse=False)) and source.words.tokens:
            raise UserError(
                f"{path} has a bias, which PEFT cannot hold for new words: use --format merged (--format lora and peft "
                "are for heads without one)"
            )
        if tied.get(name, name) not in rows:
            continue
        new = rows[tied.get(name, name)]
        if tuple(new.rows.shape) == tuple(module.weight.shape):  # type: ignore[arg-type]
            saved.append(path)
            tensors[f"base_model.model.{name}"] = new.rows.float().clone()  # a file holds a tied tensor under two names
        elif name not in tied:  # PEFT gives a tied head the rows of the embedding
            indices[path] = list(range(new.first, new.end))
            tensors[f"base_model.model.{path}.token_adapter.trainable_tokens_delta"] = new.rows.float().contiguous()
    config: PeftConfig = {}
    if indices:
        config["trainable_token_indices"] = indices
    if saved:
        config["modules_to_save"] = saved
        config["ensure_weight_tying"] = any(f"{path}.weight" in tied for path in saved)
    return tensors, config
