"""Full fine-tuning: every parameter of the base model is trained, nothing is added."""

from __future__ import annotations

from typing import Literal

from ..adapters.contract import Built, Method
from ..adapters.site import Site


class Full(Method):
    """Full fine-tuning. ``targets``, ``exclude``, ``dropout`` and ``compute`` have nothing to act on.

    Weights are held in fp32, computed with in the model's dtype, and saved and merged by their own names.
    Learning rates are about a tenth of LoRA's (Biderman et al. 2024, arXiv 2405.09673).
    """

    method: Literal["full"] = "full"

    def build(self, sites: list[Site]) -> Built:
        return Built({}, {})

    def trains(self, parameter: str) -> bool:
        return True
