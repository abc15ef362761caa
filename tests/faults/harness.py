"""Commands in processes that are killed: forked from one that has imported everything, so that each costs little."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import random
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rasa_train.checkpoint import damage
from tests.test_train import metrics

INJECTED: Counter[str] = Counter()
"""Faults so far, by kind; each was survived, or its test has failed."""

CHANGES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate"}
"""Audit events of Python that change files; ``open`` only for writing."""

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "rasa_train.cli.train",
        "rasa_train.cli.merge",
        "rasa_train.launch",
        "rasa_train.train",
        "rasa_train.merge.merged",
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
        self.process.join(120)
        assert self.process.exitcode is not None, f"still running: {self.said}"
        return int(self.process.exitcode)


def start(name: str, *arguments: object, cwd: Path, kill_at: int = 0) -> Command:
    """Start it. ``kill_at``: SIGKILL just before so many-th change to a file below ``cwd``."""
    log = cwd.parent / f"{cwd.name}-{time.monotonic_ns()}.log"
    changes = _context.Value("q", 0)
    process = _context.Process(target=_run, args=(name, list(map(str, arguments)), cwd, log, kill_at, changes))
    process.start()
    return Command(process, log, changes)


def _run(name: str, arguments: list[str], cwd: Path, log: Path, kill_at: int, changes: Any) -> None:
    os.chdir(cwd)
    handle = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event not in CHANGES or not isinstance(args[0], str | Path):
            return
        if event == "open" and not (args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        if Path(os.path.abspath(args[0])).is_relative_to(cwd):
            changes.value += 1
            if changes.value == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    importlib.import_module(f"rasa_train.cli.{name}").app(arguments)


def kill_somewhere(luck: random.Random, name: str, *arguments: object, cwd: Path, changes: int, seconds: float) -> bool:
    """Run a command and kill it: half the time before a random change to a file, else at a random moment.

    Args:
        changes, seconds: of the undisturbed command.
    Returns:
        whether it was killed; it can be done before.
    """
    if luck.random() < 0.5:
        code = start(name, *arguments, cwd=cwd, kill_at=luck.randint(1, changes)).wait()
    else:
        command = start(name, *arguments, cwd=cwd)
        command.process.join(luck.uniform(0, seconds))
        if command.process.exitcode is None:
            os.kill(command.process.pid, signal.SIGKILL)
        code = command.wait()
    killed = code == -signal.SIGKILL
    INJECTED[f"SIGKILL: rasa-{name}"] += killed
    return killed


def check_kept(run: Path, every: int) -> None:
    """Of a run that was killed: every checkpoint is whole, and no more is lost than ``every`` steps."""
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
