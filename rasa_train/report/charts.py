"""Compute the curves of a report, independent of what draws them (the page, or matplotlib)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from statistics import fmean, stdev
from typing import Any

from .runs import Run, Score, headlines

POINTS = 300
"""Largest number of points of one curve; a longer curve is reduced to the means of equal segments."""
ALL_POINTS = 6_000
"""Largest number of points of one chart."""
METRICS = 8
"""Largest number of scores of one suite that are all drawn; of a suite with more, only the first score is drawn."""
RUNS, MEANS = "each run", "mean over seeds"
"""Names of the views of a chart."""


@dataclass(frozen=True)
class Series:
    """One line of a chart."""

    name: str
    x: dict[str, list[float]]
    """x values of the points by the name of the axis: step, tokens, ..."""
    y: list[float]
    spread: list[float] | None = None
    """Standard deviation over seeds."""
    best: dict[str, float] | None = None
    """The step that ``training.keep_best`` has chosen by what the line shows: its x by the name of the axis, and
    ``y``."""


@dataclass(frozen=True)
class Chart:
    """One chart, with lines for every view."""

    title: str
    y: str
    """Name of the measured quantity."""
    views: dict[str, list[Series]]
    """Lines by view: ``each run`` and, where there are several seeds, ``mean over seeds``."""
    note: str = ""
    """Sentence below the title."""
    categories: dict[str, list[str]] = field(default_factory=dict)
    """Names of the values 0, 1, 2, ... of an axis, by the name of the axis."""


@dataclass(frozen=True)
class Group:
    """Runs that differ only in the seed."""

    name: str
    runs: list[Run]


def groups(runs: Sequence[Run]) -> list[Group]:
    """Return groups of runs whose recipes differ only in ``seed``. A run without a recipe is a group of its own."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        rest = {key: value for key, value in run.recipe.items() if key not in ("seed", "output_dir")}
        key = json.dumps(rest, sort_keys=True, default=str) if "seed" in run.recipe else run.name
        found.setdefault(key, []).append(run)
    names = [_group_name(members) for members in found.values()]
    unique = [
        name if names.count(name) == 1 else members[0].name for name, members in zip(names, found.values(), strict=True)
    ]
    return [Group(name, members) for name, members in zip(unique, found.values(), strict=True)]


def charts(runs: Sequence[Run]) -> list[Chart]:
    """Return every chart for which the runs have data."""
    grouped = groups(runs)
    found = [
        _over_time("Training loss", "loss", runs, grouped, lambda run: _column(run, "loss")),
        _over_time("Validation loss", "validation loss", runs, grouped, lambda run: _column(run, "validation_loss")),
    ]
    first = headlines(runs)
    for key in _drawn(runs, first):
        title = f"Forgetting: {key}" if "forget" in key.lower() else f"{key} by checkpoint"
        found.append(_over_time(title, key, runs, grouped, lambda run, key=key: _curve(run, key)))  # type: ignore[misc]
        if key in first:
            found.append(_by_setting(f"{key} by data fraction", key, grouped, "data.fraction", "share of the data"))
            found.append(_by_setting(f"{key} by model", key, grouped, "model.name", "model"))
    found.append(_over_time("Gradient norm", "norm before clipping", runs, grouped, lambda r: _column(r, "grad_norm")))
    return [chart for chart in found if chart is not None]


def _drawn(runs: Sequence[Run], first: Sequence[str]) -> list[str]:
    """Return the scores to draw: all scores of a suite with few, the first score of a suite with many."""
    suites: dict[str, dict[str, None]] = {}
    for score in (score for run in runs for score in run.scores):
        suites.setdefault(score.suite, {})[score.key] = None
    return [key for keys in suites.values() for key in keys if len(keys) <= METRICS or key in first]


# -- over time ---------------------------------------------------------------------------------------------

Point = tuple[float, dict[str, float], float]
"""(step, {axis: x}, y)."""


def _over_time(
    title: str, y: str, runs: Sequence[Run], grouped: Sequence[Group], points: Callable[[Run], list[Point]]
) -> Chart | None:
    curves = {run.name: points(run) for run in runs}
    most = max(50, min(POINTS, ALL_POINTS // max(len(runs), 1)))
    marks = {run.name: _best(run, y, curves[run.name]) for run in runs}
    each = [replace(_series(name, curve, most), best=marks[name]) for name, curve in curves.items() if curve]
    if not each or (all(len(series.y) < 2 for series in each) and y not in ("loss", "validation loss")):
        return None
    views = {RUNS: each}
    if any(len(group.runs) > 1 for group in grouped):
        means = [_mean(group, [curves[run.name] for run in group.runs], most) for group in grouped]
        views[MEANS] = [series for series in means if series is not None]
    return Chart(title, y, views)


def _best(run: Run, y: str, curve: list[Point]) -> dict[str, float] | None:
    """Return where the best step of a run is on its curve, if the run has chosen it by the quantity ``y``."""
    best = run.summary.get("best")
    if not isinstance(best, dict) or best.get("measure") not in (y.replace(" ", "_"), f"eval_{y}"):
        return None
    return next(({**x, "y": value} for step, x, value in curve if step == best.get("step")), None)


def _column(run: Run, key: str) -> list[Point]:
    points, tokens = [], 0.0
    for row in run.metrics:
        tokens += row.get("tokens", 0)
        if row.get(key) is not None:
            x = {"step": float(row["step"]), "tokens": tokens, "epoch": float(row.get("epoch", 0))}
            points.append((float(row["step"]), x, float(row[key])))
    return points


def _curve(run: Run, key: str) -> list[Point]:
    """Return the values of a score by step, one per step; the finished adapter counts as the last checkpoint."""
    tokens, total = {}, 0.0
    for row in run.metrics:
        total += row.get("tokens", 0)
        tokens[row["step"]] = total
    points: dict[float, Point] = {}
    for score in run.scores:
        if score.key == key:
            step = score.step if score.step is not None else run.total_steps
            if step is not None:
                x = {"epoch": _epoch(run, score, step), "step": step, "tokens": tokens.get(int(step), math.nan)}
                points[step] = (step, {name: v for name, v in x.items() if math.isfinite(v)}, score.value)
    ordered = [points[step] for step in sorted(points)]
    shared = set.intersection(*(set(x) for _, x, _ in ordered)) if ordered else set()
    return [(step, {name: v for name, v in x.items() if name in shared}, y) for step, x, y in ordered]


def _epoch(run: Run, score: Score, step: float) -> float:
    if score.epoch is not None:
        return score.epoch
    return next((float(row["epoch"]) for row in run.metrics if row["step"] == step and row.get("epoch")), math.nan)


def _mean(group: Group, curves: list[list[Point]], most: int) -> Series | None:
    """Return mean and standard deviation at each step, over the runs that have the step."""
    values: dict[float, list[tuple[dict[str, float], float]]] = {}
    for curve in curves:
        for step, x, y in curve:
            values.setdefault(step, []).append((x, y))
    if not values:
        return None
    points, spreads = [], []
    for step in sorted(values):
        at = values[step]
        axes = [name for name in at[0][0] if all(name in x for x, _ in at)]
        points.append((step, {name: fmean(x[name] for x, _ in at) for name in axes}, fmean(y for _, y in at)))
        spreads.append(stdev([y for _, y in at]) if len(at) > 1 else 0.0)
    series = _series(_with_count(group), points, most)
    return Series(series.name, series.x, series.y, _thin(spreads, most))


def _series(name: str, points: list[Point], most: int) -> Series:
    axes = [name for name in points[0][1] if all(name in x for _, x, _ in points)]
    return Series(
        name,
        {axis: _thin([x[axis] for _, x, _ in points], most) for axis in axes},
        _thin([y for _, _, y in points], most),
    )


def _thin(values: list[float], most: int) -> list[float]:
    """Return the values, or the means of ``most`` equal segments if there are more; rounded to five digits."""
    if len(values) > most:
        cuts = [i * len(values) // most for i in range(most + 1)]
        values = [fmean(values[a:b]) for a, b in pairwise(cuts)]
    return [float(f"{value:.5g}") for value in values]


# -- by a setting of the recipe ------------------------------------------------------------------------------


def _by_setting(title: str, key: str, grouped: Sequence[Group], setting: str, axis: str) -> Chart | None:
    """Return a chart of LAST of a score against a setting that differs between runs, with one line for each set of
    recipes that are equal otherwise. The paper's Figures 6 and 7 show LAST: BEST is chosen on the test set."""
    lines: dict[str, dict[Any, list[float]]] = {}
    names: dict[str, str] = {}
    for group in grouped:
        for run in group.runs:
            value, found = run.recipe.get(setting), run.best_and_last().get(key)
            if not isinstance(value, str | int | float) or found is None or not run.summary:  # unfinished, or damaged
                continue
            hidden = {"seed", "output_dir", setting, "model.revision"}
            rest = {name: v for name, v in run.recipe.items() if name not in hidden}
            line = json.dumps(rest, sort_keys=True, default=str)
            names.setdefault(line, short_name(run))
            lines.setdefault(line, {}).setdefault(value, []).append(found[1])
    values = list(dict.fromkeys(value for line in lines.values() for value in line))
    if len(values) < 2:
        return None
    numeric = all(isinstance(value, int | float) for value in values)
    values = sorted(values) if numeric else values
    series = [
        _line(_distinct(names, line), line_values, values, axis, numeric=numeric) for line, line_values in lines.items()
    ]
    categories = {} if numeric else {axis: [str(value).rstrip("/").rpartition("/")[2] for value in values]}
    return Chart(title, key, {RUNS: series}, "LAST, the finished run, averaged over seeds.", categories)


def _line(name: str, found: dict[Any, list[float]], values: list[Any], axis: str, *, numeric: bool) -> Series:
    present = [value for value in values if value in found]
    x = [float(value) if numeric else float(values.index(value)) for value in present]
    spread = [stdev(found[value]) if len(found[value]) > 1 else 0.0 for value in present]
    return Series(name, {axis: x}, [fmean(found[value]) for value in present], spread if any(spread) else None)


def short_name(run: Run) -> str:
    """Return a short name of a run's method, such as ``rasa r=8 k=1``."""
    adapter = [f"{key}={run.recipe[f'adapter.{key}']}" for key in ("r", "k") if f"adapter.{key}" in run.recipe]
    return " ".join([str(run.recipe.get("adapter.method", run.name)), *adapter])


def _distinct(names: dict[str, str], line: str) -> str:
    same = [key for key in names if names[key] == names[line]]
    return names[line] if len(same) == 1 else f"{names[line]} #{same.index(line) + 1}"


def _group_name(members: Sequence[Run]) -> str:
    """Return the common name of the runs without the seed, such as ``adapter.r=8`` for ``adapter.r=8,seed=1``; the
    method's short name if the names differ otherwise."""
    if len(members) == 1:
        return members[0].name
    bare = {_without_seed(run) for run in members}
    return bare.pop() if len(bare) == 1 and "" not in bare else short_name(members[0])


def _without_seed(run: Run) -> str:
    parts: Iterable[str] = run.name.split(",")
    return ",".join(part for part in parts if part != f"seed={run.recipe.get('seed')}")


def _with_count(group: Group) -> str:
    return group.name if len(group.runs) == 1 else f"{group.name} ({len(group.runs)} seeds)"
