"""This process among the workers of its run: rank, place, memory, versions."""

from __future__ import annotations

import os
import resource
import socket
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

from . import __version__


def world_size() -> int:
    """Workers that the launcher has started, 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This worker's number among all workers, from 0."""
    return int(os.environ.get("RANK", "0"))


def peak_memory_bytes() -> int:
    """Most memory this worker has held: on the GPU if there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    others = ("torch", "transformers", "accelerate")
    return {"rasa_train": __version__, **{name: version_of(name) or "unknown" for name in others}}


def version_of(package: str) -> str | None:
    """The version of an installed package. None where the package has no metadata: it is not installed, or it is a
    plain folder on the import path."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def here() -> str:
    """Where this worker is: its host and, where there is one, its GPU."""
    gpu = f" GPU {os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else ""
    return f"{socket.gethostname()}{gpu}"
