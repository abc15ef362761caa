"""Evaluate HellaSwag, WinoGrande and ARC-Challenge with lm-evaluation-harness's own tasks, zero-shot.

The paper states neither the number of shots nor whether it reports ``acc`` or ``acc_norm``: both metrics are recorded,
and the average of ``acc`` is the headline.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from ..errors import UserError, first_line
from .problems import local_rows
from .suites import DEFINITIONS, digest, needs_harness

TASKS = {
    "hellaswag": "hellaswag/hellaswag.yaml",
    "winogrande": "winogrande/default.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
}
"""Path of each task's definition among lm-eval's tasks."""
LOCAL = "rasa_local_"
"""Prefix of the definitions in ``tasks/``, which are for rows that hold ready-made text: ``query`` and ``choices``."""


def load_tasks(data: str | None) -> dict[str, Any]:
    """Return lm-eval's tasks by name, with questions from the hub, or from the files in a directory (tasks without a
    file are left out).

    Args:
        data: a directory with TASK.jsonl or TASK_*.jsonl, in it or in its subdirectory ``forgetting``; None for the
            hub. Rows are either as on the hub or have ``query`` (WinoGrande: ``context_options`` and
            ``continuation``), ``choices`` and ``gold``.
    Raises:
        UserError: the hub cannot be reached and ``data`` is None, or ``data`` has no such file.
    """
    needs_harness()
    import lm_eval.tasks
    from lm_eval.tasks import TaskManager

    theirs = Path(lm_eval.tasks.__file__).parent
    files = dict.fromkeys(TASKS) if data is None else _files(data)
    definitions = [_definition(task, path, theirs) for task, path in files.items()]
    try:
        tasks = TaskManager(include_defaults=False).load(definitions)["tasks"]
    except (OSError, ValueError) as error:  # datasets' errors for what it cannot find
        raise UserError(
            f"the questions of suite forgetting ({', '.join(TASKS)}) cannot be loaded: load them once with a network "
            f"connection, or give a directory with {', '.join(f'{task}.jsonl' for task in TASKS)} by --data\n"
            f"({first_line(error)})"
        ) from None
    return {name.removeprefix(LOCAL): task for name, task in tasks.items()}


def protocol(tasks: dict[str, Any]) -> dict[str, Any]:
    """Return everything but the model that the results depend on."""
    return {
        name: {
            "version": task.VERSION,
            "num_fewshot": 0,
            "questions": len(task.eval_docs),
            "content": digest([dict(row) for row in task.eval_docs.select(range(min(50, len(task.eval_docs))))]),
        }
        for name, task in tasks.items()
    }


def evaluate(
    lm: Any,
    tasks: dict[str, Any],
    *,
    limit: int | None,
    batch_size: int,
    cache: Path | None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, float]:
    """Return the metrics ``average`` (of ``acc`` over the tasks), ``TASK/acc`` and ``TASK/acc_norm``.

    Args:
        lm: a model of lm-eval.
        limit: number of questions of each task; None for all.
        cache: file that stores each question's likelihoods, so that an interrupted evaluation can continue.
        say: called with a line about each task.
    """
    from lm_eval.evaluator import evaluate as run_tasks

    lm.batch_size_per_gpu = batch_size
    metrics: dict[str, float] = {}
    for name, task in tasks.items():
        say(f"{name}: {min(limit or len(task.eval_docs), len(task.eval_docs))} questions")
        task.set_config(key="num_fewshot", value=0)
        model = _cached(lm, cache) if cache else lm
        done = run_tasks(model, {name: task}, limit=limit, bootstrap_iters=0, log_samples=False)
        assert done is not None
        (scores,) = done["results"].values()
        for metric in ("acc", "acc_norm"):
            if f"{metric},none" in scores:
                metrics[f"{name}/{metric}"] = float(scores[f"{metric},none"])
    accuracies = [metrics[f"{name}/acc"] for name in tasks]
    return {"average": sum(accuracies) / len(accuracies), **metrics}


def _cached(lm: Any, cache: Path) -> Any:
    """Wrap a model in lm-eval's cache, but with values that are JSON: lm-eval's own are pickles, which run the code of
    whoever wrote the file. What is not a cache of this kind is made again."""
    import sqlite3

    from lm_eval.api.model import CachingLM
    from sqlitedict import SqliteDict  # type: ignore[import-untyped]

    model = CachingLM(lm, ":memory:")  # opens its own, which is not used
    model.dbdict.close()
    try:
        with closing(sqlite3.connect(cache)) as existing:
            rows = existing.execute("SELECT value FROM likelihoods").fetchall()
        if not all(isinstance(_values(value), tuple) for (value,) in rows):
            raise ValueError("a value is not a likelihood")
    except (sqlite3.Error, OSError, ValueError, TypeError, RecursionError):
        for stale in cache.parent.glob(f"{cache.name}*"):
            stale.unlink()
    model.dbdict = SqliteDict(str(cache), tablename="likelihoods", autocommit=True, encode=json.dumps, decode=_values)
    lm.set_cache_hook(model.get_cache_hook())
    return model


def _values(text: str) -> Any:
    value = json.loads(text)
    return tuple(value) if isinstance(value, list) else value


def _files(data: str) -> dict[str, Path]:
    directory = Path(data).expanduser()
    folders = [directory / "forgetting", directory]
    found = {
        task: matches[0]
        for task in TASKS
        if (matches := [p for folder in folders for p in sorted(folder.glob(f"{task}*.json*"))])
    }
    if not found:
        raise UserError(
            f"--data: {data} has none of the files {', '.join(f'{task}.jsonl' for task in TASKS)} of suite forgetting"
        )
    return found


def _definition(task: str, path: Path | None, theirs: Path) -> dict[str, Any]:
    """Return the definition of a task: lm-eval's, reading the file instead of the hub if there is one; or, for rows of
    ready-made text, the one in ``tasks/``."""
    from lm_eval.tasks._yaml_loader import load_yaml

    if path is None:
        return dict(load_yaml(theirs / TASKS[task]))
    ready_made = "gold" in next(local_rows(path), ("", {}))[1]
    source = DEFINITIONS / f"{LOCAL}{task}.yaml" if ready_made else theirs / TASKS[task]
    files = {"data_files": {split: str(path) for split in ("train", "validation", "test")}}
    return dict(load_yaml(source)) | {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": files}
