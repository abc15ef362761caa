"""Reconstruction by coordinate descent: descent, the theorem, recovery, gradients by autograd, and the large regime."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from rasa_train.lowrank import reconstruct as module
from rasa_train.lowrank.reconstruct import Stack, reconstruct, truncated

L, b, a = 4, 20, 28


def updates(seed: int = 0, decay: float = 0.7) -> torch.Tensor:
    """Updates with a decaying spectrum, and directions that the layers have in common."""
    generator = torch.Generator().manual_seed(seed)
    own = torch.randn(L, b, a, generator=generator, dtype=torch.float64)
    U, _, Vh = torch.linalg.svd(own, full_matrices=False)
    own = U * decay ** torch.arange(b) @ Vh
    common = torch.randn(b, 3, generator=generator, dtype=torch.float64)
    return own + 0.1 * torch.einsum("bp,lp,ap->lba", common, torch.randn(L, 3, generator=generator).double(),
                                    torch.randn(a, 3, generator=generator).double())  # fmt: skip


def error(M: torch.Tensor, result) -> float:
    """E from the definition, densely."""
    parts = [B @ A for B, A in map(result.factors, range(M.shape[0]))]
    return float(((M - torch.stack(parts)) ** 2).sum())


def lora_error(M: torch.Tensor, r: int) -> float:
    return float((torch.linalg.svdvals(M)[:, r:] ** 2).sum())


@pytest.mark.parametrize("start", ["rasa", "theorem", "random", "best"])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_every_half_step_lowers_the_error(start, k):
    M = updates()
    result = reconstruct(M, 4, k, sweeps=15, start=start, seed=3)
    errors = torch.tensor(result.errors, dtype=torch.float64)
    assert len(errors) == 1 + 15 * (4 if k < 4 else 3)
    assert (errors.diff() <= 1e-12 * result.norm2).all() and errors[-1] < errors[0]
    assert_close(errors[-1].item(), error(M, result), rtol=1e-9, atol=1e-12)
    assert_close(result.e_lora, lora_error(M, 4), rtol=1e-10, atol=0.0)
    assert_close(result.norm2, float((M**2).sum()))
    assert result.B.shape == (L, b, 4 - k) and result.A_S.shape == (L * k, a) and result.d.shape == (L, L * k)


def test_error_of_a_pool_with_more_ranks_than_the_matrices():
    """Six shared ranks for matrices of rank 3: their factors grow large and cancel, and the fit is exact."""
    M = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    result = reconstruct(M, 3, 3, sweeps=3, start="rasa")
    assert_close(result.error, error(M, result), rtol=1e-3, atol=1e-12)
    assert all(0 <= value < 1e-8 for value in result.errors[2:])


@pytest.mark.parametrize("k", range(5))
def test_theorem_3_1(k):
    M = updates(1)
    result = reconstruct(M, 4, k, sweeps=0, start="theorem")
    assert_close(result.error, lora_error(M, 4), rtol=1e-10, atol=0.0)
    assert_close(error(M, result), lora_error(M, 4), rtol=1e-10, atol=0.0)


def test_never_worse_than_lora_and_better_with_more_shared_ranks():
    M = updates(2)
    errors = [reconstruct(M, 4, k, sweeps=30, start="best").error for k in range(5)]
    assert_close(errors[0], lora_error(M, 4), rtol=1e-10, atol=0.0)
    assert all(e < 0.99 * errors[0] for e in errors[1:])


def test_a_rasa_is_recovered():
    """Where all ranks are shared; with private ones there are local minima, though well below LoRA."""
    for k, share in ((3, 1e-6), (1, 0.6)):
        generator = torch.Generator().manual_seed(0)
        B, A, B_S, A_S, d = (
            torch.randn(*shape, generator=generator, dtype=torch.float64)
            for shape in ((L, b, 3 - k), (L, 3 - k, a), (b, L * k), (L * k, a), (L, L * k))
        )
        M = B @ A + torch.einsum("bp,lp,pa->lba", B_S, d, A_S)
        result = reconstruct(M, 3, k, sweeps=300, start="best")
        assert result.e_lora > 0.05 * result.norm2
        assert result.error < share * result.e_lora


def test_a_half_step_ends_where_its_gradient_is_zero():
    """Autograd is the oracle for the last block (d), and the descent's fixed point for all of them."""
    M = updates(3)
    result = reconstruct(M, 3, 1, sweeps=1)
    d = result.d.clone().requires_grad_()
    loss = sum(((M[i] - result.B[i] @ result.A[i] - (result.B_S * d[i]) @ result.A_S) ** 2).sum() for i in range(L))
    assert torch.autograd.grad(loss, d)[0].abs().max() < 1e-9
    early, late = (reconstruct(M, 3, 1, sweeps=n, start="theorem") for n in (0, 600))
    assert gradient(M, late) < 0.05 * gradient(M, early)


def gradient(M: torch.Tensor, result) -> float:
    """The largest entry of dE / d(B, A, B_S, A_S, d)."""
    leaves = [t.clone().requires_grad_() for t in (result.B, result.A, result.B_S, result.A_S, result.d)]
    B, A, B_S, A_S, d = leaves
    loss = ((M - B @ A - torch.einsum("bp,lp,pa->lba", B_S, d, A_S)) ** 2).sum()
    return max(float(g.abs().max()) for g in torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize("k", [0, 1, 3])
@pytest.mark.parametrize("q", [6, 40])
def test_factors_give_what_their_product_gives(k, q):
    generator = torch.Generator().manual_seed(5)
    B, A = torch.randn(L, b, q, generator=generator), torch.randn(L, q, a, generator=generator)
    dense, factored = (reconstruct(M, 3, k, sweeps=5, seed=2) for M in (B.double() @ A.double(), (B, A)))
    assert_close(factored.errors, dense.errors, rtol=1e-8, atol=1e-8)
    assert_close(factored.e_lora, dense.e_lora, rtol=1e-8, atol=1e-8)


def test_large_matrices_go_by_subspace_iteration(monkeypatch):
    M = updates(4).float()
    exact = reconstruct(M, 4, 1, sweeps=20)
    monkeypatch.setattr(module, "EXACT", 8)
    iterated = reconstruct(M, 4, 1, sweeps=20)
    assert Stack(None, M).dtype == torch.float32  # else this tests nothing
    assert_close(iterated.e_lora, exact.e_lora, rtol=1e-4, atol=0.0)
    assert_close(iterated.error, exact.error, rtol=1e-2, atol=0.0)
    errors = torch.tensor(iterated.errors, dtype=torch.float64)
    assert (errors.diff() <= 1e-6 * iterated.norm2).all()
    assert_close(iterated.error, error(M, iterated), rtol=1e-4, atol=0.0)


def test_truncated_is_the_best_of_its_rank(monkeypatch):
    M = updates(5)[0]
    U, s, Vh = torch.linalg.svd(M)
    for exact in (768, 8):
        monkeypatch.setattr(module, "EXACT", exact)
        B, A = truncated(M, 3)
        assert_close(B @ A, (U[:, :3] * s[:3]) @ Vh[:3], rtol=0, atol=1e-4)
    assert [t.shape for t in truncated(M, 99)] == [(b, b), (b, a)]


def test_updates_that_are_zero_have_no_error():
    assert len(reconstruct(torch.zeros(L, b, a), 4, 1, sweeps=5).errors) == 21


@pytest.mark.parametrize("bad", [dict(M=torch.zeros(3, 4)), dict(M=(torch.zeros(2, 4, 3), torch.zeros(2, 2, 5)))])
def test_bad_shapes_are_named(bad):
    with pytest.raises(ValueError, match=r"M must be \(L, b, a\)"):
        reconstruct(**bad, r=2, k=1)
    with pytest.raises(ValueError, match=r"k must be in \[0, r=2\], got 3"):
        reconstruct(torch.zeros(2, 4, 4), 2, 3)
