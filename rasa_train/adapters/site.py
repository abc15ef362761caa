"""The place of an update: metadata of one frozen weight, never the weight itself."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Site:
    """Metadata of one frozen weight W (out_features x in_features) that gets an update.

    ``lead`` is the leading shape of every tensor of the update: () for a linear, (num_experts,) for a
    fused expert weight, so that one adapter serves all experts of a layer.
    """

    path: str
    """Dotted path of the linear in the model, such as ``model.layers.3.self_attn.q_proj``."""
    kind: str
    """The path below the layer index, such as ``self_attn.q_proj``. Pools are keyed by the kind."""
    layer: int
    out_features: int
    in_features: int
    weight: str
    """Name of the base parameter that holds W."""
    transposed: bool = False
    """Whether W is stored as in_features x out_features (GPT-2's Conv1D)."""
    bias: bool = False
    num_experts: int | None = None
    rows: tuple[int, int] | None = None
    """Range of output rows of the base parameter that W is (gate and up in a fused gate_up_proj); None: all rows."""
    groups: int = 1
    """Number of equal groups of output rows of the base parameter, one for each head in GPT-NeoX's query_key_value. W
    has the range ``rows`` of each group."""

    @property
    def lead(self) -> tuple[int, ...]:
        return () if self.num_experts is None else (self.num_experts,)

    @property
    def shape(self) -> tuple[int, int]:
        return (self.out_features, self.in_features)

    def view(self, parameter: Tensor) -> Tensor:
        """Return the view of the base parameter (or of a tensor with its layout) that is W (*lead, out, in). If W is
        in several groups of rows, this is a copy."""
        place = self.place(parameter)
        return place if self.groups == 1 else place.flatten(-3, -2)

    def place(self, parameter: Tensor) -> Tensor:
        """Return the view of the base parameter that holds W: (*lead, out, in), or (*lead, groups, rows, in) if W is in
        several groups of rows."""
        whole = parameter.mT if self.transposed else parameter
        if self.groups > 1:
            whole = torch.unflatten(whole, -2, (self.groups, -1))
        return whole if self.rows is None else whole[..., slice(*self.rows), :]


def by_kind(sites: Iterable[Site]) -> dict[str, list[Site]]:
    """Group the sites that can share tensors: same kind and same shape. The key is a valid module name: the kind with
    ``__`` for dots (where a hybrid model has several shapes of one kind, the key also contains the shape)."""
    groups: dict[tuple[str, tuple[int, ...]], list[Site]] = {}
    for site in sites:
        groups.setdefault((site.kind, (*site.lead, *site.shape)), []).append(site)
    kinds = [kind for kind, _ in groups]
    return {
        kind.replace(".", "__") + ("" if kinds.count(kind) == 1 else "__" + "x".join(map(str, shape))): group
        for (kind, shape), group in groups.items()
    }
