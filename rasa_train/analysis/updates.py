"""Read weight updates from two models or an adapter, or draw random ones. One kind is in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..adapters.contract import Adapter, FactorAdapter
from ..adapters.saved import read_adapter
from ..adapters.site import Site, by_kind
from ..adapters.sites import find_sites
from ..errors import UserError
from ..merging.options import Base
from ..merging.parameters import Weights, check_finetuned
from ..merging.source import check_identity, find_adapter, find_base, load
from ..methods.rasa import RaSAAdapter
from ..models.config import ModelConfig
from .spectrum import Energy, Update, energy


@dataclass(frozen=True)
class KindUpdates:
    """The updates of the layers of one kind."""

    kind: str
    names: list[str]
    """Path of each layer's linear, with ``[e]`` appended for expert e of a fused one."""
    stack: Tensor | tuple[Tensor, Tensor]
    """dW (L, out, in), or factors B (L, out, q), A (L, q, in) with dW = B A; fp32."""
    private: int | None = None
    """Number of the factors' ranks that are the layer's own, which come first; None where nothing is shared."""
    weight: Callable[[int], Tensor] | None = None
    """Reads W (out, in) of a layer, fp32; None without a base."""

    def layer(self, i: int) -> Update:
        """Return the update of layer i."""
        return self.stack[i] if isinstance(self.stack, Tensor) else (self.stack[0][i], self.stack[1][i])

    def energy(self, i: int) -> Energy | None:
        """Return the private and shared energy of a layer; None where nothing is shared or the update is zero."""
        if self.private is None or isinstance(self.stack, Tensor):
            return None
        return energy(self.stack[0][i], self.stack[1][i], self.private)

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (out, in) of an update."""
        B, A = (self.stack, self.stack) if isinstance(self.stack, Tensor) else self.stack
        return B.shape[1], A.shape[2]


Updates = dict[str, Callable[[], KindUpdates]]
"""Functions by kind, each of which reads the updates of its kind."""


def of_models(base: str, tuned: str) -> Updates:
    """Return the updates of every linear in the layers: fine-tuned minus base weights.

    Raises:
        UserError: a directory is not a model, or the two models differ in their shapes.
    """
    before, after = Weights(_model_directory(base)), Weights(_model_directory(tuned))
    sites = find_sites(before.model)
    check_finetuned(before, after, sites)
    return _dense(sites, lambda site: after.weight(site) - before.weight(site), before.weight)


def of_adapter(path: Path, base: str | Base | None = None) -> Updates:
    """Return the updates of an adapter or run directory, as factors where the method has them. The base's weights are
    read only for methods that need them, and for full fine-tuning, whose adapter consists of the new weights.

    Raises:
        UserError: there is no adapter, the adapter does not fit its base, or the base is not the one that it was
            trained on.
    """
    saved, base = read_adapter(find_adapter(path)), Base.of(base)
    name, directory = find_base(saved, base.name, base.revision, weights=False)
    if not base.any_base:
        check_identity(saved, directory)
    source = load(saved, name, directory)
    opened: list[Weights] = []

    def weight(site: Site) -> Tensor:
        if not opened:
            opened.append(Weights(find_base(saved, base.name, base.revision, weights=True)[1]))
        return opened[0].weight(site)

    replaced = [site for site in find_sites(source.model) if site.weight in source.replaced]
    trained = _dense(replaced, lambda site: site.view(source.replaced[site.weight]).float() - weight(site), weight)
    factored = [site for site in source.sites if isinstance(source.adapters[site.path], FactorAdapter)]
    found = {
        _kind(key): _factor_reader(group[0].kind, group, source.adapters, weight)
        for key, group in by_kind(factored).items()
    }
    others = [site for site in source.sites if site not in factored]
    return trained | found | _dense(others, lambda site: _delta(source.adapters[site.path], site, weight), weight)


def random_updates(L: int, b: int, a: int, q: int | None, seed: int = 0) -> Updates:
    """Return normally distributed updates of L layers (b x a), with entries of variance 1: of rank q as factors, or
    dense if q is None."""

    def read() -> KindUpdates:
        generator = torch.Generator().manual_seed(seed)
        names = [f"random.{i}" for i in range(L)]
        if q is None:
            return KindUpdates("random", names, torch.randn(L, b, a, generator=generator))
        B = torch.randn(L, b, q, generator=generator) / q**0.5
        return KindUpdates("random", names, (B, torch.randn(L, q, a, generator=generator)))

    return {"random": read}


def chosen(updates: Updates, kinds: Sequence[str]) -> Updates:
    """Return the updates of the given kinds, named in full or by the last part; those of all kinds without names.

    Raises:
        UserError: a name fits no kind.
    """
    for name in kinds:
        if not any(_is_called(kind, name) for kind in updates):
            raise UserError(f"--kind {name}: there is no such kind; the kinds are {', '.join(updates)}")
    return {k: read for k, read in updates.items() if not kinds or any(_is_called(k, name) for name in kinds)}


def _is_called(kind: str, name: str) -> bool:
    return name in (kind, kind.rpartition(".")[2])


def _dense(sites: Iterable[Site], delta: Callable[[Site], Tensor], weight: Callable[[Site], Tensor]) -> Updates:
    def read(group: list[Site]) -> KindUpdates:
        with torch.no_grad():
            stack = torch.stack([delta(site) for site in group])
        return KindUpdates(
            group[0].kind, _names(group), stack.reshape(-1, *group[0].shape), weight=_weight_of(group, weight)
        )

    return {_kind(key): lambda group=group: read(group) for key, group in by_kind(sites).items()}  # type: ignore[misc]


def _factor_reader(
    kind: str, group: list[Site], adapters: dict[str, Adapter], weight: Callable[[Site], Tensor]
) -> Callable[[], KindUpdates]:
    def read() -> KindUpdates:
        Bs, As = [], []
        with torch.no_grad():
            for site in group:
                adapter = adapters[site.path]
                assert isinstance(adapter, FactorAdapter)
                factors = adapter.factors()
                Bs.append(factors.Bd.float())
                As.append(factors.A.float())
            B, A = torch.stack(Bs), torch.stack(As)
        first = adapters[group[0].path]
        private = None
        if isinstance(first, RaSAAdapter) and first.pool is not None:
            private = B.shape[-1] - first.pool.B_S.shape[-1]
        stack = (B.reshape(-1, *B.shape[-2:]), A.reshape(-1, *A.shape[-2:]))
        return KindUpdates(kind, _names(group), stack, private, _weight_of(group, weight))

    return read


def _delta(adapter: Adapter, site: Site, weight: Callable[[Site], Tensor]) -> Tensor:
    return adapter.delta(weight(site) if adapter.needs_weight else None)


def _names(group: list[Site]) -> list[str]:
    experts = group[0].num_experts
    return [s.path if experts is None else f"{s.path}[{e}]" for s in group for e in range(experts or 1)]


def _weight_of(group: list[Site], weight: Callable[[Site], Tensor]) -> Callable[[int], Tensor]:
    experts = group[0].num_experts
    return lambda i: weight(group[i]) if experts is None else weight(group[i // experts])[i % experts]


def _kind(key: str) -> str:
    """Return a key of ``by_kind`` with dots, as users write kinds."""
    return key.replace("__", ".")


def _model_directory(name: str) -> Path:
    path = Path(ModelConfig(name=name).name)
    if not (path / "config.json").is_file():
        raise UserError(f"{name} is not a model: give a directory with config.json and safetensors files")
    return path
