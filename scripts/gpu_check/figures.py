"""The outcome of a step and the one figure that matters, from what the step left."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

from .results import EXIT_NEEDS_GPU, FAILED, NEEDS_GPU, OK, Results, Row

NAMES = {"lora": "LoRA", "rasa": "RaSA"}


def judge_tests(results: Results, code: int, printed: str, *, on_gpu: bool) -> tuple[str, str]:
    """Judge pytest: where there is a GPU at least one test must have run."""
    lines = [line.strip("= ") for line in printed.splitlines() if re.search(r"\d+ \w+.* in [\d.]+s", line)]
    figure = re.sub(r" in [\d.]+s.*", "", lines[-1]) if lines else "no test ran"
    with results.log.open("a") as log:
        log.write(printed)
    if code == 0 and "passed" in figure:
        return OK, figure
    idle = code in (0, 5)  # all were skipped, or none has the marker
    return NEEDS_GPU if idle and not on_gpu else FAILED, figure


def judge_checks(step: str, results: Results, code: int, printed: str) -> tuple[str, str]:
    """Judge a worker: each of its checks has a line in the results."""
    checks = results.checks(step)
    try:
        figure = FIGURES[step](checks)
    except (KeyError, TypeError, ValueError, IndexError):  # a check is missing, or failed before it had its figures
        figure = ""
    wrong = [name for name, row in checks.items() if row["outcome"] == FAILED]
    if wrong:
        figure = f"failed: {', '.join(wrong)}" + (f"; {figure}" if figure else "")
    return {0: OK, EXIT_NEEDS_GPU: NEEDS_GPU}.get(code, FAILED), figure


def judge_comparison(step: str, command: str, results: Results, code: int, printed: str) -> tuple[str, str]:
    """Judge a comparison: every engine of ours must have been right, have had room, and have been timed."""
    lines = printed.strip().splitlines()
    try:
        result = json.loads(lines[-1])
    except (IndexError, ValueError):
        said = results.log.read_text().splitlines() if results.log.exists() else []
        last = next((line.strip(" │") for line in reversed(said) if re.search(r"\w", line)), "")
        return FAILED, f"no result: {last}"[:200]
    results.add_comparison({"step": step, "command": command, "result": result})
    parts = [_speed(result), _against_others(result)]
    for key, says in (("failed", "wrong"), ("does_not_fit", "does not fit"), ("skipped", "not installed")):
        if rows := result.get(key):
            parts.append(f"{says}: {', '.join(map(title, rows))}")
    ours = [row for row in result["rows"] if row["engine"] == "ours"]
    missing = [row for key in ("failed", "does_not_fit") for row in result.get(key, []) if row["engine"] == "ours"]
    fine = code == 0 and ours and not missing and not result["failed"]
    return OK if fine else FAILED, "; ".join(filter(None, parts))


def title(row: Row) -> str:
    """``ours RaSA``"""
    method: str = row.get("method") or ""
    return " ".join(filter(None, [row["engine"], NAMES.get(method, method)]))


def row_of(result: Row, engine: str, method: str | None) -> Row | None:
    """The row of an engine in a comparison, if it was timed."""
    return next((row for row in result["rows"] if (row["engine"], row["method"]) == (engine, method)), None)


def _speed(result: Row) -> str:
    lora, rasa = (row_of(result, "ours", method) for method in ("lora", "rasa"))
    if lora is None or rasa is None:
        return ""
    ratio = rasa["seconds_per_step"] / lora["seconds_per_step"]
    speed = f"{rasa['tokens_per_second']:,.0f} tokens/s"
    return f"RaSA/LoRA {ratio:.3f}; RaSA/base {rasa['over_base']:.3f}, {speed}"


def _against_others(result: Row) -> str:
    """How many times as long the others take for a step as ours with the same method."""
    parts = []
    for row in result["rows"]:
        same = row_of(result, "ours", row["method"])
        if row["engine"] not in ("ours", "base") and same is not None:
            parts.append(f"{row['engine']} {row['seconds_per_step'] / same['seconds_per_step']:.2f}")
    return f"others/ours: {', '.join(parts)}" if parts else ""


def _environment(checks: dict[str, Row]) -> str:
    device, found = checks["versions"]["values"]["device"], checks["ceilings"]["values"]
    rates = f"{found['bf16_tflops']:.3g} TFLOP/s, copies {found['copy_tb_s']:.3g} TB/s"
    return f"{device}: {rates}, {found['host_us_per_small_op']:.2g} us an operation"


def _correctness(checks: dict[str, Row]) -> str:
    words = {OK: "right", FAILED: "wrong"}
    count = Counter(words.get(row["outcome"], "not run") for row in checks.values())
    outcomes = ", ".join(f"{number} {word}" for word, number in count.items())
    worst = max(gradient_errors(checks).values())
    return f"{outcomes}; gradients of methods within {worst:.1%}"


def gradient_errors(checks: dict[str, Row]) -> dict[str, float]:
    """``RaSA fast`` -> largest relative error of a gradient, of the checks of methods."""
    found: dict[str, float] = {}
    for name, row in checks.items():
        if name.startswith("method "):
            method = name.removeprefix("method ")
            for kind, values in (row.get("values") or {}).items():
                found[f"{NAMES.get(method, method)} {kind}"] = values["gradient_error"]
    return found


def _training(checks: dict[str, Row]) -> str:
    found = checks["stopped and resumed"]["values"]
    speed = f"{found['tokens_per_second']:,.0f} tokens/s"
    same = "bit-identical" if found["identical"] else f"largest difference {found['largest_difference']:.2g}"
    return f"resumed after {found['stopped_at']} of {found['steps']} steps: {same}; {speed}"


def _profile(checks: dict[str, Row]) -> str:
    found = checks["step of RaSA"]["values"]
    parts = {part: times["device_ms"] or times["host_ms"] for part, times in found["parts"].items()}
    peak = f", peak {found['peak_gib']:.1f} GiB" if found["peak_gib"] else ""
    return "RaSA, ms: " + ", ".join(f"{part.replace('_', ' ')} {value:.1f}" for part, value in parts.items()) + peak


def _extras(checks: dict[str, Row]) -> str:
    found: dict[str, dict[str, Any]] = checks["fused norms and SwiGLU"]["values"]
    eager, fused = found["eager"]["base"]["ms"], found.get("liger", {}).get("base", {}).get("ms")
    return f"base, 8 layers: {eager:.0f} ms" + (f", with Liger {fused:.0f} ms" if fused else "")


def _rates(checks: dict[str, Row]) -> str:
    products = [row["values"] for name, row in checks.items() if name.startswith("products ")]
    ranks = products[-1]["ranks"]
    return f"r = 39 takes {ranks['39']['sum_us'] / ranks['40']['sum_us']:.2f} of r = 40"


FIGURES: dict[str, Callable[[dict[str, Row]], str]] = {
    "environment": _environment,
    "correctness": _correctness,
    "training": _training,
    "profile": _profile,
    "extras": _extras,
    "rates": _rates,
}
