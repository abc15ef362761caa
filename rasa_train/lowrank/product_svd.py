"""The singular value decomposition of a product of two factors."""

from __future__ import annotations

import torch
from torch import Tensor


def product_svd(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (U, s, V) of B A = U diag(s) V^T, by QR of the factors: the product itself is never computed.

    Args:
        B, A: (*lead, out, R) and (*lead, R, in); each entry of ``lead`` is decomposed on its own.
    Returns:
        U (*lead, out, q), s (*lead, q), largest first, and V (*lead, in, q) in fp64, with q = min(R, out, in).
    """
    Q, R = torch.linalg.qr(B.double())
    P, S = torch.linalg.qr(A.double().mT)
    U, s, Vh = torch.linalg.svd(R @ S.mT, full_matrices=False)
    return Q @ U, s, P @ Vh.mT
