"""linear_logps: right in value and gradient, in every dtype, and as frugal as it claims."""

import math

import pytest
import torch
from torch import Tensor

from logratio.losses import linear_logps
from logratio.losses.head import _tile
from logratio.losses.head.logps import IMPLEMENTATIONS

from ._heads import OPTIONS, head, near_certain

options = pytest.mark.parametrize("kwargs", OPTIONS.values(), ids=OPTIONS)
impls = pytest.mark.parametrize("impl", [name for name in IMPLEMENTATIONS if name not in ("auto", "triton")])
LOW = (torch.float32, torch.bfloat16, torch.float16)


def by_hand(hidden, weight, targets, bias=None, temperature=1.0, logit_scale=1.0, softcap=None):
    """The definition in Python floats: (logps, entropies)."""
    logps, entropies = [], []
    for h, y in zip(hidden.tolist(), targets.tolist(), strict=True):
        z = []
        for v, w in enumerate(weight.tolist()):
            x = logit_scale * (
                sum(a * b for a, b in zip(h, w, strict=True)) + (0.0 if bias is None else bias[v].item())
            )
            z.append((x if softcap is None else softcap * math.tanh(x / softcap)) / temperature)
        log_total = math.log(sum(math.exp(x - max(z)) for x in z)) + max(z)
        logps.append(z[y] - log_total)
        entropies.append(-sum(math.exp(x - log_total) * (x - log_total) for x in z))
    return torch.tensor(logps, dtype=torch.float64), torch.tensor(entropies, dtype=torch.float64)


def gradients(tensors: list[Tensor], coefficients: Tensor, trains: str = "hwb", **kwargs) -> dict[str, Tensor]:
    """The log-probs, and the gradients of sum(coefficients * logps), of fresh leaves."""
    hidden, weight, bias = (
        t.detach().clone().requires_grad_(n in trains) for t, n in zip(tensors, "hwb", strict=False)
    )
    logps = linear_logps(hidden, weight, tensors[3], bias=bias, **kwargs)
    (logps * coefficients.to(logps.dtype)).sum().backward()
    grads = {"hidden": hidden.grad, "weight": weight.grad, "bias": bias.grad}
    return {"logps": logps.detach()} | {name: grad for name, grad in grads.items() if grad is not None}


@options
@impls
@pytest.mark.parametrize("with_bias", [False, True])
def test_values_are_the_definition(kwargs, impl, with_bias):
    hidden, weight, bias, targets = head()
    kwargs = kwargs | {"bias": bias if with_bias else None}
    expected, entropies = by_hand(hidden, weight, targets, **kwargs)
    got = linear_logps(hidden, weight, targets, impl=impl, stats=("entropy",), chunk_tokens=2, **kwargs)
    torch.testing.assert_close(got.logps, expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(got.entropy, entropies, rtol=1e-12, atol=1e-13)
    alone = linear_logps(hidden, weight, targets, impl=impl, chunk_tokens=2, **kwargs)
    torch.testing.assert_close(alone, got.logps, rtol=1e-12, atol=1e-13)


@options
@pytest.mark.parametrize("trains", ["h", "w", "b", "hw", "hwb"])
@pytest.mark.parametrize("outputs", ["logps", "entropy", "both"])
def test_gradcheck(kwargs, trains, outputs):
    hidden, weight, bias, targets = head()
    leaves = [t.requires_grad_(name in trains) for name, t in zip("hwb", (hidden, weight, bias), strict=True)]

    def call(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        stats = None if outputs == "logps" else ("entropy",)
        out = linear_logps(hidden, weight, targets, bias=bias, stats=stats, impl="two_gemm", chunk_tokens=2, **kwargs)
        return {"logps": (out,), "entropy": out[1:2], "both": tuple(out[:2])}[outputs]

    assert torch.autograd.gradcheck(call, leaves)


@options
@pytest.mark.parametrize("trains", ["h", "hwb"])
@pytest.mark.parametrize("make", [head, near_certain])
@pytest.mark.parametrize("products", ["default", "half"])
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_error_budget(kwargs, trains, make, products, dtype, monkeypatch):
    """At most twice the error of full logits in the same dtype, value and gradient, both against float64."""
    if products == "half":  # as on a GPU; a CPU multiplies half precision in float32
        monkeypatch.setattr(_tile, "product_dtype", lambda weight: weight.dtype)
    tensors = make(n=24, h=64, v=300, dtype=dtype)
    coefficients = torch.linspace(-1, 1.3, 24, dtype=torch.float64)
    exact = gradients([t.double() for t in tensors[:3]] + tensors[3:], coefficients, trains, impl="eager", **kwargs)
    eager = gradients(tensors, coefficients, trains, impl="eager", **kwargs)
    ours = gradients(tensors, coefficients, trains, impl="two_gemm", chunk_tokens=7, **kwargs)
    assert ours.keys() == exact.keys() == {"logps", "hidden"} | ({"weight", "bias"} if trains == "hwb" else set())
    for name in exact:
        error, allowed = ((x[name].double() - exact[name]).norm().item() for x in (ours, eager))
        tiny = 4 * torch.finfo(torch.float32).eps * exact[name].norm().item()
        assert error <= 2 * allowed + tiny, f"{name}: {error:.2e} against eager's {allowed:.2e}"


@options
@pytest.mark.parametrize("make", [head, near_certain])
@pytest.mark.parametrize("products", ["default", "half"])
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_error_budget_of_the_entropy(kwargs, make, products, dtype, monkeypatch):
    if products == "half":
        monkeypatch.setattr(_tile, "product_dtype", lambda weight: weight.dtype)
    hidden, weight, bias, targets = make(n=24, h=64, v=300, dtype=dtype)
    results = []
    for impl, to in (("two_gemm", dtype), ("eager", dtype), ("eager", torch.float64)):
        leaves = [t.to(to).detach().requires_grad_() for t in (hidden, weight, bias)]
        entropy = linear_logps(*leaves[:2], targets, bias=leaves[2], stats=("entropy",), impl=impl, **kwargs).entropy
        (entropy * torch.linspace(-1, 1.3, 24)).sum().backward()
        results.append([entropy.detach().double(), *(leaf.grad.double() for leaf in leaves)])
    for ours, eager, exact in zip(*results, strict=True):
        tiny = 4 * torch.finfo(torch.float32).eps * exact.norm()
        assert (ours - exact).norm() <= 2 * (eager - exact).norm() + tiny


@pytest.mark.parametrize("products", ["default", "half"])
def test_sums_over_many_chunks_are_in_float32(products, monkeypatch):
    """256 chunks of one token: a sum kept in bfloat16 would err by sixteen times its rounding."""
    if products == "half":
        monkeypatch.setattr(_tile, "product_dtype", lambda weight: weight.dtype)
    tensors = head(n=256, h=8, v=16, dtype=torch.bfloat16)
    ones = torch.ones(256, dtype=torch.float64)
    exact = gradients([t.double() for t in tensors[:3]] + tensors[3:], ones, impl="eager")
    eager, ours = gradients(tensors, ones, impl="eager"), gradients(tensors, ones, impl="two_gemm", chunk_tokens=1)
    for name in ("weight", "bias"):
        error, allowed = ((x[name].double() - exact[name]).norm() for x in (ours, eager))
        assert error <= 2 * allowed


def test_near_certain_is_what_it_says_and_hard():
    """The case above must be one in which the formula that it guards against fails."""
    hidden, weight, _, targets = near_certain(dtype=torch.bfloat16)
    p = torch.nn.functional.linear(hidden.double(), weight.double()).softmax(-1)
    p_y = p.gather(1, targets[:, None])
    assert p_y.median() == pytest.approx(0.9994, abs=3e-4)
    exact = weight.double()[targets] - p @ weight.double()
    cancelling = weight[targets] - p.bfloat16() @ weight
    assert (cancelling.double() - exact).norm() > 0.5 * exact.norm()


@pytest.mark.parametrize("lead", [10.0, 14.0])
@pytest.mark.parametrize("weighed", [("logps",), ("logps", "log_z", "entropy")], ids=len)
def test_digits_are_kept_where_a_target_is_all_but_certain(lead, weighed):
    """1 - p_y is a sum of the others, not a difference from 1, which has one to three digits of it left; the
    log-probability keeps them too. Of logits that are exact: the other words' lie at 0, the target's at `lead`."""
    weight = torch.zeros(32, 8)
    weight[:, 0], weight[:, 1] = lead * (torch.arange(32) == 5), torch.linspace(-1, 1, 32)
    hidden, targets = torch.tensor([[1.0, 0, 0, 0, 0, 0, 0, 0]]).repeat(3, 1), torch.full((3,), 5)

    def values(dtype: torch.dtype, impl: str) -> list[Tensor]:
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in (hidden, weight)]
        leaves[1].requires_grad_(len(weighed) > 1)
        out = linear_logps(*leaves, targets, stats=("log_z", "entropy"), impl=impl)
        sum((getattr(out, name) * torch.tensor([1.0, 2.0, -1.0])).sum() for name in weighed).backward()
        return [out.logps.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    ours, exact = values(torch.float32, "two_gemm"), values(torch.float64, "eager")
    eps = torch.finfo(torch.float32).eps
    for one, true in zip(ours, exact, strict=True):
        assert (one.double() - true).norm() <= 16 * eps * true.norm()
    blurred = values(torch.float32, "eager")[0].double()  # or this case would show nothing
    assert (blurred - exact[0]).norm() > 64 * eps * exact[0].norm()


@pytest.mark.parametrize("trains", ["h", "hwb"])
@pytest.mark.parametrize("chunk_tokens", [1, 2, 4, 5, 100, None])
def test_chunks_do_not_matter(trains, chunk_tokens):
    tensors, coefficients = head(), torch.linspace(-1, 2, 5)
    whole = gradients(tensors, coefficients, trains, impl="eager", softcap=2.0)
    chunked = gradients(tensors, coefficients, trains, chunk_tokens=chunk_tokens, softcap=2.0)
    torch.testing.assert_close(chunked, whole, rtol=1e-12, atol=1e-13)


@impls
@pytest.mark.parametrize("dtype", [torch.float64, *LOW], ids=str)
def test_dtypes_out(impl, dtype):
    hidden, weight, bias, targets = head(dtype=dtype)
    got = linear_logps(hidden, weight, targets, bias=bias, stats=("entropy",), impl=impl)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert got.logps.dtype == got.entropy.dtype == expected
    grads = gradients([hidden, weight, bias, targets], torch.ones(5), impl=impl)
    assert {grads[name].dtype for name in ("hidden", "weight", "bias")} == {dtype}


@impls
def test_no_tokens(impl):
    hidden, weight, bias, targets = head(n=0)
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    got = linear_logps(hidden, weight, targets, bias=bias, stats=("entropy",), impl=impl)
    assert got.logps.shape == got.entropy.shape == (0,)
    (got.logps.sum() + got.entropy.sum()).backward()
    assert [t.grad.shape for t in leaves] == [t.shape for t in leaves]
    assert all((t.grad == 0).all() for t in leaves)


@pytest.mark.parametrize("trains", ["h", "hwb"])
def test_second_backward_gives_the_right_gradient(trains):
    hidden, weight, bias, targets = head()
    leaves = [t.requires_grad_() for t, name in zip((hidden, weight, bias), "hwb", strict=True) if name in trains]
    logps, entropy, *_ = linear_logps(
        hidden, weight, targets, bias=bias, stats=("entropy",), impl="two_gemm", chunk_tokens=2
    )
    for coefficients in (torch.ones(5), torch.tensor([3.0, 0.0, -1.0, 2.0, 0.5])):
        for with_entropy in (False, True, False):
            ours = (logps * coefficients).sum() + (entropy * coefficients).sum() * with_entropy
            eager = linear_logps(hidden, weight, targets, bias=bias, stats=("entropy",), impl="eager")
            theirs = (eager.logps * coefficients).sum() + (eager.entropy * coefficients).sum() * with_entropy
            got = torch.autograd.grad(ours, leaves, retain_graph=True)
            torch.testing.assert_close(got, torch.autograd.grad(theirs, leaves), rtol=1e-12, atol=1e-13)


def test_second_derivative_is_refused():
    hidden, weight, _, targets = head()
    for logps in (linear_logps(hidden.requires_grad_(), weight, targets), linear_logps(hidden, weight, targets) ** 2):
        with pytest.raises(RuntimeError, match="no second derivative, use impl='eager'"):
            torch.autograd.grad(logps.sum(), hidden, create_graph=True)


@pytest.mark.parametrize("trains", ["h", "hwb"])
def test_strides_do_not_matter(trains):
    hidden, weight, bias, targets = head()
    strided = [torch.stack([t, t + 1], -1)[..., 0] for t in (hidden, weight.t(), bias, targets)]
    strided[1] = strided[1].t()
    assert not any(t.is_contiguous() for t in strided)
    leaves = [t.detach().requires_grad_(name in trains) for t, name in zip(strided, "hwb", strict=False)]
    logps = linear_logps(leaves[0], leaves[1], strided[3], bias=leaves[2], impl="two_gemm", chunk_tokens=2)
    logps.sum().backward()
    expected = gradients([hidden, weight, bias, targets], torch.ones(5), trains, impl="eager")
    got = {"logps": logps.detach()} | {
        name: leaf.grad for name, leaf in zip(("hidden", "weight", "bias"), leaves, strict=True) if leaf.requires_grad
    }
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)


@impls
@pytest.mark.parametrize("trains", ["h", "hwb"])
def test_autocast_is_its_dtype_in_and_out(impl, trains):
    """Under autocast: the result of casting by hand, with gradients of the inputs' own dtype."""
    tensors = head(dtype=torch.float32)
    by_hand = gradients([t.bfloat16() for t in tensors[:3]] + tensors[3:], torch.ones(5), trains, impl=impl)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = gradients(tensors, torch.ones(5), trains, impl=impl)
    assert torch.equal(got.pop("logps"), by_hand.pop("logps"))
    for name, grad in got.items():
        assert grad.dtype == torch.float32
        assert torch.equal(grad, by_hand[name].float())


@impls
def test_autocast_leaves_float64(impl):
    tensors = head()
    expected = gradients(tensors, torch.ones(5), impl=impl)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(gradients(tensors, torch.ones(5), impl=impl), expected, rtol=0, atol=0)


@pytest.mark.parametrize("trains", ["h", "hwb"])
def test_backward_inside_autocast_keeps_the_forward_dtype(trains):
    hidden, weight, bias, targets = head(dtype=torch.float32)
    leaves = [t.requires_grad_() for t, name in zip((hidden, weight, bias), "hwb", strict=True) if name in trains]
    logps, entropy, *_ = linear_logps(hidden, weight, targets, bias=bias, stats=("entropy",))
    outside = torch.autograd.grad((logps + entropy).sum(), leaves, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = torch.autograd.grad((logps + entropy).sum(), leaves)
    torch.testing.assert_close(inside, outside, rtol=0, atol=0)


@impls
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("trains", ["h", "hwb"])
def test_extreme_logits_are_finite(impl, dtype, trains):
    """Logits of +-1e4, targets on top and at the bottom: log-probs of 0 and -2e4, entropy 0."""
    hidden = torch.tensor([[100.0], [-100.0], [100.0]], dtype=dtype)
    weight = torch.tensor([[100.0], [-100.0], [0.0]], dtype=dtype)
    leaves = [hidden.requires_grad_(), weight.requires_grad_("w" in trains)]
    logps, entropy, *_ = linear_logps(*leaves, torch.tensor([0, 0, 2]), stats=("entropy",), impl=impl)
    assert logps.tolist() == pytest.approx([0.0, -2e4, -1e4], rel=1e-2, abs=0)
    assert entropy.tolist() == [0.0, 0.0, 0.0]
    (logps + entropy).sum().backward()
    assert all(t.grad.isfinite().all() for t in leaves if t.requires_grad)
    torch.testing.assert_close(hidden.grad.flatten().tolist(), [0.0, 200.0, -100.0])


def test_float16_row_sums_beyond_its_range(monkeypatch):
    """A uniform row over 70,000 words: sum exp(z - max) is more than float16 holds, p is below its normal numbers."""
    monkeypatch.setattr(_tile, "product_dtype", lambda weight: weight.dtype)
    hidden = torch.zeros(1, 1, dtype=torch.float16, requires_grad=True)
    weight = torch.ones(70_000, 1, dtype=torch.float16)
    weight[0] = 3.0
    logps = linear_logps(hidden, weight, torch.tensor([0]))
    logps.sum().backward()
    assert logps.item() == pytest.approx(-math.log(70_000))
    assert hidden.grad.item() == pytest.approx(2.0, rel=2**-8)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"hidden": torch.ones(5)},
            ValueError,
            r"expected hidden \[N, H\], weight \[V, H\], targets \[N\], got hidden \[5\]",
        ),
        ({"targets": torch.ones(5, 1, dtype=torch.int64)}, ValueError, r"expected .* targets \[5, 1\]"),
        ({"hidden": torch.ones(5, 4)}, ValueError, r"do not agree: hidden \[5, 4\], weight \[7, 3\], targets \[5\]"),
        ({"targets": torch.ones(4, dtype=torch.int64)}, ValueError, r"do not agree: .* targets \[4\]"),
        (
            {"bias": torch.ones(6)},
            ValueError,
            r"bias must be \[V\] for weight \[V, H\], got bias \[6\], weight \[7, 3\]",
        ),
        (
            {"bias": torch.ones(7, dtype=torch.float64)},
            TypeError,
            r"share one floating dtype, got .* bias torch.float64",
        ),
        (
            {"hidden": torch.ones(5, 3, dtype=torch.float16)},
            TypeError,
            r"got hidden torch.float16, weight torch.float32",
        ),
        (
            {"hidden": torch.ones(5, 3, dtype=torch.int64), "weight": torch.ones(7, 3, dtype=torch.int64)},
            TypeError,
            "share one floating dtype",
        ),
        ({"targets": torch.ones(5, dtype=torch.int32)}, TypeError, "targets must be torch.int64, got torch.int32"),
        ({"targets": torch.tensor([0, 1, 7, 2, 3])}, ValueError, r"in \[0, 7\), got values from 0 to 7"),
        ({"targets": torch.tensor([0, 1, -100, 2, 3])}, ValueError, r"in \[0, 7\), got values from -100 to 3"),
        ({"temperature": 0.0}, ValueError, "temperature=0.0 must be positive and finite"),
        ({"temperature": math.nan}, ValueError, "temperature=nan must be positive and finite"),
        ({"softcap": -30.0}, ValueError, "softcap=-30.0 must be positive and finite"),
        ({"chunk_tokens": 0}, ValueError, "chunk_tokens=0 must be positive and finite"),
        ({"impl": "triton9"}, ValueError, "impl='triton9' is unknown, expected one of: auto, eager, two_gemm, triton"),
    ],
    ids=lambda x: str(x)[:40] if isinstance(x, str) else "",
)
def test_bad_input(change, error, message):
    hidden, weight, _, targets = head(dtype=torch.float32)
    call = {"hidden": hidden, "weight": weight, "targets": targets} | change
    with pytest.raises(error, match=message):
        linear_logps(**call)


@impls
def test_inputs_are_not_modified(impl):
    tensors = head()
    before = [t.clone() for t in tensors]
    gradients(tensors, torch.ones(5), "hwb", impl=impl, **OPTIONS["all"])
    leaf = tensors[0].requires_grad_()
    linear_logps(leaf, tensors[1], tensors[3], stats=("entropy",), impl=impl).logps.sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
    assert [t._version for t in tensors] == [0] * 4
