"""Which layers use which shared ranks: the mixing weights of a trained RaSA."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

LAYER = re.compile(r"\.(\d+)\.")


def mixing_weights(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """|d| of the shared ranks by kind: (layers, pool ranks), fp32; experts of one layer are averaged.

    Args:
        tensors: of a saved adapter, by name. Empty result when it has no RaSA pools.
    """
    rows: dict[str, list[tuple[int, Tensor]]] = {}
    for name, d in tensors.items():
        found = LAYER.search(name)
        if not name.endswith(".d") or found is None:
            continue
        kind = name[found.end() : -len(".d")]
        ranks = _pool_ranks(tensors, kind, d)
        if ranks:
            shared = d[..., d.shape[-1] - ranks :].float().abs()
            rows.setdefault(kind, []).append((int(found[1]), shared.reshape(-1, ranks).mean(0)))
    return {
        kind: torch.stack([d for _, d in sorted(layers, key=lambda row: row[0])])
        for kind, layers in rows.items()
        if len({d.shape for _, d in layers}) == 1
    }


def _pool_ranks(tensors: Mapping[str, Tensor], kind: str, d: Tensor) -> int:
    """Ranks of the pool of a kind; 0 without one. A kind of several shapes has the shape in its pool's name: those
    that fit d."""
    key = kind.replace(".", "__")
    names = (name for name in tensors if re.fullmatch(rf"pools\.(.*__)?{re.escape(key)}(__\d+x\d+)?\.A_S", name))
    return next((ranks for name in names if (ranks := tensors[name].shape[-2]) <= d.shape[-1]), 0)
