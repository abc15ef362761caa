"""Reports of runs that are complete, under way and broken: what is read, grouped, said and written."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean, stdev

import pytest
import torch
from safetensors.torch import load_file, save_file

from rasa_train.errors import UserError
from rasa_train.report.charts import MEANS, RUNS, charts, groups
from rasa_train.report.page import embed, render, report_json
from rasa_train.report.runs import find_runs, read_run, read_runs
from rasa_train.report.tables import differences_table, groups_table, runs_table
from tests.conftest import Cli

from .conftest import STEPS, MakeRun, loss_at, write_score


def test_a_complete_run(make_run: MakeRun) -> None:
    run = read_run(make_run("a", "seed=5"), "a")
    assert run.problems == [] and run.state == "complete" and len(run.metrics) == STEPS
    assert run.loss == pytest.approx(fmean(loss_at(step, 0.5, 5) for step in range(31, 41)))
    assert run.last_loss == loss_at(40, 0.5, 5) and "loss" in run.summary
    assert run.total("tokens") == sum(1000 + step for step in range(1, 41))
    exact = [1 - 0.5 - 0.3 / epoch for epoch in (1, 2, 3, 4)]
    assert run.best_and_last() == {
        "math exact_match": pytest.approx((max(exact), exact[-1])),
        "forgetting loss": pytest.approx((2.05, 2.2)),  # lowest is best
    }
    assert run.mixing["self_attn.q_proj"].shape == (6, 6)


def test_scores_in_metrics_and_of_the_finished_adapter(make_run: MakeRun) -> None:
    path = make_run("a", scores=False)
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    lines[9] |= {"eval_forgetting": {"loss": 2.0, "loss_stderr": 0.1}, "eval_words": 0.25}
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_score(path, "math", "step-00000040", 40, 4, {"pass@1": 0.5})
    write_score(path, "math", "adapter", 20, 2, {"pass@1": 0.4})
    found = read_run(path, "a").best_and_last()
    assert found == {"forgetting loss": (2, 2), "words": (0.25, 0.25), "math pass@1": (0.5, 0.4)}


def test_the_first_score_of_a_suite_stands_for_it(make_run: MakeRun) -> None:
    path = make_run("a", scores=False)
    for step in (20, 40):
        few = {"average": 0.5, "hellaswag/acc": 0.4}
        write_score(path, "forgetting", f"step-{step}", step, step / 10, few)
        write_score(path, "math", f"step-{step}", step, step / 10, {f"level {n}": 0.1 for n in range(12)})
    run = read_run(path, "a")
    titles = [column.title for column in runs_table([run]).columns if "BEST" in column.title]
    assert titles == ["forgetting average BEST", "math level 0 BEST"]
    drawn = [chart.y for chart in charts([run])][1:-1]
    assert drawn == ["forgetting average", "forgetting hellaswag/acc", "math level 0"]


BROKEN = {
    "nothing but a recipe": (["metrics.jsonl", "summary.json", "adapter"], "metrics.jsonl is missing"),
    "no recipe": (["recipe.yaml"], "recipe.yaml is missing"),
    "no adapter": (["adapter"], "holds no adapter"),
    "no summary": (["summary.json"], "no summary.json: the run is not complete"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_missing_is_said(case: str, make_run: MakeRun) -> None:
    path = make_run("run", scores=False)
    absent, words = BROKEN[case]
    for name in absent:
        (path / name).rename(path / f".{name}.away")
    run = read_run(path, "run")
    assert any(words in problem for problem in run.problems), run.problems
    assert words in render([run])
    if case == "no recipe":
        assert run.recipe["adapter.method"] == "rasa", "the adapter's own configuration is left"


def test_torn_files(make_run: MakeRun) -> None:
    path = make_run("run")
    (path / "metrics.jsonl").write_text((path / "metrics.jsonl").read_text()[:-20])
    (path / "summary.json").write_text('{"steps": 4')
    (path / "recipe.yaml").write_text("adapter: {r: [")
    (path / "adapter" / "adapter.safetensors").write_bytes(b"torn")
    next((path / "evaluation" / "math").iterdir()).write_text("[]")
    run = read_run(path, "run")
    assert len(run.metrics) == STEPS - 1 and run.state.startswith("step 39")
    for words in (
        "1 damaged line left out",
        "summary.json cannot be read",
        "recipe.yaml cannot",
        "does not match its checksum",
    ):
        assert any(words in problem for problem in run.problems), (words, run.problems)
    assert "Training loss" in render([run])


def test_files_that_hold_something_else(make_run: MakeRun) -> None:
    """Values of the wrong type are values that are not there."""
    path = make_run("run", steps=3)
    lines = ['{"step": 4, "loss": "high", "tokens": null}', '{"step": "5"}', "7", "[1]", '{"step": 6, "loss": NaN}']
    with (path / "metrics.jsonl").open("a") as file:
        file.write("".join(line + "\n" for line in lines))
    (path / "summary.json").write_text('{"steps": "many", "loss": [], "effective_rank": {"q": null}, "seconds": "x"}')
    (path / "recipe.yaml").write_text("adapter: {r: eight, method: [rasa]}\ntraining: {epochs: x, max_steps: y}\n")
    write_score(path, "math", "step-1", "one", None, {"pass@1": "all", "ok": True, "score": 0.5})  # type: ignore
    run = read_run(path, "run")
    assert [row["step"] for row in run.metrics] == [1, 2, 3, 4, 6] and run.best_and_last()["math score"] == (0.5, 0.5)
    assert any("3 damaged lines" in problem for problem in run.problems)
    assert json.dumps(report_json([run]), allow_nan=False) and "Training loss" in render([run])


def bomb(path: Path) -> None:
    levels = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30))
    (path / "recipe.yaml").write_text(f"a0: &a0 [x]\n{levels}")


def numbers_beyond_all_bounds(path: Path) -> None:
    huge = "9" * 400
    (path / "metrics.jsonl").write_text(
        f'{{"step": 1, "loss": 1, "epoch": 5e-324}}\n{{"step": {huge}}}\n' + "[" * 99_999
    )
    (path / "summary.json").write_text(f'{{"steps": {huge}, "loss": 1e308}}')


def pipes(path: Path) -> None:
    for name in ("recipe.yaml", "metrics.jsonl", "summary.json", "evaluation/math/step-00000010.json"):
        (path / name).unlink()
        os.mkfifo(path / name)


def not_text(path: Path) -> None:
    for file in path.rglob("*"):
        if file.is_file():
            file.write_bytes(b"\xff\xfe\x00" * 50)


def nested(path: Path) -> None:
    for name in ("recipe.yaml", "metrics.jsonl", "summary.json", "evaluation/math/step-00000010.json"):
        (path / name).write_text("[" * 100_000)


def tensors_without_dimensions(path: Path) -> None:
    file = path / "adapter" / "adapter.safetensors"
    save_file({name: torch.zeros(()) for name in load_file(file)}, file)


@pytest.mark.parametrize("harm", [bomb, numbers_beyond_all_bounds, pipes, not_text, nested, tensors_without_dimensions])
def test_a_run_of_others_with_damaged_files_is_shown_as_far_as_it_can_be_read(
    harm: Callable[[Path], None], make_run: MakeRun
) -> None:
    path = make_run("run")
    harm(path)
    run = read_run(path, "run")
    assert run.problems and json.dumps(report_json([run]), allow_nan=False) and render([run])


@pytest.mark.parametrize("name", ["recipe.yaml", "summary.json", "metrics.jsonl", "adapter", "evaluation"])
def test_a_link_out_of_a_run_is_not_followed(name: str, make_run: MakeRun, tmp_path: Path) -> None:
    path, elsewhere = make_run("run", "seed=7"), make_run("elsewhere", "seed=54321", floor=0.1)
    shutil.rmtree(path / name) if (path / name).is_dir() else (path / name).unlink()
    (path / name).symlink_to(elsewhere / name)
    run = read_run(path, "run")
    assert any("outside of" in problem for problem in run.problems), run.problems
    lost = {"recipe.yaml": run.recipe.get("seed"), "summary.json": run.summary, "metrics.jsonl": run.metrics}
    assert not (lost | {"adapter": run.mixing, "evaluation": run.scores})[name]


def test_a_run_under_way(make_run: MakeRun) -> None:
    run = read_run(make_run("run", steps=17, complete=False), "run")
    assert run.state == "step 17 of 40", "from the epochs so far"


def test_runs_are_found_and_named_by_what_tells_them_apart(make_run: MakeRun, tmp_path: Path) -> None:
    for name in ("x/r=16/run", "x/r=8/run"):
        make_run(name, scores=False)
    assert [run.name for run in read_runs(find_runs([tmp_path / "x" / "r=8", tmp_path / "x" / "r=16"]))] == [
        "r=8/run",
        "r=16/run",
    ]
    make_run("sweep/r=16", scores=False)
    make_run("sweep/r=8", scores=False)
    assert [path.name for path in find_runs([tmp_path / "sweep"])] == ["r=8", "r=16"], "numbers by their value"
    (tmp_path / "sweep" / "note.json").write_text("{}")
    assert {path.name for path in find_runs([*(tmp_path / "sweep").iterdir()])} == {"r=8", "r=16"}, "as sweep/* does"
    with pytest.raises(UserError, match="no such directory"):
        find_runs([tmp_path / "sweep" / "note.json"])
    with pytest.raises(UserError, match="is not a run and holds none"):
        find_runs([tmp_path / "x"])
    with pytest.raises(UserError, match="no such directory"):
        find_runs([tmp_path / "y"])


@pytest.fixture
def sweep(make_run: MakeRun, tmp_path: Path) -> Path:
    """Two methods, two data fractions, two seeds."""
    for method, floor in (("rasa", 0.4), ("lora", 0.5)):
        for fraction in (0.5, 1.0):
            for seed in (1, 2):
                overrides = [f"adapter.method={method}", f"data.fraction={fraction}", f"seed={seed}"]
                name = f"sweep/{method},fraction={fraction},seed={seed}"
                make_run(name, *overrides, floor=floor + 0.1 * seed - 0.1 * fraction)
    return tmp_path / "sweep"


def test_seeds_are_grouped(sweep: Path) -> None:
    runs = read_runs(find_runs([sweep]))
    found = groups(runs)
    assert [(group.name, len(group.runs)) for group in found] == [
        (f"{method},fraction={fraction}", 2) for method in ("lora", "rasa") for fraction in ("0.5", "1.0")
    ]
    table = groups_table(found)
    assert table is not None and [cell.text for cell in table.rows[0]][1] == "2"
    losses = [run.loss for run in found[0].runs]
    assert table.rows[0][2].value == pytest.approx(fmean(losses)) and f"± {stdev(losses):.2g}" in table.rows[0][2].text
    loss = next(chart for chart in charts(runs) if chart.title == "Training loss")
    assert len(loss.views[RUNS]) == 8 and len(loss.views[MEANS]) == 4
    mean = loss.views[MEANS][0]
    at_5 = [loss_at(5, 0.5 + 0.1 * seed - 0.05, seed) for seed in (1, 2)]
    assert mean.y[4] == pytest.approx(fmean(at_5), rel=1e-4) and mean.spread is not None
    assert mean.spread[4] == pytest.approx(stdev(at_5), rel=1e-4) and list(mean.x)[:2] == ["step", "tokens"]
    assert mean.x["tokens"][1] == 1001 + 1002


def test_accuracy_by_data_fraction(sweep: Path) -> None:
    chart = next(c for c in charts(read_runs(find_runs([sweep]))) if c.title == "math exact_match by data fraction")
    lines = {series.name: series for series in chart.views[RUNS]}
    assert lines["rasa r=4 k=1"].x["share of the data"] == [0.5, 1.0]
    best = [fmean(1 - (0.4 + 0.1 * s - 0.1 * f) - 0.3 / 4 for s in (1, 2)) for f in (0.5, 1.0)]
    assert lines["rasa r=4 k=1"].y == pytest.approx(best)


def test_accuracy_by_model(make_run: MakeRun, tmp_path: Path) -> None:
    """The paper's Figures 6 and 7 show the finished run (LAST), not the checkpoint that did best on the test set."""
    for name, score in (("small", 0.1), ("large", 0.15)):
        path = make_run(f"runs/{name}", f"model.name=org/{name}")
        write_score(path, "math", "adapter", 40, 4, {"exact_match": score})
    runs = read_runs(find_runs([tmp_path / "runs"]))
    assert all(run.best_and_last()["math exact_match"][0] > 0.4 for run in runs)
    chart = next(c for c in charts(runs) if c.title == "math exact_match by model")
    assert chart.categories["model"] == ["large", "small"] and chart.views[RUNS][0].x["model"] == [0, 1]
    assert chart.views[RUNS][0].y == [0.15, 0.1] and "LAST" in chart.note
    damaged = make_run("runs/other", "model.name=org/other") / "recipe.yaml"
    damaged.write_text(damaged.read_text().replace("org/other", "[org, other]"))
    chart = next(c for c in charts(read_runs(find_runs([tmp_path / "runs"]))) if c.title.endswith("by model"))
    assert chart.categories["model"] == ["large", "small"], "a name that is a list is not drawn"


def test_tables(sweep: Path) -> None:
    runs = read_runs(find_runs([sweep]))
    table = runs_table(runs)
    titles = [column.title for column in table.columns]
    assert {"run", "method", "r", "k", "trained", "memory", "time", "loss", "math exact_match BEST"} <= set(titles)
    lora = dict(zip(titles, table.rows[0], strict=True))
    assert (lora["k"].value, lora["k"].text, lora["time"].text, lora["memory"].text) == (None, "–", "0:20", "1.1 GB")
    differences = differences_table(runs)
    assert differences is not None
    assert {row[0].text for row in differences.rows} >= {"adapter.method", "data.fraction", "seed", "adapter.k"}
    assert differences_table(runs[:1]) is None


def test_long_runs_are_thinned_to_means(make_run: MakeRun) -> None:
    run = read_run(make_run("run", steps=3000, complete=False, scores=False), "run")
    series = charts([run])[0].views[RUNS][0]
    assert len(series.y) == len(series.x["step"]) == 300
    assert series.y[0] == pytest.approx(fmean(loss_at(step, 0.5, 42) for step in range(1, 11)), rel=1e-4)


def test_many_long_runs_stay_below_two_megabytes(make_run: MakeRun, tmp_path: Path) -> None:
    run = read_run(make_run("run", steps=400), "run")
    runs = [replace(run, name=f"run {i}", recipe=run.recipe | {"seed": i, "adapter.r": i % 20}) for i in range(60)]
    assert len(render(runs).encode()) < 2_000_000


HOSTILE = "<script>alert(1)</script>\"'&$x"


def test_names_are_text_whatever_they_are(make_run: MakeRun, tmp_path: Path) -> None:
    class Tags(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[tuple[str, dict[str, str | None]]] = []

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.seen.append((tag, dict(attrs)))

    directory = make_run("run", "tracking.project='</script><img src=x onerror=alert(1)>'")
    plain, hostile = Tags(), Tags()
    plain.feed(render([read_run(directory, "run"), read_run(make_run("two"), "two")]))
    page = render([read_run(directory, HOSTILE), read_run(tmp_path / "two", "</style><img src=x>")])
    hostile.feed(page)
    assert [tag for tag, _ in hostile.seen] == [tag for tag, _ in plain.seen]
    assert not any(key.startswith("on") for _, attributes in hostile.seen for key in attributes)
    assert HOSTILE not in page and json.loads(embed({"name": HOSTILE})) == {"name": HOSTILE}


def test_command(sweep: Path, cli: Cli) -> None:
    done = cli("report", sweep, "--output", "o/r.html", "--figures", "figures", check=True)
    assert "8 runs, 8 complete" in done.stdout and Path("o/r.html").stat().st_size < 2_000_000
    rows = list(csv.DictReader(Path("figures/runs.csv").read_text().splitlines()))
    assert len(rows) == 8 and float(rows[0]["loss"]) > 0
    curves = list(csv.DictReader(Path("figures/curves.csv").read_text().splitlines()))
    assert {"Training loss", "Forgetting: forgetting loss"} <= {row["chart"] for row in curves}
    names = {path.name for path in Path("figures").iterdir()}
    assert {"training-loss.png", "training-loss.svg", "seeds.csv", "recipes.csv"} <= names
    data = json.loads(cli("report", sweep, "--json", check=True).stdout)
    assert len(data["runs"]) == 8 and len(data["groups"]) == 4 and not Path("report.html").exists()
    assert data["runs"][-1]["scores"]["math exact_match"].keys() == {"best", "last"}


def test_command_with_wrong_input(cli: Cli, make_run: MakeRun) -> None:
    run = make_run("run")
    for arguments, words in (
        (["nowhere"], "no such directory"),
        ([run, "--live", "--json"], "give only one of them"),
        ([run, "--output", "/proc/none/r.html"], "cannot be written"),
    ):
        done = cli("report", *arguments)
        assert done.returncode == 2 and words in done.stderr and done.stdout == ""


@pytest.mark.slow
def test_live_follows_a_run_to_its_end(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run("run", steps=10, complete=False)
    page = tmp_path / "r.html"
    command = [
        sys.executable,
        "-m",
        "rasa_train.cli.report",
        str(run),
        "--live",
        "--every",
        "0.2",
        "--output",
        str(page),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    while not page.exists():
        assert process.poll() is None
        time.sleep(0.05)
    assert "step 10 of 40" in page.read_text() and '"reloadSeconds":0.2' in page.read_text()
    (run / "summary.json").write_text('{"steps": 10}')
    assert "1 complete" in process.communicate(timeout=600)[0] and process.returncode == 0
    assert '"reloadSeconds":null' in page.read_text()


@pytest.mark.parametrize("name", ["analyze", "report"])
def test_help_loads_no_torch(name: str) -> None:
    code = f"import sys, rasa_train.cli.{name}; assert not {{'torch', 'transformers', 'matplotlib'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
