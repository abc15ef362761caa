"""From a recipe to worker processes. What has to happen once per job happens here, before any worker starts.

Three cases: this process trains alone; it starts the workers of its machine and watches over them; or a launcher
(torchrun, accelerate, DeepSpeed, SLURM) has started it as one of many, and it joins the others.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import stat
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from . import group
from .data.prepare import PreparedData, prepare
from .errors import DeviceLost, Stopped, UserError, WorkerLost
from .model import load_config, load_tokenizer
from .recipe.load import dump_recipe
from .recipe.schema import Recipe
from .run_dir import RunDirectory, write_text
from .stop import StopSignal
from .worker import OUTCOMES, RECIPE, STARTED, STOP

GOES_ON = "The same command goes on from the last checkpoint; --max-restarts does so by itself"


class WorkersFailed(Exception):
    """A worker ended in a way that is neither the user's input nor a stop; the message names it."""


@dataclass(frozen=True)
class Workers:
    """How many workers to start, and where. Ignored when a launcher has started this process."""

    per_node: int | Literal["auto"] = "auto"
    """On this machine; ``auto``: one for each GPU, one without."""
    nodes: int = 1
    node_rank: int | None = None
    rendezvous: str | None = None
    """HOST:PORT where the nodes meet; HOST is the machine with node rank 0."""
    max_restarts: int = 0
    """How often all workers are started again, from the last checkpoint, after one has died."""


@dataclass(frozen=True)
class Finished:
    """``summary`` is that of the run; None on a worker that has nothing to say about it."""

    summary: dict[str, Any] | None
    was_complete: bool = False


def launch(recipe: Recipe, workers: Workers | None = None, *, fresh: bool = False) -> Finished:
    """Check and prepare everything, then train.

    Raises:
        UserError: the recipe cannot be carried out, or the run directory holds another run.
        Stopped: a stop was asked for; the state is saved.
        WorkersFailed: a worker died.
    """
    workers = workers or Workers()
    if workers.nodes == 1 and _join_slurm():
        return _as_one_of_many(recipe, fresh)
    if workers.nodes == 1 and group.world_size() > 1:
        return _as_one_of_many(recipe, fresh)
    per_node = _per_node(workers)
    if workers.nodes > 1:
        workers = _complete(workers)
    _check_strategy(recipe, workers.nodes * per_node)
    directory = RunDirectory(recipe.output_dir)
    if workers.node_rank:  # another node looks after the run directory
        _check_input(recipe)
        _start_and_watch(recipe, workers, per_node)
        return Finished(None)
    directory.create()
    with directory.lock():
        data = _open_run(recipe, directory, fresh)
        if data is None:
            return Finished(_summary(directory), was_complete=True)
        if per_node == workers.nodes == 1:
            from .train import run  # here, so that a wrong recipe is told sooner

            try:
                with StopSignal() as stop:
                    return Finished(run(recipe, stop, data))
            except DeviceLost as lost:
                raise WorkersFailed(f"{lost}\n{GOES_ON}") from None
        _start_and_watch(recipe, workers, per_node)
        return Finished(_summary(directory))


def _open_run(recipe: Recipe, directory: RunDirectory, fresh: bool) -> PreparedData | None:
    """Make the directory that of this run, and prepare its data. None when the run is complete. Wrong input ends here,
    before the old run is deleted and before the weights are loaded."""
    if not fresh:
        directory.check_same_run(dump_recipe(recipe))
        if directory.summary.exists():
            return None
    data = _check_input(recipe)
    if fresh:
        directory.clear()
        directory.create()
    write_text(directory.recipe, dump_recipe(recipe))
    return data


def _check_input(recipe: Recipe) -> PreparedData:
    for tracker in recipe.tracking.trackers:
        if find_spec(tracker) is None:  # accelerate would go on without it
            raise UserError(
                f"tracking.trackers: {tracker} is not installed; pip install {tracker}", key="tracking.trackers"
            )
    load_config(recipe.model)
    return prepare(recipe.data, load_tokenizer(recipe.model))


def _check_strategy(recipe: Recipe, workers: int) -> None:
    from .train import check_strategy

    check_strategy(recipe, workers)


def _summary(directory: RunDirectory) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads(directory.summary.read_text())
    return summary


# -- one of many ---------------------------------------------------------------------------------------------


def _as_one_of_many(recipe: Recipe, fresh: bool) -> Finished:
    """A launcher started this process. The first worker looks after the run directory, the first of each machine
    prepares the data, then all train."""
    _default_threads(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    places = group.join(recipe.distributed.timeout_seconds)
    _check_strategy(recipe, group.world_size())
    directory, first = RunDirectory(recipe.output_dir), group.rank() == 0
    prepared: list[PreparedData] = []  # at most one: the cache is read once by whoever has looked after it
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"

    def open_run() -> str:
        directory.create()
        lock.__enter__()
        data = _open_run(recipe, directory, fresh and not restarted)
        prepared.extend([data] if data else [])
        return "train" if data else "complete"

    def prepare_node() -> str:
        if not prepared:
            prepared.append(_check_input(recipe))
        return "ready"

    lock = directory.lock()
    try:
        if group.once("run directory", first, open_run) == "complete":
            return Finished(_summary(directory) if first else None, was_complete=True)
        hosts = [place.split()[0] for place in places]
        for host in sorted(set(hosts)):
            group.once(f"data on {host}", hosts.index(host) == group.rank(), prepare_node)

        from .train import run

        with StopSignal() as stop, group.watching(recipe.distributed.timeout_seconds):
            summary = run(recipe, stop, *prepared)
        return Finished(summary if first else None)
    except (WorkerLost, DeviceLost) as lost:
        raise WorkersFailed(f"{lost}\n{GOES_ON}") from None
    except (UserError, Stopped):
        if not first and os.environ.get("LOCAL_RANK", "0") != "0":
            raise SystemExit(75 if sys.exc_info()[0] is Stopped else 2) from None  # said by another worker
        raise
    finally:
        if first:
            lock.__exit__(None, None, None)


def _join_slurm() -> bool:
    """Under ``srun`` with several tasks: give SLURM's variables the names that torch reads. True if there are any."""
    env = os.environ
    tasks = int(env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS", "1")))
    if "RANK" in env or "SLURM_PROCID" not in env or tasks == 1:
        return False
    hosts = env.get("SLURM_STEP_NODELIST", env.get("SLURM_JOB_NODELIST", "127.0.0.1"))
    env["RANK"], env["WORLD_SIZE"] = env["SLURM_PROCID"], str(tasks)
    env["LOCAL_RANK"] = env.get("SLURM_LOCALID", "0")
    env.setdefault("LOCAL_WORLD_SIZE", re.split(r"[(,]", env.get("SLURM_STEP_TASKS_PER_NODE", "1"))[0])
    env.setdefault("MASTER_ADDR", first_host(hosts))
    env.setdefault("MASTER_PORT", str(20_000 + int(env.get("SLURM_JOB_ID", "0")) % 20_000))
    return True


def first_host(nodelist: str) -> str:
    """First host of SLURM's compressed list: ``gpu[003-005,9],login`` -> ``gpu003``."""
    match = re.match(r"([^\[,]+)(?:\[([^\]]*)\])?([^,\[]*)", nodelist)
    if not match:
        raise UserError(f"SLURM_JOB_NODELIST: cannot read {nodelist!r}")
    head, numbers, tail = match[1], match[2], match[3]
    return head if numbers is None else head + re.split(r"[-,]", numbers)[0] + tail


# -- starting workers ----------------------------------------------------------------------------------------


def number(workers: Workers) -> int:
    """Workers on all nodes: those of a launcher if there is one, else those to start."""
    if workers.nodes == 1 and (_join_slurm() or group.world_size() > 1):
        return group.world_size()
    return workers.nodes * _per_node(workers)


def _per_node(workers: Workers) -> int:
    if workers.per_node != "auto":
        return workers.per_node
    if "RANK" in os.environ and workers.nodes == 1:
        return 1  # a launcher has started one process, and meant it
    import torch

    return max(torch.cuda.device_count(), 1)


def _complete(workers: Workers) -> Workers:
    """With node rank and meeting point, from SLURM where they are not given."""
    env = os.environ
    node_rank = workers.node_rank
    if node_rank is None and "SLURM_NODEID" in env:
        node_rank = int(env["SLURM_NODEID"])
    meeting = workers.rendezvous
    if meeting is None and "SLURM_JOB_NODELIST" in env:
        meeting = f"{first_host(env['SLURM_JOB_NODELIST'])}:{20_000 + int(env.get('SLURM_JOB_ID', '0')) % 20_000}"
    if node_rank is None or meeting is None or not 0 <= node_rank < workers.nodes:
        raise UserError(
            f"--nnodes {workers.nodes} needs --node-rank (0 to {workers.nodes - 1}, another on each node) and --rdzv "
            f"HOST:PORT (of node 0, the same on each node), got --node-rank {node_rank} --rdzv {meeting}"
        )
    if not re.fullmatch(r".+:\d+", meeting):
        raise UserError(f"--rdzv must be HOST:PORT, got {meeting!r}")
    return Workers(workers.per_node, workers.nodes, node_rank, meeting, workers.max_restarts)


def _start_and_watch(recipe: Recipe, workers: Workers, per_node: int) -> None:
    """Run the workers of this machine to their end, and say what became of them.

    Raises:
        UserError, Stopped, WorkersFailed: as a worker reported it.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher.api import elastic_launch

    _default_threads(per_node)
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # or a restart finds the stale keys of the first start
    with tempfile.TemporaryDirectory(prefix="rasa-train-") as name:
        job = Path(name)
        (job / OUTCOMES).mkdir()
        write_text(job / RECIPE, dump_recipe(recipe))
        before = {number: signal.signal(number, _forward(job)) for number in (signal.SIGTERM, signal.SIGUSR1)}
        failed: ChildFailedError | RendezvousError | None = None
        try:
            config = _launch_config(workers, per_node, job, recipe.distributed.timeout_seconds)
            with _hanging_up(job, workers, recipe.distributed.timeout_seconds):
                elastic_launch(config, sys.executable)("-m", "rasa_train.worker", str(job))
        except ChildFailedError as error:
            failed = error
        except SignalException as error:
            raise KeyboardInterrupt from error
        except RendezvousError as error:
            failed = error
            if not any(job.glob(f"{STARTED}*")):
                raise UserError(
                    f"the {workers.nodes} nodes did not meet at {workers.rendezvous} within "
                    f"{recipe.distributed.timeout_seconds} s. Is the same command running on each, with its own "
                    f"--node-rank? {error}",
                    key="distributed.timeout_seconds",
                ) from None
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        _report(_outcomes(job), failed, (job / STOP).exists(), workers.rendezvous)


def _launch_config(workers: Workers, per_node: int, job: Path, timeout_seconds: int) -> Any:
    import logging

    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # told here, once
    options: dict[str, Any] = {"rdzv_endpoint": "localhost:0", "rdzv_configs": {"join_timeout": timeout_seconds}}
    if workers.rendezvous:
        host = workers.rendezvous.rpartition(":")[0]
        address = _address_towards(workers.rendezvous)
        options["rdzv_endpoint"], options["local_addr"] = workers.rendezvous, address
        options["rdzv_configs"]["is_host"] = workers.node_rank == 0
        # Without it gloo may offer 127.0.0.1 to the other nodes, which then wait for ever.
        interface = next((name for name, mine in group.addresses().items() if mine == address), None)
        if interface and not address.startswith("127."):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        options["run_id"] = f"rasa-train-{host}"
    return LaunchConfig(
        min_nodes=workers.nodes,
        max_nodes=workers.nodes,
        nproc_per_node=per_node,
        rdzv_backend="c10d",
        max_restarts=workers.max_restarts,
        monitor_interval=0.1,
        signals_to_handle="SIGINT",  # the others are passed on by _forward
        logs_specs=DefaultLogsSpecs(log_dir=str(job / "logs")),
        **{"run_id": "rasa-train", **options},
    )


@contextmanager
def _hanging_up(job: Path, workers: Workers, timeout_seconds: int) -> Iterator[None]:
    """Around torch's agent of a node: end its connections to node 0 when the workers have given the others up and it
    has not. Where nothing is refused and nothing arrives, its store waits for an answer without end."""
    over = threading.Event()
    patience = 10.0 + (timeout_seconds + 50.0 if workers.max_restarts else 0.0)  # to meet again takes that long

    def watch() -> None:
        while not over.wait(1.0) and job.exists():
            lost = [outcome["time"] for outcome in _outcomes(job) if outcome["kind"] == "lost"]
            began = max((path.stat().st_mtime for path in job.glob(f"{STARTED}*")), default=0.0)
            if lost and began < min(lost) < time.time() - patience:
                _hang_up(str(workers.rendezvous))

    if workers.node_rank:  # not where the store is
        threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _hang_up(meeting: str) -> None:
    """Shut down the sockets of this process that are connected to ``meeting``. Whoever waits at one gets an error."""
    host, _, port = meeting.rpartition(":")
    where = (socket.gethostbyname(host), int(port))
    for descriptor in map(int, os.listdir("/dev/fd")):
        with suppress(OSError):  # closed meanwhile, or not connected
            if stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                with socket.socket(fileno=os.dup(descriptor)) as connection:
                    if connection.getpeername()[:2] in (where, (f"::ffff:{where[0]}", where[1])):
                        connection.shutdown(socket.SHUT_RDWR)


def _address_towards(meeting: str) -> str:
    """This machine's address on the way to the meeting point. Raises ``UserError`` if there is no way."""
    host, _, port = meeting.rpartition(":")
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, int(port)))
            return str(probe.getsockname()[0])
    except OSError as error:
        raise UserError(f"--rdzv: {host} cannot be reached from here: {error.strerror or error}") from None


def _forward(job: Path) -> Any:
    """A handler that tells all workers of this machine to save and leave."""

    def handle(number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if not any(job.glob(f"{STARTED}*")):
            raise Stopped(f"{name}: no worker had started; the same command starts the run")
        (job / STOP).write_text(name)

    return handle


def _default_threads(per_node: int) -> None:
    """Share the cores; torch would give all of them to every worker."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(cores // max(per_node, 1), 1)))


def _outcomes(job: Path) -> list[dict[str, Any]]:
    """What the workers of the last start reported, in the order in which they ended."""
    found = [json.loads(path.read_text()) for path in (job / OUTCOMES).glob("*.json")]
    last = max((outcome["restart"] for outcome in found), default=0)
    return sorted((o for o in found if o["restart"] == last), key=lambda outcome: float(outcome["time"]))


def _report(outcomes: list[dict[str, Any]], failed: Any, stop_asked: bool, meeting: str | None) -> None:
    """Nothing if all went well, else the one exception that says why not. ``failed``: what ended the agent."""
    by_kind = {outcome["kind"]: outcome for outcome in reversed(outcomes)}  # the first of each kind
    if user := by_kind.get("user error"):
        raise UserError(user["message"], key=user["key"])
    if stopped := [o["message"] for o in outcomes if o["kind"] == "stopped"]:
        raise Stopped(min(stopped, key=lambda message: message.startswith("another")))
    failures = getattr(failed, "failures", {})  # none where node 0 is out of reach
    if failed is None or (not failures and set(by_kind) == {"done"}):
        return
    lost = by_kind.get("lost")
    killed = {r: f for r, f in failures.items() if f.exitcode < 0 and f.exitcode != -signal.SIGTERM}
    rank, earliest = min(killed.items(), key=lambda item: float(item[1].timestamp), default=(None, None))
    # A worker that has lost another kills it then; the agent's time of that is in whole seconds.
    if earliest is not None and not (lost and lost["time"] < earliest.timestamp + 1):
        name = signal.Signals(-earliest.exitcode).name
        when = time.strftime("%H:%M:%S", time.localtime(earliest.timestamp))
        hint = " Was memory short?" if name == "SIGKILL" else ""
        raise WorkersFailed(f"worker {rank} was ended by {name} at {when}.{hint} {GOES_ON}")
    if first := by_kind.get("failed"):
        raise WorkersFailed(
            f"{first['trace']}worker {first['rank']} ({first['host']}) failed first: {first['message']}"
        )
    if lost:
        raise WorkersFailed(f"{lost['message']}\n{GOES_ON}")
    if stop_asked:
        raise Stopped("stopped before the first step was done; the same command goes on")
    if not failures:
        raise WorkersFailed(f"node 0 does not answer at {meeting}: dead, or out of reach. {GOES_ON}")
    codes = {rank: failure.exitcode for rank, failure in failures.items()}
    raise WorkersFailed(f"workers ended without a word; exit codes by rank: {codes}")
