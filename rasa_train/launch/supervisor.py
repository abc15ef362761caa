"""The workers of one machine: their start by torch's elastic agent, the request to stop, and the report of their end.

The agent and the workers share a directory. It holds the recipe, files that say which workers have started, a file that
asks them to stop, and what each of them reports at its end.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from .. import process
from ..distributed import network
from ..errors import Stopped, UserError
from ..io.atomic import write_text
from ..io.scratch import scratch_directory
from ..recipe.load import dump_recipe
from ..recipe.schema import Recipe
from ..stop import say_interrupted, signals
from .worker_process import LAUNCHER, OUTCOMES, RECIPE, STARTED, STOP, Outcome, kill

GOES_ON = "The same command goes on from the last checkpoint; --max-restarts does so by itself"


class WorkersFailed(Exception):
    """A worker has failed for a reason other than wrong input or a stop; the message names the worker."""


@dataclass(frozen=True)
class Workers:
    """The number of workers to start, and where. Ignored if a launcher has started this process."""

    per_node: int | Literal["auto"] = "auto"
    """Number of workers on this machine; ``auto``: one for each GPU, or one if there is no GPU."""
    nodes: int = 1
    node_rank: int | None = None
    rendezvous: str | None = None
    """HOST:PORT where the nodes meet; HOST is the machine with node rank 0."""
    max_restarts: int = 0
    """Number of times that all workers are started again, from the last checkpoint, after one has died."""


def start_and_watch(recipe: Recipe, workers: Workers, per_node: int) -> None:
    """Run the workers of this machine to their end, and report how they ended.

    Raises:
        UserError, Stopped, WorkersFailed: as a worker reported it.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher.api import elastic_launch

    default_threads(per_node)
    with scratch_directory("job") as job:
        (job / OUTCOMES).mkdir()
        write_text(job / RECIPE, dump_recipe(recipe))
        write_text(job / LAUNCHER, str(os.getpid()))
        before = {number: signal.signal(number, _forward(job)) for number in signals()}
        failed: ChildFailedError | RendezvousError | None = None
        try:
            with _launch_config(workers, per_node, job, recipe.distributed.timeout_seconds) as config:
                elastic_launch(config, sys.executable)("-m", "rasa_train.launch.worker_process", str(job))
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
        report(_outcomes(job), failed, (job / STOP).exists(), workers.rendezvous)


@contextmanager
def _launch_config(workers: Workers, per_node: int, job: Path, timeout_seconds: int) -> Iterator[Any]:
    """Torch's settings for its agent, whose nodes meet by way of ``distributed.meeting`` and not of torch's own
    rendezvous: that one unpickles what anyone sends to its port."""
    import logging

    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig

    from ..distributed.door import Door, secret
    from ..distributed.meeting import BACKEND, Meeting

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # reported here, once
    door = None
    if workers.nodes > 1:
        assert workers.rendezvous
        host, _, port = workers.rendezvous.rpartition(":")
        known = secret()
        network.stay_on(network.address_towards(host, int(port)))
        door = Door(known, host, int(port), timeout_seconds)
    try:
        yield LaunchConfig(
            min_nodes=workers.nodes,
            max_nodes=workers.nodes,
            nproc_per_node=per_node,
            run_id="rasa-train",
            rdzv_backend=BACKEND,
            rdzv_configs={"meeting": Meeting(workers.nodes, workers.node_rank or 0, door, timeout_seconds)},
            max_restarts=workers.max_restarts,
            monitor_interval=0.1,
            signals_to_handle="SIGQUIT",  # the others are passed on by _forward
            logs_specs=DefaultLogsSpecs(log_dir=str(job / "logs")),
        )
    finally:
        if door:
            door.close()


def _forward(job: Path) -> Any:
    """Return a handler that asks all workers of this machine to save and exit. A second Ctrl-C ends them at once."""

    def handle(number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if not any(job.glob(f"{STARTED}*")):
            raise Stopped(f"{name}: no worker had started; the same command starts the run")
        if number == signal.SIGINT and (job / STOP).exists():
            kill(job.glob(f"{STARTED}*"))
            raise KeyboardInterrupt
        (job / STOP).write_text(name)
        if number == signal.SIGINT:
            say_interrupted()

    return handle


def default_threads(per_node: int) -> None:
    """Divide the cores among the workers; torch would give all cores to every worker."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(process.cores() // max(per_node, 1), 1)))


def _outcomes(job: Path) -> list[Outcome]:
    """Return what the workers of the last start reported, in the order in which they ended."""
    found = [Outcome(**json.loads(path.read_text())) for path in (job / OUTCOMES).glob("*.json")]
    last = max((outcome.restart for outcome in found), default=0)
    return sorted((o for o in found if o.restart == last), key=lambda outcome: outcome.ended)


def report(outcomes: list[Outcome], failed: Any, stop_asked: bool, meeting: str | None) -> None:
    """Raise the one exception that says what went wrong, if anything did. ``failed`` is what ended the agent."""
    by_kind = {outcome.kind: outcome for outcome in reversed(outcomes)}  # the first of each kind
    if user := by_kind.get("user error"):
        raise UserError(user.message, key=user.key)
    if stopped := [o.message for o in outcomes if o.kind == "stopped"]:
        raise Stopped(min(stopped, key=lambda message: message.startswith("another")))
    failures = getattr(failed, "failures", {})  # none if node 0 is out of reach
    if failed is None or (not failures and set(by_kind) == {"done"}):
        return
    lost = by_kind.get("lost")
    killed = {r: f for r, f in failures.items() if f.exitcode < 0 and f.exitcode != -signal.SIGTERM}
    rank, earliest = min(killed.items(), key=lambda item: float(item[1].timestamp), default=(None, None))
    # A worker that has lost another then kills it; the agent records that time in whole seconds.
    if earliest is not None and not (lost and lost.ended < earliest.timestamp + 1):
        name = signal.Signals(-earliest.exitcode).name
        when = time.strftime("%H:%M:%S", time.localtime(earliest.timestamp))
        hint = " Did the machine run out of memory?" if name == "SIGKILL" else ""
        raise WorkersFailed(f"worker {rank} was ended by {name} at {when}.{hint} {GOES_ON}")
    if first := by_kind.get("failed"):
        raise WorkersFailed(f"{first.trace}worker {first.rank} ({first.host}) failed first: {first.message}")
    if lost:
        raise WorkersFailed(f"{lost.message}\n{GOES_ON}")
    if stop_asked:
        raise Stopped("stopped before the first step was done; the same command goes on")
    if not failures:
        raise WorkersFailed(f"node 0 does not answer at {meeting}: it is dead or out of reach. {GOES_ON}")
    codes = {rank: failure.exitcode for rank, failure in failures.items()}
    raise WorkersFailed(f"workers ended without a message; exit codes by rank: {codes}")
