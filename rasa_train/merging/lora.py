"""Export any factor method exactly, as a plain LoRA adapter in PEFT's format.

    dW = B diag(d) A   ->   lora_B = B diag(d),  lora_A = A,  lora_alpha = r, so that the scale is 1

d stays on one side because its entries can be negative. PEFT and vLLM load the result without knowing the method. With
a maximum rank the product is truncated by its singular values, which gives the best approximation of that rank.

Fused expert weights are parameters, not modules: PEFT (0.19) adapts them as ``target_parameters``, with one rank for
all experts. The gate and up projections are one such parameter, so their ranks stand side by side. In a model that has
such weights, PEFT takes linears with the names of experts' linears (those of dense layers and of shared experts) for
experts of an older layout, unless their weights are named as parameters too.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn

from ..adapters.contract import FactorAdapter, PeftConfig
from ..adapters.experts import is_fused
from ..adapters.fused_parts import is_part, linear_of
from ..adapters.saved import CONFIG, PEFT_TENSORS
from ..adapters.site import Site
from ..errors import UserError
from ..io.atomic_dir import new_directory
from ..io.checkpoint_files import tensor_bytes, write_tensors
from ..io.checksums import write_checksums
from ..lowrank.product_svd import product_svd
from ..models.families import EXPERT_LINEARS
from ..models.words import rows_after
from . import peft_load
from .head import for_peft, others_replaced
from .options import WRITING, Base, Progress, Writing
from .source import Adapters, Source, find_tokenizer, open_source

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM accepts for ``--max-lora-rank``."""


@dataclass(frozen=True)
class Target:
    """A linear, of which parts may be adapted, or a fused expert weight: PEFT adapts it with one pair of factors."""

    name: str
    """Path of the module, or name of the parameter: PEFT matches its patterns and targets against this name."""
    prefix: str
    """Prefix of the target's tensors in the file."""
    sites: list[Site]
    """The site of the linear, or the adapted sites that are rows of it or of the fused weight."""

    @property
    def fused(self) -> bool:
        return self.sites[0].num_experts is not None

    @property
    def is_parameter(self) -> bool:
        return self.name == self.sites[0].weight


@dataclass(frozen=True)
class ExportReport:
    """Result of an export."""

    output: str
    format: str
    method: str
    base_model: str
    tensors: int
    adapted: int
    bytes: int
    seconds: float
    rounding: float
    """Always 0, because nothing is rounded."""
    base_checked: bool
    """Whether the base is known to be the one that the adapter was trained on."""
    rank: int
    """Largest rank of a site."""
    error: float
    """norm(written - dW) / norm(dW) over all sites: the error from ``max_rank``; 0 without ``max_rank``."""
    max_lora_rank: int | None
    """Value for vLLM's ``--max-lora-rank``, or None when vLLM does not accept a rank this large."""
    fused_experts: bool = False
    """Whether fused expert weights are adapted, which not every program that reads LoRA supports."""
    peft_loads: bool | None = None
    """Whether PEFT was seen to load what was written, tensor by tensor; None where PEFT is not installed."""
    vocabulary: int | None = None
    """Number of rows that the base must have before PEFT loads the adapter; None for one without new words."""


def export_lora(
    adapter: Adapters,
    output: str | Path,
    *,
    base: str | Base | None = None,
    max_rank: int | None = None,
    writing: Writing = WRITING,
) -> ExportReport:
    """Write the adapter as a LoRA adapter directory. Only the base's configuration is read, not its weights.

    Args:
        adapter: an adapter or run directory; or several as (directory, weight), whose weighted updates are summed.
        base: the base, or its name. Default: the base that the adapter names.
        max_rank: rank to which larger ranks are truncated.
        writing: how the directory is written; progress is in bytes.
    Raises:
        UserError: the method is not a factor method, the adapter does not fit, or ``output`` cannot be written.
    """
    start = time.perf_counter()
    source = open_source(adapter, base, weights=False)
    _check(source)
    targets = _targets(source)
    ranks = {target.name: _rank(source, target, max_rank) for target in targets}
    head, of_head = for_peft(source)
    nbytes = 4 * sum(math.prod(shape) for target in targets for shape in _shapes(source, target, ranks[target.name]))
    nbytes += sum(tensor.nbytes for tensor in head.values())
    inputs = [*source.origins, *([source.directory] if Path(source.base).is_dir() else [])]
    with new_directory(Path(output), overwrite=writing.overwrite, inputs=inputs, nbytes=nbytes) as partial:
        written, error = _write_factors(source, targets, ranks, partial / PEFT_TENSORS, writing.progress)
        config = {**_peft_config(source, targets, ranks), **of_head}
        (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        for path in find_tokenizer(source):
            shutil.copyfile(path, partial / path.name)
        write_checksums(partial, [partial / CONFIG, partial / PEFT_TENSORS])
        tried = peft_load.is_installed()
        if tried and (why := peft_load.refusal(partial, source)):
            raise UserError(
                f"PEFT does not load this adapter as a LoRA of {type(source.model).__name__}: {why}. Nothing is "
                "written: use --format merged, or leave those linears out with adapter.exclude when you train"
            )
    rank = max(ranks.values())
    return ExportReport(
        output=str(output),
        format="lora",
        method=source.label,
        base_model=source.base,
        tensors=2 * len(targets) + len(head),
        adapted=len(source.sites),
        bytes=written,
        seconds=round(time.perf_counter() - start, 3),
        rounding=0.0,
        base_checked=source.checked,
        rank=rank,
        error=error,
        max_lora_rank=next((allowed for allowed in VLLM_RANKS if allowed >= rank), None),
        fused_experts=any(target.fused for target in targets),
        peft_loads=tried or None,
        vocabulary=rows_after(source.model),
    )


@torch.no_grad()
def lora_factors(adapter: FactorAdapter) -> tuple[Tensor, Tensor]:
    """Return (A (*lead, R, in), diag(b) B diag(d) (*lead, out, R)), fp32, without the ranks whose d is zero (AdaLoRA
    prunes a rank by setting its d to zero)."""
    factors = adapter.factors()
    kept = _nonzero(factors.d)
    return factors.A.float()[..., kept, :], factors.Bd.float()[..., kept]


@torch.no_grad()
def truncated(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor, float, float]:
    """Return the best approximation of B A of the given rank, by QR of the factors: dW itself is never computed.

    Args:
        A, B: (*lead, R, in) and (*lead, out, R); each entry of ``lead`` is truncated on its own.
        rank: at most R, in and out.
    Returns:
        A' (*lead, rank, in), B' (*lead, out, rank) in fp32, norm(B A - B' A')^2 and norm(B A)^2.
    """
    U, s, V = product_svd(B, A)
    root, lost = s[..., :rank].sqrt(), float((s[..., rank:] ** 2).sum())
    A = root.unsqueeze(-1) * V[..., :rank].mT
    B = U[..., :rank] * root.unsqueeze(-2)
    return A.float(), B.float(), lost, float((s**2).sum())


def _targets(source: Source) -> list[Target]:
    """Return the linears in the order of their sites, then the fused weights."""
    fused: dict[str, list[Site]] = {}
    linears: dict[str, list[Site]] = {}
    targets = []
    as_parameters = EXPERT_LINEARS if any(is_fused(module) for module in source.model.modules()) else frozenset()
    for site in source.sites:
        (linears if site.num_experts is None else fused).setdefault(site.weight, []).append(site)
    for weight, sites in linears.items():
        path = linear_of(sites[0])
        name = weight if path.rpartition(".")[2] in as_parameters else path
        targets.append(Target(name, f"base_model.model.{path}", sites))
    for name, sites in fused.items():
        module, _, _ = name.rpartition(".")
        own = [f"{module}.{key}" for key, _ in source.model.get_submodule(module).named_parameters(recurse=False)]
        # PEFT wraps the module once for each parameter, in their order: the last one is outermost.
        around = [key for key in own[own.index(name) + 1 :] if key in fused]
        targets.append(Target(name, f"base_model.model.{module}" + ".base_layer" * len(around), sites))
    return targets


def _rank(source: Source, target: Target, max_rank: int | None) -> int:
    rank = sum(len(_kept(source, site)) for site in target.sites)
    if max_rank is None or rank <= max_rank:
        return rank
    return min(max_rank, target.sites[0].in_features, _rows(source, target))


def _rows(source: Source, target: Target) -> int:
    """Return the number of output rows of the linear, or of the whole fused weight."""
    weight = source.model.get_parameter(target.sites[0].weight)
    return int(weight.shape[-1 if target.sites[0].transposed else -2])


def _shapes(source: Source, target: Target, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the shapes of A and B in the file."""
    ranks = rank * (target.sites[0].num_experts or 1)
    return (ranks, target.sites[0].in_features), (_rows(source, target), ranks)


def _factors(source: Source, target: Target) -> tuple[Tensor, Tensor]:
    """Return A and B as ``lora_factors`` does. The linears of one fused weight, and the parts of a linear, each have
    ranks of their own, which stand side by side."""
    pairs = [lora_factors(_factor_adapter(source, site)) for site in target.sites]
    A = torch.cat([A for A, _ in pairs], -2)
    B = A.new_zeros(*target.sites[0].lead, _rows(source, target), A.shape[-2])
    start = 0
    for site, (_, own) in zip(target.sites, pairs, strict=True):
        place = replace(site, transposed=False).place(B[..., start : start + own.shape[-1]])
        place.copy_(own.reshape(place.shape))
        start += own.shape[-1]
    return A, B


def _as_stored(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Return PEFT's two matrices: the rows of A are ordered by expert, the columns of B by rank."""
    if A.ndim == 2:
        return A, B
    return A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)


def _write_factors(
    source: Source,
    targets: list[Target],
    ranks: dict[str, int],
    path: Path,
    progress: Progress | None,
) -> tuple[int, float]:
    """Write the factors of all targets. Returns the size of the file, and the relative error of the truncation."""
    entries: list[tuple[str, str, tuple[int, ...], int]] = []
    sides = {}
    for target in targets:
        for side, shape in zip("AB", _shapes(source, target, ranks[target.name]), strict=True):
            name = f"{target.prefix}.lora_{side}.weight"
            entries.append((name, "F32", shape, 4 * math.prod(shape)))
            sides[name] = target, side
    head, _ = for_peft(source)
    entries += [(name, "F32", tuple(tensor.shape), tensor.nbytes) for name, tensor in head.items()]
    total, done = sum(entry[-1] for entry in entries), 0
    lost2 = norm2 = 0.0
    now: tuple[str, Tensor, Tensor] | None = None

    def write(name: str, out: BinaryIO) -> None:
        nonlocal done, lost2, norm2, now
        if name in head:
            done += out.write(tensor_bytes(head[name]))
            return
        target, side = sides[name]
        if now is None or now[0] != target.name:
            A, B = _factors(source, target)
            if ranks[target.name] < A.shape[-2]:
                A, B, lost, of = truncated(A, B, ranks[target.name])
                lost2 += lost
            else:
                of = float(((A @ A.mT) * (B.mT @ B)).sum())
            norm2 += of
            now = target.name, *_as_stored(A, B)
        done += out.write(tensor_bytes(now[1] if side == "A" else now[2]))
        if progress is not None:
            progress(done, total)

    return write_tensors(path, entries, write), math.sqrt(lost2 / norm2) if norm2 else 0.0


def _peft_config(source: Source, targets: list[Target], ranks: dict[str, int]) -> PeftConfig:
    r = max(ranks.values())
    # alpha = rank everywhere: the scale is 1 for programs that read the patterns and for those that do not.
    pattern = {name: rank for name, rank in ranks.items() if rank != r}
    config: PeftConfig = {
        "peft_type": "LORA",
        "base_model_name_or_path": source.base,
        "r": r,
        "lora_alpha": r,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "fan_in_fan_out": any(site.transposed for site in source.sites),
        "target_modules": target_modules(source.model, [t.sites[0] for t in targets if not t.is_parameter]),
    }
    if parameters := [target for target in targets if target.is_parameter]:
        owners = [t.sites[0].kind.rpartition(".")[0] if t.fused else t.sites[0].kind for t in parameters]
        kinds = {f"{kind}.{t.name.rpartition('.')[2]}" for kind, t in zip(owners, parameters, strict=True)}
        names = [name for name, _ in source.model.named_parameters()]
        config["target_parameters"] = _shortest([kinds], {t.name for t in parameters}, names)
    if pattern:
        config |= {"rank_pattern": pattern, "alpha_pattern": pattern}
    return config


def target_modules(model: nn.Module, sites: list[Site]) -> list[str]:
    """Return the shortest names that select exactly the linears of these sites: last parts of the names, else kinds,
    else paths."""
    kinds = {site.kind.rpartition(".")[0] if is_part(site) else site.kind for site in sites}
    last = {kind.rpartition(".")[2] for kind in kinds}
    return _shortest([last, kinds], {linear_of(site) for site in sites}, [path for path, _ in model.named_modules()])


def _shortest(candidates: list[set[str]], wanted: set[str], paths: list[str]) -> list[str]:
    """Return the first set of candidate names with which PEFT finds exactly the wanted paths; else those paths."""
    for names in candidates:
        if {path for path in paths if any(path == n or path.endswith("." + n) for n in names)} == wanted:
            return sorted(names)
    return sorted(wanted)


def _check(source: Source) -> None:
    if others := others_replaced(source):
        raise UserError(
            f"the adapter has base parameters ({others[0]}, ...), which a LoRA cannot hold: use --format merged"
        )
    for site in source.sites:
        if not isinstance(source.adapters[site.path], FactorAdapter):
            raise UserError(
                f"adapter.method: {source.label!r} is not a product of low-rank factors: use --format merged"
            )


def _kept(source: Source, site: Site) -> Tensor:
    with torch.no_grad():
        return _nonzero(_factor_adapter(source, site).factors().d)


def _nonzero(d: Tensor) -> Tensor:
    """Return the positions of the ranks whose d is nonzero in at least one expert; never empty, since LoRA has no
    rank 0."""
    kept = d.reshape(-1, d.shape[-1]).any(0).nonzero().flatten()
    return kept if kept.numel() else torch.zeros(1, dtype=torch.long)


def _factor_adapter(source: Source, site: Site) -> FactorAdapter:
    adapter = source.adapters[site.path]
    assert isinstance(adapter, FactorAdapter)
    return adapter
