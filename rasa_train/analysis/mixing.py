"""Read the mixing weights of a trained RaSA, which show which layers use which shared ranks."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

LAYER = re.compile(r"\.(\d+)\.")


def mixing_weights(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return |d| of the shared ranks by kind: (layers, pool ranks), fp32; the experts of one layer are averaged.

    Args:
        tensors: tensors of a saved adapter, by name. Without RaSA pools the result is empty.
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
    """Return the number of ranks in the pool of a kind; 0 without a pool. A kind with linears of several shapes has one
    pool for each shape, with the shape in its name; the first pool whose ranks fit d is taken."""
    key = kind.replace(".", "__")
    names = (name for name in tensors if re.fullmatch(rf"pools\.(.*__)?{re.escape(key)}(__\d+x\d+)?\.A_S", name))
    return next((ranks for name in names if (ranks := tensors[name].shape[-2]) <= d.shape[-1]), 0)
