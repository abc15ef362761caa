"""Adapter directories: this package's format is written and read; PEFT's and the reference implementation's are read.

In this package's format ``adapter.safetensors`` holds every trained tensor once, by the path of its site or pool;
``adapter_config.json`` holds the method, its hyper-parameters, the base model and the format version.
Only safetensors files are ever opened, never a pickle.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Required, TypedDict, Unpack, cast

import torch
from pydantic import ValidationError
from safetensors.torch import save
from torch import Tensor, nn

from ..errors import UserError, shown
from ..io import checksums
from ..io.atomic import write_text
from ..io.base_fingerprint import is_identity
from ..io.checkpoint_files import opened
from ..io.checksums import CHECKSUMS, write_checksums
from ..io.json_file import read_object
from ..io.model_dir import TOKENIZER, VOCABULARIES, check_files
from ..models.config import ModelConfig
from ..models.load import load_tokenizer
from ..models.task import Head
from ..models.vocabulary import Words
from .contract import Method, PeftConfig
from .registry import METHODS
from .state import POOLS, saved_tensors

CONFIG, TENSORS = "adapter_config.json", "adapter.safetensors"
PEFT_TENSORS = "adapter_model.safetensors"
PEFT_OTHERS = (
    "alpha_pattern",
    "rank_pattern",
    "modules_to_save",
    "target_parameters",
    "trainable_token_indices",
    "lora_bias",
)
"""Keys of a PEFT config that change the meaning of the tensors. They are read by a method that handles them, and
otherwise PEFT itself makes the adapter of the files."""
PEFT_REFUSED = ("layer_replication", "megatron_config")
"""Keys of a PEFT config that make another model of the base."""
PEFT_PLACES = ("exclude_modules", "layers_to_transform", "layers_pattern")
"""Keys of a PEFT config that select some of its ``target_modules``: those that have tensors in the file."""
PEFT_METHOD = "peft"
"""Name of the method that leaves everything to PEFT."""
FORMAT_VERSION = 1
OF_CHECKPOINTS = ("optimizer", "rule.", "trainer.")
"""Beginnings of the names of files that a checkpoint has in addition to those of an adapter."""
SMALL_RANK = 4_096
"""Rank that an adapter may have without a tensor of that size in its files, as those of NoLA."""
MALFORMED = (KeyError, TypeError, ValueError, AttributeError, ArithmeticError)
"""What reading a PEFT config raises where a key is missing, or a value is no number."""
LARGEST_NUMBER = 1_000_000_000
"""Largest number in a PEFT config. Seeds and steps may be larger than ranks."""


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter read from a directory, with this package's names and in fp32."""

    directory: Path
    method: Method
    tensors: dict[str, Tensor]
    base_model: str | None
    base_revision: str | None
    base_tensors: Mapping[str, Any] = field(default_factory=dict)
    """Identity of the base (``io.base_fingerprint.base_identity``); empty if none was recorded."""
    base_path: str | None = None
    """Absolute path of a base that was named by a relative one."""
    head: Head | None = None
    """Head of the classifier that was trained; None for a causal language model."""
    words: Words | None = None
    """Words that were added to the base, and which rows of the embedding and the head were trained."""


class Origin(TypedDict, total=False):
    """What an adapter was trained on."""

    base_model: Required[str]
    base_revision: Required[str | None]
    base_tensors: Mapping[str, Any] | None
    """Identity of the base (``io.base_fingerprint.base_identity``), by which a merge recognises the base."""
    head: Head | None
    """Head of the classifier that was trained."""
    words: Words | None
    """Words that were added to the base, and which rows of the embedding and the head were trained."""


def write_adapter(directory: Path, method: Method, tensors: Mapping[str, Tensor], **origin: Unpack[Origin]) -> None:
    """Write one adapter into ``directory``, which must exist. Tensors are stored unchanged, sorted by name.

    The checksums come last: until then those of an adapter that was there before tell that the files do not belong
    together."""
    write_config(directory, method, **origin)
    plain = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    # Not by save_file, whose files only their owner can read, whatever the umask. And not over the old file, from which
    # the tensors may still be read.
    partial = directory / f"{TENSORS}.partial"
    partial.write_bytes(save(plain, metadata={"format": "pt"}))
    partial.replace(directory / TENSORS)
    write_checksums(directory, [directory / CONFIG, directory / TENSORS])


def write_config(directory: Path, method: Method, **origin: Unpack[Origin]) -> Path:
    """Write the file that describes the tensors of an adapter directory. Returns the path of the file."""
    base_model, head, words = origin["base_model"], origin.get("head"), origin.get("words")
    config = {
        "format": "rasa_train",
        "format_version": FORMAT_VERSION,
        **method.model_dump(exclude={"init_from"}),
        "base_model": base_model,
        "base_revision": origin["base_revision"],
        **({"base_tensors": dict(tensors)} if (tensors := origin.get("base_tensors")) else {}),
        **({"task": head.task} if head else {}),
        **({"embeddings": words.saved} if words else {}),
    }
    if (path := Path(base_model).expanduser()).is_dir() and str(path.absolute()) != base_model:
        config["base_path"] = str(path.absolute())
    write_text(directory / CONFIG, json.dumps(config, indent=2) + "\n")
    return directory / CONFIG


def write_tokenizer(directory: Path, model: ModelConfig) -> list[Path]:
    """Write the tokenizer of a recipe that names one of its own, or adds words, into the adapter's directory, with its
    chat template, so that merging and evaluating use it. Returns the files."""
    if (model.tokenizer is None and not model.add_tokens) or (tokenizer := load_tokenizer(model)) is None:
        return []
    tokenizer.save_pretrained(directory)
    return tokenizer_files(directory)


def tokenizer_files(directory: Path) -> list[Path]:
    """Return the files of the tokenizer in a directory; none if there is no whole tokenizer."""
    found = [directory / name for name in TOKENIZER if (directory / name).is_file()]
    return found if any(path.name in VOCABULARIES for path in found) else []


def read_adapter(directory: str | Path) -> SavedAdapter:
    """Read an adapter directory of any known format.

    Raises:
        UserError: the directory does not exist or holds no adapter, the method is unknown, or a file is damaged.
    """
    directory = Path(directory)
    config = _read_config(directory)
    if problem := damage(directory):
        raise UserError(
            f"the adapter in {directory} is damaged: {problem}. Restore it from a copy, or make it again; if its files "
            f"were changed on purpose, delete {CHECKSUMS} beside them"
        )
    saved = _read(directory, config)
    for name, tensor in saved.tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(f"the adapter in {directory} is damaged: {shown(name)} has values that are not finite")
    return saved


def damage(directory: Path) -> str | None:
    """Return which file of an adapter directory does not match its checksum; None if all do, or if the directory has no
    checksums, as those of PEFT and of older versions."""
    if not os.path.lexists(directory / CHECKSUMS):
        return None
    stored = [
        path.name for name in (TENSORS, PEFT_TENSORS) for path in directory.glob(f"{Path(name).stem}*.safetensors")
    ]
    return checksums.damage(directory, [CONFIG, *(stored or [TENSORS])], unread=OF_CHECKPOINTS)


def _read(directory: Path, config: dict[str, object]) -> SavedAdapter:
    if config.get("format") == "rasa_train":
        return _read_ours(directory, config)
    if "peft_type" in config:
        return _read_peft(directory, cast(PeftConfig, config))
    raise UserError(
        f"{directory / CONFIG} is not a config of rasa_train or of PEFT: it has no `format` and no `peft_type`"
    )


def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor], *, origin: str) -> None:
    """Copy ``tensors`` into the adapted ``model``. Names and shapes must match exactly.

    Raises:
        UserError: a tensor is missing, left over, or of another shape; ``origin`` names the source of the tensors.
    """
    present = saved_tensors(model)
    check_tensors({name: tuple(t.shape) for name, t in present.items()}, tensors, origin=origin)
    with torch.no_grad():
        for name, tensor in present.items():
            tensor.copy_(tensors[name])


def check_tensors(expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor], *, origin: str) -> None:
    """Raise ``UserError`` unless ``tensors`` has exactly the ``expected`` names and shapes, and only finite values."""
    missing = sorted(expected.keys() - tensors.keys())
    extra = sorted(name for name in tensors.keys() - expected.keys() if tensors[name].numel())  # the reference's may be
    if missing or extra:
        parts = [f"{len(m)} {what} (first: {m[0]})" for m, what in ((missing, "missing"), (extra, "left over")) if m]
        raise UserError(f"the adapter in {origin} does not fit this model and method; tensors: {', '.join(parts)}")
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != tuple(shape):
            raise UserError(
                f"the adapter in {origin} does not fit this model: {name} has shape {tuple(tensors[name].shape)}, "
                f"but the model needs {tuple(shape)}. Check that this is the base model that it was trained on."
            )
        if not torch.isfinite(tensors[name]).all():
            raise UserError(f"the adapter in {origin} is damaged: {name} has values that are not finite")


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Return all tensors of one file, or of all its parts (see ``part``), read from the disk as they are used.

    Raises:
        UserError: the file or a part is missing, damaged, or not a safetensors file.
    """
    if parts := sorted(path.parent.glob(f"{path.stem}-*-of-*{path.suffix}")):
        wanted = [part(path, i, len(parts)) for i in range(len(parts))]
        if parts != wanted or path.exists():
            raise UserError(
                f"{path} is stored in parts, and the parts are not complete: {', '.join(p.name for p in parts)}"
            )
        return {name: tensor for p in parts for name, tensor in _read_file(p).items()}
    return _read_file(path)


def part(path: Path, index: int, count: int) -> Path:
    """Return the path of part ``index`` (from 0) of a file that ``count`` workers write; for one worker, ``path``.

    ``adapter.safetensors`` -> ``adapter-00001-of-00002.safetensors``
    """
    return path if count == 1 else path.with_stem(f"{path.stem}-{index + 1:05d}-of-{count:05d}")


def _read_file(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        pickled = path.with_suffix(".bin")
        why = f"; {pickled.name} is a pickle, which is never opened" if pickled.is_file() else ""
        raise UserError(f"{path} does not exist{why}")
    with opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping


def _read_config(directory: Path) -> dict[str, object]:
    if not directory.is_dir():
        raise UserError(f"{directory} is not an adapter: there is no such directory")
    check_files(directory)
    try:
        return read_object(directory / CONFIG)
    except FileNotFoundError:
        raise UserError(f"{directory} is not an adapter: it has no {CONFIG}") from None


def _read_ours(directory: Path, config: dict[str, object]) -> SavedAdapter:
    if config.pop("format_version", None) != FORMAT_VERSION:
        raise UserError(f"{directory / CONFIG}: format_version must be {FORMAT_VERSION}; update rasa_train to read it")
    config.pop("format")
    base_model, base_revision = config.pop("base_model", None), config.pop("base_revision", None)
    base_tensors, base_path = config.pop("base_tensors", None) or {}, config.pop("base_path", None)
    head = Head.of_task(config.pop("task", None), f"{directory / CONFIG}: task")
    words = Words.of_saved(config.pop("embeddings", None), f"{directory / CONFIG}: embeddings")
    if not all(isinstance(value, str | None) for value in (base_model, base_revision, base_path)):
        raise UserError(f"{directory / CONFIG}: base_model, base_revision and base_path must be text")
    if not is_identity(base_tensors):
        raise UserError(f"{directory / CONFIG}: base_tensors must be an object of texts, got {base_tensors!r:.60}")
    method = _method(directory, str(config.get("method")), config)
    tensors = read_safetensors(directory / TENSORS)
    _check_ranks(directory, method.model_dump(), tensors)
    return SavedAdapter(
        directory,
        method,
        tensors,
        base_model,  # type: ignore[arg-type]
        base_revision,  # type: ignore[arg-type]
        base_tensors,
        base_path,  # type: ignore[arg-type]
        head,
        words,
    )


def _check_ranks(directory: Path, fields: Mapping[str, object], tensors: Mapping[str, Tensor]) -> None:
    """Raise ``UserError`` if a method asks for more ranks than any of its tensors has, before tensors of that size are
    made."""
    most = max([SMALL_RANK, *(size for tensor in tensors.values() for size in tensor.shape)])
    for key, value in fields.items():
        if type(value) is int and value > most and not key.endswith(("seed", "_every")):
            raise UserError(
                f"{directory / CONFIG}: {key} is {str(value)[:30]}, and no tensor of the adapter has more than {most} "
                "rows or columns: the files do not belong together"
            )


def _read_peft(directory: Path, config: PeftConfig) -> SavedAdapter:
    origin = f"{directory / CONFIG}"
    if refused := [key for key in PEFT_REFUSED if config.get(key)]:
        values = ", ".join(f"{key}={config.get(key)!r}" for key in refused)
        raise UserError(f"{origin}: {values} is not supported: the result would be another adapter")
    _check_peft_fields(origin, config)
    found = ((name, cls, cls.from_peft(config)) for name, cls in METHODS.items() if name != PEFT_METHOD)
    try:
        name, cls, fields = next((f for f in found if f[2] is not None), ("", Method, None))
    except MALFORMED as error:
        raise UserError(f"{origin} is not a complete PEFT config: {error!r}") from None
    if config.get("init_lora_weights", True) not in (True, False, "gaussian"):
        raise UserError(
            f"{origin}: init_lora_weights={config['init_lora_weights']!r} trains on a changed base; "
            "convert the adapter with PEFT's path_initial_model_for_weight_conversion first"
        )
    stored = read_safetensors(directory / PEFT_TENSORS)
    renamed = {key: cls.rename_peft(key.removeprefix("base_model.model.")) for key in stored}
    others = [key for key in PEFT_OTHERS if config.get(key) and key not in cls.reads_peft]
    # Sites are in layers, which are numbered.
    strange = [k for k, ours in renamed.items() if not ours or not re.search(rf"^{POOLS}\.|\.\d+\.", ours)]
    if fields is None or others or strange:
        return _as_peft(directory, config, stored, f"unexpected tensor {strange[0]!r}" if strange else "")
    fields["targets"], exactly = _targets(origin, config)
    method = _method(directory, name, {"method": name, **fields})
    _check_ranks(directory, method.model_dump(), stored)
    try:
        tensors = cls.convert_peft(config, {str(ours): stored[key].float() for key, ours in renamed.items()})
    except (*MALFORMED, re.error) as error:
        raise UserError(f"{origin} is not a complete PEFT config: {error!r}") from None
    if not exactly:
        paths = {key.rpartition(".")[0] for key in tensors if not key.startswith(f"{POOLS}.")}
        method = method.model_copy(update={"targets": sorted(paths)})
    return SavedAdapter(
        directory, method, tensors, config.get("base_model_name_or_path") or None, config.get("revision")
    )


def _check_peft_fields(origin: str, config: PeftConfig) -> None:
    """Raise ``UserError`` for values of another type than PEFT's, and for numbers that no adapter has."""
    kinds = {
        str | None: ("base_model_name_or_path", "revision", "peft_type"),
        str | list | None: ("target_modules", "exclude_modules", "target_parameters", "modules_to_save"),
        dict | None: ("rank_pattern", "alpha_pattern"),
    }
    for kind, keys in kinds.items():
        for key in keys:
            if not isinstance(value := config.get(key), kind):
                raise UserError(f"{origin}: {key} must be {str(kind).replace(' | None', '')}, got {value!r:.60}")
    values: dict[str, Any] = {**config}
    numbers = [(k, v) for k, v in config.items() if isinstance(v, int | float) and not k.endswith(("seed", "key"))]
    numbers += [(key, v) for key in ("rank_pattern", "alpha_pattern") for v in (values.get(key) or {}).values()]
    for key, value in numbers:
        if not isinstance(value, int | float) or not -LARGEST_NUMBER <= value <= LARGEST_NUMBER:
            raise UserError(f"{origin}: {key} must be a number of at most {LARGEST_NUMBER:,}, got {value!r:.60}")


def _targets(origin: str, config: PeftConfig) -> tuple[str | list[str], bool]:
    """Return the targets of a PEFT config, and whether they mean here what they mean to PEFT. A list of names does; a
    text is matched against other names, and further keys select some of the targets."""
    targets = config.get("target_modules") or []
    if parameters := config.get("target_parameters"):
        if isinstance(targets, str):
            raise UserError(f"{origin}: target_modules must be a list beside target_parameters, got {targets!r}")
        targets = [*targets, *(str(name).removesuffix(".weight") for name in parameters)]
    whole = isinstance(targets, list) and not any(config.get(key) for key in PEFT_PLACES)
    if isinstance(targets, list) and targets:
        return sorted(map(str, targets)), whole
    return "all-linear", whole


def _as_peft(directory: Path, config: PeftConfig, stored: Mapping[str, Tensor], why: str) -> SavedAdapter:
    """Return an adapter of which PEFT itself knows what it means: PEFT loads and merges it."""
    fields = METHODS[PEFT_METHOD].from_peft(config)
    if fields is None:
        raise UserError(f"{directory / CONFIG}: peft_type {config['peft_type']!r} is not supported{why and f': {why}'}")
    method = _method(directory, PEFT_METHOD, {"method": PEFT_METHOD, **fields})
    pattern: Any = config.get("rank_pattern") or {}
    ranks = [config.get("r"), *pattern.values()]
    _check_ranks(directory, {"r": max((r for r in ranks if isinstance(r, int)), default=0)}, stored)
    tensors = {name: tensor.float() for name, tensor in stored.items()}
    return SavedAdapter(
        directory, method, tensors, config.get("base_model_name_or_path") or None, config.get("revision")
    )


def _method(directory: Path, name: str, fields: dict[str, object]) -> Method:
    if name not in METHODS:
        raise UserError(
            f"{directory / CONFIG}: method must be one of {', '.join(METHODS)}, got {name!r}. Name the file or module "
            "of a method of your own in RASA_TRAIN_METHODS"
        )
    try:
        return METHODS[name].model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or first.get("ctx", {}).get("field", "")
        raise UserError(f"{directory / CONFIG}: {where}: {first['msg']}") from None
