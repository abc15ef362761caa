"""Fold an adapter into its base: an ordinary Hugging Face checkpoint, written file by file.

A merge that was killed continues, when it is run again, after the files that it had finished. It needs memory for a few
tensors, whatever the size of the model.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from .. import __version__, process
from ..errors import UserError
from ..io import json_file
from ..io.atomic_dir import new_directory
from ..io.checkpoint_files import INDEX, Checkpoint, open_checkpoint
from ..io.run_dir import RunDirectory
from ..models.classifier import head_parameters
from ..models.task import Head
from ..models.words import rows_after, set_vocabulary
from . import head
from .calibrate import data_of, measured
from .folding import QUANTISED, Folding, dtype_name
from .names import locate
from .options import WRITING, Base, Progress, Rounding, Writing
from .rounding import NARROW
from .small_files import copy_small_files, copy_tokenizer
from .source import Adapters, Source, architecture, open_source
from .tally import Tally

FINISHED = ".finished.json"
"""File in an unfinished output directory that lists the complete files on the disk, with their tallies."""
BYTES_A_VALUE = 10
"""Bytes of memory that folding takes for each value of a tensor: W and dW in fp32, and the stored value that is read or
written."""
MEMORY = 1_200_000_000
"""Bytes that all threads together may take for tensors; the number of threads is chosen to stay below it where
possible."""


@dataclass(frozen=True)
class MergeReport:
    """Result of a merge."""

    output: str
    format: str
    method: str
    base_model: str
    base_checked: bool
    """Whether the base is known to be the one that the adapter was trained on."""
    tensors: int
    """Number of tensors in the output."""
    adapted: int
    """Number of weights and biases that the adapter changes or adds."""
    bytes: int
    """Size of the safetensors files."""
    seconds: float
    rounding: float | None
    """norm(stored - (W + dW)) / norm(dW) over all adapted weights: the share of the update that is lost by rounding to
    the output's dtype. 0 for fp32; None when the update is zero."""
    rounding_method: str = "nearest"
    """How W + dW was rounded: ``nearest`` or ``aware``."""
    aware_tensors: int = 0
    """Number of tensors in which ``aware`` differs from nearest."""
    directions: int = 0
    """Largest number of directions along which the error of such a tensor was kept small."""
    tokenizer: str | None = None
    """Directory of the adapter that the tokenizer is from; None for the base's tokenizer."""
    left_out: list[str] = field(default_factory=list)
    """Names of files beside the base's weights that are not copied, because they are no part of a model or are links
    out of the base's directory."""

    @property
    def lost(self) -> list[str]:
        """What rounding lost, in words, one line each."""
        if self.rounding is None:
            return ["the update is zero: the output is the base"]
        lines = [f"rounding to the output's dtype loses {self.rounding:.2%} of the update, by norm"]
        if self.aware_tensors:
            lines.append(
                f"{self.aware_tensors} tensors are rounded with error feedback along up to {self.directions} "
                "directions, where errors matter: the norm says little, and --verify shows the KL divergence"
            )
        elif self.rounding_method == "aware":
            lines.append("no tensor gains by error feedback: all are rounded to nearest")
        return lines if self.rounding else lines[1:]


def merge(
    adapter: Adapters,
    output: str | Path,
    *,
    base: str | Base | None = None,
    dtype: torch.dtype | None = None,
    threads: int | None = None,
    writing: Writing = WRITING,
) -> MergeReport:
    """Fold the adapter into the base and write the result to the directory ``output``.

    Args:
        adapter: an adapter directory or a run directory; or several as (directory, weight), whose weighted updates
            are summed.
        base: the base, or its name (hub id or directory). Default: the base that the adapter names.
        dtype: dtype of all floating-point tensors of the output. Default: the dtype of each tensor in the base.
        threads: number of files written at a time. Default: the number of processors, or fewer where tensors are so
            large that memory would exceed 2 GB.
        writing: how the directory is written; progress is in bytes read.
    Raises:
        UserError: the adapter does not fit, files are damaged, values are not finite, or ``output`` cannot be
            written. ``output`` is then unchanged.
    """
    start = time.perf_counter()
    source = open_source(adapter, base, weights=True)
    checkpoint = open_checkpoint(source.directory)
    config = _read_config(source.directory)
    aware = writing.rounding.method == "aware"
    folding = Folding(source, checkpoint, dtype, aware=aware)
    if aware:
        _check_rounded(folding)
        if writing.rounding.rows is not None:
            data_of(writing.rounding)
    nbytes = sum(folding.stored_bytes(t) for t in checkpoint.tensors.values()) + folding.added_bytes
    tick = _ticker(writing.progress, sum(t.nbytes for t in checkpoint.tensors.values()))
    read = [source.directory, *source.origins]
    key = _key(source, checkpoint, dtype, writing.rounding)
    with new_directory(Path(output), overwrite=writing.overwrite, inputs=read, nbytes=nbytes, key=key) as partial:
        folding.measured = measured(source, writing.rounding) if writing.rounding.rows else None
        tallies = _write_files(folding, partial, threads or _threads(folding), tick)
        if checkpoint.index is not None:
            index = checkpoint.index
            files = {folding.names[n]: file for n, file in index["weight_map"].items() if n in folding.names}
            index["weight_map"] = files | {name: file for file, added in folding.added.items() for name in added}
            index["metadata"] = {**(index.get("metadata") or {}), "total_size": nbytes}
            (partial / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        left_out = copy_small_files(source.directory, partial)
        tokenizer = copy_tokenizer(source, partial)
        if dtype is not None or folding.switches or source.head or source.words:
            _switch(config, folding.switches)
            if source.head:
                head.describe(config, source.model)
            if rows := rows_after(source.model):
                set_vocabulary(config, rows)
            if dtype is not None:
                _set_dtype(config, dtype_name(dtype))
            (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    report = _report(str(output), folding, [*tallies, folding.of_added], time.perf_counter() - start)
    return replace(report, rounding_method=writing.rounding.method, tokenizer=tokenizer, left_out=left_out)


def _check_rounded(folding: Folding) -> None:
    """Raise ``UserError`` if the output has no dtype in which error feedback counts."""
    dtypes = folding.rounded_dtypes
    if not dtypes & set(NARROW):
        found = ", ".join(sorted(map(dtype_name, dtypes))) or "float32"
        raise UserError(
            f"--rounding aware: the merged weights are {found}, in which next to nothing is rounded away; leave the "
            "option out, or add --dtype bfloat16 or float16"
        )


def check_base(directory: Path, classifier: Head | None = None) -> None:
    """Open a base as ``merge`` does: with the head of a ``classifier``, if it is one, which may have another shape in
    the files. Raises ``UserError`` if a merge would refuse the base, whatever the adapter."""
    checkpoint = open_checkpoint(directory)
    model = architecture(directory, classifier)
    replaced = head_parameters(model)
    found = locate(model, {name: tensor.shape for name, tensor in checkpoint.tensors.items()})
    for name, piece in found.items():
        shape = tuple(model.state_dict()[piece.parameter].shape)
        if piece.whole and piece.parameter not in replaced and checkpoint.tensors[name].shape != shape:
            raise UserError(
                f"base model: {name} in {directory} has shape {checkpoint.tensors[name].shape}, but config.json gives "
                f"{shape}: they do not belong to one model"
            )


def _report(output: str, folding: Folding, tallies: Sequence[Tally], seconds: float) -> MergeReport:
    source = folding.source
    directions = [n for tally in tallies for n in tally.aware.values()]
    update2, error2 = (sum(getattr(tally, name) for tally in tallies) for name in ("update2", "error2"))
    return MergeReport(
        output=output,
        format="merged",
        method=source.label,
        base_model=source.base,
        base_checked=source.checked,
        tensors=len(folding.names) + sum(map(len, folding.added.values())),
        adapted=folding.adapted,
        bytes=sum(tally.bytes for tally in tallies),
        seconds=round(seconds, 3),
        rounding=math.sqrt(error2 / update2) if update2 else None,
        aware_tensors=len(directions),
        directions=max(directions, default=0),
    )


def _write_files(folding: Folding, partial: Path, threads: int, tick: Callable[[int], None]) -> list[Tally]:
    """Write the files that are not finished yet, several at a time, and record each file once it is on the disk."""
    note, lock, stopped = partial / FINISHED, threading.Lock(), threading.Event()
    finished = _finished(note)

    def counted(nbytes: int) -> None:
        if stopped.is_set():
            raise _StoppedError
        with lock:
            tick(nbytes)

    def write(file: str) -> Tally:
        if file in finished and (partial / file).is_file() and (partial / file).stat().st_size == finished[file].bytes:
            counted(sum(tensor.nbytes for tensor in folding.checkpoint.files[file]))
            return finished[file]
        try:
            tally = folding.write(file, partial / file, counted)
        except BaseException:
            stopped.set()
            raise
        with (partial / file).open("rb") as written:
            os.fsync(written.fileno())
        with lock:
            finished[file] = tally
            beside = note.with_suffix(".partial")
            beside.write_text(json.dumps({name: asdict(each) for name, each in finished.items()}))
            beside.replace(note)
        return tally

    if threads == 1:
        return [write(file) for file in folding.checkpoint.files]
    # Each thread of the pool gets its share of torch's threads: with more, the files would wait for each other.
    before, share = torch.get_num_threads(), max(process.cores() // threads, 1)
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(share,)) as pool:
        futures = [pool.submit(write, file) for file in folding.checkpoint.files]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        except BaseException:  # Ctrl-C
            stopped.set()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(before)
    for future in futures:
        if not future.cancelled() and (error := future.exception()) and not isinstance(error, _StoppedError):
            raise error
    return [future.result() for future in futures]


def _finished(note: Path) -> dict[str, Tally]:
    """Return the files that a killed merge had finished; none if its note is absent or damaged."""
    try:
        noted = json_file.read_object(note)
        tallies = {file: json_file.field(noted, file, dict, note) for file in noted}
        return {
            file: Tally(
                json_file.field(tally, "bytes", int, note),
                json_file.field(tally, "update2", float, note),
                json_file.field(tally, "error2", float, note),
                json_file.field(tally, "aware", dict, note),
            )
            for file, tally in tallies.items()
        }
    except (FileNotFoundError, UserError):
        return {}


class _StoppedError(Exception):
    """Raised to stop writing a file because another file could not be written."""


def _threads(folding: Folding) -> int:
    fit = MEMORY // (BYTES_A_VALUE * max(folding.largest, 1))
    return int(max(1, min(process.cores(), len(folding.checkpoint.files), fit)))


def _key(source: Source, checkpoint: Checkpoint, dtype: torch.dtype | None, rounding: Rounding) -> str:
    """Return a hash of everything that determines the files of a merge: names, sizes and modification times of the
    inputs, the dtype of the output, how it is rounded, the method, and the version of this package."""
    paths = [source.directory / file for file in checkpoint.files]
    paths += [path for origin in source.origins for path in sorted(origin.iterdir())]
    if rounding.rows:
        paths += [path for path in (rounding.file, rounding.run and RunDirectory(rounding.run).recipe) if path]
    stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    options = [source.label, str(dtype), rounding.method, rounding.rows]
    return hashlib.sha256(json.dumps([__version__, options, stats]).encode()).hexdigest()


def _ticker(progress: Progress | None, total: int) -> Callable[[int], None]:
    done = 0

    def tick(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress is not None:
            progress(done, total)

    return tick


def _read_config(base_dir: Path) -> dict[str, object]:
    config = json_file.read_object(base_dir / "config.json")
    if config.get("quantization_config"):
        raise UserError(f"{base_dir} has a quantization_config: {QUANTISED}")
    return config


def _switch(config: dict[str, object], switches: Mapping[str, bool]) -> None:
    """Set switches in the contents of a ``config.json``, and wherever a nested config has the same switch."""
    for value in config.values():
        if isinstance(value, dict):
            _switch(value, {name: on for name, on in switches.items() if name in value})
    config |= switches


def _set_dtype(config: dict[str, object], dtype: str) -> None:
    """Set the new dtype in the contents of a ``config.json``, nested configs included."""
    for key, value in config.items():
        if key in ("dtype", "torch_dtype") and isinstance(value, str):
            config[key] = dtype
        elif isinstance(value, dict):
            _set_dtype(value, dtype)
    if "model_type" in config and "torch_dtype" not in config:
        config["dtype"] = dtype
