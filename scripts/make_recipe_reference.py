"""Write docs/RECIPE.md, the reference of recipes, from their schema: types, limits, defaults, attribute docstrings.

python scripts/make_recipe_reference.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from rasa_train.adapters.contract import Method
from rasa_train.adapters.registry import METHODS
from rasa_train.recipe.schema import Recipe

PAGE = Path(__file__).resolve().parents[1] / "docs" / "RECIPE.md"
HEAD = """\
# Recipe reference

Every key of a recipe, made from its schema by `make docs`. `rasa-train schema` prints the same as a JSON schema, for
editors. A key that is not listed here is refused, with its line and the nearest key that exists.

A default of "-" means that the key must be given, "derived" that it follows from other keys, as the text says. On the
command line, keys are written with dots: `rasa-train demo adapter.r=16 training.optimizer.lr=1e-3`.
"""
COMMON = set(Method.model_fields)
"""Keys that every method has."""

Schema = dict[str, Any]


def reference() -> str:
    """Return the page."""
    schema = Recipe.model_json_schema()
    definitions: dict[str, Schema] = schema["$defs"]

    def section(name: str, definition: str, level: str = "##") -> str:
        found = definitions[definition]
        parts = [f"{level} {name}", prose(found["description"]), table(found, definitions)]
        return "\n\n".join(filter(None, parts))

    optimizers = [
        section(f"`training.optimizer: {{name: {n}}}`", d, "###") for n, d in (("lionw", "LionW"), ("adamw", "AdamW"))
    ]
    common = {key: definitions["RaSA"]["properties"][key] for key in Method.model_fields if key != "method"}
    top = {key: value for key, value in schema["properties"].items() if "$ref" not in value and "oneOf" not in value}
    pages = [
        HEAD,
        "## Top level\n\nBeside the sections: `extends`, a recipe or a list of those whose keys it replaces, and\n\n"
        + table({"properties": top, "required": schema["required"]}, definitions),
        section("`model`", "ModelConfig"),
        section("`model.add_tokens`, each word", "NewToken", "###"),
        "## `adapter`\n\n`method` says which of the sections below holds. Keys of all of them:\n\n"
        + table({"properties": common}, definitions),
        *(method_section(name, definitions[cls.__name__], definitions) for name, cls in METHODS.items()),
        section("`data`", "DataConfig"),
        section("`data.mix[0]` and the following", "DatasetConfig", "###"),
        section("`data.validation`", "ValidationConfig", "###"),
        section("`data.decontaminate`", "DecontaminateConfig", "###"),
        section("`training`", "TrainingConfig"),
        *optimizers,
        section("`training.schedule`", "ScheduleConfig", "###"),
        section("`training.evaluate`", "EvaluateConfig", "###"),
        section("`training.early_stopping`", "EarlyStoppingConfig", "###"),
        section("`distributed`", "DistributedConfig"),
        section("`tracking`", "TrackingConfig"),
    ]
    return "\n\n".join(page.strip() for page in pages) + "\n"


def method_section(name: str, found: Schema, definitions: dict[str, Schema]) -> str:
    own = {key: value for key, value in found["properties"].items() if key not in COMMON}
    head = f"### `adapter.method: {name}`\n\n{prose(found['description'])}"
    return head + ("\n\n" + table({**found, "properties": own}, definitions) if own else "")


def table(found: Schema, definitions: dict[str, Schema]) -> str:
    rows = ["| key | value | default | |", "|---|---|---|---|"]
    for key, value in found["properties"].items():
        if "const" not in value:
            text = prose(value.get("description", "")).replace("\n", " ")
            cells = [f"`{key}`", kind(value, definitions), default(key, value, found.get("required", [])), text]
            rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)


def kind(value: Schema, definitions: dict[str, Schema]) -> str:
    """Return the allowed values in words, such as ``a whole number > 0, or `auto` ``."""
    if "$ref" in value or "oneOf" in value:
        return "a section (below)"
    if "anyOf" in value:
        return ", or ".join(kind(part, definitions) for part in value["anyOf"])
    if "enum" in value or "const" in value:
        return ", ".join(f"`{item}`" for item in value.get("enum", [value.get("const")]))
    if value.get("type") == "array":
        items = value.get("prefixItems")
        return (
            f"a list of {len(items)}: {kind(items[0], definitions)}"
            if items
            else f"a list: {kind(value['items'], definitions)}"
        )
    words = {
        "integer": "a whole number", "number": "a number", "string": "text", "boolean": "`true`, `false`",
        "null": "`null`", "object": "a mapping",
    }  # fmt: skip
    signs = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
    limits = [f"{sign} {value[name]:g}" for name, sign in signs.items() if name in value]
    return " ".join([words[value["type"]], " and ".join(limits)]).strip()


def default(key: str, value: Schema, required: list[str]) -> str:
    if key in required:
        return "-"
    given = value.get("default")
    below = isinstance(given, int) and given < value.get("minimum", given)  # a mark for "not given", not a value
    if "default" not in value or below:
        return "derived"
    if isinstance(given, dict):
        return ", ".join(f"{name}: {json.dumps(item)}" for name, item in given.items()).join("``").replace('"', "")
    return f"`{given if isinstance(given, str) else json.dumps(given)}`"


def prose(text: str) -> str:
    """Return a docstring as Markdown, without its Raises section."""
    text = re.split(r"\n\s*Raises:", text)[0].strip()
    text = re.sub(r"^Section ``[\w.]+:``(?: of a recipe)?[.:]\s*", "", text)
    text = text[:1].upper() + text[1:] if text[:1] != "`" else text
    return re.sub(r"``([^`]+)``", r"`\1`", text)


if __name__ == "__main__":
    PAGE.write_text(reference())
    print(PAGE)
