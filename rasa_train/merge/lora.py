"""Export of any factor method as a plain LoRA adapter in PEFT's format, exactly.

    dW = B diag(d) A   ->   lora_B = B diag(d),  lora_A = A,  lora_alpha = r, so that the scale is 1

d stays on one side: its entries can be negative. PEFT and vLLM load the result without knowing the method.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from ..adapters.base import FactorAdapter, Site
from ..adapters.saved import CONFIG, PEFT_TENSORS, read_adapter
from ..errors import UserError
from .output import new_directory
from .source import Source, find_adapter, find_base, load
from .weights import tensor_bytes, write_tensors

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM takes for ``--max-lora-rank``."""


@dataclass(frozen=True)
class ExportReport:
    """What an export did. ``rounding`` is 0: nothing is rounded."""

    output: str
    format: str
    method: str
    base_model: str
    tensors: int
    adapted: int
    bytes: int
    seconds: float
    rounding: float
    rank: int
    """The largest rank of a site."""
    max_lora_rank: int | None
    """vLLM's option, or None when the rank is more than it takes."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def export_lora(
    adapter: str | Path,
    output: str | Path,
    *,
    base: str | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ExportReport:
    """Write the adapter as a LoRA adapter directory. Of the base only the configuration is needed.

    Raises:
        UserError: the method is no factor method, the adapter does not fit, or ``output`` cannot be written.
    """
    start = time.perf_counter()
    directory = find_adapter(Path(adapter))
    saved = read_adapter(directory)
    name, base_dir = find_base(saved, base, revision, weights=False)
    source = load(saved, name, base_dir)
    _check(source)
    ranks = {site.path: int(_kept(source, site).numel()) for site in source.sites}
    sizes = {s.path: 4 * ranks[s.path] * (s.in_features + s.out_features) for s in source.sites}
    inputs = [directory, *([base_dir] if Path(name).is_dir() else [])]
    with new_directory(Path(output), overwrite=overwrite, inputs=inputs, nbytes=sum(sizes.values())) as partial:
        written = _write_factors(source, ranks, partial / PEFT_TENSORS, progress)
        (partial / CONFIG).write_text(json.dumps(_peft_config(source, ranks), indent=2) + "\n")
    rank = max(ranks.values())
    return ExportReport(
        output=str(output),
        format="lora",
        method=saved.method.method,
        base_model=name,
        tensors=2 * len(ranks),
        adapted=len(ranks),
        bytes=written,
        seconds=round(time.perf_counter() - start, 3),
        rounding=0.0,
        rank=rank,
        max_lora_rank=next((allowed for allowed in VLLM_RANKS if allowed >= rank), None),
    )


@torch.no_grad()
def lora_factors(adapter: FactorAdapter) -> tuple[Tensor, Tensor]:
    """(A, diag(b) B diag(d)) in fp32, without the ranks whose d is zero (AdaLoRA prunes by zeros)."""
    factors = adapter.factors()
    kept = _nonzero(factors.d)
    return factors.A.float()[kept], factors.Bd.float()[:, kept]


def _write_factors(
    source: Source, ranks: dict[str, int], path: Path, progress: Callable[[int, int], None] | None
) -> int:
    entries, sides = [], {}
    for site in source.sites:
        for side, shape in (
            ("A", (ranks[site.path], site.in_features)),
            ("B", (site.out_features, ranks[site.path])),
        ):
            name = f"base_model.model.{site.path}.lora_{side}.weight"
            entries.append((name, "F32", shape, 4 * shape[0] * shape[1]))
            sides[name] = site, side
    total, done = sum(entry[-1] for entry in entries), 0

    def write(name: str, out: BinaryIO) -> None:
        nonlocal done
        site, side = sides[name]
        A, B = lora_factors(_factor_adapter(source, site))
        done += out.write(tensor_bytes(A if side == "A" else B))
        if progress is not None:
            progress(done, total)

    return write_tensors(path, entries, write)


def _peft_config(source: Source, ranks: dict[str, int]) -> dict[str, Any]:
    r = max(ranks.values())
    # alpha = rank everywhere: the scale is 1 for readers that know the patterns and for those that do not.
    pattern = {path: rank for path, rank in ranks.items() if rank != r}
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": source.base,
        "r": r,
        "lora_alpha": r,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "fan_in_fan_out": any(site.transposed for site in source.sites),
        "inference_mode": True,
        "target_modules": _target_modules(source.model, source.sites),
    }
    return config | ({"rank_pattern": pattern, "alpha_pattern": pattern} if pattern else {})


def _target_modules(model: nn.Module, sites: list[Site]) -> list[str]:
    """The shortest names that select just these sites: last names, else kinds, else whole paths."""
    wanted, paths = {site.path for site in sites}, [path for path, _ in model.named_modules()]
    kinds = Counter(site.kind for site in sites)
    for names in ({kind.rpartition(".")[2] for kind in kinds}, set(kinds)):
        if {path for path in paths if any(path == n or path.endswith("." + n) for n in names)} == wanted:
            return sorted(names)
    return sorted(wanted)


def _check(source: Source) -> None:
    method = source.saved.method.method
    if source.replaced:
        first = next(iter(source.replaced))
        raise UserError(f"the adapter has base parameters ({first}), which no LoRA can hold: use --format merged")
    for site in source.sites:
        if not isinstance(source.adapters[site.path], FactorAdapter):
            raise UserError(f"adapter.method: {method!r} is no product of low-rank factors: use --format merged")
        if site.num_experts is not None or site.rows is not None:
            raise UserError(f"{site.path} is a fused weight, which PEFT's LoRA has no name for: use --format merged")


def _kept(source: Source, site: Site) -> Tensor:
    with torch.no_grad():
        return _nonzero(_factor_adapter(source, site).factors().d)


def _nonzero(d: Tensor) -> Tensor:
    """Positions of the ranks that count; at least one, since LoRA has no rank 0."""
    kept = d.nonzero().flatten()
    return kept if kept.numel() else torch.zeros(1, dtype=torch.long)


def _factor_adapter(source: Source, site: Site) -> FactorAdapter:
    adapter = source.adapters[site.path]
    assert isinstance(adapter, FactorAdapter)
    return adapter
