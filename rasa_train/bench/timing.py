"""Measure seconds and memory of a step. Engines take turns, so that a disturbance of the machine affects all alike."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Hashable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Protocol, TypeVar

import torch

Key = TypeVar("Key", bound=Hashable)
Work = Callable[[], object]


def seconds(work: Work, device: torch.device) -> float:
    """Return the seconds of one call: by events on a GPU, else the CPU time of this process, which other processes
    hardly affect."""
    if device.type != "cuda":
        started = time.process_time()
        work()
        return time.process_time() - started
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    work()
    end.record()
    torch.cuda.synchronize(device)
    return float(start.elapsed_time(end)) / 1e3


class Timed(Protocol):
    """Something whose steps are timed."""

    def step(self) -> object:
        """The work that is timed."""

    def settle(self) -> object:
        """What is done after each step; its time is not counted."""


def interleaved(
    contenders: Mapping[Key, Timed], *, warmup: int, rounds: int, device: torch.device, dropped: Callable[[Key], None]
) -> dict[Key, list[float]]:
    """Time a step of each contender once in every round, in their order. Returns the seconds, one per round.

    Args:
        warmup: number of rounds that are not counted.
        dropped: called with the key of a contender that runs out of memory. The contender takes no more turns, and
            its times are left out; ``dropped`` may remove it from ``contenders``.
    """
    times: dict[Key, list[float]] = {key: [] for key in contenders}
    for number in range(warmup + rounds):
        for key in list(times):
            took = _seconds_if_it_fits(contenders[key].step, device)
            contenders[key].settle()
            if took is None:
                del times[key]
                dropped(key)
            elif number >= warmup:
                times[key].append(took)
    return times


def _seconds_if_it_fits(work: Work, device: torch.device) -> float | None:
    try:
        return seconds(work, device)
    except torch.OutOfMemoryError:
        return None


def by_operation(work: Work, device: torch.device) -> dict[str, float]:
    """Return the seconds that each operation itself takes during one call, the longest first: time of the device's
    kernels on a GPU, else of the processor. Profiling takes time too, so the sum exceeds ``seconds``."""
    on_gpu = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CPU, activity.CUDA] if on_gpu else [activity.CPU]) as profiled:
        work()
        if on_gpu:
            torch.cuda.synchronize(device)
    took = {
        event.key: (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6
        for event in profiled.key_averages()
    }
    return dict(sorted(((name, t) for name, t in took.items() if t), key=lambda item: -item[1]))


def peak_in_own_process(work: Work) -> int | None:
    """Return the peak number of bytes by which a process grows during this work; None if the process dies, or where the
    system does not provide this number, as only Linux does.

    The process is a fork, so memory that this process holds already is shared and not counted.
    """
    if not Path("/proc/self/clear_refs").exists():
        return None
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_grow, args=(work, send), daemon=True)
    process.start()
    send.close()
    try:
        return int(receive.recv())
    except EOFError:
        return None
    finally:
        process.join()


def _grow(work: Work, send: Connection) -> None:
    torch.set_num_threads(1)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from now
    before = _status("VmRSS")
    work()
    send.send(_status("VmHWM") - before)


def _status(name: str) -> int:
    """Return a size of this process in bytes, as reported by the kernel."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))
