"""Facts about this machine, and the rates that nothing on it can exceed."""

from __future__ import annotations

import os
import platform
import subprocess
import time

import torch

from rasa_train.process import version_of

from .measure import BF16, DEVICE, ON_GPU, TINY, Check, Values, milliseconds, random, rounded, synchronize

PACKAGES = (
    "torch", "triton", "transformers", "accelerate", "peft", "pydantic", "liger-kernel", "bitsandbytes",
    "deepspeed", "datasets", "numpy",
)  # fmt: skip


def versions() -> Values:
    """Return the versions of packages, and what is known of the card and its driver."""
    found: dict[str, str | None] = {"python": platform.python_version(), "cuda": torch.version.cuda}
    found |= {name: version_of(name) for name in PACKAGES}
    if not ON_GPU:
        return {"device": "cpu", "versions": found, "cpus": os.cpu_count()}
    card = torch.cuda.get_device_properties(0)
    found["driver"] = _driver()
    return {
        "device": card.name,
        "versions": found,
        "cpus": os.cpu_count(),
        "memory_gib": round(card.total_memory / 2**30, 1),
        "multiprocessors": card.multi_processor_count,
        "capability": f"{card.major}.{card.minor}",
    }


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        return None


def ceilings() -> Values:
    """Measure bf16 products, copies on the device, and the time in which the host asks for a small operation."""
    n = 256 if TINY else 8192
    a, b = random(n, n), random(n, n)
    product = milliseconds(lambda: a @ b)
    source = torch.zeros(2**16 if TINY else 2**32, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    copy = milliseconds(lambda: target.copy_(source), repeats=5)
    small = torch.zeros(8, device=DEVICE, dtype=BF16)
    synchronize()
    began = time.perf_counter()
    for _ in range(1000):
        small.add_(1)
    host = time.perf_counter() - began
    synchronize()
    return {
        "bf16_tflops": rounded(2 * n**3 / product / 1e9),
        "copy_tb_s": rounded(2 * source.numel() / copy / 1e9),
        "host_us_per_small_op": rounded(1e3 * host),
    }


CHECKS = [Check("versions", versions), Check("ceilings", ceilings)]
