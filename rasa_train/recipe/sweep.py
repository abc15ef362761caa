"""A grid of runs from one recipe: ``--sweep adapter.r=8,16 --sweep seed=1,2,3``. Keys that change together are one
sweep: ``--sweep-together adapter.r=8,16 adapter.alpha=16,32``, or ``--sweep 'adapter.r,adapter.alpha=8,16|16,32'``.

Each point of the grid is a run of its own, in a directory below the recipe's ``output_dir`` named by its values. The
runs follow one another, each in a process of its own, so that what one run leaves in memory cannot affect the next.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import yaml

from ..errors import Stopped, UserError
from ..stop import PARENT, signals
from .load import load_recipe

STOPPED = 75
"""Exit code of a run that was asked to stop."""


@dataclass(frozen=True)
class Point:
    """One run of a sweep."""

    values: dict[str, str]
    """Values that the sweep sets, as written: ``{"adapter.r": "16", "seed": "1"}``."""
    output_dir: Path
    arguments: list[str]
    """Arguments of ``rasa-train``: the recipe and all overrides."""

    @property
    def name(self) -> str:
        return self.output_dir.name


@dataclass(frozen=True)
class Outcome:
    """Outcome of the run of a point."""

    point: Point
    exit_code: int
    result: dict[str, object] | None
    """JSON that the run printed with ``--json``; None if it failed or was not asked for it."""

    def as_json(self) -> dict[str, object]:
        point = self.point
        return {
            "run": str(point.output_dir),
            "values": point.values,
            "exit_code": self.exit_code,
            "result": self.result,
        }


def grid(recipe: str, overrides: Sequence[str], sweeps: Sequence[str], together: Sequence[str] = ()) -> list[Point]:
    """Return the points of the grid; the last ``--sweep`` changes fastest. The recipe of every point is valid.

    Args:
        sweeps: ``section.key=value,value,...``, or several keys and as many lists of values, which are taken in step:
            ``key,key=value,value,...|value,value,...``. What is inside brackets, braces or quotes belongs to its value.
        together: ``section.key=value,value,...`` of the keys whose values are taken in step. They are one more sweep,
            the first one.
    Raises:
        UserError: a sweep cannot be read, a key is set twice, or the recipe of a point is wrong.
    """
    axes = [*([_together(together)] if together else []), *(_axis(text) for text in sweeps)]
    keys = [key for axis, _ in axes for key in axis]
    for key in keys:
        if keys.count(key) > 1:
            raise UserError(f"--sweep {key} is given twice: list all its values in one, {key}=value,value,...")
        if any(override.partition("=")[0] == key for override in overrides):
            raise UserError(f"{key} is given as an override and as --sweep: leave one of them out")
    first = [value for _, rows in axes for value in rows[0]]
    settings = [f"{key}={value}" for key, value in zip(keys, first, strict=True)]
    base = load_recipe(recipe, [*overrides, *settings]).recipe.output_dir
    points = []
    for chosen in itertools.product(*(rows for _, rows in axes)):
        values = dict(zip(keys, itertools.chain(*chosen), strict=True))
        name = ",".join(f"{key}={value}" for key, value in values.items())
        directory = Path(base) / re.sub(r"[^\w.,=+-]+", "_", name)
        settings = [f"{key}={value}" for key, value in values.items()]
        arguments = [recipe, *overrides, *settings, f"output_dir={_yaml(str(directory))}"]
        load_recipe(recipe, arguments[1:])
        points.append(Point(values, directory, arguments))
    names = [point.name for point in points]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two points of the sweep would share the directory {name}: a value is given twice")
    return points


def commands(points: Sequence[Point], options: Sequence[str]) -> list[str]:
    """Return one shell command for each run, for the queue of a cluster."""
    return [shlex.join(["rasa-train", *point.arguments, *options]) for point in points]


def run(points: Sequence[Point], options: Sequence[str], say: Callable[[str], None], *, capture: bool) -> list[Outcome]:
    """Run one point after the other. A run that fails is reported, and the others go on; a complete run says so.

    Args:
        options: flags of ``rasa-train`` for every run.
        say: receives one line when a run begins and one when it fails.
        capture: take stdout of the runs as JSON instead of passing it through.
    Raises:
        Stopped: a run was asked to stop (a signal to this process is passed on to the run), so the sweep stops too.
    """
    outcomes: list[Outcome] = []
    for number, point in enumerate(points, 1):
        say(f"run {number} of {len(points)}: {point.name}")
        command = [sys.executable, "-m", "rasa_train.cli.train", *point.arguments, *options]
        code, printed = _child(command, capture)
        if code == STOPPED:
            raise Stopped(f"the sweep stopped in run {number} of {len(points)}; the same command goes on from there")
        if code == 128 + signal.SIGINT:
            raise KeyboardInterrupt
        outcomes.append(Outcome(point, code, json.loads(printed) if capture and not code else None))
        if code:
            say(f"run {number} of {len(points)} failed (exit code {code}); the others go on")
    return outcomes


def _child(command: list[str], capture: bool) -> tuple[int, str]:
    """Return exit code and stdout of one run. Stop requests are passed on to the run, which saves and exits; it is also
    asked to stop if this process is killed."""
    asked: list[int] = []
    children: list[subprocess.Popen[str]] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        for child in children:
            child.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in signals() if number != signal.SIGINT}
    try:
        environment = {**os.environ, PARENT: str(os.getpid())}
        child = subprocess.Popen(command, stdout=subprocess.PIPE if capture else None, text=True, env=environment)
        children.append(child)
        if asked:  # before the child was known
            child.send_signal(asked[0])
        try:
            printed = child.communicate()[0] or ""
        except KeyboardInterrupt:  # the terminal sends it to the run as well: let the run save first
            if child.wait() != STOPPED:
                raise
            printed = ""
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    # A signal that comes before the run listens kills the run: nothing is lost, and the sweep must stop all the same.
    return (STOPPED if asked else child.returncode), printed


Axis = tuple[list[str], list[tuple[str, ...]]]
"""Keys, and the values that they have together, one tuple after the other."""


def _together(texts: Sequence[str]) -> Axis:
    """Return the sweep of all ``--sweep-together``."""
    axes = [_axis(text, "--sweep-together") for text in texts]
    if len({len(rows) for _, rows in axes}) > 1:
        found = ", ".join(f"{','.join(keys)} has {len(rows)}" for keys, rows in axes)
        raise UserError(
            f"--sweep-together needs equally many values of every key, got: {found}. A value with commas stands in "
            "brackets or quotes, and keys with one value for all runs stand before --sweep-together"
        )
    return [key for keys, _ in axes for key in keys], [
        tuple(itertools.chain(*rows)) for rows in zip(*(rows for _, rows in axes), strict=True)
    ]


def _axis(text: str, option: str = "--sweep") -> Axis:
    """Return the keys of one ``--sweep``, and the values that they have together, one tuple after the other."""
    left, equals, right = text.partition("=")
    keys = [key.strip() for key in left.split(",")]
    parts = _split(right, "|") if len(keys) > 1 else [right]  # a single value may be a pattern with a |
    lists = [[value.strip() for value in _split(part, ",")] for part in parts]
    if not equals or not all(part for key in keys for part in key.split(".")) or not all(map(all, lists)):
        raise UserError(
            f"{option} is section.key=value,value,... or key,key=value,value,...|value,value,..., got {text!r}"
        )
    if len(lists) != len(keys) or len({len(values) for values in lists}) > 1:
        found = "; ".join(f"{len(values)} ({','.join(values)})" for values in lists)
        raise UserError(
            f"{option} {left}: {len(keys)} keys that change together need {len(keys)} lists of equally many values, "
            f"separated by |, as in adapter.r,adapter.alpha=8,16,32|16,32,64; got {len(lists)}, of {found}"
        )
    if "output_dir" in keys:
        raise UserError(f"{option} output_dir: the sweep makes the directories itself, below output_dir")
    return keys, list(zip(*lists, strict=True))


def _yaml(text: str) -> str:
    """Return ``text`` as a YAML value, quoted only if necessary."""
    return text if yaml.safe_load(text) == text else json.dumps(text, ensure_ascii=False)


def _split(text: str, separator: str) -> list[str]:
    """Split ``text`` at the separators that are not inside brackets, braces, parentheses or quotes."""
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        else:
            depth += (character in "[{(") - (character in "]})")
        if character == separator and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += character
    return parts
