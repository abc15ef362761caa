"""What goes into a merge or an export: the adapter, and the base model it belongs to."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from torch import Tensor
from transformers import PreTrainedModel

from ..adapters.base import Adapter, Site
from ..adapters.inject import POOLS, find_sites
from ..adapters.saved import CONFIG, SavedAdapter, check_tensors
from ..errors import UserError
from ..model import ModelConfig, load_model, meta_model
from .weights import INDEX, SINGLE

SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py", "LICENSE*", "NOTICE*"]
"""What is downloaded of a hub model beside its weights."""


@dataclass(frozen=True)
class Source:
    """A saved adapter with its values in place, on the CPU."""

    saved: SavedAdapter
    base: str
    """Base model as the user or the adapter names it: a hub id or a directory."""
    model: PreTrainedModel
    """The base on the meta device: names and shapes."""
    sites: list[Site]
    """Those that have an adapter."""
    adapters: dict[str, Adapter]
    """By the path of their site."""
    replaced: dict[str, Tensor]
    """Base parameters that were trained themselves, by their name: they take the place of the base's."""


def find_adapter(path: Path) -> Path:
    """The adapter directory that ``path`` is or holds: itself, a run's ``adapter/``, its newest checkpoint.

    Raises:
        UserError: there is none.
    """
    if not path.is_dir():
        raise UserError(f"{path} does not exist: give an adapter directory or the output_dir of a run")
    for directory in (path, path / "adapter"):
        if (directory / CONFIG).is_file():
            return directory
    steps = {int(match[1]): match.string for match in map(_STEP.fullmatch, _names(path / "checkpoints")) if match}
    for step in sorted(steps, reverse=True):
        directory = path / "checkpoints" / steps[step]
        if (directory / CONFIG).is_file():
            return directory
    raise UserError(f"{path} holds no adapter: no {CONFIG}, no adapter/{CONFIG} and no checkpoints/step-*/{CONFIG}")


def find_base(saved: SavedAdapter, base: str | None, revision: str | None, *, weights: bool) -> tuple[str, Path]:
    """The base model's name and its directory here, downloaded as far as it is needed.

    Args:
        base: hub id or directory; None for the one the adapter names.
        weights: whether its safetensors files are needed, or only its configuration.
    Raises:
        UserError: no base is named, or it is neither here nor on the hub.
    """
    name = base or saved.base_model
    if not name:
        raise UserError(f"{saved.directory / CONFIG} names no base model: give it with --base")
    if revision is None and name == saved.base_model:
        revision = saved.base_revision
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"base model: {name} is a directory without a config.json, so it is no model")
        return name, path
    if path.exists() or path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        hint = "" if base else " (the adapter names it): give the base with --base"
        raise UserError(f"base model: {name!r} does not exist{hint}")
    try:
        return name, _download(name, revision, weights)
    except (OSError, ValueError, HfHubHTTPError) as error:
        why = " ".join(str(error).split())[:400]
        raise UserError(f"base model: {name!r} is no directory here and cannot be had from the hub: {why}") from None


def load(saved: SavedAdapter, name: str, base_dir: Path) -> Source:
    """Build the adapters for the base and copy the saved values in.

    Raises:
        UserError: the adapter does not fit this base: a name, a shape, or a value that is not finite.
    """
    model = _architecture(base_dir)
    base = partial(load_model, ModelConfig(name=str(base_dir), dtype="float32"))
    if (merged := saved.method.merged(base, saved.tensors)) is not None:
        return Source(saved, name, model, [], {}, merged)
    shapes = {key: tuple(p.shape) for key, p in model.named_parameters()}
    replaced = {key: tensor for key, tensor in saved.tensors.items() if key in shapes}
    check_tensors({key: shapes[key] for key in replaced}, replaced, origin=str(saved.directory))
    sites: list[Site] = []
    adapters: dict[str, Adapter] = {}
    if len(replaced) < len(saved.tensors) or not replaced:
        sites = find_sites(model, saved.method.targets, saved.method.exclude)
        with torch.random.fork_rng(devices=[]):  # building draws initial values that nobody will see
            built = saved.method.build(sites)
        adapters = built.adapters
        sites = [site for site in sites if site.path in adapters]  # BitFit leaves some as they are
        owners = {**adapters, **{f"{POOLS}.{key}": pool for key, pool in built.pools.items()}}
        places = {
            f"{owner}.{key}": tensor
            for owner, module in owners.items()
            for key, tensor in module.state_dict(keep_vars=True).items()
        }
        tensors = {key: tensor for key, tensor in saved.tensors.items() if key not in replaced}
        check_tensors({key: tuple(p.shape) for key, p in places.items()}, tensors, origin=str(saved.directory))
        with torch.no_grad():
            for key, place in places.items():
                place.copy_(tensors[key])
        for adapter in adapters.values():
            adapter.eval()
    return Source(saved, name, model, sites, adapters, replaced)


_STEP = re.compile(r"step-(\d+)")


def _names(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir()] if directory.is_dir() else []


def _architecture(base_dir: Path) -> PreTrainedModel:
    try:
        return meta_model(ModelConfig(name=str(base_dir)))
    except UserError as error:
        raise UserError(str(error).replace("model.name:", "base model:", 1)) from None


def _download(name: str, revision: str | None, weights: bool) -> Path:
    files = SMALL_FILES if weights else ["config.json", "*.py"]
    small = snapshot_download(name, revision=revision, allow_patterns=files, ignore_patterns=["*/*"])
    if not weights:
        return Path(small)
    index = Path(small) / INDEX
    wanted = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else [SINGLE]
    return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
