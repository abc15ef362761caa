"""``rasa-bench``: measure engines side by side, counters, or data preparation."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..errors import UserError, shown
from .errors import Command, start, user_errors

if TYPE_CHECKING:
    from ..bench.against_full import AgainstFull

app = typer.Typer(
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command(cls=Command)
def bench(
    shape: Annotated[
        str | None,
        typer.Option(
            help="Shape of the model: linears-1024, llama-small, llama-42m, llama-3.1-8b, a model directory or a "
            "config.json. (default: linears-1024 on a CPU, llama-42m there for --peers; llama-3.1-8b on a GPU and for "
            "--counters)"
        ),
    ] = None,
    workload: Annotated[
        Literal["packed", "long", "2x4096", "padded"],
        typer.Option(
            help="Tokens of a step. packed: sequences of mean length 250 end to end. long: 4 long sequences. 2x4096: 2 "
            "sequences of 4096 tokens, all of them supervised, with r = 16 and dropout 0.1, as in NeMo AutoModel's "
            "benchmark. padded: 3 padded sequences, as in the paper."
        ),
    ] = "packed",
    tokens: Annotated[
        int | None,
        typer.Option(
            min=64,
            help="Number of tokens of a step, except for padded. (default: 1024 on a CPU; on a GPU as many as fit, up "
            "to 16384, and 8192 for 2x4096; for --peers 2000, which are 8 sequences)",
        ),
    ] = None,
    dropout: Annotated[
        float | None,
        typer.Option(min=0.0, max=0.9, help="Dropout on the adapters' input. (default: 0.05; 0.1 for 2x4096)"),
    ] = None,
    engines: Annotated[
        str | None,
        typer.Option(help="Engines to run, such as ours,peft; the frozen base always runs. (default: all)"),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(help="Methods to run: lora, rasa, vera, mora; separate several by commas. (default: all)"),
    ] = None,
    own_stacks: Annotated[
        bool,
        typer.Option(
            "--own-stacks",
            help="Run the paper's and PEFT's engines with full logits and recomputed activations, as their users do; "
            "without this option engines differ only in the adapter.",
        ),
    ] = False,
    kernels: Annotated[
        Literal["none", "liger"],
        typer.Option(help="liger: all engines compute norms, rotary embedding and SwiGLU with Liger's kernels (GPU)."),
    ] = "none",
    device: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option(help="Device. auto: a GPU if there is one.")
    ] = "auto",
    dtype: Annotated[
        Literal["auto", "bfloat16", "float32"],
        typer.Option(help="Dtype of the base. auto: bfloat16, or float32 on a CPU that multiplies bfloat16 slowly."),
    ] = "auto",
    warmup: Annotated[int, typer.Option(min=1, help="Number of untimed steps of each engine.")] = 3,
    rounds: Annotated[int, typer.Option(min=1, help="Number of timed steps of each engine.")] = 8,
    profile: Annotated[
        bool, typer.Option("--profile", help="Also show the operations in which each engine spends a step.")
    ] = False,
    counters: Annotated[
        bool, typer.Option("--counters", help="Count bytes and operations instead, which are the same on any machine.")
    ] = False,
    compiled: Annotated[
        bool, typer.Option("--compiled", help="For --counters: count compiled layers too (minutes).")
    ] = False,
    peers: Annotated[
        Literal["trl"] | None,
        typer.Option(
            help="Train with rasa-train's loop and with that of a peer instead, end to end: the same rows, base and "
            "optimizer, each in a process of its own. trl: TRL's SFTTrainer with PEFT (pip install trl peft)."
        ),
    ] = None,
    against_full: Annotated[
        bool,
        typer.Option(
            "--against-full",
            help="Train with full fine-tuning and with adapters instead: memory by what it is for, and time of a step "
            "with AdamW. With --counters: memory alone, of a model of any size.",
        ),
    ] = False,
    data: Annotated[
        bool,
        typer.Option("--data", help="Measure data preparation instead: tokenising, caching, and a second start."),
    ] = False,
    tokenizer: Annotated[str | None, typer.Option(help="For --data: hub id or directory of a tokenizer.")] = None,
    rows: Annotated[
        int, typer.Option(min=100, help="For --data: number of rows, by default as many as in MetaMathQA.")
    ] = 395_000,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, and nothing else.")] = False,
) -> None:
    """Measure the cost of adapters, with several engines on the same model and tokens.

    rasa-bench                         # a CPU, about two minutes of CPU time

    rasa-bench --workload long         # a GPU: Llama-3.1-8B with random weights

    rasa-bench --peers trl             # our training and TRL's, end to end

    rasa-bench --against-full          # full fine-tuning, LoRA and RaSA: memory and time

    rasa-bench --counters --json
    """
    with user_errors(), _quiet():
        if dropout is None:
            dropout = 0.1 if workload == "2x4096" else 0.05
        if against_full:
            with redirect_stdout(sys.stderr):
                against = _against_full(
                    (shape, tokens), (device, dtype), (methods, dropout), counters, (warmup, rounds)
                )
            from ..bench.report import against_full_table

            _print(against.as_json(), as_json, lambda: against_full_table(against))
            return
        if counters:
            from ..bench.engines import Choice
            from ..bench.report import counters_table
            from ..bench.run import count_all

            chosen = Choice.read(engines, methods)
            counted = count_all(shape or "llama-3.1-8b", dropout, chosen, compiled=compiled)
            _print(counted.as_json(), as_json, lambda: counters_table(counted))
            return
        if data:
            if tokenizer is None:
                raise UserError("--data needs --tokenizer: give a hub id, or a directory with a tokenizer.json")
            from ..bench.data import measure
            from ..bench.report import data_table

            with redirect_stdout(sys.stderr):  # DeepSpeed may print that there is no GPU; stdout is for the result
                measured = measure(tokenizer, rows)
            _print(measured, as_json, lambda: data_table(measured))
            return
        import torch

        where = _device(device)
        on_gpu = where.type == "cuda"
        torch.set_num_threads(1)
        if peers:
            with redirect_stdout(sys.stderr):
                from ..bench.end_to_end import Settings, compare_ends, sequences
                from ..bench.report import ends_table

                settings = Settings(
                    shape or ("llama-3.1-8b" if on_gpu else "llama-42m"),
                    sequences(tokens),
                    _dtype(dtype, on_gpu),
                    dropout,
                    warmup,
                    rounds,
                    where,
                )
                ends = compare_ends(settings)
            _print(ends.as_json(), as_json, lambda: ends_table(ends))
            return
        from ..bench.engines import Choice
        from ..bench.report import table
        from ..bench.run import Protocol, compare
        from ..bench.shapes import LINEARS
        from ..models.fused import fusable

        choice = Choice.read(engines, methods)
        protocol = Protocol(
            _dtype(dtype, on_gpu), dropout, own_stacks, choice, warmup, rounds, profile, kernels == "liger"
        )
        if protocol.fused and (why := fusable("llama")):
            raise UserError(f"--kernels liger cannot be used: {why}", key="--kernels")
        result = compare(shape or ("llama-3.1-8b" if on_gpu else LINEARS), workload, tokens, protocol, where)
        _print(result.as_json(), as_json, lambda: table(result))


def _against_full(
    size: tuple[str | None, int | None],
    where: tuple[str, str],
    what: tuple[str | None, float],
    counters: bool,
    steps: tuple[int, int],
) -> AgainstFull:
    import torch

    from ..bench.against_full import Settings, compare_with_full, count_against_full
    from ..bench.engines import Choice

    device = _device("cpu" if counters else where[0])
    on_gpu = device.type == "cuda"
    torch.set_num_threads(1)
    settings = Settings(
        shape=size[0] or ("llama-3.1-8b" if counters else "llama-42m"),
        tokens=size[1] or (4_096 if on_gpu or counters else 1_024),
        dtype=torch.bfloat16 if counters else _dtype(where[1], on_gpu),
        dropout=what[1],
        choice=Choice.read(None, what[0]),
        warmup=steps[0],
        rounds=steps[1],
        device=device,
    )
    return count_against_full(settings) if counters else compare_with_full(settings)


def _print(result: Mapping[str, object], as_json: bool, table: Callable[[], str]) -> None:
    print(json.dumps(result) if as_json else shown(table()))


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide notices meant for a training run: one for each of dozens of models would bury the table."""
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
        raise UserError("--device cuda: torch finds no GPU on this machine; use --device cpu to measure on the CPU")
    return torch.device("cuda" if available and name != "cpu" else "cpu")


def _dtype(name: str, on_gpu: bool) -> Any:
    import torch

    fast = on_gpu or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return getattr(torch, ("bfloat16" if fast else "float32") if name == "auto" else name)


def main() -> None:
    """Entry point of the console script."""
    start(app)


if __name__ == "__main__":
    main()
