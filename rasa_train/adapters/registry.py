"""The methods that a recipe may name: methods of this package, and methods that are registered from outside.

Your own method does not need a fork of this package. It is found in one of three ways:

- a call, ``register(MyMethod)``, before recipes are read: for your own scripts;
- an entry point of the group ``rasa_train.methods`` in an installed package: ``my-method = "my_package:MyMethod"``;
- the environment variable ``RASA_TRAIN_METHODS``: modules or ``.py`` files, separated by commas, that are imported when
  the commands start. Every method that they define is registered. Worker processes inherit the variable.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType

from ..errors import UserError
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
    "peft": "from_peft:Peft",
}
"""Methods of this package: the name in a recipe, and ``module:class`` relative to ``rasa_train.methods``."""


class Methods(Mapping[str, type[Method]]):
    """Methods by their name in a recipe. A method of this package is imported when it is first looked up."""

    def __init__(self) -> None:
        self._imported: dict[str, type[Method]] = {}
        self._registered: dict[str, type[Method]] | None = None
        self.watchers: list[Callable[[], None]] = []
        """Functions that are called when a method has been registered."""

    @property
    def registered(self) -> dict[str, type[Method]]:
        """Methods registered from outside. Entry points and the environment variable are read at the first use."""
        if self._registered is None:
            self._registered = {}
            for entry in entry_points(group=ENTRY_POINTS):
                self.register(entry.load())
            for name in filter(None, os.environ.get(VARIABLE, "").split(",")):
                for method in _methods_in(_import(name.strip())):
                    self.register(method)
        return self._registered

    def register(self, method: type[Method]) -> type[Method]:
        """Add a method under the name that is the default of its field ``method``. Returns the method, so that
        ``register`` can be used as a decorator.

        Raises:
            ValueError: a method of this package or another registered method has the name already.
        """
        name = method.model_fields["method"].default
        known = self.registered.get(name)
        if name in SHIPPED or (known is not None and known is not method):
            raise ValueError(f"a method {name!r} exists already: choose another default for the field `method`")
        if not isinstance(name, str) or not name:
            raise ValueError(f"{method.__name__} needs a name: `method: Literal['my-method'] = 'my-method'`")
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


def _import(name: str) -> ModuleType:
    """Import a module by its name, or a file by its path.

    Raises:
        UserError: the module or the file does not exist.
    """
    if not name.endswith(".py"):
        try:
            return import_module(name)
        except ModuleNotFoundError as error:
            raise UserError(f"{VARIABLE}: {name}: {error}") from None
    path = Path(name).expanduser()
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise UserError(f"{VARIABLE}: {name} does not exist")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # pydantic looks up the names of annotations there
    spec.loader.exec_module(module)
    return module


def _methods_in(module: ModuleType) -> list[type[Method]]:
    """Return the methods that a module itself defines, not those it imports."""
    found = [value for value in vars(module).values() if isinstance(value, type) and issubclass(value, Method)]
    return [method for method in found if method.__module__ == module.__name__]
