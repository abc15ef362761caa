"""``rasa-analyze``: analyse weight updates."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ..errors import UserError, say
from .analyze_output import against_base_found, bar, save, table
from .errors import Command, Group, start, user_errors

if TYPE_CHECKING:
    from torch import Tensor

    from ..analysis.updates import Updates
    from ..merging.options import Base as WantedBase

app = typer.Typer(
    cls=Group,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, and nothing else.")]
Kinds = Annotated[
    list[str] | None,
    typer.Option("--kind", help="Kind of linear to analyse, such as q_proj; repeat for several. (default: all)"),
]
Base = Annotated[
    str | None, typer.Option(help="Hub id or directory of an adapter's base model. (default: the adapter's)")
]
AnyBase = Annotated[
    bool, typer.Option("--any-base", help="Accept a base other than the one the adapter was trained on.")
]
Plots = Annotated[Path | None, typer.Option(metavar="DIR", help="Directory for the figures, as PNG and SVG.")]


@app.callback()
def main_help() -> None:
    """Analyse weight updates: reconstruction error, spectra and subspaces."""


@app.command(cls=Command)
def reconstruct(
    source: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[ADAPTER | BASE TUNED]",
            help="Adapter or run directory; or the directories of a base and a fine-tuned model.",
        ),
    ] = None,
    random: Annotated[
        str | None,
        typer.Option(metavar="L,B,A[,Q]", help="Use random updates instead: L layers, B x A, dense or of rank Q."),
    ] = None,
    r: Annotated[int, typer.Option(min=1, help="Number of ranks per layer, which is the budget.")] = 8,
    k: Annotated[
        str | None, typer.Option(metavar="K,K,...", help="Numbers of shared ranks to try. (default: 0, 1, 2, 4, ... r)")
    ] = None,
    sweeps: Annotated[int, typer.Option(min=1, help="Number of sweeps of the coordinate descent.")] = 10,
    start: Annotated[
        Literal["rasa", "theorem", "random", "best"],
        typer.Option(
            help="Start of the descent. rasa: as training starts. theorem: at LoRA's best. random: at random values. "
            "best: the better of rasa and theorem."
        ),
    ] = "rasa",
    seed: Annotated[int, typer.Option(help="Seed of random updates and random starts.")] = 0,
    base: Base = None,
    any_base: AnyBase = False,
    kind: Kinds = None,
    plots: Plots = None,
    as_json: Json = False,
) -> None:
    """Measure how well LoRA and RaSA of r ranks per layer can represent updates (the paper's Figures 2 and 3)."""
    with user_errors():
        from ..analysis.capacity import Descent, advice, capacity
        from ..analysis.updates import chosen

        ks = _ks(k, r)
        updates = chosen(_updates(source or [], random, _base(base, any_base), seed), kind or [])
        with bar(len(updates) * len(ks)) as tick:
            kinds = [capacity(read(), r, ks, Descent(sweeps, start, seed), tick) for read in updates.values()]
        said = advice(kinds, r)
        if plots is not None and all(found.e_lora > 0 for found in kinds):
            from ..analysis.plots import figure_2, figure_3

            usual = next((n for n in (max(r // 8, 1), *ks) if n in ks and n), 0)
            marks = sorted({n for n in (5, 10, 20, sweeps) if n <= sweeps})
            save(
                plots,
                {"reconstruction-by-sweep": figure_2(kinds, usual), "reconstruction-by-k": figure_3(kinds, marks)},
            )
        if as_json:
            print(
                json.dumps(
                    {"r": r, "sweeps": sweeps, "start": start, "kinds": [c.as_json() for c in kinds], "advice": said}
                )
            )
            return
        rows = [
            [c.kind, f"{c.layers} x {c.shape[0]} x {c.shape[1]}", f"{c.e_lora / c.norm2:.4f}" if c.norm2 else "-"]
            + [f"{c.e_rasa[n][-1] / c.e_lora:.4f}" if c.e_lora else "-" for n in ks]
            for c in kinds
        ]
        table(
            f"r={r}, {sweeps} sweeps: LoRA's least error (share of |dW|^2), and RaSA's over LoRA's",
            ["kind", "updates", "LoRA", *(f"k={n}" for n in ks)],
            rows,
        )
        say(said)


@app.command(cls=Command)
def spectrum(
    source: Annotated[
        list[str],
        typer.Argument(
            metavar="ADAPTER | BASE TUNED",
            help="Adapter or run directory; or the directories of a base and a fine-tuned model.",
        ),
    ],
    base: Base = None,
    any_base: AnyBase = False,
    kind: Kinds = None,
    plots: Plots = None,
    as_json: Json = False,
) -> None:
    """Show singular values and ranks of each update, and RaSA's private and shared energy and mixing weights."""
    with user_errors():
        from ..analysis.spectrum import spectrum as spectrum_of
        from ..analysis.updates import chosen

        updates = chosen(_updates(source, None, _base(base, any_base), 0), kind or [])
        rows = []
        with bar(len(updates)) as tick:
            for read in updates.values():
                found = read()
                for i, name in enumerate(found.names):
                    rows.append((found.kind, name, spectrum_of(found.layer(i)), found.energy(i)))
                tick()
        mixing = _mixing(source)
        if plots is not None:
            from ..analysis.plots import heat_map, spectra

            lines: dict[str, list[list[float]]] = {}
            for of_kind, _, s, _ in rows:
                lines.setdefault(of_kind, []).append(s.singular_values)
            maps = {f"mixing-{name}": heat_map(d, name, "shared rank", "layer") for name, d in mixing.items()}
            save(plots, {"spectra": spectra(lines), **maps})
        if as_json:
            layers = [{"kind": k, "name": name, **asdict(s), **(asdict(e) if e else {})} for k, name, s, e in rows]
            print(json.dumps({"layers": layers, "mixing": {name: d.tolist() for name, d in mixing.items()}}))
            return
        shared = any(e for _, _, _, e in rows)
        columns = ["name", "norm", "largest", "rank", "stable", "entropy", *(["private", "shared"] if shared else [])]
        cells = [
            [name, f"{s.norm:.3g}", f"{s.spectral_norm:.3g}", str(s.numerical_rank)]
            + [f"{s.stable_rank:.2f}", f"{s.entropy_rank:.2f}"]
            + ([f"{e.private if e else 0:.1%}", f"{e.shared if e else 0:.1%}"] if shared else [])
            for _, name, s, e in rows
        ]
        table("updates by layer: norms, and ranks by three measures", columns, cells)


@app.command(cls=Command)
def subspace(
    first: Annotated[Path, typer.Argument(metavar="ADAPTER", help="Adapter or run directory.")],
    others: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[OTHER]",
            help="Another adapter or run directory; several with --against-base. (default: the first again)",
        ),
    ] = None,
    i: Annotated[
        int | None, typer.Option("-i", min=1, help="Number of directions of the first adapter. (default: 4)")
    ] = None,
    j: Annotated[
        int | None,
        typer.Option(
            "-j",
            min=1,
            help="Number of directions of the second adapter (default: 4), or of W with --against-base (default: all "
            "up to a smaller side of 1024, else 64).",
        ),
    ] = None,
    against_base: Annotated[
        bool,
        typer.Option(
            "--against-base",
            help="Compare the directions of each update with those of the base's W, and with random ones (Figure 8).",
        ),
    ] = False,
    ranks: Annotated[
        str | None,
        typer.Option(
            metavar="R,R,...",
            help="For --against-base: numbers of directions of dW. (default: 1, 2, 4, ... up to its rank or 64)",
        ),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            metavar="M,N",
            help="Compare layer M of the first adapter with layer N of the second. (default: each layer with the "
            "same layer)",
        ),
    ] = None,
    side: Annotated[
        Literal["right", "left"], typer.Option(help="Singular vectors to compare: right (inputs) or left (outputs).")
    ] = "right",
    amplification: Annotated[
        int | None,
        typer.Option(metavar="R", min=1, help="Also show how much the first adapter's top R directions amplify W."),
    ] = None,
    base: Base = None,
    any_base: AnyBase = False,
    kind: Kinds = None,
    plots: Plots = None,
    as_json: Json = False,
) -> None:
    """Show the similarity phi(A, B, i, j) of the updates of two adapters or two layers (the LoRA paper's section 7)."""
    with user_errors():
        from ..analysis.compare import Directions, compare
        from ..analysis.updates import chosen, of_adapter

        if against_base:
            unfit = {"-i": i, "--layers": layers, "--amplification": amplification}
            if given := [option for option, value in unfit.items() if value is not None]:
                raise UserError(f"{given[0]} does not go with --against-base, which takes --ranks and -j")
            runs = {str(path): of_adapter(path, _base(base, any_base)) for path in (first, *(others or ()))}
            picked = {name: chosen(updates, kind or []) for name, updates in runs.items()}
            against_base_found(picked, _ranks(ranks), (j, side), plots, as_json)
            return
        if ranks is not None or len(others or ()) > 1:
            raise UserError("--ranks and more than two adapters need --against-base")
        second, i, j = others[0] if others else None, i or 4, j or 4
        pair = _layers(layers)
        if second is None and pair is None and amplification is None:
            raise UserError(
                "an adapter is always fully similar to itself: give another adapter, --layers M,N, --amplification R "
                "or --against-base"
            )
        one = chosen(of_adapter(first, _base(base, any_base)), kind or [])
        two = one if second is None else of_adapter(second, _base(base, any_base))
        found = compare(one, two, Directions(i, j, side, amplification), pair)
        if plots is not None:
            from ..analysis.plots import heat_map

            figures = {f"phi-{row.name}": heat_map(row.grid, row.name, "j", "i", 1.0) for row in found}
            save(plots, figures)
        if as_json:
            print(json.dumps({"i": i, "j": j, "side": side, "sites": [row.as_json() for row in found]}))
            return
        columns = ["name", f"phi({i}, {j})", "random"]
        cells = [[row.name, f"{row.phi:.4f}", f"{row.random:.4f}"] for row in found]
        if amplification is not None:
            columns += ["|dW|", "|U'WV|", "of W", "random W", "factor"]
            for row, cell in zip(found, cells, strict=True):
                if (a := row.amplification) is not None:
                    cell += [f"{a.update_norm:.3g}", f"{a.projection:.3g}", f"{a.projection_own:.3g}"]
                    cell += [f"{a.projection_random:.3g}", f"{a.factor:.2f}"]
        table("phi = 1: the smaller subspace lies in the larger; random: mean of random subspaces", columns, cells)


def main() -> None:
    """Entry point of the console script."""
    start(app)


def _base(name: str | None, any_base: bool) -> WantedBase:
    from ..merging.options import Base

    return Base(name, any_base=any_base)


def _updates(source: Sequence[str], random: str | None, base: WantedBase, seed: int) -> Updates:
    from ..analysis.updates import of_adapter, of_models, random_updates

    if (random is None) == (not source) or len(source) > 2:
        raise UserError("give either an adapter or run, or a base and a fine-tuned model, or --random L,B,A,Q")
    if random is not None:
        numbers = random.split(",")
        if len(numbers) not in (3, 4) or not all(n.strip().isdecimal() and int(n) > 0 for n in numbers):
            raise UserError(f"--random must be L,B,A or L,B,A,Q (layers, out, in, rank), got {random!r}")
        L, b, a, *q = map(int, numbers)
        return random_updates(L, b, a, q[0] if q else None, seed)
    return of_models(*source) if len(source) == 2 else of_adapter(Path(source[0]), base)


def _mixing(source: Sequence[str]) -> dict[str, Tensor]:
    from ..adapters.saved import read_adapter
    from ..analysis.mixing import mixing_weights
    from ..merging.source import find_adapter

    return mixing_weights(read_adapter(find_adapter(Path(source[0]))).tensors) if len(source) == 1 else {}


def _ks(text: str | None, r: int) -> list[int]:
    if text is None:
        return sorted({0, r, *(2**n for n in range(r.bit_length()) if 2**n <= r)})
    numbers = text.split(",")
    if not all(n.strip().isdecimal() and int(n) <= r for n in numbers):
        raise UserError(f"--k must be numbers in [0, r={r}], separated by commas, got {text!r}")
    return sorted({int(n) for n in numbers})


def _ranks(text: str | None) -> list[int] | None:
    numbers = [] if text is None else text.split(",")
    if not all(n.strip().isdecimal() and int(n) > 0 for n in numbers):
        raise UserError(f"--ranks must be numbers from 1, separated by commas, got {text!r}")
    return sorted({int(n) for n in numbers}) or None


def _layers(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    first, _, second = text.partition(",")
    if not (first.strip().isdecimal() and second.strip().isdecimal()):
        raise UserError(f"--layers must be two layer numbers, such as 0,3, got {text!r}")
    return int(first), int(second)


if __name__ == "__main__":
    main()
