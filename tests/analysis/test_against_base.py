"""rasa-analyze subspace --against-base, against numpy's full SVD and updates whose directions are known."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from rasa_train.analysis import against_base as module
from rasa_train.analysis.against_base import Wanted, against_base, leading
from rasa_train.analysis.updates import KindUpdates
from tests.conftest import Cli
from tests.merge.conftest import load, save_adapter, save_base

D = 48


def one(update: torch.Tensor | tuple[torch.Tensor, torch.Tensor], W: torch.Tensor, **wanted: object):  # type: ignore[no-untyped-def]
    stack = update[None] if isinstance(update, torch.Tensor) else (update[0][None], update[1][None])
    found = KindUpdates("q_proj", ["layers.0.q_proj"], stack, weight=lambda i: W)
    (result,) = against_base({"q_proj": lambda: found}, Wanted(**wanted))  # type: ignore[arg-type]
    return result


@pytest.fixture(scope="module")
def W() -> torch.Tensor:
    return torch.randn(D, 40, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("dense", [True, False], ids=["dense", "factors"])
def test_against_numpy(side: str, dense: bool, W: torch.Tensor) -> None:
    generator = torch.Generator().manual_seed(2)
    B, A = torch.randn(D, 5, generator=generator), torch.randn(5, 40, generator=generator)
    found = one(B @ A if dense else (B, A), W, side=side)
    U, s, V = np.linalg.svd((B @ A).double().numpy())
    U_W, s_W, V_W = np.linalg.svd(W.double().numpy())
    one_side, other = (U, U_W) if side == "left" else (V.T, V_W.T)
    assert found.rank == 5 and [at.r for at in found.ranks] == [1, 2, 4, 5] and found.sizes == [*range(1, 41)]
    assert found.update_norm == pytest.approx(np.linalg.norm(s)) and found.weight_norm == pytest.approx(
        np.linalg.norm(s_W)
    )
    for i in range(1, 6):
        for j in (1, 3, 17, 40):
            phi = np.linalg.norm(one_side[:, :i].T @ other[:, :j]) ** 2 / min(i, j)
            assert float(found.grid[i - 1, j - 1]) == pytest.approx(phi, rel=1e-5)
    for at in found.ranks:
        inside = np.linalg.norm(U[:, : at.r].T @ W.double().numpy() @ V[: at.r].T)
        assert at.projection == pytest.approx(inside, rel=1e-5) and at.phi == float(found.grid[at.r - 1, at.r - 1])
        assert at.factor == pytest.approx(np.linalg.norm(s) / inside, rel=1e-5)
        assert (
            at.projection_own == pytest.approx(np.linalg.norm(s_W[: at.r]), rel=1e-5)
            and at.projection <= at.projection_own
        )


def test_directions_of_the_base_itself(W: torch.Tensor) -> None:
    """An update made of W's own top directions lies in W, and is amplified as much as it is scaled; one made of the
    last directions lies beside the top ones."""
    U, s, Vh = torch.linalg.svd(W)
    own = one(((U[:, :4] * s[:4]) * 3, Vh[:4]), W)
    assert all(
        at.phi == pytest.approx(1, abs=1e-5) and at.projection == pytest.approx(at.projection_own) for at in own.ranks
    )
    assert own.ranks[-1].factor == pytest.approx(3)
    last = one((U[:, 36:40] * s[36:40], Vh[36:]), W)
    assert all(at.phi < 1e-5 for at in last.ranks) and float(last.grid[-1, -1]) == pytest.approx(1)


def test_random_updates_are_the_baseline(W: torch.Tensor) -> None:
    """E phi(r, r) = r / d, of the update and of the drawn baseline."""
    totals = torch.zeros(2)
    for seed in range(150):
        generator = torch.Generator().manual_seed(100 + seed)
        update = torch.randn(D, 8, generator=generator), torch.randn(8, 40, generator=generator)
        found = one(update, W, ranks=[8], seed=seed)
        totals += torch.tensor([found.ranks[0].phi, float(found.random_grid[7, 7])])
    assert found.ranks[0].random == 8 / 40 and (totals / 150).tolist() == pytest.approx([0.2, 0.2], abs=0.01)


def test_truncated_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    """A large matrix whose values fall off as those of trained weights do, or not at all."""
    monkeypatch.setattr(module, "EXACT", 64)
    W = torch.randn(600, 700, generator=torch.Generator().manual_seed(3))
    U, s, Vh = torch.linalg.svd(W, full_matrices=False)
    for values in (s, s[0] / torch.arange(1, 601) ** 0.7):
        M = (U * values) @ Vh
        left, found, right = leading(M, 8)
        assert found.tolist() == pytest.approx(values[:8].tolist(), rel=1e-4)
        for some, exact in ((left, U[:, :8]), (right, Vh[:8].mT)):
            assert float((some.mT @ exact.double()).square().sum()) / 8 == pytest.approx(1, abs=1e-3)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    base = save_base(tmp_path / "base", "tied")
    save_adapter(tmp_path / "lora", base, "lora")
    save_adapter(tmp_path / "rasa", base, "rasa", k=1)
    save_adapter(tmp_path / "full", base, "full")
    return tmp_path


def test_command(runs: Path, cli: Cli) -> None:
    """Every method whose update is exact."""
    args = ("analyze", "subspace", "lora", "rasa", "full", "--against-base", "--kind", "v_proj")
    found = json.loads(cli(*args, "--json", check=True).stdout)
    assert (
        found["side"] == "right"
        and [row["run"] for row in found["sites"]] == ["lora"] * 2 + ["rasa"] * 2 + ["full"] * 2
    )
    assert [row["rank"] for row in found["sites"][::2]] == [4, 5, 32], "r; r - k + L k; all"
    weights = load(runs / "base").state_dict()
    for row in found["sites"]:
        s = np.linalg.svd(weights[f"{row['name']}.weight"].double().numpy())[1]
        assert row["weight_norm"] == pytest.approx(np.linalg.norm(s)) and len(row["grid"][0]) == len(row["sizes"]) == 32
        assert row["ranks"][-1]["projection_own"] == pytest.approx(np.linalg.norm(s[: row["rank"]]), rel=1e-4)
    table = cli(*args, "--ranks", "1,4", check=True).stdout
    assert "factor" in table and max(map(len, table.splitlines())) <= 80


@pytest.mark.slow
def test_figures(runs: Path, cli: Cli) -> None:
    """One per site, with a panel for each run."""
    args = ("analyze", "subspace", "lora", "full", "--against-base", "--kind", "v_proj", "--plots", "p")
    cli(*args, check=True)
    assert len(list(Path("p").glob("against-base-*.png"))) == len(list(Path("p").glob("*.svg"))) == 2


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--against-base", "--ranks", "5"], "--ranks must be in [1, 4], where 4 is the numerical rank of"),
        (["--against-base", "--ranks", "0"], "--ranks must be numbers from 1"),
        (["--against-base", "-i", "2"], "-i does not go with --against-base"),
        (["--ranks", "2", "rasa"], "need --against-base"),
        (["rasa", "full"], "need --against-base"),
    ],
)
def test_wrong_input(more: list[str], words: str, runs: Path, cli: Cli) -> None:
    done = cli("analyze", "subspace", "lora", *more)
    assert done.returncode == 2 and done.stdout == "" and words in " ".join(done.stderr.split())
