"""VB-LoRA: factors composed from a bank of vectors (Li et al., NeurIPS 2024, arXiv 2405.15179).

    dW = B A;  every length-v piece of A (along in) and of B (along out) is a mixture of bank vectors:
    piece = sum over the topk largest logits t of softmax(those logits)_t * bank_t

    bank (h x v)               trained, one for the model
    logits_A (r x in/v x h)    trained, one row of h per piece of A
    logits_B (out/v x r x h)   the same for B

Neither factor starts at zero, so dW is not zero before training. There is no alpha. (The released scripts use
separate learning rates for the bank and the logits.) All logits are saved, so that training can continue.
"""

from __future__ import annotations

import re
from typing import Literal

import torch
from pydantic import PositiveFloat, PositiveInt, model_validator
from pydantic_core import PydanticCustomError
from torch import Tensor, nn

from ..adapters.contract import Built, FactorAdapter, Method, PeftConfig
from ..adapters.site import Site
from ..errors import UserError
from ..kernels.low_rank import Factors


class VBLoRA(Method):
    """LoRA whose factors are composed from the vectors of one bank."""

    method: Literal["vb-lora"] = "vb-lora"
    r: PositiveInt = 4
    """Rank of the update (PEFT's default)."""
    num_vectors: PositiveInt = 2048
    """Number h of vectors in the bank. The default is our choice: PEFT's default is 256, for models smaller than
    today's."""
    vector_length: PositiveInt = 256
    """Length v of a vector; it must divide the inputs and outputs of every adapted linear (PEFT's default)."""
    topk: PositiveInt = 2
    """Number of vectors in a mixture (PEFT's default)."""
    bank_bound: PositiveFloat = 0.02
    """Bound of the start of the bank, U(-bound, bound) (PEFT's default)."""
    logits_std: PositiveFloat = 0.1
    """Standard deviation of the start of the logits, N(0, std^2) (PEFT's default)."""

    @model_validator(mode="after")
    def _topk_in_range(self) -> VBLoRA:
        if self.topk > self.num_vectors:
            message = "must be in [1, num_vectors={h}], got {got}"
            facts = {"field": "topk", "h": self.num_vectors, "got": self.topk}
            raise PydanticCustomError("range", message, facts)
        return self

    def build(self, sites: list[Site]) -> Built:
        for site in sites:
            if any(size % self.vector_length for size in site.shape):
                raise UserError(
                    f"adapter.vector_length must divide the outputs and inputs of every adapted linear, got "
                    f"{self.vector_length}, but {site.path} is {site.out_features} x {site.in_features}",
                    key="adapter.vector_length",
                )
        pool = Bank(self)
        return Built({site.path: VBLoRAAdapter(site, self, pool) for site in sites}, {"vb_lora": pool})

    @classmethod
    def from_peft(cls, config: PeftConfig) -> dict[str, object] | None:
        if config.get("peft_type") != "VBLORA":
            return None
        if config.get("save_only_topk_weights"):
            raise UserError(
                "the VB-LoRA adapter cannot be read: it was saved with save_only_topk_weights, so its logits are lost"
            )
        return {
            "r": config["r"],
            "num_vectors": config["num_vectors"],
            "vector_length": config["vector_length"],
            "topk": config["topk"],
            "dropout": config["vblora_dropout"],
            "bank_bound": config["init_vector_bank_bound"],
            "logits_std": config["init_logits_std"],
        }

    @classmethod
    def rename_peft(cls, key: str) -> str | None:
        if key == "base_model.vblora_vector_bank":
            return "pools.vb_lora.bank"
        match = re.fullmatch(r"(.+)\.vblora_(logits_[AB])", key)
        return f"{match[1]}.{match[2]}" if match else None


class Bank(nn.Module):
    """The bank of vectors that the factors of all sites are composed from."""

    def __init__(self, method: VBLoRA) -> None:
        super().__init__()
        bank = torch.empty(method.num_vectors, method.vector_length, dtype=torch.float32)
        self.bank = nn.Parameter(bank.uniform_(-method.bank_bound, method.bank_bound))


class VBLoRAAdapter(FactorAdapter):
    stacks = True
    pool: Bank

    def __init__(self, site: Site, method: VBLoRA, pool: Bank) -> None:
        super().__init__(site, method)
        # Not registered here: the pool belongs to the root of the model and is read in forward (``contract.Built``).
        object.__setattr__(self, "pool", pool)
        self.topk = method.topk
        out, in_ = (size // method.vector_length for size in site.shape)

        def logits(*shape: int) -> nn.Parameter:
            drawn = torch.empty(*site.lead, *shape, method.num_vectors, dtype=torch.float32)
            return nn.Parameter(drawn.normal_(0.0, method.logits_std))

        self.logits_A = logits(method.r, in_)
        self.logits_B = logits(out, method.r)

    def factors(self) -> Factors:
        A = self._mixtures(self.logits_A).flatten(-2)
        B = self._mixtures(self.logits_B).transpose(-1, -2).flatten(-3, -2)
        return Factors(B, A.new_ones(A.shape[:-1]), A)

    def _mixtures(self, logits: Tensor) -> Tensor:
        """Return the pieces (..., v) of logits (..., h)."""
        top, index = logits.topk(self.topk, -1)
        return (top.softmax(-1).unsqueeze(-1) * self.pool.bank[index]).sum(-2)
