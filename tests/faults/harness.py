"""Commands in processes that are killed: forked from one that has imported everything, so that each costs little."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rasa_train.training.checkpoint import damage
from tests.test_train import metrics

INJECTED: Counter[tuple[str, str]] = Counter()
"""Faults so far, by test and kind; they were survived, or the test has failed."""

CHANGES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate"}
"""Audit events of Python that change files; ``open`` only for writing."""


def inject(kind: str) -> None:
    """Count a fault."""
    INJECTED[os.environ["PYTEST_CURRENT_TEST"].rpartition(" ")[0], kind] += 1


@dataclass(frozen=True)
class Kill:
    """SIGKILL at the so many-th change to a file below the command's directory: just before it, or so long after."""

    change: int
    seconds: float = 0.0
    of_checkpoints: bool = False
    """Only those changes count that begin a checkpoint."""


_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "rasa_train.cli.train",
        "rasa_train.cli.merge",
        "rasa_train.launch.launch",
        "rasa_train.training.run",
        "rasa_train.merging.merged",
        "transformers.models.llama.modeling_llama",
    ]
)


@dataclass
class Command:
    """``rasa-NAME arguments`` in ``cwd``, under way."""

    process: Any
    log: Path
    _changes: Any

    @property
    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    @property
    def changes(self) -> int:
        """Changes to files below ``cwd`` that it has made."""
        return int(self._changes.value)

    def wait(self) -> int:
        """The exit code; minus the number of a signal."""
        self.process.join(900)
        assert self.process.exitcode is not None, f"still running: {self.said}"
        return int(self.process.exitcode)


def start(
    name: str,
    *arguments: object,
    cwd: Path,
    kill: Kill | None = None,
    clock: Callable[[float], float] | None = None,
    setup: Callable[[], None] | None = None,
) -> Command:
    """Start it. ``clock``: what ``time.time()`` is there, from what it would be; ``setup``: called before the command
    (both functions of a module)."""
    log = cwd.parent / f"{cwd.name}-{time.monotonic_ns()}.log"
    changes = _context.Value("q", 0)
    todo = (name, list(map(str, arguments)), cwd, log, kill, clock, setup, changes)
    process = _context.Process(target=_run, args=todo)
    process.start()
    return Command(process, log, changes)


def _run(
    name: str,
    arguments: list[str],
    cwd: Path,
    log: Path,
    kill: Kill | None,
    clock: Callable[[float], float] | None,
    setup: Callable[[], None] | None,
    changes: Any,
) -> None:
    os.chdir(cwd)
    handle = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    if clock:
        real = time.time
        time.time = lambda: clock(real())
    left = kill.change if kill else 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal left
        if event not in CHANGES or not isinstance(args[0], str | Path):
            return
        if event == "open" and not (args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        path = Path(os.path.abspath(args[0]))
        if not path.is_relative_to(cwd):
            return
        changes.value += 1
        if kill and (not kill.of_checkpoints or (event == "os.mkdir" and path.match("checkpoints/.*.partial"))):
            left -= 1
            if left == 0 and kill.seconds:
                threading.Timer(kill.seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
            elif left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    command = importlib.import_module(f"rasa_train.cli.{name}")
    sys.argv[:] = [f"rasa-{name}", *arguments]
    if setup:
        setup()
    command.main()


def kill_somewhere(
    luck: random.Random,
    name: str,
    *arguments: object,
    cwd: Path,
    changes: int,
    seconds: float,
    checkpoints: tuple[int, float] | None = None,
) -> bool:
    """Run a command and kill it: at a random moment, before a random change to a file, or while it writes a
    checkpoint.

    Args:
        changes, seconds: up to so many, and so long after the start.
        checkpoints: up to so many, and so long after it has begun to write one; None: it writes none.
    Returns:
        whether it was killed; it can be done before.
    """
    way = luck.choice(["at a random moment", "before a change to a file"] + ["amid a checkpoint"] * bool(checkpoints))
    if way == "at a random moment":
        command = start(name, *arguments, cwd=cwd)
        command.process.join(luck.uniform(0, seconds))
        if command.process.exitcode is None:
            os.kill(command.process.pid, signal.SIGKILL)
    elif way == "before a change to a file":
        command = start(name, *arguments, cwd=cwd, kill=Kill(luck.randint(1, changes)))
    else:
        most, duration = checkpoints or (1, 0.0)
        kill = Kill(luck.randint(1, most), luck.uniform(0, duration), of_checkpoints=True)
        command = start(name, *arguments, cwd=cwd, kill=kill)
    killed = command.wait() == -signal.SIGKILL
    if killed:
        inject(f"SIGKILL of rasa-{name}, {way}")
    return killed


def check_kept(run: Path, every: int) -> None:
    """Check a run that was killed: every checkpoint is whole, and no more is lost than ``every`` steps."""
    saved = sorted((run / "checkpoints").glob("step-*"))
    assert [damage(path) for path in saved] == [None] * len(saved)
    whole = [line for line in _lines(run) if line.endswith("}")]
    newest = int(saved[-1].name.removeprefix("step-")) if saved else 0
    assert len(whole) - newest <= every, (len(whole), newest)


def same_result(a: Path, b: Path) -> None:
    """Adapter and metrics are equal, bit for bit (but for the times)."""
    for name in ("adapter/adapter.safetensors", "adapter/adapter_config.json"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    timing = {"seconds", "tokens_per_second", "peak_memory_bytes"}
    rows = [[{k: v for k, v in row.items() if k not in timing} for row in metrics(run)] for run in (a, b)]
    assert rows[0] == rows[1]


def _lines(run: Path) -> list[str]:
    file = run / "metrics.jsonl"
    return file.read_text().splitlines() if file.exists() else []
