"""``rasa-eval``: evaluate a run, an adapter or a model on MATH, GSM8K, HumanEval+, E2E, SAMSum, WikiSQL, forgetting."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..errors import say, shown
from .errors import Command, start, stoppable, user_errors

if TYPE_CHECKING:
    from ..evaluate.generate import Progress
    from ..evaluate.load import Subject

app = typer.Typer(pretty_exceptions_enable=False)


@app.command(cls=Command)
def evaluate(
    target: Annotated[
        str | None,
        typer.Argument(metavar="RUN_OR_MODEL", help="A run, adapter, checkpoint or model directory, or a hub id."),
    ] = None,
    suite: Annotated[
        str,
        typer.Option(
            help="Suites to evaluate: math, gsm8k, code, e2e, samsum, wikisql, forgetting; separate several by commas. "
            "With --score also nlg: any texts with references."
        ),
    ] = "math",
    all_checkpoints: Annotated[
        bool, typer.Option("--all-checkpoints", help="Evaluate every checkpoint of the run, and show BEST and LAST.")
    ] = False,
    checkpoint: Annotated[
        str | None, typer.Option(metavar="best|STEP", help="Evaluate the run's best checkpoint, or that of a step.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Number of questions of each suite, from the first on. (default: all)")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="PATH", help="File or directory of questions in the published formats. (default: the hub)"
        ),
    ] = None,
    score: Annotated[
        Path | None,
        typer.Option(
            metavar="SAMPLES.jsonl", help="Score generations that were made elsewhere, instead of evaluating a model."
        ),
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Hub id or directory of an adapter's base model. (default: the adapter's)")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Directory for results. (default: RUN/evaluation)")] = None,
    backend: Annotated[
        Literal["hf", "vllm"], typer.Option(help="Backend that generates; vllm accepts models, not adapters.")
    ] = "hf",
    dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "float32"],
        typer.Option(help="Dtype of the weights. auto: bfloat16 on a GPU, float32 on a CPU."),
    ] = "auto",
    batch_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Number of tokens in memory at a time. (default: 65536; on a CPU 16384)"),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete existing results and start over.")] = False,
    allow_unsandboxed: Annotated[
        bool, typer.Option("--allow-unsandboxed", help="Run model-written code without isolation.")
    ] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that comes with a local model.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, and nothing else.")] = False,
) -> None:
    """Measure task accuracy. Run the same command again to continue an interrupted evaluation.

    rasa-eval runs/math_llama8b_rasa_r8 --suite math,forgetting --all-checkpoints

    rasa-eval --score samples.jsonl --suite code --json
    """
    suites = tuple(name.strip() for name in suite.split(","))
    with user_errors(), stoppable():
        from ..errors import UserError

        if (target is None) == (score is None):
            raise UserError("give either RUN_OR_MODEL or --score SAMPLES.jsonl")
        if score is not None and checkpoint is not None:
            raise UserError(f"--checkpoint {checkpoint} chooses a checkpoint of a run: it does not go with --score")
        with _only_ours():
            if score is not None:
                output_object = _score(score, suite, data, allow_unsandboxed)
            else:
                from ..evaluate.suites import check_names

                check_names(suites)
                from ..evaluate.load import find_subjects
                from ..evaluate.run import Options

                options = Options(
                    suites, data, limit, base, backend, dtype, batch_tokens, fresh, allow_unsandboxed, trust_remote_code
                )
                wanted = partial(find_subjects, all_checkpoints=all_checkpoints, output=output, checkpoint=checkpoint)
                output_object = _evaluate(wanted(str(target)), options)
        print(json.dumps(output_object) if as_json else shown(_describe(output_object)))


def main() -> None:
    """Entry point of the console script."""
    start(app)


def _score(path: Path, suite: str, data: str | None, allow_unsandboxed: bool) -> dict[str, Any]:
    from ..evaluate.sandbox import Sandbox
    from ..evaluate.score import score_file

    return score_file(path, suite, data, lambda: Sandbox(isolated=not allow_unsandboxed))


def _evaluate(subjects: list[Subject], options: Any) -> dict[str, Any]:
    from ..evaluate.classify import ClassifierEvaluation, check_suites, head_of_subject
    from ..evaluate.run import Evaluation, evaluate_all
    from ..stop import StopSignal

    classifier = head_of_subject(subjects[0], trust_remote_code=options.trust_remote_code) is not None
    options = check_suites(options, classifier=classifier)

    def speak(text: str) -> None:
        say(text, sys.stderr)

    with StopSignal() as stop:
        evaluation: Any = (
            ClassifierEvaluation(options, speak) if classifier else Evaluation(options, speak, _reporter, stop)
        )
        found, table = evaluate_all(subjects, evaluation)
    single = found[0]["metrics"] if classifier and len(found) == 1 else {}
    return {"results": found, "best_last": table, "directory": str(subjects[0].results), **single}


def _describe(found: dict[str, Any]) -> str:
    from ..evaluate.suites import shown_score

    if "rows" in found:
        wrong = [row for row in found["rows"] if not row.get("correct", True)]
        lines = [f"{row.get('task_id', row['index'])}: {row['reason']}" for row in wrong[:20]]
        more = [f"... and {len(wrong) - 20} more"] if len(wrong) > 20 else []
        return "\n".join([*lines, *more, *_metrics(found), f"{found['samples']} samples"])
    lines = []
    for result in found["results"]:
        epoch = "" if result["epoch"] is None else f" (epoch {result['epoch']:g})"
        lines.append(f"{result['suite']}, {result['checkpoint']}{epoch}: {result['questions']} questions")
        lines += _metrics(result)
    if found["best_last"]:
        lines.append(f"{'':44}{'BEST':>8}{'epoch':>8}{'LAST':>8}")
        for suite, metrics in found["best_last"].items():
            for name, row in metrics.items():
                epoch = "" if row["best_epoch"] is None else f"{row['best_epoch']:g}"
                best, last = (shown_score(suite, row[key]) for key in ("best", "last"))
                lines.append(f"{suite + ' ' + name:44}{best:>8}{epoch:>8}{last:>8}")
    return "\n".join([*lines, f"results are in {found['directory']}"])


def _metrics(result: dict[str, Any]) -> list[str]:
    from ..evaluate.suites import shown_score

    missing = result.get("not_measured", {})  # results of older versions do not have it
    lines = [f"  {name:42}{shown_score(result['suite'], value):>8}" for name, value in result["metrics"].items()]
    return [*lines, *(f"  {name}: not measured, {why}" for name, why in missing.items())]


def _reporter(title: str) -> Callable[[Progress], None]:
    """Return a callback that shows progress on stderr: one line that is rewritten in a terminal, elsewhere about ten
    lines in all."""
    share_shown = -1

    def report(progress: Progress) -> None:
        nonlocal share_shown
        share = progress.done * 10 // max(progress.total, 1)
        speed = f"  {progress.tokens_per_second:,.0f} tok/s" if progress.tokens else ""
        left = f"  {progress.seconds_left:,.0f} s left" if progress.done < progress.total else ""
        line = shown(f"{title}: {progress.done}/{progress.total}{speed}{left}")
        if sys.stderr.isatty():
            print(f"\r\033[K{line}", end="" if left else "\n", file=sys.stderr, flush=True)
        elif share != share_shown:
            print(line, file=sys.stderr)
        share_shown = share

    return report


@contextmanager
def _only_ours() -> Iterator[None]:
    """Redirect to stderr what libraries print, because stdout is for the result."""
    with redirect_stdout(sys.stderr):
        yield


if __name__ == "__main__":
    main()
