"""The Triton tile of a divergence: on a GPU, and in Triton's interpreter, in which `test_triton.py` runs this file."""

import math
from functools import partial
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from logratio.losses import linear_jsd

from .._cases import pairwise
from ._heads import OPTIONS, head
from .test_triton import DEVICE, INTERPRETED, LOW, on_device, round_to_nearest  # noqa: F401  # a fixture

pytest.importorskip("triton")

from logratio.losses.head import _triton_jsd  # noqa: E402

BETAS = (0.0, 0.1, 0.5, 1.0)
TRAINS, NEAR, KINDS = ("h", "hwb"), (1.0, 0.02, 1e-4), ("plain", "softcap", "all")


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch):
    """Two a row of 300 words, the last of 44; rows of 304 words of memory."""
    monkeypatch.setattr(_triton_jsd, "BLOCK", 256)


def models(near: float, dtype: torch.dtype, n: int = 6) -> list[Tensor]:
    """hidden, weight, bias of a student, and of its teacher of the same width, from which it is `near` of its size."""
    teacher = [t / 2 for t in head(n, 64, 300, seed=1)[:3]]
    student = [t + near * u / 2 for t, u in zip(teacher, head(n, 64, 300)[:3], strict=True)]
    return [t.to(dtype) for t in (*student, *teacher)]


def call(tensors: list[Tensor], trains: str = "h", **kwargs) -> dict[str, Tensor]:
    """The values, and the gradients of a sum that weighs them differently, of fresh leaves on DEVICE."""
    moved = [t.detach().to(DEVICE) for t in tensors]
    hidden, weight, bias, *teacher = (t.requires_grad_(n in trains) for n, t in zip("hwb---", moved, strict=True))
    values = linear_jsd(hidden, weight, *teacher[:2], bias=bias, teacher_bias=teacher[2], **kwargs)
    (values * torch.linspace(-1, 1.3, len(values)).to(values)).sum().backward()
    grads = {name: x.grad for name, x in zip("hwb", (hidden, weight, bias), strict=True) if x.grad is not None}
    return {"values": values.detach()} | grads


# The interpreter takes its time: there every two of them meet, on a GPU all.
meeting = pairwise if INTERPRETED else lambda *axes: list(product(*axes))


@on_device
@pytest.mark.parametrize("beta, trains, near, name, dtype", meeting(BETAS, TRAINS, NEAR, KINDS, LOW))
def test_values_and_gradients_are_within_the_error_budget(beta, trains, near, name, dtype):
    """At most twice the error of full logits in the same dtype, both against float64; in chunks that leave a rest."""
    low = models(near, dtype, n=6 if INTERPRETED else 24)
    options = {"beta": beta, "teacher_softcap": 3.0 if name == "all" else None, **OPTIONS[name]}
    exact = call([t.double() for t in low], trains, impl="eager", **options)
    eager = call(low, trains, impl="eager", **options)
    ours = call(low, trains, impl="triton", chunk_tokens=4, **options)
    assert ours.keys() == exact.keys() == {"values", *trains}
    for key, truth in exact.items():
        assert ours[key].dtype == eager[key].dtype
        error, allowed = ((x[key].double() - truth).norm().item() for x in (ours, eager))
        tiny = 4 * torch.finfo(torch.float32).eps * truth.norm().item()
        assert error <= 2 * allowed + tiny, f"{key}: {error:.2e} against eager's {allowed:.2e}"


@on_device
@pytest.mark.parametrize("beta", BETAS)
def test_near_the_teacher_float32_keeps_its_digits(beta):
    """A student some 1e-7 nats from its teacher, which is what a sum of probabilities is rounded by."""
    near = models(3e-4, torch.float32)
    exact = call([t.double() for t in near], beta=beta, impl="eager")
    assert exact["values"].max() < 1e-6
    ours, eager = (call(near, beta=beta, impl=impl) for impl in ("triton", "eager"))
    for key, truth in exact.items():
        error, allowed = ((x[key].double() - truth).norm() for x in (ours, eager))
        assert error <= 0.05 * truth.norm() and error <= (0.1 if key == "values" else 2) * allowed, key


@on_device
@pytest.mark.parametrize("beta", BETAS)
def test_logits_far_off_zero_are_within_the_error_budget(beta):
    """What a largest logit of 1000 is rounded by is no part of a log-probability."""
    low = models(1.0, torch.float32)
    for bias in (low[2], low[5]):
        bias += 1000.0
    low[0], low[3] = (x.round(decimals=1) for x in (low[0], low[3]))
    exact = call([t.double() for t in low], beta=beta, impl="eager")
    ours, eager = (call(low, beta=beta, impl=impl) for impl in ("triton", "eager"))
    for key, truth in exact.items():
        error, allowed = ((x[key].double() - truth).norm() for x in (ours, eager))
        assert error <= 1.4 * allowed, key


@on_device
@pytest.mark.parametrize("beta", BETAS[1:3])
def test_rounding_makes_none_negative(beta):
    g = torch.Generator().manual_seed(0)
    teacher = torch.randn(100, 2, generator=g)
    student, teacher, eye = (
        x.to(DEVICE) for x in (teacher + 1e-7 * torch.randn(100, 2, generator=g), teacher, torch.eye(2))
    )
    assert (linear_jsd(student, eye, teacher, eye, beta=beta, impl="triton") >= 0).all()


logits = st.lists(st.floats(-200, 200, width=32), min_size=5, max_size=5)


@on_device
@settings(max_examples=20, deadline=None)
@given(beta=st.sampled_from([0.0, 1e-3, 0.5, 0.999, 1.0]), student=logits, teacher=logits)
def test_it_is_the_tile_of_torch_however_far_apart_the_models_are(beta, student, teacher):
    """Words that one model rules out and the other is certain of; nothing overflows. At the teacher it is exactly 0."""
    eye = torch.eye(5, device=DEVICE)
    z, t = (torch.tensor([x], device=DEVICE) for x in (student, teacher))
    found = []
    for impl in ("triton", "two_gemm"):
        leaf = z.clone().requires_grad_()
        value = linear_jsd(leaf, eye, t, eye, beta=beta, impl=impl)
        value.sum().backward()
        assert value.item() >= 0 and math.isfinite(value.item()) and leaf.grad.isfinite().all()
        found.append((value.detach(), leaf.grad))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-6)
    leaf = t.clone().requires_grad_()
    itself = linear_jsd(leaf, eye, t, eye, beta=beta, impl="triton")
    itself.sum().backward()
    assert itself.item() == 0 and not leaf.grad.any()


@on_device
def test_a_teacher_in_another_dtype_and_of_another_width_and_no_gradient():
    student, teacher = head(6, 32, 300)[:3], head(6, 64, 300, seed=1)[:3]
    low = [*(t.bfloat16().to(DEVICE) for t in student), *(t.float().to(DEVICE) for t in teacher)]
    compute = partial(linear_jsd, *low[:2], *low[3:5], bias=low[2], teacher_bias=low[5], temperature=1.3)
    ours = compute(impl="triton", chunk_tokens=4)
    torch.testing.assert_close(ours, compute(impl="two_gemm"), rtol=1e-2 if DEVICE == "cuda" else 1e-5, atol=1e-6)
    assert not ours.requires_grad
