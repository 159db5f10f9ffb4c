"""Losses by a short name, and laws held to them on drawn batches: for the tests of families of losses."""

import math
import re
from collections.abc import Callable
from typing import Any

import pytest

from logratio.losses import CPOLoss, DPOLoss, KTOLoss, Loss
from logratio.reference.laws import for_every_batch
from logratio.reference.strategies import Batch

LN2 = math.log(2)
E = 0.1
H = -(E * math.log(E) + (1 - E) * math.log(1 - E))  # entropy of a label that is wrong with probability E
SMOOTHED = {"exo_pair", "robust", "cdpo"}


def dpo(name: str, beta: float = 0.5, **options: Any) -> Loss:
    smoothing = {"label_smoothing": E} if name in SMOOTHED else {}
    scaled = {} if name == "sft" else {"beta": beta}
    return DPOLoss(**{"loss_type": name} | scaled | smoothing | options)


def cpo(name: str, beta: float = 0.5, **options: Any) -> Loss:
    """Without the NLL."""
    scaled = {} if name == "simper" else {"beta": beta}
    return CPOLoss(**{"loss_type": name, "cpo_alpha": 0.0} | scaled | options)


def kto(name: str, beta: float = 0.5, **options: Any) -> Loss:
    return KTOLoss(loss_type=name, beta=beta, **options)


def keeps(law: Callable[[Batch], None], kind: str = "paired", **options: Any) -> None:
    """Labelled examples weigh 1 each."""

    def unweighted(batch: Batch) -> None:
        if kind == "labeled":
            batch.tokens.pop("weights", None)
        law(batch)

    for_every_batch(
        kind, unweighted, **{"max_size": 30.0, "spreads": (0.25, 4.0), "distinct": True, "max_examples": 15} | options
    )


def breaks(law: Callable[[Batch], None], name: str, kind: str = "paired", **options: Any) -> None:
    with pytest.raises(AssertionError, match=f"^{name}: "):
        keeps(law, kind, shrink=False, **options)


def each(*losses: Any) -> Any:
    """One parameter for each loss (the first of a tuple)."""

    def name(x: Any) -> str:
        loss = x[0] if isinstance(x, tuple) else x
        types = getattr(loss, "loss_type", "")
        return f"{type(loss).__name__}-{types if isinstance(types, str) else '+'.join(types)}"

    return pytest.mark.parametrize("given", [pytest.param(x, id=name(x)) for x in losses])


DIVERGENCES = ("forward_kl", "js_divergence", "alpha_divergence")
PLAIN = [
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
    *("apo_zero", "apo_down", "discopop", "sigmoid_norm", "cdpo", "dpop", "cal_dpo", "r_dpo", "chi_po", "beta_dpo"),
    *("ipo_sum", "dr_dpo", "odpo", "modpo", "sppo", "cauchy", "focal_po", "dpo_shift", "bpo", "minor_dpo"),
    *("c2_dpo", "sba", "mallows"),
]


def refused(message: str) -> Any:
    """Whole, letter by letter."""
    return pytest.raises(ValueError, match=f"^{re.escape(message)}$")
