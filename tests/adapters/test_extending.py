"""The method of docs/EXTENDING.md, as the page has it, in a file outside the package: held to the contract, trained by
``rasa-train``, merged by ``rasa-merge``; and the errors of methods from outside."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from rasa_train import METHODS, Method, UserError, register
from rasa_train.adapters.registry import SHIPPED, Methods
from rasa_train.adapters.state import adapters, trainable
from rasa_train.merging.lora import export_lora
from rasa_train.recipe.load import load_recipe
from tests.adapters import test_contract as contract
from tests.adapters.test_contract import bases as bases  # a fixture
from tests.conftest import Cli
from tests.doc_pages import ROOT, own_method, own_method_source

NAME, VARIABLE = "lora-fa", "RASA_TRAIN_METHODS"


@pytest.fixture
def method(tmp_path: Path) -> Iterator[type[Method]]:
    with own_method(tmp_path) as found:
        yield found


@pytest.mark.parametrize("weight", contract.WEIGHTS)
def test_it_keeps_the_contract(
    weight: str, method: Callable[..., Method], bases: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    (tmp_path / "adapter").mkdir()
    case = contract.make_case(method(r=4), bases[weight, "fp32"], torch.float32, tmp_path / "adapter")
    contract.test_the_output_is_the_bases_at_first(case)
    contract.test_forward_is_the_delta(case)
    contract.test_saved_and_loaded_into_a_fresh_model(case)
    contract.test_every_tensor_is_stored_once(case)
    contract.test_a_gradient_reaches_everything_that_is_trained(case)
    contract.test_merged_is_the_base_plus_the_update(case, tmp_path)
    assert {name.rpartition(".")[2] for name in trainable(case.model)} == {"B"}, "A is frozen"
    if weight != "experts":
        report = export_lora(case.directory, tmp_path / "lora")
        assert report.rank == 4 and not report.error
        tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
        for path, adapter in adapters(case.model).items():
            A, B = (tensors[f"base_model.model.{path}.lora_{side}.weight"] for side in "AB")
            assert_close(B @ A, adapter.delta(), rtol=1e-5, atol=1e-5)


def test_a_recipe_names_it_while_it_is_registered(tmp_path: Path) -> None:
    with own_method(tmp_path) as found:
        assert METHODS[NAME] is found and register(found) is found, "to register it again changes nothing"
        assert isinstance(load_recipe("demo", [f"adapter.method={NAME}"]).recipe.adapter, found)
        with pytest.raises(UserError, match=r"adapter\.r must be > 0"):
            load_recipe("demo", [f"adapter.method={NAME}", "adapter.r=0"])
    with pytest.raises(UserError, match=r"adapter\.method must be one of .*, got 'lora-fa'"):
        load_recipe("demo", [f"adapter.method={NAME}"])


# -- in a process of its own -----------------------------------------------------------------------------------------


def command(name: str, *arguments: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"rasa_train.cli.{name}", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_the_commands_take_it_from_the_environment(tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "lora_fa.py").write_text(own_method_source())
    short = ["training.max_steps=2", "data.fraction=0.01", "output_dir=run"]
    variable = {VARIABLE: "lora_fa.py"}
    trained = command("train", "demo", f"adapter.method={NAME}", *short, cwd=tmp_path, **variable)
    config = json.loads((ROOT / "rasa_train/demo/model/config.json").read_text())
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    outputs = 3 * hidden + 2 * hidden // heads * config["num_key_value_heads"] + 2 * config["intermediate_size"]
    count = f"{8 * config['num_hidden_layers'] * outputs:,} trainable"  # B of r = 8 in every linear
    assert trained.returncode == 0 and count in trained.stderr, trained.stderr
    merged = command("merge", "run", "--output", "merged", cwd=tmp_path, **variable)
    assert merged.returncode == 0 and "lora-fa on" in merged.stdout, merged.stderr
    without = cli("merge", "run", "--output", "other")
    assert without.returncode == 2 and "got 'lora-fa'" in without.stderr and without.stderr.count("\n") == 1


def test_an_error_is_one_line(tmp_path: Path) -> None:
    done = command("train", "demo", "--check", cwd=tmp_path, **{VARIABLE: "nowhere.py"})
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: RASA_TRAIN_METHODS: nowhere.py: there is no such file")


# -- what cannot be registered ---------------------------------------------------------------------------------------

CLASH = "there is a method 'lora' already"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("nowhere.py", None, "there is no such file"),
        ("no_such_module_of_methods", None, "there is no such module"),
        ("json.no_such_module", None, "there is no such module"),
        ("clash.py", own_method_source().replace('"lora-fa"', '"lora"'), CLASH),
        ("empty.py", "from rasa_train import LoRA\n", "it defines no method"),
        ("nameless.py", "from rasa_train import LoRA\nclass Own(LoRA):\n    method: str\n", "Own needs a name"),
        ("wrong.py", "import json\n\nnumber = 1 / 0\n", "line 3: ZeroDivisionError: division by zero"),
        ("needs.py", "import no_such_package\n", "line 1: ModuleNotFoundError: No module named 'no_such_package'"),
        ("syntax.py", "class Own(:\n", r"SyntaxError: .* \(syntax\.py, line 1\)"),
    ],
)
def test_what_the_variable_names_is_looked_at(
    name: str, text: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(VARIABLE, name)
    methods = Methods()
    for _ in range(2):  # the second use does not pass over the error
        with pytest.raises(UserError, match=f"^RASA_TRAIN_METHODS: {name}: {message}") as raised:
            list(methods)
        assert "\n" not in str(raised.value)


def test_an_entry_point_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_lora_fa.py").write_text(own_method_source())
    information = tmp_path / "own_lora_fa-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: own-lora-fa\nVersion: 1.0\n")
    entry_points = information / "entry_points.txt"
    monkeypatch.syspath_prepend(tmp_path)
    entry_points.write_text("[rasa_train.methods]\nlora-fa = own_lora_fa:LoRAFA\n")
    methods = Methods()
    assert [*methods] == [*SHIPPED, NAME] and methods[NAME].__module__ == "own_lora_fa"
    for value, message in {
        "own_lora_fa:Missing": "AttributeError: module 'own_lora_fa' has no attribute 'Missing'",
        "own_lora_fa:zeros": "<function zeros at .*> is not a method: derive a class from rasa_train.Method",
        "no_such_module:Own": "ModuleNotFoundError: No module named 'no_such_module'",
        "rasa_train:LoRA": CLASH,
    }.items():
        entry_points.write_text(f"[rasa_train.methods]\nlora-fa = {value}\n")
        with pytest.raises(UserError, match=f"^entry point lora-fa of rasa_train.methods: {value}: {message}"):
            list(Methods())


def test_a_file_does_not_take_the_place_of_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import json as package

    for name in ("json.py", "second.py"):
        (tmp_path / name).write_text(own_method_source().replace("lora-fa", name.removesuffix(".py")))
    monkeypatch.setenv(VARIABLE, f"{tmp_path / 'json.py'}, {tmp_path / 'second.py'},")
    assert [*Methods()] == [*SHIPPED, "json", "second"]
    assert sys.modules["json"] is package


def test_register_takes_new_methods_only(method: type[Method]) -> None:
    with pytest.raises(ValueError, match="there is a method 'rasa' already"):
        register(type("Own", (METHODS["rasa"],), {"__module__": __name__}))
    with pytest.raises(ValueError, match="is not a method"):
        register(dict)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="there is a method 'lora-fa' already"):
        register(type("Own", (method,), {"__module__": __name__}))
