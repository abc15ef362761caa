"""One worker process, started by ``supervisor`` (``python -m rasa_train.launch.worker_process JOB``). It reports to
files in JOB.

It imports little until it listens for a stop. An exit code other than 0 makes torch's agent end, or restart, all
workers.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from .. import process
from ..errors import Stopped, UserError, WorkerLost, say
from ..io import streams
from ..stop import StopSignal, die_with

RECIPE, LAUNCHER, STOP, STARTED, OUTCOMES = "recipe.yaml", "launcher", "stop", "started-", "outcomes"


@dataclass
class Outcome:
    """How a worker has ended, as it reports it to the launcher."""

    kind: Literal["done", "stopped", "user error", "lost", "failed"]
    restart: int
    message: str = ""
    key: str | None = None
    """Key of a ``UserError``."""
    lost: list[int] = field(default_factory=list)
    """Ranks of the workers that this worker has lost."""
    trace: str = ""
    rank: int = field(default_factory=process.rank)
    host: str = field(default_factory=socket.gethostname)
    ended: float = field(default_factory=time.time)


def main(job: Path) -> int:
    """Train. Returns the exit code."""
    # The launcher holds the lock of the run directory: no worker may outlive it.
    die_with(int((job / LAUNCHER).read_text()), signal.SIGKILL)
    streams.guard()
    os.dup2(2, 1)  # stdout is for the launcher's result
    with StopSignal(job / STOP) as stop:
        rank = process.rank()
        (job / f"{STARTED}{rank}").write_text(str(os.getpid()))
        if any('"user error"' in path.read_text() for path in (job / OUTCOMES).glob("*.json")):
            return 2  # a restart cannot help
        # The number of the nodes' meeting is the same on each node. Torch counts only those that a node asked for.
        restart = int(os.environ["TORCHELASTIC_RUN_ID"])
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(restart)
        if os.environ["GROUP_WORLD_SIZE"] == "1":
            os.environ[process.STORE_FILE] = str(job / f"store-{restart}")
        if restart and rank == 0:
            say(f"a worker has died; restart {restart}", file=sys.stderr)
        try:
            import yaml

            from ..distributed import rendezvous
            from ..recipe.schema import Recipe
            from ..training.run import run

            recipe = Recipe.model_validate(yaml.safe_load((job / RECIPE).read_text()))
            with rendezvous.watching(recipe.distributed.timeout_seconds):
                run(recipe, stop)
            outcome = Outcome("done", restart)
        except Stopped as stopped:
            outcome = Outcome("stopped", restart, str(stopped))
        except UserError as error:
            outcome = Outcome("user error", restart, str(error), error.key)
        except WorkerLost as lost:
            outcome = Outcome("lost", restart, str(lost), lost=lost.ranks)
        except Exception as error:
            said = (str(error).strip().splitlines() or [""])[0]
            message = f"{type(error).__name__}: {said}"
            outcome = Outcome("failed", restart, message, trace=traceback.format_exc())
    path = job / OUTCOMES / f"{restart}-{rank}.json"
    beside = path.with_suffix(".partial")
    beside.write_text(json.dumps(asdict(outcome)))
    beside.replace(path)
    # A worker that hangs does not react to the agent's SIGTERM, and the agent would wait for it for half a minute.
    kill(job / f"{STARTED}{lost_rank}" for lost_rank in outcome.lost)
    return {"done": 0, "stopped": 0, "user error": 2, "lost": 1, "failed": 1}[outcome.kind]


def kill(started: Iterable[Path]) -> None:
    """End at once the workers that wrote the files ``started``. A missing file means a worker on another machine."""
    for path in started:
        if path.exists():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(path.read_text()), signal.SIGKILL)


if __name__ == "__main__":
    code = main(Path(sys.argv[1]))
    sys.stderr.flush()
    # Skip the interpreter's shutdown: threads of gloo sometimes abort in it, after all work is done.
    os._exit(code)
