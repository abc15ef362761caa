"""Evaluate models on suites: results that exist are read; missing ones are generated, scored and written."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..errors import UserError
from ..io.atomic import write_json
from ..stop import StopSignal
from . import forgetting, generated, results
from .answers import needs_math
from .generate import Generation, Progress, Report, SampleFile, generate
from .load import Backend, Dtype, Plan, Subject, load_lm
from .nlg import Scored, needs
from .problems import code_candidate, program
from .results import Result
from .sandbox import Sandbox
from .score import code_metrics, code_not_measured, math_metrics, score_code, score_math
from .suites import HEADLINE, Suite, load_suite


@dataclass(frozen=True)
class Options:
    """Options of the command."""

    suites: tuple[str, ...]
    """Names of the suites."""
    data: str | None = None
    """File or directory of questions; None for the hub."""
    limit: int | None = None
    """Number of questions of each suite (of each task, for forgetting); None for all."""
    base: str | None = None
    """Base model of an adapter; None for the one that the adapter names."""
    backend: Backend = "hf"
    dtype: Dtype = "auto"
    batch_tokens: int | None = None
    """Prompt and response tokens in memory at a time; None: 65,536 on a GPU, 16,384 on a CPU."""
    fresh: bool = False
    """Whether existing results are deleted and made again."""
    allow_unsandboxed: bool = False
    """Whether model-written code is run without isolation."""
    trust_remote_code: bool = False
    """Whether code that comes with a model is run."""

    @property
    def tokens(self) -> int:
        """Prompt and response tokens in memory at a time."""
        return self.batch_tokens or (65_536 if torch.cuda.is_available() else 16_384)


Say = Callable[[str], None]
Reports = Callable[[str], Report]
"""Makes, from a title, the callback that shows progress under this title."""


class Answers(NamedTuple):
    """Responses to a suite, scored."""

    rows: list[dict[str, Any]]
    """A verdict for each response."""
    metrics: dict[str, float]
    speed: float | None
    """Tokens per second of the responses that were generated now; None if there are none."""
    missing: dict[str, str]
    """Why a metric is not among ``metrics``, by its name."""


class Evaluation:
    """Suites loaded once, applied to one subject after another.

    Raises:
        UserError: questions are missing, the sandbox does not work on this machine, or a package is not installed. The
            error comes before any model is loaded.
    """

    def __init__(self, options: Options, say: Say, reports: Reports, stop: StopSignal | None = None) -> None:
        self.options, self.say, self.reports, self.stop = options, say, reports, stop
        if {"math", "gsm8k"} & set(options.suites):
            needs_math()
        if "code" in options.suites:
            self.sandbox = Sandbox(isolated=not options.allow_unsandboxed)
        generative = [name for name in options.suites if name != "forgetting"]
        if {"e2e", "samsum"} & set(options.suites):
            needs("sacrebleu" if "e2e" in options.suites else "rouge_score")
        self.suites = {name: load_suite(name, options.data) for name in generative}
        if searching := [suite for suite in self.suites.values() if suite.beams > 1 and options.backend == "vllm"]:
            raise UserError(
                f"suite {searching[0].name} decodes with {searching[0].beams} beams, which --backend vllm does not do: "
                "use --backend hf"
            )
        if "forgetting" in options.suites:
            self.tasks = forgetting.load_tasks(options.data)

    def evaluate(self, subject: Subject) -> list[Result]:
        """Return the results of one subject; each is written to disk as soon as it is complete."""
        model = _Lazy(subject, self.options, self.say)
        with results.writable(subject.results):
            return [self._one(subject, model, name) for name in self.options.suites]

    def _one(self, subject: Subject, model: _Lazy, name: str) -> Result:
        options = self.options
        protocol = self.protocol(name)
        depends_on = {"protocol": protocol, "model": model.plan.identity}
        done = results.finished(subject.results, name, subject.name, options.limit, depends_on)
        if done and not options.fresh:
            self.say(f"{subject.name}: {name} is done already; add --fresh to evaluate it again")
            return done
        started = time.perf_counter()
        self.say(f"{subject.name}: {name}")
        path = results.sample_path(subject.results, name, subject.name)
        rows: list[dict[str, Any]]
        speed: float | None
        missing: dict[str, str] = {}
        if name == "forgetting":
            cache = path.with_suffix(".cache")
            samples = SampleFile(path, depends_on, fresh=options.fresh)  # its header guards the cache
            if options.fresh or not samples.continued:
                for stale in path.parent.glob(f"{cache.name}*"):
                    stale.unlink()
            rows, metrics, speed = [], self.forgetting(model.lm, cache), None
            questions = sum(min(options.limit or n, n) for n in (t["questions"] for t in protocol.values()))
        else:
            samples = SampleFile(path, depends_on, fresh=options.fresh)
            if samples.damaged:
                self.say(f"{path}: {samples.damaged} damaged lines are left out; these questions are answered again")
            rows, metrics, speed, missing = self.answer(lambda: model.lm, self.suites[name], samples)
            questions = len(self.suites[name].questions[: options.limit])
        measured = {
            "metrics": metrics,
            "not_measured": missing,
            "questions": questions,
            "seconds": round(time.perf_counter() - started, 1),
            "tokens_per_second": speed,
            **depends_on,
            "rows": rows,
        }
        result = results.result_of(subject, name, HEADLINE[name], options.limit, measured)
        results.write_result(subject.results, result)
        return result

    def protocol(self, name: str) -> dict[str, Any]:
        """Return everything but the model that the results of a suite depend on."""
        if name == "forgetting":
            return forgetting.protocol(self.tasks)
        return self.suites[name].protocol()

    def answer(self, lm: Callable[[], Any], suite: Suite, samples: SampleFile) -> Answers:
        """Return the responses' verdicts and metrics."""
        questions = suite.questions[: self.options.limit]
        progress = Progress(0)

        def remember(latest: Progress) -> None:
            nonlocal progress
            progress = latest
            shown(latest)

        shown = self.reports(f"answering {suite.name}")
        generation = Generation(self.options.tokens, remember, self.stop)
        responses = generate(lm(), suite, questions, samples, generation)
        scored = score(suite, responses, self.sandbox if suite.name == "code" else None, self.reports)
        speed = round(progress.tokens_per_second, 1) if progress.fresh else None
        return Answers(scored.rows, scored.metrics, speed, scored.missing)

    def forgetting(self, lm: Any, cache: Path | None) -> dict[str, float]:
        """Return the metrics of the forgetting tasks. ``cache`` is a file that stores likelihoods."""
        batch = max(self.options.tokens // 512, 1)
        return forgetting.evaluate(
            lm, self.tasks, limit=self.options.limit, batch_size=batch, cache=cache, say=self.say
        )


def score(suite: Suite, responses: Sequence[Sequence[str]], sandbox: Sandbox | None, reports: Reports) -> Scored:
    """Return verdicts and metrics of the responses to the first ``len(responses)`` questions of a suite."""
    shown = reports(f"scoring {suite.name}")
    progress = Progress(sum(map(len, responses)))

    def tick(done: int, total: int) -> None:
        progress.done = progress.fresh = done
        shown(progress)

    asked = list(zip(suite.questions, responses, strict=False))
    if suite.name == "code":
        assert sandbox is not None
        programs = [
            (q.row["task_id"], program(q.row, code_candidate(q.row, text))) for q, texts in asked for text in texts
        ]
        rows = score_code(programs, sandbox, tick=tick)
        return Scored(code_metrics(rows), code_not_measured(rows), rows)
    if suite.name in generated.SUITES:
        return generated.score_responses(suite.name, [q.row for q, _ in asked], [texts[0] for _, texts in asked])
    rows = score_math([q.row for q, _ in asked], [texts[0] for _, texts in asked], tick)
    return Scored(math_metrics(rows), {}, rows)


class _Lazy:
    """The model of a subject, loaded only when a result is missing."""

    def __init__(self, subject: Subject, options: Options, say: Say) -> None:
        self.plan = Plan(subject, options.base, options.backend, options.dtype, options.trust_remote_code)
        self.say = say

    @cached_property
    def lm(self) -> Any:
        self.say(f"loading {self.plan.subject.path}")
        return load_lm(self.plan)


def evaluate_all(subjects: Sequence[Subject], evaluation: Evaluation) -> tuple[list[Result], dict[str, Any] | None]:
    """Return the results of all subjects and, if there are several (checkpoints of one run), their BEST and LAST."""
    found = [result for subject in subjects for result in evaluation.evaluate(subject)]
    if len(subjects) < 2:
        return found, None
    table = results.best_last(found)
    with results.writable(subjects[0].results):
        write_json(subjects[0].results / "best_last.json", table)
    return found, table
