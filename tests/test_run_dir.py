"""Run directories that somebody else has made, or that killed processes have left: links, damage, leftovers."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from rasa_train.errors import UserError
from rasa_train.io.atomic import lock, write_text
from rasa_train.io.atomic_dir import new_directory
from rasa_train.io.links import refuse_links_out
from rasa_train.io.run_dir import READ, RunDirectory, numbered
from rasa_train.recipe.load import load_recipe


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A directory of the user's, beside the run directory, with a file in it."""
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "file").write_text("mine")
    return tmp_path / "victim"


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    return RunDirectory(tmp_path / "run")


@pytest.mark.parametrize("name", [*READ, ".lock", "trackers"])
@pytest.mark.parametrize("target", ["file", "", "absent"])
def test_a_link_out_of_a_given_run_directory_is_refused(name: str, target: str, tmp_path: Path, victim: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    (run.path / name).symlink_to(victim / target)
    with pytest.raises(UserError, match=f"run/{name} is a link to .*victim.*, outside of .*run"):
        run.create()
    assert [path.name for path in victim.iterdir()] == ["file"] and (victim / "file").read_text() == "mine"


@pytest.mark.parametrize(
    "place", ["adapter/adapter.safetensors", "checkpoints/step-00000001", "evaluation/math/adapter.json"]
)
def test_a_link_deep_in_a_run_directory_is_refused(place: str, run: RunDirectory, victim: Path) -> None:
    (run.path / place).parent.mkdir(parents=True, exist_ok=True)
    (run.path / place).symlink_to(victim / "file")
    with pytest.raises(UserError, match="is a link"):
        run.create()


def test_links_that_stay_inside_are_followed(run: RunDirectory) -> None:
    (run.checkpoints / "step-00000001").mkdir()
    run.adapter.symlink_to("checkpoints/step-00000001")
    run.create()


def test_an_output_dir_that_is_a_link_is_fine(run: RunDirectory, tmp_path: Path) -> None:
    (tmp_path / "scratch").symlink_to(run.path)
    linked = RunDirectory(tmp_path / "scratch")
    linked.create()
    with linked.lock():
        linked.log({"step": 1})
    assert run.rows() == [{"step": 1}]


def test_a_download_of_the_hub_is_read(tmp_path: Path, victim: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "123", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "abc").write_text("{}")
    (snapshot / "adapter_config.json").symlink_to("../../blobs/abc")
    refuse_links_out(snapshot)
    (blobs / "abc").unlink()
    blobs.rmdir()
    blobs.symlink_to(victim)  # what looks like a download, but leads elsewhere
    (snapshot / "other.json").symlink_to("../../blobs/file")
    with pytest.raises(UserError, match="is a link"):
        refuse_links_out(snapshot)


def test_writing_beside_a_link_leaves_its_target_alone(run: RunDirectory, victim: Path) -> None:
    for name in (".recipe.yaml.partial", "recipe.yaml"):
        (run.path / name).symlink_to(victim / "file")
    write_text(run.recipe, "new")
    assert run.recipe.read_text() == "new" and not run.recipe.is_symlink()
    (run.path / "metrics.jsonl").symlink_to(victim / "file")
    with pytest.raises(OSError, match="symbolic link"):
        run.log({"step": 1})
    assert (victim / "file").read_text() == "mine"


def test_a_lock_that_is_another_name_of_a_users_file_is_refused(run: RunDirectory, victim: Path) -> None:
    os.link(victim / "file", run.path / ".lock")
    with pytest.raises(UserError, match=r"\.lock is not a file of its own"), run.lock():
        pass
    assert (victim / "file").read_text() == "mine"


def test_fresh_removes_links_and_not_what_they_lead_to(run: RunDirectory, victim: Path) -> None:
    run.adapter.symlink_to(victim)
    run.summary.symlink_to(victim / "file")
    (run.checkpoints / "step-00000001").symlink_to(victim)
    run.clear()
    assert not list(run.path.iterdir()) and (victim / "file").read_text() == "mine"


def test_a_merge_does_not_continue_in_a_directory_of_links(tmp_path: Path, victim: Path) -> None:
    planted = tmp_path / ".out.partial-1"
    planted.mkdir()
    (planted / ".key").write_text("key")
    (planted / "model.safetensors").symlink_to(victim / "file")
    (tmp_path / ".out.partial-2").symlink_to(victim)
    with new_directory(tmp_path / "out", overwrite=False, inputs=[], nbytes=0, key="key") as made:
        (made / "model.safetensors").write_text("merged")
    assert (victim / "file").read_text() == "mine" and [path.name for path in victim.iterdir()] == ["file"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "victim"]


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefghi", "bcdefghij", strict=True)
)
DAMAGED = {
    "torn": b"adapter: {r: 8",
    "zeros": bytes(4096),
    "not text": b"\xff\xfe\x00\x80",
    "a list": b"- 1\n- 2\n",
    "empty": b"",
    "nested": b"[" * 100_000,
    "aliases": BOMB.encode(),
    "itself": b"a: &a [*a, *a, *a]",
    "an object": b"!!python/object/apply:os.system ['true']",
    "a huge number": b"a: " + b"1" * 5000,
    "a date that is none": b"a: 2024-99-99",
    "large": b"#" * (2 << 20),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_recipe_is_one_line(kind: str, run: RunDirectory) -> None:
    run.recipe.write_bytes(DAMAGED[kind])
    with pytest.raises(UserError, match=r"recipe\.yaml") as error:
        run.check_same_run("adapter: {r: 8}", lambda text: text)
    assert "\n" not in str(error.value) and "--fresh" in str(error.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, bytes(100)])
def test_a_damaged_summary_is_one_line(content: bytes, run: RunDirectory) -> None:
    run.summary.write_bytes(content)
    with pytest.raises(UserError, match=r"summary\.json") as error:
        run.read_summary()
    assert "\n" not in str(error.value)


def test_damaged_lines_of_the_metrics_are_left_out(run: RunDirectory) -> None:
    bad = [b"{", b"\xff\xfe", b"[]", b'{"step": null}', b'{"step": 1e400}', b"[" * 100_000, b"7", bytes(50)]
    run.metrics.write_bytes(b'{"step": 1}\n' + b"\n".join(bad) + b'\n{"step": 2}\n{"step": 3}\n{"st')
    assert [row["step"] for row in run.rows()] == [1, 2, 3]
    run.start_metrics(2)
    assert run.metrics.read_text() == '{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize("name", ["recipe.yaml", "summary.json", "metrics.jsonl"])
def test_a_pipe_or_a_directory_in_place_of_a_file_is_one_line(name: str, run: RunDirectory) -> None:
    for make in (os.mkfifo, os.mkdir):
        make(run.path / name)
        with pytest.raises(UserError, match=name):
            run.read(name, 100)
        os.unlink(run.path / name) if make is os.mkfifo else os.rmdir(run.path / name)


def test_a_file_in_place_of_a_directory_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("")
    with pytest.raises(UserError, match=r"cannot be written: File exists .*checkpoints"):
        RunDirectory(tmp_path / "run").create()


def test_only_numbered_directories_are_checkpoints(run: RunDirectory) -> None:
    for name in ("step-00000002", "step-best", "step-00000010", "step-1"):
        (run.checkpoints / name).mkdir()
    assert [path.name for path in numbered(run.checkpoints)] == ["step-00000002", "step-00000010"]


def test_the_next_run_removes_what_a_killed_one_left(run: RunDirectory) -> None:
    for name in (".adapter.partial", ".adapter.replaced", "checkpoints/.step-00000002.removed"):
        (run.path / name).mkdir()
    for name in (".recipe.yaml.partial-01234567", ".summary.json.partial"):
        (run.path / name).write_text("half")
    (run.path / ".merged.partial-77").mkdir()  # a merge that is under way
    with run.lock():
        left = sorted(str(path.relative_to(run.path)) for path in run.path.rglob("*"))
    assert left == [".lock", ".merged.partial-77", "checkpoints"]


def _hold(path: Path, ready: Connection) -> None:
    held = lock(path)
    ready.send(held is not None)
    time.sleep(100)


def test_a_page_that_a_killed_report_left_is_removed_and_one_under_way_is_not(tmp_path: Path) -> None:
    left, under_way = tmp_path / ".r.html.partial-01234567", tmp_path / ".r.html.partial-89abcdef"
    for path in (left, under_way):
        path.write_text("half")
    ready, theirs = multiprocessing.Pipe()
    other = multiprocessing.get_context("fork").Process(target=_hold, args=(under_way, theirs))
    other.start()
    assert ready.recv()
    write_text(tmp_path / "r.html", "page")
    assert sorted(path.name for path in tmp_path.iterdir()) == [under_way.name, "r.html"]
    os.kill(other.pid or 0, signal.SIGKILL)
    other.join()
    write_text(tmp_path / "r.html", "page")
    assert [path.name for path in tmp_path.iterdir()] == ["r.html"]


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), lambda path: None])
def test_a_page_that_cannot_be_written_leaves_nothing(make: Callable[[Path], None], tmp_path: Path) -> None:
    target = tmp_path / "directory"
    make(target)
    text = "page" if target.exists() else "\ud800"  # a lone surrogate cannot be encoded
    with pytest.raises((OSError, UnicodeError)):
        write_text(target, text)
    assert [path.name for path in tmp_path.iterdir()] == (["directory"] if target.exists() else [])


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_run_directory_that_may_not_be_entered_is_one_line(tmp_path: Path) -> None:
    for parent in (tmp_path, *tmp_path.parents):  # pytest's directories are its user's alone
        if parent.stat().st_mode & 0o777 == 0o700:
            parent.chmod(0o711)
    (tmp_path / "run").mkdir(mode=0o700)
    os.seteuid(65534)
    try:
        with pytest.raises(UserError, match="run cannot be written: Permission denied"):
            RunDirectory(tmp_path / "run").create()
    finally:
        os.seteuid(0)


BEYOND = {
    "300 kB": "seed: 7 #" + "x" * 300_000,
    "45 levels": "a: " + "[" * 45 + "]" * 45,
    "a tag": "seed: !!str 7",
    "30,000 values": f"a: [{'1,' * 30_000}]",
    "values of aliases": f"a: &a [{'1,' * 500}]\nb: [{'*a,' * 60}]",
    "a long value": f"seed: {'7' * 5000}",
}


@pytest.mark.parametrize("kind", BEYOND)
def test_the_recipe_in_a_run_directory_has_the_limits_of_a_recipe(kind: str, run: RunDirectory, tmp_path: Path) -> None:
    (tmp_path / "given.yaml").write_text(BEYOND[kind])
    with pytest.raises(UserError):
        load_recipe(tmp_path / "given.yaml")
    run.recipe.write_text(BEYOND[kind])
    with pytest.raises(UserError, match=r"recipe\.yaml") as error:
        run.stored_recipe()
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


def test_a_recipe_in_a_run_directory_is_read_as_a_recipe(run: RunDirectory) -> None:
    run.recipe.write_text("training: {optimizer: {lr: 5e-4}}")
    assert run.stored_recipe() == {"training": {"optimizer": {"lr": 0.0005}}}


def test_a_user_keeps_copies_of_checkpoints_under_other_names(run: RunDirectory) -> None:
    for name in ("step-00000009", "step-00000010", "step-99999999", "step-100000000", "step-00000009-old", "step-11"):
        (run.checkpoints / name).mkdir()
    steps = [9, 10, 99_999_999, 100_000_000]
    assert [path.name for path in numbered(run.checkpoints)] == [f"step-{step:08d}" for step in steps]
