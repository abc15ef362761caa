"""The meeting of the workers, work that one of them does for all, and the detection of a lost worker."""

from __future__ import annotations

import os
import re
import socket
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed import FileStore, HashStore, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from ..errors import UserError, WorkerLost, first_line
from ..process import STORE_FILE, here, rank, world_size
from . import network

if TYPE_CHECKING:
    from accelerate import Accelerator

LOCALHOST = "127.0.0.1"


def group_of_one() -> None:
    """Make this process a group of one: a single process that uses host memory needs a group as well."""
    if not dist.is_initialized():
        network.stay_on(LOCALHOST)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it, now and later


def join(timeout_seconds: int) -> list[str]:
    """Meet the other workers. Returns where each of them is, by rank. A second call only returns this.

    Raises:
        UserError: a worker did not come, or could not be connected to, within the time; the message names it.
    """
    global _group
    if world_size() == 1:
        return [here()]
    if not _group:
        timeout = timedelta(seconds=timeout_seconds)
        if _on_one_machine():
            network.stay_on(LOCALHOST)
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
            if not unconnected(error):
                raise
            raise UserError(
                f"worker {rank()} ({where[rank()]}) could not connect to the other workers: {first_line(error)}\n"
                f"Its network interfaces: {network.interfaces()}. GLOO_SOCKET_IFNAME (NCCL_SOCKET_IFNAME) chooses one.",
                key="distributed",
            ) from None
        _group = _Group(store, where)
    return places()


class _Group(NamedTuple):
    store: Store
    places: list[str]


_group: _Group | None = None


def places() -> list[str]:
    """Return where each worker is, by rank: its host and, if there is one, its GPU."""
    return list(_group.places) if _group else [here()]


def _store(timeout: timedelta) -> Store:
    """Return the key-value store of the job, whose keys begin anew with each restart of the workers."""
    if path := os.environ.get(STORE_FILE):
        file = FileStore(path, -1)  # -1: the file stays when workers leave
        file.set_timeout(timeout)
        return file
    address, port = os.environ.get("MASTER_ADDR", LOCALHOST), int(os.environ.get("MASTER_PORT", "29500"))
    of_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    serves = rank() == 0 and not of_agent
    try:
        store = TCPStore(
            address,
            port,
            world_size(),
            is_master=serves,
            timeout=timeout,
            wait_for_workers=False,
            multi_tenant=True,
            master_listen_fd=_listening(address, port) if serves else None,
        )
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"worker {rank()} ({here()}) cannot reach worker 0 at {address}:{port}: {first_line(error)}",
            key="distributed",
        ) from None
    return PrefixStore(f"rasa_train/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _listening(address: str, port: int) -> int | None:
    """Return a socket that listens at this address only; None if other machines do not reach it under its name, as
    where a machine calls itself 127.0.1.1: torch then listens on all interfaces."""
    with suppress(OSError):
        mine = socket.gethostbyname(address)
        if not mine.startswith("127.") or _on_one_machine():
            return socket.create_server((mine, port)).detach()
    return None


def _on_one_machine() -> bool:
    return os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]


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
            f"{', '.join(map(str, missing[:16]))}. There are workers on: {came}. Were all nodes started?",
            key="distributed.timeout_seconds",
        )
    return places


_asked = Counter[str]()
"""How often this process has asked for each piece of work."""


def once(name: str, first: bool, work: Callable[[], str]) -> str:
    """Let the one worker for which ``first`` is true do ``work``. Returns its answer on all workers.

    Raises:
        UserError: on the worker that does the work, if the input is wrong.
        SystemExit: with code 2, on the other workers in that case, so that the message is printed only once.
    """
    if _group is None:
        return work()
    store = _group.store
    _asked[name] += 1  # another run in the same processes has an answer of its own
    name = f"{name} {_asked[name]}"
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
    """Join the group of workers that the launcher made, or be the only worker.

    Raises:
        RuntimeError: accelerate sees another number of workers than the launcher started. Without this error each
            worker would train on its own.
    """
    from accelerate import Accelerator

    warnings.filterwarnings("ignore", category=FutureWarning)  # torch warns of itself and DeepSpeed at every step
    join(timeout_seconds)
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), log_with=log_with or None, project_dir=project_dir)
    if accelerator.num_processes != world_size():
        raise RuntimeError(f"the launcher started {world_size()} workers, accelerate sees {accelerator.num_processes}")
    return accelerator


# -- losing a worker -----------------------------------------------------------------------------------------


@contextmanager
def watching(timeout_seconds: int) -> Iterator[None]:
    """Watch over the exchanges of tensors inside. An exchange that breaks off, because a worker has died, hangs or
    cannot be reached for ``timeout_seconds``, ends in ``WorkerLost`` on all other workers. Any other error stays what
    it is."""
    try:
        yield
    except RuntimeError as error:
        if _group is None or not broken_off(error):
            raise
        missing = _missing(_group.store)
        names = ", ".join(f"worker {worker} ({_group.places[worker]})" for worker in missing)
        what = f"{names} did not answer" if missing else "an exchange broke off, although all workers answer"
        why = ": dead, hanging, or out of reach" if missing else ""
        raise WorkerLost(
            f"{what} (distributed.timeout_seconds={timeout_seconds}){why}. "
            f"Worker {rank()} ({_group.places[rank()]}) got the error: {first_line(error)}",
            missing,
        ) from None


GLOO_BROKE_OFF = re.compile(
    r"gloo\S*\.(cc|h):\d+\].*"
    r"(closed by peer|closure|timed out|connection|broken pipe|no route|unreachable|(read|write) error)",
    re.IGNORECASE | re.DOTALL,
)
GLOO_NOT_CONNECTED = re.compile(r"gloo|connect|timed? ?out|interface|address|hostname", re.IGNORECASE)
NCCL_MISUSED = re.compile(r"invalid ?(usage|argument)|duplicate gpu|cuda error|out of memory", re.IGNORECASE)


def broken_off(error: RuntimeError) -> bool:
    """Whether the error says that an exchange with another worker has broken off. Errors of the same libraries about
    tensors that do not fit each other, a misuse or this machine's own GPU say something else."""
    text = str(error)
    if isinstance(error, dist.DistBackendError):
        return not NCCL_MISUSED.search(text)
    return isinstance(error, dist.DistError) or bool("enforce fail" not in text and GLOO_BROKE_OFF.search(text))


def unconnected(error: RuntimeError) -> bool:
    """Whether the error says that the workers could not be connected, or that this machine lacks an interface for it.
    This machine's own GPU may fail at the same place."""
    if isinstance(error, dist.DistError):
        return not NCCL_MISUSED.search(str(error))
    return bool(GLOO_NOT_CONNECTED.search(str(error))) and "cuda" not in str(error).lower()


ROLL_CALL_SECONDS = 3.0
"""Seconds that a worker waits after a broken exchange for the others to say that they are alive. Workers that waited
for the same lost worker time out together."""


def _missing(store: Store) -> list[int]:
    """Return the workers that do not answer now. The store is on the node of worker 0, so a silent store means a silent
    worker 0."""
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
    """Whether ``key`` is set by the ``deadline``, a time of ``time.monotonic()``."""
    try:
        store.wait([key], timedelta(seconds=max(deadline - time.monotonic(), 0.01)))
    except RuntimeError:  # torch's DistStoreError
        return False
    return True
