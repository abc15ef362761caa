"""Stop requests: SIGTERM, SIGUSR1 (SLURM's warning), SIGHUP (the terminal is gone), Ctrl-C, or a file written by the
process that started the worker.

This module is light to import: a worker listens for stop requests before it loads anything that takes seconds.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any


class StopSignal:
    """Remembers a stop request until the work under way is done; the loop then saves and ends. A second Ctrl-C
    interrupts at once, as in any other program.

    Args:
        word: a file to which the launcher writes the signal's name, for all workers of a machine at once.
    """

    def __init__(self, word: Path | None = None) -> None:
        self._word, self._received = word, ""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        self._before = {number: signal.signal(number, self._handle) for number in signals()}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._received = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)
            say_interrupted()

    @property
    def reason(self) -> str:
        """Name of the signal that requested the stop; empty as long as no stop is requested."""
        if not self._received and self._word and self._word.exists():
            self._received = self._word.read_text() or "a stop"
        return self._received


def signals() -> list[signal.Signals]:
    """Return the signals that request a stop. SIGINT (Ctrl-C) is among them only where it reaches this process: a
    shell's background job ignores it. So is SIGHUP, which ``nohup`` ignores."""
    interrupts = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    return [*requests(), *([signal.SIGINT] if interrupts else [])]


def requests() -> list[signal.Signals]:
    """Return the signals that request a stop, but for Ctrl-C."""
    hangs_up = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN
    return [signal.SIGTERM, signal.SIGUSR1, *([signal.SIGHUP] if hangs_up else [])]


PARENT = "RASA_TRAIN_PARENT"
"""Environment variable with the id of the process that must not be outlived, which a sweep gives to its runs."""


def die_with(parent: int, number: signal.Signals) -> None:
    """Let this process receive a signal when its parent ends, however that ends (Linux).

    Args:
        parent: the process id of the parent, which may have ended already.
    """
    if sys.platform == "linux":
        import ctypes

        with suppress(OSError):
            ctypes.CDLL(None).prctl(1, int(number), 0, 0, 0)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os.kill(os.getpid(), number)


def say_interrupted() -> None:
    """Tell the user what a first Ctrl-C does. Safe in a signal handler that may interrupt a running ``print``."""
    if os.environ.get("RANK", "0") == "0":
        with suppress(OSError):  # nobody reads it
            os.write(2, b"\nCtrl-C: the work under way is finished and kept; press Ctrl-C again to end it at once\n")
