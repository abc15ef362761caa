"""Linears that a model computes together as one, such as q, k and v in GPT-2's ``c_attn``: adapters of some of them.

A part is a site of its own (``c_attn.q``), with factors, and with pools, of its own. The one linear of the model then
has an adapter that consists of those of its parts; rows of W that belong to no adapted part are not changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from ..kernels.low_rank import Factors
from ..models.families import fused_layout
from .contract import Adapter, Counts, FactorAdapter
from .site import Site


def part_sites(model: nn.Module, sites: Iterable[Site]) -> list[Site]:
    """Return the sites of the parts of those linears in ``sites`` whose layout is known."""
    config: Any = getattr(model, "config", None)
    return [part for site in sites for part in _parts(config, site)]


def _parts(config: Any, site: Site) -> Iterator[Site]:
    if config is None or site.num_experts is not None:
        return
    groups, sizes = fused_layout(config.get_text_config(), site.path.rpartition(".")[2], site.out_features)
    start = 0
    for name, size in sizes.items():
        rows, start = (start, start + size), start + size
        path, kind = f"{site.path}.{name}", f"{site.kind}.{name}"
        yield replace(site, path=path, kind=kind, out_features=groups * size, rows=rows, groups=groups)


def check_apart(sites: Sequence[Site]) -> None:
    """Raise ``UserError`` if a linear is selected as a whole, and a part of it, too."""
    whole = {site.path for site in sites}
    for site in sites:
        if is_part(site) and linear_of(site) in whole:
            raise UserError(
                f"adapter.targets selects {linear_of(site)} as a whole and its part {site.path}: name one of them",
                key="adapter.targets",
            )


def is_part(site: Site) -> bool:
    """Whether a site is a part of a linear of the model, rather than a linear or a weight of experts."""
    return site.rows is not None and site.num_experts is None


def linear_of(site: Site) -> str:
    """Return the path of the linear that holds the weight of a site."""
    return site.weight.removesuffix(".weight")


def parts(adapter: Adapter) -> list[Adapter]:
    """Return the adapters of the parts, or the adapter itself if it has none."""
    return list(adapter.children()) if isinstance(adapter, Parts) else [adapter]  # type: ignore[arg-type]


class Parts(Adapter):
    """The adapter of a linear that consists of those of its parts; each is a submodule under the name of its part."""

    def __init__(self, site: Site, first: Adapter) -> None:
        """Make an adapter without parts for the whole linear at ``site``, with the settings of ``first``."""
        nn.Module.__init__(self)
        self.site, self.dropout, self.compute_dtype = site, first.dropout, first.compute_dtype

    @property
    def stacks(self) -> bool:  # type: ignore[override]
        return all(part.stacks for part in parts(self))

    @property
    def needs_weight(self) -> bool:  # type: ignore[override]
        return any(part.needs_weight for part in parts(self))

    @property
    def watches(self) -> bool:  # type: ignore[override]
        return any(part.watches for part in parts(self))

    @property
    def rule_state(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(f"{name}.{own}" for name, part in self.named_children() for own in part.rule_state)  # type: ignore[union-attr]

    def watch(self, x: Tensor, counts: Counts | None = None) -> None:
        for part in parts(self):
            if part.watches:
                part.watch(x, counts)

    def forward(self, x: Tensor, weight: Tensor, counts: Counts | None = None) -> Tensor:
        updates = [(part, part(x, _rows(part, weight) if part.needs_weight else weight)) for part in parts(self)]
        return self._sum(updates, -1)

    def delta(self, weight: Tensor | None = None) -> Tensor:
        found = parts(self)
        return self._sum([(part, part.delta(None if weight is None else _rows(part, weight))) for part in found], -2)

    @property
    def effective_rank(self) -> int:
        return min(sum(part.effective_rank for part in parts(self)), *self.site.shape)

    def _sum(self, tensors: Sequence[tuple[Adapter, Tensor]], dim: int) -> Tensor:
        first, *others = (self._spread(part, tensor, dim) for part, tensor in tensors)
        return sum(others, first)

    def _spread(self, part: Adapter, tensor: Tensor, dim: int) -> Tensor:
        """Return a tensor with the outputs of the whole linear, and zeros where they are not the part's, given one with
        the outputs of the part; outputs are dimension ``dim``, -1 or -2."""
        site = part.site
        assert site.rows is not None
        size = self.site.out_features // site.groups
        around = (site.rows[0], size - site.rows[1])
        each = torch.unflatten(tensor, dim, (site.groups, -1))
        whole = F.pad(each, around if dim == -1 else (0, 0, *around))
        return whole.flatten(dim - 1, dim)


def _rows(part: Adapter, weight: Tensor) -> Tensor:
    """Return W of a part, given that of the whole linear (out, in)."""
    return replace(part.site, transposed=False).view(weight)


class FactorParts(Parts, FactorAdapter):
    """Parts whose updates are products of factors: the ranks of all parts stand side by side."""

    def factors(self) -> Factors:
        found = [(part, part.factors()) for part in parts(self) if isinstance(part, FactorAdapter)]
        scales = [(part, f.b) for part, f in found if f.b is not None]
        b = self._sum(scales, -1) if scales else None
        B = torch.cat([self._spread(part, f.B, -2) for part, f in found], -1)
        return Factors(B, torch.cat([f.d for _, f in found], -1), torch.cat([f.A for _, f in found], -2), b)
