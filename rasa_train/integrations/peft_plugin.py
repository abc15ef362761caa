"""RaSA and MoRA as methods of the PEFT library: ``import rasa_train.peft``, then use PEFT as usual.

    import rasa_train.peft
    model = get_peft_model(base, rasa_train.peft.RasaConfig(r=8, rasa_alpha=8))
    model.save_pretrained("adapter")
    model = PeftModel.from_pretrained(base, "adapter")

The updates are computed by this package's own adapters (``rasa_train.adapters``); this module only gives them PEFT's
names and life cycle. ``rasa-merge`` and ``adapter.init_from`` read the saved files; files of the reference
implementation are loaded too.

Programs that import PEFT themselves are started through ``rasa_train.peft``, which registers the methods and then runs
the program:

    python -m rasa_train.peft lm_eval --model hf --model_args pretrained=BASE,peft=ADAPTER --tasks ...
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..adapters.contract import Built, Method
from ..adapters.site import Site
from ..adapters.sites import find_sites, linear_site
from ..errors import UserError
from ..methods.mora import MoRA
from ..methods.rasa import RaSA
from .peft_layer import BASE, AdaptedLayer, MoraLayer, RasaLayer


class Type(enum.StrEnum):
    """The names of the methods: members of an enumeration, as PEFT and transformers expect, which PEFT's own one cannot
    get."""

    RASA = "RASA"
    MORA = "MORA"


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
    bias: str = field(
        default="none",
        metadata={"help": "Biases of the base that are trained too: none, all, or those of adapted linears."},
    )
    init_weights: bool = field(
        default=True, metadata={"help": "Whether the update starts at nothing; at random values otherwise, for tests."}
    )
    fan_in_fan_out: bool = field(default=False, metadata={"help": "Not used: Conv1D is recognised by its class."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("target_modules", "exclude_modules"):
            if isinstance(names := getattr(self, name), list):
                setattr(self, name, set(names))
        if self.bias not in (allowed := ("none", "all", f"{self.peft_type.value.lower()}_only")):
            raise ValueError(f"bias must be one of {', '.join(allowed)}, got {self.bias!r}")


@dataclass
class RasaConfig(_Config):
    """Configuration of RaSA: of r ranks a layer, ``rasa_k`` go to a pool that all layers of a kind share."""

    rasa_k: int | None = field(default=None, metadata={"help": "Shared ranks per layer. Default: max(r // 8, 1)."})
    rasa_alpha: float = field(default=32.0, metadata={"help": "Scale, applied through the initial mixing weights."})
    rasa_dropout: float = field(default=0.0, metadata={"help": "Dropout on the adapter's input."})

    def __post_init__(self) -> None:
        self.peft_type: Any = Type.RASA
        super().__post_init__()
        if self.rasa_k is None:
            self.rasa_k = RaSA(r=self.r).k


@dataclass
class MoraConfig(_Config):
    """Configuration of MoRA: one square matrix per layer between fixed maps."""

    mora_type: int = field(default=6, metadata={"help": "The fixed maps: 1, 2, 3, 4 or 6."})
    mora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the adapter's input."})

    def __post_init__(self) -> None:
        self.peft_type: Any = Type.MORA
        super().__post_init__()


class _Tuner(BaseTuner):  # type: ignore[misc]
    """Builds the adapters of all layers at once, because layers share pools."""

    tuner_layer_cls: type[AdaptedLayer]
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}
    method: ClassVar[type[Method]]

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Put the adapter into the model, on the modules that ``state_dict`` names if it is given."""
        self._built: Built | None = None
        self._named = None if state_dict is None else {key.rsplit(f".{self.prefix}", 1)[0] for key in state_dict}
        try:
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        finally:
            self._built = None

    def _prepare_adapter_config(self, peft_config: Any, model_config: Any) -> Any:
        if peft_config.target_modules in (None, "all-linear") and self._sites():
            sites = [site for site in find_sites(self.model) if site.num_experts is None]
            peft_config.target_modules = {_plain(site).path.rpartition(".")[2] for site in sites}
        elif peft_config.target_modules is None:
            raise ValueError("Please specify `target_modules` in `peft_config`: the model has no repeated layers")
        return peft_config

    def _create_and_replace(
        self, peft_config: Any, adapter_name: str, target: Any, target_name: str, parent: Any, current_key: str
    ) -> None:
        if self._built is None:
            self._built = self._build(peft_config)
        if current_key not in self._built.adapters:
            raise ValueError(f"Target module {target} is not supported: {current_key} is not a linear")
        layer = target if isinstance(target, self.tuner_layer_cls) else self.tuner_layer_cls(target)
        layer.add(adapter_name, self._built.adapters[current_key], self._built.pools)
        BaseTunerLayer.set_adapter(layer, self.active_adapters)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def _build(self, config: Any) -> Built:
        fields = self.method.from_peft(config.to_dict())
        assert fields is not None
        names = self._named
        sites = [
            site
            for site in [*self._sites(), *self._other_sites()]
            if (self._check_target_module_exists(config, site.path) if names is None else site.path in names)
        ]
        built = self.method.model_validate(fields).build(sites)
        if not config.init_weights:
            modules = [*built.adapters.values(), *built.pools.values()]
            for tensor in [p for module in modules for p in module.parameters() if not p.is_meta and not p.any()]:
                nn.init.kaiming_uniform_(tensor, a=5**0.5)
        return built

    def _sites(self) -> list[Site]:
        """Return the linears of the repeated layers by their names in the base, whether they have adapters yet or
        not."""
        try:
            return [_plain(site) for site in find_sites(self.model, ".*") if site.num_experts is None]
        except UserError:  # the model has no such layers
            return []

    def _other_sites(self) -> list[Site]:
        """Return the linears outside the repeated layers. Each is the only one of its kind."""
        known = {site.path for site in self._sites()}
        linears = [(path, m) for path, m in self.model.named_modules() if isinstance(m, nn.Linear | Conv1D)]
        others = [_plain(linear_site(path, path, 0, module)) for path, module in linears]
        return [site for site in others if site.path not in known]

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Hold the adapter's tensors in fp32, or in the dtype of the base."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if not autocast_adapter_dtype:
            for layer in self.model.modules():
                if isinstance(layer, AdaptedLayer) and (dtype := layer.base_weight().dtype).is_floating_point:
                    layer.tensors(adapter_name).to(dtype)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Give the ``adapter_names`` of a forward pass, one for each row of the batch, to all layers."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("adapter_names cannot be used in training mode: call eval() first")
        layers = [module for module in self.model.modules() if isinstance(module, AdaptedLayer)]
        if unknown := set(names) - {BASE} - {name for layer in layers for name in getattr(layer, layer.updates)}:
            raise ValueError(f"adapter_names must name adapters of the model, got {', '.join(sorted(unknown))}")
        beams = kwargs.get("num_beams")
        rows = [name for name in names for _ in range(beams if isinstance(beams, int) else 1)]

        def give(layer: nn.Module, args: Any, kwargs: Any) -> Any:
            return args, {**kwargs, "adapter_names": rows}

        handles = [layer.register_forward_pre_hook(give, with_kwargs=True) for layer in layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _plain(site: Site) -> Site:
    """Return the site by its names in a base without adapters."""
    return replace(site, path=site.path.removesuffix(".base_layer"), kind=site.kind.removesuffix(".base_layer"))


class RasaModel(_Tuner):
    prefix = "rasa_"
    tuner_layer_cls = RasaLayer
    method = RaSA

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """Return the key in a saved file. A pool's key keeps the pool's name, which readers outside PEFT need."""
        if match := re.fullmatch(rf"(.+\.rasa_train_pools)\.{re.escape(adapter_name)}\.([^.]+\.[AB]_S)", key):
            return f"{match[1]}.{match[2]}"
        return str(super()._remove_adapter_name_from_key(key, adapter_name))

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return the tensors by their names in the model. In files of the reference implementation, pools belong to the
        root of the model."""
        tensors = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        pools = {}
        for key in model.state_dict():
            if match := re.fullmatch(rf".+\.rasa_train_pools\.{re.escape(adapter_name)}\.([^.]+)\.([AB])_S", key):
                pools[f"base_model.rasa_shared_{match[2]}.{match[1]}.weight"] = key
        return {pools.get(key, key): tensor for key, tensor in tensors.items()}


class MoraModel(_Tuner):
    prefix = "mora_"
    tuner_layer_cls = MoraLayer
    method = MoRA


def _register() -> None:
    if not hasattr(BaseTuner, "_remove_adapter_name_from_key"):
        # Older versions train and save only the tensors of PEFT's own methods, whatever is registered.
        raise ImportError("rasa_train.peft needs PEFT 0.21 or newer: pip install 'peft>=0.21'")
    # PEFT's own ``register_peft_method`` accepts only names in PEFT's enumeration; its members equal their names.
    for name, config, model in ((Type.RASA, RasaConfig, RasaModel), (Type.MORA, MoraConfig, MoraModel)):
        PEFT_TYPE_TO_CONFIG_MAPPING[name] = config
        PEFT_TYPE_TO_TUNER_MAPPING[name] = model
        PEFT_TYPE_TO_PREFIX_MAPPING[name] = model.prefix


_register()
