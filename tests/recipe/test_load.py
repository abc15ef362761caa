"""Recipes: what is valid, what is said about what is not, and every shipped one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from rasa_train.adapters.registry import METHODS
from rasa_train.errors import UserError
from rasa_train.io.yaml_lines import parse
from rasa_train.recipe.load import completed, dump_recipe, load_recipe
from rasa_train.recipe.schema import Recipe
from rasa_train.recipe.shipped import configs_dir

GOOD = """\
model: {name: some/model}
adapter:
  method: rasa
  r: 8
  k: 1
data: {dataset: metamathqa}
training:
  optimizer: {lr: 5e-4}
output_dir: runs/x
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(GOOD)
    return path


def error_of(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        load_recipe(path, overrides)
    return str(error.value)


def test_a_small_recipe_is_enough(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("model: {name: m}\nadapter: {method: rasa}\ndata: {dataset: d}\noutput_dir: o\n")
    recipe = load_recipe(path).recipe
    assert (recipe.adapter.r, recipe.adapter.k, recipe.seed) == (8, 1, 42)


@pytest.mark.parametrize("text", ["5e-4", "5.0e-4", "0.0005", ".5e-3", "5E-4", "+5e-4", "50_0e-6"])
def test_numbers_of_yaml_1_2(recipe: Path, text: str) -> None:
    assert load_recipe(recipe, [f"training.optimizer.lr={text}"]).recipe.training.optimizer.lr == 5e-4


def test_overrides_win_and_are_typed(recipe: Path) -> None:
    overrides = [
        "adapter.r=16",
        "training.epochs=2",
        "adapter.targets=[q_proj, v_proj]",
        "output_dir=runs/a b",
    ]
    loaded = load_recipe(recipe, overrides).recipe
    assert (loaded.adapter.r, loaded.training.epochs, loaded.output_dir) == (16, 2, "runs/a b")
    assert loaded.adapter.targets == ["q_proj", "v_proj"]


def test_another_method_drops_the_keys_it_does_not_have(recipe: Path) -> None:
    loaded = load_recipe(recipe, ["adapter.method=lora", "adapter.alpha=4"]).recipe
    assert loaded.adapter == METHODS["lora"](r=8, alpha=4)
    assert "unknown key adapter.k" in error_of(recipe, "adapter.method=lora", "adapter.k=1")


@pytest.mark.parametrize(
    ("change", "line", "words"),
    [
        (("k: 1", "k: 9"), 5, ["adapter.k must be in [0, r=8], got 9"]),
        (("5e-4", "-5e-4"), 8, ["training.optimizer.lr must be > 0", "-0.0005"]),
        (("  r: 8", "  rank: 8"), 4, ["unknown key adapter.rank"]),
        (("optimizer", "optimiser"), 8, ["unknown key training.optimiser", "did you mean 'optimizer'"]),
        (("  optimizer: {lr: 5e-4}", "  lr: 5e-4"), 8, ["training.lr", "did you mean training.optimizer.lr"]),
        (("method: rasa", "method: rosa"), 2, ["adapter.method must be one of", "did you mean 'rasa'"]),
        (("method: rasa", "r: 4"), 4, ["the key 'r' stands here and in line 3"]),
        (("  r: 8", "  r: eight"), 4, ["adapter.r must be a whole number, got 'eight'"]),
        (("  r: 8", "  r: 8.5"), 4, ["adapter.r", "8.5"]),
        (("model: {name: some/model}", "model: 3"), 1, ["model must be a section with keys, got 3"]),
        (("data: {dataset: metamathqa}", "data: {}"), 6, ["data.dataset is required"]),
    ],
)
def test_errors_name_key_value_and_line(recipe: Path, change: tuple[str, str], line: int, words: list[str]) -> None:
    recipe.write_text(GOOD.replace(*change))
    message = error_of(recipe)
    assert all(word in message for word in words), message
    assert f"{recipe}:{line}:" in message
    assert "pydantic" not in message and "http" not in message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.compile=alwys", "training.compile must be true, false or 'auto', got 'alwys'"),
        ("training.micro_batch_size=0", "training.micro_batch_size must be a number > 0 or 'auto', got 0"),
        ("training.checkpoint_every=never", "training.checkpoint_every must be 'epoch' or a whole number, got 'never'"),
        ("adapter.targets=3", "adapter.targets must be text or a list, got 3"),
        ("adapter.targets=[3]", "adapter.targets[0] must be text, got 3"),
        ("data.validation.size=x", "data.validation.size must be a number, got 'x'"),
        ("training.max_grad_norm=0", "training.max_grad_norm must be > 0.0, got 0"),
    ],
)
def test_an_error_names_all_that_a_key_takes(recipe: Path, override: str, message: str) -> None:
    assert error_of(recipe, override).splitlines()[-2:] == [message, f"  at command line: {override}"]


def test_the_short_form_of_task_takes_further_keys(recipe: Path) -> None:
    recipe.write_text(f"task: classification\n{GOOD}".replace("metamathqa", "rows.jsonl"))
    task = load_recipe(str(recipe), ["task.labels=[a, b]"]).recipe.task
    assert (task.name, task.labels) == ("classification", ["a", "b"])


def test_all_errors_at_once(recipe: Path) -> None:
    message = error_of(recipe, "adapter.k=9", "seed=-1", "training.batch_size=0")
    assert all(word in message for word in ("adapter.k", "seed", "training.batch_size"))
    assert message.count("at command line: ") == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: {name: x\nadapter: [", [":2:8: YAML syntax"]),
        ("model: 'x", ["YAML syntax"]),
        ("- a\n- b\n", ["a recipe is a mapping", "list"]),
        ("", ["this file is empty"]),
        ("1: x\n", [":1: a key must be a word, got 1"]),
        ("a: 1\nb: !!python/object:os.system x", [":2: a recipe has no tags, got !!python/object:os.system"]),
        ("a: 1\nb: !thing {x: 1}", [":2: a recipe has no tags, got !thing"]),
        ("a: 1\nb: !thing [1]", [":2: a recipe has no tags"]),
        ("a: &a\n  x: !!bool y\nb: {<<: *a}", [":2: a recipe has no tags, got !!bool"]),
        ("a: 1\nb: {<<: !!set {x}}", [":2: a recipe has no tags, got !!set"]),
        ("a: 1\nb: 2025-13-01", [":2: '2025-13-01' cannot be read: month"]),
        ("a: 1\nb: {<<: [1]}", [":2: << must be a mapping or a list of mappings, got 1"]),
        ("a: &a {<<: *a}", ["an alias refers to a value that contains the alias"]),
        ("a: " + "[" * 50, ["more than 40 deep"]),
        ("a: 1\nb: " + "x" * 5000, [":2: a value has 5,000 characters; at most 4,096"]),
        ("a: 1\n" * 100_000, ["it has 500,000 bytes"]),
        ("a: &a [1,1,1,1,1,1,1,1]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b]\n"
         "d: &d [*c,*c,*c,*c,*c,*c,*c,*c]\ne: [*d,*d,*d,*d,*d,*d,*d,*d]", ["more than 20,000 values"]),
    ],
)  # fmt: skip
def test_files_that_are_no_recipe(recipe: Path, text: str, words: list[str]) -> None:
    recipe.write_text(text)
    message = error_of(recipe)
    assert all(word in message for word in words), message


def test_merge_keys(recipe: Path) -> None:
    """What YAML 1.1 says of them: keys that stand there win, then the first mapping of a list."""
    value, locations = parse("a: &a {x: 1}\nb: &b {x: 2, y: 2}\nc:\n  z: 3\n  <<: [*a, *b]\nd: {y: 4, <<: *b}", "f")
    assert value["c"] == {"x": 1, "y": 2, "z": 3} and value["d"] == {"x": 2, "y": 4}
    assert [locations[("c", name)].line for name in "xyz"] == [1, 2, 4]


def test_twenty_errors_are_enough(recipe: Path) -> None:
    recipe.write_text(recipe.read_text() + "".join(f"k{i}: 1\n" for i in range(30)))
    message = error_of(recipe)
    assert message.count("unknown key") == 20 and message.endswith("\nand more")


def test_files_that_are_not_there(recipe: Path) -> None:
    assert "did you mean" in error_of(recipe.with_name("recipy.yaml"))
    assert "is a directory" in error_of(recipe.parent)
    recipe.write_bytes(b"\xff\xfe\x00")
    assert "is not UTF-8" in error_of(recipe)


@pytest.mark.parametrize("override", ["adapter.r", "=3", "adapter..r=3", "adapter.r=[", "model=3"])
def test_overrides_that_are_none(recipe: Path, override: str) -> None:
    error_of(recipe, override)


def test_extends(recipe: Path) -> None:
    child = recipe.with_name("child.yaml")
    child.write_text("extends: recipe.yaml\nadapter: {method: lora, alpha: 2}\nseed: 7\n")
    loaded = load_recipe(child)
    assert (loaded.recipe.adapter, loaded.recipe.seed) == (METHODS["lora"](r=8, alpha=2), 7)
    assert str(loaded.locations[("output_dir",)]).startswith(str(recipe))
    child.write_text("extends: recipe.yaml\nadapter: {k: 20}\n")
    assert f"{child}:2: adapter: {{k: 20}}" in error_of(child)
    child.write_text("extends: child.yaml\n")
    assert "goes in a circle" in error_of(child)
    child.write_text("extends: nowhere.yaml\n")
    assert "'nowhere.yaml' does not exist" in error_of(child) and f"{child}:1" in error_of(child)


def test_the_resolved_recipe_reads_back_the_same(recipe: Path) -> None:
    loaded = load_recipe(recipe).recipe
    recipe.write_text(dump_recipe(loaded))
    assert load_recipe(recipe).recipe == loaded


def test_schema_names_every_key_and_explains_it() -> None:
    schema = Recipe.model_json_schema()
    json.dumps(schema)
    assert set(schema["properties"]) == set(Recipe.model_fields)
    rasa = schema["$defs"]["RaSA"]["properties"]
    assert "pool" in rasa["k"]["description"] and rasa["r"]["exclusiveMinimum"] == 0


SHIPPED = sorted(p for p in configs_dir().rglob("*.yaml") if p.parent.name != "base")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_every_shipped_recipe(path: Path) -> None:
    recipe = load_recipe(path).recipe
    first = path.read_text().splitlines()[0]
    assert first.startswith("# "), "says what it is for"
    for method, name in (("rasa", "RaSA"), ("lora", "LoRA")):
        if path.stem.startswith(("math_", "code_")) and recipe.adapter.method == method:
            assert name in first and f"r = {recipe.adapter.r}" in first and ("Table" in first or "Figure" in first)


def test_all_shipped_recipes_were_seen() -> None:
    names = {p.stem for p in SHIPPED}
    for task in ("math", "code"):
        for model in ("llama8b", "mistral7b"):
            for r in (8, 16, 32):
                assert {f"{task}_{model}_r{r}", f"{task}_{model}_lora_r{r}"} <= names
                rasa = load_recipe(f"{task}_{model}_r{r}").recipe
                assert (rasa.adapter.k, rasa.adapter.alpha) == (r // 8, 8 if task == "math" else 32)
                assert rasa.training.optimizer.lr == 5e-4 and rasa.training.batch_size == 192
                lora = load_recipe(f"configs/{task}_{model}_lora_r{r}.yaml").recipe
                changed = {"adapter", "output_dir"}
                assert rasa.model_dump(exclude=changed) == lora.model_dump(exclude=changed)
    assert yaml.safe_load((configs_dir() / "math_llama8b_r8.yaml").read_text())


# -- a key under its former name -----------------------------------------------------------------------------

RENAMED = "model.base is now model.quantization; bf16 is now none"


@pytest.mark.parametrize(("former", "value"), [("bf16", "none"), ("fp8", "fp8"), ("nf4", "nf4")])
def test_the_former_name_works_with_a_notice(former: str, value: str, recipe: Path) -> None:
    given = load_recipe(recipe, [f"model.base={former}"])
    assert given.recipe.model.quantization == value and given.notices == [f"note: command line: {RENAMED}"]
    recipe.write_text(GOOD.replace("{name: some/model}", f"\n  name: some/model\n  base: {former}"))
    written = load_recipe(recipe)
    assert written.recipe == given.recipe and written.notices == [f"note: {recipe}:3: {RENAMED}"]
    assert "base:" not in dump_recipe(written.recipe) and load_recipe(recipe, ["model.quantization=nf4"]).recipe.model
    assert f"at {recipe}:3: base: {former}" in str(written.explain(UserError("no", key="model.quantization")))


def test_a_wrong_value_under_the_former_name(recipe: Path) -> None:
    recipe.write_text(GOOD.replace("{name: some/model}", "{name: some/model, base: int8}"))
    message = error_of(recipe)
    assert "model.quantization must be 'none', 'fp8' or 'nf4', got 'int8'" in message and f"{recipe}:1" in message
    assert "got 'bf16'" in error_of(recipe, "model.quantization=bf16")


def test_both_names_are_an_error_with_both_places(recipe: Path) -> None:
    message = error_of(recipe, "model.base=nf4", "model.quantization=nf4")
    assert "command line: model.base=nf4" in message and "command line: model.quantization=nf4" in message
    recipe.write_text(GOOD.replace("{name: some/model}", "\n  name: m\n  base: nf4\n  quantization: nf4"))
    message = error_of(recipe)
    assert f"{recipe}:3: base: nf4" in message and f"{recipe}:4: quantization: nf4" in message


def test_what_is_written_above_a_former_name_wins(recipe: Path) -> None:
    """As everywhere: the command line over a file, a file over the one that it extends, whatever the key is called."""
    recipe.write_text(GOOD.replace("{name: some/model}", "{name: some/model, base: nf4}"))
    assert load_recipe(recipe, ["model.quantization=none"]).recipe.model.quantization == "none"
    recipe.write_text(GOOD.replace("{name: some/model}", "{name: some/model, quantization: nf4}"))
    assert load_recipe(recipe, ["model.base=bf16"]).recipe.model.quantization == "none"


def test_a_stored_recipe_is_completed(recipe: Path) -> None:
    loaded = load_recipe(recipe).recipe
    stored = yaml.safe_load(dump_recipe(loaded))
    stored["model"]["base"] = {"none": "bf16"}[stored["model"].pop("quantization")]
    del stored["training"]["loss_average"], stored["adapter"]["dropout"], stored["tracking"]
    assert completed(yaml.safe_dump(stored)) == dump_recipe(loaded)
    for unknown in ("seed: 7\n", "[]\n", "null\n", yaml.safe_dump(stored | {"model": {"name": 1}})):
        assert completed(unknown) == unknown


UNUSED = {
    "full": ["dropout=0.1", "compute=float32"],
    "bitfit": ["dropout=0.1", "compute=float32"],
    "bitfit adapter.add_bias=false": ["targets=[q_proj]", "exclude=[q_proj]"],
    "bottleneck": ["targets=[q_proj]", "exclude=[q_proj]"],
    "peft adapter.config.peft_type=LORA": ["targets=[q_proj]", "exclude=[q_proj]", "dropout=0.1", "compute=float32"],
}


@pytest.mark.parametrize(("method", "override"), [(m, o) for m, overrides in UNUSED.items() for o in overrides])
def test_a_key_that_the_method_ignores_is_refused(method: str, override: str) -> None:
    key, _, _ = override.partition("=")
    words = f"adapter.method={method} adapter.{override}".split()
    with pytest.raises(UserError, match=rf"adapter\.{key}: adapter\.method: \w+ does not use it, got .*leave it out"):
        load_recipe("demo", words)


def test_keys_of_another_method_do_not_stay(tmp_path: Path) -> None:
    """The paper's recipes share a dropout, and full fine-tuning has none: its recipe neither has it nor is refused."""
    assert load_recipe("paper/math_llama8b_full").recipe.adapter.dropout == 0
    assert load_recipe("paper/math_llama8b_full", ["adapter.method=lora", "adapter.dropout=0.1"]).recipe.adapter.dropout
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(load_recipe("demo", ["adapter.method=full", f'output_dir="{tmp_path}"']).recipe))
    path.write_text(path.read_text().replace("dropout: 0.0", "dropout: 0.05"))
    assert load_recipe(path).recipe.adapter.dropout == 0.05, "an older version's run can be read"


@pytest.mark.parametrize("name", ["a\\0b", "a\\ud800b", "a\\udc80b"])
def test_a_name_that_no_file_can_have_is_refused_with_its_line(name: str, recipe: Path) -> None:
    recipe.write_text(f'{recipe.read_text()}output_dir: "{name}"\n')
    with pytest.raises(UserError, match=r"yaml:\d+: a value has the character"):
        load_recipe(recipe)
    with pytest.raises(UserError, match=r"override output_dir:1: a value has the character"):
        load_recipe("demo", [f'output_dir="{name}"'])
