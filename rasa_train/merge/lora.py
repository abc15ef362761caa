"""Export of any factor method as a plain LoRA adapter in PEFT's format, exactly.

    dW = B diag(d) A   ->   lora_B = B diag(d),  lora_A = A,  lora_alpha = r, so that the scale is 1

d stays on one side: its entries can be negative. PEFT and vLLM load the result without knowing the method. With a
largest rank the product is cut by its singular values, which is the best there is of that rank.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from ..adapters.base import FactorAdapter, Site
from ..adapters.saved import CONFIG, PEFT_TENSORS
from ..errors import UserError
from .output import new_directory
from .source import Adapters, Source, open_source
from .weights import tensor_bytes, write_tensors

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM takes for ``--max-lora-rank``."""


@dataclass(frozen=True)
class ExportReport:
    """What an export did."""

    output: str
    format: str
    method: str
    base_model: str
    tensors: int
    adapted: int
    bytes: int
    seconds: float
    rounding: float
    """0: nothing is rounded."""
    base_checked: bool
    """Whether the base is known to be the one that the adapter was trained on."""
    rank: int
    """The largest rank of a site."""
    error: float
    """norm(written - dW) / norm(dW) over all sites: what ``max_rank`` costs. 0 without it."""
    max_lora_rank: int | None
    """vLLM's option, or None when the rank is more than it takes."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def export_lora(
    adapter: Adapters,
    output: str | Path,
    *,
    base: str | None = None,
    revision: str | None = None,
    any_base: bool = False,
    max_rank: int | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ExportReport:
    """Write the adapter as a LoRA adapter directory. Of the base only the configuration is needed.

    Args:
        adapter, base, revision, any_base: as of ``open_source``.
        max_rank: cut larger ranks to this.
    Raises:
        UserError: the method is no factor method, the adapter does not fit, or ``output`` cannot be written.
    """
    start = time.perf_counter()
    source = open_source(adapter, base, revision, weights=False, any_base=any_base)
    _check(source)
    ranks = {site.path: int(_kept(source, site).numel()) for site in source.sites}
    if max_rank is not None:
        ranks = {path: min(rank, max_rank) for path, rank in ranks.items()}
    sizes = {s.path: 4 * ranks[s.path] * (s.in_features + s.out_features) for s in source.sites}
    inputs = [*source.origins, *([source.directory] if Path(source.base).is_dir() else [])]
    with new_directory(Path(output), overwrite=overwrite, inputs=inputs, nbytes=sum(sizes.values())) as partial:
        written, error = _write_factors(source, ranks, partial / PEFT_TENSORS, progress)
        (partial / CONFIG).write_text(json.dumps(_peft_config(source, ranks), indent=2) + "\n")
    rank = max(ranks.values())
    return ExportReport(
        output=str(output),
        format="lora",
        method=source.label,
        base_model=source.base,
        tensors=2 * len(ranks),
        adapted=len(ranks),
        bytes=written,
        seconds=round(time.perf_counter() - start, 3),
        rounding=0.0,
        base_checked=source.checked,
        rank=rank,
        error=error,
        max_lora_rank=next((allowed for allowed in VLLM_RANKS if allowed >= rank), None),
    )


@torch.no_grad()
def lora_factors(adapter: FactorAdapter) -> tuple[Tensor, Tensor]:
    """(A, diag(b) B diag(d)) in fp32, without the ranks whose d is zero (AdaLoRA prunes by zeros)."""
    factors = adapter.factors()
    kept = _nonzero(factors.d)
    return factors.A.float()[kept], factors.Bd.float()[:, kept]


@torch.no_grad()
def truncated(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor, float, float]:
    """The best approximation of B A of that rank, through QR of the factors: nothing of the size of dW is made.

    Returns:
        A' (rank, in), B' (out, rank) in fp32, norm(B A - B' A')^2 and norm(B A)^2.
    """
    Q, R = torch.linalg.qr(B.double())
    P, S = torch.linalg.qr(A.double().mT)
    U, s, Vh = torch.linalg.svd(R @ S.mT)
    root, lost = s[:rank].sqrt(), float((s[rank:] ** 2).sum())
    return (root[:, None] * (Vh[:rank] @ P.mT)).float(), (Q @ U[:, :rank] * root).float(), lost, float((s**2).sum())


def _write_factors(
    source: Source, ranks: dict[str, int], path: Path, progress: Callable[[int, int], None] | None
) -> tuple[int, float]:
    """Size of the file, and the relative error of what was cut."""
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
    lost2 = norm2 = 0.0
    now: tuple[Site, Tensor, Tensor] | None = None

    def write(name: str, out: BinaryIO) -> None:
        nonlocal done, lost2, norm2, now
        site, side = sides[name]
        if now is None or now[0] != site:
            A, B = lora_factors(_factor_adapter(source, site))
            if ranks[site.path] < A.shape[0]:
                A, B, lost, of = truncated(A, B, ranks[site.path])
                lost2 += lost
            else:
                of = float(((A @ A.mT) * (B.mT @ B)).sum())
            norm2 += of
            now = site, A, B
        done += out.write(tensor_bytes(now[1] if side == "A" else now[2]))
        if progress is not None:
            progress(done, total)

    return write_tensors(path, entries, write), math.sqrt(lost2 / norm2) if norm2 else 0.0


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
        "target_modules": target_modules(source.model, source.sites),
    }
    return config | ({"rank_pattern": pattern, "alpha_pattern": pattern} if pattern else {})


def target_modules(model: nn.Module, sites: list[Site]) -> list[str]:
    """The shortest names that select just these sites: last names, else kinds, else whole paths."""
    wanted, paths = {site.path for site in sites}, [path for path, _ in model.named_modules()]
    kinds = Counter(site.kind for site in sites)
    for names in ({kind.rpartition(".")[2] for kind in kinds}, set(kinds)):
        if {path for path in paths if any(path == n or path.endswith("." + n) for n in names)} == wanted:
            return sorted(names)
    return sorted(wanted)


def _check(source: Source) -> None:
    if source.replaced:
        raise UserError(
            f"the adapter has base parameters ({min(source.replaced)}, ...), which no LoRA can hold: use "
            "--format merged"
        )
    for site in source.sites:
        if not isinstance(source.adapters[site.path], FactorAdapter):
            raise UserError(f"adapter.method: {source.label!r} is no product of low-rank factors: use --format merged")
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
