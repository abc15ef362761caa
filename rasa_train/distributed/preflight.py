"""Checks before the start that the workers can work together."""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import UserError, WorkerLost, first_line
from .collectives import gather
from .network import interfaces
from .rendezvous import broken_off, places

if TYPE_CHECKING:
    from accelerate import Accelerator


# -- preflight -----------------------------------------------------------------------------------------------


def same_everywhere(accelerator: Accelerator, facts: Mapping[str, str]) -> None:
    """Raise ``UserError`` naming the workers whose ``facts`` (recipe, versions, weights) differ from the first's."""
    every = gather(accelerator, dict(facts))
    where = places()
    different = [
        f"  {name}: {every[0][name]} on worker 0, {theirs[name]} on worker {worker} ({where[worker]})"
        for worker, theirs in enumerate(every)
        for name in every[0]
        if theirs[name] != every[0][name]
    ]
    if different:
        raise UserError("workers do not agree:\n" + "\n".join(different[:10]), key="distributed")


def fingerprints(model: nn.Module) -> dict[str, str]:
    """Return digests of the trained parameters and of the first values of each frozen tensor (none if divided)."""
    whole, beginnings = hashlib.sha256(), hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest, entries = (whole, None) if parameter.requires_grad else (beginnings, 64)
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().flatten()[:entries].float().cpu().numpy().tobytes())
    return {"trained parameters": whole.hexdigest()[:12], "base weights": beginnings.hexdigest()[:12]}


def preflight(accelerator: Accelerator, size: int) -> str | None:
    """Time the exchange that every step will make, of ``size`` fp32 numbers. Returns one line on the exchange and a
    line for each slow worker; None if there is only one worker.

    Raises:
        WorkerLost: an exchange broke off or took longer than the timeout; the message names this worker and its
            neighbours. It is no ``UserError``, since another worker may have failed and says why.
    """
    workers, me = accelerator.num_processes, accelerator.process_index
    if workers == 1:
        return None
    where = places()
    before, after = (me - 1) % workers, (me + 1) % workers
    try:
        message = torch.ones(1 << 18, device=accelerator.device)
        _ring(message, before, after)  # connects
        link = min(_timed(accelerator, lambda: _ring(message, before, after)) for _ in range(3))
        a = torch.ones(512, 512, device=accelerator.device)
        compute = min(_timed(accelerator, lambda: a @ a @ a @ a) for _ in range(3))
        gradients = torch.zeros(size, device=accelerator.device)
        exchange = min(_timed(accelerator, lambda: dist.all_reduce(gradients)) for _ in range(2))
    except RuntimeError as error:
        if not broken_off(error):
            raise
        raise WorkerLost(
            f"worker {me} ({where[me]}) lost the others in the first exchange; its neighbours are worker {before} "
            f"({where[before]}) and worker {after} ({where[after]}): {first_line(error)}\n"
            f"Its network interfaces: {interfaces()}. GLOO_SOCKET_IFNAME (and NCCL_SOCKET_IFNAME) choose one.",
            [],
        ) from None
    times = gather(accelerator, (link, compute))
    lines = [
        f"{workers} workers on {len({p.split()[0] for p in where})} host(s): "
        f"{size * 4 / 2**20:.1f} MiB of gradients are summed in {exchange * 1e3:.0f} ms"
    ]
    return "\n".join(lines + slow_workers(times, where))


def slow_workers(times: list[tuple[float, float]], places: list[str]) -> list[str]:
    """Return a line for each worker that takes much longer than most. ``times`` holds, for each worker, the seconds to
    receive from the worker before it and the seconds to compute."""
    lines = []
    for i, what in enumerate(("receives slowly from the worker before it", "computes slowly")):
        typical = statistics.median_low([t[i] for t in times])
        lines += [
            f"worker {worker} ({places[worker]}) {what}: {t[i] * 1e3:.0f} ms, most {typical * 1e3:.0f} ms"
            for worker, t in enumerate(times)
            if t[i] > max(3 * typical, typical + 0.05)
        ]
    return lines


def _ring(message: Tensor, before: int, after: int) -> None:
    received = torch.empty_like(message)
    exchange = [dist.P2POp(dist.isend, message, after), dist.P2POp(dist.irecv, received, before)]
    for request in dist.batch_isend_irecv(exchange):
        request.wait()


def _timed(accelerator: Accelerator, work: Callable[[], object]) -> float:
    dist.barrier()
    began = time.perf_counter()
    work()
    if accelerator.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began
