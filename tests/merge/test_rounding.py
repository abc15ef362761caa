"""Rounding with error feedback. The oracle is GPTQ with the whole second moments, written with torch.linalg, and the
model that W + dW gives in fp32."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from rasa_train.cli.merge import app
from rasa_train.errors import UserError
from rasa_train.io.checkpoint_files import open_checkpoint
from rasa_train.kernels.low_rank import Factors
from rasa_train.merging import Rounding, Writing, merge
from rasa_train.merging.merged import _key
from rasa_train.merging.rounding import COLUMNS, Feedback, own_directions, principal_directions
from rasa_train.merging.source import open_source

from .conftest import save_adapter, save_base

BF16 = torch.bfloat16


def gptq(W, H, dtype):
    """Round the columns one after the other, and let those that are left take over each error (Frantar et al. 2023)."""
    W, Q = W.double().clone(), torch.empty(W.shape, dtype=dtype)
    U = torch.linalg.cholesky(torch.linalg.inv(H.double()), upper=True)
    for j in range(W.shape[1]):
        Q[:, j] = W[:, j].to(dtype)
        W[:, j + 1 :] -= ((W[:, j] - Q[:, j].double()) / U[j, j])[:, None] * U[j, j + 1 :]
    return Q


def weight_and_inputs(out=40, width=3 * COLUMNS + 7, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(400, width, generator=g) @ torch.randn(width, width, generator=g) * torch.logspace(0, -2, width)
    return torch.randn(out, width, generator=g), (x.double().mT @ x.double()) / 400


def error(Q, W, H):
    """Squared change of the output of each row."""
    E = Q.double() - W.double()
    return ((E @ H) * E).sum(1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("directions", [5, 24, 103])
def test_equals_gptq_with_the_whole_matrix(directions, dtype):
    """Whatever the number of directions, and with a last block that is not full."""
    W, H = weight_and_inputs()
    values, vectors = torch.linalg.eigh(H)
    L, lam = vectors[:, -directions:] * values[-directions:].sqrt(), 0.01 * float(values.mean())
    H = L @ L.mT + lam * torch.eye(len(L))
    rounded, aware = Feedback(L, lam).round(W, dtype)
    expected = gptq(W, H, dtype)
    nearest = W.to(dtype)
    better = error(expected, W, H) < error(nearest, W, H)
    assert aware and better.float().mean() > 0.9
    # fp32 and fp64 can round a value that lies between two steps apart, after which a row goes another way
    same = (rounded == torch.where(better[:, None], expected, nearest)).all(1)
    assert same.float().mean() > 0.8
    assert (error(rounded, W, H) <= error(nearest, W, H) * (1 + 1e-4)).all()
    assert error(rounded, W, H).sum() == pytest.approx(float(error(expected, W, H).sum()), rel=0.02)


def test_measured_inputs_lose_several_times_less():
    W, H = weight_and_inputs()
    nearest = error(W.to(BF16), W, H).sum()
    whole = error(principal_directions(H, 200).round(W, BF16)[0], W, H).sum()
    some = error(principal_directions(H, 60).round(W, BF16)[0], W, H).sum()  # whole eigenvectors
    few = error(principal_directions(H, 30).round(W, BF16)[0], W, H).sum()  # those of a random sketch
    assert 5 * whole < nearest and whole < some < nearest and few < nearest
    assert principal_directions(torch.zeros(4, 4).double(), 2) is None


def test_an_update_below_the_steps_is_kept_along_its_own_directions():
    """W is on the grid and dW far below it, so that nearest returns W itself."""
    g = torch.Generator().manual_seed(3)
    W = torch.randn(300, 256, generator=g).to(BF16).float()
    factors = Factors(torch.randn(300, 3, generator=g) * 1e-4, torch.ones(3), torch.randn(3, 256, generator=g))
    dW = factors.Bd @ factors.A
    feedback = own_directions(factors)
    rounded, aware = feedback.round(W + dW, BF16)
    V = feedback.L
    assert aware and V.shape == (256, 3)
    torch.testing.assert_close(V.mT @ V, torch.eye(3), atol=1e-5, rtol=0)
    lost = [float(((Q.float() - W - dW) @ V).norm() / dW.norm()) for Q in ((W + dW).to(BF16), rounded)]
    assert lost[0] > 0.5 and lost[1] < 0.4 * lost[0]
    # Where the update is large, the error has nothing to do with it: nearest stays
    large = factors._replace(B=factors.B * 1e4)
    rounded, aware = own_directions(large).round(W + 1e4 * dW, BF16)
    assert not aware and torch.equal(rounded, (W + 1e4 * dW).to(BF16))
    assert own_directions(factors._replace(B=torch.zeros(300, 3))) is None


def test_values_beyond_the_dtype_stay_visible_and_rows_without_update_stay():
    W, H = weight_and_inputs()
    W[3] = W[3].to(torch.float16).float()
    W[5, 9] = 1e6
    rounded, _ = principal_directions(H, 50).round(W, torch.float16)
    assert torch.equal(rounded[3].float(), W[3]) and rounded[5, 9].isinf()
    assert rounded[[row for row in range(len(W)) if row != 5]].isfinite().all()


def test_result_does_not_depend_on_the_number_of_threads(monkeypatch):
    W, H = weight_and_inputs(out=700)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(principal_directions(H, 50).round(W, BF16)[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


@pytest.fixture
def run(tmp_path):
    """A run directory with a recipe, a file of rows and an adapter of a bf16 base whose update is tiny."""
    base, directory = save_base(tmp_path / "base", dtype=BF16), tmp_path / "run"
    save_adapter(directory / "adapter", base, "rasa")
    rows = [{"input_ids": [(7 * i + 3 * j * j) % 64 for j in range(40)], "labels": [1] * 40} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "model": {"name": str(base)},
        "adapter": {"method": "rasa", "r": 4, "alpha": 8},
        "data": {"dataset": str(tmp_path / "rows.jsonl"), "cache_dir": str(tmp_path / "cache")},
        "output_dir": str(directory),
    }
    (directory / "recipe.yaml").write_text(json.dumps(recipe))
    return directory


def wanted(**fields):
    return Writing(overwrite=True, rounding=Rounding("aware", **fields))


def test_merge_measured_on_training_rows(run, tmp_path):
    """The merged model is nearer to W + dW than the one rounded to nearest, on rows that were measured or not."""
    exact = merge(run, tmp_path / "exact", dtype=torch.float32)
    near = merge(run, tmp_path / "near")
    report = merge(run, tmp_path / "aware", writing=wanted(run=run, rows=12))
    assert (near.rounding_method, near.aware_tensors, near.directions) == ("nearest", 0, 0)
    assert (report.rounding_method, report.aware_tensors, report.directions) == ("aware", exact.adapted, 48)
    assert report.rounding > near.rounding  # more by norm, and less in the output
    tokens = torch.tensor([[(7 * i + 3 * j * j) % 64 for j in range(40)] for i in range(12)])

    def logits(name):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32).eval()
        return torch.log_softmax(model(input_ids=tokens).logits.double(), -1)

    with torch.no_grad():
        on, off, nearest = (logits(name) for name in ("exact", "aware", "near"))
    kl, kl_nearest = ((on.exp() * (on - other)).sum(-1).mean() for other in (off, nearest))
    assert kl < kl_nearest / 2, (kl, kl_nearest)
    again = merge(run, tmp_path / "again", threads=1, writing=wanted(run=run, file=tmp_path / "rows.jsonl"))
    assert again.aware_tensors == report.aware_tensors
    for one, other in zip(*(open_checkpoint(tmp_path / n).tensors.values() for n in ("aware", "again")), strict=True):
        assert torch.equal(one.read(), other.read())


@pytest.mark.parametrize(
    "options, message",
    [
        ("--rounding aware --dtype float32", "next to nothing is rounded away"),
        ("--calibrate 4", "--calibrate 4 is for --rounding aware only"),
        ("--calibration rows.jsonl", "is for --rounding aware only"),
        ("--rounding aware --calibrate 0", "calibrate"),
        ("--rounding aware --calibration none.jsonl", "none.jsonl: there is no such file"),
        ("--rounding aware --format lora", "is for --format merged only"),
    ],
)
def test_what_has_no_meaning_is_refused(options, message, run, tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        app([str(run), "--output", str(tmp_path / "out"), *options.split()])
    assert left.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_killed_merge_goes_on_only_with_the_same_rounding(run, tmp_path):
    source, other = open_source(run, None, weights=True), tmp_path / "other.jsonl"
    other.write_text("{}")
    ways = [
        Rounding(),
        Rounding("aware"),
        Rounding("aware", run, 2),
        Rounding("aware", run, 3),
        Rounding("aware", run, 3, other),
    ]
    checkpoint = open_checkpoint(source.directory)
    assert len({_key(source, checkpoint, None, way) for way in ways}) == len(ways)


def test_calibration_needs_a_run(run, tmp_path):
    with pytest.raises(UserError, match=r"needs the output_dir of a run"):
        merge(run / "adapter", tmp_path / "out", writing=wanted(run=run / "adapter", rows=2))
