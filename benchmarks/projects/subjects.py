"""What is held to laws: another project's loss, advantage or head, in the form that the checks take."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from logratio.losses.types import CompletionLogps, Kind, Loss, LossOutput, PairLogps, Totals

OURS = {
    "contract": "of our own form",
    "collected": "of our own form",
}
"""Laws that speak of the form of our losses, which an adapter gives to every one."""
SUMS = "it is given sums or means of completions: masks and dtypes are its caller's"
GIVEN_SUMS = dict.fromkeys(("mask", "padding", "nothing_scored", "empty_example", "low_precision"), SUMS)
NEEDS_OLD = {"without_old": "it needs the old log-probs"}
FLOAT32 = {"dtype": torch.float32}
"""Of advantages: what rewards are in their trainers."""
LOW = {"dtypes": (torch.float32, torch.bfloat16, torch.float16)}
"""Of a head that computes in float32 whatever it is given."""
SMOOTHED: dict[str, dict[str, Any]] = {"robust": {"label_smoothing": 0.1}}
"""loss_type -> what it needs."""
STOPPED = {"gradient": "it stops a gradient on purpose"}


@dataclass(frozen=True)
class Subject:
    """opened: the function, in a context; a trainer is open there. not_asked: law -> why it is not.

    claims: of advantages and heads, options of the check.
    """

    project: str
    what: str
    name: str
    opened: Callable[[], AbstractContextManager[Any]]
    not_asked: Mapping[str, str] = field(default_factory=dict)
    claims: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.project}, {self.name}"


def of(project: str, what: str, name: str, fn: Any, **more: Any) -> Subject:
    """A subject that needs no opening. what: loss, advantage, head."""
    return Subject(project, what, name, lambda: contextlib.nullcontext(fn), **more)


def share(part: CompletionLogps | PairLogps, totals: Totals) -> float:
    """A micro-batch's part of the step: what its mean is weighted with where micro-batches are averaged."""
    mask = part.completion_mask if isinstance(part, CompletionLogps) else part.chosen.completion_mask
    return len(mask) / totals.num_sequences


class Peer(Loss):
    """A loss of another project, as `check_loss` takes it; it has no metrics."""

    fn: ClassVar[Callable[..., Tensor]]

    def __call__(self, *args: Any, **kwargs: Any) -> LossOutput:
        return LossOutput(type(self).fn(*args, **kwargs), {})


def peer(kind: Kind, fn: Callable[..., Tensor], **more: Any) -> Peer:
    """fn: called as our losses are, for the loss alone. more: attributes of the class."""
    return type("Made", (Peer,), {"kind": kind, "fn": staticmethod(fn), **more})()


def rollouts(fn: Callable[..., Tensor]) -> Peer:
    """fn(policy, advantages, old, totals, and ref where it is asked with one) -> the micro-batch's part of the step's
    loss."""

    def called(
        policy: CompletionLogps, advantages: Tensor, totals: Totals, old: CompletionLogps | None = None, **ref: Any
    ) -> Tensor:
        return fn(policy, advantages, old, totals, **ref)

    return peer(Kind.GROUPED, called)


def pairs(fn: Callable[..., Tensor]) -> Peer:
    """fn(policy's chosen, rejected, reference's chosen, rejected: all [B], sums) -> the mean of the micro-batch."""

    def called(policy: PairLogps, ref: PairLogps, totals: Totals) -> Tensor:
        logps = (policy.chosen.sums, policy.rejected.sums, ref.chosen.sums, ref.rejected.sums)
        return share(policy, totals) * fn(*logps)

    return peer(Kind.PAIRED, called, wants_reference=True)


def pairs_alone(fn: Callable[..., Tensor], averages: bool) -> Peer:
    """fn(chosen, rejected: [B], sums or averages) -> the mean of the micro-batch."""

    def called(policy: PairLogps, totals: Totals) -> Tensor:
        given = [getattr(x, "averages" if averages else "sums") for x in (policy.chosen, policy.rejected)]
        return share(policy, totals) * fn(*given)

    return peer(Kind.PAIRED, called)
