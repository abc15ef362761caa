"""What a base's files say about it, checked before transformers builds anything from it.

transformers checks the types of a configuration that it knows. Sizes it takes as they are, and a configuration that
somebody else wrote can ask for ten million layers, each of which takes memory even on the meta device.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from ..errors import DeviceLost, Stopped, UserError, WorkerLost
from ..io.checkpoint_files import open_checkpoint
from ..io.json_file import read_object

T = TypeVar("T")

COUNTS = re.compile(r"^(num|n)_(?!positions|ctx|vocab)|(layers?|blocks?|experts?|heads?|labels)$")
"""Names of keys that count things, each of which becomes a module, or an entry of a list."""
MOST, MOST_COUNTED, MOST_LISTED = 2**40, 100_000, 10_000_000
"""The largest whole number in a ``config.json``, the largest that counts things, and the largest in a list, where it
may be a number of repetitions or a token."""
MODULES, MODULES_A_TENSOR = 10_000, 8
"""Modules that a model may have, whatever its weights, and in addition for each tensor in its files."""
UNKNOWN_MODULES = 300_000
"""Modules that a model may have whose weights are not here. The largest models have a third as many."""
ELEMENTS, SPARE = 4, 1 << 26
"""Values that a model may have for each value in its files, and in addition. Weights of which there are fewer are
missing, which is reported when the model is loaded; this bounds the memory that is taken until then."""
ARCHITECTURE, GENERATION, TOKENIZER = "config.json", "generation_config.json", "tokenizer_config.json"


def check_config(directory: Path) -> None:
    """Raise ``UserError`` if a configuration of a model's directory is damaged or has a number that no model has."""
    for name in (ARCHITECTURE, GENERATION, TOKENIZER):
        if (directory / name).is_file():
            values = read_object(directory / name)
            if name == ARCHITECTURE:
                _check_numbers(values, "", directory / name)


def _check_numbers(value: Any, key: str, path: Path, *, listed: bool = False) -> None:
    if isinstance(value, dict):
        for name, inner in value.items():
            _check_numbers(inner, str(name), path)
    elif isinstance(value, list):
        for inner in value:
            _check_numbers(inner, key, path, listed=True)
    elif isinstance(value, int) and not isinstance(value, bool):
        most = MOST_COUNTED if COUNTS.search(key) else MOST_LISTED if listed else MOST
        if abs(value) > most:
            raise UserError(f"{path}: {key} must be at most {most:,}, got {str(value)[:30]}")
        if value < 0 and re.search(r"^(num|n)_.*(layers?|heads)$", key):
            raise UserError(f"{path}: {key} must not be negative, got {value}")


@contextmanager
def bounded_modules(name: str, sizes: list[int] | None) -> Iterator[None]:
    """Build a model inside the block; one with far more modules than its files have tensors is refused amid its
    construction.

    Args:
        name: the base, for the message.
        sizes: the sizes of the tensors in its files; None if they are not here.
    Raises:
        UserError: the model would have too many modules.
    """
    tensors = None if sizes is None else len(sizes)
    most = UNKNOWN_MODULES if tensors is None else MODULES + MODULES_A_TENSOR * tensors
    count = 0

    def counted(*_: object) -> None:
        nonlocal count
        count += 1
        if count > most:
            files = "" if tensors is None else f", and its files hold {tensors} tensors"
            raise UserError(
                f"model.name: the config.json of {name} describes a model of more than {most:,} modules{files}: "
                "correct its numbers of layers and experts, or give a whole checkpoint",
                key="model.name",
            )

    handle = register_module_module_registration_hook(counted)
    try:
        yield
    finally:
        handle.remove()


def stored_sizes(directory: Path) -> list[int] | None:
    """Return the number of values of each tensor in a model's directory, from the headers of its files; None for one
    that has no weights. Raises ``UserError`` if the files are damaged."""
    if not any(directory.glob("*.safetensors")):
        return None
    return [torch.Size(tensor.shape).numel() for tensor in open_checkpoint(directory).tensors.values()]


def check_sizes(model: nn.Module, name: str, sizes: list[int]) -> None:
    """Raise ``UserError`` if a model on the meta device would take far more memory than the values in its files do."""
    wanted = sum(t.numel() for t in {id(t): t for t in (*model.parameters(), *model.buffers())}.values())
    if wanted > ELEMENTS * sum(sizes) + SPARE:
        raise UserError(
            f"model.name: the config.json of {name} describes a model of {wanted:,} values, and its files hold "
            f"{sum(sizes):,}: it is not the config.json of these weights",
            key="model.name",
        )


def reading(load: Callable[[], T], refuse: Callable[[str], UserError]) -> T:
    """Return ``load()``, which lets another library read files that somebody else wrote. Whatever that library raises,
    files are at fault: a value of another type is a ``TypeError`` there as often as a ``ValueError``.

    Raises:
        UserError: ``refuse`` of the first 400 characters of the error.
    """
    try:
        return load()
    except (UserError, Stopped, DeviceLost, WorkerLost):
        raise
    except Exception as error:
        kind = "" if isinstance(error, OSError | ValueError | ImportError) else f"{type(error).__name__}: "
        raise refuse(f"{kind}{' '.join(str(error).split())}"[:400]) from error
