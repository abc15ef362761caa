"""``rasa-merge``: fold an adapter into its base, or export it as a plain LoRA."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..errors import UserError
from .errors import user_errors

if TYPE_CHECKING:
    from ..merge import ExportReport, MergeReport

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def merge(
    adapter: Annotated[
        Path, typer.Argument(metavar="ADAPTER_OR_RUN", help="Adapter directory, or output_dir of a run.")
    ],
    output: Annotated[Path, typer.Option(help="Directory to write; new or empty.")],
    base: Annotated[str | None, typer.Option(help="Base model, hub id or directory. (default: the adapter's)")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    format: Annotated[
        Literal["merged", "lora"],
        typer.Option(help="merged: an ordinary checkpoint. lora: an equivalent LoRA adapter for PEFT and vLLM."),
    ] = "merged",
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="Dtype of the merged checkpoint. (default: the base's)"),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an output that has files.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Fold an adapter into its base model and write an ordinary Hugging Face checkpoint."""
    with user_errors():
        if format == "lora" and dtype is not None:
            raise UserError(f"--dtype {dtype} is for --format merged: a LoRA export is fp32, so that it is exact")
        import torch

        from ..merge import export_lora, find_adapter
        from ..merge import merge as merge_checkpoint

        directory = find_adapter(adapter)
        if directory not in (adapter, adapter / "adapter"):
            print(
                f"{adapter} has no adapter/ yet: taking its newest checkpoint, {directory.name}",
                file=sys.stderr,
            )
        report: MergeReport | ExportReport
        with _bar() as progress:
            common: Any = {"base": base, "revision": revision, "overwrite": overwrite, "progress": progress}
            if format == "lora":
                report = export_lora(directory, output, **common)
            else:
                report = merge_checkpoint(directory, output, dtype=getattr(torch, dtype) if dtype else None, **common)
        print(json.dumps(report.as_json()) if as_json else _describe(report))


def main() -> None:
    """Entry point of the console script."""
    app()


def _describe(report: MergeReport | ExportReport) -> str:
    from ..merge import ExportReport
    from ..merge.output import size

    done = f"{report.method} on {report.base_model}: {report.adapted} weights"
    lines = [f"{report.output}  {size(report.bytes)} in {report.seconds:.1f} s", done]
    if isinstance(report, ExportReport):
        lines[1] += f" as LoRA of rank {report.rank}, exact"
        if report.max_lora_rank is None:
            lines.append("vLLM takes no LoRA of such a rank: merge instead")
        else:
            rank = report.max_lora_rank
            lines.append(f"vLLM: --enable-lora --max-lora-rank {rank} --lora-modules NAME={report.output}")
    else:
        lines[1] += f" of {report.tensors} tensors changed"
        if report.rounding is None:
            lines.append("the update is zero: the output is the base")
        elif report.rounding:
            lines.append(f"rounding to the output's dtype loses {report.rounding:.2%} of the update, by norm")
    return "\n".join(lines)


@contextmanager
def _bar() -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar on stderr when that is a terminal; None otherwise."""
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
