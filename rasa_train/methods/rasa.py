"""RaSA: rank sharing across layers (He et al., ICLR 2025, arXiv 2503.12576).

Every layer keeps r - k ranks of its own and gives k ranks to a pool that all L layers of one kind share:

    dW_i = [B_i  B_S] diag(d_i) [A_i ; A_S]                                            (Eq. 5)

    A_i (r-k x in), B_i (out x r-k)   private to layer i
    A_S (L*k x in), B_S (out x L*k)   one pool per kind of linear
    d_i (r-k + L*k)                   trained mixing weights of layer i, private entries first

The number of parameters is LoRA's (plus d), and the rank of the update is r - k + L k. alpha acts only through
the start of d (Eq. 6): alpha / (2 (r-k)) for the private part, alpha / (2 L k) for the pool.
"""

from __future__ import annotations

import re
from typing import Any, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from pydantic_core import PydanticCustomError
from torch import nn

from ..adapters.contract import Adapter, Built, FactorAdapter, Method, PeftConfig, kaiming_uniform, zeros
from ..adapters.site import Site, by_kind
from ..kernels.low_rank import Factors


class RaSA(Method):
    """Rank-sharing low-rank adaptation: all layers share the ranks of a pool and keep some of their own."""

    method: Literal["rasa"] = "rasa"
    r: PositiveInt = 8
    """Number of ranks per layer; the parameter budget is that of LoRA with the same r."""
    k: int = Field(-1, ge=0, validate_default=False)
    """Number of ranks that each layer gives to the pool, 0 <= k <= r. Default: max(r // 8, 1) (paper, section 4.1)."""
    alpha: PositiveFloat = 32.0
    """Scale of the update, which acts only through the start of d (Eq. 6). The paper: 32 for code, 8 for maths,
    whatever r is."""
    init_compat: Literal["ours", "reference"] = "ours"
    """Start of d if the private part or the pool is empty. ``ours``: alpha / rank; ``reference``: half of that, which
    is Eq. 6 taken literally."""

    @model_validator(mode="before")
    @classmethod
    def _default_k(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("k") is None:
            r = data.get("r", 8)
            data = {**data, "k": max(r // 8, 1) if isinstance(r, int) else 0}
        return data

    @model_validator(mode="after")
    def _k_in_range(self) -> RaSA:
        if self.k > self.r:
            message = "must be in [0, r={r}], got {got}"
            raise PydanticCustomError("range", message, {"field": "k", "r": self.r, "got": self.k})
        return self

    def build(self, sites: list[Site]) -> Built:
        adapters: dict[str, Adapter] = {}
        pools: dict[str, nn.Module] = {}
        for name, group in by_kind(sites).items():
            pool = Pool(group[0], len(group) * self.k) if self.k else None
            if pool is not None:
                pools[name] = pool
            adapters |= {site.path: RaSAAdapter(site, self, pool, len(group)) for site in group}
        # In the order of the sites, not in that of the groups.
        return Built({site.path: adapters[site.path] for site in sites}, pools)

    @classmethod
    def from_peft(cls, config: PeftConfig) -> dict[str, object] | None:
        if config.get("peft_type") != "RASA":
            return None
        r, k, alpha, dropout = config["r"], config["rasa_k"], config["rasa_alpha"], config["rasa_dropout"]
        return {"r": r, "k": k, "alpha": alpha, "dropout": dropout}

    @classmethod
    def rename_peft(cls, key: str) -> str | None:
        """Return the names for files of the reference implementation (rasa_A, rasa_B, rasa_mixing, rasa_shared_*) and
        of the plug-in (``rasa_train.peft``), where a pool belongs to the first layer that shares it."""
        if match := re.fullmatch(r"(.+)\.rasa_(A|B|mixing)(?:\.weight)?", key):
            return f"{match[1]}.{'d' if match[2] == 'mixing' else match[2]}"
        if match := re.fullmatch(r"base_model\.rasa_shared_([AB])\.(.+)\.weight", key):
            return f"pools.{match[2]}.{match[1]}_S"
        if match := re.fullmatch(r".+\.rasa_train_pools\.([^.]+\.[AB]_S)", key):
            return f"pools.{match[1]}"
        return None


class Pool(nn.Module):
    """The ranks that the layers of one kind share: A_S (ranks x in), B_S (out x ranks)."""

    def __init__(self, site: Site, ranks: int) -> None:
        super().__init__()
        self.A_S = kaiming_uniform(*site.lead, ranks, site.in_features)
        self.B_S = zeros(*site.lead, site.out_features, ranks)


class RaSAAdapter(FactorAdapter):
    stacks = True
    pool: Pool | None

    def __init__(self, site: Site, method: RaSA, pool: Pool | None, layers: int) -> None:
        super().__init__(site, method)
        # Not registered here: the pool belongs to the root of the model and is read in forward (``contract.Built``).
        object.__setattr__(self, "pool", pool)
        private, shared = method.r - method.k, layers * method.k
        self.A = kaiming_uniform(*site.lead, private, site.in_features) if private else None
        self.B = zeros(*site.lead, site.out_features, private) if private else None
        half = 0.5 if (private and shared) or method.init_compat == "reference" else 1.0
        starts = [half * method.alpha / n for n in (private, shared) for _ in range(n)]
        self.d = nn.Parameter(torch.tensor(starts).expand(*site.lead, -1).contiguous())

    def factors(self) -> Factors:
        private = [] if self.A is None else [(self.B, self.A)]
        shared = [] if self.pool is None else [(self.pool.B_S, self.pool.A_S)]
        B, A = zip(*private, *shared, strict=True)
        return Factors(torch.cat(B, -1), self.d, torch.cat(A, -2))
