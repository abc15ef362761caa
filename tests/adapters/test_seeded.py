"""Products with an input whose dropout mask is made of a seed: the numbers, the operations, and the GPU's kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rasa_train.kernels import seeded_dropout as seeded
from rasa_train.kernels.seeded_dropout import Draw, draw, kept, philox

CPU = torch.device("cpu")
needs_triton = pytest.mark.skipif(not find_spec("triton"), reason="needs triton")


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # the known answers of Random123, the authors' library
        ("0 0 0 0", "0 0", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_known_answers(counter: str, key: str, words: str) -> None:
    low, high = (int(word, 16) for word in key.split())
    c0, c1, c2, c3 = (torch.tensor(int(word, 16)) for word in counter.split())
    found = philox((c0, c1, c2, c3), low | high << 32)
    assert " ".join(f"{int(word):08x}" for word in found) == words


def test_masks_are_random_and_independent() -> None:
    shape, zero = (1000, 1003), 20_000
    masks = [kept(shape, Draw(zero, seed, call), CPU) for seed, call in ((1, 0), (1, 4), (2, 0))]
    assert torch.equal(masks[0], kept(shape, Draw(zero, 1, 0), CPU))
    p, n = zero / 2**16, masks[0].numel()
    for mask in masks:
        assert float((~mask).double().mean()) == pytest.approx(p, abs=5 * (p * (1 - p) / n) ** 0.5)
    flat = [mask.double().reshape(-1) for mask in masks]
    pairs = [(flat[0], flat[1]), (flat[0], flat[2])]
    pairs += [(flat[0][:-lag], flat[0][lag:]) for lag in (1, 2, 4, 8, shape[1])]
    for a, b in pairs:
        assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 5 / n**0.5


def test_when_there_is_a_mask_of_a_seed() -> None:
    assert not seeded.usable(CPU, torch.bfloat16, 8), "on a CPU torch drops"
    with seeded.forced():
        assert seeded.usable(CPU, torch.float32)
        first, second = draw(CPU, 0.25), draw(CPU, 0.25)
    assert first != second and first.zero == 2**14 and first.factor == pytest.approx(4 / 3)
    assert not seeded.usable(CPU, torch.bfloat16, 8)


@pytest.mark.parametrize("tokens", [1, 33])
def test_operations_are_products_with_the_masked_input(tokens: int) -> None:
    random = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    x, A, g, dx = numbers(tokens, 30), numbers(8, 30), numbers(tokens, 8), numbers(tokens, 30)
    some = Draw(30_000, 5, 9)
    mask = kept((tokens, 30), some, CPU) * some.factor
    ops = torch.ops.rasa_train
    torch.testing.assert_close(ops.drop(x, *some), x * mask)
    torch.testing.assert_close(ops.project(x, A, *some), (x * mask) @ A.t())
    torch.testing.assert_close(ops.add_back(dx.clone(), g, A, *some), dx + mask * (g @ A))
    out = torch.empty_like(A)
    ops.sum_parts(ops.gradient(g, x, *some), out)
    torch.testing.assert_close(out, g.t() @ (x * mask))


INTERPRETED = """
import torch
from rasa_train.kernels import seeded_dropout as seeded, seeded_dropout_triton as kernels

for tokens, width, ranks in ((77, 200, 24), (130, 72, 120), (3, 8, 8), (64, 96, 256), (700, 16, 8)):
    random = torch.Generator().manual_seed(0)
    numbers = lambda *shape: torch.randn(shape, generator=random).half()
    x, A, g, dx = numbers(tokens, width), numbers(ranks, width), numbers(tokens, ranks), numbers(tokens, width)
    some = (20_000, 3 << 40 | 7, 2**31 - 4)
    parts = kernels.gradient(g, x, *some)
    assert len(parts) > 1 or tokens <= kernels.ROWS
    found = [
        kernels.drop(x, *some),
        kernels.project(x, A, *some),
        kernels.sum_parts(parts, torch.empty_like(A)),
        kernels.add_back(dx.clone(), g, A, *some),
    ]
    x, A, g, dx = (t.double() for t in (x, A, g, dx))
    expected = [seeded.drop(x, *some), seeded.project(x, A, *some), seeded.gradient(g, x, *some)[0]]
    expected += [seeded.add_back(dx, g, A, *some)]
    for a, b in zip(found, expected, strict=True):
        assert a.isfinite().all()
        error = float((a.double() - b).abs().max() / b.abs().max())
        assert error < 1e-3, (tokens, width, ranks, error)
print("equal")
"""


@needs_triton
def test_kernels_compute_the_operations() -> None:
    """Each program of a kernel, run by Triton's interpreter (which has no bf16 products: in fp16)."""
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "equal\n", done.stderr


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize(("capability", "ranks"), [(86, seeded.MOST_RANKS), (90, 120)])
def test_kernels_can_be_compiled(capability: int, ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For GPUs that are not here, down to the machine's code; they need no more shared memory than any has (99 KiB)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from rasa_train.kernels import seeded_dropout_triton as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    sizes = kernels._blocks(ranks)
    options = {name: sizes.pop(name) for name in ("num_warps", "num_stages")}
    numbers = {"tokens": "i32", "zero": "i32", "seed": "i64", "call": "i32", "share": "i32", "width": "i32"}
    numbers |= {"number": "i32", "size": "i32"}
    for kernel in (kernels._drop, kernels._project, kernels._gradient, kernels._sum_parts, kernels._add_back):
        constants = {"ranks": ranks, "BLOCK": 1024, **sizes}
        constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
        types = {"parts": "*fp32", **numbers, **dict.fromkeys(constants, "constexpr")}
        signature = {name: types.get(name, "*bf16") for name in kernel.arg_names}
        aligned = [i for i, name in enumerate(kernel.arg_names) if signature[name][0] == "*" or name == "width"]
        source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        assert made.asm["cubin"] and made.metadata.shared <= 99 * 1024


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_a_gpu_does_not_compute_is_not_used(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    works = seeded._works.__wrapped__
    assert works(CPU, dtype, 8) and not caplog.messages

    def wrong(dx: Tensor, g: Tensor, A: Tensor, zero: int, seed: int, call: int) -> Tensor:
        return dx.add_(g @ A)

    with monkeypatch.context() as patch:
        patch.setattr(seeded, "add_back", wrong)  # the reference, which the operation is compared with
        assert not works(CPU, dtype, 8)
    assert "a check of its kernels failed" in caplog.messages[-1]

    def fails(kind: type[Exception]) -> None:
        def error(*_: object) -> float:
            raise kind("Failed to find C compiler.\nMore")

        monkeypatch.setattr(seeded, "error", error)

    fails(RuntimeError)
    assert not works(CPU, dtype, 8) and caplog.messages[-1].endswith("adapter: Failed to find C compiler.")
    fails(torch.OutOfMemoryError)
    with pytest.raises(torch.OutOfMemoryError):
        works(CPU, dtype, 8)


@pytest.mark.gpu
@pytest.mark.parametrize("ranks", [0, 8, 24, 40, 120, seeded.MOST_RANKS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_gpu(ranks: int, dtype: torch.dtype) -> None:
    device = torch.device("cuda", 0)
    torch.manual_seed(5)
    first, second = draw(device, 0.1), draw(device, 0.1)
    torch.manual_seed(5)
    assert seeded.usable(device, dtype, ranks) and draw(device, 0.1) == first != second
    assert seeded.error(device, dtype, ranks) < seeded.TOLERANCE
