"""LoRA: dW = (alpha / r) B A (Hu et al. 2022, arXiv 2106.09685, section 4.1)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Literal

import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

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
        r = max([config["r"], *(config.get("rank_pattern") or {}).values()])
        rslora = bool(config.get("use_rslora", False))
        wider = r / config["r"]
        return {
            "r": r,
            "alpha": config["lora_alpha"] * (math.sqrt(wider) if rslora else wider),  # so that the scale stays
            "dropout": config.get("lora_dropout", 0.0),
            "rslora": rslora,
        }

    @classmethod
    def rename_peft(cls, key: str) -> str | None:
        match = re.fullmatch(r"(.+)\.lora_([AB])\.weight", key)
        return f"{match[1]}.{match[2]}" if match else None

    reads_peft = frozenset({"rank_pattern", "alpha_pattern"})

    @classmethod
    def convert_peft(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One rank and one scale for all sites: zeros for the ranks that a site has not, its scale in its B."""
        fields = cls.from_peft(config)
        assert fields is not None
        widest = cls(**fields)
        converted = {}
        for name, tensor in tensors.items():
            path, _, side = name.rpartition(".")
            r = _of_pattern(config.get("rank_pattern"), path, config["r"])
            alpha = _of_pattern(config.get("alpha_pattern"), path, config["lora_alpha"])
            missing = widest.r - r
            if side == "A":
                converted[name] = F.pad(tensor, (0, 0, 0, missing)) if missing else tensor
                continue
            scale = cls(r=r, alpha=alpha, rslora=widest.rslora).scale / widest.scale
            tensor = tensor if scale == 1 else tensor * scale
            converted[name] = F.pad(tensor, (0, missing)) if missing else tensor
        return converted


def _of_pattern(patterns: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    """The value that PEFT takes for a module: the first pattern that its path ends with, or is."""
    found = (value for pattern, value in (patterns or {}).items() if re.match(rf"(.*\.)?({pattern})$", path))
    return next(found, default)


class LoRAAdapter(FactorAdapter):
    def __init__(self, site: Site, method: LoRA) -> None:
        super().__init__(site, method)
        self.scale = method.scale
        self.A = kaiming_uniform(*site.lead, method.r, site.in_features)
        self.B = zeros(*site.lead, site.out_features, method.r)

    def factors(self) -> Factors:
        return Factors(self.B, self.A.new_full(self.A.shape[:-1], self.scale), self.A)
