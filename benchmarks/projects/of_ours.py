"""Our own plain losses of the same kinds, advantages and heads, beside which the others stand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from logratio.benchmarks.peers.breaks import STEP_MEANS, WEIGHED_WITHOUT_GRADIENT
from logratio.benchmarks.peers.cases import CASES, Case
from logratio.losses import linear_logps
from logratio.losses.advantages import ADVANTAGES, advantages_of
from logratio.losses.types import Kind

from .subjects import FLOAT32, STOPPED, Subject, of

CLAIMS: dict[str, dict[str, Any]] = {
    "group": {},
    "rloo": {"scale": "linear"},
    "reinforce_pp": {"shift": "step", "independent": False, "zero_sum": False},
    "reinforce_pp_baseline": {"independent": False},
    "remax": {"scale": "linear", "zero_sum": False},
    "opo": {"scale": "linear", "zero_sum": False},
    "rloo_std": {},
    "passk": {"scale": "linear", "zero_sum": False},
    "gpg": {"scale": "linear", "independent": False},
    "reinforce_pp_tokens": {"shift": "step", "independent": False, "zero_sum": False},
}
"""What each of our advantages may claim."""
OF_LENGTHS = ("opo", "reinforce_pp_tokens")


def of_type(name: str, **options: Any) -> Callable[..., Tensor]:
    """An advantage as `check_advantage` takes it."""

    def fn(rewards: Tensor, lengths: Tensor, baseline: Tensor) -> Tensor:
        needed: dict[str, Any] = {"remax": {"baseline": baseline}}.get(
            name, {"lengths": lengths} if name in OF_LENGTHS else {}
        )
        return advantages_of(rewards, name, **needed, **options)

    return fn


def plain(case: Case) -> bool:
    """A loss type at its defaults, of a kind that other projects have functions of."""
    alone = not (case.weighted or case.sampled or case.by_token or case.kept or case.state)
    kinds = (Kind.SEQUENCE, Kind.PAIRED, Kind.GROUPED)
    return alone and {*case.options} <= {"loss_type"} and case.loss.kind in kinds


def subjects() -> list[Subject]:
    """Each loss type once."""
    named = {f"{case.method} {case.name}": case for case in CASES if plain(case)}
    out = []
    for name, case in named.items():
        stopped = case.options.get("loss_type") in WEIGHED_WITHOUT_GRADIENT | STEP_MEANS
        out.append(of("ours", "loss", name, case.loss, not_asked=STOPPED if stopped else {}))
    for name in (name for name in ADVANTAGES if name in CLAIMS):
        out.append(of("ours", "advantage", name, of_type(name), claims=CLAIMS[name] | FLOAT32))
    out.append(of("ours", "head", "linear_logps", head))
    return out


def head(hidden: Tensor, weight: Tensor, targets: Tensor, chunk_tokens: int = 4) -> Tensor:
    return linear_logps(hidden, weight, targets, chunk_tokens=chunk_tokens)
