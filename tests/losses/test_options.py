"""Options are refused outside their ranges, which stand in their annotations."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Annotated, Any

import pytest
import torch

from logratio.losses import (
    LOSSES,
    CPOLoss,
    DPOLoss,
    GRPOLoss,
    KTOLoss,
    Loss,
    TPOLoss,
    Variants,
)
from logratio.losses.options import Positive, Range, out_of_range, ranges_of

from ._families import refused


@pytest.mark.parametrize("name", LOSSES)
def test_options_are_given_by_name_alone(name):
    """What stands first may change, and 0.1 says nothing."""
    with pytest.raises(TypeError, match="positional argument"):
        LOSSES[name](0.1)


# Ranges ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "inside", "outside", "said"),
    [
        (Range(0, above=True), (1e-300, 1, 1e300), (0, -1e-300), "must be positive"),
        (Range(0), (0, 0.0, 5), (-1, -1e-300), "must not be negative"),
        (Range(0, 1), (0, 0.5, 1), (-0.1, 1.1), "must be in [0, 1]"),
        (Range(0, 1, below=True), (0, 0.99), (-0.1, 1), "must be in [0, 1)"),
        (Range(0, 1, above=True), (0.1, 1), (0, 1.1), "must be in (0, 1]"),
        (Range(-1, 2**32 - 1), (-1, 2**32 - 1), (-2, 2**32), "must be in [-1, 4294967295]"),
    ],
    ids=str,
)
def test_ranges(given, inside, outside, said):
    assert all(given.admits(value) for value in inside)
    assert not any(given.admits(value) for value in outside)
    assert str(given) == said and hash(given) == hash(dataclasses.replace(given))  # one may stand in an Annotated


@dataclass(frozen=True)
class Some:
    plain: float = 0.5
    positive: Positive = 1.0
    maybe: Positive | None = None
    several: tuple[Annotated[float, Range(0, 1)], ...] = ()
    without: float = math.inf
    count: Annotated[int, Range(2)] = 2
    flag: bool = False
    word: str = "nan"


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({}, []),
        ({"plain": -1e300, "maybe": 1e-9, "several": (0.0, 1.0), "without": 3.0, "count": 10**400}, []),
        ({"without": math.inf}, []),
        *(({name: math.nan}, [(name, "must be finite")]) for name in ("plain", "positive", "maybe", "without")),
        *(({name: math.inf}, [(name, "must be finite")]) for name in ("plain", "positive", "maybe")),
        ({"without": -math.inf}, [("without", "must be finite")]),
        ({"several": (0.5, math.nan)}, [("several", "must be finite")]),
        ({"several": (1.5, 0.5)}, [("several", "must be in [0, 1]")]),
        ({"positive": 0.0, "maybe": -1.0}, [("positive", "must be positive"), ("maybe", "must be positive")]),
        ({"count": 1}, [("count", "must not be negative")]),
    ],
    ids=str,
)
def test_numbers_out_of_range_are_found(options, found):
    given = Some(**options)
    assert [(name, must) for name, _, must in out_of_range(given)] == found
    assert all(value is getattr(given, name) for name, value, _ in out_of_range(given))


def test_ranges_are_read_off_the_annotations():
    assert ranges_of(Some) == {
        "positive": Range(0, above=True),
        "maybe": Range(0, above=True),
        "several": Range(0, 1),
        "count": Range(2),
    }


def numbers(name: str) -> list[str]:
    return [
        f.name for f in dataclasses.fields(LOSSES[name]) if "float" in str(f.type) or f.name in ranges_of(LOSSES[name])
    ]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("name", "option"), [(name, option) for name in LOSSES for option in numbers(name)])
def test_no_option_of_any_loss_is_nan_or_infinite(name, option, bad):
    value = (bad,) if option == "loss_weights" else bad
    with refused(f"{option}={value} must be finite"):
        LOSSES[name](**{option: value})


@pytest.mark.parametrize(
    ("loss", "options", "message"),
    [
        (KTOLoss, {"desirable_weight": -0.5}, "desirable_weight=-0.5 must not be negative"),
        (KTOLoss, {"undesirable_weight": -0.5}, "undesirable_weight=-0.5 must not be negative"),
        (DPOLoss, {"ld_alpha": 1.5}, "ld_alpha=1.5 must be in [0, 1]"),
        (DPOLoss, {"ld_alpha": -0.5}, "ld_alpha=-0.5 must be in [0, 1]"),
        (DPOLoss, {"loss_type": "dpop", "dpop_lambda": -1.0}, "dpop_lambda=-1.0 must not be negative"),
        (DPOLoss, {"loss_type": "irpo", "irpo_alpha": -1.0}, "irpo_alpha=-1.0 must not be negative"),
        (DPOLoss, {"loss_type": "cal_dpo", "cal_dpo_coef": -1.0}, "cal_dpo_coef=-1.0 must not be negative"),
        (DPOLoss, {"loss_type": "beta_dpo", "beta_dpo_coef": -1.0}, "beta_dpo_coef=-1.0 must not be negative"),
        (DPOLoss, {"loss_type": "beta_dpo", "beta_dpo_momentum": 1.5}, "beta_dpo_momentum=1.5 must be in [0, 1]"),
        (DPOLoss, {"loss_type": "rainbow", "rainbow_mu": 1.5}, "rainbow_mu=1.5 must be in [0, 1]"),
        (CPOLoss, {"cpo_alpha": -1.0}, "cpo_alpha=-1.0 must not be negative"),
        (TPOLoss, {"tpo_alpha": -1.0}, "tpo_alpha=-1.0 must not be negative"),
        *(
            (GRPOLoss, {"loss_type": "vespo", name: -1.0}, f"{name}=-1.0 must not be negative")
            for name in ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg")
        ),
    ],
)
def test_what_is_out_of_its_range_is_refused(loss, options, message):
    with refused(message):
        loss(**options)


def test_ends_of_ranges_are_taken():
    KTOLoss(desirable_weight=0.0, undesirable_weight=0.0)
    DPOLoss(ld_alpha=0.0), DPOLoss(ld_alpha=1.0), DPOLoss(loss_weights=(-1.0,))
    DPOLoss(loss_type=("dpop", "irpo", "cal_dpo"), dpop_lambda=0.0, irpo_alpha=0.0, cal_dpo_coef=0.0)
    DPOLoss(loss_type=("rainbow", "r_dpo"), rainbow_mu=1.0, rainbow_gamma=-1.0, r_dpo_alpha=-1.0)
    DPOLoss(loss_type="beta_dpo", beta_dpo_coef=0.0, beta_dpo_momentum=1.0)
    GRPOLoss(epsilon=0.0), GRPOLoss(epsilon_high=0.0), GRPOLoss(entropy_coef=-1.0, off_policy_mask_threshold=-1.0)
    GRPOLoss(loss_type="gmpo", epsilon=1.0), GRPOLoss(max_completion_length=1)


# A loss of the user's own ---------------------------------------------------------------------------------------------


def test_a_loss_from_outside_needs_none_of_it():
    @dataclass(frozen=True, kw_only=True)
    class Own(Loss):
        cap: float = math.inf
        scale: float = 1.0
        loss_type: str = "mine"
        name: "Unknown" = None  # type: ignore[name-defined]  # noqa: F821

    loss = Own(scale=2.0, loss_type="other")
    assert loss.cap == math.inf and Own(cap=math.inf) == Own() and ranges_of(Own) == {}
    with refused("scale=nan must be finite"):
        Own(scale=math.nan)


def test_a_table_can_be_had_by_a_loss_from_outside():
    table: Variants[Any] = Variants()
    table.enter("one", torch.exp, reads=("scale",))
    table.enter("two", torch.log)

    @dataclass(frozen=True, kw_only=True)
    class Own(Loss):
        option_tables = {"shape": table}
        shape: str = "one"
        scale: float = 1.0

    Own(scale=2.0)
    with refused("scale=2.0 is not read by shape two; leave it out: it is an option of one"):
        Own(shape="two", scale=2.0)
    with refused("shape='three' is unknown, expected one of: one, two"):
        Own(shape="three")
