"""What a person meets first: help, the preflight, and one clear message for each thing that is wrong."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from rasa_train.check.trial_run import Device, host_memory
from rasa_train.cli.errors import Group
from tests.conftest import Cli

SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}


@pytest.fixture
def recipe(tmp_path: Path, tiny_llama: Path, token_rows: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model: {{name: {tiny_llama}, dtype: float32}}\nadapter: {{method: rasa, r: 4, k: 1}}\n"
        f"data: {{dataset: {token_rows}}}\ntraining: {{max_steps: 1}}\noutput_dir: run\n"
    )
    return path


@pytest.mark.parametrize("name", ["analyze", "bench", "eval", "merge", "report", "train"])
def test_help_loads_nothing_heavy(name: str) -> None:
    """What takes seconds to import; rich and typer are all that help needs."""
    heavy = "{'torch', 'transformers', 'numpy', 'matplotlib', 'datasets', 'lm_eval'}"
    code = (
        f"import sys; from typer.testing import CliRunner; from rasa_train.cli.{name} import app\n"
        "shown = CliRunner().invoke(app, ['--help']); assert shown.exit_code == 0 and 'Usage' in shown.output\n"
        f"assert not {heavy} & set(sys.modules), {heavy} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (("train",), "RECIPE is missing"),
        (("train", "r.yaml", "--nproc", "b"), "--nproc must be a number of processes or auto, got 'b'"),
        (("train", "--nonsense"), "--nonsense"),
        (("train", "run"), "RECIPE is missing"),
        (("train", "check"), "RECIPE is missing"),
        (("train", "check", "r.yaml", "--fresh"), "--fresh"),
        (("train", "list", "demo"), "demo"),
        (("train", "copy", "demo", "a", "b"), "b"),
        (("train", "--copy", "demo", "a", "b"), "--copy takes a recipe and one destination"),
        (("merge",), "Missing option '--output'"),
        (("merge", "run"), "Missing option '--output'"),
        (("merge", "extract", "tuned", "--output", "out"), "Missing option '--base'"),
        (("merge", "run", "--output", "out", "--extract", "tuned"), "--extract FINETUNED makes an adapter"),
        (("bench", "--rounds", "many"), "'--rounds'"),
        (("eval", "run", "--suite"), "'--suite'"),
        (("report",), "Missing argument"),
        (("analyze", "reconstruct", "--x"), "--x"),
    ],
)
def test_wrong_options_are_said_in_one_line(command: tuple[str, ...], says: str, cli: Cli) -> None:
    done = cli(*command)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and says in done.stderr and not done.stdout
    assert done.stderr.count("\n") == 1, done.stderr


def test_an_unknown_verb_is_said_in_one_line() -> None:
    app = typer.Typer(cls=Group)
    app.command("add")(lambda: None)
    app.command("sum")(lambda: None)
    done = CliRunner().invoke(app, ["ad"])
    assert done.exit_code == 2 and done.stderr.startswith("error: No such command 'ad'"), done.stderr
    assert done.stderr.count("\n") == 1 and done.stdout == ""


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ("expandable_segments:True", None)),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, ("max_split_size_mb:64", None)),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync"}, (None, "backend:cudaMallocAsync")),
    ],
)
def test_memory_of_a_gpu_grows_in_place_unless_the_user_says_otherwise(
    given: dict[str, str], expected: tuple[str | None, str | None]
) -> None:
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    code = (
        f"import os, sys, rasa_train.cli.train; print(*map(os.environ.get, {names})); assert 'torch' not in sys.modules"
    )
    environment = {name: value for name, value in os.environ.items() if name not in names} | given
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(value) for value in expected]


def test_a_wrong_recipe_is_told_without_transformers(tmp_path: Path) -> None:
    """Nor does a launcher load it, or torch's compiler, until it needs a model: that would be most of its start."""
    recipe = "model: {name: ./nowhere}\nadapter: {method: rasa, r: 4}\ndata: {dataset: no.jsonl}\noutput_dir: o\n"
    (tmp_path / "r.yaml").write_text(recipe)
    code = (
        "import sys, rasa_train.launch.launch\n"
        "from typer.testing import CliRunner; from rasa_train.cli.train import app\n"
        "for word in ('adapter.r=0', 'seed=1'): print(CliRunner().invoke(app, ['r.yaml', word]).stderr)\n"
        "assert not {'transformers', 'torch._dynamo'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "adapter.r" in done.stdout and "'./nowhere' does not exist" in done.stdout


@pytest.mark.parametrize(("method", "count", "rank"), [("lora", 20_971_520, 8), ("rasa", 20_980_256, 39)])
def test_check_with_a_config_alone(method: str, count: int, rank: int, tmp_path: Path, cli: Cli) -> None:
    """Llama-3.1-8B from its shape, no weights, no tokenizer, no data: the paper's counts (21.0M)."""
    (tmp_path / "shape").mkdir()
    (tmp_path / "shape" / "config.json").write_text(json.dumps(SHAPE))
    (tmp_path / "r.yaml").write_text(
        f"model: {{name: shape}}\nadapter: {{method: {method}, r: 8}}\ndata: {{dataset: no.jsonl}}\noutput_dir: o\n"
    )
    done = cli("train", "r.yaml", "--check", "--json", "distributed.gpu_memory_gib=80")
    facts = json.loads(done.stdout)
    assert done.returncode == 2 and not facts["ready"], "neither weights nor data"
    assert facts["trainable_parameters"] == count and facts["total_parameters"] == 8_030_261_248
    assert set(facts["effective_rank"].values()) == {rank} and len(facts["effective_rank"]) == 7
    assert (
        facts["examples"] is facts["optimizer_steps"] is facts["dropped_examples"] is facts["supervised_tokens"] is None
    )
    assert facts["memory_bytes"]["base_weights"] == 2 * 8_030_261_248
    assert facts["memory_bytes"]["adapter_parameters"] == 4 * count
    assert len(facts["problems"]) == 2 and not (tmp_path / "o").exists()
    assert {topic["topic"] for topic in facts["topics"] if not topic["ok"]} == {"model", "data"}


def test_check_with_everything(recipe: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = json.loads(cli("train", "check", recipe, "--json", "training.epochs=2", "training.max_steps=null").stdout)
    assert (facts["method"], facts["examples"], facts["optimizer_steps"]) == ("rasa", 40, 4)
    assert facts["dropped_examples"] == 0 and facts["problems"] == [] and facts["ready"]
    assert facts["median_example"] <= facts["longest_example"] and facts["truncated_examples"] == 0
    assert 0 < facts["seconds_estimate"] < 60 and not (recipe.parent / "run").exists(), "tried elsewhere"
    assert {"torch", "rasa_train"} <= facts["versions"].keys() and facts["devices"][0]["memory_bytes"] > 1e9
    assert facts["contaminated_rows"] is facts["duplicates"] is None, "nobody asked"
    shown = cli("train", "check", recipe, "data.deduplicate=true", check=True).stdout
    assert re.search("^duplicates +[0-9]+$", shown, re.M)
    assert "ready to train" in shown and not any(line.endswith(" ") for line in shown.splitlines())
    (versions,) = [line for line in shown.splitlines() if line.startswith("versions")]
    assert facts["versions"]["accelerate"] in versions, "whole lines where it is not a terminal"
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    in_terminal = re.sub(r"\x1b\[[0-9;]*m", "", cli("train", recipe, "--check", check=True).stdout)
    assert "ready to train" in in_terminal and max(map(len, in_terminal.splitlines())) <= 80
    topics = [line[4:].partition(":")[0] for line in shown.splitlines() if line.startswith("ok ")]
    assert topics == ["recipe", "data", "model", "memory", "disk", "time"]
    assert facts["versions"]["torch"] in shown


def test_columns_that_are_not_used_are_named_once(
    recipe: Path, token_rows: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = recipe.parent
    rows = [json.loads(line) | {"source": "x"} for line in token_rows.read_text().splitlines()]
    (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setenv("HOME", str(home))
    words = ("~/recipe.yaml", "data.dataset=~/rows.jsonl", "output_dir=~/here")
    checked, trained = cli("train", "check", *words).stdout, cli("train", *words, check=True).stderr
    for shown in (checked, trained):
        assert shown.splitlines().count("note: columns of the data that are not used: source") == 1
    assert (home / "here" / "adapter").is_dir() and not (home / "~").exists()


def test_check_tells_a_missing_tokenizer_from_missing_data(tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "shape").mkdir()
    (tmp_path / "shape" / "config.json").write_text(json.dumps({**SHAPE, "num_hidden_layers": 1, "vocab_size": 9}))
    (tmp_path / "rows.jsonl").write_text('{"query": "q", "response": "r"}\n')
    model, adapter = "model: {name: shape}", "adapter: {method: lora, r: 8}"
    (tmp_path / "r.yaml").write_text(f"{model}\n{adapter}\ndata: {{dataset: rows.jsonl}}\noutput_dir: o\n")
    shown = cli("train", "check", "r.yaml").stdout
    assert "--  data: not tokenised, since there is no tokenizer" in shown
    assert "name one in model.tokenizer" in shown and "not here" not in shown


def test_check_knows_what_checkpoints_take(recipe: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Close to what a run has written; a disk with less is said."""
    facts = json.loads(cli("train", recipe, "--check", "--json", "training.checkpoint_every=1").stdout)
    cli("train", recipe, "training.checkpoint_every=1", check=True)
    written = sum(path.stat().st_size for path in (recipe.parent / "run").rglob("*.safetensors"))
    assert 0.5 * written < facts["disk_bytes_needed"] <= written  # headers are large beside tiny tensors
    monkeypatch.setattr("rasa_train.check.trial_run.disk_free", lambda path: facts["disk_bytes_needed"] - 1)
    done = cli("train", recipe, "--check", "--json", "training.checkpoint_every=1")
    short = json.loads(done.stdout)
    (problem,) = short["problems"]
    assert done.returncode == 2
    assert problem.startswith("output_dir: checkpoints need") and short["seconds_estimate"] is None


@pytest.mark.parametrize("here", [Device("cpu", 1 << 20), Device("NVIDIA H100", 1 << 20)])
@pytest.mark.parametrize("as_json", [True, False])
def test_what_is_marked_is_in_the_verdict(
    here: Device, as_json: bool, recipe: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too little memory is a reason like any other, on a CPU as well: one line, one verdict, one exit code."""
    monkeypatch.setattr("rasa_train.check.trial_run.devices", lambda: [here])
    done = cli("train", "check", recipe, "training.micro_batch_size=40", *(["--json"] if as_json else []))
    assert done.returncode == 2
    if as_json:
        facts = json.loads(done.stdout)
        assert not facts["ready"] and len(facts["problems"]) == 1 and facts["problems"][0].startswith("memory: ")
        assert [topic["topic"] for topic in facts["topics"] if not topic["ok"]] == ["memory"]
        assert facts["memory_bytes_least"] == facts["memory_bytes"]["total"] > here.memory_bytes
    else:
        lines = done.stdout.splitlines()
        assert [line[:11] for line in lines if line.startswith("-- ")] == ["--  memory:"]
        assert lines[-1].startswith("not ready: memory: ") and "ready to train" not in lines


def test_memory_of_the_machine_that_trains(recipe: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers on CPUs share one memory, a container may have less, and a GPU that the recipe names counts instead."""
    assert json.loads(cli("train", "check", recipe, "--json").stdout)["micro_batch_tokens"] <= 4096, "auto on a CPU"
    words = ["training.micro_batch_size=1", "training.max_steps=1"]
    needed = json.loads(cli("train", "check", recipe, *words, "--json").stdout)["memory_bytes"]["total"]
    monkeypatch.setattr("rasa_train.check.trial_run.devices", lambda: [Device("cpu", int(1.2 * needed))])
    assert cli("train", "check", recipe, *words).returncode == 0
    assert cli("train", "check", recipe, *words, "--nproc", 2).returncode == 2
    assert cli("train", "check", recipe, *words, "--nproc", 2, "--nnodes", 2).returncode == 2
    assert cli("train", "check", recipe, *words, "--nproc", 2, "distributed.gpu_memory_gib=1").returncode == 0
    assert cli("train", "check", recipe, *words, "distributed.gpu_memory_gib=1e-4").returncode == 2


@pytest.mark.parametrize(("file", "text"), [("memory.max", "5000"), ("memory/memory.limit_in_bytes", "5000")])
def test_a_container_has_the_memory_of_its_limit(file: str, text: str, tmp_path: Path) -> None:
    whole = host_memory(tmp_path)
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("max\n")
    assert host_memory(tmp_path) == whole > 5000
    (tmp_path / file).write_text(text)
    assert host_memory(tmp_path) == 5000


def test_schema(cli: Cli) -> None:
    schema = json.loads(cli("train", "schema", check=True).stdout)
    assert {"model", "adapter", "data", "training", "output_dir"} <= schema["properties"].keys()
    model = schema["$defs"]["ModelConfig"]["properties"]
    assert model["quantization"]["enum"] == ["none", "fp8", "nf4"] and "base" not in model


def process(*arguments: object, cwd: Path, columns: int = 80) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own: ``process("train", "list", cwd=...)``, in a terminal of 80 columns."""
    root = str(Path(__file__).resolve().parents[1])
    return subprocess.run(
        [sys.executable, "-m", f"rasa_train.cli.{arguments[0]}", *map(str, arguments[1:])],
        cwd=cwd,
        env={**os.environ, "COLUMNS": str(columns), "PYTHONPATH": root},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("flag", ["--list", "--schema", "--check"])
def test_flags_are_aliases_of_the_verbs(flag: str, recipe: Path, cli: Cli) -> None:
    verb = (flag[2:], *([recipe] if flag == "--check" else []), *(["--json"] if flag != "--schema" else []))
    alias = [*verb[1:], flag] if flag == "--check" else [flag, *verb[1:]]
    first, second = cli("train", *verb, check=True), cli("train", *alias, check=True)
    same = [json.loads(done.stdout) for done in (first, second)]
    for facts in same:
        facts.pop("seconds_estimate", None)  # measured
        facts.pop("disk_bytes_free", None)
    assert same[0].keys() == same[1].keys()
    if flag != "--check":
        assert same[0] == same[1] and first.stderr == second.stderr == ""


def test_a_verb_wins_against_a_file_of_its_name(recipe: Path, tmp_path: Path, cli: Cli) -> None:
    recipe.rename(tmp_path / "list")
    (tmp_path / "check").mkdir()
    assert "math_llama8b_r8" in process("train", "list", cwd=tmp_path).stdout
    done = cli("train", "run", "list", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["steps"] == 1, done.stderr
    assert "run is complete" in cli("train", "./list", check=True).stdout
    assert json.loads(cli("train", "check", "list", "--json", check=True).stdout)["optimizer_steps"] == 1
    printed = cli("train", "run", "list", "--sweep", "seed=1,2", "--print", check=True).stdout
    assert [line.split()[:3] for line in printed.splitlines()] == [
        ["rasa-train", "./list", f"seed={seed}"] for seed in (1, 2)
    ], "so do the processes of a sweep"
    done = cli("merge", "./extract", "--output", "out")
    assert done.returncode == 2 and "extract does not exist" in done.stderr


@pytest.mark.parametrize(
    ("page", "names", "does_not_name"),
    [
        (("train",), ["run ", "check", "inspect", "list", "copy", "schema", "rasa-train demo"], ["--nproc", "--check"]),
        (("train", "run"), ["--nproc", "--fresh", "Several workers"], ["--list", "--copy", "--schema"]),
        (("train", "demo"), ["--nproc", "RECIPE"], ["--schema"]),
        (("train", "check"), ["--json", "--nproc"], ["--fresh", "--rdzv"]),
        (("train", "list"), ["--json"], ["--nproc"]),
        (("train", "copy"), ["RECIPE", "DESTINATION"], ["--json"]),
        (("train", "schema"), ["JSON schema"], ["--json"]),
        (("merge",), ["ADAPTER_OR_RUN", "--output", "rasa-merge extract --help"], ["--extract", "--sweeps", "--k "]),
        (("merge", "extract"), ["FINETUNED", "--base", "--sweeps", "--overwrite"], ["--format", "--verify"]),
    ],
)
def test_help_fits_a_terminal_and_shows_what_belongs_to_it(
    page: tuple[str, ...], names: list[str], does_not_name: list[str], tmp_path: Path
) -> None:
    done = process(*page, "--help", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert all(name in done.stdout for name in names), done.stdout
    assert not any(name in done.stdout for name in does_not_name), done.stdout


ROW = '{"input_ids": [1, 5, 6, 2]}\n'
BAD_FILES = {
    "not json": (ROW + '{"input_ids": \n', r"data\.jsonl:2: not JSON"),
    "no column": (ROW + '{"tokens": [1, 5]}\n', r"data\.jsonl:2: .*input_ids.* tokens"),
    "empty": ("", "data.jsonl"),
    "nothing supervised": ('{"input_ids": [1, 2], "labels": [-100, -100]}\n', "no example is left"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_data(case: str, recipe: Path, cli: Cli) -> None:
    content, words = BAD_FILES[case]
    (recipe.parent / "data.jsonl").write_text(content)
    assert_user_error(cli("train", recipe, "data.dataset=data.jsonl"), words)


BAD_INPUT = {
    "missing recipe": (["nowhere.yaml"], r"nowhere\.yaml.* does not exist"),
    "missing data": (["{recipe}", "data.dataset=nowhere.jsonl"], "no file nowhere.jsonl"),
    "unknown key": (["{recipe}", "adapter.aplha=3"], "unknown key adapter.aplha; did you mean 'alpha'"),
    "k > r": (["{recipe}", "adapter.k=5"], r"adapter\.k must be in \[0, r=4\], got 5"),
    "negative learning rate": (
        ["{recipe}", "training.optimizer.lr=-1"],
        r"training\.optimizer\.lr must be > 0",
    ),
    "missing model": (["{recipe}", "model.name=./nowhere"], r"model\.name: '\./nowhere' does not exist"),
    "model without weights": (["{recipe}", "model.name=shape"], "no \\*.safetensors"),
    "unwritable output": (
        ["{recipe}", "output_dir=/proc/none/run"],
        "output_dir: /proc/none/run cannot be written",
    ),
    "no adapter to start from": (["{recipe}", "adapter.init_from=nowhere"], "nowhere is not an adapter"),
    "target": (["{recipe}", "adapter.targets=[q_porj]"], "did you mean 'q_proj'"),
    "tracker": (["{recipe}", "tracking.trackers=[mlflow]"], "mlflow is not installed; pip install mlflow"),
    "no recipe": ([], "RECIPE"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(case: str, recipe: Path, cli: Cli) -> None:
    (recipe.parent / "shape").mkdir()
    (recipe.parent / "shape" / "config.json").write_text(json.dumps(SHAPE))
    arguments, words = BAD_INPUT[case]
    assert_user_error(cli("train", *[a.format(recipe=recipe) for a in arguments]), words)


def test_an_adapter_that_does_not_fit(recipe: Path, cli: Cli, golden: Path) -> None:
    cli("train", recipe, check=True)
    wrong = cli(
        "train",
        recipe,
        f"model.name={golden / 'llama-base'}",
        "adapter.init_from=run/adapter",
        "output_dir=o",
    )
    assert_user_error(wrong, "does not fit this model")


def test_two_runs_in_one_directory(recipe: Path, cli: Cli) -> None:
    command = [sys.executable, "-m", "rasa_train.cli.train", str(recipe), "training.max_steps=5000"]
    first = subprocess.Popen(command, cwd=recipe.parent, stderr=subprocess.DEVNULL)
    try:
        while not (recipe.parent / "run" / "metrics.jsonl").exists():
            assert first.poll() is None
            time.sleep(0.01)
        assert_user_error(cli("train", recipe, "training.max_steps=5000"), "is in use by process")
    finally:
        first.kill()
        first.wait()


def assert_user_error(done: subprocess.CompletedProcess[str], words: str) -> None:
    """Exit code 2, one message, no traceback, nothing on stdout."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""
    assert re.search(words, done.stderr, re.DOTALL), done.stderr
    assert done.stderr.startswith("error: ")


def test_copy_a_shipped_recipe(tmp_path: Path, cli: Cli) -> None:
    from rasa_train.recipe.load import load_recipe
    from rasa_train.recipe.shipped import configs_dir

    assert cli("train", "copy", "math_llama8b_r8", "mine.yaml", check=True).stdout == "mine.yaml\n"
    assert (tmp_path / "mine.yaml").read_text() == (configs_dir() / "math_llama8b_r8.yaml").read_text()
    assert load_recipe("mine.yaml").recipe == load_recipe("math_llama8b_r8").recipe
    again = cli("train", "--copy", "demo", "mine.yaml")
    assert again.returncode == 2 and "mine.yaml exists" in again.stderr
    assert cli("train", "copy", "demo", check=True).stdout == "demo.yaml\n" and (tmp_path / "demo.yaml").is_file()
