"""No loss waits for the device: no number of a tensor decides a shape or a branch, or becomes one of Python's.

The loop waits once a step; a wait in each micro-batch would let the device run dry. Tensors without values tell: what
would need one raises.
"""

import dataclasses
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from logratio.benchmarks.peers.case import Case
from logratio.benchmarks.peers.cases import CASES
from logratio.losses import Loss, SFTLoss
from logratio.reference._law_runs import arguments
from logratio.reference.laws import for_every_batch
from logratio.reference.strategies import Batch

from .._cases import enough


def without_values(given: Any, mode: FakeTensorMode) -> Any:
    if isinstance(given, torch.Tensor):
        return mode.from_tensor(given)
    if dataclasses.is_dataclass(given):
        fields = {f.name: without_values(getattr(given, f.name), mode) for f in dataclasses.fields(given)}
        return dataclasses.replace(given, **fields)
    return given


def never_waits(loss: Loss) -> None:
    """The totals are those of the batch, which the loop counts before."""

    def law(batch: Batch) -> None:
        mode = FakeTensorMode()
        given = {name: without_values(value, mode) for name, value in arguments(loss, batch).items()}
        with mode:
            loss(**given)

    for_every_batch(loss.kind, law, max_examples=2, shrink=False, min_rows=2)


def each(cases: list[Case]) -> Any:
    return pytest.mark.parametrize("case", cases, ids=lambda case: f"{case.method}-{case.name}")


@each([case for case in enough(CASES, together=1) if case.loss.window_pass])
def test_no_loss_waits_for_what_it_knows_of_the_step(case):
    never_waits(case.loss)


@pytest.mark.slow
@each(CASES)
def test_no_loss_waits(case):
    never_waits(case.loss)


class Waiting(SFTLoss):
    def __call__(self, policy, *, totals):
        out = super().__call__(policy, totals=totals)
        return out._replace(loss=out.loss if policy.completion_mask.any() else out.loss * 0)


class Shaping(SFTLoss):
    def __call__(self, policy, *, totals):
        policy.logps[policy.completion_mask]
        return super().__call__(policy, totals=totals)


@pytest.mark.parametrize(
    ("loss", "error"), [(Waiting(), DataDependentOutputException), (Shaping(), DynamicOutputShapeException)]
)
def test_one_that_waits_is_found(loss, error):
    with pytest.raises(error):
        never_waits(loss)
