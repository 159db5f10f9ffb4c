"""The row statistics beside the log-probabilities: entropy, log Z, log sum p^2, is_top1, alone and together."""

import itertools

import pytest
import torch
from torch import Tensor

from logratio.losses import TokenLogps, linear_logps
from logratio.losses.head import _tile, logps
from logratio.losses.head._tile import STATS
from logratio.losses.head.logps import default_chunk_tokens

OPTIONS = [{}, {"temperature": 0.7, "logit_scale": 1.3}, {"softcap": 2.0, "temperature": 1.5}]
SUBSETS = [c for n in range(5) for c in itertools.combinations(STATS, n)]


def head(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """hidden [5, 3], weight [7, 3], bias [7], targets [5]."""
    torch.manual_seed(0)
    shapes = ((5, 3), (7, 3), (7,))
    return [*(torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes), torch.tensor([0, 6, 2, 1, 5])]


def logits(hidden: Tensor, weight: Tensor, bias: Tensor, **kwargs: float) -> Tensor:
    z = (hidden @ weight.T + bias) * kwargs.get("logit_scale", 1.0)
    if "softcap" in kwargs:
        z = kwargs["softcap"] * torch.tanh(z / kwargs["softcap"])
    return z / kwargs.get("temperature", 1.0)


@pytest.mark.parametrize("kwargs", OPTIONS, ids=str)
@pytest.mark.parametrize("impl", ["eager", "two_gemm"])
@pytest.mark.parametrize("stats", SUBSETS, ids=str)
def test_values_are_the_definitions(kwargs, impl, stats):
    hidden, weight, bias, targets = head()
    out = linear_logps(hidden, weight, targets, bias=bias, impl=impl, stats=stats, chunk_tokens=2, **kwargs)
    z = logits(hidden, weight, bias, **kwargs)
    p = z.softmax(-1)
    expected = {
        "entropy": -(p * p.log()).sum(-1),
        "log_z": z.exp().sum(-1).log(),
        "log_sum_p2": (p**2).sum(-1).log(),
        "is_top1": z.argmax(-1) == targets,
    }
    assert expected["is_top1"].tolist() == [False, False, False, True, False]
    assert isinstance(out, TokenLogps)
    for name in STATS:
        if name in stats:
            torch.testing.assert_close(getattr(out, name), expected[name], rtol=1e-12, atol=1e-13)
        else:
            assert getattr(out, name) is None


@pytest.mark.parametrize("kwargs", OPTIONS, ids=str)
@pytest.mark.parametrize("trains", ["h", "w", "b", "hwb"])
@pytest.mark.parametrize(
    "outputs", [("log_z",), ("logps", "log_z"), ("entropy", "log_z"), ("logps", "entropy", "log_z")]
)
def test_gradients_are_those_of_the_values(kwargs, trains, outputs):
    hidden, weight, bias, targets = head()
    leaves = [t.requires_grad_(name in trains) for name, t in zip("hwb", (hidden, weight, bias), strict=True)]

    def call(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        stats = STATS if len(outputs) == 3 else [name for name in outputs if name in STATS]
        out = linear_logps(hidden, weight, targets, bias=bias, stats=stats, impl="two_gemm", chunk_tokens=2, **kwargs)
        return tuple(getattr(out, name) for name in outputs)

    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("impl", ["eager", "two_gemm"])
def test_log_sum_p2_and_is_top1_are_constants(impl):
    hidden, weight, bias, targets = head()
    out = linear_logps(hidden.requires_grad_(), weight, targets, bias=bias, impl=impl, stats=STATS)
    assert out.is_top1.dtype == torch.bool
    assert not out.log_sum_p2.requires_grad and out.log_z.requires_grad and out.logps.requires_grad


@pytest.mark.parametrize("impl", ["eager", "two_gemm"])
def test_of_equal_logits_the_first_is_the_top(impl):
    """As torch.argmax has it: a head of zeros is right about one word, not about all of them."""
    weight = torch.tensor([[1.0], [3.0], [2.0], [3.0], [1.0]])
    hidden = torch.tensor([[1.0]] * 5 + [[-1.0], [-1.0], [0.0], [0.0], [20.0], [20.0]])
    targets = torch.tensor([0, 1, 2, 3, 4, 0, 1, 0, 1, 1, 3])
    expected = (hidden @ weight.T).argmax(-1) == targets
    assert expected.tolist() == [False, True, False, False, False, True, False, True, False, True, False]
    got = linear_logps(hidden, weight, targets, impl=impl, stats=("is_top1",), chunk_tokens=4)
    assert got.is_top1.tolist() == expected.tolist()


@pytest.mark.parametrize("stats", [(), STATS], ids=str)
@pytest.mark.parametrize("trains", ["h", "hwb"])
@pytest.mark.parametrize("scratch", [1, 14, 21])
def test_blocks_of_a_chunk_do_not_matter(stats, trains, scratch, monkeypatch):
    """One, two and three rows of seven words at a time."""
    runs = []
    for logits in (2**18, scratch):
        monkeypatch.setitem(_tile.SCRATCH, "cpu", logits)
        hidden, weight, bias, targets = head()
        leaves = [t.requires_grad_(name in trains) for name, t in zip("hwb", (hidden, weight, bias), strict=True)]
        out = linear_logps(*leaves[:2], targets, bias=bias, impl="two_gemm", stats=stats, softcap=2.0, chunk_tokens=4)
        sums = [(x * torch.arange(5)).sum() for x in out if x is not None and x.requires_grad]
        torch.stack(sums).sum().backward()
        runs.append([*(x for x in out if x is not None), *(t.grad for t in leaves if t.requires_grad)])
    torch.testing.assert_close(*runs, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("impl", ["eager", "two_gemm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_extreme_logits_stay_finite(impl, dtype):
    """A certainty (log sum p^2 = 0) and a uniform law (-log V), at logits of +-1e3."""
    hidden = torch.tensor([[1.0], [0.0]], dtype=dtype)
    weight = torch.tensor([[1000.0], [-1000.0], [-1000.0]], dtype=dtype)
    out = linear_logps(hidden.requires_grad_(), weight, torch.tensor([1, 1]), impl=impl, stats=STATS)
    assert out.log_sum_p2.tolist() == pytest.approx([0.0, -torch.tensor(3.0).log().item()], abs=1e-6)
    assert out.log_z.tolist() == pytest.approx([1000.0, torch.tensor(3.0).log().item()], rel=1e-6)
    assert out.log_z.dtype == out.log_sum_p2.dtype == torch.float32
    (out.log_z.sum() + out.logps.sum() + out.entropy.sum()).backward()
    assert hidden.grad.isfinite().all()


def test_the_order_and_repetition_of_names_do_not_matter():
    hidden, weight, bias, targets = head()
    one = linear_logps(hidden, weight, targets, bias=bias, stats=["log_sum_p2", "entropy", "entropy"])
    two = linear_logps(hidden, weight, targets, bias=bias, stats={"entropy", "log_sum_p2"})
    assert torch.equal(one.entropy, two.entropy) and torch.equal(one.log_sum_p2, two.log_sum_p2) and one.log_z is None


def test_an_unknown_name_is_refused():
    hidden, weight, _, targets = head()
    with pytest.raises(ValueError, match=f"stats='perplexity' is unknown, expected one of: {', '.join(STATS)}"):
        linear_logps(hidden, weight, targets, stats=["perplexity"])


@pytest.mark.parametrize(("width", "rows"), [(1000, 4096), (1050, 3968), (16_000, 256), (20_000, 256), (0, 4_199_936)])
def test_chunks_on_a_gpu_are_multiples_of_128_rows(width, rows):
    """About 4.2 million / H of a head that trains, at least 256; a tensor without a device stands for one on a GPU of
    any memory."""
    hidden, weight = (torch.empty(n, width, device="meta") for n in (1, 151_936))
    assert default_chunk_tokens(hidden, weight) == 1024
    assert default_chunk_tokens(hidden, weight.requires_grad_()) == rows


@pytest.mark.parametrize(
    ("gib", "words", "rows"),
    [
        (80, 151_936, 4096),  # 2.3 GiB of float32 logits, below 80 / 32
        (80, 262_144, 2560),
        (24, 151_936, 1280),
        (24, 32_000, 4096),
        (4, 151_936, 256),
    ],
)
def test_chunks_on_a_gpu_take_a_32nd_of_its_memory(gib, words, rows, monkeypatch):
    monkeypatch.setattr(logps, "_device_memory", lambda device: gib * 2**30)
    hidden, weight = (torch.empty(n, 1000, device="meta") for n in (1, words))
    assert default_chunk_tokens(hidden, weight) == min(rows, 1024)
    assert default_chunk_tokens(hidden, weight.requires_grad_()) == rows
    assert rows == 256 or 4 * rows * words <= gib * 2**30 / 32


def test_a_frozen_heads_gradient_in_bfloat16_counts_as_well(monkeypatch):
    monkeypatch.setattr(logps, "_device_memory", lambda device: 24 * 2**30)
    hidden, weight = (torch.empty(n, 1000, device="meta", dtype=torch.bfloat16) for n in (1, 151_936))
    assert default_chunk_tokens(hidden, weight) == 768  # 6 bytes a logit, 883 rows
    assert default_chunk_tokens(hidden, weight, 80 * 2**30) == 1024
    assert default_chunk_tokens(hidden, weight.requires_grad_()) == 1280


def test_chunks_on_a_cpu_have_256_rows():
    assert default_chunk_tokens(torch.empty(1, 64), torch.empty(1_000_000, 64)) == 256
