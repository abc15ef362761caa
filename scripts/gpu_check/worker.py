"""The process of a step that is made of checks: ``python -m gpu_check.worker STEP``."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import torch

from .measure import ON_GPU, Check, run_checks
from .results import Results

MODULES = {
    "environment": ["environment"],
    "correctness": ["kernel_checks", "method_checks"],
    "training": ["training"],
    "profile": ["step_profile"],
    "extras": ["extras"],
    "rates": ["rates"],
}
"""The modules beside this one with the checks of each step."""


def main(step: str) -> int:
    """Run the checks of a step."""
    if not ON_GPU:
        torch.set_num_threads(1)
    found: list[Check] = []
    for name in MODULES[step]:
        found += importlib.import_module(f"gpu_check.{name}").CHECKS
    return run_checks(step, found, Results(Path(os.environ["GPU_CHECK_OUT"])))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
