"""Options that merges, exports and extractions share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..errors import UserError

ROWS = 128
"""Number of examples on which the inputs of linears are measured, if a file but no number is given."""
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
class Rounding:
    """How W + dW is rounded to the dtype of a merged checkpoint."""

    method: Literal["nearest", "aware"] = "nearest"
    """``aware``: with error feedback, so that the outputs of the linears change little."""
    run: Path | None = None
    """Run directory whose recipe says how rows become tokens; needed for the two below."""
    rows: int | None = None
    """Number of training examples whose inputs of each linear decide which errors matter. None: the update decides."""
    file: Path | None = None
    """File of rows that are taken in place of those of the run; ``rows`` is 128 then, if it is not given."""

    def __post_init__(self) -> None:
        """Raise ``UserError`` if the fields do not fit together."""
        given = f"--calibrate {self.rows}" if self.file is None else f"--calibration {self.file}"
        if self.method == "nearest" and (self.rows is not None or self.file is not None):
            raise UserError(f"{given} is for --rounding aware only: rounding to nearest measures nothing")
        if self.rows is not None and self.rows < 1:
            raise UserError(f"{given}: the number of examples must be at least 1, got {self.rows}")
        if self.file is not None and self.rows is None:
            object.__setattr__(self, "rows", ROWS)


NEAREST = Rounding()


@dataclass(frozen=True)
class Writing:
    """How an output directory is written."""

    overwrite: bool = False
    """Whether to replace an output directory that holds files."""
    progress: Progress | None = None
    """Called with the work done and the work in all, by one thread at a time."""
    rounding: Rounding = NEAREST
    """How values are rounded. For merges only."""


WRITING = Writing()
"""The default: do not overwrite, and show no progress."""
