"""The scripts of examples/ are run as a reader runs them, for a few steps. tests/test_docs.py reads the pages there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from rasa_train.demo import __file__ as demo
from tests.conftest import Cli
from tests.doc_pages import PAGES, ROOT

EXAMPLES = ROOT / "examples"


def run(script: str, *arguments: object, directory: Path) -> str:
    """Run an example in ``directory`` and return what it prints."""
    command = [sys.executable, str(EXAMPLES / script), *map(str, arguments)]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def assert_merges(cli: Cli, directory: Path) -> None:
    """``rasa-merge`` makes a checkpoint of the adapter that an example has written."""
    cli("merge", "adapter", "--output", "merged", check=True)
    base = Path(str(demo)).parent / "model" / "model.safetensors"
    merged = directory / "merged" / "model.safetensors"
    assert merged.stat().st_size == pytest.approx(base.stat().st_size, rel=0.01)
    assert merged.read_bytes() != base.read_bytes()


def test_every_example_is_in_the_list() -> None:
    listed = set(re.findall(r"^\| \[([\w.]+)\]", (EXAMPLES / "README.md").read_text(), re.MULTILINE))
    assert listed == {path.name for path in EXAMPLES.iterdir() if path.is_file()} - {"README.md"}
    assert set(EXAMPLES.glob("*.md")) <= set(PAGES)


def test_the_plain_loop_trains_and_its_adapter_merges(tmp_path: Path, cli: Cli) -> None:
    printed = run("plain_loop.py", "--steps", 8, "--output", "adapter", directory=tmp_path)
    losses = [float(loss) for loss in re.findall(r"^step \d+: loss ([\d.]+)$", printed, re.MULTILINE)]
    assert len(losses) == 8 and losses[-1] < 0.6 * losses[0]
    assert_merges(cli, tmp_path)


@pytest.mark.slow
def test_trl_trains_an_adapted_model(tmp_path: Path, cli: Cli) -> None:
    pytest.importorskip("trl")
    printed = run("trl_sft.py", "--steps", 8, "--output", "adapter", directory=tmp_path)
    losses = [float(loss) for loss in re.findall(r"'loss': '?([\d.]+)", printed)]
    assert len(losses) == 8 and losses[-1] < 0.8 * losses[0]
    assert_merges(cli, tmp_path)
