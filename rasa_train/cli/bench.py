"""``rasa-bench``: engines side by side, counters, and the data side."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Annotated, Any, Literal

import typer

from ..errors import UserError
from .errors import Command, user_errors

app = typer.Typer(
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command(cls=Command)
def bench(
    shape: Annotated[
        str | None,
        typer.Option(
            help="linears-1024, llama-small, llama-3.1-8b, a model directory or a config.json.  (default: "
            "linears-1024 on a CPU; llama-3.1-8b on a GPU and for --counters)"
        ),
    ] = None,
    workload: Annotated[
        Literal["packed", "long", "padded"],
        typer.Option(help="Sequences of mean length 250 end to end; 4 long ones; 3 padded ones, as in the paper."),
    ] = "packed",
    tokens: Annotated[
        int | None,
        typer.Option(
            min=64,
            help="Tokens of a step, packed or long. (default: 1024 on a CPU; on a GPU what fits, up to 16384)",
        ),
    ] = None,
    dropout: Annotated[float, typer.Option(min=0.0, max=0.9, help="On the adapters' input.")] = 0.05,
    engines: Annotated[
        str | None, typer.Option(help="Engines to run, as in ours,peft; the frozen base always is. (default: all)")
    ] = None,
    methods: Annotated[
        str | None, typer.Option(help="Methods to run: lora, rasa, vera, mora, with commas between. (default: all)")
    ] = None,
    own_stacks: Annotated[
        bool,
        typer.Option(
            "--own-stacks",
            help="Give the paper's and PEFT's engines the full logits and recomputed "
            "activations of their users; else only the adapters differ.",
        ),
    ] = False,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="auto: a GPU if there is one.")] = "auto",
    dtype: Annotated[
        Literal["auto", "bfloat16", "float32"],
        typer.Option(help="Of the base. auto: bfloat16, or float32 on a CPU that multiplies bfloat16 slowly."),
    ] = "auto",
    warmup: Annotated[int, typer.Option(min=1, help="Steps of each engine that are not timed.")] = 3,
    rounds: Annotated[int, typer.Option(min=1, help="Steps of each engine that are timed.")] = 8,
    profile: Annotated[
        bool, typer.Option("--profile", help="Afterwards also say in which operations each engine spends a step.")
    ] = False,
    counters: Annotated[
        bool, typer.Option("--counters", help="Count bytes and operations instead: the same on every machine.")
    ] = False,
    data: Annotated[
        bool, typer.Option("--data", help="Measure the data side instead: tokenising, caching, the second start.")
    ] = False,
    tokenizer: Annotated[str | None, typer.Option(help="For --data: hub id or directory of a tokenizer.")] = None,
    rows: Annotated[int, typer.Option(min=100, help="For --data. (default: MetaMathQA's)")] = 395_000,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, and nothing else.")] = False,
) -> None:
    """Measure what adapters cost, engine beside engine on the same model and tokens.

    rasa-bench                         # a CPU, about two minutes of CPU time

    rasa-bench --workload long         # a GPU: Llama-3.1-8B with random weights

    rasa-bench --counters --json
    """
    with user_errors(), _quiet():
        if counters:
            from ..bench.engines import Choice
            from ..bench.report import counters_table
            from ..bench.run import count_all

            result = count_all(shape or "llama-3.1-8b", dropout, Choice.read(engines, methods))
            print(json.dumps(result) if as_json else counters_table(result))
            return
        if data:
            if tokenizer is None:
                raise UserError("--data needs --tokenizer: a hub id, or a directory with a tokenizer.json")
            from ..bench.data import measure
            from ..bench.report import data_table

            with redirect_stdout(sys.stderr):  # where DeepSpeed says that there is no GPU: stdout is for the result
                measured = measure(tokenizer, rows)
            print(json.dumps(measured) if as_json else data_table(measured))
            return
        import torch

        from ..bench.engines import Choice
        from ..bench.report import table
        from ..bench.run import Protocol, compare
        from ..bench.shapes import LINEARS

        choice = Choice.read(engines, methods)
        where = _device(device)
        on_gpu = where.type == "cuda"
        torch.set_num_threads(1)
        protocol = Protocol(_dtype(dtype, on_gpu), dropout, own_stacks, choice, warmup, rounds, profile)
        result = compare(shape or ("llama-3.1-8b" if on_gpu else LINEARS), workload, tokens, protocol, where)
        print(json.dumps(result) if as_json else table(result))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the notices that suit a training run: one for each of dozens of models would drown the table."""
    logger = logging.getLogger("rasa_train")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _device(name: str) -> Any:
    import torch

    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise UserError("--device cuda: torch sees no GPU here; --device cpu measures on the processor")
    return torch.device("cuda" if available and name != "cpu" else "cpu")


def _dtype(name: str, on_gpu: bool) -> Any:
    import torch

    fast = on_gpu or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return getattr(torch, ("bfloat16" if fast else "float32") if name == "auto" else name)


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
