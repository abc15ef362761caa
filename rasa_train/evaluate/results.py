"""Read and write results on disk, and find BEST and LAST of a run.

    RUN/evaluation/SUITE/NAME.json            one result; NAME is ``adapter``, ``model`` or a checkpoint's name
    RUN/evaluation/SUITE/NAME.samples.jsonl   the responses that the result was scored from
    RUN/evaluation/best_last.json             BEST and LAST, written by ``--all-checkpoints``

A result has ``suite``, ``checkpoint`` (NAME), ``step`` and ``epoch`` (null where unknown), ``metrics`` (shares in
[0, 1] by name; ``headline`` names the main one), ``not_measured`` (why a metric is missing), ``questions``, ``limit``,
``protocol`` (prompt, extractor, decoding, data), ``model``, ``versions``, ``seconds``, ``tokens_per_second``, and
``rows``, a verdict for each response.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..io.atomic import write_json
from ..io.json_file import field, read_object
from .load import Subject
from .suites import versions

Result = dict[str, Any]


def result_path(results: Path, suite: str, name: str) -> Path:
    return results / suite.replace("/", "_") / f"{name}.json"


def sample_path(results: Path, suite: str, name: str) -> Path:
    return results / suite.replace("/", "_") / f"{name}.samples.jsonl"


@contextmanager
def writable(results: Path) -> Iterator[None]:
    """Make the directory of the results. Raises ``UserError`` if it cannot be written, now or inside the context."""
    try:
        results.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        if error.filename is not None and results not in (place := Path(str(error.filename)), *place.parents):
            raise
        said = error.strerror or str(error)
        raise UserError(f"{results} cannot be written: {said}. Give another directory with --output") from None


def result_of(subject: Subject, suite: str, headline: str, limit: int | None, measured: Result) -> Result:
    """Return a result of ``subject``.

    Args:
        headline: name of the main metric, if it was measured.
        measured: ``metrics``, ``questions``, ``rows``, ``protocol``, ``model``, ``seconds`` and what else was found.
    """
    return {
        "suite": suite,
        "checkpoint": subject.name,
        "step": subject.step,
        "epoch": subject.epoch,
        "headline": headline if headline in measured["metrics"] else None,
        "not_measured": {},
        "limit": limit,
        "tokens_per_second": None,
        **measured,
        "versions": versions(),
    }


def write_result(results: Path, result: Result) -> None:
    path = result_path(results, result["suite"], result["checkpoint"])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result)


def finished(results: Path, suite: str, name: str, limit: int | None, depends_on: dict[str, Any]) -> Result | None:
    """Return the result on disk if it has this protocol, model and limit; None otherwise.

    Raises:
        UserError: the file is not a result.
    """
    path = result_path(results, suite, name)
    try:
        result: Result = {"step": None, "epoch": None, **read_object(path)}
        same = {key: field(result, key, dict, path) for key in ("protocol", "model")}
        for key, kind in {"suite": str, "checkpoint": str, "questions": int}.items():
            field(result, key, kind, path)
        for key in ("step", "epoch"):
            if result[key] is not None:
                field(result, key, float, path)
        for metric in field(result, "metrics", dict, path):
            field(result["metrics"], metric, float, path)
        field(result, "not_measured", dict, path, {})
    except FileNotFoundError:
        return None
    except UserError as error:
        raise UserError(f"{error}. Remove the file: it is made again") from None
    return result if result.get("limit") == limit and same == json.loads(json.dumps(depends_on)) else None


def best_last(results: Sequence[Result]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return, by suite and metric, ``best`` and ``last`` over the checkpoints, with their names and epochs. BEST is
    taken for each metric on its own, as in the paper's tables, on the test set itself: an optimistic bound."""
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for suite in dict.fromkeys(result["suite"] for result in results):
        own = sorted((r for r in results if r["suite"] == suite), key=lambda r: r["step"] or 0)
        last = own[-1]
        for metric in last["metrics"]:
            measured = [r for r in own if metric in r["metrics"]]
            best = max(measured, key=lambda r: r["metrics"][metric])  # the earliest of equal checkpoints
            table.setdefault(suite, {})[metric] = {
                "best": best["metrics"][metric],
                "best_checkpoint": best["checkpoint"],
                "best_epoch": best["epoch"],
                "last": last["metrics"][metric],
                "last_checkpoint": last["checkpoint"],
                "last_epoch": last["epoch"],
            }
    return table
