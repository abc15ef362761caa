"""Read a recipe: files that extend one another, overrides from the command line, and errors that name the line."""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from ..adapters.contract import Method
from ..adapters.registry import METHODS
from ..data.config import DatasetConfig
from ..errors import UserError
from ..io.home import expanded
from ..io.yaml_lines import PLACE, Key, Location, dotted, key_of, nearest, parse, short
from .extends import Files, Layer, find
from .renamed import rename
from .schema import Recipe


@dataclass(frozen=True)
class LoadedRecipe:
    """A valid recipe, and the place where each of its values was written."""

    recipe: Recipe
    locations: dict[Key, Location] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    """What the user should know about the recipe, one line each."""

    def explain(self, error: UserError) -> UserError:
        """Return the same error with the place of its key in the recipe."""
        return explain(error, self.locations)


def explain(error: UserError, locations: dict[Key, Location]) -> UserError:
    """Return ``error`` with the place where its key was written, if it has a key."""
    location = nearest(locations, key_of(error.key)) if error.key else None
    return UserError(f"{error}\n  at {location}", key=error.key) if location else error


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Read, extend, override and validate a recipe.

    Args:
        path: a YAML file, or the name of a shipped recipe (``demo``, ``math_llama8b_r8``).
        overrides: ``section.key=value``, values in YAML.
    Raises:
        UserError: the recipe is wrong; the message has the key, the value, what is allowed, and the line.
    """
    file = find(str(path))
    layers = [*Files().layers(file), _override_layer(overrides)]
    notices = [rename(layer.values, layer.locations) for layer in layers]
    merged = Layer({}, {})
    for layer in layers:
        _merge(merged, layer)
    _refuse_secrets(merged.values, (), merged.locations)
    try:
        recipe = Recipe.model_validate(merged.values)
    except ValidationError as error:
        raise UserError("\n".join(_messages(error, merged.locations, str(path)))) from None
    except UserError as error:  # from a section that checks several keys together
        raise explain(error, merged.locations) from None
    if file.absolute() == Path(recipe.output_dir, "recipe.yaml").absolute():
        del notices[:-1]  # nobody wrote that file: an older version left it in the run's directory
    else:
        _refuse_unused(recipe.adapter, merged.locations)
    return LoadedRecipe(recipe, merged.locations, [line for lines in notices for line in lines])


def copy_recipe(name: str, destination: str | None = None) -> Path:
    """Copy a shipped recipe, comments and all, to ``destination`` (a file or directory; default: here).

    The recipes that the copy extends are found from anywhere. Raises ``UserError`` if there is no such recipe, or if
    the file exists or cannot be written.
    """
    source = find(name)
    target = Path(expanded(destination or "."))
    target = target / source.name if target.is_dir() else target
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(source.read_text(encoding="utf-8"))
    except FileExistsError:
        raise UserError(
            f"{target} exists and is not replaced; give another name: rasa-train copy {name} DEST"
        ) from None
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror}") from None
    return target


def dump_recipe(recipe: Recipe) -> str:
    """Return the resolved recipe as YAML, with every default written out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def completed(stored: str) -> str:
    """Return the recipe of a run's directory as this version would write it: a key that is absent has its default. A
    recipe that this version cannot read is returned as it is. Raises ``UserError`` for a text that is not YAML, or is
    beyond the limits of a recipe."""
    values, _ = parse(stored, "the recipe.yaml of the run")
    try:
        rename(values, {})
        return dump_recipe(Recipe.model_validate(values))
    except (AttributeError, UserError, ValidationError):
        return stored


# -- layers ----------------------------------------------------------------------------------------------


def _override_layer(overrides: Iterable[str]) -> Layer:
    layer = Layer({}, {})
    for override in overrides:
        name, equals, text = override.partition("=")
        key = key_of(name)
        parts = [str(part) for part in key]
        if not equals or not all(parts):
            raise UserError(f"an override is section.key=value, got {override!r}")
        value, _ = parse(text, f"override {name}")
        target: Any = layer.values
        for part in parts[:-1]:
            target = target[_place(target, part, name)] if isinstance(target, list) else target.setdefault(part, {})
            if not isinstance(target, dict | list):
                raise UserError(f"override {override!r}: {part} already has a value, so it has no keys")
        target[_place(target, parts[-1], name) if isinstance(target, list) else parts[-1]] = value
        for written in (key, tuple(parts)):
            layer.locations[written] = Location("command line", None, override)
    return layer


def _place(items: list[Any], part: str, name: str) -> int:
    """Return the place in a list that a part of the key ``name`` gives. Raises ``UserError`` if there is none."""
    if not PLACE.fullmatch(part) or int(part) >= len(items):
        raise UserError(f"override {short(name)}: no place {short(part)} in a list of {len(items)}, counted from 0")
    return int(part)


def _merge(below: Layer, above: Layer) -> None:
    """Put ``above`` over ``below``, key by key. If ``above`` names another adapter method or optimizer, the keys of the
    old one that the new one does not have or use are dropped."""
    for section, tag in ((("adapter",), "method"), (("training", "optimizer"), "name")):
        old, new = _get(below.values, section), _get(above.values, section)
        if isinstance(old, dict) and isinstance(new, dict) and new.get(tag, old.get(tag)) != old.get(tag):
            allowed = _fields_of(section, new[tag])
            for name in [n for n in old if n not in allowed]:
                del old[name]
    if isinstance(below.values.get("task"), str) and isinstance(above.values.get("task"), dict):
        below.values["task"] = {"name": below.values["task"]}
    _drop_other_data(below.values.get("data"), above.values.get("data"))
    _merge_values(below.values, above.values)
    replaced = {key for key in above.locations if not isinstance(_get(above.values, key), dict)}
    for key in [key for key in below.locations if any(key[:size] in replaced for size in range(len(key)))]:
        del below.locations[key]  # an item of a list, or a key inside it
    below.locations.update(above.locations)


def _drop_other_data(below: Any, above: Any) -> None:
    """Drop ``data.dataset``, and the keys that belong to it, where ``above`` gives a mixture in its place; and a
    mixture where it gives a dataset."""
    if isinstance(below, dict) and isinstance(above, dict):
        if isinstance(above.get("mix"), list) and above.get("dataset") is None:
            for name in DatasetConfig.model_fields:
                below.pop(name, None)
        elif above.get("dataset") is not None and above.get("mix") is None:
            below.pop("mix", None)


def _refuse_unused(adapter: Method, locations: dict[Key, Location]) -> None:
    """Raise ``UserError`` if the recipe sets a key that the adapter's method does nothing with."""
    for key in sorted(adapter.unused):
        value = getattr(adapter, key)
        if value != type(adapter).model_fields[key].get_default():
            message = f"adapter.{key}: adapter.method: {adapter.method} does not use it, got {value!r}; leave it out"
            raise explain(UserError(message, key=f"adapter.{key}"), locations)


def _merge_values(below: Any, above: dict[str, Any], section: str = "") -> None:
    """Put the values of ``above`` into a mapping, or into a list, of which they name the places."""
    for name, value in above.items():
        path = f"{section}.{name}".removeprefix(".")
        key: Any = _place(below, name, path) if isinstance(below, list) else name
        old = below[key] if isinstance(below, list) else below.get(name)
        indexed = isinstance(old, list) and isinstance(value, dict) and value and all(map(PLACE.fullmatch, value))
        if isinstance(value, dict) and (isinstance(old, dict) or indexed):
            _merge_values(old, value, path)
        else:
            below[key] = value


def _get(values: Any, path: Key) -> Any:
    for name in path:
        values = values.get(name) if isinstance(values, dict) else None
    return values


_SECRET = re.compile(
    r"://[^/\s:@]*:[^/\s@]+@"  # https://user:password@host
    r"|[?&][^=&]*(token|secret|password|api_?key|signature)[^=&]*=[^&]+"
    r"|\bhf_[A-Za-z0-9]{30,}"
    r"|\b(AKIA[A-Z0-9]{16}|gh[pousr]_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9_-]{20,})",
    re.IGNORECASE,
)


def _refuse_secrets(value: Any, key: Key, locations: dict[Key, Location]) -> None:
    """Raise ``UserError`` if ``value`` holds a password, because a recipe is copied into its run directory and shown in
    messages. The error says where the password stands and does not repeat it."""
    if isinstance(value, dict):
        for name, inner in value.items():
            _refuse_secrets(inner, (*key, name), locations)
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            _refuse_secrets(inner, (*key, i), locations)
    elif isinstance(value, str) and _SECRET.search(value):
        at = nearest(locations, key)
        where = f"\n  at {at.where}" if at else ""
        raise UserError(
            f"{dotted(key)} holds a password or token, and a recipe is copied into its run directory: "
            f"take it out, and give it in the environment (HF_TOKEN, WANDB_API_KEY, ...) or by `hf auth login`{where}"
        )


# -- errors ----------------------------------------------------------------------------------------------

MOST_ERRORS = 20
"""Most errors that are reported at once."""


def _models(annotation: Any) -> list[type[BaseModel]]:
    """Return the models in an annotation: one for a section, several for a tagged union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for arg in typing.get_args(annotation) for m in _models(arg)]


def _tag_of(model: type[BaseModel]) -> str:
    first = model.model_fields.get("method") or model.model_fields.get("name")
    return str(first.default) if first else ""


def _fields_of(section: tuple[str, ...], tag: str) -> set[str]:
    models: list[type[BaseModel]] = [Recipe]
    for name in section:
        models = _models(models[0].model_fields[name].annotation)
    used = {m: m.model_fields.keys() - getattr(m, "never_used", frozenset()) for m in models}
    return {f for m, fields in used.items() if _tag_of(m) == tag for f in fields} or {
        f for m in models for f in m.model_fields
    }


def _resolve(loc: Sequence[str | int]) -> tuple[Key, type[BaseModel] | None]:
    """Return pydantic's location without the tags of unions: the recipe's key, and the section that holds it."""
    key: list[str | int] = []
    section: type[BaseModel] | None = Recipe
    models: list[type[BaseModel]] = [Recipe]
    for item in loc:
        if len(models) > 1 and item in (tags := {_tag_of(m): m for m in models}):
            models = [tags[str(item)]]
            continue
        if len(models) == 1 and isinstance(item, str):
            section = models[0]
            key.append(item)
            models = _models(section.model_fields[item].annotation) if item in section.model_fields else []
        elif isinstance(item, int):
            key.append(item)
    if len(models) == 1:
        section = models[0]
    return tuple(key), section


def _messages(error: ValidationError, locations: dict[Key, Location], source: str) -> list[str]:
    found: dict[Key, tuple[type[BaseModel] | None, list[Any]]] = {}
    for item in error.errors(include_url=False):
        key, section = _resolve(item["loc"])
        if "field" in item.get("ctx", {}):
            key = (*key, item["ctx"]["field"])
        found.setdefault(key, (section, []))[1].append(item)  # each branch of a union reports an error
    messages: list[str] = []
    for key, (section, items) in found.items():
        if len(messages) == MOST_ERRORS:
            return [*messages, "and more"]
        name = dotted(key)
        location = nearest(locations, key)
        where = f"\n  at {location}" if location else f"\n  in {source}"
        wanted = [wanted for item in items if (wanted := _wanted(item))]
        if len(wanted) < len(items):
            sentence = _sentence(next(item for item in items if not _wanted(item)), name, key, section)
        elif any(len(other) > len(key) and other[: len(key)] == key for other in found):
            continue  # a list or a section in which something is wrong, which is reported
        else:
            sentence = f"{name} must be {_alternatives(wanted)}, got {items[0].get('input')!r}"
        messages.append(short(sentence, 1_000) + where)
    return messages


def _alternatives(wanted: list[str]) -> str:
    """Join what the branches of a union want: ``true, false, 'auto' or a number > 0``."""
    if len(wanted) == 1:
        return wanted[0]
    split = [part for one in wanted for part in re.split(r", | or ", one)]
    words = dict.fromkeys(f"a number {part}" if part[0] in "<>" else part for part in split)
    if "a number" in words:
        words.pop("a whole number", None)
    *others, last = words
    return f"{', '.join(others)} or {last}" if others else last


def _wanted(item: Any) -> str | None:
    """Return what a value must be, for an error that says so; None for another error."""
    kind, context = item["type"], item.get("ctx", {})
    if kind in _LIMITS:
        name, sign = _LIMITS[kind]
        return f"{sign} {context[name]}"
    if kind == "literal_error":
        return str(context["expected"])
    if kind.endswith(("_type", "_parsing", "_from_float")):
        name = str(kind).split("_")[0]
        return _TYPES.get(name, name)
    return None


def _sentence(item: Any, name: str, key: Key, section: type[BaseModel] | None) -> str:
    kind, context, got = item["type"], item.get("ctx", {}), item.get("input")
    if kind == "extra_forbidden":
        return _unknown_key(name, str(key[-1]), _section_fields(key[:-1], section))
    if kind == "missing":
        return f"{name} is required but missing"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        tag = str(context.get("discriminator", "method")).strip("'")
        known = (
            list(METHODS) if tag == "method" else [t.strip(" '") for t in context.get("expected_tags", "").split(",")]
        )
        if kind == "union_tag_not_found":
            return f"{name}.{tag} is required but missing; it must be one of {', '.join(filter(None, known))}"
        value = context.get("tag", "")
        close = difflib.get_close_matches(value, known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        return f"{name}.{tag} must be one of {', '.join(known)}, got {value!r}{hint}"
    if kind == "range":
        return f"{name} {item['msg']}"
    return f"{name}: {item['msg'].removeprefix('Value error, ')}" + ("" if "got" in item["msg"] else f", got {got!r}")


_LIMITS = {
    "greater_than": ("gt", ">"),
    "greater_than_equal": ("ge", ">="),
    "less_than": ("lt", "<"),
    "less_than_equal": ("le", "<="),
}
_TYPES: dict[str, str] = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "list": "a list",
    "model": "a section with keys",
    "dict": "a mapping",
}


def _section_fields(key: Key, section: type[BaseModel] | None) -> list[str]:
    return list((section or Recipe).model_fields)


def _unknown_key(dotted: str, name: str, allowed: list[str]) -> str:
    close = difflib.get_close_matches(name, allowed, n=1)
    if close:
        return f"unknown key {dotted}; did you mean {close[0]!r}?"
    elsewhere = [path for path in _all_keys(Recipe, "") if path.rpartition(".")[2] == name and path != dotted]
    if elsewhere:
        return f"unknown key {dotted}; did you mean {elsewhere[0]}?"
    return f"unknown key {dotted}; allowed here: {', '.join(allowed)}"


def _all_keys(model: type[BaseModel], prefix: str) -> list[str]:
    keys = []
    for name, info in model.model_fields.items():
        keys.append(prefix + name)
        several = any(typing.get_origin(one) is list for one in (info.annotation, *typing.get_args(info.annotation)))
        for inner in _models(info.annotation):
            keys += _all_keys(inner, f"{prefix}{name}{'[0]' if several else ''}.")
    return keys
