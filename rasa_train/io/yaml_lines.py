"""Reader of YAML that knows the line of every key. It reads all numbers of YAML 1.2, ``5e-4`` among them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..errors import UserError
from .json_file import read_bytes

MAX_NODES, MAX_DEPTH, MAX_LENGTH, MAX_BYTES = 20_000, 40, 4_096, 1 << 18
"""Limits of a recipe, which has some dozens of values. Aliases that expand to more than ``MAX_NODES`` values are an
attack or an accident, and so are deeper nesting, a value with more characters than a path may have, and a file with
more bytes."""
NO_TEXT = re.compile("[\0\ud800-\udfff]")
"""Characters that can be written in YAML, but neither in a file nor in its name."""
MERGE = "tag:yaml.org,2002:merge"

Key = tuple[str | int, ...]
PLACE = re.compile("[0-9]{1,9}")
"""A place in a list."""


@dataclass(frozen=True)
class Location:
    """Place where a value was written: a file and its line (1-based), or an override on the command line."""

    source: str
    line: int | None
    text: str

    @property
    def where(self) -> str:
        """The place without the text that stands there."""
        return f"{self.source}:{self.line}" if self.line else self.source

    def __str__(self) -> str:
        return f"{self.where}: {self.text}"


def dotted(key: Key) -> str:
    """Write a key as messages and the command line do: ``data.mix[1].weight``."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in key).removeprefix(".")


def key_of(text: str) -> Key:
    """Return the key that ``dotted`` writes as ``text``; the place in a list may also be written ``data.mix.1``."""
    parts = re.sub(r"\[([0-9]+)\]", r".\1", text).split(".")
    return tuple(int(part) if PLACE.fullmatch(part) else part for part in parts)


def nearest(locations: dict[Key, Location], key: Key) -> Location | None:
    """Return the place of ``key``, or of the section around it that has one."""
    while key and key not in locations:
        key = key[:-1]
    return locations.get(key)


class _Loader(yaml.SafeLoader):
    """SafeLoader whose floats need no dot (YAML 1.1 reads ``5e-4`` as a string)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def parse(text: str, source: str) -> tuple[Any, dict[Key, Location]]:
    """Return the value of a YAML text and the place of each of its keys.

    Raises:
        UserError: wrong syntax (with line and column), a duplicate key, a key that is not a string, a tag, or a text
            beyond the limits of a recipe.
    """
    if len(text) > MAX_BYTES:
        raise UserError(f"{source} is not a recipe: it has {len(text):,} characters; at most {MAX_BYTES:,} are read")
    try:
        _refuse_odd(text, source)
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
        problem = short(str(error.problem or error.context))
        raise UserError(f"{source}{where}: YAML syntax: {problem}" + (f"\n  {short(line)}" if line else "")) from None
    except RecursionError:
        raise UserError(f"{source}: an alias refers to a value that contains the alias") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{source}: YAML cannot be read: {short(str(error))}") from None


def parse_file(path: Path) -> tuple[Any, dict[Key, Location]]:
    try:
        if (size := path.stat().st_size) > MAX_BYTES:
            raise UserError(f"{path} is not a recipe: it has {size:,} bytes; at most {MAX_BYTES:,} are read")
        text = read_bytes(path, MAX_BYTES).decode()
    except FileNotFoundError:
        raise UserError(f"{path} cannot be read: there is no such file") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    return parse(text, str(path))


def _refuse_odd(text: str, source: str) -> None:
    """Raise ``UserError`` for text that is refused during parsing, before any value is made. A tag that the loader does
    not know, or that does not fit its value, would be ignored on mappings and sequences, and would cause all kinds of
    errors elsewhere."""
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        assert event.start_mark
        where = f"{source}:{event.start_mark.line + 1}"
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise UserError(f"{where}: values are nested more than {MAX_DEPTH} deep")
        if isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent) and event.tag:
            tag = event.tag.replace("tag:yaml.org,2002:", "!!", 1)
            raise UserError(f"{where}: a recipe has no tags, got {short(tag)}; write the value without it")
        if isinstance(event, yaml.ScalarEvent) and (odd := NO_TEXT.search(event.value)):
            raise UserError(f"{where}: a value has the character {odd[0]!a}, which neither texts nor names have")
        if isinstance(event, yaml.ScalarEvent) and len(event.value) > MAX_LENGTH:
            raise UserError(f"{where}: a value has {len(event.value):,} characters; at most {MAX_LENGTH:,} are read")


def short(text: str, most: int = 200) -> str:
    """Shorten ``text`` to at most ``most`` characters, for a message."""
    return text if len(text) <= most else text[: most - 1] + "…"


class _Walker:
    def __init__(self, loader: _Loader, lines: list[str], source: str, locations: dict[Key, Location]) -> None:
        self.loader, self.lines, self.source, self.locations = loader, lines, source, locations
        self.nodes = 0

    def value(self, node: yaml.Node, key: Key) -> Any:
        self.nodes += 1
        if self.nodes > MAX_NODES:
            raise UserError(f"{self.source} has more than {MAX_NODES:,} values (an alias counts as its whole content)")
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, key)
        if isinstance(node, yaml.SequenceNode):
            return [self._item(item, (*key, i)) for i, item in enumerate(node.value)]
        return self._scalar(node)

    def _item(self, node: yaml.Node, key: Key) -> Any:
        line = node.start_mark.line + 1
        self.locations[key] = Location(self.source, line, self._text(line))
        return self.value(node, key)

    def _text(self, line: int) -> str:
        return short(self.lines[line - 1].strip()) if line <= len(self.lines) else ""

    def _scalar(self, node: yaml.Node) -> Any:
        try:
            return self.loader.construct_object(node)
        except ValueError as error:  # 2025-13-01 looks like a date
            line = node.start_mark.line + 1
            raise UserError(f"{self.source}:{line}: {short(repr(node.value))} cannot be read: {error}") from None

    def _mapping(self, node: yaml.MappingNode, key: Key) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in reversed(node.value):
            if key_node.tag == MERGE:  # the first of several wins; keys of this mapping win over all
                result |= self._merged(value_node, key)
        seen: dict[str, int] = {}
        for key_node, value_node in node.value:
            if key_node.tag == MERGE:
                continue
            name = self._scalar(key_node)
            line = key_node.start_mark.line + 1
            if not isinstance(name, str):
                raise UserError(f"{self.source}:{line}: a key must be a word, got {short(repr(name))}")
            if name in seen:
                raise UserError(
                    f"{self.source}:{line}: the key {short(name)!r} stands here and in line {seen[name]}; keep one"
                )
            seen[name] = line
            self.locations[(*key, name)] = Location(self.source, line, self._text(line))
            result[name] = self.value(value_node, (*key, name))
        return result

    def _merged(self, node: yaml.Node, key: Key) -> dict[str, Any]:
        """Return the mapping that ``<<`` inserts: its value, or the values of its list merged."""
        result: dict[str, Any] = {}
        for base in reversed(node.value) if isinstance(node, yaml.SequenceNode) else [node]:
            value = self.value(base, key)
            if not isinstance(value, dict):
                line = base.start_mark.line + 1
                got = short(repr(value))
                raise UserError(f"{self.source}:{line}: << must be a mapping or a list of mappings, got {got}")
            result |= value
        return result
