"""Read run directories, whether finished, in progress or damaged. Unreadable parts are reported, never raised."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from ..adapters.saved import CONFIG, read_adapter
from ..analysis.mixing import mixing_weights
from ..errors import UserError
from ..io.run_dir import RunDirectory, flatten
from ..merging.source import find_adapter
from ..recipe.renamed import rename
from ..recipe.yaml_lines import parse

RECENT = 10
"""Number of steps over which the loss at the end of a run is averaged, because the loss of one batch says little."""
PARTS = ("recipe.yaml", "metrics.jsonl", "summary.json", "adapter", "checkpoints", "evaluation")
"""Files and directories any of which makes a directory a run, complete or not."""
LOWER_IS_BETTER = ("loss", "perplexity", "ppl", "nll", "error", "bits")
"""Words in the names of scores of which a lower value is better."""


@dataclass(frozen=True)
class Score:
    """One evaluation result of a run: the value of one metric at one step."""

    suite: str
    metric: str
    value: float
    step: float | None
    epoch: float | None

    @property
    def key(self) -> str:
        return f"{self.suite} {self.metric}".strip()


@dataclass(frozen=True)
class Run:
    """One run, as far as it can be read."""

    name: str
    path: Path
    recipe: Mapping[str, object]
    """The recipe with flat keys, ``{"adapter.r": 8, ...}``; empty when there is none."""
    metrics: list[dict[str, float]]
    """Lines of ``metrics.jsonl`` by step, with their finite numbers."""
    summary: Mapping[str, object]
    """The summary; empty until the run is complete."""
    scores: list[Score]
    """Scores by step; those of the finished adapter come last."""
    mixing: dict[str, Tensor]
    """|d| of the shared ranks by kind (layers, pool ranks); empty for methods other than RaSA."""
    problems: list[str] = field(default_factory=list)
    """Missing or damaged parts, one sentence each."""

    @property
    def state(self) -> str:
        """``complete``, ``step 40 of 188`` or ``no steps yet``."""
        if self.summary:
            return "complete"
        if not self.metrics:
            return "no steps yet"
        total = self.total_steps
        return f"step {self.metrics[-1]['step']}" + (f" of {total}" if total else "")

    @property
    def total_steps(self) -> int | None:
        """Steps of the complete run, computed from the epochs if need be; None where unknown."""
        known = self.fact("steps") or number(self.recipe.get("training.max_steps"))
        if known:
            return int(known)
        last = self.metrics[-1] if self.metrics else {}
        epochs, epoch = number(self.recipe.get("training.epochs")), last.get("epoch")
        return round(last["step"] / epoch * epochs) if epochs and epoch else None

    def fact(self, key: str) -> float | None:
        """Return a number from the summary; None where it has none."""
        return number(self.summary.get(key))

    @property
    def loss(self) -> float | None:
        """Mean training loss of the last steps; the summary's loss when there are no metrics."""
        losses = [row["loss"] for row in self.metrics[-RECENT:] if row.get("loss") is not None]
        return sum(losses) / len(losses) if losses else self.fact("loss")

    @property
    def last_loss(self) -> float | None:
        """Training loss of the last step that was not skipped, which is what the summary calls ``loss``."""
        losses = [row["loss"] for row in self.metrics if row.get("loss") is not None]
        return losses[-1] if losses else self.fact("loss")

    def total(self, key: str) -> float | None:
        """Return the sum of a column of the metrics; the summary's value when there are no metrics."""
        values = [row[key] for row in self.metrics if key in row]
        return sum(values) if values else self.fact(key)

    def best_and_last(self) -> dict[str, tuple[float, float]]:
        """Return (BEST over the checkpoints, LAST) of each score."""
        found: dict[str, list[float]] = {}
        for score in self.scores:
            found.setdefault(score.key, []).append(score.value)
        return {key: (min(v) if lower_is_better(key) else max(v), v[-1]) for key, v in found.items()}


def number(value: object) -> float | None:
    """Return ``value`` if it is a finite number, else None, because files may hold anything."""
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return value
    return None


def lower_is_better(name: str) -> bool:
    """Whether a lower value of this score is better."""
    return any(word in name.lower() for word in LOWER_IS_BETTER)


def headlines(runs: Iterable[Run]) -> list[str]:
    """Return the first score of each suite, which tables show. Other scores are only drawn."""
    first: dict[str, str] = {}
    for score in (score for run in runs for score in run.scores):
        first.setdefault(score.suite, score.key)
    return list(first.values())


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """Return each path that is a run, and the runs directly below each path (such as a sweep's ``output_dir``). Files
    are skipped if there are directories as well, because a pattern such as ``runs/*`` matches both.

    Raises:
        UserError: a path does not exist, or neither is nor holds a run.
    """
    found: list[Path] = []
    directories = [path for path in paths if not path.is_file()]
    for path in directories or paths:
        if not path.is_dir():
            raise UserError(f"{path} is not a run: there is no such directory")
        inside = [child for child in sorted(path.iterdir(), key=_natural) if child.is_dir() and _is_run(child)]
        if not _is_run(path) and not inside:
            raise UserError(f"{path} is not a run and holds none: a run directory has one of {', '.join(PARTS)}")
        found += [path] if _is_run(path) else []
        found += [child for child in inside if child.name not in PARTS]
    return list(dict.fromkeys(found))


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Return all runs, named by the shortest path endings that differ."""
    return [read_run(path, name) for path, name in zip(paths, _names(paths), strict=True)]


def read_run(path: Path, name: str) -> Run:
    """Return the run in a directory. Missing and damaged parts are listed in ``Run.problems``."""
    directory, problems = RunDirectory(path), list[str]()
    stored = _mapping(directory.recipe, problems, "it is not known what was trained")
    with suppress(UserError):  # with both names of a key, both are shown
        rename(stored, {})
    recipe = flatten(stored)
    metrics, measured = _metrics(directory.metrics, problems)
    summary = _mapping(directory.summary, [] if not directory.summary.exists() else problems, "")
    if not summary:
        problems.append("no summary.json: the run is not complete")
    mixing, config = _adapter(path, problems)
    recipe = recipe or {f"adapter.{key}": value for key, value in flatten(config).items()}
    run = Run(name, path, recipe, metrics, summary, _scores(path, measured, problems), mixing, problems)
    if run.metrics and [row["step"] for row in metrics] != list(range(1, len(metrics) + 1)):
        problems.append("metrics.jsonl lacks steps")
    return run


def _is_run(path: Path) -> bool:
    return any((path / part).exists() for part in (*PARTS, CONFIG))


def _natural(path: Path) -> list[tuple[bool, float, str]]:
    """Return a sort key that orders numbers in names by value: ``r=8`` before ``r=16``."""
    words: list[tuple[bool, float, str]] = []
    for part in path.name.replace("=", " = ").replace(",", " , ").split():
        try:
            words.append((False, float(part), ""))
        except ValueError:
            words.append((True, 0.0, part))
    return words


def _names(paths: Sequence[Path]) -> list[str]:
    """Return the shortest endings of the paths that all differ."""
    parts = [path.resolve().parts for path in paths]
    for length in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def _mapping(path: Path, problems: list[str], consequence: str) -> dict[str, object]:
    """Return the mapping in a YAML or JSON file. If there is none, return {} and add a problem."""
    because = f": {consequence}" if consequence else ""
    try:
        text = path.read_text()
        value = json.loads(text) if path.suffix == ".json" else parse(text, path.name)[0]
    except FileNotFoundError:
        problems.append(f"{path.name} is missing{because}")
        return {}
    except (OSError, ValueError, UserError) as error:
        problems.append(f"{path.name} cannot be read ({' '.join(str(error).split())[:120]}){because}")
        return {}
    if not isinstance(value, dict):
        problems.append(f"{path.name} does not hold a mapping{because}")
        return {}
    return value


def _metrics(path: Path, problems: list[str]) -> tuple[list[dict[str, float]], list[Score]]:
    """Return the lines by step, and the scores that were measured while training."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        problems.append("metrics.jsonl is missing: there are no curves, and the loss is that of the last step alone")
        return [], []
    rows: dict[int, dict[str, float]] = {}
    scores: dict[int, list[Score]] = {}
    damaged = 0
    for line in lines:
        try:
            row = json.loads(line)
            finite = {key: found for key, value in row.items() if (found := number(value)) is not None}
            step = int(finite["step"])
            scored = [(key.removeprefix("eval_"), value) for key, value in row.items() if key.startswith("eval_")]
            rows[step], scores[step] = finite, [s for suite, value in scored for s in _numbers(suite, value, finite)]
        except (ValueError, KeyError, TypeError, AttributeError):
            damaged += 1
    if damaged:
        problems.append(f"metrics.jsonl: {damaged} damaged line{'s' if damaged > 1 else ''} left out")
    if not rows:
        problems.append("metrics.jsonl has no steps yet")
    return [rows[step] for step in sorted(rows)], [score for step in sorted(rows) for score in scores[step]]


def _adapter(path: Path, problems: list[str]) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Return mixing weights and configuration of the final adapter or the newest checkpoint."""
    try:
        saved = read_adapter(find_adapter(path))
    except UserError as error:
        problems.append(str(error).removeprefix(f"{path} ").replace(f"{path}/", ""))
        return {}, {}
    return mixing_weights(saved.tensors), saved.method.model_dump()


def _scores(path: Path, measured: list[Score], problems: list[str]) -> list[Score]:
    """Return the ``measured`` scores and those in the directory ``evaluation``, by step."""
    found: list[tuple[float, Score]] = [(score.step or 0.0, score) for score in measured]
    for file in sorted((path / "evaluation").glob("*/*.json")):
        result = _mapping(file, problems, f"it belongs to the evaluation {file.parent.name}")
        step = number(result.get("step"))
        # a result without a step belongs to the finished adapter and comes last
        order = math.inf if file.stem == "adapter" or step is None else step
        if not isinstance(result.get("metrics"), dict):
            problems += [f"evaluation/{file.parent.name}/{file.name} has no metrics"] if result else []
            continue
        suite = str(result.get("suite") or file.parent.name)
        found += [(order, score) for score in _numbers(suite, result["metrics"], result)]
    return [score for _, score in sorted(found, key=lambda item: item[0])]


def _numbers(suite: str, value: object, where: Mapping[str, object]) -> Iterable[Score]:
    step, epoch = number(where.get("step")), number(where.get("epoch"))
    for metric, got in (value if isinstance(value, dict) else {"": value}).items():
        found = number(got)
        if found is not None and not any(word in str(metric) for word in ("stderr", "seconds", "count")):
            yield Score(suite, str(metric), found, step, epoch)
