"""A base model with adapters in it: its loss, its trained parameters, and how it generates."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..adapters.contract import Adapter
from ..adapters.fused_parts import parts
from ..adapters.inject import adapt
from ..adapters.shared_input import Group, Held, packable, packed
from ..adapters.site import Site
from ..adapters.state import adapters, effective_ranks, groups, rule_state, saved_tensors, trainable
from ..distributed import rendezvous
from ..distributed.engine import Engine
from ..io.base_fingerprint import base_identity
from ..merging.tied import as_stored
from ..models import padding_free
from ..models.config import torch_dtype
from ..models.families import decoder_layers
from ..models.fused import fusable, fuse, is_fused
from ..models.layers import checkpoint_layers, light_contexts
from ..models.load import empty_model, load_config, load_model, meta_model, tied_groups
from ..models.suitable import check_quantization
from ..models.task import Head
from ..models.words import own_parameters
from ..objectives.classification import Classification
from ..objectives.contract import Batch, Objective
from ..objectives.next_token import NextToken
from ..optim.optimizers import make_optimizer
from ..recipe.schema import Recipe
from .offload import with_offload


class TrainableModel:
    """The adapted model of a run, on one worker.

    Before ``prepare`` the module is whole and on the CPU (or, on workers that do not read the base, on the meta
    device), so values can be loaded into it. ``prepare`` places and divides it.
    """

    module: nn.Module
    """The adapted model itself. ``engine.model`` is the wrapper that the strategy puts around it."""
    sites: list[Site]
    groups: list[Group]
    """Linears that are computed together with packed factors. Empty if parameters are divided: then each adapter's own
    forward is used."""
    parameters: dict[str, nn.Parameter]
    """Every trained tensor, by its name in the adapter's file."""
    adapters: dict[str, Adapter]
    """The adapters, by the path of their site."""
    shapes: dict[str, tuple[int, ...]]
    """Undivided shapes of all tensors of the adapter's file, by name."""
    base_identity: dict[str, Any]
    """Identity of the base as it was when the run started; only the first worker has it."""
    ranks: dict[str, int]
    """The largest effective rank of each kind of linear."""
    head: Head | None
    """The head of a classifier; None for a causal language model."""
    compiled = False
    """Whether the decoder layers are compiled (``training.compiling``)."""

    def __init__(self, recipe: Recipe, engine: Engine, head: Head | None = None) -> None:
        """Load the base, as a classifier with ``head``, and put the adapters into it.

        Raises:
            UserError: the model cannot be loaded, or the adapter does not fit it.
        """
        self.recipe, self.engine, self.head = recipe, engine, head
        training = recipe.training
        name, revision = recipe.model.name, recipe.model.revision
        self.base_identity = base_identity(name, revision) if engine.accelerator.is_main_process else {}
        divide = engine.capabilities.divides_as_it_loads and not needs_whole_base(recipe, head)
        with engine.loading(torch_dtype(recipe.model), divide=divide):
            base = read_base(recipe, engine, head)
        if divide and tied_against_files(recipe, base):
            with engine.loading(torch_dtype(recipe.model), divide=False):
                base = read_base(recipe, engine, head)
        if training.flat:  # refused for a classifier
            padding_free.use_varlen(base)
        if checkpointing := training.activation_checkpointing:
            # Never the reentrant kind: it breaks parameters that are used once per layer, as RaSA's pools are.
            light = {"context_fn": light_contexts} if checkpointing == "light" else {}
            base.gradient_checkpointing_enable({"use_reentrant": False, **light})
            if not isinstance(checkpointing, bool | str):
                checkpoint_layers(base, checkpointing)
        torch.manual_seed(recipe.seed)
        self._base = base
        self.module, self.sites = adapt(base, recipe.adapter)
        self.objective: Objective = NextToken() if head is None else Classification(head)
        self._loss = self.objective.install(self.module)
        if training.activation_offload:
            self._loss = with_offload(self._loss)
        if is_mixed(recipe, self.module):
            self.module.forward = autocast(recipe, self.module)(self.module.forward)

    def fuse(self) -> None:
        """Let the base compute with fused kernels, if the recipe and this machine want it."""
        wanted = self.recipe.training.kernels
        usable = fusable(str(self._base.config.model_type)) is None and not self.engine.capabilities.divides_weights
        if wanted == "liger" or (wanted == "auto" and usable):
            fuse(self._base)

    def prepare(self) -> None:
        """Let the engine place and divide the model, and make the optimizer of the trained parameters."""
        self.shapes = {name: tuple(tensor.shape) for name, tensor in saved_tensors(self.module).items()}
        self.ranks = effective_ranks(self.module)
        self.engine.prepare(self.module, self._make_optimizer)
        self.parameters, self.adapters = trainable(self.module), adapters(self.module)
        self.groups = [] if self.engine.sharded else groups(self.module)
        self._held: Held = {}

    def _make_optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Make the optimizer of ``parameters``, in groups where the method wants several learning rates."""
        names = {id(parameter): name for name, parameter in trainable(self.module).items()}
        groups: dict[float, list[nn.Parameter]] = {}
        for parameter in parameters:
            groups.setdefault(self.recipe.adapter.lr_factor(names[id(parameter)]), []).append(parameter)
        return make_optimizer(self.recipe.training.optimizer, groups)

    def loss(self, batch: Batch) -> Tensor:
        """Compute the loss of a micro-batch: fp32, a sum over its targets."""
        return self._loss(self.engine.model, batch)

    def packed(self) -> AbstractContextManager[None]:
        """Pack the factors once, on entry, for all micro-batches inside. The gradients of trained tensors are complete
        at the end."""
        return packed(self.groups, self._held)

    @contextmanager
    def generation_mode(self) -> Iterator[None]:
        """Let the module return logits and attend to padded sequences inside, as generation needs."""
        with (
            self.objective.with_logits(self.module),
            padding_free.padded(self.module),
            autocast(self.recipe, self.module),  # a second autocast, because none can be entered twice
            torch.compiler.set_stance("force_eager"),  # a cache of keys and values would be compiled again and again
            self.packed(),
        ):
            yield

    @property
    def layers(self) -> list[nn.Module]:
        """The repeated decoder layers."""
        return decoder_layers(self.module)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype that the base computes in."""
        return torch_dtype(self.recipe.model)

    @property
    def vocabulary(self) -> int:
        """The number of tokens that the model knows."""
        return int(self.module.get_input_embeddings().num_embeddings)  # type: ignore[operator]

    @property
    def kernels(self) -> str:
        """Whose kernels compute norms, rotary embedding and SwiGLU: ``liger``, or ``none`` for transformers' own."""
        return "liger" if is_fused(self.module) else "none"

    @property
    def fast_path(self) -> bool:
        """Whether linears are computed with packed factors."""
        return any(packable(group) for group in self.groups)

    @property
    def packs_all(self) -> bool:
        """Whether all adapters are computed with packed factors."""
        packed_groups = [group for group in self.groups if packable(group)]
        return len(self.adapters) == sum(len(parts(member.adapter)) for g in packed_groups for member in g.members)

    @property
    def trained(self) -> int:
        """The number of trained values on all workers, divided or not."""
        return sum(math.prod(self.shapes[name]) for name in self.parameters)

    @property
    def trained_embeddings(self) -> int:
        """The number of trained values in rows of the embedding and the head: of new words, or of all."""
        return sum(math.prod(self.shapes[name]) for name in own_parameters(self.module) if name in self.parameters)

    @property
    def trains_base(self) -> bool:
        """Whether weights of the base itself are trained, other than those of a head."""
        return trains_base(self.recipe, self.module)

    @property
    def rule_state(self) -> dict[str, Tensor]:
        """Buffers of the method's own rule, which checkpoints hold and the finished adapter does not."""
        return rule_state(self.module)

    @property
    def saved_tensors(self) -> dict[str, Tensor]:
        """The tensors of the adapter's file as this worker holds them, whole or divided."""
        return saved_tensors(self.module)

    def restore(self, rules: Mapping[str, Tensor]) -> None:
        """Undo a step that was tried: drop the gradients, and restore ``rules``, the earlier ``rule_state``."""
        self.engine.zero_grad()
        for name, tensor in self.rule_state.items():
            tensor.copy_(rules[name])


def trains_base(recipe: Recipe, module: nn.Module) -> bool:
    """Whether the method trains weights of the base itself. The head of a classifier is trained by every method."""
    return any(map(recipe.adapter.trains, dict(module.named_parameters())))


def is_mixed(recipe: Recipe, module: nn.Module) -> bool:
    """Whether base weights are trained in a low precision: they are held in fp32, and computed with in a narrower
    dtype."""
    return recipe.model.dtype != "float32" and trains_base(recipe, module)


def autocast(recipe: Recipe, module: nn.Module) -> torch.autocast:
    """Return the autocast of a model whose base weights are trained in a low precision: these weights are held in
    fp32, and the computation is in ``model.dtype``. For any other model the autocast changes nothing.

    Its cache is off, because it would keep the low-precision copies of the first step's weights for the whole run.
    """
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    enabled = is_mixed(recipe, module)
    return torch.autocast(kind, torch_dtype(recipe.model) if enabled else None, enabled=enabled, cache_enabled=False)


def read_base(recipe: Recipe, engine: Engine, head: Head | None = None) -> PreTrainedModel:
    """Load the base, with its weights if this worker reads them. If only the first worker reads, the others wait as
    long as it takes: a large base on a slow disk takes longer than the timeout of an exchange."""
    check_quantization(load_config(recipe.model), recipe.model.name)
    if not engine.first_reads:
        return load_model(recipe.model, head, recipe.seed)
    read: list[PreTrainedModel] = []

    def work() -> str:
        read.append(load_model(recipe.model, head, recipe.seed))
        return json.dumps(tied_groups(read[0]))

    tied = rendezvous.once("base", engine.reads, work)
    return read[0] if read else empty_model(recipe.model, json.loads(tied), head)


def tied_against_files(recipe: Recipe, base: nn.Module) -> bool:
    """Whether names are tied in ``base`` for which its files hold different values. Loading does not tie such names,
    but where it divides weights it compares empty tensors, which are always equal."""
    if not (groups := tied_groups(base)):
        return False
    name, revision = recipe.model.name, recipe.model.revision
    local = Path(name).is_dir()
    directory = Path(name if local else snapshot_download(name, revision=revision, local_files_only=True))
    return len(tied_groups(as_stored(meta_model(recipe.model), directory))) < len(groups)


def needs_whole_base(recipe: Recipe, head: Head | None = None) -> bool:
    """Whether the method reads or trains weights of the base, which then cannot be divided while they are loaded; a
    classifier's head is trained, and so are embeddings with new words."""
    if head is not None or recipe.model.add_tokens or recipe.model.trained_embeddings != "none":
        return True
    model = meta_model(recipe.model)
    with torch.device("meta"):
        model, _ = adapt(model, recipe.adapter)
    return trains_base(recipe, model) or any(adapter.needs_weight for adapter in adapters(model).values())
