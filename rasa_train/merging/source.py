"""Read the inputs of a merge or an export: the adapter, or a weighted sum of several, and the base model."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from torch import Tensor
from transformers import PreTrainedModel

from ..adapters.contract import Adapter
from ..adapters.saved import CONFIG, PEFT_METHOD, SavedAdapter, check_tensors, damage, read_adapter, tokenizer_files
from ..adapters.site import Site
from ..adapters.sites import find_sites
from ..adapters.state import POOLS
from ..errors import UserError, say
from ..io.base_fingerprint import compare
from ..io.checkpoint_files import INDEX, SINGLE, read_index
from ..io.checksums import CHECKSUMS
from ..io.links import refuse_links_out
from ..io.model_dir import check_files
from ..io.run_dir import RunDirectory, numbered
from ..models.classifier import head_parameters
from ..models.config import ModelConfig
from ..models.load import load_model, meta_model
from ..models.task import Head
from ..models.vocabulary import Words
from ..models.words import ROWS, put, row_parameters
from .checkpoints import find_checkpoint
from .options import Base
from .tied import as_stored, joined
from .total import total

Adapters = str | Path | Sequence[tuple[str | Path, float]]
"""An adapter or run directory, or several as (directory, weight)."""

SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py", "LICENSE*", "NOTICE*"]
"""Patterns of the files that are downloaded of a hub model in addition to its weights."""


@dataclass(frozen=True)
class Source:
    """A saved adapter, or a weighted sum of several, with its values in place, on the CPU."""

    label: str
    """The method, or the sum, such as ``0.7 rasa + 0.3 lora``."""
    base: str
    """Base model as the user or the adapter names it: a hub id or a directory."""
    directory: Path
    """Directory of the base on this machine."""
    origins: list[Path]
    """Directories of the adapters."""
    model: PreTrainedModel
    """The base on the meta device, for names and shapes."""
    sites: list[Site]
    """Sites that have an adapter."""
    adapters: dict[str, Adapter]
    """Adapters by the path of their site."""
    replaced: dict[str, Tensor]
    """Base parameters that were trained themselves, by name. They replace the parameters of the base."""
    checked: bool = False
    """Whether the base is known to be the one that the adapter was trained on."""
    untied: list[list[str]] = field(default_factory=list)
    """Names, in groups, that are one tied parameter in the base and that the adapter changes differently."""
    head: Head | None = None
    """Head of the classifier that was trained, whose tensors are in ``replaced``; None for a causal language model."""
    words: Words | None = None
    """Words that were added to the base: ``model`` has them, and their rows are in ``replaced``."""


def open_source(adapter: Adapters, base: str | Base | None, *, weights: bool) -> Source:
    """Read the adapters, find their base and check that they fit it.

    Args:
        adapter: an adapter or run directory; or several as (directory, weight).
        base: the base, or its name; None for the one that the adapters name.
        weights: whether the base's safetensors files are needed, or only its configuration.
    Raises:
        UserError: an adapter or the base cannot be read, or they do not fit.
    """
    base = Base.of(base)
    given = [(adapter, 1.0)] if isinstance(adapter, str | Path) else list(adapter)
    read = [(read_adapter(find_adapter(Path(path))), weight) for path, weight in given]
    first = read[0][0]
    if base.name is None and (others := {s.base_model for s, _ in read} - {first.base_model}):
        raise UserError(
            f"the adapters name several bases, {first.base_model!r} and {min(map(str, others))!r}: choose one with "
            "--base"
        )
    name, base_dir = find_base(first, base.name, base.revision, weights=weights)
    checked = all([base.any_base or check_identity(saved, base_dir) for saved, _ in read])
    sources = [load(saved, name, base_dir) for saved, _ in read]
    if len(sources) == 1 and read[0][1] == 1:
        return replace(sources[0], checked=checked)
    if any(source.replaced for source in sources):
        raise UserError(
            "an adapter with trained base parameters, new words or the head of a classifier cannot be part of a sum, "
            "and cannot be weighted"
        )
    sites, adapters = total([(s.sites, s.adapters, weight) for s, (_, weight) in zip(sources, read, strict=True)])
    label = " + ".join(f"{weight:g} {saved.method.method}" for saved, weight in read)
    origins = [saved.directory for saved, _ in read]
    return Source(label, name, base_dir, origins, sources[0].model, sites, adapters, {}, checked)


def check_identity(saved: SavedAdapter, base_dir: Path) -> bool:
    """Whether the base is known to be the one that the adapter was trained on; False where this is unknown.

    Raises:
        UserError: the base is a different one.
    """
    found = compare(saved.base_tensors, str(base_dir))
    if found.problem:
        raise UserError(
            f"{another_base(saved, str(base_dir), found.problem)}. Give the right base with --base, or add --any-base "
            "if you want this one"
        )
    return found.compared > 0


def another_base(saved: SavedAdapter, base: str, problem: str) -> str:
    """Return the sentence that says that a base is not the one that an adapter was trained on, without a full stop."""
    return f"{base} is not the base that {saved.directory} was trained on ({saved.base_model}): its {problem}"


def find_adapter(path: Path, checkpoint: str | None = None) -> Path:
    """Return the adapter directory for ``path``: ``path`` itself, the ``adapter/`` of a run, or the run's newest
    checkpoint that is not damaged.

    Args:
        checkpoint: ``best`` for the best step of a run, or the number of a step, instead of these.
    Raises:
        UserError: ``path`` is not and does not hold an adapter, or is no run with such a checkpoint.
    """
    if not path.is_dir():
        raise UserError(f"{path} does not exist: give an adapter directory or the output_dir of a run")
    _see(path)
    if checkpoint is not None:
        return find_checkpoint(path, checkpoint)
    if (path / CONFIG).is_file():
        refuse_links_out(path)
        return path
    RunDirectory(path).refuse_links()
    if (path / "adapter" / CONFIG).is_file():
        return path / "adapter"
    checkpoints = numbered(path / "checkpoints")
    for directory in reversed(checkpoints):
        lacking = [
            name for name in (CONFIG, CHECKSUMS) if not (directory / name).is_file()
        ]  # every checkpoint has them
        problem = f"{lacking[0]} is missing" if lacking else damage(directory)
        if problem is None:
            return directory
        say(f"note: {directory} is damaged ({problem}); it is passed over for the one before", file=sys.stderr)
    if checkpoints:
        raise UserError(
            f"{path} holds no whole adapter: all of its checkpoints are damaged, and it has no adapter/{CONFIG}"
        )
    raise UserError(f"{path} holds no adapter: no {CONFIG}, no adapter/{CONFIG} and no checkpoints/step-*/{CONFIG}")


def find_base(saved: SavedAdapter, base: str | None, revision: str | None, *, weights: bool) -> tuple[str, Path]:
    """Return the base model's name and its directory on this machine. Needed files are downloaded.

    Args:
        base: hub id or directory; None for the base that the adapter names.
        revision: branch, tag or commit of a hub id; None for the one that the adapter records.
        weights: whether the base's safetensors files are needed, or only its configuration.
    Raises:
        UserError: no base is named, or the base is neither on this machine nor on the hub.
    """
    name = base or saved.base_model
    if not name:
        raise UserError(f"{saved.directory / CONFIG} names no base model: give it with --base")
    if revision is None and name == saved.base_model:
        revision = saved.base_revision
    if base is None and (here := _known_directory(saved)):
        name = here
    hint = "" if base else " (the adapter names this base): give the base with --base"
    return name, find_model(name, revision, weights=weights, hint=hint)


def _known_directory(saved: SavedAdapter) -> str | None:
    """Return the directory of a base that the adapter names by a relative path: where it was at training, or the same
    path from here, or from the adapter's directory or one above it. None if the name is not a path.

    Raises:
        UserError: the base is a directory that is in none of these places.
    """
    name = str(saved.base_model)
    places = [*([Path(saved.base_path)] if saved.base_path else []), Path(name).expanduser()]
    if not Path(name).expanduser().is_absolute():
        directory = saved.directory.resolve()
        places += [parent / name for parent in (directory, *directory.parents)]
    for place in places:
        if os.path.isfile(place / "config.json") or (place.is_dir() and not os.access(place, os.X_OK)):
            return name if str(place) == name else str(place)
    if saved.base_path:
        raise UserError(
            f"base model: {name!r} was {saved.base_path} when the adapter was trained, and is neither there nor below "
            f"this directory or {saved.directory}: give the base with --base"
        )
    return None


def find_tokenizer(source: Source) -> list[Path]:
    """Return the files of the tokenizer that the first adapter was trained with, if they are stored with it."""
    return next(filter(None, map(tokenizer_files, source.origins)), [])


def find_model(name: str, revision: str | None, *, weights: bool, hint: str = "") -> Path:
    """Return the directory of a model on this machine; needed files are downloaded. Raises ``UserError`` when there is
    no such model."""
    path = Path(name).expanduser()
    if path.is_dir():
        _see(path)
        if not (path / "config.json").is_file():
            raise UserError(f"base model: {name} is a directory without a config.json, so it is not a model")
        check_files(path)
        return path
    if path.exists() or path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise UserError(f"base model: {name!r} does not exist{hint}")
    try:
        return _download(name, revision, weights)
    except (OSError, ValueError, HfHubHTTPError) as error:
        why = " ".join(str(error).split())[:400]
        raise UserError(
            f"base model: {name!r} is not a directory on this machine and cannot be downloaded from the hub{hint}: "
            f"{why}"
        ) from None


def _see(directory: Path) -> None:
    """Raise ``UserError`` if a directory cannot be listed."""
    try:
        for path in directory.iterdir():
            path.lstat()
    except OSError as error:
        raise UserError(f"{directory} cannot be read: {error.strerror}") from None


def load(saved: SavedAdapter, name: str, base_dir: Path) -> Source:
    """Build the adapters for the base and copy the saved values in.

    Raises:
        UserError: the adapter does not fit this base because of a name or a shape, or has a value that is not finite.
    """
    if saved.method.method != PEFT_METHOD and (why := saved.method.unmerged):
        raise UserError(
            f"the adapter in {saved.directory} cannot be merged: {why}. rasa-eval evaluates it inside the base, and "
            "rasa_train.load_adapter puts it into a model"
        )
    head = saved.head
    model = as_stored(architecture(base_dir, head), base_dir)
    base = partial(load_model, ModelConfig(name=str(base_dir), dtype="float32"), head)
    if (merged := saved.method.merged(base, saved.tensors)) is not None:
        merged, untied = joined(model, merged)
        label, origins = saved.method.method, [saved.directory]
        return Source(label, name, base_dir, origins, model, [], {}, merged, untied=untied, head=head)
    try:
        put(model, saved.words, name)
    except UserError as error:
        raise UserError(f"{saved.directory}: {error}") from None
    shapes = {key: tuple(p.shape) for key, p in model.named_parameters()}
    replaced = {key: tensor for key, tensor in saved.tensors.items() if key in shapes}
    # The rows of new words are saved by themselves, or are part of a weight that is saved whole.
    expected = {*replaced, *head_parameters(model)}
    expected |= {n for n in row_parameters(model) if n.removesuffix(ROWS) + "weight" not in replaced}
    check_tensors({key: shapes[key] for key in expected}, replaced, origin=str(saved.directory))
    sites: list[Site] = []
    adapters: dict[str, Adapter] = {}
    if len(replaced) < len(saved.tensors) or not replaced:
        sites = find_sites(model, saved.method.targets, saved.method.exclude)
        with torch.random.fork_rng(devices=[]):  # building draws initial values, which the saved ones replace
            built = saved.method.build(sites)
        adapters = built.adapters
        sites = [site for site in sites if site.path in adapters]  # BitFit leaves some sites without an adapter
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
    origins, label = [saved.directory], saved.method.method
    return Source(label, name, base_dir, origins, model, sites, adapters, replaced, head=head, words=saved.words)


def architecture(base_dir: Path, head: Head | None = None) -> PreTrainedModel:
    """Return the model of a directory on the meta device: a classifier, with ``head``."""
    try:
        return meta_model(ModelConfig(name=str(base_dir)), head)
    except UserError as error:
        raise UserError(str(error).replace("model.name:", "base model:", 1)) from None


def _download(name: str, revision: str | None, weights: bool) -> Path:
    files = SMALL_FILES if weights else ["config.json", "*.py"]
    small = snapshot_download(name, revision=revision, allow_patterns=files, ignore_patterns=["*/*"])
    if not weights:
        return Path(small)
    index = Path(small) / INDEX
    wanted = sorted(set(read_index(index)["weight_map"].values())) if index.is_file() else [SINGLE]
    return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
