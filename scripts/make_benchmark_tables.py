"""Write the GPU tables of docs/BENCHMARKS.md from the figures in benchmarks/, one file for each card and torch.

    python scripts/make_benchmark_tables.py

``python scripts/gpu_check --record`` writes these files, as docs/GPU.md describes.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "BENCHMARKS.md"
BENCHMARKS = ROOT / "benchmarks"
BEGIN, END = "<!-- begin: made from benchmarks/ by make docs -->", "<!-- end -->"
FORMAT = 1
"""Format of the files that this script can read."""
WIDTH = 120
NAMES = {"lora": "LoRA", "rasa": "RaSA", "vera": "VeRA", "mora": "MoRA"}
TITLES = {
    "bench_packed": "Packed, dropout 0.05",
    "bench_fused": "Packed, dropout 0.05, norms, rotary embedding and SwiGLU of all engines with Liger's kernels",
    "bench_no_dropout": "Packed, no dropout",
    "bench_peers": "Beside others, packed",
    "bench_long": "Four long sequences",
    "bench_padded": "The paper's micro-batch, each engine with its users' own stack",
}
"""Titles of the comparisons, in the order of the page."""

Benchmark = dict[str, Any]
Row = dict[str, Any]
Measured = dict[str, float]
"""Figures measured for a goal, by a note that tells them apart."""


def row_of(benchmark: Benchmark, comparison: str, engine: str, method: str | None) -> Row | None:
    """Return the row of an engine in a comparison; None if the engine was not timed."""
    rows = benchmark["comparisons"].get(comparison, {}).get("rows", [])
    return next((row for row in rows if (row["engine"], row["method"]) == (engine, method)), None)


def rasa_over_lora(benchmark: Benchmark) -> Measured:
    """Return RaSA's time of a step over LoRA's, with and without dropout."""
    found = {}
    for note, name in (("dropout 0.05", "bench_packed"), ("0", "bench_no_dropout")):
        lora, rasa = (row_of(benchmark, name, "ours", method) for method in ("lora", "rasa"))
        if lora and rasa:
            found[note] = rasa["seconds_per_step"] / lora["seconds_per_step"]
    return found


def over_base(benchmark: Benchmark) -> Measured:
    """Return RaSA's time of a step over the frozen base's, with and without dropout."""
    found = {}
    for note, name in (("dropout 0.05", "bench_packed"), ("0", "bench_no_dropout")):
        if rasa := row_of(benchmark, name, "ours", "rasa"):
            found[note] = rasa["over_base"]
    return found


FUSED = "bench_fused"
"""Comparison in which Liger's kernels compute norms, rotary embedding and SwiGLU of all engines."""


def speed(*comparisons: str) -> Callable[[Benchmark], Measured]:
    """Return a function that gives RaSA's tokens per second in each comparison."""

    def measured(benchmark: Benchmark) -> Measured:
        found = {}
        for name in comparisons:
            if rasa := row_of(benchmark, name, "ours", "rasa"):
                found["all with Liger" if name == FUSED else ""] = rasa["tokens_per_second"]
        return found

    return measured


def over_ours(engine: str, method: str, *comparisons: str) -> Callable[[Benchmark], Measured]:
    """Return a function that gives another engine's time of a step over ours in each comparison."""

    def measured(benchmark: Benchmark) -> Measured:
        found = {}
        for name in comparisons:
            other, ours = (row_of(benchmark, name, of, method) for of in (engine, "ours"))
            if other and ours:
                note = "all with Liger" if name == FUSED else ""
                found[note] = other["seconds_per_step"] / ours["seconds_per_step"]
        return found

    return measured


def peak(benchmark: Benchmark) -> Measured:
    """Return RaSA's peak memory in gigabytes at 16,384 tokens, the number of tokens in the goal."""
    tokens = benchmark["comparisons"].get("bench_packed", {}).get("workload", {}).get("tokens")
    rasa = row_of(benchmark, "bench_packed", "ours", "rasa")
    return {"": rasa["peak_memory_bytes"] / 1e9} if rasa and tokens == 16_384 else {}


@dataclass(frozen=True)
class Goal:
    """A goal, and the function that measures it in a benchmark."""

    title: str
    must: float
    """Value that must be reached."""
    stretch: float
    """More ambitious value."""
    measured: Callable[[Benchmark], Measured]
    """Returns the figures to compare with the goal; none if they were not measured."""
    at_most: bool = False
    """Whether a smaller value is better."""
    figure: str = "{:.3f}"
    """Format of a figure."""

    def reached(self, value: float, wanted: float) -> bool:
        """Whether a value is as good as wanted."""
        return value <= wanted if self.at_most else value >= wanted

    def verdict(self, benchmark: Benchmark | None) -> str:
        """Return the cell of the table: the figures, and whether all of them reach the goal."""
        measured = self.measured(benchmark) if benchmark is not None else {}
        if not measured:
            return "not run"
        figures = ", ".join(
            self.figure.format(value) + (f" ({note})" if note else "") for note, value in measured.items()
        )
        met = all(self.reached(value, self.must) for value in measured.values())
        stretched = all(self.reached(value, self.stretch) for value in measured.values())
        return f"{figures}: " + ("met, stretch too" if stretched else "met" if met else "missed")

    def row(self, benchmark: Benchmark | None) -> list[str]:
        """Return the row of the table."""
        return [self.title, f"{self.must:,g}", f"{self.stretch:,g}", self.verdict(benchmark)]


GOALS = [
    Goal("RaSA / LoRA", 1.02, 1.01, rasa_over_lora, at_most=True),
    Goal("RaSA over the frozen base", 1.09, 1.04, over_base, at_most=True),
    Goal("tokens/s, packed", 17_500, 19_500, speed("bench_packed", FUSED), figure="{:,.0f}"),
    Goal("tokens/s, long", 15_000, 16_500, speed("bench_long"), figure="{:,.0f}"),
    Goal("over peft-tuned with Liger", 1.10, 1.15, over_ours("peft-tuned", "lora", "bench_peers", FUSED)),
    Goal("over peft (`--own-stacks`)", 1.8, 2.0, over_ours("peft", "lora", "bench_padded")),
    Goal("over paper (`--own-stacks`, padded)", 4.0, 6.0, over_ours("paper", "rasa", "bench_padded")),
    Goal("over per-linear", 1.03, 1.07, over_ours("per-linear", "lora", "bench_peers")),
    Goal("peak memory, 16,384 tokens, GB", 75, 70, peak, at_most=True, figure="{:.0f}"),
]


def page(text: str, benchmarks: Sequence[Benchmark]) -> str:
    """Return the page with the part between the marks replaced."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{tables(benchmarks)}\n\n{END}{after}"


def tables(benchmarks: Sequence[Benchmark]) -> str:
    """Return the sections of all cards; only the goals if nothing was measured yet."""
    if not benchmarks:
        return "Not run yet: no GPU has been at hand.\n\n" + goals(None)
    return "\n\n".join(card(benchmark) for benchmark in benchmarks)


def card(benchmark: Benchmark) -> str:
    """Return the section of one card, with everything that was measured on it."""
    parts = [f"### {benchmark['device']}, torch {benchmark['versions']['torch'].partition('+')[0]}", facts(benchmark)]
    ended = {name: row["outcome"] for name, row in benchmark["steps"].items() if row["outcome"] != "ok"}
    if ended:
        said = ", ".join(f"`{name}`: {outcome}" for name, outcome in ended.items())
        parts.append(wrapped(f"Not every step ended well: {said}."))
    later: dict[str, list[str]] = {}
    for name, row in benchmark["steps"].items():
        if row.get("commit", benchmark["commit"]) != benchmark["commit"] and row["outcome"] != "left out":
            later.setdefault(row["commit"], []).append(f"`{name}`")
    parts += [wrapped(f"{', '.join(names)} were run at commit {commit}.") for commit, names in later.items()]
    parts.append(goals(benchmark))
    parts += [comparison(benchmark, name) for name in TITLES if name in benchmark["comparisons"]]
    parts += [part for part in (checks(benchmark), training(benchmark), profile(benchmark)) if part]
    return "\n\n".join(parts)


def facts(benchmark: Benchmark) -> str:
    """Return a paragraph on date, versions, and the speed that this card reaches."""
    versions, found = benchmark["versions"], benchmark["facts"]
    packages = ("transformers", "triton", "peft", "liger-kernel")
    listed = ", ".join(f"{name} {versions[name]}" for name in packages if versions.get(name))
    text = f"{benchmark['date']}, {listed}" + (f", driver {versions['driver']}" if versions.get("driver") else "")
    text += f"; commit {benchmark['commit']}." if benchmark["commit"] else "."
    if "memory_gib" in found:
        text += f" {found['memory_gib']:g} GiB."
    if "bf16_tflops" in found:
        text += (
            f" Products in bf16 reach {found['bf16_tflops']:g} TFLOP/s, copies {found['copy_tb_s']:g} TB/s read and "
            f"written; the host takes {found['host_us_per_small_op']:g} us to ask for a small operation."
        )
    return wrapped(text)


def goals(benchmark: Benchmark | None) -> str:
    """Return the table of goals, and whether they were met."""
    head = ["goal on one H200, bf16, no recomputation", "must", "stretch", "measured"]
    return table(head, [goal.row(benchmark) for goal in GOALS])


def comparison(benchmark: Benchmark, name: str) -> str:
    """Return the table of one comparison, with the command that repeats it and the gradient check of every engine."""
    result = benchmark["comparisons"][name]
    head = ["engine", "method", "ms/step (range)", "over base", "tokens/s", "peak GiB", "gradient error", "cosine"]
    rows = []
    for row in result["rows"]:
        low, high = (1e3 * seconds for seconds in row["seconds_range"])
        memory = row["peak_memory_bytes"]
        gradients = ["", ""]
        if row["method"] is not None:
            gradients = [f"{row['gradient_error']:.3f}", f"{row['gradient_cosine']:.4f}"]
        rows.append(
            [
                *name_of(row),
                f"{1e3 * row['seconds_per_step']:.1f} ({low:.1f}-{high:.1f})",
                f"{row['over_base']:.3f}",
                f"{row['tokens_per_second']:,.0f}",
                "?" if memory is None else f"{memory / 2**30:.1f}",
                *gradients,
            ]
        )
    workload = result["workload"]
    said = f"{TITLES[name]}: {workload['sequences']} sequences, {workload['tokens']:,} tokens, {result['dtype']}."
    for key, why in (("failed", "computes something else"), ("does_not_fit", "does not fit"), ("skipped", None)):
        said += "".join(f" {' '.join(name_of(r))}: {why or r['why']}." for r in result.get(key, []))
    return f"{wrapped(said)}\n\n    {result['command'].removesuffix(' --json')}\n\n{table(head, rows)}"


def name_of(row: Row) -> list[str]:
    """Return the names of engine and method."""
    return [row["engine"], NAMES.get(row["method"], row["method"] or "")]


def checks(benchmark: Benchmark) -> str:
    """Return the tables of the correctness checks: methods with both ways to compute them, and other checks with their
    figures."""
    found = benchmark["checks"]
    if not found:
        return ""
    head = ["method, against fp32", "loss, fast", "gradient, fast", "loss, plain", "gradient, plain"]
    methods, others = [], []
    for name, row in found.items():
        values = row.get("values") or {}
        if name.startswith("method ") and values.keys() >= {"fast", "plain"}:
            errors = [f"{values[k][e]:.2g}" for k in ("fast", "plain") for e in ("loss_error", "gradient_error")]
            methods.append([f"{name.removeprefix('method ')}{said_of(row)}", *errors])
        else:
            figures = [f"{key.replace('_', ' ')} {v:.2g}" for key, v in values.items() if isinstance(v, float)]
            others.append([name, row["outcome"], ", ".join(figures) or row.get("why", "")])
    return f"{table(head, methods)}\n\n{table(['check', 'outcome', 'errors and times'], others)}"


def said_of(row: Row) -> str:
    """Return the outcome of a check in brackets, or an empty text if it is ok."""
    return "" if row["outcome"] == "ok" else f" ({row['outcome']})"


def training(benchmark: Benchmark) -> str:
    """Return a sentence on the result of the run of rasa-train."""
    row = benchmark["training"].get("stopped and resumed", {})
    values = row.get("values") or {}
    if "tokens_per_second" not in values:
        return ""
    same = "to the bit" if values["identical"] else f"within {values['largest_difference']:.2g} of it at every step"
    return wrapped(
        f"A run of rasa-train over {values['steps']} steps, stopped after {values['stopped_at']} and resumed, has the "
        f"losses of an undisturbed run {same}{said_of(row)}: {values['mean_of_last']:g} and "
        f"{values['mean_of_last_resumed']:g} in the mean of the last 20 steps."
    )


def profile(benchmark: Benchmark) -> str:
    """Return the table of the parts of an optimizer step, on the device and on the host."""
    steps = {n.removeprefix("step of "): r["values"] for n, r in benchmark["profile"].items() if "values" in r}
    if not steps:
        return ""
    parts = next(iter(steps.values()))["parts"]
    head = ["ms, device / host", *(part.replace("_", " ") for part in parts), "gaps", "peak GiB"]
    rows = []
    for name, values in steps.items():
        times = [f"{pair['device_ms']:g} / {pair['host_ms']:g}" for pair in values["parts"].values()]
        more = [f"{values[key]:g}" if values.get(key) is not None else "?" for key in ("gaps_ms", "peak_gib")]
        rows.append([name, *times, *more])
    return table(head, rows)


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a table in Markdown."""
    lines = ["".join(f"| {cell} " for cell in cells).replace("|  ", "| ") + "|" for cells in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def wrapped(text: str) -> str:
    """Return a paragraph with lines of at most ``WIDTH`` characters."""
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)


def read(directory: Path = BENCHMARKS) -> list[Benchmark]:
    """Return the contents of every file, in the order of their names.

    Raises:
        ValueError: a file has another format.
    """
    found = []
    for path in sorted(directory.glob("*.json")):
        benchmark: Benchmark = json.loads(path.read_text())
        if benchmark.get("format") != FORMAT:
            raise ValueError(f"{path} has format {benchmark.get('format')}, not {FORMAT}")
        found.append(benchmark)
    return found


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(), read()))
    print(PAGE)
