"""A grid of runs: what it consists of, and what happens when one of them fails or is stopped."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rasa_train.errors import UserError
from rasa_train.recipe.load import load_recipe
from rasa_train.recipe.sweep import commands, grid
from tests.conftest import Cli


@pytest.fixture
def recipe(tmp_path: Path, tiny_llama: Path, token_rows: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model: {{name: {tiny_llama}, dtype: float32}}\nadapter: {{method: rasa, r: 4, k: 1}}\n"
        f"data: {{dataset: {token_rows}}}\ntraining: {{max_steps: 1, batch_size: 4}}\noutput_dir: runs\n"
    )
    return path


def test_the_grid_has_every_combination(recipe: Path) -> None:
    points = grid(str(recipe), ["training.max_steps=2"], ["adapter.r=4,8", "seed=1,2,3"])
    loaded = [load_recipe(recipe, point.arguments[1:]).recipe for point in points]
    found = [(r.adapter.model_dump()["r"], r.seed, r.training.max_steps, r.output_dir) for r in loaded]
    assert found == [(r, seed, 2, f"runs/adapter.r={r},seed={seed}") for r in (4, 8) for seed in (1, 2, 3)]


def test_keys_that_change_together(recipe: Path) -> None:
    """Lists of values in step, beside a grid; a pattern with | is one value of a single key, or stands in brackets."""
    together = "adapter.r,adapter.alpha=4,8,16|8,16,32"
    points = grid(str(recipe), [], [together, "seed=1,2"])
    loaded = [load_recipe(recipe, point.arguments[1:]).recipe for point in points]
    found = [(r.adapter.model_dump()["r"], r.adapter.model_dump()["alpha"], r.seed) for r in loaded]
    assert found == [(r, 2 * r, seed) for r in (4, 8, 16) for seed in (1, 2)]
    assert points[0].name == "adapter.r=4,adapter.alpha=8,seed=1" and points[0].values["adapter.alpha"] == "8"
    (single,) = grid(str(recipe), [], ["adapter.targets=.*q_proj|.*v_proj"])
    assert single.values == {"adapter.targets": ".*q_proj|.*v_proj"}
    pairs = grid(str(recipe), [], ["adapter.targets, seed=.*(q|v)_proj,[k_proj] | 1,2"])
    assert [list(point.values.values()) for point in pairs] == [[".*(q|v)_proj", "1"], ["[k_proj]", "2"]]


def test_sweep_together(recipe: Path, cli: Cli) -> None:
    """One option with several assignments, the option repeated, and the form of --sweep are the same runs; what follows
    the next option is an override again."""
    lists = ("adapter.targets=[q_proj],[q_proj, v_proj],all-linear", "adapter.r=8,4,2")
    forms = [
        ("--sweep-together", *lists, "--print", "training.max_steps=2"),
        ("--sweep-together", lists[0], f"--sweep-together={lists[1]}", "--print", "training.max_steps=2"),
        ("--print", "training.max_steps=2", f"--sweep-together={lists[0]}", lists[1]),
        ("training.max_steps=2", "--print", "--sweep", f"adapter.targets,adapter.r={lists[0][16:]}|8,4,2"),
    ]
    printed = [cli("train", recipe, *form, check=True).stdout for form in forms]
    assert len(set(printed)) == 1
    loaded = [load_recipe(words[1], words[2:]).recipe for words in map(shlex.split, printed[0].splitlines())]
    assert [(r.adapter.targets, r.adapter.model_dump()["r"], r.training.max_steps) for r in loaded] == [
        (["q_proj"], 8, 2),
        (["q_proj", "v_proj"], 4, 2),
        ("all-linear", 2, 2),
    ]
    grown = cli("train", recipe, "--sweep", "seed=1,2", "--sweep-together", *lists, "--print", "--json", check=True)
    assert len(json.loads(grown.stdout)) == 6
    wrong = cli("train", recipe, "--sweep-together", "adapter.r=4,8", "training.max_steps=2", "--print")
    assert wrong.returncode == 2 and "adapter.r has 2, training.max_steps has 1" in wrong.stderr


def test_values_with_commas_and_slashes(recipe: Path) -> None:
    points = grid(str(recipe), [], ["adapter.targets=all-linear,[q_proj, v_proj]", "tracking.project=a/b,'c,d'"])
    assert len(points) == 4 and len({point.output_dir for point in points}) == 4
    assert all(point.output_dir.parent == Path("runs") for point in points), "a slash makes no directory"
    loaded = [load_recipe(recipe, point.arguments[1:]).recipe for point in points]
    assert [r.adapter.targets for r in loaded][1:3] == ["all-linear", ["q_proj", "v_proj"]]
    assert [r.tracking.project for r in loaded] == ["a/b", "c,d", "a/b", "c,d"]


def test_printed_commands_are_what_a_shell_would_run(recipe: Path, cli: Cli) -> None:
    done = cli(
        "train", recipe, "--sweep", "adapter.targets=[q_proj],[v_proj]", "--print", "--nproc", "2", "seed=5", check=True
    )
    lines = [shlex.split(line) for line in done.stdout.splitlines()]
    assert [line[:3] for line in lines] == [["rasa-train", str(recipe), "seed=5"]] * 2
    assert all(line[-1] == "--nproc=2" for line in lines)
    recipes = [load_recipe(line[1], line[2:-1]).recipe for line in lines]
    assert [r.adapter.targets for r in recipes] == [["q_proj"], ["v_proj"]] and not Path("runs").exists()
    assert commands(grid(str(recipe), [], ["seed=1"]), []) == [f"rasa-train {recipe} seed=1 output_dir=runs/seed=1"], (
        "no quotes that are not needed"
    )


@pytest.mark.parametrize(
    ("sweeps", "overrides", "words"),
    [
        (["adapter.r"], [], "section.key=value"),
        (["adapter.r=4,,8"], [], "section.key=value"),
        (["adapter.r=4,-8"], [], r"adapter.r must be > 0, got -8"),
        (["adapter.rr=4,8"], [], "unknown key adapter.rr"),
        (["seed=1", "seed=2"], [], "given twice"),
        (["seed=1,1"], [], "seed=1: a value is given twice"),
        (["seed=1,2"], ["seed=3"], "leave one of them out"),
        (["output_dir=a,b"], [], "makes the directories itself"),
        (["seed,output_dir=1,2|a,b"], [], "makes the directories itself"),
        (["adapter.r,seed=4,8|1"], [], r"2 lists of equally many values.* got 2, of 2 \(4,8\); 1 \(1\)"),
        (["adapter.r,seed=4,8"], [], r"2 keys that change together need 2 lists .* got 1, of 2 \(4,8\)"),
        (["adapter.r,seed=4|1|2"], [], "need 2 lists .* got 3"),
        (["adapter.r,seed=4|"], [], "section.key=value"),
        (["adapter.r,=4|1"], [], "section.key=value"),
        (["adapter.r,seed=4|1", "seed=2"], [], "given twice"),
        (["adapter.r,seed=4|1"], ["seed=3"], "leave one of them out"),
    ],
)
def test_a_wrong_sweep(sweeps: list[str], overrides: list[str], words: str, recipe: Path) -> None:
    with pytest.raises(UserError, match=words):
        grid(str(recipe), overrides, sweeps)


@pytest.mark.slow
def test_a_failing_run_does_not_stop_the_others_and_done_runs_are_skipped(recipe: Path, cli: Cli) -> None:
    """The second of three runs finds another run in its place; after that is cleared, only it has work left."""
    other = Path("runs/seed=2")
    other.mkdir(parents=True)
    (other / "recipe.yaml").write_text("seed: 7\n")
    sweep = ("train", recipe, "--sweep", "seed=1,2,3", "--json")
    done = cli(*sweep)
    runs = json.loads(done.stdout)["runs"]
    assert done.returncode == 2 and [run["exit_code"] for run in runs] == [0, 2, 0]
    assert [run["result"] and run["result"]["steps"] for run in runs] == [1, None, 1]
    assert runs[0]["values"] == {"seed": "1"} and "run 2 of 3 failed" in done.stderr
    first = os.stat("runs/seed=1/adapter/adapter.safetensors").st_mtime_ns
    (other / "recipe.yaml").unlink()
    again = cli(*sweep, check=True)
    assert [run["exit_code"] for run in json.loads(again.stdout)["runs"]] == [0, 0, 0]
    assert os.stat("runs/seed=1/adapter/adapter.safetensors").st_mtime_ns == first, "a complete run is not run again"


@pytest.mark.slow
def test_a_stop_ends_the_sweep_and_the_state_is_saved(recipe: Path) -> None:
    command = [sys.executable, "-m", "rasa_train.cli.train", str(recipe), "training.max_steps=100000"]
    process = subprocess.Popen([*command, "--sweep", "seed=1,2"], stderr=subprocess.PIPE, text=True)
    metrics = Path("runs/seed=1/metrics.jsonl")
    while not metrics.exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 75, errors
    assert any(Path("runs/seed=1/checkpoints").glob("step-*")) and not Path("runs/seed=2").exists()
    assert "the same command goes on" in errors
