"""What a chat template looks up in what it is given, read from its source."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

_MARKS = re.compile(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}")


def names_used(source: str) -> frozenset[str]:
    """Return the names that a template looks up, apart from the messages, and ``messages.<key>`` for each key of a
    message that it looks up. A template that writes a message as a whole has ``messages.*``."""
    import jinja2.meta
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])  # constants are evaluated
    try:
        tree = environment.parse(_MARKS.sub("", source))
        found = jinja2.meta.find_undeclared_variables(tree)
    except jinja2.TemplateError:  # each row says so
        return frozenset()
    known = {"messages", "strftime_now", "raise_exception", *environment.globals}
    return frozenset(found - known) | {f"messages.{key}" for key in _keys(tree)}


def _keys(tree: Any) -> set[str]:
    """Return the keys that are looked up in messages: in ``messages``, its items, and variables that hold one of
    these, whatever their scope."""
    from jinja2 import nodes

    holders, before = {"messages"}, 0
    while len(holders) > before:
        before = len(holders)
        for loop in tree.find_all(nodes.For):
            holders |= _targets(loop.target, loop.iter, holders)
        for assignment in tree.find_all(nodes.Assign):
            holders |= _targets(assignment.target, assignment.node, holders)
        for macro, call in _calls(tree):
            given = [*zip(macro.args, call.args, strict=False), *_named_arguments(macro, call)]
            holders |= {parameter.name for parameter, value in given if _holds(value, holders)}
    return set(_looked_up(tree, holders))


def _holds(node: Any, holders: set[str]) -> bool:
    """Whether an expression is a message or a list of them."""
    from jinja2 import nodes

    while isinstance(node, nodes.Getitem | nodes.Filter) and not _constant(getattr(node, "arg", None)):
        node = node.node
    if isinstance(node, nodes.CondExpr):
        return _holds(node.expr1, holders) or _holds(node.expr2, holders)
    if isinstance(node, nodes.Add):
        return _holds(node.left, holders) or _holds(node.right, holders)
    return isinstance(node, nodes.Name) and node.name in holders


def _targets(target: Any, value: Any, holders: set[str]) -> set[str]:
    from jinja2 import nodes

    pairs = [(target, value)]
    if isinstance(target, nodes.Tuple) and isinstance(value, nodes.Tuple):
        pairs = list(zip(target.items, value.items, strict=False))
    return {to.name for to, given in pairs if isinstance(to, nodes.Name) and _holds(given, holders)}


def _calls(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Yield each call of a macro, with the macro."""
    from jinja2 import nodes

    macros = {macro.name: macro for macro in tree.find_all(nodes.Macro)}
    for call in tree.find_all(nodes.Call):
        if isinstance(call.node, nodes.Name) and call.node.name in macros:
            yield macros[call.node.name], call


def _named_arguments(macro: Any, call: Any) -> Iterator[tuple[Any, Any]]:
    parameters = {parameter.name: parameter for parameter in macro.args}
    return ((parameters[given.key], given.value) for given in call.kwargs if given.key in parameters)


def _looked_up(tree: Any, holders: set[str]) -> Iterator[str]:
    from jinja2 import nodes

    for node in tree.find_all(nodes.Getattr):
        if _holds(node.node, holders):
            yield from () if node.attr == "get" else ("*" if node.attr in ("items", "values") else node.attr,)
    for node in tree.find_all(nodes.Getitem):
        if _holds(node.node, holders) and _constant(node.arg):
            yield node.arg.value
    for node in tree.find_all(nodes.Call):
        is_get = isinstance(node.node, nodes.Getattr) and node.node.attr == "get" and _holds(node.node.node, holders)
        if is_get and node.args and _constant(node.args[0]):
            yield node.args[0].value
    for node in tree.find_all(nodes.Filter):
        if node.name in ("tojson", "string", "pprint", "items") and _holds(node.node, holders):
            yield "*"
        names = [*node.args, *(given.value for given in node.kwargs)]
        if node.name in ("map", "selectattr", "rejectattr", "groupby", "attr") and _holds(node.node, holders):
            yield from (name.value for name in names[:1] if _constant(name))


def _constant(node: Any) -> bool:
    from jinja2 import nodes

    return isinstance(node, nodes.Const) and isinstance(node.value, str)
