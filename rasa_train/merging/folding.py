"""Compute W + dW, tensor by tensor: the values of a merged checkpoint.

stored = round(W + dW)        W + dW in fp32, rounded once, to the dtype that W has in the file
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from ..adapters.contract import FactorAdapter
from ..adapters.site import Site
from ..errors import UserError
from ..io.checkpoint_files import CODES, FLOATS, Checkpoint, Stored, tensor_bytes, write_tensors
from ..kernels.low_rank import Factors
from ..models.words import rows_before
from .bias import new_biases
from .head import names_in_output, new_tensors
from .names import Piece, locate
from .new_rows import NewRows, rows_of, weight_of, with_rows
from .rounding import NARROW, Feedback, own_directions
from .source import Source
from .tally import Tally, norm2
from .tied import only_names

ROWS = 64
"""Rows whose rounding error is measured at a time."""
BLOCK = 1 << 18
"""Values that are folded at a time where dW is a product of factors: few enough for the processor's cache."""
QUANTISED = (
    "an adapter cannot be merged into a quantised base; give the original base with --base, or use --format lora"
)


class Folding:
    """Computes W + dW for each tensor of one checkpoint. The constructor checks everything that headers can show.

    Args:
        source, checkpoint: what is folded into what.
        dtype: dtype of the output; None for that of each tensor.
        aware: whether linears are rounded with error feedback (``rounding.py``), along the directions of their update.
        measured: roundings for the inputs of each linear, by the name of its weight, which are taken instead.

    Raises:
        UserError: the checkpoint lacks an adapted weight, or holds it in a shape, dtype or layout that cannot be
            merged.
    """

    def __init__(
        self,
        source: Source,
        checkpoint: Checkpoint,
        dtype: torch.dtype | None,
        measured: Mapping[str, Feedback] | None = None,
        *,
        aware: bool = False,
    ) -> None:
        self.source, self.checkpoint, self.dtype = source, checkpoint, dtype
        self.measured, self.aware = measured, aware
        self.parameters = dict(source.model.named_parameters())
        self.rows = rows_of(source)
        self.sites: dict[str, list[Site]] = {weight_of(name): [] for name in [*source.replaced, *self.rows]}
        self.biases: dict[str, Tensor] = {}
        for site in source.sites:
            adapter = source.adapters[site.path]
            if adapter.effective_rank:  # otherwise dW = 0, and only the bias changes
                self.sites.setdefault(site.weight, []).append(site)
            if site.bias and (bias := adapter.delta_bias()) is not None:
                self.biases[f"{site.path}.bias"] = bias.detach().float()
                self.sites.setdefault(f"{site.path}.bias", [])
        self.stored = checkpoint.tensors
        found = locate(source.model, {name: tensor.shape for name, tensor in self.stored.items()})
        self.names = names_in_output(source, self.stored, found)
        names = only_names(source.model)
        self.pieces = {n: replace(p, parameter=names.get(p.parameter, p.parameter)) for n, p in found.items()}
        copies: dict[str, dict[str, list[str]]] = {}  # parameter -> name of it -> tensors; tied ones have several names
        for name, piece in found.items():
            parameter = self.pieces[name].parameter
            copies.setdefault(parameter, {}).setdefault(piece.parameter, []).append(name)
        self.sources = {parameter: next(iter(each.values())) for parameter, each in copies.items()}
        self.of_added = Tally()
        self.added, self.switches = self._add_biases()
        self._add_untied()
        self._add_head()
        for parameter in self.sites:
            for tensors in copies.get(parameter, {parameter: list[str]()}).values():
                self._check(parameter, tensors)

    @property
    def adapted(self) -> int:
        """Number of weights and biases that the adapter changes or adds."""
        return len(self.sites) + sum(bool(bias.any()) for added in self.added.values() for bias in added.values())

    @property
    def rounded_dtypes(self) -> set[torch.dtype]:
        """Dtypes of the adapted tensors in the output."""
        return {self._dtype(self.stored[name]) for parameter in self.sites for name in self.sources.get(parameter, [])}

    @property
    def added_bytes(self) -> int:
        """Size of the biases that are added."""
        return sum(bias.nbytes for added in self.added.values() for bias in added.values())

    def stored_bytes(self, tensor: Stored) -> int:
        """Return the size of a tensor in the output, which does not have every tensor of the base."""
        if tensor.name not in self.names:
            return 0
        if tensor.dtype not in FLOATS:
            return tensor.nbytes
        return math.prod(self._shape(tensor)) * self._dtype(tensor).itemsize

    @property
    def largest(self) -> int:
        """Number of values in the largest tensor that is folded as a whole, not in blocks of rows."""
        whole = (n for p in self.sites for n in self.sources[p] if self._factored(self.stored[n]) is None)
        return max((math.prod(self.stored[name].shape) for name in whole), default=0)

    def write(self, file: str, path: Path, tick: Callable[[int], None]) -> Tally:
        """Write the merged counterpart of one base file to ``path``. Threads may write different files in parallel.

        Args:
            tick: called with the number of bytes read, after each tensor.
        Raises:
            UserError: a merged value is not finite.
        """
        tally = Tally()
        tensors = {self.names[t.name]: t for t in self.checkpoint.files[file] if t.name in self.names}
        # Wide dtypes come first, so that every tensor is aligned. Pieces of one parameter stand side by side, so
        # that the parameter's update is computed once.
        order = sorted(tensors.values(), key=lambda t: (self._group(t), t.start))
        entries = [(self.names[t.name], self._code(t), self._shape(t), self.stored_bytes(t)) for t in order]
        added = self.added.get(file, {})
        entries += [(name, CODES[t.dtype], tuple(t.shape), t.nbytes) for name, t in added.items()]
        entries.sort(key=_width, reverse=True)

        def write(name: str, out: BinaryIO) -> None:
            if name in added:
                out.write(tensor_bytes(added[name]))
                return
            tensor = tensors[name]
            if self._adapted(tensor.name):
                for part in self._merged(tensor, tally):
                    out.write(tensor_bytes(part))
            elif self._code(tensor) == tensor.dtype:
                tensor.copy_to(out)
            else:
                out.write(tensor_bytes(self._finite(name, tensor.read().to(self._dtype(tensor)))))
            tick(tensor.nbytes)

        tally.bytes = write_tensors(path, entries, write, self.checkpoint.metadata[file])
        tally.kept = None
        tick(sum(t.nbytes for t in self.checkpoint.files[file] if t.name not in self.names))
        return tally

    # -- one tensor ----------------------------------------------------------------------------------------

    def _merged(self, tensor: Stored, tally: Tally) -> Iterator[Tensor]:
        """Yield the values to store for an adapted tensor, in blocks of rows where dW is a product of factors."""
        if (new := self._rows(tensor)) is not None:
            for part in with_rows(tensor, new, self._dtype(tensor), tally):
                yield self._finite(tensor.name, part)
            return
        if (adapter := self._factored(tensor)) is None:
            yield self._folded(tensor, tally)
            return
        with torch.no_grad():
            factors = adapter.factors()
            Bd, A = factors.Bd.float(), factors.A.float()
            # norm(Bd A)^2 without Bd A
            tally.update2 += float(((Bd.double().mT @ Bd.double()) * (A.double() @ A.double().mT)).sum())
            feedback = self._feedback(tensor, factors)
            for rows, W in tensor.blocks(feedback.rows if feedback else max(BLOCK // max(A.shape[1], 1), 1)):
                yield self._rounded(tensor, (Bd[rows] @ A).add_(W), tally, feedback)

    def _feedback(self, tensor: Stored, factors: Factors | None) -> Feedback | None:
        """Return how the weight of a linear is rounded; None for rounding to nearest."""
        piece = self.pieces[tensor.name]
        if not self.aware or not piece.whole or self._dtype(tensor) not in NARROW:
            return None
        if self.measured is not None:
            return self.measured.get(piece.parameter)
        return own_directions(factors) if factors else None

    def _rows(self, tensor: Stored) -> NewRows | None:
        """Return the rows that a tensor gets, if it is an embedding or a head with new words."""
        piece = self.pieces.get(tensor.name)
        new = None if piece is None or not piece.whole else self.rows.get(piece.parameter)
        return None if new is None or (new.first == 0 and len(new.rows) == tensor.shape[0]) else new

    def _shape(self, tensor: Stored) -> tuple[int, ...]:
        """Return the shape of a tensor in the output."""
        new = self._rows(tensor)
        return tensor.shape if new is None else (max(tensor.shape[0], new.end), *tensor.shape[1:])

    def _factored(self, tensor: Stored) -> FactorAdapter | None:
        """Return the adapter whose product of factors is the only change to a tensor and has the tensor's stored
        layout; None if there is no such adapter."""
        piece = self.pieces[tensor.name]
        sites = self.sites[piece.parameter]
        if len(sites) != 1 or not piece.whole or piece.parameter in self.source.replaced or tensor.dtype == "F64":
            return None
        (site,) = sites
        adapter = self.source.adapters[site.path]
        as_stored = site.rows is None and not site.transposed and not site.lead
        return adapter if as_stored and isinstance(adapter, FactorAdapter) else None

    def _folded(self, tensor: Stored, tally: Tally) -> Tensor:
        piece = self.pieces[tensor.name]
        trained = self.source.replaced.get(piece.parameter)
        W = tensor.read()
        if trained is not None:
            before, W = W.float(), piece.of(trained).clone()
            tally.update2 += norm2(before.sub_(W))
            del before
        if not self.sites[piece.parameter] and piece.parameter not in self.biases:
            return self._rounded(tensor, W, tally)
        W = W.to(torch.promote_types(W.dtype, torch.float32))  # this copy may be overwritten: it becomes W + dW
        update = self._update(piece, W, tally)
        tally.update2 += norm2(update)
        W += update
        del update
        return self._rounded(tensor, W, tally, self._feedback(tensor, None) if W.dtype == torch.float32 else None)

    def _rounded(self, tensor: Stored, W: Tensor, tally: Tally, feedback: Feedback | None = None) -> Tensor:
        """Return ``W`` in the dtype of the output. Where the dtype changes, ``W`` is overwritten."""
        dtype = self._dtype(tensor)
        stored, aware = feedback.round(W, dtype) if feedback else (W.to(dtype), False)
        result = self._finite(tensor.name, stored)
        if feedback and aware:
            tally.aware[tensor.name] = feedback.directions
        if dtype != W.dtype:  # one row at a time would be slow; all rows at once would need a tensor as large as W
            blocks = (torch.split(t if t.ndim else t[None], ROWS) for t in (W, result))
            for some, stored in zip(*blocks, strict=True):
                tally.error2 += norm2(some.sub_(stored.to(W.dtype)))
        return result

    @torch.no_grad()
    def _update(self, piece: Piece, W: Tensor, tally: Tally) -> Tensor:
        """Return dW of one tensor of the checkpoint, fp32, in the tensor's stored layout."""
        if piece.whole:
            return self._parameter_update(piece.parameter, W)
        if tally.kept is None or tally.kept[0] != piece.parameter:
            tally.kept = None
            tally.kept = piece.parameter, self._parameter_update(piece.parameter, None)
        return piece.of(tally.kept[1])

    def _parameter_update(self, parameter: str, W: Tensor | None) -> Tensor:
        sites, shape = self.sites[parameter], self.parameters[parameter].shape
        if parameter in self.biases:
            return self.biases[parameter]
        if W is None and any(self.source.adapters[site.path].needs_weight for site in sites):
            W = torch.empty(shape)
            for name in self.sources[parameter]:
                self.pieces[name].of(W).copy_(self.stored[name].read())
        if len(sites) == 1 and sites[0].rows is None:
            delta = self._delta(sites[0], W)
            return delta.mT if sites[0].transposed else delta
        update = torch.zeros(shape)
        for site in sites:
            place = site.place(update)
            place.add_(self._delta(site, W).reshape(place.shape))
        return update

    def _delta(self, site: Site, W: Tensor | None) -> Tensor:
        """Return dW of one site (*lead, out, in). ``W`` is the parameter that holds the site's weight."""
        return self.source.adapters[site.path].delta(None if W is None else site.view(W))

    def _finite(self, name: str, values: Tensor) -> Tensor:
        # aminmax propagates NaN and infinities, and is forty times faster than isfinite
        if values.numel() and not all(math.isfinite(bound) for bound in torch.aminmax(values)):
            raise UserError(
                f"{name} has values that are not finite after the merge, as {dtype_name(values.dtype)}: the base "
                "or the adapter is damaged, or the dtype is too narrow (then use --dtype bfloat16 or float32)"
            )
        return values

    def _add_biases(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, bool]]:
        """Return the biases that the base does not have, by the file that holds the weight beside each bias, and the
        config switches for them."""
        new = new_biases(self.source)
        added: dict[str, dict[str, Tensor]] = {}
        for parameter, bias in new.tensors.items():
            weight = parameter.removesuffix("bias") + "weight"
            if len(names := self.sources.get(weight, [])) != 1 or not self.pieces[names[0]].whole:
                raise UserError(f"{self.checkpoint.directory} has no tensor for {weight}, to which a bias is added")
            tensor = self.stored[names[0]]
            if tensor.dtype not in FLOATS:
                raise UserError(f"{tensor.name} is {tensor.dtype}: {QUANTISED}")
            name = tensor.name.removesuffix("weight") + "bias"
            stored = self._finite(name, bias.to(self._dtype(tensor)))
            self.of_added.update2 += norm2(bias)
            self.of_added.error2 += norm2(bias - stored.float())
            added.setdefault(tensor.path.name, {})[name] = stored
        return added, dict(new.switches)

    def _add_untied(self) -> None:
        """Add a tensor for each untied name that the checkpoint does not have, beside the one that it was tied to."""
        for group in self.source.untied:
            beside = self.stored[next(self.sources[name][0] for name in group if name in self.sources)]
            for name in group:
                if name not in self.sources:
                    base = beside.read()
                    value = self.source.replaced.get(name, base)
                    self.sites.pop(name, None)
                    stored = self._finite(name, value.to(self._dtype(beside)))
                    self.of_added.update2 += norm2(value.float() - base.float())
                    self.of_added.error2 += norm2(value.float() - stored.float())
                    self.added.setdefault(beside.path.name, {})[name] = stored
        if self.source.untied:
            self.switches["tie_word_embeddings"] = False

    def _add_head(self) -> None:
        """Add the tensors of a classifier's head that the base does not have."""
        if not (new := new_tensors(self.source, self.names)):
            return
        file, beside = next(
            (f, t) for f, tensors in self.checkpoint.files.items() for t in tensors if t.dtype in FLOATS
        )
        for name, tensor in new.items():
            self.sites.pop(name, None)
            stored = self._finite(name, tensor.to(self._dtype(beside)))
            self.of_added.update2 += norm2(tensor)
            self.of_added.error2 += norm2(tensor - stored.float())
            self.added.setdefault(file, {})[name] = stored

    # -- checks and layout, from headers -------------------------------------------------------------------

    def _check(self, parameter: str, names: list[str]) -> None:
        where = self.checkpoint.directory
        if not names:
            raise UserError(f"{where} has no tensor for {parameter}, which is adapted: is it the right base?")
        whole = self.parameters[parameter]
        for name in names:
            piece, tensor = self.pieces[name], self.stored[name]
            if piece.unknown:
                raise UserError(
                    f"{where} stores {parameter} in a form that cannot be merged ({piece.unknown}): use --format lora"
                )
            if tensor.dtype not in FLOATS:
                raise UserError(f"{name} is {tensor.dtype}: {QUANTISED}")
            expected = _shape_of(piece, whole)
            if parameter in self.rows:
                expected = (rows_before(self.source.model), *expected[1:])
            if tensor.shape != expected:
                raise UserError(
                    f"{name} in {tensor.path} has shape {tensor.shape}, but the model's {parameter} needs "
                    f"{expected}: config.json and the weights do not belong to one model"
                )
        if parameter not in self.rows and sum(math.prod(self.stored[name].shape) for name in names) != whole.numel():
            raise UserError(
                f"{where} holds the adapted weight {parameter} only in part, or more than once: {len(names)} tensors"
            )

    def _adapted(self, name: str) -> bool:
        return name in self.pieces and self.pieces[name].parameter in self.sites

    def _dtype(self, tensor: Stored) -> torch.dtype:
        return self.dtype or FLOATS[tensor.dtype]

    def _code(self, tensor: Stored) -> str:
        return CODES[self._dtype(tensor)] if tensor.dtype in FLOATS else tensor.dtype

    def _group(self, tensor: Stored) -> int:
        """Return the position in the file at which the first tensor of the same parameter begins."""
        piece = self.pieces.get(tensor.name)
        if piece is None or piece.whole or piece.parameter not in self.sites:
            return tensor.start
        together = (self.stored[name] for name in self.sources[piece.parameter])
        return min(other.start for other in together if other.path == tensor.path)


def _width(entry: tuple[str, str, tuple[int, ...], int]) -> int:
    """Return the bytes of one value of a tensor to be written."""
    _, _, shape, nbytes = entry
    return nbytes // (math.prod(shape) or 1)


def _shape_of(piece: Piece, parameter: Tensor) -> tuple[int, ...]:
    try:
        return tuple(piece.of(parameter).shape)
    except IndexError:  # more experts in the file than in the model
        return ()


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype without the prefix ``torch.``."""
    return str(dtype).removeprefix("torch.")
