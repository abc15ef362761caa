"""rasa-analyze on models and adapters whose updates are known."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rasa_train.analysis.capacity import Descent, capacity
from rasa_train.analysis.updates import KindUpdates, of_adapter, of_models, random_updates
from rasa_train.merging.merged import merge
from tests.conftest import Cli
from tests.merge.conftest import load, save_adapter, save_base


@pytest.fixture
def tuned(tmp_path: Path) -> tuple[Path, Path, dict[str, torch.Tensor]]:
    """A base, the same model with every linear changed, and the changes."""
    base = save_base(tmp_path / "base")
    model, changes = load(base), {}
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 2 and "layers" in name:
                changes[name] = torch.randn(p.shape, generator=generator) * 0.1
                p += changes[name]
    model.save_pretrained(tmp_path / "tuned")
    return base, tmp_path / "tuned", changes


def kind_of(updates: KindUpdates) -> torch.Tensor:
    return updates.stack if isinstance(updates.stack, torch.Tensor) else updates.stack[0] @ updates.stack[1]


def test_updates_of_two_models(tuned: tuple[Path, Path, dict[str, torch.Tensor]]) -> None:
    base, after, changes = tuned
    updates = of_models(str(base), str(after))
    assert len(updates) == 7
    for read in updates.values():
        found = read()
        for i, name in enumerate(found.names):
            assert torch.allclose(kind_of(found)[i], changes[f"{name}.weight"], atol=1e-6)
            assert found.weight is not None
            assert torch.equal(found.weight(i), load(base).state_dict()[f"{name}.weight"])


@pytest.mark.parametrize(
    ("kind", "method", "fields"),
    [("llama", "rasa", {"k": 1}), ("gpt2", "lora", {}), ("mixtral", "rasa", {"k": 2}), ("llama", "dora", {})],
)
def test_updates_of_an_adapter_are_what_merging_adds(
    kind: str, method: str, fields: dict[str, int], tmp_path: Path
) -> None:
    """The oracle is the merge: fine-tuned minus base of the merged model."""
    base = save_base(tmp_path / "base", kind)
    save_adapter(tmp_path / "adapter", base, method, **fields)
    merge(tmp_path / "adapter", tmp_path / "merged")
    adapter, models = of_adapter(tmp_path / "adapter"), of_models(str(base), str(tmp_path / "merged"))
    assert adapter.keys() <= models.keys() and len(adapter) > 3
    for name, read in adapter.items():
        one, other = read(), models[name]()
        assert one.names == other.names
        assert torch.allclose(kind_of(one), kind_of(other), atol=1e-5), name
        assert (one.private is not None) == (method == "rasa") and isinstance(one.stack, tuple) == (method != "dora")


def test_reconstruct_reports_the_svd(tuned: tuple[Path, Path, dict[str, torch.Tensor]], cli: Cli) -> None:
    """e_lora is what torch's SVD leaves; errors never rise; the theorem's start is never worse than LoRA."""
    base, after, changes = tuned
    args = ("analyze", "reconstruct", base, after, "--r", 4, "--sweeps", 4, "--k", "0,1,4", "--json", "--plots", "p")
    found = json.loads(cli(*args, check=True).stdout)
    assert found["r"] == 4 and len(found["kinds"]) == 7
    for kind in found["kinds"]:
        own = [change for name, change in changes.items() if f".{kind['kind']}.weight" in name]
        expected = sum(float(torch.linalg.svdvals(change.double())[4:].square().sum()) for change in own)
        assert len(own) == kind["layers"] == 3 and kind["e_lora"] == pytest.approx(expected, rel=1e-5)
        assert kind["e_rasa"]["0"] == pytest.approx([kind["e_lora"]])
        for k in ("1", "4"):
            errors = kind["e_rasa"][k]
            assert len(errors) == 5 and all(b <= a * (1 + 1e-9) for a, b in pairwise(errors))
    assert {path.name for path in Path("p").iterdir()} >= {"reconstruction-by-k.png", "reconstruction-by-sweep.svg"}
    best = json.loads(cli(*args[:-2], "--start", "theorem", check=True).stdout)
    assert all(kind["e_rasa"][k][-1] <= kind["e_lora"] for kind in best["kinds"] for k in ("1", "4"))


@pytest.mark.slow
def test_real_updates_of_full_fine_tuning(cli: Cli) -> None:
    """Theorem 3.1 on what training really did: from LoRA's best point RaSA is never worse, and gets better."""
    train = ("train", "demo", "adapter.method=full", "training.optimizer.lr=5e-4", "training.max_steps=10")
    cli(*train, "output_dir=full", check=True)
    args = ("analyze", "reconstruct", "full", "--k", "1,8", "--sweeps", 2, "--json")
    found = json.loads(cli(*args, "--start", "theorem", check=True).stdout)
    assert len(found["kinds"]) == 7 and all(kind["norm2"] > 0 for kind in found["kinds"])
    for kind in found["kinds"]:
        for errors in kind["e_rasa"].values():
            assert errors[0] == pytest.approx(kind["e_lora"], rel=1e-6) and errors[-1] < kind["e_lora"]


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 4), st.integers(3, 12), st.integers(3, 12), st.integers(1, 4), st.data(), st.integers(0, 99))
def test_errors_fall_for_any_shape(L: int, b: int, a: int, r: int, data: st.DataObject, seed: int) -> None:
    """Monotone over sweeps from every start; from the theorem's start at or below LoRA's error (Theorem 3.1)."""
    k = data.draw(st.integers(0, r))
    start = data.draw(st.sampled_from(["rasa", "theorem", "random"]))
    updates = random_updates(L, b, a, data.draw(st.none() | st.integers(1, 6)), seed)["random"]()
    found = capacity(updates, r, [k], Descent(3, start, seed))
    slack = 1e-9 * found.norm2
    errors = found.e_rasa[k]
    assert all(after <= before + slack for before, after in pairwise(errors))
    assert k or errors[-1] <= found.e_lora + slack
    if start == "theorem":
        assert errors[0] == pytest.approx(found.e_lora, abs=slack) and errors[-1] <= found.e_lora + slack


def test_reconstruct_random_and_advice(cli: Cli) -> None:
    done = cli("analyze", "reconstruct", "--random", "3,20,24,2", "--r", "4", "--json", check=True)
    assert "exactly" in json.loads(done.stdout)["advice"], "rank 2 updates need no 4 ranks"
    shown = cli("analyze", "reconstruct", "--random", "3,20,24", "--r", "4", check=True).stdout
    assert "k=4" in shown and "compare runs" in shown


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    base = save_base(tmp_path / "base")
    save_adapter(tmp_path / "one", base, "rasa", k=1)
    save_adapter(tmp_path / "two", base, "lora")
    return tmp_path / "one", tmp_path / "two"


def test_spectrum(pair: tuple[Path, Path], cli: Cli) -> None:
    found = json.loads(
        cli("analyze", "spectrum", pair[0], "--kind", "q_proj", "--json", "--plots", "p", check=True).stdout
    )
    assert len(found["layers"]) == 3 and "self_attn.q_proj" in found["mixing"]
    for i, row in enumerate(found["layers"]):
        dense = kind_of(of_adapter(pair[0])["self_attn.q_proj"]())[i].double()
        assert row["singular_values"] == pytest.approx(torch.linalg.svdvals(dense)[:6].tolist(), rel=1e-4)
        assert row["numerical_rank"] == 6, "r - k + L k = 4 - 1 + 3"
        assert row["norm"] == pytest.approx(float(dense.norm()), rel=1e-5) and min(row["private"], row["shared"]) > 0
    assert Path("p/spectra.png").exists() and Path("p/mixing-self_attn.q_proj.svg").exists()
    assert "stable" in cli("analyze", "spectrum", pair[1], check=True).stdout


def test_subspace(pair: tuple[Path, Path], cli: Cli) -> None:
    args = ("analyze", "subspace", pair[0], pair[1], "--kind", "q_proj", "-i", 2, "-j", 3, "--amplification", 2)
    found = json.loads(cli(*args, "--json", "--plots", "p", check=True).stdout)
    one, two = (kind_of(of_adapter(path)["self_attn.q_proj"]()).double() for path in pair)
    assert len(found["sites"]) == 3 and len(list(Path("p").iterdir())) == 6
    for i, row in enumerate(found["sites"]):
        V, W = (torch.linalg.svd(M[i])[2] for M in (one, two))
        assert row["phi"] == pytest.approx(float((V[:2] @ W[:3].mT).norm() ** 2) / 2, rel=1e-4)
        assert row["grid"][1][2] == pytest.approx(row["phi"]) and row["random"] == 3 / 32
        amplified = row["amplification"]
        assert amplified["factor"] == pytest.approx(float(one[i].norm()) / amplified["projection"], rel=1e-4)
    assert "factor" in cli(*args, check=True).stdout
    layers = cli("analyze", "subspace", pair[0], "--layers", "0,2", "--kind", "q_proj", "--json", check=True)
    assert [row["name"] for row in json.loads(layers.stdout)["sites"]] == [
        "model.layers.0.self_attn.q_proj and model.layers.2.self_attn.q_proj"
    ]


WRONG = {
    "nothing": (["reconstruct"], "give either an adapter or run"),
    "both": (["reconstruct", "one", "--random", "2,3,4"], "give either an adapter or run"),
    "random": (["reconstruct", "--random", "2,3"], "--random must be L,B,A"),
    "k": (["reconstruct", "one", "--k", "9"], r"--k must be numbers in \[0, r=8\]"),
    "kind": (["reconstruct", "one", "--kind", "q_porj"], "no such kind; the kinds are self_attn.q_proj"),
    "no adapter": (["spectrum", "nowhere"], "nowhere does not exist"),
    "no model": (["spectrum", "base", "nowhere"], "nowhere is not a model"),
    "beyond the rank": (
        ["subspace", "one", "two", "-i", "7"],
        r"-i must be in \[1, 6\], where 6 is the numerical rank of",
    ),
    "itself": (["subspace", "one"], "--layers M,N"),
    "layers": (["subspace", "one", "--layers", "0,7"], "has layers 0 to 2, got 7"),
    "layer numbers": (["subspace", "one", "--layers", "x"], "two layer numbers"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input(case: str, pair: tuple[Path, Path], cli: Cli) -> None:
    arguments, words = WRONG[case]
    done = cli("analyze", *arguments)
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
    assert re.search(words, " ".join(done.stderr.split())), done.stderr
