"""Two runs that should be one, compared: the words for how they differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .._verdicts import Broken
from .trained import Trained, joined

RTOL = {torch.float64: 1e-9, torch.float32: 2e-4}
"""Rounding of sums in another order, and of what an optimizer makes of it, by the dtype of what moves."""
COARSE = 0.05
"""Of half precision."""


def tolerance(trained: Trained, rtol: float | None) -> float:
    """rtol, or what its dtype asks for."""
    if rtol is not None:
        return rtol
    return max((RTOL.get(trained.start[name].dtype, COARSE) for name in trained.moving), default=0.0)


def same_start(one: Trained, other: Trained, words: str) -> None:
    """Raise Broken unless both began with the same weights, bit for bit."""
    if one.start.keys() != other.start.keys():
        raise Broken(f"{words}: other tensors, {sorted(one.start.keys() ^ other.start.keys())}")
    differ = [name for name in one.start if not equal(one.start[name], other.start[name])]
    if differ:
        raise Broken(f"{words}: they start from other weights, in {listed(differ)}")


def same_run(got: Trained, expected: Trained, words: str, rtol: float | None) -> None:
    """Raise Broken unless gradient, movement and losses agree. words: what is compared with what."""
    same_start(got, expected, words)
    rtol = tolerance(expected, rtol)
    if got.gradient is not None and expected.gradient is not None:
        same_vector(got.gradient, expected.gradient, "the gradient", words, rtol)
    ours, theirs = ({name: t.end[name].double() - t.start[name].double() for name in t.moving} for t in (got, expected))
    same_vector(ours, theirs, "the update", words, rtol, rounding(expected))
    for step, (a, b) in enumerate(zip(got.losses, expected.losses, strict=True), 1):
        if not abs(a - b) <= rtol * max(abs(a), abs(b), 1.0):
            raise Broken(f"{words}: the loss of step {step} is {a:.6g} against {b:.6g}")


def rounding(trained: Trained) -> float:
    """How far two updates may be apart because weights are stored in their dtype."""
    squares = [
        (4 * torch.finfo(w.dtype).eps * w.double().norm().item()) ** 2
        for w in (trained.end[name] for name in trained.moving)
        if w.dtype != torch.float64
    ]
    return sum(squares) ** 0.5


def same_vector(
    got: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    what: str,
    words: str,
    rtol: float,
    atol: float = 0.0,
) -> None:
    """Raise Broken unless they agree, all tensors as one vector, to rtol of the longer one."""
    if got.keys() != expected.keys():
        raise Broken(f"{words}: {what} is of other tensors, {sorted(got.keys() ^ expected.keys())}")
    names = sorted(expected)
    a, b = joined(got, names), joined(expected, names)
    apart = (a - b).norm().item()
    if apart <= rtol * max(a.norm().item(), b.norm().item()) + atol:  # False where one is not finite
        return
    raise Broken(f"{words}: {what} {described(a, b)}{where(got, expected, names)}")


def described(a: Tensor, b: Tensor) -> str:
    """By how much a is not b: a factor, where it is one."""
    if not a.isfinite().all() or not b.isfinite().all():
        return "is not finite"
    long, apart = b.norm().item(), (a - b).norm().item()
    if not long:
        return f"is not 0 (norm {a.norm().item():.3g})"
    factor = (a @ b).item() / long**2
    if (a - factor * b).norm().item() <= 1e-3 * max(a.norm().item(), abs(factor) * long) and abs(factor - 1) > 1e-3:
        return f"is {factor:.4g} times as large"
    return f"differs by {100 * apart / long:.3g} % (norm {a.norm().item():.3g} against {long:.3g})"


def where(got: Mapping[str, Tensor], expected: Mapping[str, Tensor], names: Sequence[str]) -> str:
    """The tensor that differs most, if there are several."""
    if len(names) < 2:
        return ""
    apart = {name: (got[name].double() - expected[name].double()).norm().item() for name in names}
    return f", most in {max(apart, key=lambda name: apart[name])}"


def equal(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, NaN included."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a, b) or torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
