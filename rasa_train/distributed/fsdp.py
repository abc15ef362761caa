"""torch's FSDP2: every tensor is divided by its rows."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..models.families import decoder_layers
from .collectives import from_first
from .engine import Engine, placed_state
from .preflight import same_everywhere
from .rendezvous import group_of_one

if TYPE_CHECKING:
    from accelerate import Accelerator


class FullyShard(Engine):
    """torch's FSDP2: every tensor is divided by its rows; each decoder layer is gathered when it is needed.

    Pools are in the root's group, with the embeddings: they stay gathered from the first layer to the last.
    The first worker reads the model and sends it to the others layer by layer, so that no other worker ever holds more
    of the model than its own part and one layer.
    """

    first_reads = True

    def prepare(
        self, model: nn.Module, make_optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    ) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
        from torch.distributed.tensor import DTensor

        group_of_one()
        same_everywhere(self.accelerator, {"the model's tensors": _structure(model)})
        kind = self.accelerator.device.type
        self.mesh = init_device_mesh(kind, (self.accelerator.num_processes,))
        offload = self.config.offload == "all" and kind == "cuda"
        divide = partial(fully_shard, mesh=self.mesh, offload_policy=CPUOffloadPolicy() if offload else OffloadPolicy())
        for layer in decoder_layers(model):
            _fill_from_first(layer, self.accelerator)
            divide(layer)
        _fill_from_first(model, self.accelerator)
        divide(model)
        whole = [name for name, p in model.named_parameters() if not isinstance(p, DTensor)]
        assert not whole, f"not divided among workers: {whole[:3]}"
        if not offload:
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
        """Divide the root's group again. It stays gathered for a backward pass, and meanwhile its parameters are other
        objects."""
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
                self.optimizer.state[parameter][key] = placed_state(self.optimizer, parameter, tensor)


def _structure(model: nn.Module) -> str:
    """Return a digest of all that the workers must agree on before tensors travel: names, shapes, and what is tied."""
    digest, seen = hashlib.sha256(), dict[int, int]()
    for tensors in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)):
        for name, tensor in tensors:
            digest.update(f"{name} {tuple(tensor.shape)} {seen.setdefault(id(tensor), len(seen))}\n".encode())
    return digest.hexdigest()[:12]


@torch.no_grad()
def _fill_from_first(module: nn.Module, accelerator: Accelerator) -> None:
    """Give all parameters and buffers below ``module`` that are not divided yet the values and the dtypes that they
    have on the first worker, on the device of each. Tied parameters stay tied."""
    from torch.distributed.tensor import DTensor

    places: list[tuple[dict[str, Tensor], str]] = [
        (tensors, name)
        for child in module.modules()
        for tensors in (vars(child)["_parameters"], vars(child)["_buffers"])
        for name, tensor in tensors.items()
        if tensor is not None and not isinstance(tensor, DTensor)
    ]
    dtypes = from_first(accelerator, [str(tensors[name].dtype).removeprefix("torch.") for tensors, name in places])
    filled: dict[int, tuple[Tensor, Tensor]] = {}  # holds the old tensor, so that its id is not reused
    for (tensors, name), dtype in zip(places, dtypes, strict=True):
        old = tensors[name]
        if id(old) not in filled:
            of_model = isinstance(old, nn.Parameter)
            if accelerator.is_main_process:
                new = old.detach().to(accelerator.device).contiguous()
                if of_model:
                    old.data = old.data.new_empty(0)  # other references must not keep the memory
            else:
                new = torch.empty(old.shape, dtype=getattr(torch, dtype), device=accelerator.device)
            dist.broadcast(new.view(-1).view(torch.uint8), src=0)
            filled[id(old)] = old, nn.Parameter(new, requires_grad=old.requires_grad) if of_model else new
        tensors[name] = filled[id(old)][1]
