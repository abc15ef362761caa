"""LoRA: dW = (alpha / r) B A (Hu et al. 2022, arXiv 2106.09685, section 4.1)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Literal, TypeVar

import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from ..adapters.contract import Built, FactorAdapter, Method, PeftConfig, kaiming_uniform, zeros
from ..adapters.experts import peft_linears, peft_parameter
from ..adapters.patterns import path_pattern
from ..adapters.site import Site
from ..kernels.low_rank import Factors

T = TypeVar("T")


class LoRA(Method):
    """Low-rank adaptation: A (r x in), which starts random, and B (out x r), which starts at zero, are trained in every
    site."""

    method: Literal["lora"] = "lora"
    r: PositiveInt = 8
    """Rank of the update."""
    alpha: PositiveFloat = 32.0
    """The update is scaled by alpha / r. The paper keeps alpha fixed while r changes: 32 for code, 8 for maths."""
    rslora: bool = Field(False)
    """Whether the update is scaled by alpha / sqrt(r) instead (rsLoRA, arXiv 2312.03732)."""

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)

    def build(self, sites: list[Site]) -> Built:
        return Built({site.path: LoRAAdapter(site, self) for site in sites}, {})

    @classmethod
    def from_peft(cls, config: PeftConfig) -> dict[str, object] | None:
        if config.get("peft_type") != "LORA" or config.get("use_mora") or config.get("use_dora"):
            return None
        r = max([config["r"], *(config.get("rank_pattern") or {}).values()])
        rslora = bool(config.get("use_rslora", False))
        wider = r / config["r"]
        return {
            "r": r,
            "alpha": config["lora_alpha"] * (math.sqrt(wider) if rslora else wider),  # so that the scale stays the same
            "dropout": config.get("lora_dropout", 0.0),
            "rslora": rslora,
        }

    @classmethod
    def rename_peft(cls, key: str) -> str | None:
        match = re.fullmatch(r"(.+)\.lora_([AB])\.weight", key)
        return f"{match[1]}.{match[2]}" if match else None

    reads_peft = frozenset({"rank_pattern", "alpha_pattern", "target_parameters"})

    @classmethod
    def convert_peft(cls, config: PeftConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Convert to one rank and one scale for all sites: missing ranks of a site become zeros, and its own scale is
        multiplied into its B. The pair of a fused expert weight becomes one pair for each of its linears."""
        fields = cls.from_peft(config)
        assert fields is not None
        widest = cls.model_validate(fields)
        converted: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            path, _, side = name.rpartition(".")
            parameters = config.get("target_parameters") or ()
            fused = peft_parameter(path, parameters)
            linear = f"{path}.weight" if any(f".{path}.weight".endswith(f".{name}") for name in parameters) else path
            r = _of_pattern(config.get("rank_pattern"), fused or linear, config["r"])
            alpha = _of_pattern(config.get("alpha_pattern"), fused or linear, config["lora_alpha"])
            scale = cls(r=r, alpha=alpha, rslora=widest.rslora).scale / widest.scale
            for own, factor in (peft_linears(fused, side, r, tensor) if fused else {name: tensor}).items():
                missing = widest.r - r
                padded = F.pad(factor, (0, 0, 0, missing) if side == "A" else (0, missing))
                converted[own] = padded if side == "A" or scale == 1 else padded * scale
        return converted


def _of_pattern(patterns: Mapping[str, T] | None, path: str, default: T) -> T:
    """Return the value that PEFT uses for a module: that of the first pattern that its path ends with or equals."""
    found = (
        value
        for pattern, value in (patterns or {}).items()
        if path_pattern(rf"(.*\.)?({pattern})", "rank_pattern or alpha_pattern")(path)
    )
    return next(found, default)


class LoRAAdapter(FactorAdapter):
    stacks = True

    def __init__(self, site: Site, method: LoRA) -> None:
        super().__init__(site, method)
        self.scale = method.scale
        self.A = kaiming_uniform(*site.lead, method.r, site.in_features)
        self.B = zeros(*site.lead, site.out_features, method.r)

    def factors(self) -> Factors:
        return Factors(self.B, self.A.new_full(self.A.shape[:-1], self.scale), self.A)
