"""The cross-entropy of rows of logits and its gradient: the reference, the operators, and the GPU's kernel."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rasa_train.kernels import cross_entropy
from rasa_train.kernels.linear_cross_entropy import linear_cross_entropy

CPU = torch.device("cpu")
OPS = torch.ops.rasa_train
needs_triton = pytest.mark.skipif(not find_spec("triton"), reason="needs triton")


def rows(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Five rows of logits, some of them large or infinite, and their targets."""
    logits = torch.randn(5, 1000, generator=torch.Generator().manual_seed(0)).mul_(5)
    logits[0] -= 2000
    logits[1, 3] = 30_000
    logits[2, ::2] = -torch.inf
    return logits.to(dtype), torch.tensor([0, 3, 7, 999, 500])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_operators_are_torchs_cross_entropy(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "BLOCK", 2000)  # two rows
    logits, targets = rows(dtype)
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact, targets, reduction="none")
    expected.sum().backward()
    assert exact.grad is not None
    before, losses = logits.clone(), OPS.losses(logits, targets)
    assert torch.equal(logits, before) and losses.dtype == torch.float32
    assert torch.equal(OPS.losses_and_gradient_(logits, targets), losses)
    torch.testing.assert_close(losses.double(), expected.detach(), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(logits.double(), exact.grad, rtol=0, atol=torch.finfo(dtype).eps / 2 + 1e-6)


def test_an_infinite_target_and_no_rows() -> None:
    logits, targets = rows(torch.float32)
    logits[0, 0] = -torch.inf
    losses = OPS.losses_and_gradient_(logits, targets)
    assert losses[0] == torch.inf and losses[1:].isfinite().all() and logits.isfinite().all()
    assert OPS.losses(logits[:0], targets[:0]).shape == (0,)


def test_compiled_as_one_graph() -> None:
    """The shapes of the operators without values, and what they overwrite, are as torch.compile is told."""
    torch.manual_seed(0)
    weight, targets = torch.randn(11, 6), torch.randint(11, (7,))
    hidden = [torch.ones(7, 6).requires_grad_() for _ in range(2)]
    compiled = torch.compile(linear_cross_entropy, backend="aot_eager", fullgraph=True)
    for function, x in zip((compiled, linear_cross_entropy), hidden, strict=True):
        function(x, weight, None, targets, chunk=3).backward()
    assert hidden[0].grad is not None and hidden[0].grad.any()
    torch.testing.assert_close(hidden[0].grad, hidden[1].grad)


INTERPRETED = """
import torch
from rasa_train.kernels import cross_entropy, cross_entropy_triton as kernels

assert cross_entropy.error(kernels, torch.device("cpu"), torch.float32) < cross_entropy.TOLERANCE[torch.float32]
kernels.MOST_COLUMNS = 256
random = torch.Generator().manual_seed(0)
for rows, columns, dtype in (
    (1, 1, torch.float32), (3, 127, torch.bfloat16), (2, 256, torch.float32), (2, 257, torch.float16),
    (2, 600, torch.bfloat16),
):
    logits = torch.randn(rows, columns, generator=random).mul_(5)
    logits[0] -= 2000
    logits[-1, : columns // 2] = -torch.inf
    logits[:, -1] += 10
    logits = logits.to(dtype)
    targets = torch.arange(rows) * 89 % columns
    targets[-1] = columns - 1
    exact, gradient = logits.double(), logits.clone()
    expected = exact.logsumexp(1) - exact.gather(1, targets[:, None])[:, 0]
    right = exact.softmax(1)
    right[torch.arange(rows), targets] -= 1
    losses = kernels.losses_and_gradient_(gradient, targets)
    assert torch.equal(kernels.losses(logits, targets), losses)
    assert losses.dtype == torch.float32 and gradient.dtype == dtype
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(gradient.double(), right, rtol=0, atol=torch.finfo(dtype).eps / 2 + 1e-6)
assert kernels.losses(logits, targets.fill_(columns)).isnan().all()
assert kernels.losses(logits[:0], targets[:0]).shape == (0,)
print("equal")
"""


@needs_triton
def test_kernel_computes_the_operators() -> None:
    """Each program of the kernel, run by Triton's interpreter: one block and several, full and partly full."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore::RuntimeWarning", "-c", INTERPRETED],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "equal\n", done.stderr


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize(("capability", "columns"), [(86, 32_000), (90, 262_144), (90, 50_257)])
def test_kernel_can_be_compiled(capability: int, columns: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For GPUs that are not here, down to the machine's code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from rasa_train.kernels import cross_entropy_triton as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    sizes = kernels._blocks(columns)
    options = {"num_warps": sizes.pop("num_warps")}
    constants = {"GRADIENT": True, **sizes}
    signature = {"logits": "*bf16", "targets": "*i64", "loss": "*fp32", "columns": "i32"}
    signature |= dict.fromkeys(constants, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(3 if columns % 16 else 4)}
    source = ASTSource(kernels._row, signature, constants, aligned)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert made.asm["cubin"] and ("v4.b32" in made.asm["ptx"]) == (not columns % 16)  # 16 bytes in one access


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_a_gpu_does_not_compute_is_not_used(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    works, plain, overwriting = cross_entropy._works.__wrapped__, cross_entropy.losses, cross_entropy._rows
    on_gpu = cross_entropy._on_gpu(cross_entropy.losses_and_gradient_)  # what the operator of a GPU runs

    def use(**kernels: object) -> None:
        monkeypatch.setattr(cross_entropy, "_kernels", lambda: SimpleNamespace(**kernels) if kernels else None)
        monkeypatch.setattr(cross_entropy, "_works", works)

    def wrong(logits: Tensor, targets: Tensor) -> Tensor:
        loss = overwriting(logits, targets, True)
        logits.mul_(1.05)
        return loss

    def fails(logits: Tensor, targets: Tensor) -> Tensor:
        raise RuntimeError("Failed to find C compiler.\nMore")

    def lacks_memory(logits: Tensor, targets: Tensor) -> Tensor:
        raise torch.OutOfMemoryError

    use(losses=plain, losses_and_gradient_=cross_entropy.losses_and_gradient_)
    assert works(CPU, dtype) and not caplog.messages
    use(losses=plain, losses_and_gradient_=wrong)
    assert not works(CPU, dtype) and "a check of its kernels failed" in caplog.messages[-1]
    logits, targets = rows(dtype)
    expected = logits.clone()
    OPS.losses_and_gradient_(expected, targets)
    on_gpu(logits, targets)
    assert torch.equal(logits, expected)
    use(losses=plain, losses_and_gradient_=fails)
    assert not works(CPU, dtype) and caplog.messages[-1].endswith("kernel: Failed to find C compiler.")
    use()
    assert not works(CPU, dtype) and caplog.messages[-1].endswith("Triton is not installed")
    use(losses=lacks_memory)
    with pytest.raises(torch.OutOfMemoryError):
        works(CPU, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_on_a_gpu(dtype: torch.dtype) -> None:
    device = torch.device("cuda", 0)
    kernels = cross_entropy._kernels()
    assert kernels is not None and cross_entropy._works(device, dtype)
    for columns in (262_144, 50_257, 100):
        logits, targets = torch.randn(300, columns, device=device).mul_(5).to(dtype), torch.arange(300) % columns
        expected, targets = logits.float(), targets.to(device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        losses = OPS.losses_and_gradient_(logits, targets)
        assert torch.cuda.max_memory_allocated() - before < 2**16
        torch.testing.assert_close(losses, cross_entropy.losses_and_gradient_(expected, targets), rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(logits.float(), expected, rtol=0, atol=torch.finfo(dtype).eps / 2 + 1e-6)
