"""The methods that a recipe may name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module

from .contract import Method

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
"""Methods of this package: the name in a recipe, and ``module:class`` below ``rasa_train.methods``."""


class Methods(Mapping[str, type[Method]]):
    """Methods by their name in a recipe. A method is imported when it is asked for."""

    def __init__(self) -> None:
        self._found: dict[str, type[Method]] = {}

    def __getitem__(self, name: str) -> type[Method]:
        if name not in self._found:
            module, _, attribute = SHIPPED[name].partition(":")
            self._found[name] = getattr(import_module(f"rasa_train.methods.{module}"), attribute)
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        yield from SHIPPED
        yield from (name for name in self._found if name not in SHIPPED)

    def __len__(self) -> int:
        return sum(1 for _ in self)


METHODS = Methods()
