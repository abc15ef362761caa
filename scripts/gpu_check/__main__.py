"""The command ``python scripts/gpu_check``; docs/GPU.md says what it does."""

from __future__ import annotations

import sys
from pathlib import Path


def run() -> int:
    """Import this directory as a package, so that none of its modules hides one of the standard library."""
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from gpu_check.command import main

    return main()


if __name__ == "__main__":
    sys.exit(run())
