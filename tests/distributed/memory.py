"""What two workers hold while a base is read, divided and saved under full fine-tuning, in bytes of this process.

    torchrun --standalone --nproc_per_node=2 -m tests.distributed.memory RECIPE.json

Writes ``memory-<rank>.json`` to the output_dir: the most that was held, above what was held before, by phase.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import LlamaForCausalLM  # noqa: F401 - so that its code is not counted

from rasa_train import process
from rasa_train.data.batching import with_targets
from rasa_train.distributed import rendezvous
from rasa_train.distributed.choose import make_engine
from rasa_train.io.run_dir import RunDirectory
from rasa_train.recipe.schema import Recipe
from rasa_train.training import checkpoint
from rasa_train.training.checkpoint import Progress
from rasa_train.training.micro_batches import on_device
from rasa_train.training.trainable_model import TrainableModel

torch.set_num_threads(1)


def held(field: str) -> int:
    """``VmRSS`` now, or ``VmHWM``: the most since the last ``forget``."""
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match
    return int(match[1]) * 1024


@contextmanager
def growth(found: dict[str, int], phase: str) -> Iterator[None]:
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before = held("VmRSS")
    yield
    found[phase] = held("VmHWM") - before


def main(recipe: Recipe) -> None:
    directory, found = RunDirectory(recipe.output_dir), {}
    accelerator = rendezvous.start(recipe.distributed.timeout_seconds)
    if accelerator.is_main_process:
        directory.create()
    engine = make_engine(recipe.distributed, accelerator, 1.0)
    with growth(found, "load"):
        model = TrainableModel(recipe, engine)
        model.prepare()
    with engine.synchronizing(True):
        ids = torch.ones(1, 8, dtype=torch.long)
        batch = with_targets({"input_ids": ids, "attention_mask": ids, "labels": ids})
        loss = model.loss(on_device(batch, accelerator.device))
        engine.backward(loss, last=True)
    engine.step(float(loss.detach()))
    engine.zero_grad()
    with growth(found, "save"):
        checkpoint.save(model, directory.checkpoints, Progress(step=1), "data")
    (directory.path / f"memory-{process.rank()}.json").write_text(json.dumps(found))
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    main(Recipe.model_validate(json.loads(Path(sys.argv[1]).read_text())))
    os._exit(0)
