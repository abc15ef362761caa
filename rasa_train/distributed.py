"""How workers share a model: the strategies, and what is gathered from all of them. All of DeepSpeed is here.

An ``Engine`` is one way to share a model among workers. The loop calls the same few methods whichever it is:
``DataParallel`` (also one process), ``Zero`` (DeepSpeed, stages 1 to 3), ``FullyShard`` (torch's FSDP2). All of them
give the gradients of one process: the sum over workers of what each has computed.
"""

from __future__ import annotations

import math
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn
from torch.distributed import HashStore  # type: ignore[attr-defined]

from .errors import UserError
from .group import average, from_first, world_size

if TYPE_CHECKING:  # a recipe is read without it
    from accelerate import Accelerator

BUCKET = 64 << 20
"""Bytes of gradients that are exchanged at a time under ``ddp``."""
Strategy = Literal["ddp", "zero1", "zero2", "zero3", "fsdp"]


class DistributedConfig(BaseModel):
    """Section ``distributed:``. May change from one start of a run to the next."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    strategy: Strategy = "ddp"
    """What is divided among the workers: nothing (ddp), optimizer state (zero1), and gradients (zero2), and all weights
    (zero3, fsdp). One process is the case of one worker, whatever this says."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """What is kept in host memory: optimizer state (zero1 to zero3), or the weights as well (zero3, fsdp)."""
    timeout_seconds: PositiveInt = 600
    """How long a worker waits for another before it gives up: when they meet, and in every exchange."""
    resident_size: NonNegativeInt | None = None
    """zero3: tensors of at most this many elements are not divided. Default: the largest of the adapter, so that only
    base weights are gathered."""
    gpu_memory_gib: PositiveFloat | None = None
    """Memory of one GPU in GiB, for the advice of ``--check``. Default: that of the GPU that is there."""

    @model_validator(mode="after")
    def _offload_fits(self) -> DistributedConfig:
        possible = {"none": None, "optimizer": ("zero1", "zero2", "zero3"), "all": ("zero3", "fsdp")}[self.offload]
        if possible and self.strategy not in possible:
            raise UserError(
                f"distributed.offload: {self.offload} needs distributed.strategy to be one of {', '.join(possible)}, "
                f"got {self.strategy}",
                key="distributed.offload",
            )
        return self


class Engine(ABC):
    """One way to share a model among workers. ``prepare`` once, then for each step: ``backward`` for every
    micro-batch, ``step``, ``zero_grad``."""

    sharded: ClassVar[bool]
    """Workers hold parts of the trained tensors, or wait for each other in the forward pass."""
    first_reads: ClassVar[bool] = False
    """Before ``prepare`` only the first worker has values; those of the others are on the meta device until then."""

    def __init__(self, config: DistributedConfig, accelerator: Accelerator, max_grad_norm: float | None) -> None:
        self.config, self.accelerator = config, accelerator
        self.max_grad_norm = max_grad_norm or math.inf
        self.model: nn.Module
        """What is called with a batch; set by ``prepare``."""
        self.optimizer: torch.optim.Optimizer
        """Whose learning rate is set; made by ``prepare``."""

    @property
    def reads(self) -> bool:
        """Whether this worker reads the base, and the adapter to start from."""
        return self.accelerator.is_main_process or not self.first_reads

    def loading(self, dtype: torch.dtype, *, divide: bool) -> AbstractContextManager[None]:
        """Around the loading of the base in ``dtype``. ``divide``: weights may be divided as they are read."""
        return nullcontext()

    @abstractmethod
    def prepare(
        self, model: nn.Module, make_optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    ) -> None:
        """Place and divide the model, and the optimizer of what is trained in it."""

    @abstractmethod
    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of ``loss``; with the ``last`` micro-batch of a step, average over workers."""

    @abstractmethod
    def synchronizing(self, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of a micro-batch: gradients are exchanged with the ``last`` only."""

    @abstractmethod
    def step(self, loss: float) -> float:
        """Clip, update. Returns the L2 norm of all gradients before clipping, equal on all workers, as ``loss`` is.
        If one of them is not finite, nothing is updated: neither parameters nor the optimizer's state."""

    @abstractmethod
    def zero_grad(self) -> None: ...

    @abstractmethod
    def release(self) -> None:
        """After a forward pass that no backward pass follows: let go of what it has gathered."""

    @abstractmethod
    def whole(self, tensor: Tensor) -> Tensor:
        """All of a tensor of the model. Every worker must call it."""

    @abstractmethod
    def optimizer_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """All of the optimizer's state of a parameter, by its key. Every worker must call it."""

    @abstractmethod
    def load_optimizer_state(self, states: Mapping[nn.Parameter, Mapping[str, Tensor]]) -> None:
        """The reverse of ``optimizer_state``, for all parameters at once."""

    @torch.no_grad()
    def gathered(
        self, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
    ) -> Iterator[tuple[str, Tensor]]:
        """Whole tensors, one at a time, those of larger dtypes first. Every worker must go through all of them."""
        for name in sorted(tensors, key=lambda name: (-tensors[name].element_size(), name)):
            whole = self.whole(tensors[name])
            assert tuple(whole.shape) == tuple(shapes[name]), (name, tuple(whole.shape), shapes[name])
            yield name, whole

    def gathered_optimizer(self, parameters: Mapping[str, nn.Parameter]) -> Iterator[tuple[str, Tensor]]:
        """``<state key>:<parameter name>`` and the whole tensor, one at a time. Every worker must go through all."""
        for name, parameter in parameters.items():
            for key, tensor in self.optimizer_state(parameter).items():
                yield f"{key}:{name}", torch.as_tensor(tensor)


def make_engine(config: DistributedConfig, accelerator: Accelerator, max_grad_norm: float | None) -> Engine:
    """The engine of ``config.strategy``. One worker has nothing to divide, unless it is to use host memory."""
    if config.strategy == "ddp" or (accelerator.num_processes == 1 and config.offload == "none"):
        return DataParallel(config, accelerator, max_grad_norm)
    return (FullyShard if config.strategy == "fsdp" else Zero)(config, accelerator, max_grad_norm)


class DataParallel(Engine):
    """Every worker holds everything; gradients are averaged. One process is the case of one worker."""

    sharded = False

    def prepare(
        self, model: nn.Module, make_optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    ) -> None:
        self.model = model.to(self.accelerator.device)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(self.parameters)

    def synchronizing(self, last: bool) -> AbstractContextManager[None]:
        return nullcontext()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self, loss: float) -> float:
        self._average_gradients()
        norm = float(nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm))
        if math.isfinite(loss + norm):
            self.optimizer.step()
        return norm

    def _average_gradients(self) -> None:
        """Once a step, in a few large exchanges. Not by torch's DistributedDataParallel: it waits for the gradient of
        each parameter in each backward pass, and those of packed factors come all at once, after the last one."""
        if self.accelerator.num_processes == 1:
            return
        bucket: list[Tensor] = []
        size = 0
        for parameter in self.parameters:
            if parameter.grad is None:  # not reached by this worker's examples
                parameter.grad = torch.zeros_like(parameter)
            bucket.append(parameter.grad)
            size += parameter.grad.nbytes
            if size >= BUCKET:
                average(bucket, self.accelerator.num_processes)
                bucket, size = [], 0
        average(bucket, self.accelerator.num_processes)

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    def release(self) -> None:
        """Nothing was gathered."""

    def whole(self, tensor: Tensor) -> Tensor:
        return tensor

    def optimizer_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        return dict(self.optimizer.state.get(parameter, {}))

    def load_optimizer_state(self, states: Mapping[nn.Parameter, Mapping[str, Tensor]]) -> None:
        for parameter, state in states.items():
            for key, tensor in state.items():
                self.optimizer.state[parameter][key] = _placed(self.optimizer, parameter, tensor)


class FullyShard(Engine):
    """torch's FSDP2: every tensor is divided by its rows; each decoder layer is gathered when it is needed.

    Pools are in the root's group, with the embeddings: they stay gathered from the first layer to the last.
    The first worker reads the model and sends it to the others layer by layer, so that no other ever holds more of it
    than its own part and one layer.
    """

    sharded = True
    first_reads = True

    def prepare(
        self, model: nn.Module, make_optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    ) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
        from torch.distributed.tensor import DTensor

        _group_of_one()
        kind = self.accelerator.device.type
        self.mesh = init_device_mesh(kind, (self.accelerator.num_processes,))
        options: dict[str, Any] = {"mesh": self.mesh}
        if self.config.offload == "all" and kind == "cuda":
            options["offload_policy"] = CPUOffloadPolicy()
        for layer in decoder_layers(model):
            _fill_from_first(layer, self.accelerator)
            fully_shard(layer, **options)
        _fill_from_first(model, self.accelerator)
        fully_shard(model, **options)
        whole = [name for name, p in model.named_parameters() if not isinstance(p, DTensor)]
        assert not whole, f"not divided among workers: {whole[:3]}"
        if "offload_policy" not in options:
            for buffer in model.buffers():
                buffer.data = buffer.data.to(self.accelerator.device)
        self.model = model
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(self.parameters)

    def synchronizing(self, last: bool) -> AbstractContextManager[None]:
        self.model.set_requires_gradient_sync(last)  # type: ignore[operator]
        return nullcontext()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self, loss: float) -> float:
        norm = float(self.whole(nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)))
        if math.isfinite(loss + norm):
            self.optimizer.step()
        return norm

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    def release(self) -> None:
        """The root's group stays gathered for a backward pass; its parameters are others meanwhile."""
        self.model.reshard()  # type: ignore[operator]

    def whole(self, tensor: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor

        if not isinstance(tensor, DTensor):
            return tensor
        device = self.accelerator.device  # offloaded shards travel over the group of the device
        whole: Tensor = tensor.to(device).full_tensor()  # type: ignore[attr-defined]
        return whole

    def optimizer_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        assert type(parameter) is not nn.Parameter, "a gathered parameter has no state: release it first"
        return {key: self.whole(torch.as_tensor(t)) for key, t in self.optimizer.state.get(parameter, {}).items()}

    def load_optimizer_state(self, states: Mapping[nn.Parameter, Mapping[str, Tensor]]) -> None:
        from torch.distributed.tensor import DTensor, distribute_tensor

        for parameter, state in states.items():
            assert isinstance(parameter, DTensor)
            for key, tensor in state.items():
                if tensor.shape == parameter.shape:
                    tensor = distribute_tensor(tensor.to(self.mesh.device_type), self.mesh, parameter.placements)
                self.optimizer.state[parameter][key] = _placed(self.optimizer, parameter, tensor)


class Zero(Engine):
    """DeepSpeed's ZeRO. The engine runs without its own mixed precision: base weights keep their dtype, adapters are
    fp32, as everywhere else, so what DeepSpeed divides is the fp32 state that is saved."""

    sharded = True

    @property
    def stage(self) -> int:
        return int(self.config.strategy.removeprefix("zero"))

    def _deepspeed_config(self, trained: int = 0, largest: int = 0) -> dict[str, Any]:
        """``trained`` elements in all, ``largest`` in one tensor of the adapter."""
        bucket = min(max(trained, 1), 500_000_000)  # elements; DeepSpeed allocates it whole
        zero: dict[str, Any] = {"stage": self.stage, "reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
        host = {"device": "cpu", "pin_memory": self.accelerator.device.type == "cuda"}
        if self.config.offload != "none":
            zero["offload_optimizer"] = host
        if self.config.offload == "all":
            zero["offload_param"] = host
        if self.stage == 3:
            resident = self.config.resident_size
            zero["stage3_param_persistence_threshold"] = max(largest, 100_000) + 1 if resident is None else resident
        return {
            "train_micro_batch_size_per_gpu": 1,
            "train_batch_size": self.accelerator.num_processes,
            "gradient_accumulation_steps": 1,  # the loop accumulates, and says which micro-batch is the last
            "gradient_clipping": 0.0 if self.max_grad_norm == math.inf else self.max_grad_norm,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # the optimizer of the recipe, also in host memory
        }

    @contextmanager
    def loading(self, dtype: torch.dtype, *, divide: bool) -> Iterator[None]:
        self._divided = divide and self.stage == 3
        if not self._divided:
            yield
            return
        _deepspeed(self.accelerator)
        from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

        # from_pretrained sees it, and divides what it reads; what is not said to be 16-bit would be made fp32
        halves = {torch.bfloat16: "bf16", torch.float16: "fp16"}
        precision = {halves[dtype]: {"enabled": True}} if dtype in halves else {}
        config = HfDeepSpeedConfig(self._deepspeed_config() | precision)
        try:
            yield
        finally:
            unset_hf_deepspeed_config()
            del config

    def prepare(
        self, model: nn.Module, make_optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    ) -> None:
        deepspeed = _deepspeed(self.accelerator)
        assert not self._divided or any(map(_divided, model.parameters())), "the base was not divided as it was read"
        if self.config.offload != "all":
            for tensor in (*model.parameters(), *model.buffers()):
                if not _divided(tensor):
                    tensor.data = tensor.data.to(self.accelerator.device)
        parameters = [p for p in model.parameters() if p.requires_grad]
        of_adapter = [p.numel() for n, p in model.named_parameters() if p.requires_grad and not _of_base(n)]
        config = self._deepspeed_config(sum(p.numel() for p in parameters), max(of_adapter, default=0))
        engine, *_ = deepspeed.initialize(model=model, optimizer=make_optimizer(parameters), config=config)
        self.model = self.engine = engine
        self.optimizer = engine.optimizer.optimizer
        assert engine.zero_optimization_stage() == self.stage and engine.dp_world_size == world_size()
        if self.stage == 3:
            assert all(_divided(p) for p in model.parameters())

    def synchronizing(self, last: bool) -> AbstractContextManager[None]:
        self.engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """A loss that is not finite makes all of its gradients so, by which DeepSpeed skips the step."""
        self.engine.backward(loss * (1 + 0 * loss.detach()))

    def step(self, loss: float) -> float:
        self.engine.step()
        return float(self.engine.get_global_grad_norm())

    def zero_grad(self) -> None:
        """DeepSpeed has done it in ``step``."""

    def release(self) -> None:
        """DeepSpeed has done it after the forward pass."""

    def whole(self, tensor: Tensor) -> Tensor:
        if not _divided(tensor):
            return tensor
        with _deepspeed(self.accelerator).zero.GatheredParameters([tensor]):
            return tensor.detach().clone()

    def optimizer_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_optimizer_state

        state: Mapping[str, Any] = next(iter(self.optimizer.state.values()), {})
        whole = {}
        for key, value in state.items():
            if torch.is_tensor(value) and value.dim() > 0:
                full = safe_get_full_optimizer_state(parameter, key)
                whole[key] = full.view(getattr(parameter, "ds_shape", parameter.shape))
            else:  # Adam's step
                whole[key] = torch.as_tensor(value)
        return whole

    def load_optimizer_state(self, states: Mapping[nn.Parameter, Mapping[str, Tensor]]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        zero = self.engine.optimizer
        flats = zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups
        example = next(iter(states.values()), {})
        for flat in flats:
            for key, tensor in example.items():
                empty = torch.zeros_like(flat.data) if tensor.dim() > 0 else tensor.clone()
                self.optimizer.state[flat][key] = _placed(self.optimizer, flat, empty)
        if self.stage < 3:
            zero._lazy_init_hp_params_optimizer_state()
        for parameter, state in states.items():
            for key, tensor in state.items():
                if tensor.dim() > 0:
                    safe_set_full_optimizer_state(parameter, tensor.to(self.accelerator.device), key)


def _deepspeed(accelerator: Accelerator) -> Any:
    """DeepSpeed, quiet and with the group of workers that is there."""
    import logging

    if accelerator.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    for handler in logger.handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(sys.stderr)  # stdout is for results
    if not deepspeed.comm.is_initialized():
        # Without it no compiler is called at the start (24 s) for what only helps inference on CPUs.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        _group_of_one()
        deepspeed.init_distributed(
            dist_backend="nccl" if accelerator.device.type == "cuda" else "gloo", auto_mpi_discovery=False
        )
    return deepspeed


def _placed(optimizer: torch.optim.Optimizer, parameter: Tensor, state: Tensor) -> Tensor:
    """Move state to where ``optimizer`` wants it. The count of steps is on the CPU, unless a fused kernel counts."""
    fused = optimizer.param_groups[0].get("fused")
    return state.to(parameter.device) if fused or state.shape == parameter.shape else state


@torch.no_grad()
def _fill_from_first(module: nn.Module, accelerator: Accelerator) -> None:
    """Give all parameters and buffers below ``module`` that are not divided yet the values and the dtypes that they
    have on the first worker, on the device of each. Tied parameters stay tied."""
    from torch.distributed.tensor import DTensor

    places: list[tuple[dict[str, Any], str]] = [
        (tensors, name)
        for child in module.modules()
        for tensors in (vars(child)["_parameters"], vars(child)["_buffers"])
        for name, tensor in tensors.items()
        if tensor is not None and not isinstance(tensor, DTensor)
    ]
    dtypes = from_first(accelerator, [tensors[name].dtype for tensors, name in places])
    filled: dict[int, tuple[Tensor, Tensor]] = {}  # with what was there before, so that its id stays its own
    for (tensors, name), dtype in zip(places, dtypes, strict=True):
        old = tensors[name]
        if id(old) not in filled:
            of_model = isinstance(old, nn.Parameter)
            if accelerator.is_main_process:
                new = old.detach().to(accelerator.device).contiguous()
                if of_model:
                    old.data = old.data.new_empty(0)  # the memory must not stay with what refers to it
            else:
                new = torch.empty(old.shape, dtype=dtype, device=accelerator.device)
            dist.broadcast(new.view(-1).view(torch.uint8), src=0)
            filled[id(old)] = old, nn.Parameter(new, requires_grad=old.requires_grad) if of_model else new
        tensors[name] = filled[id(old)][1]


def _group_of_one() -> None:
    """One process that uses host memory is a group as well."""
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it, now and later


def _divided(tensor: Tensor) -> bool:
    """Whether ZeRO-3 has it: a tensor that DeepSpeed has divided carries its id."""
    return "ds_id" in vars(tensor)


def _of_base(name: str) -> bool:
    return ".adapter." not in name and not name.startswith("pools.")


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The repeated layers of the model: the longest ModuleList that is in no other (experts are in a layer)."""
    lists = {path: module for path, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    outermost = [list(m) for path, m in lists.items() if not any(path.startswith(f"{other}.") for other in lists)]
    return max(outermost, key=len)
