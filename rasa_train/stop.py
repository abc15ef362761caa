"""Stop requests: SIGTERM, SIGUSR1 (SLURM's warning), Ctrl-C, or a file written by the process that started the worker.

This module is light to import: a worker listens for stop requests before it loads anything that takes seconds.
"""

from __future__ import annotations

import os
import signal
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
    shell's background job ignores it."""
    interrupts = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    return [signal.SIGTERM, signal.SIGUSR1, *([signal.SIGINT] if interrupts else [])]


def say_interrupted() -> None:
    """Tell the user what a first Ctrl-C does. Safe in a signal handler that may interrupt a running ``print``."""
    if os.environ.get("RANK", "0") == "0":
        os.write(2, b"\nCtrl-C: the work under way is finished and kept; press Ctrl-C again to end it at once\n")
