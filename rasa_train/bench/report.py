"""Format results as tables of text."""

from __future__ import annotations

import textwrap
from typing import Any


def table(result: dict[str, Any]) -> str:
    """Return the table of a result of ``run.compare``."""
    workload = result["workload"]
    lines = [
        f"{result['shape']}, {workload['name']}: {workload['sequences']} sequences, {workload['tokens']:,} tokens, "
        f"{result['dtype']}, dropout {result['dropout']}; {result['device']}; median of {result['rounds']} rounds",
        "",
        f"{'engine':<12}{'method':<8}{'ms/step':>9}{'range':>16}{'over base':>11}{'tokens/s':>11}{'peak MiB':>10}",
    ]
    for row in result["rows"]:
        low, high = (1e3 * seconds for seconds in row["seconds_range"])
        peak = row["peak_memory_bytes"]
        lines.append(
            f"{row['engine']:<12}{row['method'] or '-':<8}{1e3 * row['seconds_per_step']:>9.1f}"
            f"{f'{low:.1f}-{high:.1f}':>16}{row['over_base']:>11.3f}{row['tokens_per_second']:>11,.0f}"
            f"{'?' if peak is None else f'{peak / 2**20:,.0f}':>10}"
        )
    profiled = [row for row in result["rows"] if "seconds_by_operation" in row]
    for row in profiled:
        longest = list(row["seconds_by_operation"].items())[:LONGEST]
        rest = sum(row["seconds_by_operation"].values()) - sum(took for _, took in longest)
        parts = [f"{name.removeprefix('aten::')[:24]} {1e3 * took:.0f}" for name, took in longest]
        title = f"{row['engine']} {row['method'] or ''}".strip()
        lines += ["", f"{title}, ms by operation:", *_lines([*parts, f"others {1e3 * rest:.0f}"])]
    lines += [""] if profiled else []
    for row in result["failed"]:
        lines.append(
            f"NOT TIMED: {row['engine']} {row['method']} is wrong: its loss is off by {row['loss_error']:.1e}, its "
            f"gradients by {row['gradient_error']:.1e} (cosine {row['gradient_cosine']:.4f})"
        )
    lines += [f"does not fit: {row['engine']} {row['method'] or ''}: {row['why']}" for row in result["does_not_fit"]]
    lines += [f"not run: {row['engine']} {row['method'] or ''}: {row['why']}" for row in result["skipped"]]
    return "\n".join(lines)


LONGEST = 8
"""Number of a profile's operations that the table names; ``--json`` has all of them."""


def _lines(parts: list[str]) -> list[str]:
    return textwrap.wrap(", ".join(parts), 78, initial_indent="  ", subsequent_indent="  ")


def counters_table(result: dict[str, Any]) -> str:
    """Return the table of a result of ``run.count_all``."""
    lines = [
        f"{result['shape']}, dropout {result['dropout']}",
        "",
        f"{'engine':<12}{'method':<8}{'adapter KB/token/layer':>24}{'ops/micro-batch':>17}{'packing ops/step':>18}",
    ]
    lines += [
        f"{row['engine']:<12}{row['method'] or '-':<8}{row['bytes_per_token_and_layer'] / 1e3:>24.1f}"
        f"{row['dispatched_ops']:>17,}{row['packing_ops']:>18,}"
        for row in result["rows"]
    ]
    return "\n".join(lines)


def data_table(result: dict[str, Any]) -> str:
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
