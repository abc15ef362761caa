"""MoRA: high-rank updating with one square matrix (Jiang et al. 2024, arXiv 2405.12130).

    dW x = decompress(M compress(x))         M (q x q), q = round(sqrt((in + out) r)): as many parameters as LoRA

``type`` selects the two parameter-free maps. Groups are runs of consecutive features; if the division leaves a
remainder, the first groups are one feature longer. x is padded to a multiple of q with its own first features:

    type  compress: in -> q                              decompress: q -> out
    1     features i, q+i, 2q+i, ... are summed          tiled: out o is o mod q           (sharing, Eq. 6)
    2     q groups are summed                            repeated: q groups of equal outputs
    3     as 2                                           as 1
    4     as 1                                           as 2
    6     n blocks of q, block g rotated by RoPE(g); M acts on each; blocks concatenated, tiled (Eq. 9)

Types 1 to 4 have rank q, type 6 has rank up to min(in, out). There is no alpha. For very large r, q exceeds in or out:
rows or columns of M are then never read, as in the reference implementation, whose files hold them.
"""

from __future__ import annotations

import logging
import math
import re
from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor

from ..adapters.block_adapter import BlockAdapter
from ..adapters.contract import Adapter, Built, Counts, Method, PeftConfig, linear, zeros
from ..adapters.site import Site
from ..errors import UserError
from ..kernels.block_diagonal import tile

_log = logging.getLogger(__name__)


class MoRA(Method):
    """One trained square matrix M per site, between two fixed maps."""

    method: Literal["mora"] = "mora"
    r: PositiveInt = 8
    """Rank of a LoRA with the same number of parameters; it determines the side q of M."""
    type: Literal[1, 2, 3, 4, 6] = 6
    """Fixed maps, as MoRA's code numbers them. The RaSA paper uses 6; MoRA's paper prefers 1 for large r."""

    def side(self, site: Site) -> int:
        """Return q, which is even for type 6, whose rotation pairs features."""
        q = int(math.sqrt((site.in_features + site.out_features) * self.r) + 0.5)
        return q - q % 2 if self.type == 6 else q

    def build(self, sites: list[Site]) -> Built:
        for site in sites:
            if self.side(site) == 0:
                raise UserError(
                    f"adapter.type: 6 needs at least two inputs and outputs in every linear, but {site.path} has shape "
                    f"{site.shape}",
                    key="adapter.type",
                )
        if self.type != 6:
            return Built({site.path: SharingAdapter(site, self) for site in sites}, {})
        rotating = {site.path: RotatingAdapter(site, self) for site in sites}
        dead = {a.site.kind: 1 - a.n * a.q / a.site.in_features for a in rotating.values()}
        if words := [f"{kind} {share:.0%}" for kind, share in dead.items() if share > 0]:
            _log.warning("MoRA type 6 ignores a share of the inputs of linears with out < in: %s", ", ".join(words))
        return Built(dict(rotating), {})

    @classmethod
    def from_peft(cls, config: PeftConfig) -> dict[str, object] | None:
        """Return the fields for files of the reference implementation's fork of PEFT and of the plug-in
        (``rasa_train.peft``)."""
        if config.get("peft_type") == "MORA":
            return {"r": config["r"], "type": config["mora_type"], "dropout": config.get("mora_dropout", 0.0)}
        if config.get("peft_type") != "LORA" or not config.get("use_mora"):
            return None
        return {"r": config["r"], "type": config["mora_type"], "dropout": config.get("lora_dropout", 0.0)}

    @classmethod
    def rename_peft(cls, key: str) -> str | None:
        # lora_A and lora_B are the same matrix in those files.
        match = re.fullmatch(r"(.+)\.(?:lora_[AB]|mora_M)\.weight", key)
        return f"{match[1]}.M" if match else None


class SharingAdapter(Adapter):
    """The adapter of types 1 to 4."""

    takes_rows = True

    def __init__(self, site: Site, method: MoRA) -> None:
        super().__init__(site, method)
        self.strided, self.tiled, self.q = method.type in (1, 4), method.type in (1, 3), method.side(site)
        self.M = zeros(*site.lead, self.q, self.q)

    def forward(self, x: Tensor, weight: Tensor, counts: Counts | None = None) -> Tensor:
        z = _fold(x, self.q) if self.strided else _group(x, self.q)
        expand = tile if self.tiled else _repeat
        return expand(linear(z, self.M.to(x.dtype), counts), self.site.out_features)

    def delta(self, weight: Tensor | None = None) -> Tensor:
        M, (b, a), q = self.M.float(), self.site.shape, self.q
        out, in_ = (torch.arange(n, device=M.device) for n in (b, a))
        rows = M[..., out % q if self.tiled else _group_of(out, b, q), :]
        if not self.strided:
            return rows[..., _group_of(in_, a, q)]
        padded = torch.arange(math.ceil(a / q) * q, device=M.device)
        return torch.zeros(*rows.shape[:-1], a, device=M.device).index_add_(-1, padded % a, rows[..., padded % q])

    @property
    def effective_rank(self) -> int:
        return min(self.q, *self.site.shape)


class RotatingAdapter(BlockAdapter):
    """The adapter of type 6. It computes M R_g instead of R_g x: a few matrices are rotated instead of every token."""

    stacks = True
    cos: Tensor
    sin: Tensor

    def __init__(self, site: Site, method: MoRA) -> None:
        super().__init__(site, method)
        self.q = method.side(site)
        # Of the ceil(in / q) input blocks, no more are read than there are output blocks.
        self.n = min(math.ceil(size / self.q) for size in site.shape)
        self.M = zeros(*site.lead, self.q, self.q)
        theta = 10000.0 ** (-torch.arange(0, self.q, 2, dtype=torch.float32) / self.q)
        angle = torch.arange(self.n, dtype=torch.float32)[:, None] * theta
        self.register_buffer("cos", angle.cos(), persistent=False)  # (n, q / 2), fp32
        self.register_buffer("sin", angle.sin(), persistent=False)

    def blocks(self) -> Tensor:
        # R_g^T = R_-g, applied to every row of M; the pairs are (j, j + q/2).
        first, second = self.M.unsqueeze(-3).chunk(2, -1)
        cos, sin = self.cos[:, None], self.sin[:, None]
        return torch.cat([first * cos + second * sin, second * cos - first * sin], -1)


def _fold(x: Tensor, q: int) -> Tensor:
    """Sum the features i, q + i, 2q + i, ... for each i < q."""
    n = -(-x.shape[-1] // q)
    return tile(x, n * q).reshape(*x.shape[:-1], n, q).sum(-2)


def _group(x: Tensor, q: int) -> Tensor:
    """Sum each of q groups of consecutive features."""
    length, longer = (
        x.shape[-1] // q,
        x.shape[-1] % q,
    )  # length of the shorter groups, number of groups with one feature more
    cut = longer * (length + 1)
    lead = x.shape[:-1]
    first = x[..., :cut].reshape(*lead, longer, length + 1)
    rest = x[..., cut:].reshape(*lead, q - longer, length)
    return torch.cat([first.sum(-1), rest.sum(-1)], -1)


def _repeat(z: Tensor, size: int) -> Tensor:
    """Repeat every feature as often as its group is long."""
    length, longer = size // z.shape[-1], size % z.shape[-1]
    parts = (z[..., :longer].repeat_interleave(length + 1, -1), z[..., longer:].repeat_interleave(length, -1))
    return torch.cat(parts, -1)


def _group_of(index: Tensor, size: int, q: int) -> Tensor:
    """Return which of the q groups of ``size`` features each index is in."""
    length, longer = divmod(size, q)
    cut = longer * (length + 1)
    return torch.where(index < cut, index // (length + 1), longer + (index - cut) // max(length, 1))
