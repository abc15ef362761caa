"""Checkpoints on disk, one tensor at a time: read from safetensors files, written to new ones.

Memory use stays near the size of one tensor whatever the size of the model: files are read by offset (every touched
page of a mapped file would count as memory), and written header first, then tensor after tensor.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO, NotRequired, TypedDict, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import UserError
from .json_file import read_object

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The dtypes that can be merged, by their safetensors code. Tensors of any other dtype are only copied."""
CODES = {dtype: code for code, dtype in FLOATS.items()}
CHUNK = 16 << 20
"""Number of bytes copied at a time."""


class Index(TypedDict):
    """The content of the file that says which file holds which tensor."""

    metadata: NotRequired[dict[str, object] | None]
    weight_map: dict[str, str]


@dataclass(frozen=True, slots=True)
class Stored:
    """The header entry of one tensor in a file."""

    name: str
    dtype: str
    """Safetensors code, such as ``BF16``."""
    shape: tuple[int, ...]
    path: Path
    start: int
    """Offset in the file, in bytes."""
    nbytes: int

    def read(self) -> Tensor:
        """Return the values in newly allocated memory. Only for dtypes in ``FLOATS``."""
        data = bytearray(self.nbytes)
        with _reading(self.path), self.path.open("rb", buffering=0) as file:
            _read_into(file, self.start, memoryview(data))
        dtype = FLOATS[self.dtype]
        return (torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)).view(self.shape)

    def blocks(self, rows: int) -> Iterator[tuple[slice, Tensor]]:
        """Yield a matrix in blocks of ``rows`` rows: the slice of the rows, and their values, which are valid until the
        next block is read."""
        height, width = self.shape
        dtype = FLOATS[self.dtype]
        data = bytearray(min(rows, height) * width * dtype.itemsize)
        with self.path.open("rb", buffering=0) as file:
            for start in range(0, height, rows):
                some = slice(start, min(start + rows, height))
                part = memoryview(data)[: (some.stop - start) * width * dtype.itemsize]
                with _reading(self.path):
                    _read_into(file, self.start + start * width * dtype.itemsize, part)
                yield some, torch.frombuffer(part, dtype=dtype).view(-1, width)

    def copy_to(self, out: BinaryIO) -> None:
        """Append the bytes to ``out`` unchanged."""
        buffer = memoryview(bytearray(min(CHUNK, self.nbytes)))
        with self.path.open("rb", buffering=0) as file:
            for start in range(0, self.nbytes, CHUNK):
                part = buffer[: min(CHUNK, self.nbytes - start)]
                with _reading(self.path):
                    _read_into(file, self.start + start, part)
                out.write(part)


@dataclass(frozen=True)
class Checkpoint:
    """The safetensors files of a model directory: their headers, read and checked, without any values in memory."""

    directory: Path
    files: dict[str, list[Stored]]
    """Tensors of each file, in the order of their offsets."""
    metadata: dict[str, dict[str, str]]
    """``__metadata__`` of each file."""
    index: Index | None
    """None for a model in a single file."""

    @property
    def tensors(self) -> dict[str, Stored]:
        return {tensor.name: tensor for tensors in self.files.values() for tensor in tensors}


def open_checkpoint(directory: Path) -> Checkpoint:
    """Read the headers of ``model.safetensors``, or of the files that the index names.

    Raises:
        UserError: there are no weights, a file is missing or damaged, or the index does not fit the files.
    """
    if (directory / SINGLE).is_file():
        names, index = [SINGLE], None
    elif (directory / INDEX).is_file():
        index = read_index(directory / INDEX)
        names = sorted(set(index["weight_map"].values()))
    else:
        raise UserError(
            f"{directory} has no {SINGLE} and no {INDEX}: the base must be a transformers model in safetensors files "
            "(if it has weights in another format, load it once and save it with `save_pretrained`)"
        )
    files, metadata = {}, {}
    for name in names:
        files[name], metadata[name] = read_header(directory / name)
    checkpoint = Checkpoint(directory, files, metadata, index)
    if index is not None:
        _check_index(checkpoint, index)
    return checkpoint


def read_index(path: Path) -> Index:
    """Read the index of a model in several files. Raises ``UserError`` if the index is damaged or names files in
    another directory."""
    try:
        index = read_object(path)
    except FileNotFoundError:
        raise UserError(f"{path} cannot be read: there is no such file") from None
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{path} is not an index of safetensors files: it has no `weight_map`")
    for name in weight_map.values():
        # A file name, never a path: an index must not make the reader leave its directory.
        if not isinstance(name, str) or os.path.basename(name) != name or not name.endswith(".safetensors"):
            raise UserError(f"{path}: `weight_map` must name *.safetensors files beside it, got {name!r:.100}")
    if not isinstance(index.get("metadata"), dict | None):
        raise UserError(f"{path}: `metadata` must be an object, got {index['metadata']!r:.60}")
    return cast(Index, index)


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Open a safetensors file as ``safe_open`` does. Raises ``UserError`` if the file cannot be read or is damaged."""
    try:
        path.open("rb").close()  # safe_open reports a file that it may not read as missing
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is damaged or not a safetensors file: {error}") from None


def read_header(path: Path) -> tuple[list[Stored], dict[str, str]]:
    """Return the tensors and the metadata of one file. Raises ``UserError`` if the file is missing or damaged."""
    if not path.is_file():
        raise UserError(f"{path} does not exist: the base model is incomplete")
    with opened(path):  # checks offsets, dtypes and the length of the file
        pass
    with _reading(path), path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    metadata = header.pop("__metadata__", {})
    tensors = []
    for name, entry in header.items():
        start, end = (8 + length + offset for offset in entry["data_offsets"])
        tensors.append(Stored(name, entry["dtype"], tuple(entry["shape"]), path, start, end - start))
    return sorted(tensors, key=lambda t: t.start), metadata


def write_tensors(
    path: Path,
    tensors: Iterable[tuple[str, str, tuple[int, ...], int]],
    write: Callable[[str, BinaryIO], None],
    metadata: Mapping[str, str] | None = None,
) -> int:
    """Write a safetensors file without ever holding all of its tensors in memory.

    Args:
        tensors: (name, dtype code, shape, number of bytes) of every tensor, in the order in which they are written.
        write: called with each name in that order; must append exactly the bytes of that tensor to the file.
        metadata: ``__metadata__`` of the file.
    Returns:
        Size of the file in bytes.
    """
    header: dict[str, object] = {"__metadata__": {**(metadata or {}), "format": "pt"}}
    ends, end = [], 0
    for name, dtype, shape, nbytes in tensors:
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + nbytes]}
        end += nbytes
        ends.append((name, end))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, end in ends:
            write(name, file)
            if file.tell() != 8 + len(text) + end:
                raise RuntimeError(f"{name}: the number of bytes written differs from the header")
    return 8 + len(text) + end


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the values as safetensors stores them, without a copy if the tensor is contiguous."""
    values = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(values)  # type: ignore[arg-type]


def _check_index(checkpoint: Checkpoint, index: Index) -> None:
    path, listed = checkpoint.directory / INDEX, index["weight_map"]
    for file, tensors in checkpoint.files.items():
        for tensor in tensors:
            if listed.get(tensor.name) != file:
                where = f"lists it in {listed[tensor.name]}" if tensor.name in listed else "does not list it"
                raise UserError(f"{path} does not fit the files: {file} holds {tensor.name!r}, but the index {where}")
    absent = sorted(listed.keys() - checkpoint.tensors.keys())
    if absent:
        raise UserError(
            f"{path} does not fit the files: {absent[0]!r} is not in {listed[absent[0]]} ({len(absent)} in all)"
        )


def _read_into(file: FileIO, start: int, data: memoryview) -> None:
    file.seek(start)
    done = 0
    while done < len(data):
        n = file.readinto(data[done:])
        if not n:
            raise OSError("the file ends before its last tensor")
        done += n


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Report errors while reading a base file to the user, so that they are not mistaken for a full disk."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
