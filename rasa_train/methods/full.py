"""Full fine-tuning: every parameter of the base model is trained, and none is added."""

from __future__ import annotations

from typing import Literal

from ..adapters.contract import Built, Method
from ..adapters.site import Site


class Full(Method):
    """Full fine-tuning. ``targets``, ``exclude``, ``dropout`` and ``compute`` have no effect.

    Weights are held in fp32, used in computations in the model's dtype, and saved and merged under their own names.
    Suitable learning rates are about a tenth of LoRA's (Biderman et al. 2024, arXiv 2405.09673).
    """

    method: Literal["full"] = "full"

    def build(self, sites: list[Site]) -> Built:
        return Built({}, {})

    def trains(self, parameter: str) -> bool:
        return True
