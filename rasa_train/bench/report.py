"""Format results as tables of text."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING

from .engines import title
from .run import Comparison, Counters

if TYPE_CHECKING:  # it loads the whole of training
    from .against_full import AgainstFull
    from .end_to_end import EndToEnd


def table(result: Comparison) -> str:
    """Return the table of a comparison."""
    protocol = result.protocol
    lines = [
        f"{result.shape}, {result.workload}: {len(result.sizes)} sequences, {sum(result.sizes):,} tokens, "
        f"{str(protocol.dtype).removeprefix('torch.')}, dropout {protocol.dropout}; {result.device}; "
        f"median of {protocol.rounds} rounds",
        "",
        f"{'engine':<12}{'method':<8}{'ms/step':>9}{'range':>16}{'over base':>11}{'tokens/s':>11}{'peak MiB':>10}",
    ]
    for (engine, method), timing in result.timings.items():
        low, high = (1e3 * seconds for seconds in timing.seconds_range)
        peak = timing.peak_memory_bytes
        lines.append(
            f"{engine:<12}{method or '-':<8}{1e3 * timing.seconds_per_step:>9.1f}{f'{low:.1f}-{high:.1f}':>16}"
            f"{timing.over_base:>11.3f}{timing.tokens_per_second:>11,.0f}"
            f"{'?' if peak is None else f'{peak / 2**20:,.0f}':>10}"
        )
    for label, took in result.profiles.items():
        longest = list(took.items())[:LONGEST]
        rest = sum(took.values()) - sum(seconds for _, seconds in longest)
        parts = [f"{name.removeprefix('aten::')[:24]} {1e3 * seconds:.0f}" for name, seconds in longest]
        lines += ["", f"{title(label)}, ms by operation:", *_lines([*parts, f"others {1e3 * rest:.0f}"])]
    lines += [""] if result.profiles else []
    for label, verdict in result.failed.items():
        lines.append(
            f"NOT TIMED: {title(label)} is wrong: its loss is off by {verdict.loss_error:.1e}, its gradients by "
            f"{verdict.gradient_error:.1e} (cosine {verdict.gradient_cosine:.4f})"
        )
    lines += [f"does not fit: {title(label)}: {why}" for label, why in result.misfits.items()]
    lines += [f"not run: {title(label)}: {why}" for label, why in result.skipped.items()]
    return "\n".join(lines)


LONGEST = 8
"""Number of a profile's operations that the table names; ``--json`` has all of them."""


def _lines(parts: list[str]) -> list[str]:
    return textwrap.wrap(", ".join(parts), 78, initial_indent="  ", subsequent_indent="  ")


def counters_table(result: Counters) -> str:
    """Return the table of what was counted."""
    lines = [
        f"{result.shape}, dropout {result.dropout}",
        "",
        f"{'engine':<12}{'method':<8}{'adapter KB/token/layer':>24}{'ops/micro-batch':>17}{'packing ops/step':>18}",
    ]
    lines += [
        f"{engine:<12}{method or '-':<8}{counted.bytes_per_token_and_layer / 1e3:>24.1f}{counted.dispatched_ops:>17,}"
        f"{counted.packing_ops:>18,}"
        for (engine, method), counted in result.counts.items()
    ]
    if result.compiled:
        lines += ["", f"{'compiled layers':<20}{'KB moved/token/layer':>24}{'KB kept/token/layer':>22}"]
    lines += [
        f"{engine:<12}{method or '-':<8}{found.moved_bytes_per_token_and_layer / 1e3:>24.1f}"
        f"{found.saved_bytes_per_token_and_layer / 1e3:>22.1f}"
        for (engine, method), found in result.compiled.items()
    ]
    return "\n".join(lines)


def ends_table(result: EndToEnd) -> str:
    """Return the table of a comparison end to end."""
    settings, tokens = result.settings, result.tokens
    clock, unit, scale = ("CPU", "ms", 1e-3) if settings.device.type == "cpu" else ("wall", "us", 1.0)
    lines = textwrap.wrap(
        f"{settings.shape}, end to end: {settings.batch} sequences a step, {sum(tokens) / len(tokens):,.0f} tokens on "
        f"average, {str(settings.dtype).removeprefix('torch.')}, dropout {settings.dropout}; median of "
        f"{settings.rounds} steps (range) in {unit} per token; load {result.load:.1f}",
        80,
    )
    lines += ["", f"{'':<10}{'':<6}{'CPU time':<20}{'wall time':<20}{f'{clock} time / ours':<18}{'MiB':>6}"]
    for (side, method), cost in result.costs.items():
        cpu = _with_range(cost.cpu_us_per_token, cost.cpu_us_range, scale)
        wall = _with_range(cost.wall_us_per_token, cost.wall_us_range, scale)
        ratio = _with_range(cost.over_ours, cost.over_ours_range)
        lines.append(
            f"{side:<10}{method or '-':<6}{cpu:<20}{wall:<20}{ratio:<18}{cost.peak_memory_bytes / 2**20:>6,.0f}"
        )
    lines += ["", *(f"{side} {method or ''}: {cost.settings}" for (side, method), cost in result.costs.items())]
    first = result.costs["ours", "lora"].first_loss
    for (side, _), cost in result.costs.items():
        if cost.over_ours is None:
            lines += [f"NO RATIO: the first loss of {side} is {cost.first_loss:.4f}, of ours {first:.4f}"]
    return "\n".join(lines)


def against_full_table(result: AgainstFull) -> str:
    """Return the table of full fine-tuning and adapters."""
    settings, full = result.settings, result.memory["full"].total
    timed = f", median of {settings.rounds} steps (range); load {result.load:.1f}" if result.times else ""
    dtype = str(settings.dtype if result.times else "bfloat16").removeprefix("torch.")
    lines = textwrap.wrap(
        f"{settings.shape}: {sum(settings.sizes):,} tokens a step, {dtype}, dropout {settings.dropout}, AdamW{timed}",
        80,
    )
    lines += ["", f"{'MiB':<8}{'trained':>14}{'weights':>9}{'grads':>9}{'AdamW':>9}{'kept':>9}{'all':>10}{'/ full':>9}"]
    lines += [
        f"{name:<8}{each.trained:>14,}"
        + "".join(f"{_mib(n):>9}" for n in (each.parameters, each.gradients, each.optimizer, each.activations))
        + f"{_mib(each.total):>10}{each.total / full:>9.3f}"
        for name, each in result.memory.items()
    ]
    if result.times:
        clock = "CPU" if settings.device.type == "cpu" else "GPU"
        lines += ["", f"{'':<8}{f'{clock} us/token':<22}{'/ full':<24}{'peak MiB':>10}{'/ full':>9}"]
    for name, time in result.times.items():
        ratio, peak, whole = time.over_full_range, time.peak_memory_bytes, result.times["full"].peak_memory_bytes
        took = f"{time.us_per_token:.0f} ({time.us_range[0]:.0f}-{time.us_range[1]:.0f})"
        over = f"{time.over_full:.3f} ({ratio[0]:.3f}-{ratio[1]:.3f})"
        memory = f"{_mib(peak):>10}{peak / whole:>9.3f}" if peak and whole else f"{'?':>10}"
        lines.append(f"{name:<8}{took:<22}{over:<24}{memory}")
    return "\n".join(lines)


def _mib(size: int) -> str:
    return f"{size / 2**20:,.{0 if size > 2**23 else 1}f}"


def _with_range(value: float | None, limits: tuple[float, float] | None, scale: float = 1.0) -> str:
    if value is None or limits is None:
        return "-"
    low, high = (limit * scale for limit in limits)
    return f"{value * scale:.3g} ({low:.3g}-{high:.3g})"


def data_table(result: Mapping[str, float]) -> str:
    """Return the text of a result of ``data.measure``."""
    mib = 2**20
    return "\n".join(
        (
            f"{result['rows']:,} rows, {result['tokens']:,} tokens (mean {result['mean_length']:.0f}, "
            f"{result['supervised_share']:.0%} supervised), {result['bytes'] / mib:,.0f} MiB of text",
            f"tokenised and cached in {result['seconds']:.0f} s, {result['cpu_seconds']:.0f} s of CPU: "
            f"{result['rows_per_second_and_core']:,.0f} rows/s per core",
            f"cache {result['cache_bytes'] / mib:,.0f} MiB; at most {result['peak_memory_bytes'] / mib:,.0f} MiB of "
            f"memory, and {result['peak_worker_memory_bytes'] / mib:,.0f} MiB in a worker",
            f"second start: the first step is done after {result['second_start_seconds_to_first_step']:.1f} s",
        )
    )
