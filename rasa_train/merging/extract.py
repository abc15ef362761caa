"""Extract an adapter from a fully fine-tuned checkpoint: the RaSA (or LoRA) nearest to what fine-tuning changed.

A RaSA is found by the coordinate descent of the paper's Appendix A (``rasa_train.lowrank.reconstruct``), a LoRA by the
truncated SVD. One kind of linear is in memory at a time.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ..adapters.saved import TENSORS, write_adapter
from ..adapters.site import Site, by_kind
from ..adapters.sites import find_sites
from ..adapters.state import POOLS
from ..errors import UserError
from ..io.atomic_dir import new_directory
from ..io.base_fingerprint import base_identity
from ..lowrank.reconstruct import Reconstruction, reconstruct, truncated
from ..methods.lora import LoRA
from ..methods.rasa import RaSA
from .options import WRITING, Writing
from .parameters import Weights, check_finetuned
from .source import find_model
from .tied import only_names

Update = Callable[[Site], Tensor]
"""Reads the update of one site at each call: fine-tuned minus base weight (out, in), fp32."""

DENSE = 1 << 28
"""Largest number of values (1 GB) in the updates of one kind that are kept whole. Larger updates are truncated to
``KEPT`` times r ranks a layer for the descent; the reported errors are still measured against the whole updates."""
KEPT = 8
"""Ranks a layer that are kept of updates larger than ``DENSE``, as a multiple of r."""


@dataclass(frozen=True)
class Fit:
    """The adapter to extract, and how it is fitted."""

    method: Literal["rasa", "lora"] = "rasa"
    r: int = 8
    """Ranks per layer."""
    k: int | None = None
    """Shared ranks per layer, for RaSA. Default: max(r // 8, 1)."""
    sweeps: int = 50
    """Sweeps of the coordinate descent."""
    targets: str | list[str] = "all-linear"
    """Linears to adapt, as in ``adapter.targets`` of a recipe."""

    @property
    def config(self) -> RaSA | LoRA:
        """The method with its hyper-parameters."""
        if self.method == "rasa":
            return RaSA(r=self.r, k=self.k, targets=self.targets)
        return LoRA(r=self.r, alpha=self.r, targets=self.targets)


FIT = Fit()
"""The default: RaSA with r = 8 on all linears."""


@dataclass(frozen=True)
class KindReport:
    """Squared Frobenius norms over all layers of one kind of linear."""

    norm2: float
    """Squared norm of what fine-tuning changed."""
    error: float
    """Squared norm of what the adapter does not reproduce."""
    lora_error: float
    """Squared norm of what the best LoRA of the same r does not reproduce."""


@dataclass(frozen=True)
class ExtractReport:
    """Result of an extraction."""

    output: str
    method: str
    base_model: str
    finetuned: str
    r: int
    k: int
    kinds: dict[str, KindReport]
    others_changed: list[str]
    """Names of tensors that fine-tuning changed and the adapter does not cover: norms, embeddings, ..."""
    bytes: int
    """Size of the adapter's tensor file."""
    seconds: float
    total: KindReport
    """The sums over all kinds."""


def extract(
    finetuned: str, base: str, output: str | Path, fit: Fit = FIT, *, writing: Writing = WRITING
) -> ExtractReport:
    """Write the adapter that is nearest to ``finetuned`` minus ``base``.

    Args:
        finetuned, base: hub ids or directories of two checkpoints of one architecture.
        fit: the adapter to extract, and how it is fitted.
        writing: how the directory is written; progress is in values of the updates.
    Raises:
        UserError: the checkpoints are not of one architecture, or ``output`` cannot be written.
    """
    start = time.perf_counter()
    config = fit.config
    shared = config.k if isinstance(config, RaSA) else 0
    before, after = (Weights(find_model(name, None, weights=True)) for name in (base, finetuned))
    sites = _sites(before, after, fit.targets)

    def update(site: Site) -> Tensor:
        return after.weight(site) - before.weight(site)

    tensors: dict[str, Tensor] = {}
    kinds: dict[str, KindReport] = {}
    done, total = 0, sum(site.out_features * site.in_features for site in sites)
    with new_directory(
        Path(output), overwrite=writing.overwrite, inputs=[before.directory, after.directory], nbytes=0
    ) as partial:
        for kind, group in by_kind(sites).items():
            fitted, kinds[group[0].kind] = _fit(update, group, fit.r, shared, fit.sweeps)
            tensors |= _rasa(kind, group, fitted) if isinstance(config, RaSA) else _lora(group, fitted)
            done += sum(site.out_features * site.in_features for site in group)
            if writing.progress is not None:
                writing.progress(done, total)
        identity = base_identity(str(before.directory))
        write_adapter(partial, config, tensors, base_model=base, base_revision=None, base_tensors=identity)
        nbytes = (partial / TENSORS).stat().st_size
        facts = {name: asdict(report) for name, report in kinds.items()}
        (partial / "extraction.json").write_text(json.dumps({"finetuned": finetuned, "kinds": facts}, indent=2) + "\n")
    rows = [astuple(report) for report in kinds.values()]
    return ExtractReport(
        output=str(output),
        method=fit.method,
        base_model=base,
        finetuned=finetuned,
        r=fit.r,
        k=shared,
        kinds=kinds,
        others_changed=_changed_beside(before, after, {site.weight for site in sites}),
        bytes=nbytes,
        seconds=round(time.perf_counter() - start, 3),
        total=KindReport(*(sum(column) for column in zip(*rows, strict=True))),
    )


def _sites(before: Weights, after: Weights, targets: str | list[str]) -> list[Site]:
    """Return the sites of both models. Raises ``UserError`` if the models do not fit, or a site is a fused weight."""
    sites = find_sites(before.model, targets)
    check_finetuned(before, after, sites)
    if fused := [site for site in sites if site.num_experts is not None or site.rows is not None]:
        raise UserError(
            f"{fused[0].path} is held in a fused weight, which rasa-merge extract does not support: name other linears "
            "with --targets"
        )
    return sites


def _changed_beside(before: Weights, after: Weights, parameters: set[str]) -> list[str]:
    """Return the names of the parameters outside ``parameters`` that differ between the two models."""
    again = only_names(before.model).keys() & only_names(after.model).keys()
    both = sorted((before.pieces.keys() & after.pieces.keys()) - parameters - again)
    return [name for name in both if not torch.equal(before.read(name), after.read(name))]


def _fit(update: Update, group: list[Site], r: int, k: int, sweeps: int) -> tuple[Reconstruction, KindReport]:
    b, a = group[0].shape
    updates = (update(site) for site in group)
    if len(group) * b * a <= DENSE:
        fitted = reconstruct(torch.stack(list(updates)), r, k, sweeps=sweeps, start="best")
        return fitted, KindReport(fitted.norm2, fitted.error, fitted.e_lora)
    norm2, parts = 0.0, []
    for dW in updates:
        norm2 += float(torch.linalg.vector_norm(dW, dtype=torch.float64) ** 2)
        parts.append(truncated(dW, KEPT * r))
    factors = torch.stack([B for B, _ in parts]), torch.stack([A for _, A in parts])
    fitted = reconstruct(factors, r, k, sweeps=sweeps, start="best")
    lora_error = fitted.e_lora + norm2 - fitted.norm2
    error = _error(update, group, fitted)
    if error > lora_error:  # the truncated part can make RaSA worse than LoRA when there is nothing to share
        fitted = reconstruct(factors, r, k, sweeps=0, start="theorem")
        error = _error(update, group, fitted)
    return fitted, KindReport(norm2, error, lora_error)


def _error(update: Update, group: list[Site], fitted: Reconstruction) -> float:
    error = 0.0
    for i, site in enumerate(group):
        B, A = (t.float() for t in fitted.factors(i))
        error += float(torch.linalg.vector_norm(update(site).sub_(B @ A), dtype=torch.float64) ** 2)
    return error


def _rasa(kind: str, group: list[Site], fitted: Reconstruction) -> dict[str, Tensor]:
    """Return RaSA's tensors, with both factors of a rank of equal norm: private d = 1, shared d at most 1."""
    sides = [t.norm(dim=d).clamp(min=1e-30) for t, d in ((fitted.B_S, 0), (fitted.A_S, 1))]
    largest = fitted.d.abs().amax(0).clamp(min=1e-30)
    root = (sides[0] * sides[1] * largest).sqrt()
    tensors: dict[str, Tensor] = {}
    if fitted.A_S.shape[0]:
        tensors[f"{POOLS}.{kind}.B_S"] = (fitted.B_S * (root / sides[0])).float()
        tensors[f"{POOLS}.{kind}.A_S"] = (fitted.A_S * (root / sides[1])[:, None]).float()
    for i, site in enumerate(group):
        tensors[f"{site.path}.d"] = torch.cat([fitted.B.new_ones(fitted.B.shape[2]), fitted.d[i] / largest]).float()
    return tensors | (_lora(group, fitted) if fitted.B.shape[2] else {})


def _lora(group: list[Site], fitted: Reconstruction) -> dict[str, Tensor]:
    """Return the private factors A and B, scaled so that both factors of a rank have the same norm."""
    tensors = {}
    for i, site in enumerate(group):
        B, A = fitted.B[i], fitted.A[i]
        ratio = (B.norm(dim=0).clamp(min=1e-30) / A.norm(dim=1).clamp(min=1e-30)).sqrt()
        tensors[f"{site.path}.B"] = (B / ratio).float()
        tensors[f"{site.path}.A"] = (A * ratio[:, None]).float()
    return tensors
