"""LoRA: dW = (alpha / r) B A (Hu et al. 2022, arXiv 2106.09685, section 4.1)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from .base import Built, FactorAdapter, Factors, Method, Site, kaiming_uniform, zeros


class LoRA(Method):
    """Low-rank adaptation: A (r x in) random, B (out x r) zero, both trained, in every site."""

    method: Literal["lora"] = "lora"
    r: PositiveInt = 8
    """Rank of the update."""
    alpha: PositiveFloat = 32.0
    """The update is scaled by alpha / r. The paper keeps alpha fixed while r changes: 32 for code, 8 for maths."""
    rslora: bool = Field(False)
    """Scale by alpha / sqrt(r) instead (rsLoRA, arXiv 2312.03732)."""

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)

    def build(self, sites: list[Site]) -> Built:
        return Built({site.path: LoRAAdapter(site, self) for site in sites}, {})

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> dict[str, Any] | None:
        if config.get("peft_type") != "LORA" or config.get("use_mora") or config.get("use_dora"):
            return None
        return {
            "r": config["r"],
            "alpha": config["lora_alpha"],
            "dropout": config.get("lora_dropout", 0.0),
            "rslora": bool(config.get("use_rslora", False)),
        }

    @classmethod
    def rename_peft(cls, key: str) -> str | None:
        match = re.fullmatch(r"(.+)\.lora_([AB])\.weight", key)
        return f"{match[1]}.{match[2]}" if match else None


class LoRAAdapter(FactorAdapter):
    def __init__(self, site: Site, method: LoRA) -> None:
        super().__init__(site, method)
        self.scale = method.scale
        self.A = kaiming_uniform(*site.lead, method.r, site.in_features)
        self.B = zeros(*site.lead, site.out_features, method.r)

    def factors(self) -> Factors:
        return Factors(self.B, self.A.new_full(self.A.shape[:-1], self.scale), self.A)
