"""The pages of documentation taken apart: code blocks with their language, commands, code within text, links."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rasa_train import METHODS, Method, register

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "AGENTS.md", "SECURITY.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "examples").glob("*.md")),
    ROOT / "configs" / "paper" / "README.md",
]
SHELL = "sh"
"""Language of an indented block, as these pages use it: every line is a command."""


@dataclass(frozen=True)
class Block:
    where: str
    """``docs/SPEED.md:12``: the page and its first line."""
    language: str
    text: str


@dataclass(frozen=True)
class Command:
    """One command of a line; ``a && b`` are two."""

    where: str
    words: tuple[str, ...]
    """Without variables set before it and where its output goes."""
    line: str
    """All of the line, without its comment."""
    output: str | None = None
    """The file after ``>``."""
    first: bool = True
    """Whether the command is the first of its line."""


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> list[Block]:
    """Fenced blocks, and those that are indented by four after an empty line."""
    found: list[Block] = []
    lines = page.read_text().splitlines()
    number = 0
    while number < len(lines):
        line, start = lines[number], number
        if line.startswith("```"):
            number = lines.index("```", number + 1)
            text, language = lines[start + 1 : number], line[3:].strip()
        elif line.startswith("    ") and not lines[number - 1].strip():
            while number + 1 < len(lines) and (lines[number + 1].startswith("    ") or not lines[number + 1].strip()):
                number += 1
            text, language = [line[4:] for line in lines[start : number + 1]], SHELL
        else:
            number += 1
            continue
        first = start + (1 if language == SHELL and line.startswith("    ") else 2)
        found.append(Block(f"{name_of(page)}:{first}", language, "\n".join(text)))
        number += 1
    return found


def prose(page: Path) -> str:
    """The text without its code blocks."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"^    .*$", "", text, flags=re.MULTILINE)


def spans(page: Path) -> list[str]:
    """Code within the text, each as one line."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(page))]


def links(page: Path) -> list[str]:
    """Targets of links and images that are files of the repository."""
    found = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    return [target for target in found if not re.match(r"[a-z]+:", target)]


def commands_of(page: Path) -> list[Command]:
    found: list[Command] = []
    for block in blocks(page):
        if block.language == SHELL:
            where, first = block.where.rsplit(":", 1)
            for number, line in enumerate(block.text.splitlines()):
                found += commands(line, f"{where}:{int(first) + number}")
    for span in spans(page):
        if re.match(r"(rasa-\w+|make|python|pip|lm_eval|vllm) \S", span):
            found += commands(span, f"{name_of(page)} `{span}`")
    return found


def commands(line: str, where: str) -> list[Command]:
    """The commands of a line of shell, in their order."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;>")
    lexer.whitespace_split = True
    groups: list[list[str]] = [[]]
    ends = [""]
    for token in lexer:
        if set(token) <= set("|&;"):
            groups.append([])
            ends.append(token)
        else:
            groups[-1].append(token)
    found = []
    for group, before in zip(groups, ends, strict=True):
        words = group[: group.index(">")] if ">" in group else group
        output = group[group.index(">") + 1] if ">" in group else None
        while words and re.match(r"[A-Z_]+=", words[0]):
            words = words[1:]
        if words:
            found.append(Command(where, tuple(words), line.partition(" #")[0].strip(), output, not before))
    return found


# -- the method of docs/EXTENDING.md ---------------------------------------------------------------------------------


def own_method_source() -> str:
    (found,) = [block.text for block in blocks(ROOT / "docs" / "EXTENDING.md") if block.language == "python"]
    return found + "\n"


@contextmanager
def own_method(directory: Path) -> Iterator[type[Method]]:
    """Write ``lora_fa.py`` and register its method for the time of the block."""
    file = directory / "lora_fa.py"
    file.write_text(own_method_source())
    spec = importlib.util.spec_from_file_location("lora_fa", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    name = module.LoRAFA.model_fields["method"].default
    try:
        yield register(module.LoRAFA)
    finally:
        METHODS.registered.pop(name, None)
        for watcher in METHODS.watchers:
            watcher()
        del sys.modules[spec.name]
