"""Options that merges, exports and extractions share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Progress = Callable[[int, int], None]
"""Called with (done, in all), in bytes or values."""


@dataclass(frozen=True)
class Base:
    """The base model of an adapter."""

    name: str | None = None
    """Hub id or directory. Default: the base that the adapter names."""
    revision: str | None = None
    """Branch, tag or commit of a hub id. Default: the one that the adapter records, if it names this base."""
    any_base: bool = False
    """Whether to accept a base whose weights are not those the adapter was trained on."""

    @classmethod
    def of(cls, base: str | Base | None) -> Base:
        """Return ``base``, where a text stands for a base of this name."""
        return base if isinstance(base, Base) else cls(name=base)


@dataclass(frozen=True)
class Writing:
    """How an output directory is written."""

    overwrite: bool = False
    """Whether to replace an output directory that holds files."""
    progress: Progress | None = None
    """Called with the work done and the work in all, by one thread at a time."""


WRITING = Writing()
"""The default: do not overwrite, and show no progress."""
