"""RaSA and MoRA as methods of the PEFT library: ``import rasa_train.peft``, then use PEFT as usual.

    import rasa_train.peft
    model = get_peft_model(base, rasa_train.peft.RasaConfig(r=8, rasa_alpha=8))
    model.save_pretrained("adapter")
    model = PeftModel.from_pretrained(base, "adapter")

The updates are computed by this package's own adapters (``rasa_train.adapters``); this module only gives them PEFT's
names and life cycle. Saved files have the format of the reference implementation, which ``rasa-merge`` and
``adapter.init_from`` read.

Programs that import PEFT themselves are started through ``rasa_train.peft``, which registers the methods and then runs
the program:

    python -m rasa_train.peft lm_eval --model hf --model_args pretrained=BASE,peft=ADAPTER --tasks ...
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..adapters.contract import Adapter, Built, Method
from ..adapters.site import Site
from ..adapters.sites import find_sites
from ..methods.mora import MoRA
from ..methods.rasa import RaSA


@dataclass
class _Config(PeftConfig):  # type: ignore[misc]
    """Fields that the configurations of both methods share, under PEFT's names."""

    r: int = field(default=8, metadata={"help": "Ranks per layer: the parameter budget of LoRA with the same r."})
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Linears to adapt. Default: all linears of the decoder layers except routers."}
    )
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    bias: str = "none"
    fan_in_fan_out: bool = field(default=False, metadata={"help": "Not used: Conv1D is recognised by its class."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("target_modules", "exclude_modules"):
            if isinstance(names := getattr(self, name), list):
                setattr(self, name, set(names))
        if self.bias != "none":
            raise ValueError(f"bias must be 'none', got {self.bias!r}")


@dataclass
class RasaConfig(_Config):
    """Configuration of RaSA: of r ranks a layer, ``rasa_k`` go to a pool that all layers of a kind share."""

    rasa_k: int | None = field(default=None, metadata={"help": "Shared ranks per layer. Default: max(r // 8, 1)."})
    rasa_alpha: float = field(default=32.0, metadata={"help": "Scale, applied through the initial mixing weights."})
    rasa_dropout: float = field(default=0.0, metadata={"help": "Dropout on the adapter's input."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type: Any = "RASA"
        if self.rasa_k is None:
            self.rasa_k = RaSA(r=self.r).k


@dataclass
class MoraConfig(_Config):
    """Configuration of MoRA: one square matrix per layer between fixed maps."""

    mora_type: int = field(default=6, metadata={"help": "The fixed maps: 1, 2, 3, 4 or 6."})
    mora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the adapter's input."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type: Any = "MORA"


class AdaptedLayer(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """A linear of the base with one adapter of this package per adapter name of PEFT."""

    adapter_layer_names = ("rasa_train_adapters",)
    other_param_names = ()

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.rasa_train_adapters = nn.ModuleDict()
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter: list[str] = []

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        active: Any = self.active_adapters
        for name in active:
            if name in self.rasa_train_adapters:
                adapter = self.rasa_train_adapters[name]
                assert isinstance(adapter, Adapter)
                result = result + adapter(adapter.drop(x), self._weight()).to(result.dtype)
        return result

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Set W to W + dW, computed in fp32 and rounded once. Raises ``ValueError`` if ``safe_merge`` is set and the
        result is not finite."""
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self.rasa_train_adapters:
                merged = (self._weight().float() + self._delta(name)).to(self._weight().dtype)
                if safe_merge and not torch.isfinite(merged).all():
                    raise ValueError(f"the weights merged with adapter {name} have values that are not finite")
                self._weight().copy_(merged)
                self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            self._weight().copy_(self._weight().float() - self._delta(name))

    def _weight(self) -> Tensor:
        """Return W (out, in), a view of the base's weight."""
        base: nn.Module = BaseTunerLayer.get_base_layer(self)
        weight = base.get_parameter("weight")
        return weight.t() if isinstance(base, Conv1D) else weight

    def _delta(self, name: str) -> Tensor:
        adapter = self.rasa_train_adapters[name]
        assert isinstance(adapter, Adapter)
        return adapter.delta(self._weight())


class _Tuner(BaseTuner):  # type: ignore[misc]
    """Builds the adapters of all layers at once, because layers share pools; the tuner itself holds each pool, once."""

    tuner_layer_cls = AdaptedLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}
    method: ClassVar[type[Method]]

    def _prepare_adapter_config(self, peft_config: Any, model_config: Any) -> Any:
        if peft_config.target_modules in (None, "all-linear"):
            peft_config.target_modules = {site.path.rpartition(".")[2] for site in self._sites()}
        return peft_config

    def _create_and_replace(
        self, peft_config: Any, adapter_name: str, target: Any, target_name: str, parent: Any, current_key: str
    ) -> None:
        built = self._built(peft_config, adapter_name)
        if current_key not in built.adapters:
            raise ValueError(
                f"{current_key} is not a linear of a decoder layer and cannot be adapted: remove it from target_modules"
            )
        layer = target if isinstance(target, AdaptedLayer) else AdaptedLayer(target)
        layer.rasa_train_adapters[adapter_name] = built.adapters[current_key]
        BaseTunerLayer.set_adapter(layer, self.active_adapters)
        if adapter_name not in self.active_adapters:
            layer.rasa_train_adapters[adapter_name].requires_grad_(False)
        layer.rasa_train_adapters[adapter_name].to(target.weight.device)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def _built(self, config: Any, adapter_name: str) -> Built:
        if adapter_name in self.__dict__.setdefault("_builts", {}):
            return self.__dict__["_builts"][adapter_name]  # type: ignore[no-any-return]
        fields = self.method.from_peft(config.to_dict())
        assert fields is not None
        sites = [site for site in self._sites() if self._check_target_module_exists(config, site.path)]
        built = self.method.model_validate(fields).build(sites)
        if "rasa_train_pools" not in self._modules:
            self.rasa_train_pools = nn.ModuleDict()
        pools = nn.ModuleDict(built.pools).to(next(self.model.parameters()).device)
        self.rasa_train_pools[adapter_name] = pools.requires_grad_(adapter_name in self.active_adapters)
        self.__dict__["_builts"][adapter_name] = built
        return built

    def _sites(self) -> list[Site]:
        """Return the linears of the decoder layers by their names in the base, whether they have adapters yet or
        not."""
        sites = [site for site in find_sites(self.model) if site.num_experts is None]
        return [
            replace(s, path=s.path.removesuffix(".base_layer"), kind=s.kind.removesuffix(".base_layer")) for s in sites
        ]

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_name, inference_mode)
        active = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        for name, pools in self.rasa_train_pools.items():
            pools.requires_grad_(name in active and not inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        del self.rasa_train_pools[adapter_name], self.__dict__["_builts"][adapter_name]


class RasaModel(_Tuner):
    prefix = "rasa_"
    method = RaSA

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """Return the key in a saved file: the reference implementation's key, which ``RaSA.rename_peft`` reads."""
        name = re.escape(adapter_name)
        if match := re.fullmatch(rf"(.+)\.rasa_train_adapters\.{name}\.([ABd])", key):
            return f"{match[1]}.rasa_{'mixing' if match[2] == 'd' else match[2]}.weight"
        if match := re.fullmatch(rf"(.*)rasa_train_pools\.{name}\.(.+)\.([AB])_S", key):
            return f"{match[1]}rasa_shared_{match[3]}.{match[2]}.weight"
        return str(super()._remove_adapter_name_from_key(key, adapter_name))


class MoraModel(_Tuner):
    prefix = "mora_"
    method = MoRA

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        if match := re.fullmatch(rf"(.+)\.rasa_train_adapters\.{re.escape(adapter_name)}\.M", key):
            return f"{match[1]}.mora_M.weight"
        return str(super()._remove_adapter_name_from_key(key, adapter_name))


def _register() -> None:
    if not hasattr(BaseTuner, "_remove_adapter_name_from_key"):
        # Older versions train and save only the tensors of PEFT's own methods, whatever is registered.
        raise ImportError("rasa_train.peft needs PEFT 0.21 or newer: pip install 'peft>=0.21'")
    # PEFT's own ``register_peft_method`` accepts only names in PEFT's enumeration; its members equal their names.
    for name, config, model in (("RASA", RasaConfig, RasaModel), ("MORA", MoraConfig, MoraModel)):
        PEFT_TYPE_TO_CONFIG_MAPPING[name] = config
        PEFT_TYPE_TO_TUNER_MAPPING[name] = model
        PEFT_TYPE_TO_PREFIX_MAPPING[name] = model.prefix


_register()
