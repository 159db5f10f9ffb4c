"""The Triton tile at sizes, and in ways, that only a GPU has (`pytest -m gpu`)."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from logratio.losses import linear_jsd, linear_logps
from logratio.losses.head._tile import STATS
from logratio.losses.head._two_gemm import _parts, _product

from .test_triton import within_budget

pytestmark = pytest.mark.gpu


def test_a_tile_of_more_than_two_to_the_31_logits():
    g = torch.Generator("cuda").manual_seed(0)
    hidden, weight = (torch.randn(n, 64, generator=g, device="cuda").bfloat16() for n in (16_384, 151_936))
    targets = torch.randint(151_936, (16_384,), generator=g, device="cuda")
    runs = []
    for chunk_tokens in (16_384, 1024):
        leaf = hidden.clone().requires_grad_()
        out = linear_logps(leaf, weight, targets, chunk_tokens=chunk_tokens)
        out.sum().backward()
        runs.append((out.detach(), leaf.grad.float()))
    (a, grad_a), (b, grad_b) = runs
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)
    # other tiles of the product round other words' probabilities: by row, not by element
    assert ((grad_a - grad_b).norm(dim=1) <= 1e-2 * grad_b.norm(dim=1) + 1e-3).all()


@pytest.mark.parametrize("kwargs", [{}, {"softcap": 30.0, "stats": STATS}], ids=str)
def test_one_tile_of_memory(kwargs):
    """Whatever is asked for, frozen head: the logits of a chunk, their gradient, and little besides."""
    n, h, v, chunk = 2048, 256, 50_000, 512
    hidden, weight = (torch.randn(k, h, device="cuda", dtype=torch.bfloat16) for k in (n, v))
    targets = torch.randint(v, (n,), device="cuda")
    hidden.requires_grad_()
    for _ in range(2):  # the first compiles, and gives cuBLAS its workspace
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = linear_logps(hidden, weight, targets, impl="triton", chunk_tokens=chunk, **kwargs)
        (out.logps if kwargs else out).sum().backward()
        peak = torch.cuda.max_memory_allocated() - before
        del out
        hidden.grad = None
    tile = (4 + 2) * chunk * v
    assert tile <= peak < 1.1 * tile


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_two_tiles_of_memory_for_a_divergence(beta):
    """Frozen head: a chunk's logits of both models, the gradient over the student's, and little besides."""
    n, h, v, chunk = 2048, 256, 50_000, 512
    hidden, weight, teacher_hidden, teacher_weight = (
        torch.randn(k, h, device="cuda", dtype=torch.bfloat16) for k in (n, v, n, v)
    )
    hidden.requires_grad_()
    for _ in range(2):  # the first compiles, and gives cuBLAS its workspace
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = linear_jsd(hidden, weight, teacher_hidden, teacher_weight, beta=beta, chunk_tokens=chunk)
        out.sum().backward()
        peak = torch.cuda.max_memory_allocated() - before
        del out
        hidden.grad = None
    tiles = 2 * 4 * chunk * v
    assert tiles <= peak < 1.1 * tiles


def test_a_target_beyond_the_vocabulary_stops_the_device():
    code = """
import torch
from logratio.losses import linear_jsd, linear_logps
x = torch.ones(2, 16, device="cuda")
linear_logps(x, x, torch.tensor([0, 2], device="cuda"))
torch.cuda.synchronize()
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.returncode != 0 and "assert" in out.stderr.lower(), out.stderr[-2000:]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_product_in_parts_is_as_exact_as_one(dtype):
    """Of the front half of float32 rows, as the tile leaves it."""
    n, v, h = 256, 32_768, 96
    g = torch.Generator("cuda").manual_seed(0)
    wide = torch.randn(n, 2 * v, generator=g, device="cuda").to(dtype)
    a, b = wide[:, :v], torch.randn(v, h, generator=g, device="cuda").to(dtype)
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    assert _parts(n, v, h, processors) == 8
    exact = a.double() @ b.double()
    errors = [(x.double() - exact).norm() for x in (_product(a, b), torch.mm(a, b, out_dtype=torch.float32))]
    assert errors[0] <= 2 * errors[1] + 1e-7 * exact.norm()


@pytest.mark.parametrize("trains", ["h", "hw"])
@pytest.mark.parametrize("kwargs", [{}, {"temperature": 0.7, "softcap": 30.0}], ids=str)
def test_real_sizes_are_within_the_error_budget(trains, kwargs):
    """N=1024, H=896, V=151936, in bfloat16, the words' logits of a few nats."""

    def make(dtype: torch.dtype, **_: int) -> list[Tensor]:
        g = torch.Generator().manual_seed(0)
        hidden, weight = (torch.randn(n, 896, generator=g) for n in (1024, 151_936))
        targets = torch.randint(151_936, (1024,), generator=g)
        return [hidden.to(dtype), (0.1 * weight).to(dtype), torch.zeros(151_936, dtype=dtype), targets]

    within_budget(make, torch.bfloat16, ("log_z",) if "w" in trains else (), trains, n=1024, **kwargs)
