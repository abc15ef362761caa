"""New words: rows that are added to the embedding and the head of a model, and trained beside the frozen rows.

The rows are a parameter of their own, ``new_rows`` (words, width), fp32, at the embedding and at the head (one
parameter for both if they are tied). Hooks put them in place of the rows of the frozen weight, so no gradient ever has
the size of the whole table, and the frozen weight keeps its name. Ids of new words follow those of the tokenizer: where
the model has rows that its tokenizer does not use, these are taken, and otherwise the weights grow.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from .vocabulary import Words

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

ROWS = "new_rows"
"""Name of the parameter of an embedding or a head that holds the rows of the new words."""
STATE = "rasa_train_words"
"""Name of the attribute of a model that holds its words, and of a module that holds what was changed."""


@dataclass(frozen=True)
class _Placed:
    """Words in a model, and what it had in their place."""

    words: Words
    rows: int
    """Number of rows of the embedding before."""
    unused: list[Tensor]
    """Rows that its tokenizer did not use and that the words have taken, of each of ``places``."""


def places(model: nn.Module) -> dict[str, nn.Module]:
    """Return the embedding of a model, and its head if it is a language model, by path. The two may be tied."""
    found = [model.get_input_embeddings(), model.get_output_embeddings()]  # type: ignore[operator]
    paths = {id(module): path for path, module in model.named_modules()}
    return {paths[id(module)]: module for module in found if module is not None}


def put(model: PreTrainedModel, words: Words | None, name: str = "the base") -> None:
    """Put the rows of new words into a model, frozen. On the meta device they have no values; without pieces they are
    zeros.

    Raises:
        UserError: the embedding or the head of the model is none that rows can be added to, or its tokenizer has more
            tokens than the model has rows.
    """
    if words is None:
        return
    modules = places(model)
    for path, module in modules.items():
        _check(path, module, model, name)
    embedding = next(iter(modules.values()))
    before = int(embedding.weight.shape[0])  # type: ignore[union-attr, index]
    if words.tokens and words.first > before:
        raise UserError(
            f"model.add_tokens: the tokenizer of {name} has {words.first} tokens, and the model has {before} rows: "
            "give the tokenizer that the model was trained with (model.tokenizer)",
            key="model.add_tokens",
        )
    taken = slice(words.first, min(words.rows, before))
    unused = [module.weight[taken].detach().clone() for module in modules.values()]  # type: ignore[union-attr, index, operator]
    setattr(model, STATE, _Placed(words, before, unused))
    _resize(model, max(before, words.rows))
    if not words.tokens:
        return
    made: dict[int, nn.Parameter] = {}
    for module in modules.values():
        weight: Tensor = module.weight  # type: ignore[assignment]
        if id(weight) not in made:
            made[id(weight)] = nn.Parameter(_start(weight, words), requires_grad=False)
        module.register_parameter(ROWS, made[id(weight)])
        hook = _embedded if isinstance(module, nn.Embedding) else _predicted
        setattr(module, STATE, (words.first, module.register_forward_hook(hook, with_kwargs=True)))


def words_of(model: nn.Module) -> Words | None:
    """Return the words that were put into a model; None if there are none."""
    found: _Placed | None = getattr(model, STATE, None)
    return found.words if found else None


def rows_before(model: nn.Module) -> int:
    """Return the number of rows that the embedding of a model had before ``put``."""
    placed: _Placed = getattr(model, STATE)
    return placed.rows


def rows_after(model: nn.Module) -> int | None:
    """Return the number of rows that the embedding of a model has with its new words; None for a model without."""
    words = words_of(model)
    return max(rows_before(model), words.rows) if words and words.tokens else None


def first_of(module: nn.Module) -> int:
    """Return the id of the first word whose row an embedding or a head holds as a parameter of its own."""
    return int(module.__dict__[STATE][0])


def row_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the rows of new words by the name of the parameter, each once."""
    return (
        {} if words_of(model) is None else {n: p for n, p in model.named_parameters() if n.rpartition(".")[2] == ROWS}
    )


def own_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that are saved because of the words: their rows, and the weights that are trained whole."""
    words, found = words_of(model), row_parameters(model)
    if words is not None and words.train == "all":
        weights = {id(module.weight) for module in places(model).values()}
        found |= {name: parameter for name, parameter in model.named_parameters() if id(parameter) in weights}
    return found


def check_start(model: nn.Module, saved: Words | None, origin: str) -> None:
    """Raise ``UserError`` if a model does not have the new words of the adapter whose values are loaded into it."""
    words = words_of(model)
    if saved is None:
        return
    texts = [new.token for new in saved.tokens]
    same = words is not None and (words.first, words.tokens) == (saved.first, saved.tokens)
    if not same or words is None or (words.train == "all") != (saved.train == "all"):
        raise UserError(
            f"{origin} was trained with model.add_tokens: {texts} and model.train_embeddings: {saved.train}, its first "
            f"new word being token {saved.first}: give the model the same words and rows"
        )


def trained_names(model: nn.Module, by_method: Iterable[str]) -> set[str]:
    """Return the names of the parameters that are trained because of the words, and let the model compute with them.

    Args:
        by_method: names of the parameters of the base that the method trains itself: where the whole weight is among
            them, the rows become part of it.
    """
    words = words_of(model)
    if words is None:
        return set()
    whole = {id(model.get_parameter(name)) for name in by_method}
    for module in places(model).values():
        if words.train == "all" or id(module.weight) in whole:
            absorb(module)
        if words.train == "all" and id(module.weight) not in whole:
            _compute_in(module, module.weight.dtype)  # type: ignore[arg-type]
    return set() if words.train == "none" else set(own_parameters(model))


@torch.no_grad()
def absorb(module: nn.Module) -> None:
    """Write the rows of new words into the weight of an embedding or a head, and forget them. Does nothing for a module
    without such rows."""
    if ROWS not in module._parameters:
        return
    rows, first = module._parameters[ROWS], first_of(module)
    weight: Tensor = module.weight  # type: ignore[assignment]
    assert rows is not None
    weight[first : first + len(rows)] = rows.to(weight.dtype)
    module.__dict__.pop(STATE)[1].remove()
    del module._parameters[ROWS]


def release(model: nn.Module, *, keep: bool) -> None:
    """Let a model be an ordinary one again. ``keep``: with the new rows in its weights; else without them, as it was
    before ``put``."""
    found: _Placed | None = model.__dict__.pop(STATE, None)
    if found is None:
        return
    for module, unused in zip(places(model).values(), found.unused, strict=True):
        absorb(module)
        if not keep:
            start = found.words.first
            module.weight.data[start : start + len(unused)] = unused  # type: ignore[union-attr, operator, index]
        if (computing := module.__dict__.pop("rasa_train_computing", None)) is not None:
            dtype, undo = computing
            undo()
            module.weight.data = module.weight.data.to(dtype)  # type: ignore[union-attr, operator]
    if not keep:
        _resize(model, found.rows)  # type: ignore[arg-type]


def set_vocabulary(config: dict[str, Any], rows: int) -> None:
    """Set the size of the vocabulary in the contents of a ``config.json``."""
    text = config.get("text_config")
    found = [place for place in (config, text) if isinstance(place, dict) and "vocab_size" in place]
    for place in found or [text if isinstance(text, dict) else config]:
        place["vocab_size"] = rows


def _check(path: str, module: nn.Module, model: nn.Module, name: str) -> None:
    """Raise ``UserError`` if rows cannot be added to an embedding or a head."""
    rows = len(model.get_input_embeddings().weight)  # type: ignore[operator, union-attr, arg-type]
    kind = nn.Embedding if module is model.get_input_embeddings() else nn.Linear  # type: ignore[operator]
    plain = isinstance(module, kind) and len(module.weight) == rows  # type: ignore[arg-type]
    if isinstance(module, nn.Embedding) and type(module).forward is not nn.Embedding.forward:
        plain = plain and hasattr(module, "embed_scale")
    if not plain:
        raise UserError(
            f"model.add_tokens: {path} of {name} is a {type(module).__name__}, to which no rows can be added; leave "
            "add_tokens and train_embeddings out",
            key="model.add_tokens",
        )


def _resize(model: PreTrainedModel, rows: int) -> None:
    """Give the embedding and the head this number of rows; new ones are zeros. Tied weights stay tied."""
    modules = list(places(model).values())
    before = len(modules[0].weight)  # type: ignore[arg-type]
    tensors = {id(t): t for module in modules for t in module.parameters(recurse=False)}
    for tensor in tensors.values():
        if len(tensor) != rows:
            sized = tensor.data.new_zeros(rows, *tensor.shape[1:])
            kept = min(rows, len(tensor))
            sized[:kept] = tensor.data[:kept]
            tensor.data = sized
    for module in modules:
        if isinstance(module, nn.Embedding):
            module.num_embeddings = rows
        else:
            module.out_features = rows  # type: ignore[assignment]
    config: PretrainedConfig = model.config
    for place in (config, config.get_text_config()):
        if getattr(place, "vocab_size", None) == before:
            place.vocab_size = rows
    for module in model.modules():
        if module.__dict__.get("vocab_size") == before:
            module.vocab_size = rows  # type: ignore[assignment]


@torch.no_grad()
def _start(weight: Tensor, words: Words) -> Tensor:
    """Return the first values of the rows of new words: the means of the rows of their pieces, or of all rows for a
    word without pieces."""
    rows = torch.zeros(len(words.tokens), weight.shape[1], device=weight.device)
    if weight.is_meta:
        return rows
    for row, pieces in zip(rows, words.pieces, strict=False):
        if pieces:
            row.copy_(weight[list(pieces)].float().mean(0))
        else:
            row.copy_(weight[: words.first].mean(0, dtype=torch.float32))
    weight[words.first : words.rows] = rows.to(weight.dtype)
    return rows


def _embedded(module: nn.Embedding, args: Any, kwargs: Any, output: Tensor) -> Tensor:
    """Put the rows of new words in place of the frozen ones in the output of an embedding."""
    ids: Tensor = args[0] if args else kwargs["input"]
    rows: Tensor = module.get_parameter(ROWS)
    own = ids - first_of(module)
    new = F.embedding(own.clamp(0, len(rows) - 1), rows).to(module.weight.dtype)
    scale: Any = getattr(module, "embed_scale", None)
    if scale is not None:
        new = new * (scale.to(new.dtype) if isinstance(scale, Tensor) else scale)
    is_new = (own >= 0) & (own < len(rows))
    return torch.where(is_new.unsqueeze(-1), new.to(output.dtype), output)


def _predicted(module: nn.Linear, args: Any, kwargs: Any, output: Tensor) -> Tensor:
    """Put the logits of new words in place of those of the frozen rows in the output of a head."""
    hidden: Tensor = args[0] if args else kwargs["input"]
    rows, first = module.get_parameter(ROWS).to(output.dtype), first_of(module)
    own = slice(first, first + len(rows))
    bias = None if module.bias is None else module.bias[own].to(output.dtype)
    output[..., own] = F.linear(hidden.to(output.dtype), rows, bias)
    return output


def _compute_in(module: nn.Module, dtype: torch.dtype) -> None:
    """Let an embedding or a head whose weight is going to be held in fp32 give its output in ``dtype``."""
    if dtype == torch.float32:
        return
    if isinstance(module, nn.Embedding):
        hook = module.register_forward_hook(lambda _module, _args, output: output.to(dtype))
        undo = hook.remove
    else:
        module.forward = partial(_linear, module)  # type: ignore[method-assign, arg-type]
        undo = partial(module.__dict__.pop, "forward")
    module.__dict__["rasa_train_computing"] = dtype, undo


def _linear(module: nn.Linear, hidden: Tensor) -> Tensor:
    bias = None if module.bias is None else module.bias.to(hidden.dtype)
    return F.linear(hidden, module.weight.to(hidden.dtype), bias)
