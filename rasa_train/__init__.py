"""Fine-tune language models with RaSA, LoRA and their relatives, from one YAML recipe or in your own training loop.

The names below are imported when they are first used: ``import rasa_train`` itself does not load torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapters.contract import Adapter as Adapter
    from .adapters.contract import FactorAdapter as FactorAdapter
    from .adapters.contract import Method as Method
    from .adapters.registry import METHODS as METHODS
    from .adapters.registry import register as register
    from .api import adapt as adapt
    from .api import load_adapter as load_adapter
    from .api import merge as merge
    from .api import save_adapter as save_adapter
    from .errors import UserError as UserError
    from .merging.switch import switch as switch
    from .methods.adalora import AdaLoRA as AdaLoRA
    from .methods.bitfit import BitFit as BitFit
    from .methods.dora import DoRA as DoRA
    from .methods.full import Full as Full
    from .methods.lora import LoRA as LoRA
    from .methods.mora import MoRA as MoRA
    from .methods.nola import NOLA as NOLA
    from .methods.olora import OLoRA as OLoRA
    from .methods.pissa import PiSSA as PiSSA
    from .methods.prilora import PriLoRA as PriLoRA
    from .methods.rasa import RaSA as RaSA
    from .methods.sharelora import ShareLoRA as ShareLoRA
    from .methods.tied_lora import TiedLoRA as TiedLoRA
    from .methods.vblora import VBLoRA as VBLoRA
    from .methods.vera import VeRA as VeRA

__version__ = "0.1.0"

_PLACES = {
    **dict.fromkeys(("adapt", "load_adapter", "merge", "save_adapter"), "api"),
    **dict.fromkeys(("Adapter", "FactorAdapter", "Method"), "adapters.contract"),
    **dict.fromkeys(("METHODS", "register"), "adapters.registry"),
    "UserError": "errors",
    "switch": "merging.switch",
    "AdaLoRA": "methods.adalora",
    "BitFit": "methods.bitfit",
    "DoRA": "methods.dora",
    "Full": "methods.full",
    "LoRA": "methods.lora",
    "MoRA": "methods.mora",
    "NOLA": "methods.nola",
    "OLoRA": "methods.olora",
    "PiSSA": "methods.pissa",
    "PriLoRA": "methods.prilora",
    "RaSA": "methods.rasa",
    "ShareLoRA": "methods.sharelora",
    "TiedLoRA": "methods.tied_lora",
    "VBLoRA": "methods.vblora",
    "VeRA": "methods.vera",
}
"""The public names, each with the module that defines it."""

__all__ = ["__version__", *_PLACES]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
