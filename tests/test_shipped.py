"""``rasa-train list`` and completion: every shipped recipe, with the figures of the paper and of ``--check``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rasa_train.recipe import shipped
from rasa_train.recipe.load import load_recipe
from tests.conftest import Cli
from tests.recipe.test_paper import COUNTS, FULL, MODELS, SCALED, TABLES

ROWS = {row["name"]: row for row in shipped.measured()}


def test_every_recipe_is_listed_and_fits_a_terminal(cli: Cli) -> None:
    assert list(ROWS) == shipped.listed() and len(ROWS) > 70
    lines = cli("train", "list", check=True).stdout.splitlines()
    assert max(map(len, lines)) == 80 and [line.split()[0] for line in lines[1 : 1 + len(ROWS)]] == list(ROWS)
    assert json.loads(cli("train", "--list", "--json", check=True).stdout) == {"recipes": list(ROWS.values())}
    (row,) = [line.split() for line in lines if line.startswith("math_llama8b_r8 ")]
    assert row[:5] == ["math_llama8b_r8", "rasa", "Llama-3.1-8B", "8/1", "21.0M"]


def test_parameters_are_the_papers() -> None:
    """Counts made outside of this package."""
    for name, _, method, r in TABLES:
        assert ROWS[name]["trainable_parameters"] == COUNTS[method, r][0]
    others = {name: row for name, row in ROWS.items() if name not in {table[0] for table in TABLES}}
    for name, row in others.items():
        if row["model"] != "demo" and "_data" not in name:
            wanted = FULL[row["model"]] if row["method"] == "full" else SCALED[row["model"], row["method"]]
            assert row["trainable_parameters"] == wanted, name


def check_of(name: str, cli: Cli) -> tuple[str, str, int, int]:
    """Method, strategy, trained parameters and bytes, of ``--check`` itself; r and k are the recipe's."""
    recipe, overrides = load_recipe(name).recipe, []
    assert {key: ROWS[name][key] for key in ("r", "k")}.items() >= recipe.adapter.model_dump(include={"r", "k"}).items()
    if (model := recipe.model.name) in MODELS:
        Path("shape").mkdir(exist_ok=True)
        Path("shape", "config.json").write_text(json.dumps(MODELS[model]))
        overrides = ["model.name=shape", "data.dataset=none.jsonl"]
    done = cli("train", name, "--check", "--json", "--nproc", ROWS[name]["workers"], *overrides)
    assert done.returncode == (2 if overrides else 0), "without weights it is not ready"
    facts = json.loads(done.stdout)
    return facts["method"], facts["strategy"], facts["trainable_parameters"], facts["memory_bytes"]["total"]


def listed(name: str) -> tuple[str, str, int, int]:
    row = ROWS[name]
    return row["method"], row["strategy"], row["trainable_parameters"], row["memory_bytes"]


@pytest.mark.parametrize("name", ["math_llama8b_r8", "paper/math_mixtral8x7b_rasa_r4", "paper/math_mistral7b_full"])
def test_figures_are_those_of_check(name: str, cli: Cli) -> None:
    assert check_of(name, cli) == listed(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ROWS if not name.startswith("demo")])
def test_all_figures_are_those_of_check(name: str, cli: Cli) -> None:
    assert check_of(name, cli) == listed(name)


def test_the_list_loads_nothing_heavy() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from rasa_train.cli.train import app\n"
        "assert CliRunner().invoke(app, ['list']).exit_code == 0\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def complete(words: str, directory: Path) -> list[str]:
    """What bash would offer for the last word, asked as its completion script asks."""
    program = words.split()[0]
    module = program.replace("rasa-", "rasa_train.cli.")
    code = f"import sys; sys.argv[0] = '{program}'; from {module} import app; app(prog_name='{program}')"
    asked = {
        f"_{program.replace('-', '_').upper()}_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split(" ")) - 1),
    }
    root = str(Path(__file__).resolve().parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **asked, "PYTHONPATH": root},
        cwd=directory,
        capture_output=True,
        text=True,
    )
    return done.stdout.split()


def test_a_shell_completes_recipes_files_and_flags(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("")
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "more").mkdir()
    recipes, verbs = (
        {"mine.yaml", "more/", *shipped.runnable()},
        {"run", "check", "inspect", "list", "copy", "schema", "demo_classify"},
    )
    assert set(complete("rasa-train ", tmp_path)) == recipes | verbs and not recipes & verbs
    for form in ("", "run ", "check ", "copy "):
        assert not form or set(complete(f"rasa-train {form}", tmp_path)) == recipes
        assert complete(f"rasa-train {form}math_llama8b_r", tmp_path) == [f"math_llama8b_r{r}" for r in (16, 32, 8)]
        assert complete(f"rasa-train {form}paper/math_mix", tmp_path) == [
            f"paper/math_mixtral8x7b_{m}_r4" for m in ("lora", "rasa")
        ]
    assert complete("rasa-train demo --ch", tmp_path) == complete("rasa-train --ch", tmp_path) == ["--check"]
    assert complete("rasa-train --check math_llama8b_r", tmp_path) == [f"math_llama8b_r{r}" for r in (16, 32, 8)]
    assert "--nproc" in complete("rasa-train check demo --", tmp_path)


def test_a_shell_completes_what_is_merged(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    assert set(complete("rasa-merge ", tmp_path)) == {"merge", "extract", "more/"}
    assert set(complete("rasa-merge m", tmp_path)) == {"merge", "more/"}
    assert "--sweeps" in complete("rasa-merge extract --", tmp_path)
    assert "--sweeps" not in complete("rasa-merge --", tmp_path)
