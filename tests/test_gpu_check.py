"""``scripts/gpu_check``: steps are run, cut and judged, and figures recorded. The steps here are small processes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from gpu_check import command, driver, record, steps, training, wheels
from gpu_check.driver import RESERVE, Step, judge_by_exit_code, run_steps
from gpu_check.figures import judge_checks, judge_comparison, judge_tests
from gpu_check.measure import Check, Wrong, run_checks
from gpu_check.results import EXIT_NEEDS_GPU, FAILED, LEFT_OUT, NEEDS_GPU, NOT_INSTALLED, OK, TIMED_OUT, Results
from gpu_check.summary import WIDTH, succeeded, table

ROOT = Path(__file__).resolve().parents[1]
ALL = [step.name for step in steps.all_steps(tiny=True)]


def shell(name: str, script: str, limit: float = 300.0) -> Step:
    return Step(name, ["bash", "-c", script], limit, judge_by_exit_code, captured=True)


def run(listed: list[Step], directory: Path, seconds: float = 600.0) -> tuple[Results, list[str]]:
    """Run steps with so many seconds for them; returns what was said, too."""
    results, said = Results(directory), []
    deadline = time.monotonic() + RESERVE + seconds
    run_steps(listed, results, deadline=deadline, environment=dict(os.environ), directory=directory, say=said.append)
    return results, said


def gone(pid: int) -> bool:
    """Whether a process has ended (one that nobody has waited for yet has ended too)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def eventually(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + 120
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


# -- the driver ----------------------------------------------------------------------------------------------


def test_a_step_that_takes_too_long_is_killed_with_all_its_children(tmp_path: Path) -> None:
    stubborn = "(trap '' TERM; sleep 300) & echo $$ $! > pids; echo begun; wait"
    results, said = run([shell("slow", stubborn, limit=3), shell("next", "echo fine")], tmp_path)
    assert results.steps()["slow"]["outcome"] == TIMED_OUT and 3 <= results.steps()["slow"]["seconds"] < 60
    assert results.steps()["next"]["outcome"] == OK, "what comes next is run"
    assert said[0].startswith("slow: out of time") and "killed after 3 s; begun" in said[0]
    pids = (tmp_path / "pids").read_text().split()
    assert len(pids) == 2 and all(eventually(partial(gone, int(pid))) for pid in pids)


def test_children_that_outlive_their_step_are_killed(tmp_path: Path) -> None:
    results, _ = run([shell("leaves", "sleep 300 & echo $! > pid; echo done")], tmp_path)
    assert results.steps()["leaves"]["outcome"] == OK
    assert eventually(lambda: gone(int((tmp_path / "pid").read_text())))


def test_the_budget_cuts_the_tail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "LEAST", 1.0)
    listed = [shell("short", "sleep 0.2"), shell("cut", "sleep 300"), shell("late", "echo never > late")]
    results, said = run(listed, tmp_path, seconds=4.0)
    found = results.steps()
    assert [found[step.name]["outcome"] for step in listed] == [OK, TIMED_OUT, LEFT_OUT]
    assert 1 < found["cut"]["seconds"] < 60 and not (tmp_path / "late").exists()
    assert said[2] == "late: left out, 0 s; 0 s were left"


def test_results_are_on_disk_while_steps_run(tmp_path: Path) -> None:
    seen = "grep -c outcome results.jsonl; echo to the log >&2"
    results, _ = run([shell("first", "true"), shell("second", seen), shell("third", "exit 3")], tmp_path)
    found = results.steps()
    assert found["second"]["figure"] == "1" and "to the log" in results.log.read_text()
    assert (found["third"]["outcome"], found["third"]["figure"]) == (FAILED, "exit code 3")


INTERRUPTED = """
import os, sys, time
from pathlib import Path
from gpu_check.driver import Step, judge_by_exit_code, run_steps
from gpu_check.results import Results

here = Path(sys.argv[1])
step = Step("long", ["bash", "-c", "sleep 300 & echo $$ $! > pids; wait"], 250, judge_by_exit_code)
end = time.monotonic() + 400
run_steps([step], Results(here), deadline=end, environment=dict(os.environ), directory=here, say=print)
"""


def test_an_interrupted_driver_leaves_nothing(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "scripts")}
    words = [sys.executable, "-c", INTERRUPTED, str(tmp_path)]
    interrupted = subprocess.Popen(words, env=environment, stderr=subprocess.DEVNULL)
    pids = tmp_path / "pids"
    assert eventually(lambda: pids.exists() and pids.read_text().endswith("\n"))
    interrupted.send_signal(signal.SIGINT)
    assert interrupted.wait(300) != 0
    assert all(eventually(partial(gone, int(pid))) for pid in pids.read_text().split())


# -- outcomes ------------------------------------------------------------------------------------------------


def fails() -> dict[str, Any]:
    raise ValueError("no such thing")


def finds_an_error() -> dict[str, Any]:
    raise Wrong("an error is above 0.02", {"y": 0.5})


def test_every_check_of_a_worker_has_its_line(tmp_path: Path) -> None:
    results = Results(tmp_path)
    right, on_gpu = Check("right", lambda: {"y": 0.001}), Check("on a GPU", fails, gpu=True)
    missing = Check("missing", fails, package="no_such_package")
    assert run_checks("some", [right, missing, Check("broken", fails), Check("off", finds_an_error)], results) == 1
    found = results.checks("some")
    assert [row["outcome"] for row in found.values()] == [OK, NOT_INSTALLED, FAILED, FAILED]
    assert found["right"]["values"] == {"y": 0.001} and found["off"]["values"] == {"y": 0.5}
    assert found["broken"]["why"] == "ValueError: no such thing" and found["off"]["why"] == "an error is above 0.02"
    assert run_checks("others", [missing], results) == EXIT_NEEDS_GPU
    if not training.ON_GPU:
        assert run_checks("others", [on_gpu], results) == EXIT_NEEDS_GPU
        assert run_checks("others", [on_gpu, right], results) == 0
        assert judge_checks("others", results, EXIT_NEEDS_GPU, "")[0] == NEEDS_GPU
    assert judge_checks("some", results, 1, "") == (FAILED, "failed: broken, off")


@pytest.mark.parametrize(
    ("printed", "code", "on_gpu", "outcome"),
    [
        ("....\n4 passed, 1 skipped in 2.10s", 0, True, OK),
        ("4 skipped in 2.10s", 0, False, NEEDS_GPU),
        ("4 skipped in 2.10s", 0, True, FAILED),
        ("9 deselected in 0.10s", 5, False, NEEDS_GPU),
        ("9 deselected in 0.10s", 5, True, FAILED),
        ("1 failed, 3 passed in 2.10s", 1, True, FAILED),
    ],
)
def test_tests_are_judged(printed: str, code: int, on_gpu: bool, outcome: str, tmp_path: Path) -> None:
    found = judge_tests(Results(tmp_path), code, printed, on_gpu=on_gpu)
    assert found == (outcome, printed.split("\n")[-1].partition(" in ")[0])


def timed(engine: str, method: str | None, seconds: float) -> dict[str, Any]:
    times = {"seconds_per_step": seconds, "over_base": seconds, "tokens_per_second": 9}
    return {"engine": engine, "method": method, **times}


def test_a_comparison_is_judged_by_our_engines(tmp_path: Path) -> None:
    results = Results(tmp_path)
    ours = [timed("ours", "lora", 1.1), timed("ours", "rasa", 1.11)]
    rows = [timed("base", None, 1.0), *ours, timed("peft", "lora", 2.2)]
    too_large = {"engine": "paper", "method": "rasa", "why": ""}
    whole = {"rows": rows, "failed": [], "skipped": [], "does_not_fit": [too_large]}
    judge = partial(judge_comparison, "bench_peers", "rasa-bench --json", results)
    outcome, figure = judge(0, "a notice\n" + json.dumps(whole))
    assert outcome == OK
    assert figure == ("RaSA/LoRA 1.009; RaSA/base 1.110, 9 tokens/s; others/ours: peft 2.00; does not fit: paper RaSA")
    assert results.comparison("bench_peers") == {"step": "bench_peers", "command": "rasa-bench --json", "result": whole}
    wrong = {"engine": "ours", "method": "rasa", "why": "", "loss_error": 1.0}
    assert judge(0, json.dumps(whole | {"does_not_fit": [wrong]}))[0] == FAILED
    assert judge(0, json.dumps(whole | {"failed": [wrong]}))[0] == FAILED
    assert judge(1, json.dumps(whole))[0] == FAILED
    results.log.write_text("Traceback\nRuntimeError: no luck\n╰────╯\n")
    assert judge(1, "Killed") == (FAILED, "no result: RuntimeError: no luck")


def losses(*values: float) -> list[dict[str, Any]]:
    more = {"tokens_per_second": 100.0, "seconds": 0.1, "peak_memory_bytes": 1}
    return [{"loss": value, **more} for value in values]


def test_how_near_a_resumed_run_must_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "STEPS", 4)
    monkeypatch.setattr(training, "ON_GPU", False)
    whole = losses(4.0, 3.0, 2.0, 1.0)
    assert training.compared(whole, whole)["identical"]
    near, far, drifted = losses(4.0, 3.0, 2.01, 1.0), losses(4.0, 3.0, 2.2, 0.8), losses(4.04, 3.04, 2.04, 1.04)
    with pytest.raises(Wrong, match="bit-identical"):
        training.compared(whole, near)
    monkeypatch.setattr(training, "ON_GPU", True)
    assert training.compared(whole, near)["largest_difference"] == 0.01
    for other in (far, drifted):
        with pytest.raises(Wrong, match="another one"):
            training.compared(whole, other)
    with pytest.raises(Wrong, match="steps are missing"):
        training.compared(whole, whole[:3])


def test_the_table_fits_80_columns(tmp_path: Path) -> None:
    results = Results(tmp_path)
    results.add({"step": "one", "check": "a check", "outcome": FAILED, "why": "an error that is long " * 9})
    results.add({"step": "one", "outcome": FAILED, "seconds": 61.2, "figure": "failed: a check; " + "words " * 30})
    results.add({"step": "two", "outcome": LEFT_OUT, "seconds": 0, "figure": "3 s were left"})
    results.add({"step": "three", "outcome": NEEDS_GPU, "seconds": 4, "figure": ""})
    lines = table(results, ["one", "two", "three"]).splitlines()
    assert max(map(len, lines)) == WIDTH == 80
    assert re.match(r"one +failed +61  failed: a check; words", lines[2])
    assert any(re.fullmatch(r"two +left out +3 s were left", line) for line in lines)
    assert any(line.startswith("one, a check: an error") for line in lines)
    assert not succeeded(results, ["one"], True) and succeeded(results, ["two", "three"], True)
    assert not succeeded(results, ["three"], False)


# -- the command ---------------------------------------------------------------------------------------------


def gpu_check(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """The command as a user calls it."""
    clean = {name: value for name, value in os.environ.items() if name not in ("OUT", "TINY", "STEPS", "BUDGET")}
    words = [sys.executable, str(ROOT / "scripts" / "gpu_check"), *map(str, arguments)]
    return subprocess.run(words, env={**clean, **variables}, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize(
    ("arguments", "variables", "says"),
    [
        ((), {"STEPS": "nonsense"}, "STEPS: there is no nonsense; there are environment, correctness"),
        ((), {"BUDGET": "x"}, "BUDGET must be a number of seconds, got 'x'"),
        ((), {"BUDGET": "-3"}, "BUDGET must be"),
        ((), {"BUDGET": "nan"}, "BUDGET must be"),
        ((), {"TINY": "yes"}, "TINY must be 0 or 1"),
        (("--fast",), {}, "unrecognized arguments: --fast"),
        (("--wheels", "nowhere"), {}, "nowhere is not a directory"),
        (("--record", "nowhere"), {}, "there is no nowhere/benchmark.json"),
    ],
)
def test_bad_input_is_one_line(arguments: tuple[str, ...], variables: dict[str, str], says: str) -> None:
    done = gpu_check(*arguments, **variables)
    assert (done.returncode, done.stdout) == (2, "")
    assert says in done.stderr and done.stderr.startswith("gpu_check: ") and done.stderr.count("\n") == 1


def test_steps_are_run_in_their_own_order() -> None:
    parsed = partial(command.parsed, environment={})
    assert parsed([]).steps == ALL and parsed([]).budget == command.BUDGET < 540
    assert parsed(["--steps", "rates, bench_long  environment"]).steps == ["environment", "bench_long", "rates"]
    assert command.parsed([], {"TINY": "1", "BUDGET": "77"}).budget == 77


def test_the_tests_that_need_a_gpu_are_found() -> None:
    (tests,) = [step for step in steps.all_steps(tiny=False) if step.name == "gpu_tests"]
    assert {"tests/adapters/test_seeded.py", "tests/test_offload.py"} <= set(tests.command)


def test_earlier_results_stay_when_steps_are_added(tmp_path: Path) -> None:
    facts = {"device": "cpu", "torch": "2.13.0", "tiny": True, "commit": "abc"}
    command.prepared(tmp_path, facts, fresh=True).add({"step": "one", "outcome": OK})
    assert "one" in command.prepared(tmp_path, facts, fresh=False).steps()
    assert command.prepared(tmp_path, facts | {"commit": "abd"}, fresh=False).steps() == {}
    command.prepared(tmp_path, facts, fresh=False).add({"step": "one", "outcome": OK})
    assert command.prepared(tmp_path, facts, fresh=True).steps() == {}


# -- what is recorded ----------------------------------------------------------------------------------------


H100 = "NVIDIA H100 80GB HBM3"


def benchmark(directory: Path, device: str = H100, *, tiny: bool = False, step: str = "training") -> Path:
    """The output directory of a run of two steps, one of which may be left out."""
    directory.mkdir()
    results = Results(directory)
    versions = {"device": device, "versions": {"torch": "2.11.0+cu130"}, "memory_gib": 79.2}
    results.add({"step": "environment", "check": "versions", "outcome": OK, "values": versions})
    results.add({"step": "extras", "outcome": LEFT_OUT, "seconds": 0, "figure": "3 s were left"})
    results.add({"step": step, "check": f"{step} check", "outcome": OK, "seconds": 1, "values": {"x": 1.0}})
    results.add({"step": step, "outcome": OK, "seconds": 2.0, "figure": ""})
    facts = {"device": device, "torch": "2.11.0+cu130", "tiny": tiny}
    record.write_benchmark(results, facts | {"date": "2026-11-27", "command": "c", "commit": "abc"})
    return directory


def test_a_run_is_recorded_under_its_card_and_torch(tmp_path: Path) -> None:
    path = record.record([benchmark(tmp_path / "out")], tmp_path / "benchmarks")
    assert path == tmp_path / "benchmarks" / "nvidia-h100-80gb-hbm3_torch-2.11.0.json"
    found = json.loads(path.read_text())
    assert found["format"] == record.FORMAT and found["facts"] == {"memory_gib": 79.2}
    assert found["training"] == {"training check": {"outcome": OK, "values": {"x": 1.0}}}
    assert found["steps"]["extras"]["outcome"] == LEFT_OUT


def test_runs_of_one_card_are_put_together(tmp_path: Path) -> None:
    first, second = benchmark(tmp_path / "a"), benchmark(tmp_path / "b", step="extras")
    other = benchmark(tmp_path / "c", "NVIDIA H200")
    found = json.loads(record.record([first, second], tmp_path / "benchmarks").read_text())
    assert {name: row["outcome"] for name, row in found["steps"].items()} == {"training": OK, "extras": OK}
    assert found["extras"].keys() == {"extras check"} and found["training"].keys() == {"training check"}
    with pytest.raises(record.Refused, match="are of two cards"):
        record.record([first, other], tmp_path / "benchmarks")


@pytest.mark.parametrize(("device", "tiny"), [("cpu", True), ("cpu", False), (H100, True)])
def test_a_tiny_run_is_not_recorded(device: str, tiny: bool, tmp_path: Path) -> None:
    done = gpu_check("--record", benchmark(tmp_path / "out", device, tiny=tiny))
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "tiny run" in done.stderr


# -- wheels --------------------------------------------------------------------------------------------------


def wheel(folder: Path, name: str, files: dict[str, str]) -> Path:
    info = f"{name}-1.0.dist-info"
    files = {
        **files,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as opened:
        for file, text in files.items():
            opened.writestr(file, text)
        opened.writestr(f"{info}/RECORD", "".join(f"{file},,\n" for file in files))
    return path


def test_wheels_are_made_smaller_and_installed_without_an_index(tmp_path: Path) -> None:
    libraries = {f"bnb/libbitsandbytes_{name}.so": name * 99 for name in ("cuda118", "cuda128", "cuda130", "cpu")}
    path = wheel(tmp_path / "whl", "bnb", {"bnb/__init__.py": "SIZE = 4\n", **libraries})
    wheels.slim(path)
    wheels.slim(path)
    assert wheels.install(tmp_path / "whl", tmp_path / "site") is None
    names = {file.name for file in (tmp_path / "site" / "bnb").iterdir()} - {"__pycache__"}
    assert names == {"__init__.py", "libbitsandbytes_cuda130.so", "libbitsandbytes_cpu.so"}


def test_wheels_that_cannot_be_installed(tmp_path: Path) -> None:
    assert "holds no wheels" in (wheels.install(tmp_path, tmp_path / "site") or "")
    (tmp_path / "broken-1.0-py3-none-any.whl").write_text("no archive")
    assert "broken" in (wheels.install(tmp_path, tmp_path / "site") or "")


def test_every_wheel_is_pinned_by_the_lock() -> None:
    lock = (ROOT / "requirements.lock").read_text()
    assert all(re.search(rf"^{name}==[\w.]+", lock, re.MULTILINE) for name in wheels.PINNED)


# -- all of it -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_tiny_run_from_end_to_end(tmp_path: Path) -> None:
    done = gpu_check(TINY="1", OUT=str(tmp_path))
    results = Results(tmp_path)
    outcomes = {name: row["outcome"] for name, row in results.steps().items()}
    assert outcomes == {name: NEEDS_GPU if name == "gpu_tests" else OK for name in ALL}, done.stdout
    closing = done.stdout.split("\n\n")[1]
    assert done.returncode == 0 and max(map(len, closing.splitlines())) == 80
    assert {row["outcome"] for row in results.checks().values()} <= {OK, NEEDS_GPU}
    found = json.loads((tmp_path / "benchmark.json").read_text())
    assert found["format"] == record.FORMAT and found["device"] == "cpu" and found["tiny"]
    assert found["steps"].keys() == set(ALL) and found["versions"]["torch"]
    assert found["comparisons"].keys() == {name for name in ALL if name.startswith("bench_")}
    assert all(row["rows"] and row["command"].startswith("rasa-bench ") for row in found["comparisons"].values())
    assert found["checks"]["method rasa"]["values"]["fast"]["gradient_error"] > 0
    assert found["training"]["stopped and resumed"]["values"]["identical"]
    assert found["profile"].keys() == {"step of base", "step of LoRA", "step of RaSA"}
    assert "a step of RaSA" in (tmp_path / "profile.txt").read_text()
    assert gpu_check("--record", tmp_path).returncode == 2


@pytest.mark.slow
def test_without_a_gpu_nothing_is_claimed(tmp_path: Path) -> None:
    done = gpu_check(OUT=str(tmp_path), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1 and "torch sees no GPU here" in done.stdout
    assert {row["outcome"] for row in Results(tmp_path).steps().values()} == {NEEDS_GPU}
