"""The files of a recipe: where a recipe is found, and the files that it extends."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..io.home import expanded
from ..io.yaml_lines import MAX_BYTES, Key, Location, parse_file, short
from .schema import Recipe
from .shipped import configs_dir

MOST_FILES = 100
"""Most files that a recipe extends."""


@dataclass
class Layer:
    """The values of one file or of the command line, and the places where they were written."""

    values: dict[str, Any]
    locations: dict[Key, Location]


def find(name: str) -> Path:
    """Return the file of a recipe, or of a shipped recipe of this name."""
    path = Path(expanded(name))
    if _is_file(path):
        return path
    shipped = {str(p.relative_to(configs_dir()).with_suffix("")): p for p in sorted(configs_dir().rglob("*.yaml"))}
    known = name.removeprefix("configs/").removesuffix(".yaml")
    if known in shipped:
        return shipped[known]
    try:
        if path.is_dir():
            raise UserError(f"{name} is a directory; a recipe is a YAML file")
        near = [str(p) for p in sorted(path.parent.glob("*.y*ml"))] if path.parent.is_dir() else []
    except OSError as error:  # a name too long, a directory that may not be entered
        raise UserError(f"recipe {name[:80]!r} cannot be read: {error.strerror}") from None
    close = difflib.get_close_matches(name, near + list(shipped), n=1, cutoff=0.5)
    raise UserError(f"recipe {name!r} does not exist" + (f"; did you mean {close[0]!r}?" if close else ""))


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long for a file
        return False


@dataclass
class Files:
    """The files that are read for one recipe, in a tree of ``extends``."""

    count: int = 0
    nbytes: int = 0

    def layers(self, path: Path, chain: tuple[Path, ...] = ()) -> list[Layer]:
        """Return the layers of the file and of all files it extends, most basic first.

        Raises:
            UserError: a file is no recipe, or the tree has a circle or more than ``MOST_FILES`` files. A file counts
                each time that it is extended, so that 23 files of which each extends the next twice are 8 million.
        """
        if path.resolve() in chain:
            raise UserError(f"{path}: `extends` goes in a circle: {' -> '.join(p.name for p in (*chain, path))}")
        values, locations = _extended(path) if chain else _recipe(path)
        self.count, self.nbytes = self.count + 1, self.nbytes + path.stat().st_size
        if self.count > MOST_FILES or self.nbytes > MAX_BYTES:
            raise UserError(
                f"{path}: `extends` leads to more than {MOST_FILES} files or {MAX_BYTES:,} bytes, and a file counts "
                "each time that it is extended"
            )
        bases = values.pop("extends", None) or []
        bases = [bases] if isinstance(bases, str) else bases
        if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
            raise UserError(
                f"extends must be a file's name or a list of them, got {bases!r}\n  at {locations[('extends',)]}",
                key="extends",
            )
        layers: list[Layer] = []
        for base in bases:
            beside = path.parent / base
            try:
                found = beside if _is_file(beside) else find(base)
            except UserError as error:
                raise UserError(f"{error}\n  at {locations[('extends',)]}", key="extends") from None
            layers += self.layers(found, (*chain, path.resolve()))
        return [*layers, Layer(values, locations)]


def _recipe(path: Path) -> tuple[dict[str, Any], dict[Key, Location]]:
    values, locations = parse_file(path)
    if not isinstance(values, dict):
        kind = "empty" if values is None else f"a {type(values).__name__}"
        raise UserError(
            f"{path}: a recipe is a mapping with the sections model, adapter, data, ...; this file is {kind}"
        )
    return values, locations


def _extended(path: Path) -> tuple[dict[str, Any], dict[Key, Location]]:
    """Read a file that a recipe extends. The recipe may be somebody else's and name any file of the user's, so what
    stands in a file is not shown unless it is a recipe by its sections."""
    try:
        values, locations = _recipe(path)
    except UserError as error:
        place = re.match(re.escape(str(path)) + r"(:\d+)*(?=:)", str(error))
        if place is None:  # the file cannot be read, and the message holds nothing of it
            raise
        raise UserError(
            f"{place[0]}: this file, which a recipe extends, cannot be read as YAML; what stands there is not shown"
        ) from None
    if strange := sorted(values.keys() - Recipe.model_fields.keys() - {"extends"}):
        raise UserError(
            f"{path}: this file, which a recipe extends, is not a recipe: it has the key {short(strange[0])!r}"
        )
    return values, locations
