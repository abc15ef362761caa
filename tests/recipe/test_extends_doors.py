"""Recipes that somebody else wrote: files that extend others without end, and files of the user that they name."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import yaml

from rasa_train.errors import UserError
from rasa_train.recipe.load import completed, load_recipe


def error_of(path: Path) -> str:
    with pytest.raises(UserError) as error:
        load_recipe(path)
    return str(error.value)


def test_a_diamond_of_files_that_extend_the_next_one_twice(tmp_path: Path) -> None:
    for i in range(24):
        (tmp_path / f"{i}.yaml").write_text(f"extends: [{i + 1}.yaml, {i + 1}.yaml]\n")
    (tmp_path / "24.yaml").write_text("seed: 1\n")
    start = time.monotonic()
    assert "`extends` leads to more than 100 files" in error_of(tmp_path / "0.yaml")
    assert time.monotonic() - start < 60  # 2^24 files take hours


def test_large_files_that_are_extended_many_times(tmp_path: Path) -> None:
    (tmp_path / "big.yaml").write_text("seed: 1\n" + "# x\n" * 30_000)
    (tmp_path / "a.yaml").write_text(f"extends: [{', '.join(['big.yaml'] * 50)}]\n")
    assert "262,144 bytes" in error_of(tmp_path / "a.yaml")


def test_a_file_that_two_others_extend_is_still_read_for_both(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("extends: demo\nseed: 1\n")
    for name, r in (("b", 2), ("c", 4)):
        (tmp_path / f"{name}.yaml").write_text(f"extends: base.yaml\nadapter: {{r: {r}}}\n")
    (tmp_path / "a.yaml").write_text("extends: [b.yaml, c.yaml]\n")
    recipe = load_recipe(tmp_path / "a.yaml").recipe
    assert recipe.seed == 1 and recipe.adapter.r == 4  # type: ignore[attr-defined]


SECRET = "hunter2"
CONTENTS = {
    "a list of accounts": f"root:{SECRET}:0:0\nbin:{SECRET}\n",
    "an unclosed text": f"password: '{SECRET}\n",
    "an alias": f"a: *{SECRET}\n",
    "a tag": f"a: !{SECRET} b\n",
    "settings of another program": f"password: {SECRET}\nuser: me\n",
    "a key twice": f"{SECRET}: 1\n{SECRET}: 2\n",
    "a key that is a list": f"[{SECRET}]: 1\n",
    "a date that is none": f"{{a: 2025-13-01, b: {SECRET}}}\n",
    "a merge of a text": f"<<: {SECRET}\n",
    "a tab": f"\t{SECRET}: 1\n",
    "a private key": f"-----BEGIN KEY-----\n{SECRET}\n-----END KEY-----\n",
    "an environment": f"export TOKEN={SECRET}\n",
}


@pytest.mark.parametrize("what", CONTENTS)
def test_a_recipe_that_extends_another_file_of_the_users_shows_nothing_of_it(tmp_path: Path, what: str) -> None:
    (tmp_path / "private").write_text(CONTENTS[what])
    (tmp_path / "a.yaml").write_text("extends: private\n")
    message = error_of(tmp_path / "a.yaml")
    assert SECRET not in message and "private" in message, message


def test_what_stands_in_a_binary_file_is_not_shown(tmp_path: Path) -> None:
    (tmp_path / "private").write_bytes(b"\xff\xfe" + SECRET.encode())
    (tmp_path / "a.yaml").write_text("extends: private\n")
    assert "not UTF-8 text" in (message := error_of(tmp_path / "a.yaml")) and SECRET not in message


def test_a_recipe_that_extends_a_pipe_does_not_wait_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "a.yaml").write_text("extends: pipe\n")
    assert "does not exist" in error_of(tmp_path / "a.yaml")


def test_a_mistake_in_a_recipe_of_ones_own_is_still_shown_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("extends: demo\nadapter: {r: two}\n")
    (tmp_path / "a.yaml").write_text("extends: base.yaml\n")
    assert "base.yaml:2: adapter: {r: two}" in error_of(tmp_path / "a.yaml")


BOMB = "a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(9)
)


def test_an_alias_bomb_as_the_recipe_of_a_run(tmp_path: Path) -> None:
    """3.5 billion values; read by the report, and by a run that would go on."""
    from rasa_train.report.runs import read_run

    (tmp_path / "recipe.yaml").write_text(BOMB)
    (tmp_path / "metrics.jsonl").write_text("")
    run = read_run(tmp_path, "run")
    assert run.recipe == {} and any("recipe.yaml cannot be read" in problem for problem in run.problems)
    with pytest.raises(UserError, match=r"20,000 values"):
        completed(BOMB)
    assert completed(yaml.safe_dump({"of": "an older version"})) == "of: an older version\n"
