"""Spectra and subspaces against worked examples, planted structure and plain SVDs."""

from __future__ import annotations

import math

import pytest
import torch

from rasa_train.analysis.mixing import mixing_weights
from rasa_train.analysis.spectrum import directions, energy, singular_values, spectrum
from rasa_train.analysis.subspace import BeyondRank, amplification, phi, phi_grid

M = torch.tensor([[1, 0, 2, 2, 1], [-2, 1, -3, -2, 0], [3, -1, 5, 4, 1]]).double()
A = M[:2]
A1 = torch.stack([M[0], 2 * M[0]])
"""The worked example of the LoRA slides: A is the first two rows of M (which has rank 2), A1 has rank 1."""


def orthonormal(n: int, r: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(n, r, generator=torch.Generator().manual_seed(seed)).double())[0]


def test_phi_of_the_worked_examples() -> None:
    assert phi(M, A, 1, 1) == pytest.approx(0.9994, abs=5e-5)
    assert phi(M, A, 2, 2) == pytest.approx(1)
    assert phi(M, A1, 1, 1) == pytest.approx(0.9246, abs=5e-5)
    with pytest.warns(BeyondRank, match="3 directions of a matrix of numerical rank 2"):
        assert phi(M, A, 3, 1) == pytest.approx(1)
    with pytest.warns(BeyondRank, match="2 directions of a matrix of numerical rank 1"):
        assert 0.5 <= phi(M, A1, 2, 2) <= 1, "ill-posed: any second vector may be chosen"


@pytest.mark.filterwarnings("error")
def test_phi_in_general() -> None:
    U, V, W = orthonormal(20, 6, 0), orthonormal(30, 12, 1), orthonormal(25, 6, 2)
    s = torch.tensor([6.0, 5, 4, 3, 2, 1]).double()
    one, same, other = (U * s) @ V[:, :6].mT, (W * s) @ V[:, :6].mT, (U * s) @ V[:, 6:].mT
    for i, j in ((1, 1), (2, 5), (6, 3)):
        assert phi(one, same, i, j) == pytest.approx(1), "the same right directions, whatever the left ones are"
        assert phi(one, other, i, j) == pytest.approx(0, abs=1e-12)
        assert phi(one, other, i, j, side="left") == pytest.approx(1)
    mixed = torch.randn(9, 30, generator=torch.Generator().manual_seed(3)).double()
    assert phi(one, mixed, 2, 4) == pytest.approx(phi(mixed, one, 4, 2))
    factored = (U * s, V[:, :6].mT)
    assert phi(factored, mixed, 3, 4) == pytest.approx(phi(one, mixed, 3, 4))
    grid = phi_grid(factored, mixed, 7, 9)
    assert grid[2, 3] == pytest.approx(phi(one, mixed, 3, 4)) and grid[6].isnan().all() and not grid[:6].isnan().any()


def test_phi_of_random_subspaces() -> None:
    """E phi = max(i, j) / d."""
    draws = [phi(orthonormal(100, 9, 2 * n).mT, orthonormal(100, 15, 2 * n + 1).mT, 9, 15) for n in range(60)]
    assert sum(draws) / len(draws) == pytest.approx(0.15, abs=0.01)


@pytest.mark.parametrize(("i", "j"), [(0, 1), (4, 1), (1, 3)])
def test_phi_refuses_sizes_that_do_not_exist(i: int, j: int) -> None:
    with pytest.raises(ValueError, match="directions must be in"):
        phi(M, A, i, j)
    with pytest.raises(ValueError, match="cannot be compared"):
        phi(M, M.mT, 1, 1)


@pytest.mark.parametrize("q", [5, 40], ids=["thin", "wider than the matrix"])
def test_factors_are_their_product(q: int) -> None:
    B, C = torch.randn(24, q).double(), torch.randn(q, 32).double()
    dense = torch.linalg.svdvals(B @ C)
    assert torch.allclose(singular_values((B, C)), dense[: min(q, 24)])
    U, s, V = directions((B, C), 3)
    assert torch.allclose(U.mT @ (B @ C) @ V, torch.diag(dense[:3])) and torch.allclose(s, dense[:3])


def test_ranks_of_known_spectra() -> None:
    flat = spectrum(orthonormal(40, 7, 0) @ orthonormal(50, 7, 1).mT * 3)
    assert flat.numerical_rank == 7 and flat.stable_rank == pytest.approx(7) == flat.entropy_rank
    assert flat.norm == pytest.approx(3 * math.sqrt(7)) and flat.spectral_norm == pytest.approx(3)
    s = torch.tensor([4.0, 2, 2]).double()
    some = spectrum((orthonormal(40, 3, 0) * s, orthonormal(50, 3, 1).mT))
    assert some.stable_rank == pytest.approx(24 / 16) and some.singular_values == pytest.approx([4, 2, 2])
    assert some.entropy_rank == pytest.approx(2**1.5), "shares 1/2, 1/4, 1/4 have an entropy of 1.5 bits"
    nothing = spectrum(torch.zeros(4, 5))
    assert (nothing.numerical_rank, nothing.stable_rank, nothing.entropy_rank) == (0, 0, 0)
    rounded = spectrum((torch.randn(60, 3) @ torch.randn(3, 50)).float())
    assert rounded.numerical_rank == 3, "what rounding to fp32 adds is no rank"


def test_energy_of_the_parts() -> None:
    B, C = torch.randn(12, 5).double(), torch.randn(5, 16).double()
    own, shared, whole = B[:, :2] @ C[:2], B[:, 2:] @ C[2:], B @ C
    found = energy(B, C, 2)
    assert found is not None
    assert found.private == pytest.approx(float((own.norm() / whole.norm()) ** 2))
    assert found.shared == pytest.approx(float((shared.norm() / whole.norm()) ** 2))
    assert energy(B * 0, C, 2) is None


def test_amplification_of_a_planted_update() -> None:
    """dW has W's weakest directions: 10 times as strong as W has them."""
    U, V = orthonormal(30, 8, 0), orthonormal(40, 8, 1)
    s = torch.tensor([9.0, 8, 7, 6, 5, 4, 0.3, 0.4]).double()
    W = (U * s) @ V.mT
    found = amplification((U[:, 6:] * s[6:] * 10, V[:, 6:].mT), W, 2)
    assert found.projection == pytest.approx(0.5) and found.update_norm == pytest.approx(5)
    assert found.factor == pytest.approx(10) and found.projection_own == pytest.approx(math.hypot(9, 8))
    assert found.projection_random < 5 and found.weight_norm == pytest.approx(float(W.norm()))
    with pytest.raises(ValueError, match=r"r must be in \[1, 2\]"):
        amplification((U[:, 6:], V[:, 6:].mT), W, 3)
    with pytest.raises(ValueError, match="the weight 40 x 30"):
        amplification((U[:, 6:], V[:, 6:].mT), W.mT, 1)


def test_mixing_weights_of_saved_tensors() -> None:
    """The shared entries of d come last; layers in order of their number, kinds apart, other tensors ignored."""
    tensors = {"pools.self_attn__q_proj.A_S": torch.zeros(3, 8), "pools.mlp__up__4x8.A_S": torch.zeros(2, 8)}
    for layer in (10, 2):
        tensors[f"model.layers.{layer}.self_attn.q_proj.d"] = torch.tensor([9.0, -layer, 1, 2])
        tensors[f"model.layers.{layer}.mlp.up.d"] = torch.tensor([[9.0, 1, 3], [9, 3, -5]])  # two experts
        tensors[f"model.layers.{layer}.mlp.down.d"] = torch.ones(4)
    found = mixing_weights(tensors)
    assert found.keys() == {"self_attn.q_proj", "mlp.up"}
    assert found["self_attn.q_proj"].tolist() == [[2, 1, 2], [10, 1, 2]] and found["mlp.up"].tolist() == [[2, 4]] * 2
