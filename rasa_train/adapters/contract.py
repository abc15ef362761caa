"""The adapter contract: a method defines its update once, and everything else follows from the definition.

``Site``     the place of an update: metadata of one frozen weight, never the weight itself.
``Method``   a frozen config; ``build(sites)`` sees all sites at once, so sharing needs no hook.
``Adapter``  the update of one site: ``forward`` (the term added to the base output) and ``delta`` (dW).
``FactorAdapter``  an adapter with dW = diag(b) B diag(d) A: it defines ``factors()``, the rest is derived.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar, Literal, NamedTuple, TypedDict

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from ..kernels.dropout import dropped
from ..kernels.grouped import Rows, grouped_linear
from ..kernels.low_rank import ALIGNMENT, Factors
from .site import Site

Counts = Rows | list[int]
"""The number of rows of each expert."""


class Adapter(nn.Module, ABC):
    """The update of one site."""

    def __init__(self, site: Site, method: Method) -> None:
        super().__init__()
        self.site = site
        self.dropout = method.dropout
        self.compute_dtype = torch.float32 if method.compute == "float32" else None

    @abstractmethod
    def forward(self, x: Tensor, weight: Tensor, counts: Counts | None = None) -> Tensor:
        """Return dW x.

        Args:
            x: input of the linear (..., in_features), after ``drop``.
            weight: the frozen W (*lead, out_features, in_features) of this site.
            counts: for a site with ``num_experts``, the number of rows of x (tokens, in_features) that belong to each
                expert: the rows of expert 0 come first, then the rows of expert 1, ... A list, or ``Rows`` if
                ``takes_rows``.
        Returns:
            dW x (..., out_features) in the dtype of ``x``.
        """

    takes_rows: ClassVar[bool] = False
    """Whether ``forward`` and ``watch`` take ``Rows`` for ``counts``, whose numbers are on the device. For other
    adapters, which get a list, the host waits for the device once in each layer with experts."""

    @abstractmethod
    def delta(self, weight: Tensor | None = None) -> Tensor:
        """Return dW = merged - original weight (*lead, out_features, in_features), fp32.

        ``weight`` is the original W in any dtype; only methods whose update depends on W need it.
        """

    needs_weight: ClassVar[bool] = False
    """Whether the initial update depends on W; if so, ``start`` is called with W."""

    def start(self, weight: Tensor) -> None:
        """Set the tensors that depend on the original W (*lead, out, in), fp32. Called once when the adapter is put
        into a model that has weights; values from a file are loaded after this call."""

    rule_state: ClassVar[tuple[str, ...]] = ()
    """Names of the (non-persistent) buffers that the method's ``after_step`` maintains. They are saved in checkpoints
    but not in the finished adapter. Untrained tensors that the update itself needs are persistent buffers."""

    def delta_bias(self) -> Tensor | None:
        """Return the vector that merging adds to the linear's bias (out_features,), fp32; None for almost every
        method."""
        return None

    @property
    @abstractmethod
    def effective_rank(self) -> int:
        """The largest rank that dW can have."""

    def drop(self, x: Tensor) -> Tensor:
        """Apply dropout to the adapter's input, cast to the dtype that the adapter computes in. Linears that share
        their input share the result."""
        x = x if self.compute_dtype is None else x.to(self.compute_dtype)
        return dropped(x, self.dropout) if self.dropout and self.training else x

    stacks: ClassVar[bool] = False
    """Whether ``factors()``, or ``blocks()``, depends only on the tensors of the adapter and its pool, on the shape of
    its site, and on plain attributes (numbers, strings). Those of all layers with equal attributes are then computed at
    once, by ``torch.vmap``; otherwise each by itself, which is as right but takes more time between steps."""

    watches: ClassVar[bool] = False
    """Whether ``watch`` is called in training with each input of the linear, before dropout."""

    def watch(self, x: Tensor, counts: Counts | None = None) -> None:
        """Collect from x the statistics that the method's rule needs; the arguments are as in ``forward``."""


class FactorAdapter(Adapter):
    """An adapter with dW = diag(b) B diag(d) A. A subclass defines the factors; everything else follows from them."""

    takes_rows = True

    @abstractmethod
    def factors(self) -> Factors:
        """Return the factors in fp32, differentiable with respect to the trained parameters."""

    def forward(self, x: Tensor, weight: Tensor, counts: Counts | None = None) -> Tensor:
        factors = self.factors()
        return low_rank(x, factors.A, factors.Bd, counts)

    def delta(self, weight: Tensor | None = None) -> Tensor:
        factors = self.factors()
        return factors.Bd.float() @ factors.A.float()

    @property
    def effective_rank(self) -> int:
        d = self.factors().d
        # Ranks that a method has switched off (AdaLoRA) do not count; before training none is switched off.
        used = d.shape[-1] if d.is_meta or not d.any() else int((d != 0).sum(-1).max())
        return min(used, *self.site.shape)


class Built(NamedTuple):
    """The result of ``Method.build``: an adapter per site path, and the tensors that sites share."""

    adapters: dict[str, Adapter]
    pools: dict[str, nn.Module]


class PeftConfig(TypedDict, total=False):
    """PEFT's ``adapter_config.json``, with the keys that this package reads or writes. A file may hold anything: the
    fields of a method that are made from it are validated."""

    peft_type: str
    task_type: str
    base_model_name_or_path: str | None
    revision: str | None
    target_modules: str | list[str] | None
    target_parameters: list[str] | None
    exclude_modules: str | list[str] | None
    layers_to_transform: int | list[int] | None
    layers_pattern: str | list[str] | None
    modules_to_save: list[str] | None
    trainable_token_indices: Mapping[str, list[int]] | None
    ensure_weight_tying: bool
    fan_in_fan_out: bool
    inference_mode: bool
    r: int
    lora_alpha: float
    lora_dropout: float
    bias: str
    use_rslora: bool
    use_dora: bool
    init_lora_weights: bool | str
    rank_pattern: Mapping[str, int] | None
    alpha_pattern: Mapping[str, float] | None
    d_initial: float
    vera_dropout: float
    projection_prng_key: int
    save_projection: bool
    num_vectors: int
    vector_length: int
    topk: int
    vblora_dropout: float
    init_vector_bank_bound: float
    init_logits_std: float
    save_only_topk_weights: bool
    rasa_k: int
    rasa_alpha: float
    rasa_dropout: float
    use_mora: bool
    mora_type: int
    mora_dropout: float


class Method(BaseModel, ABC):
    """Validated hyper-parameters of one method; the section ``adapter:`` of a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    method: str
    targets: str | list[str] = "all-linear"
    """Linears to adapt: ``all-linear`` (every linear of the decoder layers, but neither the LM head nor a router),
    a list of names (``[q_proj, v_proj]``), or a regular expression for the whole path. ``[wq, wk, wv, wo]`` are the
    four matrices of attention in every family. Queries, keys and values that a model computes as one linear can be
    named as its parts: ``[c_attn.q, c_attn.v]`` in GPT-2; each part then has an update of its own."""
    exclude: list[str] = []
    """Names of linears that are not adapted although ``targets`` selects them."""
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    """Dropout on the adapter's input (the paper's scripts: 0.05)."""
    compute: Literal["model", "float32"] = "model"
    """Arithmetic of the adapter: in the model's dtype or in fp32. The parameters themselves are always fp32."""
    init_from: str | None = None
    """An adapter directory to start from, written by this package, by PEFT or by the reference implementation. A note
    says so if it was trained on another base."""

    selects_parameters: ClassVar[bool] = False
    """Whether ``targets`` and ``exclude`` select parameters of the base (``trained_base``) instead of linears."""

    never_used: ClassVar[frozenset[str]] = frozenset()
    """Keys that every method has and this one does nothing with."""

    @property
    def unused(self) -> frozenset[str]:
        """Keys that the method does nothing with, given the others. A recipe that sets one of them is refused."""
        return self.never_used

    @abstractmethod
    def build(self, sites: list[Site]) -> Built:
        """Make the adapters of all sites. Works on any device, meta included; draws from torch's RNG."""

    def insert(self, model: nn.Module) -> None:
        """Put modules of the method's own, which are no updates of weights, into the frozen model; their tensors are
        trained, in fp32. Most methods have none."""

    @property
    def unmerged(self) -> str | None:
        """Why an adapter of this method cannot be merged, as a clause; None if it can. Such an adapter is evaluated in
        place, inside the base."""
        return None

    def load(self, model: nn.Module, tensors: Mapping[str, Tensor], origin: str) -> None:
        """Copy the tensors of a saved adapter into the model that ``adapt`` returned for this method.

        Raises:
            UserError: they do not fit; ``origin`` names their source.
        """
        from .saved import load_tensors

        load_tensors(model, tensors, origin=origin)

    def wrap(self, model: nn.Module) -> nn.Module | None:
        """Return the model wrapped in a model of another library, which trains parameters of its own; None for a method
        that builds adapters for sites (every method but ``peft``)."""
        return None

    def merged(self, load_base: Callable[[], nn.Module], tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """Return the merged base parameters that a wrapping method changes, fp32, by their name in the base; None for a
        method that builds adapters for sites.

        Args:
            load_base: returns the base with its weights, fp32.
            tensors: the tensors of the saved adapter.
        Raises:
            UserError: the method does not change weights, or the tensors do not fit.
        """
        return None

    def trains(self, parameter: str) -> bool:
        """Whether the parameter of the base model with this name is trained. Such parameters are held in fp32, used
        under autocast, and saved and merged under their own names."""
        return False

    def trained_base(self, model: nn.Module) -> set[str]:
        """Return the names of the parameters of the base that are trained: all for which ``trains`` holds, unless the
        method chooses among them."""
        return {name for name, _ in model.named_parameters() if self.trains(name)}

    def lr_factor(self, name: str) -> float:
        """Return the learning rate of a trained tensor over that of the recipe, by the tensor's name in the adapter's
        file: ``model.layers.0.self_attn.q_proj.B``. LoRA+ (arXiv 2402.12354) would return 16 for every B."""
        return 1.0

    def penalty(self, adapters: Mapping[str, Adapter]) -> Tensor | None:
        """Return a term that is added to the loss of every step (AdaLoRA's orthogonality loss), or None."""
        return None

    def after_step(self, adapters: Mapping[str, Adapter], step: int, total_steps: int) -> None:
        """Apply the method's own rule after optimizer step ``step`` (1 for the first), while the gradients still
        exist."""

    # -- files of other libraries ------------------------------------------------------------------------

    @classmethod
    def from_peft(cls, config: PeftConfig) -> dict[str, object] | None:
        """Return this method's fields from a PEFT-style ``adapter_config.json``, or None if the file is of another
        method."""
        return None

    @classmethod
    def rename_peft(cls, key: str) -> str | None:
        """Return this package's name of a PEFT-style tensor (``base_model.model.`` removed), or None if the tensor does
        not belong to this method."""
        return None

    reads_peft: ClassVar[frozenset[str]] = frozenset()
    """Keys of a PEFT config that change the meaning of the tensors and that ``convert_peft`` handles."""

    @classmethod
    def convert_peft(cls, config: PeftConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Convert PEFT's tensors, given in fp32 and by this package's names, to the meaning that the fields of
        ``from_peft`` have."""
        return dict(tensors)


def linear(x: Tensor, weight: Tensor, counts: Counts | None = None) -> Tensor:
    """Return W x; with ``counts`` (see ``Adapter.forward``) each expert's rows of x are multiplied by that expert's
    weight in ``weight`` (E, out, in)."""
    if counts is None:
        return F.linear(x, weight)
    if torch.is_autocast_enabled(x.device.type):  # the grouped product is none of the operations that it casts
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    return grouped_linear(x, weight, Rows.of(counts, x.device).ends)


def low_rank(x: Tensor, A: Tensor, B: Tensor, counts: Counts | None = None) -> Tensor:
    """Return B A x, computed in the dtype of x, given A (*lead, r, in) and B (*lead, out, r)."""
    A, B = A.to(x.dtype), B.to(x.dtype)
    if counts is not None and (rest := -A.shape[-2] % ALIGNMENT):  # of two weights, which is less than of A x
        A, B = F.pad(A, (0, 0, 0, rest)), F.pad(B, (0, rest))
    return linear(linear(x, A, counts), B, counts)


def kaiming_uniform(*shape: int) -> nn.Parameter:
    """Return LoRA's initial A ~ U(-1/sqrt(in), 1/sqrt(in)), in = shape[-1], fp32 (Kaiming with a = sqrt(5))."""
    bound = 1.0 / math.sqrt(shape[-1])
    return nn.Parameter(torch.empty(*shape, dtype=torch.float32).uniform_(-bound, bound))


def zeros(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(*shape, dtype=torch.float32))


def full(value: float, *shape: int) -> nn.Parameter:
    return nn.Parameter(torch.full(shape, value, dtype=torch.float32))
