"""YAML with the line of every key. Reads what YAML 1.2 calls a number: ``5e-4`` is one."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..errors import UserError

MAX_NODES = 20_000
"""A recipe has some dozens of values; aliases that unfold to more than this are an attack or an accident."""

Key = tuple[str | int, ...]


@dataclass(frozen=True)
class Location:
    """Where a value was written: a file and its line (1-based), or an override of the command line."""

    source: str
    line: int | None
    text: str

    def __str__(self) -> str:
        return f"{self.source}:{self.line}: {self.text}" if self.line else f"{self.source}: {self.text}"


class _Loader(yaml.SafeLoader):
    """SafeLoader whose floats need no dot (YAML 1.1 reads ``5e-4`` as a string)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def parse(text: str, source: str) -> tuple[Any, dict[Key, Location]]:
    """The value of a YAML text and where each key of it stands.

    Raises:
        UserError: syntax (with line and column), a duplicate key, a key that is no string, or too many nodes.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None, {}
        locations: dict[Key, Location] = {}
        walker = _Walker(loader, text.splitlines(), source, locations)
        return walker.value(node, ()), locations
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        line = text.splitlines()[mark.line].strip() if mark and mark.line < len(text.splitlines()) else ""
        raise UserError(
            f"{source}{where}: YAML syntax: {error.problem or error.context}" + (f"\n  {line}" if line else "")
        ) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{source}: YAML cannot be read: {error}") from None


def parse_file(path: Path) -> tuple[Any, dict[Key, Location]]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no UTF-8 text: {error}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    return parse(text, str(path))


class _Walker:
    def __init__(self, loader: _Loader, lines: list[str], source: str, locations: dict[Key, Location]) -> None:
        self.loader, self.lines, self.source, self.locations = loader, lines, source, locations
        self.nodes = 0

    def value(self, node: yaml.Node, key: Key) -> Any:
        self.nodes += 1
        if self.nodes > MAX_NODES:
            raise UserError(f"{self.source}: more than {MAX_NODES:,} values (aliases unfold to their whole content)")
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, key)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, (*key, i)) for i, item in enumerate(node.value)]
        return self.loader.construct_object(node)

    def _mapping(self, node: yaml.MappingNode, key: Key) -> dict[str, Any]:
        self.loader.flatten_mapping(node)
        result: dict[str, Any] = {}
        seen: dict[str, int] = {}
        for key_node, value_node in node.value:
            name = self.loader.construct_object(key_node)
            line = key_node.start_mark.line + 1
            if not isinstance(name, str):
                raise UserError(f"{self.source}:{line}: a key must be a word, got {name!r}")
            if name in seen:
                raise UserError(
                    f"{self.source}:{line}: the key {name!r} stands here and in line {seen[name]}; keep one"
                )
            seen[name] = line
            text = self.lines[line - 1].strip() if line <= len(self.lines) else ""
            self.locations[(*key, name)] = Location(self.source, line, text)
            result[name] = self.value(value_node, (*key, name))
        return result
