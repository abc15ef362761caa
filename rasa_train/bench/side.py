"""One side of a comparison end to end: trains in a process of its own, and waits after each step for its next turn.

    python -m rasa_train.bench.side JOB.json

Answers each line on stdin by a step, and prints one JSON object about it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import process
from ..io.run_dir import RunDirectory
from ..recipe.schema import Recipe
from ..stop import StopSignal
from ..training.trainer import Trainer

LR = 1e-4
NEVER = 10**9


@dataclass(frozen=True)
class Job:
    """What a side trains on, and how."""

    base: str
    """Directory of the base model."""
    rows: str
    """JSON lines of ``input_ids`` and ``labels``, in the order of the steps."""
    directory: str
    """Directory for what the side writes."""
    device: str
    dtype: str
    batch_size: int
    """Number of rows of a step."""
    steps: int
    adapter: dict[str, Any]
    """The recipe's section ``adapter``."""
    linears: list[str]
    """Names of the adapted linears, for PEFT."""
    trl: dict[str, Any] | None
    """Settings of TRL's ``SFTConfig``; None for our own training."""


class Turns:
    """The exchange with the process that compares the sides."""

    def __init__(self, device: str) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what libraries print goes to stderr
        self._gpu = device == "cuda"
        self.loss: float | None = None
        """Mean loss over the supervised tokens of the first step, as soon as it is known."""
        self._cpu = self._wall = 0.0

    def wait(self) -> None:
        """Wait for the next turn; end the process if there is none."""
        if not sys.stdin.readline():
            sys.exit()
        self._wall = time.perf_counter()

    def done(self) -> None:
        """Report a step and wait for the next turn. Work that a thread does ahead, while the side waits, counts as CPU
        time of the next step."""
        if self._gpu:
            torch.cuda.synchronize()
        wall, cpu = time.perf_counter() - self._wall, time.process_time()
        row = {"cpu_seconds": cpu - self._cpu, "wall_seconds": wall, "loss": self.loss}
        self._cpu = cpu
        print(json.dumps(row | {"peak_memory_bytes": process.peak_memory_bytes()}), file=self._out, flush=True)
        self.wait()


def ours(job: Job, turns: Turns) -> None:
    """Train as ``rasa-train`` does, padding-free."""
    training = {
        "max_steps": job.steps,
        "batch_size": job.batch_size,
        "batching": "sequential",
        "padding_free": True,
        "optimizer": {"name": "adamw", "lr": LR},
        "schedule": {"name": "constant", "warmup_ratio": 0.0},
        "checkpoint_every": NEVER,
    }
    recipe = Recipe.model_validate(
        {
            "model": {"name": job.base, "dtype": job.dtype},
            "adapter": job.adapter,
            "data": {"dataset": job.rows, "cache_dir": job.directory + "/cache", "max_length": NEVER},
            "training": training,
            "output_dir": job.directory + "/run",
        }
    )
    RunDirectory(recipe.output_dir).create()
    trainer = Trainer(recipe)
    stop = StopSignal()
    with trainer.running():
        trainer.setup()
        trainer.resume()
        for step, work in trainer.steps():
            row = trainer.step(step, work)
            trainer.validate(row)
            trainer.evaluate(row)
            trainer.log(row)
            trainer.stop_agreed(stop)
            turns.loss = row["loss"] if turns.loss is None else turns.loss
            turns.done()


def trl(job: Job, turns: Turns) -> None:
    """Train with TRL's ``SFTTrainer`` and PEFT's LoRA."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Pauses(TrainerCallback):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            if turns.loss is None:
                turns.loss = logs.get("loss")

        def on_step_end(self, *_: Any, **__: Any) -> None:
            turns.done()

    torch.manual_seed(0)
    settings = dict(job.trl or {})
    attention = {"attn_implementation": name} if (name := settings.pop("attn_implementation", None)) else {}
    adapter = job.adapter
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(job.base, dtype=getattr(torch, job.dtype), **attention),
        processing_class=AutoTokenizer.from_pretrained(  # not used: the rows are tokens
            Path(__file__).parents[1] / "demo" / "model", pad_token="</s>"
        ),
        train_dataset=Dataset.from_list([json.loads(line) for line in Path(job.rows).read_text().splitlines()]),
        peft_config=LoraConfig(
            r=adapter["r"],
            lora_alpha=adapter["alpha"],
            lora_dropout=adapter["dropout"],
            target_modules=job.linears,
            task_type="CAUSAL_LM",
        ),
        args=SFTConfig(
            output_dir=job.directory,
            max_steps=job.steps,
            per_device_train_batch_size=job.batch_size,
            learning_rate=LR,
            lr_scheduler_type="constant",
            logging_first_step=True,
            save_strategy="no",
            train_sampling_strategy="sequential",
            use_cpu=job.device == "cpu",
            bf16=job.dtype == "bfloat16",
            **settings,
        ),
        callbacks=[Pauses()],
    )
    trainer.train()


def main(path: str) -> None:
    """Run the side that the file describes."""
    job = Job(**json.loads(Path(path).read_text()))
    torch.set_num_threads(1)
    turns = Turns(job.device)
    turns.wait()
    (ours if job.trl is None else trl)(job, turns)


if __name__ == "__main__":
    main(sys.argv[1])
