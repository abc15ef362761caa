"""Draw the figures of the analyses with matplotlib, which needs no display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from .capacity import Capacity, relative

matplotlib.use("Agg")
matplotlib.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "rasa_train"})

COLOURS = ("#0072b2", "#d55e00", "#008a64", "#b0508a", "#b07800", "#2f9ad0", "#555b61", "#7a4fbf")
"""Colours after Okabe and Ito, which can be told apart with any colour vision. After eight lines the dashes change."""
DASHES = ("-", "--", ":", "-.")


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write ``stem``.png and ``stem``.svg."""
    paths = [Path(f"{stem}.{ending}") for ending in ("png", "svg")]
    for path in paths:
        figure.savefig(path, dpi=110, metadata={"Date": None} if path.suffix == ".svg" else None)
    return paths


def figure_2(kinds: Sequence[Capacity], k: int) -> Figure:
    """Plot the error over sweeps for one k, one line per kind, over LoRA's least error (the paper's Figure 2)."""
    figure, axes = _axes(f"Reconstruction error, k = {k}", "sweep", "error / LoRA's least error")
    axes.axhline(1, color=COLOURS[6], lw=1, ls="--")
    at_the_right = axes.get_yaxis_transform()
    axes.text(1, 1.002, "LoRA (SVD)", fontsize=8, color=COLOURS[6], va="bottom", ha="right", transform=at_the_right)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for i, kind in enumerate(kinds):
        errors = [error / kind.e_lora for error in kind.e_rasa[k]]
        _line(axes, range(len(errors)), errors, i, kind.kind)
    axes.set_ylim(top=min(axes.get_ylim()[1], 1.6))
    axes.legend(frameon=False, fontsize=8)
    return figure


def figure_3(kinds: Sequence[Capacity], sweeps: Sequence[int]) -> Figure:
    """Plot the error of all kinds together over k, one line per number of sweeps (the paper's Figure 3)."""
    figure, axes = _axes("Reconstruction error over k", "k (shared ranks per layer)", "error / LoRA's least error")
    axes.axhline(1, color=COLOURS[6], lw=1, ls="--")
    ks = list(kinds[0].e_rasa)
    for i, sweep in enumerate(sweeps):
        errors = [relative(kinds, k)[min(sweep, len(kinds[0].e_rasa[k]) - 1)] for k in ks]
        _line(axes, ks, errors, i, f"{sweep} sweeps", marker="o")
    axes.legend(frameon=False, fontsize=8)
    return figure


def spectra(lines: Mapping[str, Sequence[Sequence[float]]]) -> Figure:
    """Plot the singular values of every layer, divided by the layer's largest, one panel per kind."""
    figure = Figure(figsize=(9, 0.6 + 2.2 * -(-len(lines) // 3)), layout="constrained")
    panels = figure.subplots(-(-len(lines) // 3), 3, squeeze=False, sharey=True).ravel()
    shades = matplotlib.colormaps["viridis"]
    for panel in panels[len(lines) :]:
        panel.set_axis_off()
    for panel, (kind, layers) in zip(panels, lines.items(), strict=False):
        for i, values in enumerate(layers):
            if values:
                x = range(1, len(values) + 1)
                panel.semilogy(x, [v / values[0] for v in values], color=shades(i / max(len(layers) - 1, 1)), lw=1)
        panel.set_title(kind, fontsize=9)
    figure.supxlabel("rank (dark: first layer, light: last)", fontsize=9)
    figure.supylabel("singular value / largest", fontsize=9)
    return figure


def heat_map(values: Tensor, title: str, x: str, y: str, largest: float | None = None) -> Figure:
    """Plot a matrix as a heat map, in which NaN stays blank."""
    figure, axes = _axes(title, x, y)
    image = axes.imshow(
        values.numpy(), aspect="auto", cmap="Blues", vmin=0, vmax=largest, interpolation="nearest",
        origin="lower", extent=(0.5, values.shape[1] + 0.5, 0.5, values.shape[0] + 0.5),
    )  # fmt: skip
    figure.colorbar(image, ax=axes)
    return figure


def against_base(grids: Mapping[str, Tensor], sizes: Sequence[int], title: str) -> Figure:
    """Plot phi of an update's directions with those of the base's weight, one panel per update, the random baseline
    last (the LoRA paper's Figure 8).

    Args:
        grids: phi (directions of dW, sizes) by the title of the panel.
        sizes: numbers of directions of W.
    """
    figure = Figure(figsize=(1 + 2.6 * len(grids), 3.4), layout="constrained")
    panels = figure.subplots(1, len(grids), squeeze=False)[0]
    for panel, (name, grid) in zip(panels, grids.items(), strict=True):
        image = panel.imshow(
            grid.numpy(), aspect="auto", cmap="Blues", vmin=0, vmax=1, interpolation="nearest",
            origin="lower", extent=(sizes[0] - 0.5, sizes[-1] + 0.5, 0.5, grid.shape[0] + 0.5),
        )  # fmt: skip
        panel.set_title(name.replace(",", "\n"), fontsize=8)  # a run of a sweep has a long name
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    figure.colorbar(image, ax=panels[-1])
    figure.suptitle(title, fontsize=10)
    figure.supxlabel("j (directions of W)", fontsize=9)
    figure.supylabel("i (directions of dW)", fontsize=9)
    return figure


def _axes(title: str, x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.4, 3.8), layout="constrained")
    axes = figure.add_subplot()
    axes.set(title=title, xlabel=x, ylabel=y)
    return figure, axes


def _line(axes: Axes, x: Sequence[int], y: Sequence[float], i: int, name: str, marker: str | None = None) -> None:
    dash = DASHES[i // len(COLOURS) % len(DASHES)]
    axes.plot(x, y, color=COLOURS[i % len(COLOURS)], linestyle=dash, lw=1.6, marker=marker, ms=4, label=name)
