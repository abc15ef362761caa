"""Values as bytes, which carry data and no behaviour: what a program returns is checked in a process that never ran it.

The bytes are JSON. Numbers below ``SMALL``, text and None stand for themselves, everything else is a list: the name of
a type, then its data. A subclass of such a type is sent as what it holds, without its methods, so a number that claims
to be equal to everything arrives as the number that it is. An object of any other type stays where it is, and a
reference to it is sent. Bytes from a program are taken for hostile: an unknown name or data of another form is refused.

Runs inside the sandbox too, where only the standard library can be imported.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable, Iterable
from itertools import chain
from types import BuiltinFunctionType, FunctionType
from typing import Any

SMALL = 1 << 1000
"""Bound of the integers that stand for themselves: Python limits the decimal digits that it reads."""
SIMPLE = frozenset({str, float, bool, type(None)})
PLAIN = SIMPLE | {int}
SKIPS = re.compile(r"unittest|_?pytest")
DTYPE = re.compile(r"[<>|=]([biufcSU]\d{1,9}|[mM]8\[\w{1,9}\])")


class NotAValue(Exception):
    """The bytes are not those of a value."""


class Codec:
    """Turns values into bytes and back.

    Args:
        hold: returns the reference to an object that cannot be sent, as a list that starts with a name in ``refer``.
        refer: for each such name, the types of the data after it, and what makes an object of the data.
    """

    def __init__(self, hold: Callable[[Any], list[Any]], refer: dict[str, Decoder]) -> None:
        self.hold, self.decoders = hold, DECODERS | refer
        self.exceptions: dict[str, Any] = {}

    def pack(self, value: Any) -> bytes:
        return json.dumps(self.encode(value), separators=(",", ":")).encode()

    def unpack(self, data: bytes) -> Any:
        return self.decode(json.loads(data))

    def update(self, old: Any, new: Any) -> None:
        update(old, new)

    def exception_class(self, names: list[Any], own: dict[str, dict[str, Any]]) -> type[BaseException]:
        """Return the class of an exception from the other process, given (module, name) of the class and its bases: the
        first of them that a module here has, or else a class that is derived from it. What skips a test counts as
        unknown. ``own`` has the contents of modules that are not in ``sys.modules``."""
        for position, (module, name) in enumerate(names):
            if module in own:
                known = self.exceptions | own[module]
            else:
                known = vars(sys.modules[module]) if module in sys.modules and not SKIPS.match(module) else {}
            found = known.get(name)
            if isinstance(found, type) and issubclass(found, BaseException):
                if position:
                    found = self.exceptions[names[0][1]] = type(str(names[0][1]), (found,), {})
                return found
        return Exception

    def encode(self, value: Any) -> Any:
        kind = type(value)
        if kind in SIMPLE or (kind is int and -SMALL < value < SMALL):
            return value
        for base in kind.__mro__:
            name = f"{base.__module__}.{base.__qualname__}"
            if base is tuple and kind is not tuple and isinstance(getattr(kind, "_fields", None), tuple):
                return ["namedtuple", kind.__name__, [*map(str, kind._fields)], self.encode_all(tuple.__iter__(value))]
            if name in ENCODERS and (data := ENCODERS[name](self, base, value)) is not None:
                return [name, *data]
        return _library(value) or self.hold(value)

    def encode_all(self, values: Iterable[Any]) -> list[Any]:
        items = [*values]
        kinds = {*map(type, items)}
        if kinds <= SIMPLE or (kinds == {int} and min(items) > -SMALL and max(items) < SMALL):
            return items
        return [self.encode(item) for item in items]

    def decode(self, item: Any) -> Any:
        kind = type(item)
        if kind in PLAIN:
            return item
        if kind is not list or not item or type(item[0]) is not str or item[0] not in self.decoders:
            raise NotAValue("no value")
        kinds, make = self.decoders[item[0]]
        if (*map(type, item[1:]),) != kinds:
            raise NotAValue(f"no {item[0]}")
        return make(self, *item[1:])

    def decode_all(self, items: list[Any]) -> list[Any]:
        return items if {*map(type, items)} <= PLAIN else [self.decode(item) for item in items]


Encoder = Callable[[Codec, Any, Any], list[Any] | None]
"""Returns the data of a value, which is of the given type or a subclass; None if the value cannot be sent."""
Decoder = tuple[tuple[type, ...], Callable[..., Any]]


def _library(value: Any) -> list[Any] | None:
    """Return a name for what the standard library holds: a class, or a function of a module. Whoever receives the name
    takes their own."""
    try:
        module, name = value.__module__, value.__qualname__
        if module in sys.stdlib_module_names | {"builtins"} and getattr(sys.modules[module], name) is value:
            return ["library", str(module), str(name)]
    except Exception:
        return None
    return None


def _from_library(codec: Codec, module: str, name: str) -> Any:
    if module not in sys.stdlib_module_names | {"builtins"}:
        raise NotAValue(f"no module {module[:50]}")
    found = getattr(importlib.import_module(module), name)
    if not isinstance(found, type | FunctionType | BuiltinFunctionType):
        raise NotAValue(f"no class or function {name[:50]}")
    return found


def _module(codec: Codec, name: str) -> Any:
    if name.partition(".")[0] not in sys.stdlib_module_names | {"numpy"}:
        raise NotAValue(f"no module {name[:50]}")
    return importlib.import_module(name)


def _array(codec: Codec, base: Any, value: Any) -> list[Any] | None:
    if not DTYPE.fullmatch(value.dtype.str):
        return None
    return [value.dtype.str, [*map(int, getattr(value, "shape", ()))], value.tobytes().decode("latin-1")]


def _numpy(codec: Codec, dtype: str, shape: list[Any], data: str) -> Any:
    if not DTYPE.fullmatch(dtype) or {*map(type, shape)} - {int}:
        raise NotAValue("no array")
    return importlib.import_module("numpy").ndarray(shape, dtype, bytearray(data, "latin-1"))


def _pairs(codec: Codec, items: list[Any]) -> dict[Any, Any]:
    flat = codec.decode_all(items)
    return dict(zip(flat[::2], flat[1::2], strict=True))


_tuples: dict[tuple[str, ...], Any] = {}


def _namedtuple(codec: Codec, name: str, fields: list[Any], items: list[Any]) -> Any:
    if {*map(type, fields)} - {str}:
        raise NotAValue("no fields")
    kind = _tuples.setdefault((name, *fields), namedtuple(name, fields))  # type: ignore[misc]
    values = codec.decode_all(items)
    if any(map(callable, values)):
        raise NotAValue("a function in the place of a method")
    return kind(*values)


def _text_of(codec: Codec, base: Any, value: Any) -> list[Any]:
    return [base.__str__(value)]


def _flat(codec: Codec, base: Any, value: Any) -> list[Any]:
    return [codec.encode_all(chain.from_iterable(base.items(value)))]


def _elements(codec: Codec, base: Any, value: Any) -> list[Any]:
    return [codec.encode_all(base.__iter__(value))]


def _iso(codec: Codec, base: Any, value: Any) -> list[Any]:
    return [base.isoformat(value)]


ENCODERS: dict[str, Encoder] = {
    "builtins.int": lambda codec, base, value: [hex(int.__int__(value))],
    "builtins.float": lambda codec, base, value: [float.__float__(value)],
    "builtins.str": _text_of,
    "builtins.complex": lambda codec, base, value: [float(value.real), float(value.imag)],
    "builtins.bytes": lambda codec, base, value: [bytes.decode(value, "latin-1")],
    "builtins.bytearray": lambda codec, base, value: [bytearray.decode(value, "latin-1")],
    **{f"builtins.{name}": _elements for name in ("list", "tuple", "set", "frozenset")},
    **{f"builtins.dict_{name}": _elements for name in ("keys", "values", "items")},
    "builtins.dict": _flat,
    **{f"collections.{name}": _flat for name in ("OrderedDict", "Counter")},
    "collections.defaultdict": lambda codec, base, value: [
        codec.encode_all([value.default_factory]),
        *_flat(codec, base, value),
    ],
    "array.array": lambda codec, base, value: [str(value.typecode), codec.encode_all(value)],
    "collections.deque": lambda codec, base, value: [codec.encode_all(deque.__iter__(value)), str(value.maxlen)],
    **{
        f"builtins.{name}": lambda codec, base, value: [codec.encode_all((value.start, value.stop, value.step))]
        for name in ("range", "slice")
    },
    **{f"builtins.{name}": lambda codec, base, value: [] for name in ("ellipsis", "NotImplementedType")},
    "builtins.module": lambda codec, base, value: [str(value.__name__)],
    "decimal.Decimal": _text_of,
    "fractions.Fraction": lambda codec, base, value: [codec.encode_all((value.numerator, value.denominator))],
    "uuid.UUID": _text_of,
    "pathlib.PurePath": _text_of,
    **{f"datetime.{name}": _iso for name in ("datetime", "date", "time")},
    "datetime.timedelta": lambda codec, base, value: [value.days, value.seconds, value.microseconds],
    "numpy.ndarray": _array,
    "numpy.generic": _array,
}
"""What is sent of a value, by the full name of its type or of the first of its bases that has an entry."""


def _of(module: str, name: str) -> Callable[..., Any]:
    """Return a function that calls ``module.name`` with data. The module is imported when the first value arrives."""

    def make(codec: Codec, *data: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*data)

    return make


def _view(name: str) -> Callable[..., Any]:
    def make(codec: Codec, items: list[Any]) -> Any:
        values = codec.decode_all(items)
        whole = {"keys": dict.fromkeys, "values": lambda v: dict(enumerate(v)), "items": dict}[name](values)  # type: ignore[operator]
        return getattr(whole, name)()

    return make


def _call(kind: Callable[..., Any]) -> Callable[..., Any]:
    return lambda codec, items: kind(codec.decode_all(items))


def _call_with(kind: Callable[..., Any]) -> Callable[..., Any]:
    return lambda codec, items: kind(*codec.decode_all(items))


DECODERS: dict[str, Decoder] = {
    "builtins.int": ((str,), lambda codec, text: int(text, 16)),
    "builtins.float": ((float,), lambda codec, value: value),
    "builtins.str": ((str,), lambda codec, value: value),
    "builtins.complex": ((float, float), lambda codec, *parts: complex(*parts)),
    "builtins.bytes": ((str,), lambda codec, text: text.encode("latin-1")),
    "builtins.bytearray": ((str,), lambda codec, text: bytearray(text, "latin-1")),
    **{f"builtins.{kind.__name__}": ((list,), _call(kind)) for kind in (list, tuple, set, frozenset)},
    **{f"builtins.dict_{name}": ((list,), _view(name)) for name in ("keys", "values", "items")},
    "builtins.dict": ((list,), _pairs),
    "collections.OrderedDict": ((list,), lambda codec, items: OrderedDict(_pairs(codec, items))),
    "collections.Counter": ((list,), lambda codec, items: Counter(_pairs(codec, items))),
    "collections.defaultdict": (
        (list, list),
        lambda codec, factory, items: defaultdict(codec.decode_all(factory)[0], _pairs(codec, items)),
    ),
    "array.array": (
        (str, list),
        lambda codec, kind, items: _of("array", "array")(codec, kind, codec.decode_all(items)),
    ),
    "collections.deque": (
        (list, str),
        lambda codec, items, most: deque(codec.decode_all(items), None if most == "None" else int(most)),
    ),
    **{f"builtins.{kind.__name__}": ((list,), _call_with(kind)) for kind in (range, slice)},
    "builtins.ellipsis": ((), lambda codec: ...),
    "builtins.NotImplementedType": ((), lambda codec: NotImplemented),
    "builtins.module": ((str,), _module),
    "decimal.Decimal": ((str,), _of("decimal", "Decimal")),
    "fractions.Fraction": ((list,), lambda codec, items: _of("fractions", "Fraction")(codec, *codec.decode_all(items))),
    "uuid.UUID": ((str,), _of("uuid", "UUID")),
    "pathlib.PurePath": ((str,), _of("pathlib", "Path")),
    **{
        f"datetime.{name}": ((str,), lambda codec, text, name=name: _from_iso(name, text))
        for name in ("datetime", "date", "time")
    },
    "datetime.timedelta": ((int, int, int), _of("datetime", "timedelta")),
    "numpy.ndarray": ((str, list, str), _numpy),
    "numpy.generic": ((str, list, str), lambda codec, *data: _numpy(codec, *data)[()]),
    "namedtuple": ((str, list, list), _namedtuple),
    "library": ((str, str), _from_library),
}
"""The types of what was sent, and the function that makes the value, called with the codec and what was sent."""


def _from_iso(name: str, text: str) -> Any:
    return getattr(importlib.import_module("datetime"), name).fromisoformat(text)


def _holds(value: Any) -> bool:
    """Return whether the value has contents that may change."""
    return isinstance(value, list | tuple | dict | set | bytearray) or hasattr(value, "__dict__")


def update(old: Any, new: Any) -> None:
    """Make the contents of ``old`` those of ``new``, in place, where both are of the same type and can be changed."""
    if old is new or type(old) is not type(new):
        return
    if isinstance(old, list | tuple):
        for index, (a, b) in enumerate(zip(old, new, strict=False)):
            if type(a) is type(b) and _holds(a):
                update(a, b)
            elif isinstance(old, list):
                old[index] = b
        if isinstance(old, list):
            old[len(new) :] = new[len(old) :]
    elif isinstance(old, dict):
        kept = {key: old[key] for key in old.keys() & new.keys()}
        old.clear()
        for key, value in new.items():
            if key in kept and type(kept[key]) is type(value) and _holds(value):
                update(kept[key], value)
                value = kept[key]
            old[key] = value
    elif isinstance(old, set):
        old.clear()
        old.update(new)
    elif type(old).__name__ == "ndarray" and old.shape == new.shape:
        old[...] = new
    elif hasattr(old, "__dict__"):
        update(vars(old), vars(new))
    elif isinstance(old, bytearray) or type(old).__name__ == "deque":
        old.clear()
        old.extend(new)
