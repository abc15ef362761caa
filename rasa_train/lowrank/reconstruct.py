"""The best fit of RaSA to given weight updates, by the coordinate descent of the paper's Appendix A (arXiv 2503.12576).

Given M_i (b x a) of the L layers of one kind, find the RaSA of r ranks per layer, k of them shared, that minimises

    E = sum_i || M_i - (B_i A_i + B_S diag(d_i) A_S) ||_F^2

    B_i (b x r-k), A_i (r-k x a) private,  B_S (b x L k), A_S (L k x a) shared,  d (L x L k)

A sweep is four half-steps, each of which minimises E exactly in its block, so E never rises. LoRA's best error with the
same parameters is that of the truncated SVD; one point of RaSA (Theorem 3.1, ``start="theorem"``) has the same error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .product_svd import product_svd

EXACT = 768
"""Side of the largest matrix that is decomposed whole. For larger matrices the leading singular vectors are found by
subspace iteration from the vectors of the previous sweep: well below full accuracy, but E still descends."""
OVERSAMPLED, POWER = 12, 12
"""Number of vectors beyond the requested ones, and of rounds from a random start, in a subspace iteration."""

Start = Literal["rasa", "theorem", "random", "best"]


@dataclass(frozen=True)
class Reconstruction:
    """A RaSA that approximates given updates, and its errors (squared Frobenius norms over all layers)."""

    norm2: float
    """sum ||M_i||^2: the error without an adapter."""
    e_lora: float
    """The least error of LoRA with r ranks per layer."""
    errors: list[float]
    """E at the start and after each half-step: private, B_S, A_S, d, private, ... A single number if k = 0."""
    start: Start
    """The start of the descent; with ``best``, the start that gave the smaller error."""
    B: Tensor
    """Private (L, b, r-k), fp64 like all tensors here."""
    A: Tensor
    """Private (L, r-k, a)."""
    B_S: Tensor
    """Shared (b, L k)."""
    A_S: Tensor
    """Shared (L k, a)."""
    d: Tensor
    """Mixing weights of the shared ranks (L, L k)."""

    @property
    def error(self) -> float:
        return self.errors[-1]

    def factors(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return (B, A) of one layer: B A is the reconstruction of its update; B contains d."""
        return torch.cat([self.B[layer], self.B_S * self.d[layer]], 1), torch.cat([self.A[layer], self.A_S])


@torch.no_grad()
def reconstruct(
    M: Tensor | tuple[Tensor, Tensor],
    r: int,
    k: int,
    *,
    sweeps: int = 50,
    start: Start = "rasa",
    seed: int = 0,
) -> Reconstruction:
    """Fit RaSA(r, k) to the updates of the layers of one kind.

    Args:
        M: (L, b, a), or factors (B (L, b, q), A (L, q, a)) with M_i = B_i A_i: then no matrix of size b x a is made.
            Any device and dtype. Layers are processed one at a time: beyond M, memory is a few (b + a) x (q + L k).
        r: ranks per layer in all.
        k: number of these ranks that go to the pool; 0 is LoRA.
        sweeps: largest number of sweeps, each of which is four half-steps.
        start: ``rasa``: B_S = 0, as at the start of training; ``theorem``: LoRA's best point in RaSA's form;
            ``random``; ``best``: the better of the first two, so never worse than LoRA.
        seed: seed of the random parts of a start.
    Raises:
        ValueError: the shapes do not fit, or k is not in [0, r].
    """
    stack = Stack(None, M) if isinstance(M, Tensor) else Stack(*M)
    if not 0 <= k <= r:
        raise ValueError(f"k must be in [0, r={r}], got {k}")
    svd = [stack.top(i, r, seed=seed) for i in range(stack.L)]
    starts: list[Start] = ["rasa", "theorem"] if start == "best" else [start]
    runs = [_Descent(stack, r, k, svd, name, seed).run(sweeps) for name in starts]
    return min(runs, key=lambda run: run.error)


@torch.no_grad()
def truncated(M: Tensor, rank: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return (B (b, rank), A (rank, a)), fp64: B A is the best approximation of M (b, a) of that rank. ``rank`` is
    reduced to min(b, a) if it is larger."""
    U, s, V = Stack(None, M[None]).top(0, min(rank, *M.shape), seed=seed)
    return U * s.sqrt(), (V * s.sqrt()).mT


@dataclass(frozen=True)
class Stack:
    """The matrices M_i = B_i A_i, or M_i = A_i if B is None."""

    B: Tensor | None
    A: Tensor

    def __post_init__(self) -> None:
        fits = self.A.ndim == 3 and (self.B is None or (self.B.ndim == 3 and self.B.shape[::2] == self.A.shape[:2]))
        if not fits:
            raise ValueError("M must be (L, b, a), or factors (L, b, q) and (L, q, a)")

    @property
    def L(self) -> int:
        return self.A.shape[0]

    @property
    def b(self) -> int:
        return self.A.shape[1] if self.B is None else self.B.shape[1]

    @property
    def a(self) -> int:
        return self.A.shape[2]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of products with M_i: fp64, but fp32 if M is large and not factored."""
        return torch.float64 if self.B is not None or min(self.b, self.a) <= EXACT else torch.float32

    def left(self, i: int, X: Tensor) -> Tensor:
        """Return M_i X."""
        X = self.A[i].to(self.dtype) @ X.to(self.dtype)
        return (X if self.B is None else self.B[i].to(self.dtype) @ X).double()

    def right(self, i: int, Y: Tensor) -> Tensor:
        """Return M_i^T Y."""
        Y = Y.to(self.dtype)
        return (self.A[i].to(self.dtype).mT @ (Y if self.B is None else self.B[i].to(self.dtype).mT @ Y)).double()

    def matrix(self, i: int) -> Tensor:
        """Return M_i (b, a) itself, in fp64."""
        return self.A[i].double() if self.B is None else self.B[i].double() @ self.A[i].double()

    def norm2(self, i: int) -> float:
        if self.B is None:
            return float(torch.linalg.vector_norm(self.A[i], dtype=torch.float64) ** 2)
        A, B = self.A[i].double(), self.B[i].double()
        return float(((A @ A.mT) * (B.mT @ B)).sum())

    def top(
        self, i: int, rank: int, minus: tuple[Tensor, Tensor] | None = None, warm: Tensor | None = None, seed: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return (U, s, V), the ``rank`` leading singular triples of M_i - minus[0] @ minus[1].

        Args:
            warm: right singular vectors to start from if the matrix is too large to be decomposed whole.
        """
        width = 0 if minus is None else minus[1].shape[0]
        if self.B is not None and self.B.shape[2] + width <= min(self.b, self.a, EXACT):
            left, right = [self.B[i].double()], [self.A[i].double()]
            if minus is not None:
                left, right = [*left, -minus[0]], [*right, minus[1]]
            U, s, V = product_svd(torch.cat(left, 1), torch.cat(right))
            return _padded(U[:, :rank], s[:rank], V[:, :rank], rank)
        if min(self.b, self.a) <= EXACT:
            N = self.matrix(i)
            U, s, Vh = torch.linalg.svd(N if minus is None else N - minus[0] @ minus[1], full_matrices=False)
            return _padded(U[:, :rank], s[:rank], Vh[:rank].mT, rank)
        return self._iterate(i, rank, minus, warm, seed)

    def _iterate(
        self, i: int, rank: int, minus: tuple[Tensor, Tensor] | None, warm: Tensor | None, seed: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed + i)
        fresh = rank + OVERSAMPLED - (0 if warm is None else warm.shape[1])
        V = torch.randn(self.a, fresh, generator=generator, dtype=torch.float64).to(self.A.device)
        V = V if warm is None else torch.cat([warm, V], 1)
        for _ in range(POWER if warm is None else 1):
            Q = torch.linalg.qr(self._left(i, V, minus))[0]
            V = torch.linalg.qr(self._right(i, Q, minus))[0]
        Q = torch.linalg.qr(self._left(i, V, minus))[0]
        P, T = torch.linalg.qr(self._right(i, Q, minus))  # Q^T N = T^T P^T
        U, s, Vh = torch.linalg.svd(T.mT)
        return Q @ U[:, :rank], s[:rank], P @ Vh[:rank].mT

    def _left(self, i: int, X: Tensor, minus: tuple[Tensor, Tensor] | None) -> Tensor:
        product = self.left(i, X)
        return product if minus is None else product - minus[0] @ (minus[1] @ X)

    def _right(self, i: int, Y: Tensor, minus: tuple[Tensor, Tensor] | None) -> Tensor:
        product = self.right(i, Y)
        return product if minus is None else product - minus[1].mT @ (minus[0].mT @ Y)


class _Descent:
    """One run of the descent: the current point, and E after each half-step."""

    def __init__(
        self, stack: Stack, r: int, k: int, svd: list[tuple[Tensor, Tensor, Tensor]], start: Start, seed: int
    ) -> None:
        self.stack, self.k, self.private, self.start = stack, k, r - k, start
        device, P = stack.A.device, stack.L * k
        self.norm2 = torch.tensor([stack.norm2(i) for i in range(stack.L)], dtype=torch.float64)
        self.e_lora = float(self.norm2.sum()) - sum(float((s**2).sum()) for _, s, _ in svd)
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device)

        self.A_S, self.B_S = normal(P, stack.a) / stack.a**0.5, torch.zeros(stack.b, P, device=device).double()
        self.d = 1 + 0.01 * normal(stack.L, P)
        self.pairs = [(U[:, : self.private] * s[: self.private], V[:, : self.private].mT) for U, s, V in svd]
        if start == "theorem":
            self.B_S = torch.cat([U[:, self.private :] for U, _, _ in svd], 1)
            self.A_S = torch.cat([V[:, self.private :].mT for _, _, V in svd])
            self.d = (
                torch.eye(stack.L, device=device).double()[:, :, None]
                * torch.stack([s[self.private :] for _, s, _ in svd])
            ).reshape(stack.L, P)
        elif start == "random" and k:  # for k = 0 the result is LoRA's, whatever the start
            self.B_S, self.d = normal(stack.b, P) / stack.b**0.5, normal(stack.L, P)
            self.pairs = [(B * 0, A) for B, A in self.pairs]
        self.errors: list[float] = []

    def run(self, sweeps: int) -> Reconstruction:
        inner = [self._shared_part(i) for i in range(self.stack.L)]
        self._note(sum(self._without(i) + self._pool_part(i, inner[i]) for i in range(self.stack.L)))
        for _ in range(sweeps if self.k else 0):
            if self.private:
                self._private_step()
            rest = sum(self._without(i) for i in range(self.stack.L))
            self._B_S_step(rest)
            self._A_S_step(rest)
            self._d_step(rest)
        B, A = (torch.stack(parts) for parts in zip(*self.pairs, strict=True))
        return Reconstruction(
            float(self.norm2.sum()), self.e_lora, self.errors, self.start, B, A, self.B_S, self.A_S, self.d
        )

    # -- half-steps, numbered as the paper's equations ------------------------------------------------------

    def _private_step(self) -> None:
        """Set B_i A_i to the leading singular triples of M_i - B_S D_i A_S (18-19). The error is what they leave of
        the squared norm of that matrix."""
        error = 0.0
        for i in range(self.stack.L):
            pool = self.B_S * self.d[i], self.A_S
            inner = (self.stack.left(i, self.A_S.mT) * self.B_S).sum(0)  # diag(B_S^T M_i A_S^T)
            warm = torch.linalg.qr(self.pairs[i][1].mT)[0]
            U, s, V = self.stack.top(i, self.private, pool, warm)
            self.pairs[i] = U * s, V.mT
            error += float(self.norm2[i]) + self._pool_part(i, inner) - float((s**2).sum())
        self._note(error)

    def _B_S_step(self, rest: float) -> None:
        """Solve the normal equations (24) for B_S; the right-hand side is sum_i N_i A_S^T D_i."""
        rhs = torch.zeros_like(self.B_S)
        for i in range(self.stack.L):
            B, A = self.pairs[i]
            rhs += (self.stack.left(i, self.A_S.mT) - B @ (A @ self.A_S.mT)) * self.d[i]
        self.B_S = rhs @ pinv((self.A_S @ self.A_S.mT) * (self.d.mT @ self.d))
        self._note(rest - float((self.B_S * rhs).sum()))

    def _A_S_step(self, rest: float) -> None:
        """Solve the normal equations (25) for A_S."""
        rhs = torch.zeros_like(self.A_S)
        for i in range(self.stack.L):
            B, A = self.pairs[i]
            rhs += self.d[i, :, None] * (self.stack.right(i, self.B_S).mT - (self.B_S.mT @ B) @ A)
        self.A_S = pinv((self.B_S.mT @ self.B_S) * (self.d.mT @ self.d)) @ rhs
        self._note(rest - float((self.A_S * rhs).sum()))

    def _d_step(self, rest: float) -> None:
        """Solve (26) for d with one Gram matrix for all layers; the right-hand side is diag(B_S^T N_i A_S^T)."""
        rhs = torch.stack([self._shared_part(i) for i in range(self.stack.L)])
        self.d = rhs @ pinv((self.B_S.mT @ self.B_S) * (self.A_S @ self.A_S.mT))
        self._note(rest - float((self.d * rhs).sum()))

    def _note(self, error: float) -> None:
        """Append E after a half-step. If there are more shared ranks than the matrices have, the factors grow large
        and cancel. The sum that gave ``error`` then cancels too, so E is computed from the matrices instead."""
        if self.d.shape[1] > min(self.stack.a, self.stack.b):
            residuals = (
                self.stack.matrix(i) - B @ A - (self.B_S * self.d[i]) @ self.A_S for i, (B, A) in enumerate(self.pairs)
            )
            error = sum(float(torch.linalg.vector_norm(residual) ** 2) for residual in residuals)
        self.errors.append(error)

    # -- parts of E --------------------------------------------------------------------------------------------

    def _shared_part(self, i: int) -> Tensor:
        """Return diag(B_S^T N_i A_S^T), (L k,), with N_i = M_i - B_i A_i."""
        B, A = self.pairs[i]
        inner: Tensor = ((self.stack.left(i, self.A_S.mT) - B @ (A @ self.A_S.mT)) * self.B_S).sum(0)
        return inner

    def _pool_part(self, i: int, inner: Tensor) -> float:
        """Return ||X - B_S D_i A_S||^2 - ||X||^2, given inner = diag(B_S^T X A_S^T)."""
        G = (self.B_S.mT @ self.B_S) * (self.A_S @ self.A_S.mT)
        return float(self.d[i] @ G @ self.d[i] - 2 * self.d[i] @ inner)

    def _without(self, i: int) -> float:
        """Return ||N_i||^2."""
        B, A = self.pairs[i]
        return float(self.norm2[i] - 2 * (self.stack.left(i, A.mT) * B).sum() + ((B.mT @ B) * (A @ A.mT)).sum())


def pinv(G: Tensor) -> Tensor:
    """Return the pseudo-inverse of a symmetric positive semi-definite matrix. Eigenvalues below max * n * eps count as
    zero."""
    values, vectors = torch.linalg.eigh(G)
    if not values.numel():
        return G
    kept = values > values[-1].clamp(min=0) * len(values) * torch.finfo(G.dtype).eps
    inverse = torch.where(kept, 1 / torch.where(kept, values, 1), 0)
    pseudo: Tensor = (vectors * inverse) @ vectors.mT
    return pseudo


def _padded(U: Tensor, s: Tensor, V: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pad singular triples with zeros up to ``rank``, for a matrix that has fewer ranks."""
    missing = rank - s.shape[0]
    if missing <= 0:
        return U, s, V
    U, V = (torch.nn.functional.pad(t, (0, missing)) for t in (U, V))
    return U, torch.nn.functional.pad(s, (0, missing)), V
