"""Measure seconds and memory of a step. Engines take turns, so that a disturbance of the machine affects all alike."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Hashable, Iterable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeVar

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


def interleaved(
    keys: Iterable[Key],
    work: Callable[[Key], object],
    settle: Callable[[Key], object],
    *,
    warmup: int,
    rounds: int,
    device: torch.device,
    dropped: Callable[[Key], None],
) -> dict[Key, list[float]]:
    """Time ``work`` for each key once in every round, in the order of the keys. Returns the seconds, one per round.

    Args:
        settle: called with the key after each run; its time is not counted.
        warmup: number of rounds that are not counted.
        dropped: called with a key whose work runs out of memory. The work is not run again, and its times are left out.
    """
    times: dict[Key, list[float]] = {key: [] for key in keys}
    for number in range(warmup + rounds):
        for key in list(times):
            took = _seconds_if_it_fits(partial(work, key), device)
            settle(key)
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
