"""The group of workers: meeting, agreeing, and looking before the start whether they can work together."""

from __future__ import annotations

import hashlib
import os
import resource
import socket
import statistics
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from . import __version__
from .errors import UserError, WorkerLost

if TYPE_CHECKING:  # a recipe is read without it
    from accelerate import Accelerator


def world_size() -> int:
    """Workers that the launcher has started, 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def join(timeout_seconds: int) -> list[str]:
    """Meet the other workers. Returns where each of them is, by rank. Does nothing when it was done before.

    Raises:
        UserError: a worker did not come, or cannot be connected to, within the time; the message names it.
    """
    if world_size() == 1:
        return [here()]
    if not _group:
        timeout = timedelta(seconds=timeout_seconds)
        store = _store(timeout)
        where = _roll_call(store, timeout_seconds)
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        try:
            dist.init_process_group(
                backend, store=PrefixStore("group", store), rank=rank(), world_size=world_size(), timeout=timeout
            )
        except RuntimeError as error:
            raise UserError(
                f"worker {rank()} ({where[rank()]}) could not connect to the other workers: {first_line(error)}\n"
                f"Its network interfaces: {interfaces()}. GLOO_SOCKET_IFNAME (and NCCL_SOCKET_IFNAME) choose one.",
                key="distributed",
            ) from None
        _group.update(store=store, places=where)
    return places()


_group: dict[str, Any] = {}


def places() -> list[str]:
    """Where each worker is, by rank: its host and, where there is one, its GPU."""
    return list(_group["places"]) if _group else [here()]


def _store(timeout: timedelta) -> Store:
    """The key-value store of the job; under torchrun one of each restart."""
    address, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ.get("MASTER_PORT", "29500"))
    of_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store = TCPStore(
            address,
            port,
            world_size(),
            is_master=rank() == 0 and not of_agent,
            timeout=timeout,
            wait_for_workers=False,
            multi_tenant=True,
        )
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"worker {rank()} ({here()}) cannot reach worker 0 at {address}:{port}: {first_line(error)}",
            key="distributed",
        ) from None
    return PrefixStore(f"rasa_train/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _roll_call(store: Store, timeout_seconds: int) -> list[str]:
    workers = range(world_size())
    store.set(f"here/{rank()}", here())
    deadline = time.monotonic() + timeout_seconds
    missing = [worker for worker in workers if not _is_set(store, f"here/{worker}", deadline)]
    places = [store.get(f"here/{worker}").decode() for worker in workers if worker not in missing]
    if missing:
        came = ", ".join(sorted(set(places))) or "nobody"
        raise UserError(
            f"{len(missing)} of {world_size()} workers did not come within {timeout_seconds} s: worker "
            f"{', '.join(map(str, missing[:16]))}. There are workers on: {came}. Were all nodes started, and is "
            f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')} reachable from each?",
            key="distributed.timeout_seconds",
        )
    return places


def once(name: str, first: bool, work: Callable[[], str]) -> str:
    """``work`` done by the one worker for which ``first`` is true, its answer given to all.

    Raises:
        UserError: where the work was done and the input is wrong.
        SystemExit: with code 2, on the other workers, in that case: the message is printed once.
    """
    store: Store | None = _group.get("store")
    if store is None:
        return work()
    if first:
        try:
            answer = work()
        except UserError:
            store.set(name, "wrong")
            raise
        store.set(name, f"right {answer}")
        return answer
    store.wait([name], timedelta(days=2))
    verdict, _, answer = store.get(name).decode().partition(" ")
    if verdict == "wrong":
        raise SystemExit(2)
    return answer


def start(timeout_seconds: int, *, log_with: list[str] | None = None, project_dir: str | None = None) -> Accelerator:
    """Join the group of workers the launcher made, or be the one worker.

    Raises:
        RuntimeError: accelerate sees another number of workers than the launcher started. That would train
            each of them on its own, without an error.
    """
    from accelerate import Accelerator

    warnings.filterwarnings("ignore", category=FutureWarning)  # of torch about itself and DeepSpeed, at every step
    join(timeout_seconds)
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), log_with=log_with or None, project_dir=project_dir)
    if accelerator.num_processes != world_size():
        raise RuntimeError(f"the launcher started {world_size()} workers, accelerate sees {accelerator.num_processes}")
    return accelerator


def sum_over_workers(accelerator: Accelerator, values: list[float]) -> list[float]:
    """Element-wise sums over all workers, in fp64."""
    if accelerator.num_processes == 1:
        return values
    total = torch.tensor(values, dtype=torch.float64, device=accelerator.device)
    dist.all_reduce(total)
    return [float(v) for v in total.tolist()]


def average(tensors: list[Tensor], workers: int) -> None:
    """Mean over all workers, in place, in one exchange."""
    if not tensors:
        return
    together = torch.cat([tensor.flatten() for tensor in tensors]).div_(workers)
    dist.all_reduce(together)
    parts = torch.split(together, [tensor.numel() for tensor in tensors])  # type: ignore[no-untyped-call]
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view_as(tensor))


def stop_agreed(accelerator: Accelerator, reason: str) -> bool:
    """Whether any worker was asked to stop (has a ``reason``). Every worker must call it at the same step."""
    return sum_over_workers(accelerator, [float(bool(reason))])[0] > 0


def from_first(accelerator: Accelerator, value: Any) -> Any:
    """What ``value`` is on the first worker."""
    if accelerator.num_processes == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather(accelerator: Accelerator, value: Any) -> list[Any]:
    """What ``value`` is on each worker."""
    if accelerator.num_processes == 1:
        return [value]
    every: list[Any] = [None] * accelerator.num_processes
    dist.all_gather_object(every, value)
    return every


def micro_batch_seed(seed: int, step: int, example: int) -> int:
    """Seed of the dropout masks of the micro-batch of ``step`` that begins with ``example``: the same on any number
    of workers, so there is no RNG state to save, and a resumed run draws what the uninterrupted one draws."""
    return ((seed * 1_000_003 + step) * 16_777_619 + example) % 2**63


# -- losing a worker -----------------------------------------------------------------------------------------


@contextmanager
def watching(timeout_seconds: int) -> Iterator[None]:
    """Where workers exchange tensors. An exchange that breaks off, because a worker has died, hangs or cannot be
    reached for ``timeout_seconds``, ends in ``WorkerLost`` on all the others."""
    try:
        yield
    except RuntimeError as error:
        if "store" not in _group or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        missing = _missing(_group["store"])
        names = ", ".join(f"worker {worker} ({_group['places'][worker]})" for worker in missing)
        what = f"{names} did not answer" if missing else "an exchange broke off, and all workers are there"
        why = ": dead, hanging, or out of reach" if missing else ""
        raise WorkerLost(
            f"{what} (distributed.timeout_seconds={timeout_seconds}){why}. "
            f"Worker {rank()} ({_group['places'][rank()]}) was told: {first_line(error)}",
            missing,
        ) from None


ROLL_CALL_SECONDS = 3.0
"""How long after a broken exchange a worker waits for the others to say that they are alive. The timeouts of those
that waited for the same one end together."""


def _missing(store: Store) -> list[int]:
    """Workers that do not answer now. The store is in the process of worker 0, so its silence is that worker's."""
    found = [0]

    def call_roll() -> None:
        with suppress(RuntimeError):
            store.set(f"alive/{rank()}", "")
            deadline = time.monotonic() + ROLL_CALL_SECONDS
            missing = [worker for worker in range(world_size()) if not _is_set(store, f"alive/{worker}", deadline)]
            found[:] = [0] if rank() in missing else missing
            if rank() == 0 and len(missing) < world_size() - 1:
                time.sleep(ROLL_CALL_SECONDS)  # the others may still be calling

    caller = threading.Thread(target=call_roll, daemon=True)  # a call to a dead store may never return
    caller.start()
    caller.join(3 * ROLL_CALL_SECONDS)
    return found


def _is_set(store: Store, key: str, deadline: float) -> bool:
    """Whether it is set by the ``deadline``, of ``time.monotonic()``."""
    try:
        store.wait([key], timedelta(seconds=max(deadline - time.monotonic(), 0.01)))
    except RuntimeError:  # torch's DistStoreError
        return False
    return True


# -- preflight -----------------------------------------------------------------------------------------------


def same_everywhere(accelerator: Accelerator, facts: Mapping[str, str]) -> None:
    """Raise ``UserError`` naming the workers whose ``facts`` (recipe, versions, weights) differ from the first's."""
    every: list[dict[str, str]] = gather(accelerator, dict(facts))
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
    """Of all that is trained, and of the beginnings of what is frozen (nothing of a tensor that is divided)."""
    whole, beginnings = hashlib.sha256(), hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest, entries = (whole, None) if parameter.requires_grad else (beginnings, 64)
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().flatten()[:entries].float().cpu().numpy().tobytes())
    return {"trained parameters": whole.hexdigest()[:12], "base weights": beginnings.hexdigest()[:12]}


def preflight(accelerator: Accelerator, size: int) -> str | None:
    """Time the exchange that every step will make, of ``size`` fp32 numbers. Returns one line, and a line for each
    worker that is slow; None for one worker.

    Raises:
        UserError: an exchange failed or took longer than the timeout; the message names the workers it was with.
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
        raise UserError(
            f"worker {me} ({where[me]}) lost the others in the first exchange; its neighbours are worker {before} "
            f"({where[before]}) and worker {after} ({where[after]}): {first_line(error)}\n"
            f"Its network interfaces: {interfaces()}. GLOO_SOCKET_IFNAME (and NCCL_SOCKET_IFNAME) choose one.",
            key="distributed",
        ) from None
    times: list[tuple[float, float]] = gather(accelerator, (link, compute))
    lines = [
        f"{workers} workers on {len({p.split()[0] for p in where})} host(s): "
        f"{size * 4 / 2**20:.1f} MiB of gradients are summed in {exchange * 1e3:.0f} ms"
    ]
    return "\n".join(lines + slow_workers(times, where))


def slow_workers(times: list[tuple[float, float]], places: list[str]) -> list[str]:
    """A line for each worker that takes much longer than most: (receiving from the worker before it, computing)."""
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


# -- about this process --------------------------------------------------------------------------------------


def peak_memory_bytes() -> int:
    """Most memory this worker has held: on the GPU if there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    others = ("torch", "transformers", "accelerate", "lion-pytorch")
    return {"rasa_train": __version__, **{name: version_of(name) or "unknown" for name in others}}


def version_of(package: str) -> str | None:
    """The version of an installed package. None where the package has no metadata: it is not installed, or it is a
    plain folder on the import path."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def here() -> str:
    """Where this worker is: its host and, where there is one, its GPU."""
    gpu = f" GPU {os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else ""
    return f"{socket.gethostname()}{gpu}"


def interfaces() -> str:
    """The network interfaces of this machine with their addresses, in a line."""
    return ", ".join(f"{name} {address}" for name, address in addresses().items()) or "none"


def addresses() -> dict[str, str]:
    """IPv4 addresses of this machine by interface (Linux)."""
    import fcntl
    import struct

    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe.fileno(), 0x8915, struct.pack("256s", name[:15].encode()))  # SIOCGIFADDR
            except OSError:
                continue
            found[name] = socket.inet_ntoa(answer[20:24])
    return found


def first_line(error: Exception) -> str:
    """The first line of an error's message, or the error's type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
