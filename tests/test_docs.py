"""Every command of the README and of docs/ is run on tiny models, or at least parsed by the program it is for; every
recipe, key, flag, file and link that the pages name is there.

A command runs in a directory that has what the pages name: runs, models, recipes (``workplace``). What this machine is
too small for keeps its recipe and flags and becomes a check, or is parsed alone: ``TOO_LARGE`` is the whole list.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
import itertools
import json
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from rasa_train.adapters.registry import METHODS
from rasa_train.recipe.load import _all_keys, load_recipe
from rasa_train.recipe.schema import Recipe
from rasa_train.recipe.shipped import configs_dir
from rasa_train.recipe.sweep import grid
from tests.conftest import Cli
from tests.doc_pages import PAGES, ROOT, Command, blocks, commands_of, links, name_of, own_method, spans
from tests.recipe.test_paper import MODELS

OURS = ["train", "merge", "eval", "analyze", "report", "bench"]
TOO_LARGE = {
    r"rasa-bench(?!.*--counters)": "minutes, or a GPU",
    r"rasa-bench --counters": "its figures have tests of their own",
    r"rasa-eval (?!.*--data demo)": "questions of the hub",
    r"rasa-train .*--nproc 8|rasa-train .*--nnodes|rasa-train configs/|rasa-train \w+8b": "a check takes its place",
    r"rasa-train .*--sweep(?!.*--print)": "a --print takes its place",
    r"runs/lora_fa": "minutes; tests/adapters/test_extending.py runs both commands, one after the other",
    r"--install-completion": "writes into the home directory; tests/test_shipped.py asks what a shell asks",
}
"""Our commands that are parsed but not run as they stand, and why."""
SLOW = r"demo_classify|reconstruct|--plots|rasa-merge extract|--figures|--against-full --counters"
"""What takes more than a few seconds of a core."""
ELSEWHERE = {
    "git": "clone of a repository whose address the reader knows",
    "cd": "",
    "vllm": "what rasa-merge prints itself after an export (tests/merge/test_lora.py)",
    "lm_eval": "of lm-evaluation-harness; its tasks are run by tests/evaluate",
    "convert_hf_to_gguf.py": "of llama.cpp",
    "curl": "a request to a server of vLLM",
    "while": "a loop of the shell",
    "do": "",
    "done": "",
}
"""Programs of others: the shell must be able to read the line, and that is all that is looked at."""

FOREIGN_PACKAGES = {"gguf", "liger-kernel", "sentencepiece"}
FOREIGN_FLAGS = {"--security-opt", "--outtype", "--lora-modules", "--standalone"}
"""What the pages name of docker, of llama.cpp's converter, of vLLM and of torchrun."""

COMMANDS = [command for page in PAGES for command in commands_of(page)]


@pytest.fixture(scope="module", autouse=True)
def _own_method(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Commands of docs/EXTENDING.md name a method of the reader's own (tests/adapters/test_extending.py)."""
    with own_method(tmp_path_factory.mktemp("own")):
        yield


def is_ours(command: Command) -> bool:
    return command.words[0].startswith("rasa-")


# -- that nothing is overlooked ------------------------------------------------------------------------------


def test_every_command_was_seen() -> None:
    """Counted in another way: lines and code within text that begin with the name of one of our programs."""
    for page in PAGES:
        text = page.read_text()
        wanted = re.findall(r"^    (?:\w+=\S+ )*(rasa-\w+|make|pip|python)(?= )", text, re.MULTILINE)
        within = [part.split() for part in text.replace("```", "").split("`")[1::2]]
        wanted += [
            words[0]
            for words in within
            if len(words) > 1 and re.fullmatch(r"rasa-\w+|make|pip|python|lm_eval", words[0])
        ]
        found = [command.words[0] for command in commands_of(page) if command.first]
        assert sorted(wanted) == sorted(word for word in found if word not in ELSEWHERE or word == "lm_eval")
    seen = {name for name in OURS if any(c.words[0] == f"rasa-{name}" for c in COMMANDS)}
    assert seen == set(OURS) and len(COMMANDS) > 70


def test_every_block_has_a_language_that_is_looked_at() -> None:
    languages = {block.where: block.language for page in PAGES for block in blocks(page)}
    assert {where: lang for where, lang in languages.items() if lang not in ("sh", *READ, "text")} == {}


def test_every_exception_is_needed() -> None:
    lines = [command.line for command in COMMANDS]
    assert all(any(re.search(pattern, line) for line in lines) for pattern in TOO_LARGE)
    assert {program for program in ELSEWHERE} <= {word for c in COMMANDS for word in c.words[:2]} | {"done"}


# -- each command --------------------------------------------------------------------------------------------


def params() -> list[Any]:
    found: dict[str, Any] = {}
    for command in COMMANDS:
        key = " ".join(command.words)
        marks = [pytest.mark.slow] if is_ours(command) and re.search(SLOW, key) else []
        found.setdefault(key, pytest.param(command, id=f"{command.where.split(' `')[0]} {key}"[:90], marks=marks))
    return list(found.values())


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: f"{c.where} {c.words[0]}"[:60])
def test_a_command_is_known_and_parsed(command: Command) -> None:
    """The cheap half, for all of them: nobody mistyped a program, a flag, a value, a recipe, a key or a file."""
    subprocess.run(["bash", "-n", "-c", command.line], check=True)
    program, *arguments = command.words
    if is_ours(command):
        parse(program, arguments)
    elif program in ELSEWHERE:
        pass
    elif program == "make":
        assert_make(arguments)
    elif program == "pip":
        assert_pip(arguments)
    elif program == "python":
        assert_python(arguments)
    elif program.startswith("scripts/") or program in ("sbatch", "bash"):
        script = program if program.startswith("scripts/") else next(a for a in arguments if a.startswith("scripts/"))
        assert (ROOT / script).is_file()
    else:
        pytest.fail(f"{command.where}: no test knows what to do with {program!r}")


@pytest.mark.parametrize("command", [p for p in params() if is_ours(p.values[0])])
def test_our_commands_do_what_the_page_says(
    command: Command, workplace: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = list(command.words[1:])
    name = command.words[0].removeprefix("rasa-")
    large = next((why for pattern, why in TOO_LARGE.items() if re.search(pattern, command.line)), None)
    if large and (name != "train" or "--install-completion" in arguments):
        return  # parsed above
    shutil.copytree(workplace, tmp_path, dirs_exist_ok=True)
    monkeypatch.setenv("RASA_TRAIN_CACHE", str(workplace / "cache"))
    arguments = [found for a in arguments for found in expand(a, tmp_path)]
    if name == "train":
        arguments = affordable(arguments, large)
    for output in outputs(arguments):
        shutil.rmtree(output, ignore_errors=True)
    done = cli(name, *arguments)
    planned = "has no weights" in done.stdout  # on the shape of the model: said to be not ready
    assert done.returncode == (2 if planned else 0), done.stderr + done.stdout
    assert "Traceback" not in done.stderr
    if "--json" in arguments:
        json.loads(done.stdout)
    assert all(output.exists() for output in outputs(arguments) if not {"check", "--check", "--print"} & set(arguments))


def outputs(arguments: list[str]) -> list[Path]:
    """What the command writes: new, so that nothing is in its way."""
    flags = ("--output", "--plots", "--figures")
    written = [after for flag, after in itertools.pairwise(arguments) if flag in flags]
    written += [argument.partition("=")[2] for argument in arguments if argument.startswith("output_dir=")]
    return [Path(name) for name in written]


def affordable(arguments: list[str], large: str | None) -> list[str]:
    """The same command on what this machine can do: a few steps, or a check, on the shape of its model."""
    verb = arguments[0] if arguments[0] in ("check", "inspect", "list", "copy", "schema") else "run"
    if large and {"--sweep", "--sweep-together"} & set(arguments):
        return [*arguments, "--print"]
    if verb == "copy" and len(arguments) > 2:
        Path(arguments[-1]).unlink(missing_ok=True)
    if verb == "run" and not large and "--print" not in arguments:
        return [*arguments, "training.max_steps=1", "data.fraction=0.005"]
    if verb != "check" and not large:
        return arguments
    recipe, overrides = recipe_and_overrides(arguments)
    model = load_recipe(*found_recipe(recipe), overrides).recipe.model.name
    shape = [f"model.name={shape_directory(model)}"] if model in MODELS else []
    return [*arguments, *(["--check"] if verb == "run" else []), *shape]


def shape_directory(model: str) -> Path:
    directory = Path("shapes", model.rpartition("/")[2])
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(MODELS[model]))
    return directory


def expand(argument: str, directory: Path) -> list[str]:
    """What the shell makes of it: files of a pattern, and the variables that stand for a number."""
    if "*" in argument and "=" not in argument:
        return sorted(str(path.relative_to(directory)) for path in directory.glob(argument))
    return [argument.replace("$RANK", "0")]


# -- the parsers ---------------------------------------------------------------------------------------------


def parse(program: str, arguments: list[str]) -> dict[str, Any]:
    """The parameters that the real command line makes of the arguments; exits with 2 where it does not know them."""
    module = importlib.import_module(f"rasa_train.cli.{program.removeprefix('rasa-')}")
    command = typer.main.get_command(module.app)
    arguments = [a.replace("$RANK", "0") for a in arguments if a != "--install-completion"]
    context = command.make_context(program, list(arguments))
    if context.command is command and isinstance(command, typer.core.TyperGroup):  # not the verb that may be left out
        _, found, rest = command.resolve_command(context, arguments)
        assert found is not None
        context = found.make_context(program, rest)
    values: dict[str, Any] = context.params
    if program == "rasa-train" and values.get("recipe") is not None:
        for path in found_recipe(values["recipe"]):
            overrides = list(values.get("overrides") or [])
            load_recipe(path, overrides)
            grid(path, overrides, values.get("sweep") or [], values.get("together") or [])
    return values


def recipe_and_overrides(arguments: list[str]) -> tuple[str, list[str]]:
    values = parse("rasa-train", arguments)
    return values["recipe"], list(values["overrides"] or [])


def found_recipe(name: str) -> list[str]:
    """The recipe itself if it is a shipped one; the demo's in the place of a reader's own."""
    if name in OWN_RECIPES:
        return ["demo"]
    assert name.startswith("configs/") <= (ROOT / name).is_file()
    return [name]


OWN_RECIPES = ("my.yaml", "recipe.yaml", "RECIPE")


def assert_make(arguments: list[str]) -> None:
    targets = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))
    names = [argument for argument in arguments if not re.fullmatch(r"[A-Z_]+=\S+", argument)]
    assert set(names) <= targets and names


def assert_pip(arguments: list[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = set((ROOT / "constraints.txt").read_text().splitlines())
    assert arguments.pop(0) == "install"
    while arguments:
        argument = arguments.pop(0)
        if argument in ("-c", "-r"):
            assert (ROOT / arguments.pop(0)).is_file()
        elif argument.startswith("--"):
            assert argument in ("--require-hashes", "--no-deps", "--editable")
        elif match := re.fullmatch(r"\.(?:\[([a-z0-9,]+)\])?", argument):
            assert set((match[1] or "eval").split(",")) <= project["optional-dependencies"].keys()
        else:
            assert argument in pinned or argument in FOREIGN_PACKAGES, argument


def assert_python(arguments: list[str]) -> None:
    if arguments[0] == "-m":
        module, rest = arguments[1], arguments[2:]
        assert importlib.util.find_spec(module), module
        paths = [word for word in rest if word.startswith("tests/")] if module == "pytest" else []
        assert all((ROOT / path).exists() for path in paths)
        return
    if arguments[0].startswith("convert_"):
        return  # of llama.cpp
    script = ROOT / arguments[0]
    assert script.is_file() or (script / "__main__.py").is_file()
    source = "".join(path.read_text() for path in ([script] if script.is_file() else script.glob("*.py")))
    assert all(f'"{word}"' in source for word in arguments[1:] if word.startswith("--"))


# -- blocks that are no commands -----------------------------------------------------------------------------


def read_yaml(text: str, tmp_path: Path) -> None:
    """A whole recipe, or sections over the demo's, or keys of a section."""
    whole = {"model", "adapter", "data", "output_dir"} <= (yaml.safe_load(text) or {}).keys()
    path = tmp_path / "recipe.yaml"
    path.write_text(text if whole or "extends:" in text else f"extends: demo\n{text}")
    load_recipe(path)


def read_python(text: str, tmp_path: Path) -> None:
    """It is Python, and the modules that it imports are there."""
    for node in ast.walk(ast.parse(text)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        assert all(importlib.util.find_spec(name) for name in names)


def read_json(text: str, tmp_path: Path) -> None:
    for part in re.split(r"\n(?=\{)", text):
        json.loads(part)


def read_toml(text: str, tmp_path: Path) -> None:
    tomllib.loads(text)


READ = {"yaml": read_yaml, "python": read_python, "json": read_json, "toml": read_toml}
OTHER = [block for page in PAGES for block in blocks(page) if block.language in READ]


@pytest.mark.parametrize("block", OTHER, ids=lambda block: f"{block.where} {block.language}")
def test_a_block_is_what_it_says(block: Any, tmp_path: Path) -> None:
    READ[block.language](block.text, tmp_path)


# -- the text ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for target in links(page):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{name_of(page)}: {target}"
        if anchor:
            titles = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}


@pytest.fixture(scope="module")
def options() -> set[str]:
    """Flags of our commands, and of the scripts."""
    found: set[str] = set()
    for name in OURS:
        command: Any = typer.main.get_command(importlib.import_module(f"rasa_train.cli.{name}").app)
        for one in (command, *getattr(command, "commands", {}).values()):
            found |= {text for parameter in one.params for text in (*parameter.opts, *parameter.secondary_opts)}
    for script in (ROOT / "scripts").rglob("*.py"):
        found |= set(re.findall(r'"(--[a-z-]+)"', script.read_text()))
    return found


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_what_the_text_names_is_there(page: Path, options: set[str]) -> None:
    """Flags, keys of recipes, and files, in code within the text."""
    keys = set(_all_keys(Recipe, "")) | {f"adapter.{key}" for m in METHODS.values() for key in m.model_fields}
    for span in spans(page):
        if span.startswith("--"):
            flag = re.split(r"[ =]", span)[0]
            assert flag in options | FOREIGN_FLAGS, f"{name_of(page)}: {span}"
        if match := re.fullmatch(r"((?:model|adapter|data|training|distributed|tracking)\.[a-z_.]+)(?:[:=].*)?", span):
            close = difflib.get_close_matches(match[1], keys, n=1)
            assert match[1] in keys, f"{name_of(page)}: {span}; is it {close}?"
        if re.fullmatch(r"(?:rasa_train|tests|scripts|docs|configs|examples)/[\w./-]*", span):
            assert (ROOT / span).exists(), f"{name_of(page)}: {span}"


# -- the directory that commands are run in ------------------------------------------------------------------


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small runs, models and files under the names that the pages use."""
    from rasa_train.launch.launch import launch
    from rasa_train.merging.merged import merge

    root = tmp_path_factory.mktemp("docs")
    short = ["training.max_steps=2", "training.batch_size=4", "data.fraction=0.005", f"data.cache_dir={root / 'cache'}"]
    short += ["data.validation={size: 2}", "training.keep_best=validation_loss"]
    for method, run in (("rasa", "runs/rasa"), ("full", "runs/full"), ("lora", "RUN")):
        overrides = [f"adapter.method={method}", f"output_dir={root / run}", "training.checkpoint_every=1", *short]
        launch(load_recipe("demo", overrides).recipe)
    names = ["lora", "seed=1", "seed=2", "math_llama8b_rasa_r8", "mine", "sweep/seed=1", "sweep/seed=2"]
    names += [f"rank/adapter.r={r},adapter.alpha={2 * r},adapter.targets=_q_proj_" for r in (4, 8, 64)]
    for name in names:
        shutil.copytree(root / "runs/rasa", root / "runs" / name)
    for name in ("a", "b", "OUT/adapter"):
        shutil.copytree(root / "runs/rasa/adapter", root / name)
    demo = Path(load_recipe("demo").recipe.model.name)
    for name in ("base-model", "BASE"):
        (root / name).symlink_to(demo)
    for name in ("tuned-model", "TUNED"):
        merge(root / "runs/full/adapter", root / name)
    for name in OWN_RECIPES:
        shutil.copyfile(configs_dir() / "demo.yaml", root / name)
    (root / "configs").symlink_to(configs_dir())
    return root
