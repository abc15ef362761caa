"""Figures of the analyses, by matplotlib without a display."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

matplotlib.use("Agg")
matplotlib.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "rasa_train"})

COLOURS = ("#0072b2", "#d55e00", "#008a64", "#b0508a", "#b07800", "#2f9ad0", "#555b61", "#7a4fbf")
"""After Okabe and Ito: told apart with any colour vision. Beyond eight lines the dashes change as well."""
DASHES = ("-", "--", ":", "-.")


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write ``stem``.png and ``stem``.svg."""
    paths = [Path(f"{stem}.{ending}") for ending in ("png", "svg")]
    for path in paths:
        figure.savefig(path, dpi=110, metadata={"Date": None} if path.suffix == ".svg" else None)
    return paths
