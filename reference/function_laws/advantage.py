"""Laws of an advantage: `check_advantage(fn)` holds one to them.

fn(rewards) -> advantages, both [groups, G], float64 unless asked otherwise, one row a prompt, all rows of an optimizer
step; NaN is the reward of a completion that nothing could score. Where `fn` takes them, `lengths` [groups, G] int64
(tokens of each completion) and `baseline` [groups, 1] (reward of another completion) come by name. fn(rewards,
context), as `--advantage_type` takes it, is called as a run does: NaN is no advantage, so 0, and where it gives one a
token, [groups, G, T], those of the first tokens are held.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor

from .._verdicts import Broken, NotAsked, Report
from ._holding import hold, taken

Step = dict[str, Tensor]
RTOL = {torch.float64: 1e-9, torch.float32: 1e-5}
"""dtype -> what rounding may change, of the largest advantage."""
SIZES = [(1, 2), (2, 2), (1, 3), (2, 3), (3, 4)]
"""(groups, G), the smallest first, so that what breaks a law first is a small example."""


@dataclass(frozen=True)
class Asking:
    """An advantage, and what is claimed of it."""

    fn: Callable[..., Tensor]
    shift: str | None
    scale: str | None
    independent: bool
    zero_sum: bool
    dtype: torch.dtype = torch.float64

    @property
    def rtol(self) -> float:
        """What rounding may change."""
        return RTOL[self.dtype]

    def __call__(self, step: Step) -> Tensor:
        given = {name: x.clone() for name, x in step.items()}
        rewards = given.pop("rewards")
        if taken(self.fn, ("context",)):
            out = self.fn(rewards.double(), SimpleNamespace(scale="group", **given))  # as losses.advantages.Context
            if isinstance(out, Tensor):
                out = (out[..., 0] if out.ndim == 3 else out).nan_to_num(0.0)
        else:
            out = self.fn(rewards, **{name: given[name] for name in taken(self.fn, ("lengths", "baseline"))})
        if not isinstance(out, Tensor) or out.shape != step["rewards"].shape:
            got = list(out.shape) if isinstance(out, Tensor) else f"of the type {type(out).__name__}"
            raise Broken(f"advantages {got} for rewards {list(step['rewards'].shape)}")
        return out.double()

    def steps(self) -> list[Step]:
        """Small ones first: whole numbers, some of them equal."""
        generator = torch.Generator().manual_seed(0)
        found = []
        for groups, size in SIZES:
            for top in (2, 5):
                draw: dict[str, Any] = {"generator": generator}
                rewards = torch.randint(top, (groups, size), **draw).to(self.dtype)
                rewards[:, 0] += torch.where((rewards == rewards[:, :1]).all(1), 1.0, 0.0)
                lengths = torch.randint(1, 9, (groups, size), **draw)
                found.append({"rewards": rewards, "lengths": lengths, "baseline": rewards[:, 1:2] + 0.5})
        return found


def check_advantage(
    fn: Callable[..., Tensor],
    *,
    shift: Literal["group", "step"] | None = "group",
    scale: Literal["invariant", "linear"] | None = "invariant",
    independent: bool = True,
    zero_sum: bool = True,
    dtype: torch.dtype = torch.float64,
    laws: Collection[str] | None = None,
    skip: Collection[str] = (),
) -> Report:
    """Hold an advantage to its laws; raise LawViolation for the first that it breaks.

    What is claimed of it: shift: a number added to the rewards of a group, or to all of a step, changes nothing. scale:
    rewards times a number give the same advantages (up to 1e-3: an eps in a denominator is no break), or as many times
    the advantages. independent: of other groups. zero_sum: those of a group sum to 0. dtype: of the rewards, float64 or
    float32, to whose rounding the laws hold. laws, skip: see `check_loss`.
    """
    return hold(LAWS, Asking(fn, shift, scale, independent, zero_sum, dtype), laws, skip)


def finite(ask: Asking) -> None:
    """Rewards that are finite have advantages that are."""
    for step in ask.steps():
        if not (out := ask(step)).isfinite().all():
            raise Broken(f"{_shown(step)} gives {out.tolist()}")


def deterministic(ask: Asking) -> None:
    """Called twice on the same step it gives the same: what it remembered would be lost where a run is resumed."""
    for step in ask.steps():
        once, again = ask(step), ask(step)
        if not ((once == again) | (once.isnan() & again.isnan())).all():
            raise Broken(f"{_shown(step)} gives {once.tolist()}, then {again.tolist()}")


def equal_rewards(ask: Asking) -> None:
    """Where all rewards of a step are equal there is nothing to learn: exactly 0."""
    for step in ask.steps():
        for value in (0.0, 1.0, 0.1, -7.3):
            same = {**step, **{name: torch.full_like(step[name], value) for name in ("rewards", "baseline")}}
            if (out := ask(same)).any():
                raise Broken(f"{_shown(same)} gives {out.tolist()}")


def within_a_group(ask: Asking) -> None:
    """The order of a group's completions does not matter: A(permuted) == A permuted."""
    for step in ask.steps():
        back = {name: x.flip(1) for name, x in step.items()}
        _same(ask(back), ask(step).flip(1), back, "the completions backwards", ask.rtol)


def of_groups(ask: Asking) -> None:
    """The order of the groups does not matter."""
    for step in ask.steps():
        back = {name: x.flip(0) for name, x in step.items()}
        _same(ask(back), ask(step).flip(0), back, "the groups backwards", ask.rtol)


def monotone(ask: Asking) -> None:
    """Of two completions of a prompt, the one with the higher reward has an advantage that is higher, not only as high,
    and equal rewards of a group have equal advantages."""
    for step in ask.steps():
        rewards, out = step["rewards"], ask(step)
        wins = rewards[:, :, None] > rewards[:, None, :]
        ties = rewards[:, :, None] == rewards[:, None, :]
        apart = out[:, :, None] - out[:, None, :]
        if (apart[wins] <= 0).any() or (apart[ties].abs() > ask.rtol).any():
            raise Broken(f"{_shown(step)} gives {out.tolist()}")


def shift_invariant(ask: Asking) -> None:
    """A number added to the rewards, of a group or of the step as is claimed, changes nothing."""
    if ask.shift is None:
        raise NotAsked("no shift invariance is claimed")
    for step in ask.steps():
        by = torch.full((len(step["rewards"]), 1), 3.0, dtype=ask.dtype)
        by *= torch.arange(1, len(by) + 1)[:, None] if ask.shift == "group" else 1
        moved = {**step, **{name: step[name] + by for name in ("rewards", "baseline")}}
        _same(ask(moved), ask(step), moved, f"{by[:, 0].tolist()} added", ask.rtol)


def scaled(ask: Asking) -> None:
    """Rewards times a number give the same advantages, or as many times the advantages, as is claimed."""
    if ask.scale is None:
        raise NotAsked("nothing is claimed of the scale")
    for step in ask.steps():
        larger = {**step, **{name: 4.0 * step[name] for name in ("rewards", "baseline")}}
        factor, rtol = (1.0, 1e-3) if ask.scale == "invariant" else (4.0, ask.rtol)
        _same(ask(larger), factor * ask(step), larger, "4 times the rewards", rtol)


def other_groups(ask: Asking) -> None:
    """What other prompts' completions are worth does not matter."""
    if not ask.independent:
        raise NotAsked("no independence of other groups is claimed")
    for step in ask.steps():
        first = {name: x[:1] for name, x in step.items()}
        _same(ask(first), ask(step)[:1], first, "the first group alone", ask.rtol)


def sums_to_0(ask: Asking) -> None:
    """The advantages of a group sum to 0."""
    if not ask.zero_sum:
        raise NotAsked("no sum of 0 is claimed")
    for step in ask.steps():
        out = ask(step)
        if (out.sum(1).abs() > ask.rtol * out.abs().sum(1)).any():
            raise Broken(f"{_shown(step)} gives {out.tolist()}, whose sums are {out.sum(1).tolist()}")


def missing(ask: Asking) -> None:
    """A completion without a reward has the advantage 0, and the others have those that they have without it."""
    for step in ask.steps():
        if step["rewards"].shape[1] < 3:
            continue  # one alone is compared with nobody
        gap = {**step, "rewards": step["rewards"].clone()}
        gap["rewards"][:, -1] = torch.nan
        out, fewer = ask(gap), {name: x[:, :-1] if x.shape[1] > 1 else x for name, x in step.items()}
        if out[:, -1].any():
            raise Broken(f"{_shown(gap)} gives {out.tolist()}")
        _same(out[:, :-1], ask(fewer), gap, "rewards with a gap against those without", ask.rtol)


LAWS: dict[str, Callable[[Asking], None]] = {
    law.__name__: law
    for law in (
        finite,
        deterministic,
        equal_rewards,
        within_a_group,
        of_groups,
        monotone,
        sums_to_0,
        shift_invariant,
        scaled,
        other_groups,
        missing,
    )
}
"""In the order in which they are tried."""


def _same(got: Tensor, expected: Tensor, step: Step, words: str, rtol: float) -> None:
    if not (got - expected).abs().max() <= rtol * expected.abs().max().clamp(min=1.0):
        raise Broken(f"{words}: {_shown(step)} gives {got.tolist()}, expected {expected.tolist()}")


def _shown(step: Step) -> str:
    return f"rewards {step['rewards'].tolist()}"
