"""JSON files of others: read within bounds, or refused in one line; text of others on a terminal."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path

import pytest

from rasa_train.errors import UserError, shown
from rasa_train.io.json_file import field, read_object


def test_an_object_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"r": 8, "name": "x"}')
    assert read_object(tmp_path / "a.json") == {"r": 8, "name": "x"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[1]", "must hold one JSON object, got list"),
        (b"{", "is not valid JSON"),
        (b"\xff\xfe\xff", "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not valid JSON"),
        (b'{"a": "' + b"x" * 200 + b'"}', "is larger than 100 bytes"),
    ],
)
def test_what_is_no_object_is_refused_in_one_line(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        read_object(tmp_path / "a.json", 100 if b"x" in content else 1 << 20)
    assert len(str(caught.value).splitlines()) == 1


def test_nesting_that_a_program_cannot_go_through_is_refused(tmp_path: Path) -> None:
    """Python 3.12 and newer read thousands of levels, and fail in the first function that calls itself for each."""
    for levels in (99, 101):
        (tmp_path / "config.json").write_text('{"a":' * levels + "[1]" + "}" * levels)
        with pytest.raises(UserError, match="nested more than 100 levels") if levels > 100 else nullcontext():
            read_object(tmp_path / "config.json")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.json")
    with pytest.raises(UserError, match="is not a file"):
        read_object(tmp_path / "a.json")


def test_fields_have_types() -> None:
    values = {"r": 8, "on": True, "rate": 1, "none": None}
    assert field(values, "r", int, "f") == 8 and field(values, "rate", float, "f") == 1.0
    assert field(values, "absent", str, "f", "x") == "x"
    for key, kind in (("on", int), ("r", str), ("none", int), ("absent", int), ("on", float)):
        with pytest.raises(UserError, match=f"f: {key} must be {kind.__name__}, got"):
            field(values, key, kind, "f")
    with pytest.raises(UserError, match="f: rate must be float, got int 1000"):
        field({"rate": 10**400}, "rate", float, "f")


def test_control_characters_are_shown() -> None:
    assert shown("\x1b[31mred\x07\r \u202eback \ud800") == "\\x1b[31mred\\x07\\r \\u202eback \\ud800"
    assert shown("tab\tline\nüber 漢字 🙂 a\xa0b") == "tab\tline\nüber 漢字 🙂 a\xa0b"
