"""Measure time and memory of ``rasa-analyze reconstruct`` on updates of Llama-3.1-8B's shapes, and compare them with
the dense formulation.

    python scripts/bench_reconstruct.py                 # the seven kinds, factored: minutes
    python scripts/bench_reconstruct.py --dense         # one layer of k_proj as dense matrices, times 32

Seconds are CPU seconds of this process, so that other load on the machine does not count; memory is the process's peak.
The dense formulation follows the paper's Appendix A to the letter: every private half-step is an SVD of a whole b x a
matrix.
"""

from __future__ import annotations

import argparse
import resource
import time

import torch
from torch import Tensor

from rasa_train.lowrank.reconstruct import pinv, reconstruct

KINDS = {  # kind: (out, in) of Llama-3.1-8B
    "k_proj": (1024, 4096), "v_proj": (1024, 4096), "q_proj": (4096, 4096), "o_proj": (4096, 4096),
    "gate_proj": (14336, 4096), "up_proj": (14336, 4096), "down_proj": (4096, 14336),
}  # fmt: skip
LAYERS, RANK = 32, 64
"""Number of layers, and the rank of each layer's update."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of the reconstruction at 8B scale.")
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--k", type=int, default=1)
    parser.add_argument("--sweeps", type=int, default=10)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--dense", action="store_true", help="measure one sweep of one dense layer of k_proj instead")
    options = parser.parse_args()
    if options.dense:
        dense(options.r, options.k)
        return
    for kind in options.kinds:
        b, a = KINDS[kind]
        generator = torch.Generator().manual_seed(0)
        B = torch.randn(LAYERS, b, RANK, generator=generator) / RANK**0.5
        A = torch.randn(LAYERS, RANK, a, generator=generator)
        started = time.process_time()
        found = reconstruct((B, A), options.r, options.k, sweeps=options.sweeps)
        seconds = time.process_time() - started
        ratio = found.error / found.e_lora
        print(f"{kind:9} {b:5} x {a:5}  {seconds:7.1f} s  peak {peak():.2f} GB  e_rasa/e_lora {ratio:.4f}", flush=True)


def dense(r: int, k: int) -> None:
    """Time one sweep on one layer: an SVD and the products of the other half-steps, all with the dense matrix."""
    b, a = KINDS["k_proj"]
    P = LAYERS * k
    M = torch.randn(b, RANK).double() @ torch.randn(RANK, a).double() / RANK**0.5
    A_S, B_S, d = torch.randn(P, a).double(), torch.randn(b, P).double(), torch.randn(P).double()
    started = time.process_time()
    U, s, Vh = torch.linalg.svd(M - (B_S * d) @ A_S, full_matrices=False)
    svd = time.process_time() - started
    N: Tensor = M - (U[:, : r - k] * s[: r - k]) @ Vh[: r - k]
    _ = N @ A_S.mT * d, d[:, None] * (B_S.mT @ N), torch.diag(B_S.mT @ N @ A_S.mT)
    _ = pinv((B_S.mT @ B_S) * (A_S @ A_S.mT)), (M - (B_S * d) @ A_S).square().sum()
    seconds = time.process_time() - started
    gigabytes = LAYERS * b * a * 8 / 1e9
    print(
        f"dense k_proj: {seconds:.1f} s per layer and sweep ({svd:.1f} s of them for the SVD), "
        f"{seconds * LAYERS:.0f} s per sweep"
    )
    print(f"the {LAYERS} updates of k_proj in fp64: {gigabytes:.1f} GB")


def peak() -> float:
    """Return the peak memory of this process in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
