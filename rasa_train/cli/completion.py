"""What a shell offers for a word that is being typed."""

from __future__ import annotations

from pathlib import Path


def nearby(incomplete: str) -> list[Path]:
    """Return everything in the directory that the word names so far."""
    parent = Path(incomplete if incomplete.endswith("/") else Path(incomplete).parent)
    return sorted(parent.glob("*")) if parent.is_dir() else []
