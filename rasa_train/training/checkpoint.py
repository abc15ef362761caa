"""Checkpoints. The directory of a checkpoint exists whole or not at all, and is read only if every byte is right.

A checkpoint is an adapter directory (so it can be merged and evaluated) plus ``optimizer.safetensors``, whose
tensors are keyed by the adapter's names, and ``trainer.json``. All workers write the large files together: each writes
a part (``optimizer-00001-of-00008.safetensors``) with whole tensors in it, so any number of workers can read the parts.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn

from ..adapters.saved import CONFIG, TENSORS, check_tensors, part, read_safetensors, write_config, write_tokenizer
from ..data.cache import TokenDataset
from ..distributed.collectives import from_first, gather
from ..distributed.engine import Engine
from ..errors import UserError
from ..io import checksums
from ..io.atomic import remove, write_json
from ..io.checksums import CHECKSUMS, sha256
from ..io.json_file import field, read_object
from ..io.run_dir import numbered
from ..io.tensor_file import TensorFile
from ..models.words import words_of
from .best import Watched, superseded
from .evaluation import Scores, with_score
from .trainable_model import TrainableModel

if TYPE_CHECKING:
    from accelerate import Accelerator

OPTIMIZER, RULE, TRAINER = "optimizer.safetensors", "rule.safetensors", "trainer.json"


@dataclass(frozen=True)
class Progress:
    """Progress of a run, with what its summary says of the steps so far: lines of the metrics may be lost. ``step`` is
    the number of optimizer steps done."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    seconds: float = 0.0
    skipped: int = 0
    loss: float | None = None
    """Loss of the last step that was not skipped."""
    validation_loss: float | None = None
    peak_memory_bytes: int = 0
    """Value at the last step; 0 in the checkpoints of older versions, which do not hold the fields from ``skipped``."""
    evaluation: Scores | None = None
    """Best and last score of ``training.evaluate``."""
    validation_loss_by_dataset: dict[str, float] | None = None
    watched: Watched | None = None
    """What ``training.keep_best`` has shown."""

    def after(self, batch: np.ndarray, data: TokenDataset, seconds: float) -> Progress:
        """Return the progress after one more step; ``batch`` holds the indices of its examples."""
        return replace(
            self,
            step=self.step + 1,
            samples=self.samples + len(batch),
            tokens=self.tokens + int(data.lengths[batch].sum()),
            supervised_tokens=self.supervised_tokens + int(data.supervised[batch].sum()),
            seconds=self.seconds + seconds,
        )

    def noted(self, row: Mapping[str, Any]) -> Progress:
        """Return the progress with what a step's row of the metrics adds to the summary."""
        return replace(
            self,
            skipped=self.skipped + row.get("skipped", 0),
            loss=self.loss if row.get("loss") is None else row["loss"],
            validation_loss=row.get("validation_loss"),
            validation_loss_by_dataset=row.get("validation_loss_by_dataset"),
            peak_memory_bytes=row.get("peak_memory_bytes", self.peak_memory_bytes),
            evaluation=with_score(self.evaluation, row),
        )


def directory_name(step: int) -> str:
    return f"step-{step:08d}"


def save(model: TrainableModel, checkpoints: Path, progress: Progress, data_key: str) -> Path:
    """Write ``checkpoints/step-XXXXXXXX`` beside its final place, flush it to disk and rename it. Every worker must
    call it, because each contributes its part of the tensors. The first worker writes the tensors or, if base weights
    are trained, each worker writes a share of them."""
    engine, rule_state = model.engine, model.rule_state
    accelerator = engine.accelerator
    final, first = checkpoints / directory_name(progress.step), accelerator.is_main_process
    writers = accelerator.num_processes if model.trains_base else 1

    def write(directory: Path) -> list[Path]:
        written = write_adapter(model, directory, writers)
        keys = {key for state in engine.optimizer.state.values() for key in state}
        names = [f"{key}:{name}" for key in keys for name in model.parameters]
        state = engine.gathered_optimizer(model.parameters)
        written += write_tensors(directory / OPTIMIZER, state, names, accelerator, writers)
        if first and rule_state:
            save_file({n: t.cpu().contiguous() for n, t in rule_state.items()}, directory / RULE)
            written.append(directory / RULE)
        if first:
            write_json(directory / TRAINER, {**asdict(progress), "data_key": data_key})
            written.append(directory / TRAINER)
        return written

    write_directory(final, write, engine)
    return final


def write_adapter(model: TrainableModel, directory: Path, writers: int = 1) -> list[Path]:
    """Write the current adapter, tensor by tensor. Every worker must call it. Returns the files this worker wrote."""
    accelerator, base, written = model.engine.accelerator, model.recipe.model, list[Path]()
    if accelerator.is_main_process:
        config = write_config(
            directory,
            model.recipe.adapter,
            base_model=base.name,
            base_revision=base.revision,
            base_tensors=model.base_identity,
            head=model.head,
            words=words_of(model.module),
        )
        written += [config, *write_tokenizer(directory, base)]
    tensors = model.engine.gathered(model.saved_tensors, model.shapes)
    return written + write_tensors(directory / TENSORS, tensors, model.shapes, accelerator, writers)


def write_tensors(
    path: Path,
    tensors: Iterable[tuple[str, Tensor]],
    names: Iterable[str],
    accelerator: Accelerator,
    writers: int = 1,
) -> list[Path]:
    """Write ``tensors`` as they come. Every worker must call it, because each tensor is gathered from all of them.

    Args:
        names: names of the tensors that may come.
        writers: number of workers, from the first, that each write a part of the file.
    Returns:
        The file that this worker has written, if any.
    """
    me, sizes = accelerator.process_index, [0] * writers
    mine = [part(path, me, writers)] if me < writers else []
    with TensorFile(mine[0], names) if mine else nullcontext() as file:
        for name, tensor in tensors:
            owner = sizes.index(min(sizes))
            sizes[owner] += tensor.nbytes
            if file is not None and owner == me:
                file.add(name, tensor)
    return mine


def write_directory(final: Path, write: Callable[[Path], list[Path]], engine: Engine) -> None:
    """Fill a directory with ``write``, add its checksums and move it to ``final``, replacing any directory there. Every
    worker must call it; ``write`` returns the files that the worker has written.

    Raises:
        OSError: on every worker, if writing failed on one. This does not hold where workers hold parts of the tensors:
            a worker that fails while tensors are exchanged cannot tell the others, which then lose it.
    """
    accelerator = engine.accelerator
    beside, first = final.with_name(f".{final.name}.partial"), accelerator.is_main_process
    failed: OSError | None = None
    mine: dict[str, str] = {}
    try:
        if first:
            remove(beside)
            beside.mkdir(parents=True)
    except OSError as error:
        failed = error
    raise_everywhere(accelerator, failed)
    try:
        try:
            for path in write(beside):
                mine[path.name] = sha256(path)
                _fsync(path)
        except OSError as error:
            if engine.sharded and accelerator.num_processes > 1:
                raise
            failed = error
        raise_everywhere(accelerator, failed)
        every = gather(accelerator, mine)
        try:
            if first:
                write_json(beside / CHECKSUMS, {name: sums[name] for sums in every for name in sorted(sums)})
                _fsync(beside)
                replaced = final.with_name(f".{final.name}.replaced")
                remove(replaced)
                if final.exists() or final.is_symlink():
                    final.rename(replaced)
                beside.rename(final)
                _fsync(final.parent)
                remove(replaced)
        except OSError as error:
            failed = error
        raise_everywhere(accelerator, failed)
    finally:
        if first:
            shutil.rmtree(beside, ignore_errors=True)


def raise_everywhere(accelerator: Accelerator, failed: OSError | None) -> None:
    """Raise on all workers the error of the lowest rank that ``failed``, if any. Every worker must call it."""
    mine = (
        None if failed is None else (failed.errno, failed.strerror or str(failed), str(failed.filename or "") or None)
    )
    for rank, words in enumerate(gather(accelerator, mine)):
        if words is not None:
            raise failed if failed and rank == accelerator.process_index else OSError(*words)


def newest(checkpoints: Path, warn: Callable[[str], None]) -> Path | None:
    """Return the newest checkpoint whose files all match their checksums; ``warn`` names each damaged newer one."""
    for path in reversed(numbered(checkpoints)):
        problem = damage(path)
        if problem is None:
            return path
        warn(f"checkpoint {path.name} is damaged ({problem}); it is passed over for the one before")
    return None


def agreed_newest(checkpoints: Path, warn: Callable[[str], None], accelerator: Accelerator) -> Path | None:
    """Return the first worker's ``newest``. Raises ``UserError`` on any other worker that cannot see it."""
    mine = newest(checkpoints, warn) if accelerator.is_main_process else None
    name = from_first(accelerator, mine and mine.name)
    found = checkpoints / name if name else None
    if found and not (found / TRAINER).is_file():
        raise UserError(
            f"output_dir: worker {accelerator.process_index} does not see {found}; all nodes must share its file "
            "system (at the same path)",
            key="output_dir",
        )
    return found


def damage(path: Path) -> str | None:
    """Return what is wrong with a checkpoint, or None if it is undamaged."""
    stored = [file.name for file in path.glob("*.safetensors")]
    kinds = {
        stem: any(re.fullmatch(rf"{stem}(-\d+-of-\d+)?", name[: -len(".safetensors")]) for name in stored)
        for stem in (Path(TENSORS).stem, Path(OPTIMIZER).stem)
    }
    if lacking := [stem for stem, there in kinds.items() if not there]:
        return f"{lacking[0]}.safetensors is missing"
    return checksums.damage(path, [CONFIG, TRAINER, *stored])


def load_progress(path: Path, *, data_key: str) -> Progress:
    """Return the progress at a checkpoint. Raises ``UserError`` if its run used data with another ``data_key``, or if
    the file is not one that ``save`` writes."""
    values, where = read_object(path / TRAINER), path / TRAINER
    if field(values, "data_key", str, where) != data_key:
        raise UserError(
            f"{path}: this run was started on data that has changed since; choose another output_dir, or start over "
            "with --fresh",
            key="data.dataset",
        )
    try:
        progress = TypeAdapter(Progress).validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{where}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    if directory_name(progress.step) != path.name:
        raise UserError(f"{where}: step must be that of {path.name}, got {progress.step}")
    return progress


def prune(checkpoints: Path, keep_last: int | None, due: Callable[[int], bool]) -> None:
    """Remove the checkpoints that are ``superseded``."""
    for path in superseded(checkpoints, keep_last, due):
        removed = path.with_name(f".{path.name}.removed")
        remove(removed)
        path.rename(removed)  # a process that is killed here leaves no half of a checkpoint
        remove(removed)


def load_optimizer(path: Path, model: TrainableModel) -> None:
    """Restore the state in ``optimizer.safetensors``, whatever engine and number of workers wrote it. Raises
    ``UserError`` if the state is not of this model's parameters."""
    states: dict[nn.Parameter, dict[str, Tensor]] = {parameter: {} for parameter in model.parameters.values()}
    for name, tensor in read_safetensors(path / OPTIMIZER).items():
        key, _, parameter = name.partition(":")
        if parameter not in model.parameters or tuple(tensor.shape) not in ((), model.shapes[parameter]):
            raise UserError(
                f"{path} does not fit this run: {OPTIMIZER} holds {name!r:.100} of shape {tuple(tensor.shape)}"
            )
        states[model.parameters[parameter]][key] = tensor
    model.engine.load_optimizer_state(states)


def load_rule_state(path: Path, state: Mapping[str, Tensor]) -> None:
    """Restore the buffers of the method's own rule, in place. Raises ``UserError`` if the file does not fit."""
    saved = read_safetensors(path / RULE) if state else {}
    check_tensors({name: tuple(buffer.shape) for name, buffer in state.items()}, saved, origin=str(path))
    for name, buffer in state.items():
        buffer.copy_(saved[name])


def digest(text: str) -> str:
    """Return a short digest of ``text``, for comparison."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
