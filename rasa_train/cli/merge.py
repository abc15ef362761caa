"""``rasa-merge``: fold an adapter into its base, export it for other programs, or extract an adapter."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..errors import UserError, say, shown, some
from .completion import nearby
from .errors import Command, DefaultVerb, start, user_errors

if TYPE_CHECKING:
    from ..merging.extract import ExtractReport
    from ..merging.lora import ExportReport
    from ..merging.merged import MergeReport
    from ..merging.options import Base, Writing
    from ..merging.verify import VerifyReport

app = typer.Typer(cls=DefaultVerb, pretty_exceptions_enable=False, add_help_option=False)
"""Help without a verb is that of ``merge``, which names the other."""

Output = Annotated[Path, typer.Option(metavar="DIR", help="Directory to write, which must be new or empty.")]
Push = Annotated[
    str | None,
    typer.Option(
        metavar="OWNER/NAME", help="Write a model card for this hub repository and list what --upload would upload."
    ),
]
Upload = Annotated[bool, typer.Option("--upload", help="With --push: upload the output to a private repository.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output directory that holds files.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


def _directories(incomplete: str) -> list[str]:
    """Return what a shell offers for ADAPTER_OR_RUN, beside the verbs."""
    return [f"{path}/" for path in nearby(incomplete) if path.is_dir() and str(path).startswith(incomplete)]


@app.command("merge", cls=Command)
def merge(
    output: Output,
    adapter: Annotated[
        Path | None,
        typer.Argument(
            metavar="ADAPTER_OR_RUN",
            help="Adapter directory, or the output_dir of a run.",
            autocompletion=_directories,
        ),
    ] = None,
    adapters: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter", metavar="DIR:WEIGHT", help="One of several adapters to sum, with its weight; repeat for each."
        ),
    ] = None,
    checkpoint: Annotated[
        str | None, typer.Option(metavar="best|STEP", help="Take the run's best checkpoint, or that of a step.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Hub id or directory of the base model. (default: the adapter's)"),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    any_base: Annotated[
        bool, typer.Option("--any-base", help="Accept a base other than the one the adapter was trained on.")
    ] = False,
    format: Annotated[
        Literal["merged", "lora", "peft"],
        typer.Option(
            help="What to write. merged: an ordinary checkpoint. lora: an equivalent LoRA for PEFT and vLLM. "
            "peft: an adapter in PEFT's own format, for lora, dora and vera."
        ),
    ] = "merged",
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="Dtype of the merged checkpoint. (default: the base's)"),
    ] = None,
    rounding: Annotated[
        Literal["nearest", "aware"],
        typer.Option(
            help="How weights are rounded. aware: with error feedback, so that the linears' outputs change less."
        ),
    ] = "nearest",
    calibrate: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="With --rounding aware: measure the linears' inputs on N examples of the run."
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Measure them on rows of this file instead. (default: 128 of them)"),
    ] = None,
    max_rank: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Largest rank of an exported LoRA; the truncation error is reported."),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Number of files written at a time. (default: as many as cores and memory allow)",
        ),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Run the adapted and the merged model on a few prompts and compare them.")
    ] = False,
    push: Push = None,
    upload: Upload = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    finetuned: Annotated[str | None, typer.Option("--extract", hidden=True)] = None,
    method: Annotated[Literal["rasa", "lora"], typer.Option(hidden=True)] = "rasa",
    r: Annotated[int, typer.Option(min=1, hidden=True)] = 8,
    k: Annotated[int | None, typer.Option(min=0, hidden=True)] = None,
    sweeps: Annotated[int, typer.Option(min=0, hidden=True)] = 50,
    targets: Annotated[str, typer.Option(hidden=True)] = "all-linear",
) -> None:
    """Fold an adapter into its base model and write an ordinary Hugging Face checkpoint.

        rasa-merge runs/demo --output merged

    To make an adapter of a fine-tuned checkpoint, see rasa-merge extract --help.
    """
    with user_errors():
        if upload and push is None:
            raise UserError(ALONE)
        if finetuned is not None:
            if adapter is not None or adapters or base is None:
                raise UserError("--extract FINETUNED makes an adapter: give --base MODEL, and no adapter")
            return extract(finetuned, base, output, method, r, k, sweeps, targets, push, upload, overwrite, as_json)
        wanted = _Format(format, dtype, max_rank, threads, rounding)
        _check(wanted, verify)
        given, run = _given(adapter, adapters, checkpoint)
        from ..merging.options import Base, Rounding, Writing

        where = Base(base, revision, any_base)
        measured = Rounding(rounding, run if isinstance(given, Path) else None, calibrate, calibration)
        report = _write(given, output, wanted, where, Writing(overwrite, rounding=measured))
        verified = _verify(given, report, run, where) if verify else None
        _finish(report, verified, run, push, upload, as_json)


@app.command("extract", cls=Command)
def extract(
    finetuned: Annotated[str, typer.Argument(metavar="FINETUNED", help="Hub id or directory of the fine-tuned model.")],
    base: Annotated[str, typer.Option(metavar="MODEL", help="Hub id or directory of the model that was fine-tuned.")],
    output: Output,
    method: Annotated[Literal["rasa", "lora"], typer.Option(help="Method of the extracted adapter.")] = "rasa",
    r: Annotated[int, typer.Option(metavar="N", min=1, help="Number of ranks per layer.")] = 8,
    k: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=0, help="Number of shared ranks per layer, for RaSA. (default: r // 8, at least 1)"
        ),
    ] = None,
    sweeps: Annotated[int, typer.Option(metavar="N", min=0, help="Number of sweeps of the coordinate descent.")] = 50,
    targets: Annotated[
        str, typer.Option(metavar="NAMES", help="Linears to adapt: names separated by commas, or all-linear.")
    ] = "all-linear",
    push: Push = None,
    upload: Upload = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Make an adapter of a fine-tuned checkpoint: the RaSA or LoRA that is nearest to what fine-tuning changed.

    rasa-merge extract tuned-model --base base-model --output adapter
    """
    with user_errors():
        if upload and push is None:
            raise UserError(ALONE)
        if k is not None and (k > r or method == "lora"):
            raise UserError(
                f"--k must be in [0, --r={r}], and is for --method rasa only; got {k} with --method {method}"
            )
        from .. import merging

        fit = merging.Fit(method, r, k, sweeps, targets.split(",") if targets != "all-linear" else targets)
        with _bar() as progress:
            report = merging.extract(finetuned, base, output, fit, writing=merging.Writing(overwrite, progress))
        _finish(report, None, Path(finetuned), push, upload, as_json)


ALONE = "--upload needs --push OWNER/NAME"


def main() -> None:
    """Entry point of the console script."""
    start(app)


@dataclass(frozen=True)
class _Format:
    """The format of the output, and the options that belong to a format."""

    name: str
    dtype: str | None
    max_rank: int | None
    threads: int | None
    rounding: str


def _check(wanted: _Format, verify: bool) -> None:
    if wanted.name != "merged" and wanted.dtype is not None:
        raise UserError(
            f"--dtype {wanted.dtype} is for --format merged only: an exported adapter is always fp32, so that it is "
            "exact"
        )
    if wanted.name != "merged" and verify:
        raise UserError(f"--verify is for --format merged only, got --format {wanted.name}")
    if wanted.name != "merged" and wanted.rounding == "aware":
        raise UserError(f"--rounding aware is for --format merged only, got --format {wanted.name}")
    if wanted.name != "lora" and wanted.max_rank is not None:
        raise UserError(f"--max-rank {wanted.max_rank} is for --format lora only, got --format {wanted.name}")


def _given(adapter: Path | None, adapters: list[str] | None, checkpoint: str | None) -> tuple[Any, Path]:
    """Return the adapters as ``merge`` takes them, one directory or several with weights, and the first directory."""
    from ..merging.source import find_adapter

    if (adapter is None) == (not adapters):
        raise UserError("give one ADAPTER_OR_RUN, or several with --adapter DIR:WEIGHT")
    if checkpoint is not None and adapter is None:
        raise UserError(f"--checkpoint {checkpoint} is for one run; of several, give the directories of checkpoints")
    if adapter is not None:
        directory = find_adapter(adapter, checkpoint)
        if checkpoint is not None:
            say(f"using {directory}", file=sys.stderr)
        elif directory not in (adapter, adapter / "adapter"):
            say(f"{adapter} has no adapter/ yet: using its newest checkpoint, {directory.name}", file=sys.stderr)
        return directory, adapter
    weighted = []
    for item in adapters or ():
        path, colon, weight = item.rpartition(":")
        try:
            weighted.append((find_adapter(Path(path if colon else item)), float(weight) if colon else 1.0))
        except ValueError:
            raise UserError(f"--adapter {item}: the weight after the colon must be a number, got {weight!r}") from None
    return weighted, weighted[0][0]


def _write(given: Any, output: Path, wanted: _Format, base: Base, writing: Writing) -> MergeReport | ExportReport:
    import torch

    from ..merging.lora import export_lora
    from ..merging.merged import merge as merge_checkpoint
    from ..merging.peft_format import export_peft

    if wanted.name == "peft":
        if not isinstance(given, Path):
            raise UserError("--format peft is for a single adapter; export a sum with --format lora")
        return export_peft(given, output, base=base, overwrite=writing.overwrite)
    with _bar() as progress:
        writing = replace(writing, progress=progress)
        if wanted.name == "lora":
            return export_lora(given, output, base=base, max_rank=wanted.max_rank, writing=writing)
        stored = getattr(torch, wanted.dtype) if wanted.dtype else None
        return merge_checkpoint(given, output, base=base, dtype=stored, threads=wanted.threads, writing=writing)


def _verify(given: Any, report: Any, run: Path, base: Base) -> VerifyReport:
    from ..io.json_file import field
    from ..io.run_dir import RunDirectory
    from ..merging import verify

    made, template = RunDirectory(run), "alpaca"
    if made.recipe.is_file():
        data = field(made.stored_recipe(), "data", dict, made.recipe, {})
        template = field(data, "template", str, made.recipe, template)
    return verify(given, report.output, base=base, template=template, exact=report.rounding == 0.0)


def _finish(
    report: MergeReport | ExportReport | ExtractReport,
    verified: VerifyReport | None,
    run: Path,
    push: str | None,
    upload: bool,
    as_json: bool,
) -> None:
    """Write the card of a hub repository and upload the output, if asked for, and print what was made."""
    facts = asdict(report) | ({"verify": asdict(verified)} if verified else {})
    if push is not None:
        from ..merging import hub

        hub.write_card(Path(report.output), run, facts)
        say(hub.push(Path(report.output), push, upload=upload), file=sys.stderr if as_json else sys.stdout)
    print(json.dumps(facts) if as_json else shown(_describe(report, verified)))


def _describe(report: MergeReport | ExportReport | ExtractReport, verified: VerifyReport | None) -> str:
    from ..io.atomic_dir import size
    from ..merging.extract import ExtractReport
    from ..merging.lora import ExportReport

    lines = [f"{report.output}  {size(report.bytes)} in {report.seconds:.1f} s"]
    if isinstance(report, ExportReport) and report.vocabulary:
        lines.append(f"before PEFT loads it, the base needs model.resize_token_embeddings({report.vocabulary})")
    if isinstance(report, ExtractReport):
        return "\n".join([*lines, *_error_table(report)])
    done = f"{report.method} on {report.base_model}: {report.adapted} weights"
    if isinstance(report, ExportReport) and report.format == "peft":
        lines.append(f"{done}, in PEFT's own format")
    elif isinstance(report, ExportReport):
        lines.append(f"{done} as LoRA of rank {report.rank}, exact")
        if report.error:
            lines[-1] = f"{done} as LoRA of rank {report.rank}: {report.error:.3%} of the update is lost, by norm"
        loads = "PEFT is not installed here, so nothing has tried to load it"
        lines.append("PEFT loads it, tensor by tensor" if report.peft_loads else f"note: {loads}")
        if report.vocabulary:
            lines.append("the adapter has new words, which vLLM reads only from a merged model (--format merged)")
        elif report.max_lora_rank is None:
            lines.append("vLLM does not accept a LoRA of this rank: truncate it with --max-rank 512, or merge instead")
        else:
            lines.append(
                f"vllm serve {report.base_model} --enable-lora --max-lora-rank {report.max_lora_rank} "
                f"--lora-modules NAME={report.output}"
            )
        if report.fused_experts:
            lines.append(
                "note: PEFT reads a LoRA of fused experts from version 0.19 on, and vLLM reads it only for models "
                "whose experts it keeps fused (gpt-oss, Qwen3-VL-MoE): merge for other models, such as Mixtral and "
                "Qwen3-MoE"
            )
    else:
        lines.append(f"{done} of {report.tensors} tensors changed")
        lines += report.lost
        if report.tokenizer:
            lines.append(f"the tokenizer is the one that was trained with, from {report.tokenizer}")
        if report.left_out:
            lines.append(f"not copied from the base: {shown(some(report.left_out))}")
    if not report.base_checked:
        lines.append("note: the adapter does not record which weights it was trained on; only shapes were checked")
    if verified:
        lines += _describe_verified(verified, rounded=bool(report.rounding))
    return "\n".join(lines)


def _describe_verified(verified: VerifyReport, *, rounded: bool) -> list[str]:
    lines = [
        f"verified on {verified.prompts} prompts ({verified.template}, {verified.tokens} tokens) in fp32: logits "
        f"differ by up to {verified.logits:.3g} (the adapter changes them by {verified.adapter_logits:.3g}), "
        f"KL {verified.kl:.3g}, loss {verified.loss:.4f} {verified.loss_difference:+.2g}"
    ]
    if verified.experts and rounded:
        lines.append(
            "note: rounding sends some tokens to other experts, whose logits then differ by much; KL and loss are "
            "means over the tokens, and --dtype float32 rounds nothing, so that any difference is an error"
        )
    return lines


def _error_table(report: ExtractReport) -> list[str]:
    """Return a table of the squared errors over the squared norm of the update, for each kind and all kinds."""
    rows = {**report.kinds, "all": report.total}
    width = max(map(len, rows))
    name = report.method if report.method == "lora" else f"rasa r={report.r} k={report.k}"
    lines = [f"{'':{width}}  {name:>14}  {f'lora r={report.r}':>10}   (share of the squared update that is left)"]
    for kind, row in rows.items():
        error, lora = (100 * e / row.norm2 if row.norm2 else 0.0 for e in (row.error, row.lora_error))
        lines.append(f"{kind:{width}}  {error:13.3f}%  {lora:9.3f}%")
    if report.others_changed:
        n, first = len(report.others_changed), report.others_changed[0]
        lines.append(f"not in the adapter: {n} other tensors that fine-tuning changed (the first is {first})")
    return lines


@contextmanager
def _bar() -> Iterator[Callable[[int, int], None] | None]:
    """Yield the callback of a progress bar on stderr if stderr is a terminal, and None otherwise."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

    with Progress(
        BarColumn(bar_width=None), DownloadColumn(), TimeRemainingColumn(), console=Console(stderr=True)
    ) as bar:
        task = bar.add_task("")
        yield lambda done, total: bar.update(task, completed=done, total=total)


if __name__ == "__main__":
    main()
