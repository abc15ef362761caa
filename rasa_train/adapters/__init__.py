"""Adapter methods by their name in a recipe. A new method is one file and one line here."""

from .adalora import AdaLoRA
from .base import Method as Method
from .bitfit import BitFit
from .dora import DoRA
from .full import Full
from .lora import LoRA
from .mora import MoRA
from .nola import NOLA
from .olora import OLoRA
from .peft import Peft
from .pissa import PiSSA
from .prilora import PriLoRA
from .rasa import RaSA
from .sharelora import ShareLoRA
from .tied_lora import TiedLoRA
from .vblora import VBLoRA
from .vera import VeRA

METHODS: dict[str, type[Method]] = {
    "lora": LoRA,
    "rasa": RaSA,
    "vera": VeRA,
    "mora": MoRA,
    "tied-lora": TiedLoRA,
    "sharelora": ShareLoRA,
    "nola": NOLA,
    "vb-lora": VBLoRA,
    "olora": OLoRA,
    "pissa": PiSSA,
    "dora": DoRA,
    "adalora": AdaLoRA,
    "prilora": PriLoRA,
    "full": Full,
    "bitfit": BitFit,
    "peft": Peft,
}
