"""The adapter contract: a method says once what its update is, everything else follows.

``Site``     where an update goes: metadata of one frozen weight, never the weight itself.
``Method``   a frozen config; ``build(sites)`` sees all sites at once, so sharing needs no hook.
``Adapter``  the update of one site: ``forward`` (what is added to the base output) and ``delta`` (dW).
``FactorAdapter``  an adapter that is dW = diag(b) B diag(d) A: it gives ``factors()``, the rest is derived.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from itertools import accumulate
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from ..kernels.dropout import dropped
from ..kernels.low_rank import ALIGNMENT, Factors
from .site import Site


class Adapter(nn.Module, ABC):
    """The update of one site."""

    def __init__(self, site: Site, method: Method) -> None:
        super().__init__()
        self.site = site
        self.dropout = method.dropout
        self.compute_dtype = torch.float32 if method.compute == "float32" else None

    @abstractmethod
    def forward(self, x: Tensor, weight: Tensor, counts: list[int] | None = None) -> Tensor:
        """dW x.

        Args:
            x: input of the linear (..., in_features), after ``drop``.
            weight: the frozen W (*lead, out_features, in_features) of this site.
            counts: for a site with ``num_experts``, how many rows of x (tokens, in_features) are each expert's:
                first those of expert 0, then those of expert 1, ...
        Returns:
            (..., out_features) in the dtype of ``x``.
        """

    @abstractmethod
    def delta(self, weight: Tensor | None = None) -> Tensor:
        """dW = merged - original weight (*lead, out_features, in_features), fp32.

        ``weight`` is the original W in any dtype; only methods whose update depends on it need it.
        """

    needs_weight: ClassVar[bool] = False
    """The update's start depends on W: ``start`` is called with it."""

    def start(self, weight: Tensor) -> None:
        """Set what depends on the original W (*lead, out, in), fp32. Called once when the adapter is put into a
        model that has weights; values of a file are loaded after it."""

    rule_state: ClassVar[tuple[str, ...]] = ()
    """Names of (non-persistent) buffers that the method's ``after_step`` keeps: in checkpoints, not in the
    finished adapter. What the update itself needs and is not trained is a persistent buffer."""

    def delta_bias(self) -> Tensor | None:
        """What merging adds to the linear's bias (out_features,), fp32; None for almost every method."""
        return None

    @property
    @abstractmethod
    def effective_rank(self) -> int:
        """The largest rank that dW can have."""

    def drop(self, x: Tensor) -> Tensor:
        """Dropout on the adapter's input, cast to the dtype the adapter computes in. Linears that share their input
        share what this gives."""
        x = x if self.compute_dtype is None else x.to(self.compute_dtype)
        return dropped(x, self.dropout) if self.dropout and self.training else x

    watches: ClassVar[bool] = False
    """In training ``watch`` is called with each input of the linear, before dropout."""

    def watch(self, x: Tensor, counts: list[int] | None = None) -> None:
        """Take what the method's rule needs of x; arguments as those of ``forward``."""


class FactorAdapter(Adapter):
    """dW = diag(b) B diag(d) A. Subclasses say what the factors are; nothing else is theirs to say."""

    @abstractmethod
    def factors(self) -> Factors:
        """The factors in fp32, differentiable with respect to what is trained."""

    def forward(self, x: Tensor, weight: Tensor, counts: list[int] | None = None) -> Tensor:
        factors = self.factors()
        A, Bd = factors.A.to(x.dtype), factors.Bd.to(x.dtype)
        if counts is not None and (rest := -A.shape[-2] % ALIGNMENT):
            A, Bd = F.pad(A, (0, 0, 0, rest)), F.pad(Bd, (0, rest))
        return linear(linear(x, A, counts), Bd, counts)

    def delta(self, weight: Tensor | None = None) -> Tensor:
        factors = self.factors()
        return factors.Bd.float() @ factors.A.float()

    @property
    def effective_rank(self) -> int:
        d = self.factors().d
        # Ranks that a method has switched off (AdaLoRA) are none; before training nothing is off.
        used = d.shape[-1] if d.is_meta or not d.any() else int((d != 0).sum(-1).max())
        return min(used, *self.site.shape)


class Built(NamedTuple):
    """What a method builds: an adapter per site path, and the tensors that sites share."""

    adapters: dict[str, Adapter]
    pools: dict[str, nn.Module]


class Method(BaseModel, ABC):
    """Hyper-parameters of one method, checked; a section ``adapter:`` of a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    method: str
    targets: str | list[str] = "all-linear"
    """What is adapted: ``all-linear`` (every linear of the decoder layers, not the LM head and not a router),
    a list of names (``[q_proj, v_proj]``), or a regular expression for the whole path."""
    exclude: list[str] = []
    """Names taken out of ``targets``."""
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    """Dropout on the adapter's input (the paper's scripts: 0.05)."""
    compute: Literal["model", "float32"] = "model"
    """Arithmetic of the adapter: in the model's dtype, or fp32. The parameters themselves are always fp32."""
    init_from: str | None = None
    """An adapter directory to start from: ours, PEFT's, or the reference implementation's."""

    @abstractmethod
    def build(self, sites: list[Site]) -> Built:
        """Make the adapters of all sites. Works on any device, meta included; draws from torch's RNG."""

    def wrap(self, model: nn.Module) -> nn.Module | None:
        """The model inside one of another library, which trains parameters of its own; None for a method that
        gives adapters of sites (all but ``peft``)."""
        return None

    def merged(self, load_base: Callable[[], nn.Module], tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """The base parameters that a wrapping method changes, merged, fp32, by their name in the base; None for a
        method that gives adapters of sites.

        Args:
            load_base: gives the base with its weights, fp32.
            tensors: those of the saved adapter.
        Raises:
            UserError: the method is no change of weights, or the tensors do not fit.
        """
        return None

    def trains(self, parameter: str) -> bool:
        """Whether a parameter of the base model itself (by its name) is trained. Such parameters are held in
        fp32, computed with under autocast, and saved and merged by their own name."""
        return False

    def lr_factor(self, name: str) -> float:
        """Return the learning rate of a trained tensor over that of the recipe, by the tensor's name in the adapter's
        file: ``model.layers.0.self_attn.q_proj.B``. LoRA+ (arXiv 2402.12354) would return 16 for every B."""
        return 1.0

    def penalty(self, adapters: Mapping[str, Adapter]) -> Tensor | None:
        """A term added to the loss of every step (AdaLoRA's orthogonality), or None."""
        return None

    def after_step(self, adapters: Mapping[str, Adapter], step: int, total_steps: int) -> None:
        """The method's own rule after optimizer step ``step`` (1 for the first), gradients still there."""

    # -- files of other libraries ------------------------------------------------------------------------

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> dict[str, Any] | None:
        """Our fields from a PEFT-style ``adapter_config.json``, or None if it is another method's."""
        return None

    @classmethod
    def rename_peft(cls, key: str) -> str | None:
        """Our name of a PEFT-style tensor (``base_model.model.`` removed), or None if it is not ours."""
        return None

    reads_peft: ClassVar[frozenset[str]] = frozenset()
    """Keys of a PEFT config that change what the tensors mean, and that ``convert_peft`` knows."""

    @classmethod
    def convert_peft(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """PEFT's tensors, fp32 and by our names, as the fields of ``from_peft`` mean them."""
        return dict(tensors)


def linear(x: Tensor, weight: Tensor, counts: list[int] | None = None) -> Tensor:
    """W x; with ``counts`` (see ``Adapter.forward``) each expert's rows of x by its own of the weights (E, out, in)."""
    if counts is None:
        return F.linear(x, weight)
    widths = (x.shape[-1] * x.element_size(), weight.shape[-2] * weight.element_size())
    if not any(width % 16 for width in widths) and len(x) and not torch.is_autocast_enabled(x.device.type):
        ends = torch.tensor(list(accumulate(counts)), dtype=torch.int32).to(x.device, non_blocking=True)
        return F.grouped_mm(x, weight.mT, offs=ends)  # one kernel for all experts; it wants 16 bytes at a time
    parts = zip(torch.split(x, counts), weight.unbind(), strict=True)
    return torch.cat([F.linear(rows, W) for rows, W in parts])


def kaiming_uniform(*shape: int) -> nn.Parameter:
    """A ~ U(-1/sqrt(in), 1/sqrt(in)), in = shape[-1], fp32: LoRA's initial A (Kaiming with a = sqrt(5))."""
    bound = 1.0 / math.sqrt(shape[-1])
    return nn.Parameter(torch.empty(*shape, dtype=torch.float32).uniform_(-bound, bound))


def zeros(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(*shape, dtype=torch.float32))


def full(value: float, *shape: int) -> nn.Parameter:
    return nn.Parameter(torch.full(shape, value, dtype=torch.float32))
