"""The methods that a recipe may name: those of this package, and those that are registered from outside.

A method of one's own needs no fork. It is found in one of three ways:

- a call, ``register(MyMethod)``, before recipes are read: for a script of one's own;
- an entry point of the group ``rasa_train.methods`` in an installed package: ``my-method = "my_package:MyMethod"``;
- the environment variable ``RASA_TRAIN_METHODS``: modules or ``.py`` files, separated by commas. A command imports them
  before it reads a recipe or an adapter, and registers every method that they define. Worker processes inherit the
  variable.

Whatever goes wrong there is a ``UserError`` that names the variable or the entry point.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import UserError, first_line
from .contract import Method

VARIABLE, ENTRY_POINTS = "RASA_TRAIN_METHODS", "rasa_train.methods"

SHIPPED = {
    "lora": "lora:LoRA",
    "rasa": "rasa:RaSA",
    "vera": "vera:VeRA",
    "mora": "mora:MoRA",
    "tied-lora": "tied_lora:TiedLoRA",
    "sharelora": "sharelora:ShareLoRA",
    "nola": "nola:NOLA",
    "vb-lora": "vblora:VBLoRA",
    "olora": "olora:OLoRA",
    "pissa": "pissa:PiSSA",
    "dora": "dora:DoRA",
    "adalora": "adalora:AdaLoRA",
    "prilora": "prilora:PriLoRA",
    "full": "full:Full",
    "bitfit": "bitfit:BitFit",
    "bottleneck": "bottleneck:Bottleneck",
    "peft": "from_peft:Peft",
}
"""Methods of this package: the name in a recipe, and ``module:class`` below ``rasa_train.methods``."""


class Methods(Mapping[str, type[Method]]):
    """Methods by their name in a recipe. A method of this package is imported when it is asked for."""

    def __init__(self) -> None:
        self._imported: dict[str, type[Method]] = {}
        self._registered: dict[str, type[Method]] | None = None
        self.watchers: list[Callable[[], None]] = []
        """Called when a method has been registered."""

    @property
    def registered(self) -> dict[str, type[Method]]:
        """The methods from outside. Entry points and the environment variable are read at the first use.

        Raises:
            UserError: what an entry point or the variable names cannot be imported, is not a method, or has a name that
                is taken.
        """
        if self._registered is None:
            self._registered = {}
            try:
                for entry in entry_points(group=ENTRY_POINTS):
                    self._add(f"entry point {entry.name} of {ENTRY_POINTS}: {entry.value}", _load, entry)
                for name in filter(None, map(str.strip, os.environ.get(VARIABLE, "").split(","))):
                    self._add(f"{VARIABLE}: {name}", _import, name)
            except UserError:
                self._registered = None  # or the second use would find half of the methods and no error
                raise
        return self._registered

    def _add(self, origin: str, load: Callable[[Any], list[type[Method]]], name: object) -> None:
        """Register the methods that ``load`` finds under ``name``; ``origin`` begins the message of an error."""
        try:
            for method in load(name):
                self.register(method)
        except Exception as error:
            place = _place(error)
            kind = "" if isinstance(error, ValueError) and not place else f"{type(error).__name__}: "
            raise UserError(f"{origin}: {place}{kind}{first_line(error)}") from error

    def register(self, method: type[Method]) -> type[Method]:
        """Add a method under the name that is the default of its field ``method``. Returns the method, so that this can
        be a decorator.

        Raises:
            ValueError: the name is taken by a method of this package or by another registered one, the class has no
                name, or it is not derived from ``Method``.
        """
        if not (isinstance(method, type) and issubclass(method, Method)):
            raise ValueError(f"{method!r} is not a method: derive a class from rasa_train.Method")
        name = method.model_fields["method"].default
        if not isinstance(name, str) or not name:
            raise ValueError(f"{method.__name__} needs a name: `method: Literal['my-method'] = 'my-method'`")
        known = self.registered.get(name)
        if name in SHIPPED or (known is not None and known is not method):
            raise ValueError(f"there is a method {name!r} already: choose another default for the field `method`")
        self.registered[name] = method
        for watcher in self.watchers:
            watcher()
        return method

    def __getitem__(self, name: str) -> type[Method]:
        if name not in SHIPPED:
            return self.registered[name]
        if name not in self._imported:
            module, _, attribute = SHIPPED[name].partition(":")
            self._imported[name] = getattr(import_module(f"rasa_train.methods.{module}"), attribute)
        return self._imported[name]

    def __iter__(self) -> Iterator[str]:
        yield from SHIPPED
        yield from self.registered

    def __len__(self) -> int:
        return len(SHIPPED) + len(self.registered)


METHODS = Methods()
register = METHODS.register


def _load(entry: EntryPoint) -> list[type[Method]]:
    return [entry.load()]


def _import(name: str) -> list[type[Method]]:
    """Import a module by its name, or a file by its path. Returns the methods that it defines itself.

    Raises:
        ValueError: there is no such file or module, or it defines no method.
    """
    if name.endswith(".py"):
        path = Path(name).expanduser()
        if not path.is_file():
            raise ValueError(f"there is no such file ({path.absolute()}); give its path from here, or an absolute one")
        # A name of its own: a file peft.py must not take the place of the package peft.
        module = _execute(f"{__name__}_{path.stem}", path)
    else:
        try:
            module = import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise
            raise ValueError("there is no such module; install it, set PYTHONPATH, or name a .py file") from None
    found = [value for value in vars(module).values() if isinstance(value, type) and issubclass(value, Method)]
    methods = [method for method in found if method.__module__ == module.__name__]
    if not methods:
        raise ValueError("it defines no method, which is a class derived from rasa_train.Method")
    return methods


def _execute(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # pydantic looks up the names of annotations there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _place(error: Exception) -> str:
    """``line 12: ``, the line of the module from outside that failed; nothing where the import itself failed."""
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename != __file__ and "importlib" not in frame.filename:
            return f"line {frame.lineno}: "
    return ""
