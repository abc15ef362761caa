"""DeepSpeed's ZeRO, stages 1 to 3. No other module imports DeepSpeed."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..process import world_size
from .engine import Engine, placed_state
from .rendezvous import group_of_one

if TYPE_CHECKING:
    from accelerate import Accelerator


class Zero(Engine):
    """DeepSpeed's ZeRO. DeepSpeed runs without its own mixed precision: base weights keep their dtype and adapters are
    fp32, as everywhere else, so what DeepSpeed divides is the fp32 state that is saved."""

    def _deepspeed_config(self, trained: int = 0, largest: int = 0) -> dict[str, object]:
        """Return DeepSpeed's settings for ``trained`` elements in all, ``largest`` in one tensor of the adapter."""
        bucket = min(2 * math.ceil(trained / 2) or 2, 500_000_000)  # elements, even; DeepSpeed allocates it whole
        zero: dict[str, object] = {
            "stage": self.capabilities.stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
        }
        host = {"device": "cpu", "pin_memory": self.accelerator.device.type == "cuda"}
        if self.config.offload != "none":
            zero["offload_optimizer"] = host
        if self.config.offload == "all":
            zero["offload_param"] = host
        if self.capabilities.divides_weights:
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
        self._divided = divide and self.capabilities.divides_weights
        if not self._divided:
            yield
            return
        _deepspeed(self.accelerator)
        from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

        # from_pretrained sees this object and divides what it reads; without a precision it would make weights fp32
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
        assert engine.zero_optimization_stage() == self.capabilities.stage and engine.dp_world_size == world_size()
        if self.capabilities.divides_weights:
            assert all(_divided(p) for p in model.parameters())

    def synchronizing(self, last: bool) -> AbstractContextManager[None]:
        self.engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Run backward such that a loss that is not finite makes all gradients so, and DeepSpeed skips the step."""
        self.engine.backward(loss * (1 + 0 * loss.detach()))

    def step(self, loss: float) -> float:
        self.engine.step()
        return float(self.engine.get_global_grad_norm())

    def zero_grad(self) -> None:
        """Do nothing: DeepSpeed has cleared the gradients in ``step``."""

    def release(self) -> None:
        """Do nothing: DeepSpeed has released the weights after the forward pass."""

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
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        zero = self.engine.optimizer
        flats = (
            zero.fp32_partitioned_groups_flat
            if self.capabilities.divides_weights
            else zero.single_partition_of_fp32_groups
        )
        example = next(iter(states.values()), {})
        for flat in flats:
            for key, tensor in example.items():
                empty = torch.zeros_like(flat.data) if tensor.dim() > 0 else tensor.clone()
                self.optimizer.state[flat][key] = placed_state(self.optimizer, flat, empty)
        if not self.capabilities.divides_weights:
            zero._lazy_init_hp_params_optimizer_state()
        for parameter, state in states.items():
            for key, tensor in state.items():
                if tensor.dim() > 0 and self.capabilities.divides_weights:
                    safe_set_local_optimizer_state(parameter, self._own_part(tensor, parameter), key)
                elif tensor.dim() > 0:
                    safe_set_full_optimizer_state(parameter, tensor.to(self.accelerator.device), key)

    def _own_part(self, whole: Tensor, parameter: nn.Parameter) -> Tensor:
        """Return this worker's part of a tensor of the shape of ``parameter``. All parts have one size: where the
        workers do not divide the tensor evenly, zeros fill up the last parts, for which DeepSpeed's own function for
        whole tensors does not care."""
        size, me = vars(parameter)["ds_tensor"].numel(), self.accelerator.process_index
        part = whole.flatten()[size * me : size * (me + 1)]
        return nn.functional.pad(part, (0, size - part.numel()))


def _deepspeed(accelerator: Accelerator) -> Any:
    """Return the module ``deepspeed``, logging only errors and joined to the existing group of workers."""
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
        # Without this operation, which only helps inference on CPUs, no compiler is called at the start (24 s).
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        group_of_one()
        deepspeed.init_distributed(
            dist_backend="nccl" if accelerator.device.type == "cuda" else "gloo", auto_mpi_discovery=False
        )
    return deepspeed


def _divided(tensor: Tensor) -> bool:
    """Whether ZeRO-3 has divided ``tensor``, which then carries DeepSpeed's id."""
    return "ds_id" in vars(tensor)


def _of_base(name: str) -> bool:
    return ".adapter." not in name and not name.startswith("pools.")
