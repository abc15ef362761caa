"""Facts about this worker process: its rank, host, GPU and memory, and the versions of the packages it uses."""

from __future__ import annotations

import os
import resource
import socket
import sys
from importlib.metadata import PackageNotFoundError, version

from . import __version__

STORE_FILE = "RASA_TRAIN_STORE"
"""Environment variable with the file in which the workers of one machine meet; without it they meet at MASTER_ADDR."""


def world_size() -> int:
    """Return the number of workers that the launcher has started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Return this worker's number among all workers, counted from 0."""
    return int(os.environ.get("RANK", "0"))


def peak_memory_bytes() -> int:
    """Return the peak memory of this worker in bytes: on the GPU if there is one, else of the process."""
    import torch  # here, so that what only asks for cores or versions need not load it

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def versions() -> dict[str, str]:
    """Return the versions of the packages that the numbers of a run depend on."""
    others = ("torch", "transformers", "accelerate")
    return {"rasa_train": __version__, **{name: version_of(name) or "unknown" for name in others}}


def version_of(package: str) -> str | None:
    """Return the version of an installed package, or None if the package has no metadata: it is not installed, or it is
    a plain folder on the import path."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def here() -> str:
    """Return where this worker runs: its host and, if there is one, its GPU."""
    import torch

    gpu = f" GPU {os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else ""
    return f"{socket.gethostname()}{gpu}"


def cores() -> int:
    """Return the number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
