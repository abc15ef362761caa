"""The layer that PEFT puts in the place of a linear: it holds the tensors of this package's adapters by PEFT's names.

PEFT and transformers find, freeze, cast, load and delete the tensors of an adapter in dictionaries of modules by the
adapter's name (``rasa_A.default.weight``), and they may replace a parameter by another object. So each tensor lives in
a ``Holder`` in such a dictionary, and the adapter, which does the arithmetic, reads it from there.
"""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..adapters.contract import Adapter
from ..methods.mora import RotatingAdapter, SharingAdapter
from ..methods.rasa import Pool, RaSAAdapter

BASE = "__base__"
"""PEFT's name for "no adapter" in ``adapter_names``."""


class Holder(nn.Module):
    """One trained tensor."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight


class _Linked(nn.Module):
    """An adapter whose parameters live in holders. ``link`` changes the class of an adapter to the linked one."""

    def __getattr__(self, name: str) -> Any:
        holders: dict[str, Holder] = self.__dict__.get("holders", {})
        return holders[name].weight if name in holders else super().__getattr__(name)


class LinkedRaSA(_Linked, RaSAAdapter):
    """RaSA's adapter, whose private tensors live in the layer."""


class LinkedRotating(_Linked, RotatingAdapter):
    """MoRA's adapter of type 6, whose M lives in the layer."""


class LinkedSharing(_Linked, SharingAdapter):
    """MoRA's adapter of the other types, whose M lives in the layer."""


class PoolView(Pool):
    """A pool as one layer sees it: on the device of the layer, because a model's layers may be on several devices."""

    def __init__(self, pool: Pool, own: Holder) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(pool=pool, own=own)  # not registered: the pool belongs to the first layer that shares it

    def __getattr__(self, name: str) -> Any:
        tensor: Tensor = getattr(self.__dict__["pool"], name)
        return tensor.to(self.__dict__["own"].weight.device)


LINKED: dict[type[nn.Module], type[_Linked]] = {
    RaSAAdapter: LinkedRaSA,
    RotatingAdapter: LinkedRotating,
    SharingAdapter: LinkedSharing,
}


def link(adapter: nn.Module) -> dict[str, Holder]:
    """Move the parameters of an adapter into holders, from which the adapter reads them. Returns the holders by the
    names of the parameters."""
    holders = {name: Holder(parameter) for name, parameter in adapter.named_parameters(recurse=False)}
    adapter._parameters.clear()
    adapter.__class__ = LINKED[type(adapter)]
    adapter.__dict__["holders"] = holders
    return holders


class AdaptedLayer(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """A linear of the base with one adapter of this package per adapter name of PEFT. A subclass names the tensors."""

    adapter_layer_names: tuple[str, ...]
    other_param_names: tuple[str, ...]
    names: ClassVar[dict[str, str]]
    """PEFT's names of the adapter's parameters."""
    updates: ClassVar[str]
    """Name of the dictionary of the adapters themselves."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        for name in (*self.adapter_layer_names, *self.other_param_names):
            setattr(self, name, nn.ModuleDict())
        base = self.base()
        is_conv = isinstance(base, Conv1D)
        self.in_features: int = base.nx if is_conv else base.in_features
        self.out_features: int = base.nf if is_conv else base.out_features
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter: list[str] = []

    def add(self, adapter_name: str, adapter: Adapter, pools: dict[str, nn.Module]) -> None:
        """Put an adapter into the layer. ``pools`` holds the pools that no layer holds yet, by name; the adapter's pool
        is taken out of it."""
        for name, holder in link(adapter).items():
            getattr(self, self.names[name])[adapter_name] = holder
        getattr(self, self.updates)[adapter_name] = adapter
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def tensors(self, adapter_name: str) -> nn.ModuleDict:
        """Return the modules that hold the adapter's tensors in this layer."""
        dictionaries = {name: getattr(self, name) for name in self.adapter_layer_names}
        return nn.ModuleDict({name: d[adapter_name] for name, d in dictionaries.items() if adapter_name in d})

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        """Return the output of the linear with the updates of the active adapters, or, for each row of the batch, with
        the update that ``adapter_names`` names."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        if adapter_names is not None and self.merged:
            raise ValueError("adapter_names cannot be used while adapters are merged: call unmerge_adapter() first")
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        if adapter_names is not None:
            return self._mixed(x, result, adapter_names)
        active: Any = self.active_adapters
        for name in active:
            if name in getattr(self, self.updates) and name not in self.merged_adapters:
                result = result + self._update(name, x).to(result.dtype)
        return result

    def _mixed(self, x: Tensor, result: Tensor, names: list[str]) -> Tensor:
        if len(names) != len(x):
            raise ValueError(f"adapter_names must name an adapter for each of the {len(x)} rows, got {len(names)}")
        result = result.clone()
        for name in set(names) & set(getattr(self, self.updates)):
            rows = torch.tensor([i for i, own in enumerate(names) if own == name], device=x.device)
            result = result.index_add(0, rows, self._update(name, x[rows]).to(result.dtype))
        return result

    def _update(self, name: str, x: Tensor) -> Tensor:
        adapter = self._adapter(name)
        update: Tensor = adapter(adapter.drop(x), self.base_weight())
        return update

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Set W to W + dW, computed in fp32 and rounded once. Raises ``ValueError`` if ``safe_merge`` is set and the
        result is not finite."""
        for name in check_adapters_to_merge(self, adapter_names):
            if name in getattr(self, self.updates):
                weight = self.base_weight()
                if not weight.is_floating_point():
                    raise ValueError(f"an adapter cannot be merged into a quantised weight ({weight.dtype})")
                merged = (weight.float() + self._delta(name)).to(weight.dtype)
                if safe_merge and not torch.isfinite(merged).all():
                    # Programs that use PEFT look for this wording.
                    raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
                weight.copy_(merged)
                self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Set W to W - dW for all merged adapters, computed as in ``merge``."""
        if not self.merged:
            warnings.warn("no adapter is merged, so there is nothing to unmerge", stacklevel=2)
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            if name in getattr(self, self.updates):
                self.base_weight().copy_(self.base_weight().float() - self._delta(name))

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return dW in fp32, in the layout of the base's weight."""
        delta = self._delta(adapter)
        return delta.t() if isinstance(self.base(), Conv1D) else delta

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move the adapter's tensors, which keep their dtype: ``_Tuner._cast_adapter_dtype`` decides about that."""
        modules = self.tensors(adapter_name)
        if not any(p.is_meta for p in modules.parameters()):
            modules.to(device or self.base_weight().device)
            self._adapter(adapter_name).to(device or self.base_weight().device)

    def base(self) -> Any:
        """Return the linear of the base, which may be inside a layer of another method."""
        return BaseTunerLayer.get_base_layer(self)

    def base_weight(self) -> Tensor:
        """Return W (out, in), a view of the base's weight."""
        weight: Tensor = self.base().weight
        return weight.t() if isinstance(self.base(), Conv1D) else weight

    def _adapter(self, name: str) -> Adapter:
        adapter = getattr(self, self.updates)[name]
        assert isinstance(adapter, Adapter)
        return adapter

    def _delta(self, name: str) -> Tensor:
        return self._adapter(name).delta(self.base_weight())


class RasaLayer(AdaptedLayer):
    """A linear with RaSA's private tensors. The first of the layers that share a pool holds the pool."""

    names: ClassVar[dict[str, str]] = {"A": "rasa_A", "B": "rasa_B", "d": "rasa_mixing"}
    adapter_layer_names = (*names.values(), "rasa_train_pools")
    updates = "rasa_updates"
    other_param_names = (updates,)
    rasa_mixing: nn.ModuleDict
    rasa_train_pools: nn.ModuleDict

    def add(self, adapter_name: str, adapter: Adapter, pools: dict[str, nn.Module]) -> None:
        assert isinstance(adapter, RaSAAdapter)
        pool = adapter.pool
        if own := {name: candidate for name, candidate in pools.items() if candidate is pool}:
            self.rasa_train_pools[adapter_name] = nn.ModuleDict(own)
            pools.pop(*own)
        super().add(adapter_name, adapter, pools)
        if pool is not None:
            mixing = self.rasa_mixing[adapter_name]
            assert isinstance(mixing, Holder)
            object.__setattr__(adapter, "pool", PoolView(pool, mixing))


class MoraLayer(AdaptedLayer):
    """A linear with MoRA's square matrix."""

    names: ClassVar[dict[str, str]] = {"M": "mora_M"}
    adapter_layer_names = tuple(names.values())
    updates = "mora_updates"
    other_param_names = (updates,)
