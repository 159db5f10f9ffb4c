"""Every kind of advantage, and steps drawn for them: for the tests of advantages."""

import math
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from logratio.losses.advantages import ADVANTAGES

NAN = math.nan
KINDS = [*((name, {}) for name in ADVANTAGES), ("group", {"scale": "batch"}), ("group", {"scale": "none"})]
every_kind = pytest.mark.parametrize(("kind", "options"), KINDS, ids=lambda x: str(x))
RATIOS = ("maxrl",)
"""Whose unit is not that of rewards: these must not be negative, and a shift of all of them matters."""

numbers = st.floats(-100, 100).map(lambda x: round(x, 3))


@st.composite
def steps(draw: Any, missing: bool = False) -> dict[str, Tensor]:
    """Rewards of one to four groups, with lengths and baselines; two completions of a group or none are known."""
    shape = draw(st.tuples(st.integers(1, 4), st.integers(2, 5)))
    values = [[draw(st.sampled_from([0.0, 1.0]) | numbers) for _ in range(shape[1])] for _ in range(shape[0])]
    lengths = [[draw(st.integers(1, 50)) for _ in range(shape[1])] for _ in range(shape[0])]
    rewards = torch.tensor(values, dtype=torch.float64)
    if missing:
        for row in rewards:
            unknown = draw(st.sets(st.integers(0, shape[1] - 1)))
            keep = len(row) - len(unknown) >= 2 or len(row) == len(unknown)
            row[list(unknown) if keep else []] = NAN
    baseline = torch.tensor([[draw(numbers)] for _ in range(shape[0])], dtype=torch.float64)
    return {"rewards": rewards, "lengths": torch.tensor(lengths), "baseline": baseline}


def of(kind: str, step: dict[str, Tensor]) -> dict[str, Tensor]:
    """The step, with rewards that the advantage takes."""
    return step | {"rewards": step["rewards"].abs()} if kind in RATIOS else step


def close(a: Tensor, b: Tensor, rtol: float = 1e-9, atol: float = 1e-9) -> None:
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def tensor(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def lists(rewards: Tensor) -> list[list[float | None]]:
    return [[None if math.isnan(x) else x for x in row] for row in rewards.tolist()]


ONE = tensor([1.0, 3.0], [0.0, 0.0])  # mean 1, deviations 0, 2, -1, -1: variance 2
