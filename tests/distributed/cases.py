"""Train many recipes in one group of processes, so that imports and the start are paid for once.

    torchrun --standalone --nproc_per_node=2 -m tests.distributed.cases CASES.json

CASES.json is a list of recipes. A recipe with a key ``continues`` goes on from a copy of that run directory. A case
that fails writes the traceback to ``error-<rank>.txt`` in its output_dir, and ends the group: the other worker may be
waiting.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch

from rasa_train import process
from rasa_train.distributed import rendezvous
from rasa_train.io.run_dir import RunDirectory
from rasa_train.recipe.schema import Recipe
from rasa_train.stop import StopSignal
from rasa_train.training.run import run

torch.set_num_threads(1)


def main(cases: list[dict[str, Any]]) -> int:
    warnings.filterwarnings("ignore")
    for case in cases:
        continues = case.pop("continues", None)
        recipe = Recipe.model_validate(case)
        rendezvous.join(recipe.distributed.timeout_seconds)
        if process.rank() == 0:
            if continues:
                shutil.copytree(continues, recipe.output_dir)
            RunDirectory(recipe.output_dir).create()
        began = time.perf_counter()
        try:
            with StopSignal() as stop:
                run(recipe, stop)
        except BaseException:
            Path(recipe.output_dir).mkdir(parents=True, exist_ok=True)
            (Path(recipe.output_dir) / f"error-{process.rank()}.txt").write_text(traceback.format_exc())
            return 1
        if process.rank() == 0:
            print(f"{time.perf_counter() - began:.1f} s {recipe.output_dir}", file=sys.stderr, flush=True)
    return 0


if __name__ == "__main__":
    code = main(json.loads(Path(sys.argv[1]).read_text()))
    sys.stderr.flush()
    os._exit(code)
