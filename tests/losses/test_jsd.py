"""linear_jsd: right in value and gradient, at every beta, whatever the chunks, and as frugal as it claims."""

import math
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import linear

from logratio.losses import Transform, linear_jsd
from logratio.losses.head import _tile, jsd
from logratio.losses.head.jsd import IMPLEMENTATIONS
from logratio.reference.function_laws import check_kernel
from logratio.reference.oracle import generalized_jsd

from ._heads import OPTIONS, head
from .test_logps_memory import Allocations, Products, one_row_of_scratch  # noqa: F401  # a fixture

BETAS = (0.0, 0.1, 0.5, 1.0)
LOW = (torch.float32, torch.bfloat16, torch.float16)
betas = pytest.mark.parametrize("beta", BETAS)
impls = pytest.mark.parametrize("impl", [name for name in IMPLEMENTATIONS if name not in ("auto", "triton")])
options = pytest.mark.parametrize("kwargs", OPTIONS.values(), ids=OPTIONS)


def models(n: int = 5, h: int = 3, v: int = 7, teacher_h: int = 4, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """hidden, weight, bias; the teacher's, of another width."""
    return [*head(n, h, v, dtype)[:3], *head(n, teacher_h, v, dtype, seed=1)[:3]]


def call(tensors: list[Tensor], **kwargs) -> Tensor:
    hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias = tensors
    given = {"bias": bias, "teacher_bias": teacher_bias} | kwargs
    return linear_jsd(hidden, weight, teacher_hidden, teacher_weight, **given)


def gradients(tensors: list[Tensor], trains: str = "hwb", **kwargs) -> dict[str, Tensor]:
    """The values, and the gradients of a sum that weighs them differently, of fresh leaves."""
    leaves = [t.detach().clone().requires_grad_(n in trains) for t, n in zip(tensors[:3], "hwb", strict=True)]
    values = call([*leaves, *tensors[3:]], **kwargs)
    (values * torch.linspace(-1, 1.3, len(values), dtype=values.dtype)).sum().backward()
    named = zip(("hidden", "weight", "bias"), leaves, strict=True)
    return {"values": values.detach()} | {name: x.grad for name, x in named if x.grad is not None}


def same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-13)


def logits(tensors: list[Tensor], transform: Transform) -> tuple[Tensor, Tensor]:
    """The student's and the teacher's, but for the temperature."""
    return tuple(transform(linear(*x)) for x in (tensors[:3], tensors[3:]))  # type: ignore[return-value]


@betas
@options
@impls
def test_values_and_gradients_are_the_oracles(beta, kwargs, impl):
    tensors = models()
    temperature = kwargs.get("temperature", 1.0)
    own = {k: x for k, x in kwargs.items() if k != "temperature"}
    ours = gradients(tensors, impl=impl, chunk_tokens=2, beta=beta, temperature=temperature, **own)
    leaves = [t.detach().clone().requires_grad_() for t in tensors[:3]]
    bent = Transform(1.0, own.get("logit_scale", 1.0), own.get("softcap"))
    student, teacher = bent(linear(*leaves)), linear(*tensors[3:])  # the teacher's own transform is none here
    values = generalized_jsd(teacher, student, beta=beta, temperature=temperature)
    (values * torch.linspace(-1, 1.3, len(values), dtype=values.dtype)).sum().backward()
    grads = {name: x.grad for name, x in zip(("hidden", "weight", "bias"), leaves, strict=True)}
    same(ours, {"values": values.detach(), **grads})


@betas
@impls
def test_the_teachers_logits_have_a_transform_of_their_own(beta, impl):
    tensors = models()
    student, _ = logits(tensors, Transform(1.0, 1.0, None))
    _, teacher = logits(tensors, Transform(1.0, 0.6, 1.5))
    expected = generalized_jsd(teacher, student, beta=beta, temperature=0.7)
    options = {"teacher_logit_scale": 0.6, "teacher_softcap": 1.5, "temperature": 0.7}
    torch.testing.assert_close(call(tensors, beta=beta, impl=impl, **options), expected, rtol=1e-11, atol=1e-13)


@betas
def test_it_is_trls(beta):
    from trl.experimental.gkd import GKDTrainer

    tensors = models()
    leaf = tensors[0].clone().requires_grad_()
    student, teacher = linear(leaf, *tensors[1:3])[None], linear(*tensors[3:])[None]
    theirs = GKDTrainer.generalized_jsd_loss(student, teacher, beta=beta, temperature=0.7, reduction="sum")
    theirs.backward()
    values = call([tensors[0].requires_grad_(), *tensors[1:]], beta=beta, temperature=0.7)
    values.sum().backward()
    torch.testing.assert_close(values.sum(), theirs, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(tensors[0].grad, leaf.grad, rtol=1e-10, atol=1e-12)


def test_by_hand():
    """Student (1/2, 1/2), teacher (1/4, 3/4)."""
    student, teacher = torch.zeros(1, 2, dtype=torch.float64), torch.tensor([[1.0, 3.0]], dtype=torch.float64).log()
    values = {b: linear_jsd(student, torch.eye(2).double(), teacher, torch.eye(2).double(), beta=b) for b in BETAS}
    assert values[0.0].item() == pytest.approx(math.log(2) + 0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert values[1.0].item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    mixed = 0.5 * (0.25 * math.log(2 / 3) + 0.75 * math.log(6 / 5)) + 0.5 * 0.5 * (math.log(4 / 3) + math.log(4 / 5))
    assert values[0.5].item() == pytest.approx(mixed)
    assert linear_jsd(student, torch.eye(2).double(), teacher, torch.eye(2).double()).item() == values[0.5].item()


@betas
@pytest.mark.parametrize("kwargs", [OPTIONS["plain"], OPTIONS["all"]], ids=str)
@pytest.mark.parametrize("trains", ["h", "hwb"])
def test_gradcheck(beta, kwargs, trains):
    tensors = models(n=3, v=5)
    leaves = [t.requires_grad_(name in trains) for t, name in zip(tensors[:3], "hwb", strict=True)]

    def of(*own: Tensor) -> Tensor:
        return call([*own, *tensors[3:]], beta=beta, chunk_tokens=2, **kwargs)

    assert torch.autograd.gradcheck(of, leaves)


@betas
@pytest.mark.parametrize("trains", ["h", "hwb"])
def test_chunks_do_not_matter(beta, trains):
    tensors = models()
    whole = gradients(tensors, trains, beta=beta, impl="eager", softcap=2.0)
    for chunk_tokens in (1, 2, 4, 5, 100, None):
        same(gradients(tensors, trains, beta=beta, chunk_tokens=chunk_tokens, softcap=2.0), whole)


@betas
@pytest.mark.parametrize("trains", ["h", "hwb"])
@pytest.mark.parametrize("products", ["default", "half"])
@pytest.mark.parametrize("near", [1.0, 0.02])
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_error_budget(beta, trains, products, near, dtype, monkeypatch):
    """At most twice the error of full logits in the same dtype, value and gradient, both against float64.

    near: how far the student is from its teacher, of the teacher's size.
    """
    if products == "half":  # as on a GPU; a CPU multiplies half precision in float32
        monkeypatch.setattr(_tile, "product_dtype", lambda weight: weight.dtype)
    tensors = [t / 2 for t in models(24, 64, 300, 64)]  # many words count: one product's luck decides nothing
    student = [t + near * u for t, u in zip(tensors[3:], tensors[:3], strict=True)]
    low = [t.to(dtype) for t in (*student, *tensors[3:])]
    exact = gradients([t.double() for t in low], trains, beta=beta, impl="eager")
    eager = gradients(low, trains, beta=beta, impl="eager")
    ours = gradients(low, trains, beta=beta, impl="two_gemm", chunk_tokens=7)
    for name, truth in exact.items():
        error, allowed = ((x[name].double() - truth).norm().item() for x in (ours, eager))
        tiny = 4 * torch.finfo(torch.float32).eps * truth.norm().item()
        assert error <= 2 * allowed + tiny, f"{name}: {error:.2e} against eager's {allowed:.2e}"


def test_near_the_teacher_float32_keeps_its_digits():
    """A student some 1e-7 nats from its teacher, which is what a sum of probabilities is rounded by."""
    tensors = [t.float() for t in models(24, 8, 300, 8)]
    near = [tensors[3] + 3e-4 * tensors[0], *tensors[4:6], *tensors[3:]]
    for beta in BETAS:
        exact = call([t.double() for t in near], beta=beta)
        assert exact.max() < 1e-6
        error, of_eager = ((call(near, beta=beta, impl=i).double() - exact).norm() for i in ("two_gemm", "eager"))
        assert error <= 0.05 * exact.norm() and error <= 0.1 * of_eager, beta


@given(
    beta=st.one_of(st.sampled_from([0.0, 1.0]), st.floats(1e-6, 1 - 1e-6)),
    student=st.lists(st.floats(-200, 200), min_size=4, max_size=4),
    teacher=st.lists(st.floats(-200, 200), min_size=4, max_size=4),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_bounds(beta, student, teacher, dtype):
    """At least 0, exactly 0 of equal logits; JSD at most the entropy of (beta, 1 - beta); its gradient finite, and 0 in
    sum, since adding a number to all logits changes nothing."""
    eye = torch.eye(4, dtype=dtype)
    z, t = (torch.tensor([x], dtype=dtype) for x in (student, teacher))
    z.requires_grad_()
    value = linear_jsd(z, eye, t, eye, beta=beta)
    value.sum().backward()
    assert value.item() >= 0 and z.grad.isfinite().all()
    assert abs(z.grad.sum().item()) <= 1e3 * torch.finfo(dtype).eps
    if 0 < beta < 1:
        bound = -beta * math.log(beta) - (1 - beta) * math.log1p(-beta)
        assert value.item() <= bound + 4 * torch.finfo(dtype).eps
    itself = linear_jsd(t.clone().requires_grad_(), eye, t, eye, beta=beta)
    (gradient,) = torch.autograd.grad(itself.sum(), itself.grad_fn.next_functions[0][0].variable)
    assert itself.item() == 0 and not gradient.any()


@betas
def test_rounding_makes_none_negative(beta):
    """As it would in some of these rows, of students as near to their teachers as a float32 can be."""
    g = torch.Generator().manual_seed(0)
    teacher = torch.randn(20_000, 2, generator=g)
    student = teacher + 1e-7 * torch.randn(20_000, 2, generator=g)
    assert (linear_jsd(student, torch.eye(2), teacher, torch.eye(2), beta=beta) >= 0).all()


@given(st.floats(-50, 50), st.floats(-50, 50), st.sampled_from(BETAS))
def test_logits_have_no_zero(ours, theirs, beta):
    """What is added to all logits of a model changes nothing."""
    tensors = models()
    moved = [*tensors[:2], tensors[2] + ours, *tensors[3:5], tensors[5] + theirs]
    got, expected = gradients(moved, "h", beta=beta), gradients(tensors, "h", beta=beta)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


def test_limits():
    """JSD(beta) / beta tends to the forward divergence and JSD(beta) / (1 - beta) to the reverse one, and exchanging
    student and teacher is exchanging beta and 1 - beta."""
    tensors = models()
    forward, reverse = call(tensors, beta=0.0), call(tensors, beta=1.0)
    for small in (1e-4, 1e-6):
        torch.testing.assert_close(call(tensors, beta=small) / small, forward, rtol=100 * small, atol=0)
        torch.testing.assert_close(call(tensors, beta=1 - small) / small, reverse, rtol=100 * small, atol=0)
    exchanged = [*tensors[3:], *tensors[:3]]
    for beta in BETAS:
        torch.testing.assert_close(call(exchanged, beta=1 - beta), call(tensors, beta=beta))


@impls
def test_a_teacher_that_is_certain_makes_it_a_head(impl):
    """KL(teacher || student) is -log p of the one word that the teacher gives: `linear_logps`, with all its laws."""

    def fn(hidden: Tensor, weight: Tensor, targets: Tensor, chunk_tokens: int | None = None) -> Tensor:
        certain = 1000 * torch.eye(len(weight), dtype=hidden.dtype)
        one_hot = torch.nn.functional.one_hot(targets, len(weight)).to(hidden.dtype)
        options = {"beta": 0.0, "impl": impl, "chunk_tokens": chunk_tokens}
        return -linear_jsd(hidden, weight, one_hot, certain, **options)

    report = check_kernel(fn)
    assert set(report.not_asked) == {"ignored"}


@pytest.mark.parametrize(("trains", "expected"), [("h", 3), ("w", 5), ("hw", 6), ("", 2)])
def test_products_of_a_training_step(trains, expected):
    """With H of one size: the student's logits and its gradient, and the teacher's logits; with a trainable head the
    logits of both twice, and a product for each gradient."""
    tensors = models(teacher_h=3)
    leaves = [t.requires_grad_(name in trains) for t, name in zip(tensors[:2], "hw", strict=True)]
    with Products(tensors) as products:
        values = call([*leaves, *tensors[2:]], chunk_tokens=2)
        if trains:
            values.sum().backward()
    assert products.count == expected


@pytest.mark.parametrize("kwargs", [{}, {"softcap": 2.0, "teacher_softcap": 1.0, "logit_scale": 3.0}], ids=str)
@betas
def test_two_tiles_for_all_chunks(kwargs, beta, one_row_of_scratch):  # noqa: F811
    """No tensor of N V elements: however many chunks, two [chunk, V] tiles."""
    n, v, chunk = 12, 1000, 3
    tensors = models(n, 4, v, 5, torch.float32)
    with Allocations(*tensors) as made:
        tensors[0].requires_grad_()
        options = {"beta": beta, "chunk_tokens": chunk}
        linear_jsd(*tensors[:2], *tensors[3:5], **options, **kwargs).sum().backward()
    assert sum(numel >= chunk * v for numel in made.numels()) == 2
    assert max(made.numels()) == chunk * v


def test_a_chunk_is_half_a_heads_by_default(monkeypatch, one_row_of_scratch):  # noqa: F811
    monkeypatch.setattr(jsd, "default_chunk_tokens", lambda hidden, weight: 30)
    tensors = models(40, 4, 1000, 5, torch.float32)
    with Allocations(*tensors) as made:
        call(tensors)
    assert max(made.numels()) == 15 * 1000


def test_a_frozen_head_keeps_one_tensor_for_the_backward_pass():
    tensors = models(dtype=torch.float32)
    tensors[0].requires_grad_()
    values = call(tensors)  # which older versions of torch want alive
    assert [t.shape for t in values.grad_fn.saved_tensors if t is not None] == [tensors[0].shape]


def test_a_second_derivative_is_eagers_alone():
    tensors = models()
    tensors[0].requires_grad_()
    (slope,) = torch.autograd.grad(call(tensors, impl="eager").sum(), tensors[0], create_graph=True)
    assert slope.requires_grad
    values = call(tensors, impl="two_gemm").sum()
    with pytest.raises(RuntimeError, match="^no second derivative, use impl='eager' under create_graph=True$"):
        torch.autograd.grad(values, tensors[0], create_graph=True)


@impls
def test_no_tokens(impl):
    tensors = models(n=0)
    got = gradients(tensors, impl=impl)
    assert got["values"].shape == (0,) and not any(x.any() for x in got.values())


@impls
@pytest.mark.parametrize("dtypes", product(LOW, (torch.float32, torch.bfloat16)), ids=str)
def test_the_teacher_may_have_another_dtype(impl, dtypes):
    own, theirs = dtypes
    tensors = [t.to(own if i < 3 else theirs) for i, t in enumerate(models())]
    got = gradients(tensors, impl=impl)
    assert got["values"].dtype == torch.float32 and got["hidden"].dtype == own
    exact = call([t.double() for t in tensors])
    torch.testing.assert_close(got["values"].double(), exact, rtol=0.05, atol=0.02)


@impls
def test_of_a_teacher_in_float32_a_student_in_float64_loses_nothing(impl):
    """Where its products are exact."""
    tensors = models()
    teacher = [(8 * t).round() / 8 for t in tensors[3:]]
    got = call([*tensors[:3], *(t.float() for t in teacher)], impl=impl)
    torch.testing.assert_close(got, call([*tensors[:3], *teacher]), rtol=1e-12, atol=1e-14)


@impls
def test_autocast_is_its_dtype_for_both(impl):
    tensors = models(dtype=torch.float32)
    by_hand = gradients([t.bfloat16() for t in tensors], impl=impl)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = gradients(tensors, impl=impl)
    assert got["hidden"].dtype == torch.float32
    for name, x in got.items():
        torch.testing.assert_close(x, by_hand[name].float(), rtol=0, atol=0)


@impls
def test_the_teacher_gets_no_gradient(impl):
    tensors = models()
    teacher = [t.requires_grad_() for t in tensors[3:]]
    call([tensors[0].requires_grad_(), *tensors[1:3], *teacher], impl=impl).sum().backward()
    assert all(t.grad is None for t in teacher)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": torch.ones(5)}, ValueError, r"hidden must be \[N, H\] and weight \[V, H\], got \[5\] and \[7, 3\]"),
        ({"teacher_weight": torch.ones(7, 3)}, ValueError, r"teacher_hidden must be \[N, H\] and teacher_weight "),
        ({"teacher_hidden": torch.ones(4, 4)}, ValueError, "hidden has 5 tokens and teacher_hidden 4"),
        (
            {"teacher_weight": torch.ones(9, 4)},
            ValueError,
            r"student has 7 words and the teacher 9, .*one vocabulary; .* both have, weight\[:7\]",
        ),
        ({"teacher_bias": torch.ones(6)}, ValueError, r"teacher_bias must be \[V\] for teacher_weight"),
        (
            {"hidden": torch.ones(5, 3, dtype=torch.float16)},
            TypeError,
            "share one floating dtype, got hidden torch.flo",
        ),
        (
            {"teacher_hidden": torch.ones(5, 4, dtype=torch.float16)},
            TypeError,
            "teacher_hidden, teacher_weight and teacher_bias must share one floating dtype",
        ),
        ({"beta": 1.5}, ValueError, r"beta=1.5 must be in \[0, 1\]"),
        ({"beta": math.nan}, ValueError, "beta=nan must be in"),
        ({"temperature": 0.0}, ValueError, "temperature=0.0 must be positive and finite"),
        ({"teacher_softcap": 0.0}, ValueError, "teacher_softcap=0.0 must be positive and finite"),
        ({"softcap": -1.0}, ValueError, "softcap=-1.0 must be positive and finite"),
        ({"chunk_tokens": 0}, ValueError, "chunk_tokens=0 must be positive and finite"),
        ({"impl": "liger"}, ValueError, "impl='liger' is unknown, expected one of: auto, eager, two_gemm, triton"),
    ],
    ids=lambda x: str(x)[:40] if isinstance(x, str) else "",
)
def test_bad_input(change, error, message):
    hidden, weight, _, teacher_hidden, teacher_weight, *_ = models(dtype=torch.float32)
    given = {"hidden": hidden, "weight": weight, "teacher_hidden": teacher_hidden, "teacher_weight": teacher_weight}
    with pytest.raises(error, match=message):
        linear_jsd(**(given | change))
