"""Every variant of DPO by hand: value and slopes at the reference, away from it, and on both sides of kinks."""

import math
from math import exp, log
from typing import Any, NamedTuple

import pytest
import torch

from logratio.losses import DPO_TYPES, CompletionLogps, DPOLoss, PairLogps, Totals


def sp(x: float) -> float:
    return max(x, 0) + math.log1p(exp(-abs(x)))


def sg(x: float) -> float:
    return 1 / (1 + exp(-x))


def bump(x: float) -> float:
    """The slope of sg."""
    return sg(x) * sg(-x)


# Chosen: two tokens, log p = -3. Rejected: three tokens (and a hole), log p = -6. The reference: log p - r.
CHOSEN = ([-1.0, -2.0], [True, True])
REJECTED = ([-1.0, math.nan, -2.0, -3.0], [True, False, True, True])


DELTA = 0.5  # the pair's margin
ENTROPY = math.log(128256) / exp(2)  # of each token: log V / H is exp(2)


class Sides(NamedTuple):
    """A pair's log-probs; r is spread over the reference's first token."""

    policy: PairLogps
    ref: PairLogps

    @staticmethod
    def of(r_w: float, r_l: float) -> "Sides":
        sides = []
        for by in ((0.0, 0.0), (r_w, r_l)):
            rows = [
                CompletionLogps(
                    torch.tensor([[logps[0] - shift, *logps[1:]]], dtype=torch.float64, requires_grad=True),
                    torch.tensor([mask]),
                    entropy=torch.tensor([[ENTROPY]], dtype=torch.float64).expand(1, len(mask)),
                )
                for (logps, mask), shift in zip((CHOSEN, REJECTED), by, strict=True)
            ]
            sides.append(PairLogps(*rows, margin=torch.tensor([DELTA])))
        return Sides(*sides)


def value_and_slopes(loss: DPOLoss, r_w: float, r_l: float, state: dict[str, float]) -> tuple[float, float, float]:
    """The loss of the pair, and its derivative in a chosen and in a rejected token's log-prob: alike for all scored."""
    policy, ref = Sides.of(r_w, r_l)
    collected = loss.collect(policy, ref)
    totals = Totals(
        num_sequences=1, num_tokens=99, num_chosen_tokens=2, collected=collected, own=torch.tensor([0]), state=state
    )
    value = loss(policy, ref, totals=totals).loss
    value.backward()
    assert ref.chosen.per_token_logps.grad is None and ref.rejected.per_token_logps.grad is None
    up, down = policy.chosen.per_token_logps.grad[0], policy.rejected.per_token_logps.grad[0]
    assert up[0] == up[1] and down[0] == down[2] == down[3] and down[1] == 0
    return value.item(), up[0].item(), down[0].item()


# loss_type: (options, value, slope of chosen, slope of rejected) where the policy is the reference; beta = 0.1.
# Rainbow: averages -1.5 and -2, of both models: D = 0.5, to beat 0.25 * 0.5 + 0.75 * 0.1.
B = 0.1
RAINBOW = 0.1 * (0.5 - 0.125 - 0.075)
AT_REFERENCE = {
    "sigmoid": ({}, log(2), -B / 2, B / 2),
    "hinge": ({}, 1, -B, B),
    "ipo": ({}, 25, -10 / 2, 10 / 3),
    "sigmoid_norm": ({}, log(2), -B / 2 / 2, B / 2 / 3),
    "exo_pair": ({"label_smoothing": 1e-3}, -log(2) - log(1e-3 * 0.999) / 2, -B * log(999) / 4, B * log(999) / 4),
    "nca_pair": ({}, 2 * log(2), -B / 4, B / 4),
    "robust": ({"label_smoothing": 0.1}, log(2), -B / 2 / 0.8, B / 2 / 0.8),
    "cdpo": ({"label_smoothing": 0.1}, log(2), -B / 2 * 0.8, B / 2 * 0.8),
    "bco_pair": ({}, 2 * log(2), -B / 2, B / 2),
    "sppo_hard": ({}, 50, -10, 10),
    "aot": ({"label_smoothing": 0.1}, log(2), -B / 2 * 0.8, B / 2 * 0.8),
    "aot_unpaired": ({"label_smoothing": 0.1}, log(2), -B / 2 * 0.8, B / 2 * 0.8),
    "apo_zero": ({}, 1, -B / 4, B / 4),
    "apo_down": ({}, 1, 0, B / 4),
    "discopop": ({}, (1 + log(2)) / 2, B * (-0.75 + (1 - log(2)) / 0.2), -B * (-0.75 + (1 - log(2)) / 0.2)),
    "sft": ({}, 1.5, -0.5, 0),
    "irpo": ({}, log(2) + 1.5, -B / 2 - 0.5, B / 2),
    "dpop": ({}, log(2), -B / 2, B / 2),  # at the kink: the slope of the right side
    "cal_dpo": ({}, log(2) + 0.5 * 50, -0.5 - 0.5 * 10, 0.5 + 0.5 * 10),
    "r_dpo": ({}, sp(0.1), -B * sg(0.1), B * sg(0.1)),  # chosen is one token shorter
    "chi_po": ({}, log(2), -B, B),
    "rainbow": ({}, sp(-RAINBOW), -B * sg(-RAINBOW) / 2, B * sg(-RAINBOW) / 3),
    "beta_dpo": ({}, log(2), -B / 2, B / 2),
    "ipo_sum": ({}, 25, -10, 10),
    "alpha_dpo": ({}, sp(-0.04), -B * sg(-0.04) / 2, B * sg(-0.04) / 3),  # one pair: z = 0; 0.1 (0.5 - 0.1)
    "dr_dpo": ({}, log(2), -B / 2, B / 2),
    "odpo": ({}, sp(0.5), -B * sg(0.5), B * sg(0.5)),
    "modpo": ({}, sp(0.5), -B / 0.5 * sg(0.5), B / 0.5 * sg(0.5)),  # -(1 - 0.5) 0.5 / 0.5
    "sppo": ({}, 2 * (10 * (sg(0.5) - 0.5)) ** 2, -20 * (sg(0.5) - 0.5), 20 * (sg(0.5) - 0.5)),
    "cauchy": ({}, log(2), -B * 2 / math.pi, B * 2 / math.pi),
    "focal_po": (
        *({}, 0.5**0.05 * log(2), -B / 2 * 0.5**0.05 * (1 - 0.05 * log(2))),
        B / 2 * 0.5**0.05 * (1 - 0.05 * log(2)),
    ),
    "h_dpo": ({}, sp(0.015), -B * 0.95 * sg(0.015), B * 0.95 * sg(0.015)),  # 0.1 (0.95 * 3 - 3)
    "dpo_shift": ({}, log(2), -B / 2, 0.95 * B / 2),
    "bpo": ({}, log(2), -B / 4, 0.95 * B / 4),  # at the kink: half of each side
    "minor_dpo": ({}, log(2), -B / 2, 0),  # at the kink: the slope of the left side
    "c2_dpo": ({}, log(2), -B / 2, B / 2),
    "mallows": ({}, log(2), -0.58 * B / 2, 0.58 * B / 2),  # 0.29 * 2
    "sba": ({}, 1 / 2, -B / 2, B / 2),  # 1 / (4 (1 - 0.5)); the slope is DPO's, whatever sba_lambda is
}


@pytest.mark.parametrize("loss_type", DPO_TYPES)
def test_where_the_policy_is_the_reference(loss_type):
    options, *expected = AT_REFERENCE[loss_type]
    got = value_and_slopes(DPOLoss(loss_type=loss_type, **options), 0.0, 0.0, {})
    assert got == pytest.approx(expected, rel=1e-12, abs=1e-15)


# (loss_type, options beside beta = 0.5, r_w, r_l, value, slope of chosen, slope of rejected).
# (3, -1): x = 2, averages 3/2 and -1/3. (-1, 2): x = -3/2.
H = 0.5
E = {"label_smoothing": 0.2}
Point = tuple[str, dict[str, Any], float, float, float, float, float]


def of_x(name: str, options: dict[str, Any], r_w: float, r_l: float, value: float, slope: float) -> Point:
    """A function of x = beta (r_w - r_l) and its slope there."""
    return name, options, r_w, r_l, value, H * slope, -H * slope


T = (sg(0.5) - 0.5) / H  # sppo's target

POINTS: list[Point] = [
    ("sigmoid", {}, 3, -1, sp(-2), -H * sg(-2), H * sg(-2)),
    ("sigmoid", {}, -1, 2, sp(1.5), -H * sg(1.5), H * sg(1.5)),
    ("hinge", {}, 3, -1, 0, 0, 0),
    ("hinge", {}, 2, 0, 0, 0, 0),  # at the kink
    ("hinge", {}, 1.9, 0, 0.05, -H, H),
    ("hinge", {}, -1, 2, 2.5, -H, H),
    ("ipo", {}, 3, -1, (11 / 6 - 1) ** 2, 2 * (5 / 6) / 2, -2 * (5 / 6) / 3),
    ("ipo", {}, -1, 2, (-7 / 6 - 1) ** 2, -2 * (13 / 6) / 2, 2 * (13 / 6) / 3),
    ("sigmoid_norm", {}, 3, -1, sp(-11 / 12), -H / 2 * sg(-11 / 12), H / 3 * sg(-11 / 12)),
    ("sigmoid_norm", {}, -1, 2, sp(7 / 12), -H / 2 * sg(7 / 12), H / 3 * sg(7 / 12)),
    ("cdpo", E, 3, -1, 0.8 * sp(-2) + 0.2 * sp(2), H * (sg(2) - 0.8), -H * (sg(2) - 0.8)),
    ("cdpo", E, -1, 2, 0.8 * sp(1.5) + 0.2 * sp(-1.5), H * (sg(-1.5) - 0.8), -H * (sg(-1.5) - 0.8)),
    ("cdpo", {}, 3, -1, sp(-2), -H * sg(-2), H * sg(-2)),
    of_x("robust", E, 3, -1, (0.8 * sp(-2) - 0.2 * sp(2)) / 0.6, -(0.8 * sg(-2) + 0.2 * sg(2)) / 0.6),
    of_x("robust", E, -1, 2, (0.8 * sp(1.5) - 0.2 * sp(-1.5)) / 0.6, -(0.8 * sg(1.5) + 0.2 * sg(-1.5)) / 0.6),
    ("robust", {}, 3, -1, sp(-2), -H * sg(-2), H * sg(-2)),
    *[
        of_x("exo_pair", E, r_w, r_l, sg(x) * log(sg(x) / 0.8) + sg(-x) * log(sg(-x) / 0.2), bump(x) * (x - log(4)))
        for r_w, r_l, x in ((3, -1, 2), (-1, 2, -1.5))
    ],
    ("exo_pair", E, 2 * log(4), 0, 0, 0, 0),  # the two laws are equal
    ("nca_pair", {}, 3, -1, sp(-1.5) + sp(1.5) / 2 + sp(-0.5) / 2, H * (sg(1.5) / 2 - sg(-1.5)), H * sg(-0.5) / 2),
    ("nca_pair", {}, -1, 2, sp(0.5) + sp(-0.5) / 2 + sp(1) / 2, H * (sg(-0.5) / 2 - sg(0.5)), H * sg(1) / 2),
    ("bco_pair", {}, 3, -1, sp(-1.5) + sp(-0.5), -H * sg(-1.5), H * sg(-0.5)),
    ("bco_pair", {}, -1, 2, sp(0.5) + sp(1), -H * sg(0.5), H * sg(1)),
    ("sppo_hard", {}, 3, -1, (3 - 1) ** 2, 4, 0),
    ("sppo_hard", {}, -1, 2, (-1 - 1) ** 2 + (2 + 1) ** 2, -4, 6),
    ("apo_zero", {}, 3, -1, sg(-1.5) + sg(-0.5), -H * bump(1.5), H * bump(0.5)),
    ("apo_zero", {}, -1, 2, sg(0.5) + sg(1), -H * bump(0.5), H * bump(1)),
    ("apo_down", {}, 3, -1, sg(1.5) + sg(-2), H * (bump(1.5) - bump(2)), H * bump(2)),
    ("apo_down", {}, -1, 2, sg(-0.5) + sg(1.5), H * (bump(0.5) - bump(1.5)), H * bump(1.5)),
    *[
        of_x(
            *("discopop", {"discopop_tau": 0.5}, r_w, r_l, sg(-2 * x) * sp(-x) + sg(2 * x) * exp(-x)),
            2 * bump(2 * x) * (exp(-x) - sp(-x)) - sg(-2 * x) * sg(-x) - sg(2 * x) * exp(-x),
        )
        for r_w, r_l, x in ((3, -1, 2), (-1, 2, -1.5))
    ],
    ("sft", {}, 3, -1, 1.5, -0.5, 0),
    ("irpo", {"irpo_alpha": 0.3}, 3, -1, sp(-2) + 0.3 * 1.5, -H * sg(-2) - 0.3 / 2, H * sg(-2)),
    ("irpo", {"irpo_alpha": 0.0}, -1, 2, sp(1.5), -H * sg(1.5), H * sg(1.5)),
    ("dpop", {"dpop_lambda": 5.0}, 3, -1, sp(-2), -H * sg(-2), H * sg(-2)),
    ("dpop", {"dpop_lambda": 5.0}, -1, 2, sp(4), -H * 6 * sg(4), H * sg(4)),  # -3 - 5 * 1 nats
    ("dpop", {}, -0.1, -4, sp(0.55), -H * 51 * sg(0.55), H * sg(0.55)),  # 3.9 - 50 * 0.1
    ("cal_dpo", {"cal_dpo_coef": 0.1}, 3, -1, sp(-4) + 0.1 * 4, -sg(-4) + 0.1 * 4, sg(-4)),
    ("cal_dpo", {"cal_dpo_coef": 0.1}, -1, 2, sp(3) + 0.1 * 13, -sg(3) - 0.1 * 4, sg(3) + 0.1 * 6),
    ("r_dpo", {"r_dpo_alpha": 0.3}, 3, -1, sp(-1.7), -H * sg(-1.7), H * sg(-1.7)),
    ("r_dpo", {"r_dpo_alpha": -0.3}, -1, 2, sp(1.2), -H * sg(1.2), H * sg(1.2)),
    *[
        ("chi_po", options, r_w, r_l, sp(-y), -H * (1 + exp(r_w)) * sg(-y), H * (1 + exp(r_l)) * sg(-y))
        for options, r_w, r_l, y in (
            ({}, 0.5, -0.3, H * (exp(0.5) + 0.5 - exp(-0.3) + 0.3)),
            ({}, -1, 2, H * (exp(-1) - 1 - exp(2) - 2)),
            ({"chi_po_r_max": 15.0}, 4, -1, H * (exp(4) + 4 - exp(-1) + 1)),  # 29.6
        )
    ],
    ("chi_po", {"chi_po_r_max": 0.5}, 3, -1, sp(-1), 0, 0),
    ("chi_po", {"chi_po_r_max": 0.5}, -1, 2, sp(1), 0, 0),
    ("chi_po", {}, 4, -1, sp(-20), 0, 0),  # the same above its limit
    *[
        ("rainbow", {"rainbow_mu": mu, "rainbow_gamma": 0.4}, 3, -1, sp(-y), -H / 2 * sg(-y), H / 3 * sg(-y))
        # own averages -3/2 and -2; the reference's -6/2 and -5/3
        for mu, y in ((0.25, H * (0.5 - 0.25 * (-4 / 3) - 0.75 * 0.4)), (1.0, 11 / 12), (0.0, H * (0.5 - 0.4)))
    ],
    ("beta_dpo", {}, 3, -1, sp(-6.8), -1.7 * sg(-6.8), 1.7 * sg(-6.8)),  # 0.5 (1 + 0.6 (4 - 0)) = 1.7
    ("beta_dpo", {"beta_dpo_coef": 0.2}, -1, 2, sp(0.6), -0.2 * sg(0.6), 0.2 * sg(0.6)),  # 0.5 (1 + 0.2 (-3))
    ("beta_dpo", {}, -1, 2, sp(0.003), -1e-3 * sg(0.003), 1e-3 * sg(0.003)),  # 0.5 (1 - 1.8) < 1e-3
    ("ipo_sum", {}, 3, -1, 9, 6, -6),
    ("ipo_sum", {}, -1, 2, 16, -8, 8),
    ("alpha_dpo", {"rainbow_gamma": 0.4}, 3, -1, sp(-0.05), -H / 2 * sg(-0.05), H / 3 * sg(-0.05)),
    ("dr_dpo", {"dr_dpo_beta": 0.3}, 3, -1, sp(-2), -H * sg(-2), H * sg(-2)),
    ("odpo", {"odpo_alpha": 2.0}, 3, -1, sp(-1), -H * sg(-1), H * sg(-1)),  # 2 - 2 * 0.5
    ("odpo", {"odpo_alpha": 0.0}, -1, 2, sp(1.5), -H * sg(1.5), H * sg(1.5)),
    ("modpo", {"modpo_weight": 0.25}, 3, -1, sp(-6.5), -2 * sg(-6.5), 2 * sg(-6.5)),  # (2 - 0.75 * 0.5) / 0.25
    ("modpo", {"modpo_weight": 1.0}, -1, 2, sp(1.5), -H * sg(1.5), H * sg(1.5)),
    ("sppo", {}, 3, -1, (3 - T) ** 2 + (T - 1) ** 2, 2 * (3 - T), 2 * (T - 1)),
    ("sppo", {}, -1, 2, (1 + T) ** 2 + (2 + T) ** 2, -2 * (1 + T), 2 * (2 + T)),
    of_x("cauchy", {}, 3, -1, -log(0.5 + math.atan(2) / math.pi), -1 / (5 * (math.pi / 2 + math.atan(2)))),
    of_x("cauchy", {}, -1, 2, -log(0.5 - math.atan(1.5) / math.pi), -1 / (3.25 * (math.pi / 2 - math.atan(1.5)))),
    *[
        of_x("focal_po", {"focal_po_gamma": 0.5}, r_w, r_l, sg(x) ** 0.5 * sp(-x), -(sg(x) ** 0.5) * sg(-x) * rest)
        for r_w, r_l, x in ((3, -1, 2), (-1, 2, -1.5))
        for rest in [1 - 0.5 * sp(-x)]
    ],
    ("h_dpo", {"h_dpo_alpha": 0.8}, 3, -1, sp(-1.7), -H * 0.8 * sg(-1.7), H * 0.8 * sg(-1.7)),  # 0.5 (0.8 * 3 + 1)
    ("dpo_shift", {"rejected_weight": 0.6}, 3, -1, sp(-1.8), -H * sg(-1.8), 0.6 * H * sg(-1.8)),
    ("dpo_shift", {"rejected_weight": 0.6}, -1, 2, sp(1.1), -H * sg(1.1), 0.6 * H * sg(1.1)),
    ("bpo", {"rejected_weight": 0.5}, 3, -1, sp(-0.25), 0, 0.5 * H * sg(-0.25)),
    ("bpo", {"rejected_weight": 0.5}, -1, 1, sp(0.5), -H * sg(0.5), 0),
    ("minor_dpo", {}, 3, -1, sp(-1.5), -H * sg(-1.5), 0),
    ("minor_dpo", {}, -1, 2, sp(1.5), -H * sg(1.5), H * sg(1.5)),
    *[
        of_x("mallows", options, r_w, r_l, sp(-w * x), -w * sg(-w * x))
        for r_w, r_l, x in ((3, -1, 2), (-1, 2, -1.5))
        for options, w in (
            ({}, 0.58),
            ({"mallows_phi": 1.5}, 3),
            ({"mallows_max_entropy": ENTROPY * exp(0.5), "mallows_phi": 2.0}, 1),
            ({"mallows_max_entropy": ENTROPY / 2}, 0),  # more than blind guessing
            ({"mallows_max_entropy": ENTROPY * 1e9}, 0.29 * 6 * log(10)),  # as sure as can be
        )
    ],
    ("c2_dpo", {"c2_dpo_lambda": 0.1}, 3, -1, sp(-2) + 0.1 * 4, -H * sg(-2) + 0.2 * 2, H * sg(-2) + 0.2 * 2),
    ("c2_dpo", {"c2_dpo_lambda": 0.1}, -1, 2, sp(1.5) + 0.1, -H * sg(1.5) + 0.2, H * sg(1.5) + 0.2),
    *[
        of_x("sba", {"sba_lambda": power}, r_w, r_l, value(x), slope(x))
        for r_w, r_l, x in ((3, -1, 2), (-1, 2, -1.5))
        for power, value, slope in (
            (-0.5, lambda x: exp(-x / 2) - 0.5, lambda x: -exp(-x / 2) / 2),
            (0.0, lambda x: (exp(-x) - x) / 4, lambda x: -(exp(-x) + 1) / 4),
            (1.0, lambda x: (exp(-2 * x) / 2 - exp(x) + 1) / 4, lambda x: -(exp(-2 * x) + exp(x)) / 4),
        )
    ],
    *[
        (name, E, r_w, r_l, 0.8 * sp(-x) + 0.2 * sp(x), H * (sg(x) - 0.8), -H * (sg(x) - 0.8))
        for name in ("aot", "aot_unpaired")
        for r_w, r_l, x in ((3, -1, 2), (-1, 2, -1.5))
    ],
]


@pytest.mark.parametrize("point", POINTS, ids=lambda p: f"{p[0]}-{p[1]}-{p[2]},{p[3]}")
def test_away_from_the_reference(point):
    loss_type, options, r_w, r_l, *expected = point
    scaled = {} if loss_type == "sft" else {"beta": H}
    got = value_and_slopes(DPOLoss(**{"loss_type": loss_type} | scaled | options), r_w, r_l, {})
    assert got == pytest.approx(expected, rel=1e-12, abs=1e-14)


def test_each_variant_stands_in_both_tables():
    assert set(AT_REFERENCE) == set(DPO_TYPES) == {point[0] for point in POINTS}


def test_beta_dpo_compares_the_mean_margin_with_the_earlier_steps():
    """0.5 (1 + 0.6 (4 - 3)) = 0.8."""
    loss = DPOLoss(loss_type="beta_dpo", beta=H)
    assert value_and_slopes(loss, 3, -1, {"margin": 3.0}) == pytest.approx((sp(-3.2), -0.8 * sg(-3.2), 0.8 * sg(-3.2)))
    slow = (sp(-0.004), -1e-3 * sg(-0.004), 1e-3 * sg(-0.004))
    assert value_and_slopes(loss, 3, -1, {"margin": 1e3}) == pytest.approx(slow, rel=1e-12)


def of_step(loss: DPOLoss, pairs: list[tuple[float, float]]) -> tuple[float, list[float]]:
    """The loss of pairs of one token each, with these log-ratios to a reference of log-probs -1, and dL/d(chosen)."""
    chosen, rejected = (torch.tensor(r, dtype=torch.float64)[:, None] - 1 for r in zip(*pairs, strict=True))
    chosen.requires_grad_()
    policy, ref = (
        PairLogps(*(CompletionLogps(x, torch.ones_like(x).bool()) for x in sides))
        for sides in ((chosen, rejected), (torch.full_like(chosen, -1), torch.full_like(chosen, -1)))
    )
    value = loss(policy, ref, totals=Totals.of(policy, loss.collect(policy, ref))).loss
    value.backward()
    return value.item(), chosen.grad[:, 0].tolist()


def test_dr_dpo_is_a_soft_minimum_over_the_step():
    """Losses sp(-1) and sp(1), b = 0.5: exp(-2 l) = s(1)^2 and s(-1)^2."""
    value, slopes = of_step(DPOLoss(loss_type="dr_dpo", beta=1.0, dr_dpo_beta=0.5), [(1.0, 0.0), (-1.0, 0.0)])
    right, wrong = sg(1) ** 2, sg(-1) ** 2
    assert value == pytest.approx(-0.5 * log((right + wrong) / 2), rel=1e-12)
    share = right / (right + wrong)
    assert slopes == pytest.approx([-share * sg(-1), -(1 - share) * sg(1)], rel=1e-12)


def test_alpha_dpo_asks_more_of_pairs_that_are_ahead_of_the_step():
    """Gaps 3, 1, -1: mean 1, deviation 2, scores 1, 0, -1; D is the gap."""
    loss = DPOLoss(loss_type="alpha_dpo", beta=0.5, alpha_dpo_coef=0.2, rainbow_gamma=0.4)
    value, slopes = of_step(loss, [(3.0, 0.0), (0.0, -1.0), (-1.0, 0.0)])
    margins = [0.5 * (3 - 0.6), 0.5 * (1 - 0.4), 0.5 * (-1 - 0.2)]
    assert value == pytest.approx(sum(map(sp, [-x for x in margins])) / 3, rel=1e-12)
    assert slopes == pytest.approx([-0.5 * sg(-x) / 3 for x in margins], rel=1e-12)
    alike = [(1.0, 0.0), (1 + 1e-9, 0.0)]  # but for what may be rounding, of which no score is made
    assert of_step(loss, alike)[1] == pytest.approx([-0.25 * sg(-0.5 * (1 - 0.4))] * 2, rel=1e-8)


@pytest.mark.parametrize(
    ("size", "spread", "scores"), [(-1e3, 1e-4, (0, 0)), (1e3, 1e-4, (0, 0)), (1e-3, 1e-4, (-1, 1)), (0.0, 0.0, (0, 0))]
)
def test_what_is_rounding_is_relative_to_the_gaps(size, spread, scores):
    """Scores of two pairs are +-1/sqrt(2), or 0 where they differ by less than a millionth of themselves."""
    beta = 1 / max(abs(size), 1)
    loss = DPOLoss(loss_type="alpha_dpo", beta=beta, alpha_dpo_coef=1 / beta, rainbow_gamma=0.0)
    gaps = (size, size + spread)
    margins = [beta * gap - z / math.sqrt(2) for gap, z in zip(gaps, scores, strict=True)]
    slopes = of_step(loss, [(gap, 0.0) for gap in gaps])[1]
    assert slopes == pytest.approx([-beta * sg(-x) / 2 for x in margins], rel=1e-9)


def test_cauchy_keeps_its_digits_in_both_tails():
    """1/2 + atan(x)/pi is 1/(pi |x|) far on the left and 1 - 1/(pi x) on the right."""
    for r, expected in ((1e4, 1 / (math.pi * 1e4)), (-1e4, log(math.pi * 1e4))):
        policy, ref = (
            PairLogps(*(CompletionLogps(torch.tensor([[x]]), torch.ones(1, 1).bool()) for x in (a, 0.0)))
            for a in (r, 0.0)
        )
        got = DPOLoss(loss_type="cauchy", beta=1.0)(policy, ref, totals=Totals.of(policy)).loss.item()
        assert got == pytest.approx(expected, rel=5e-5)


def test_exponents_stop_at_forty():
    """discopop at tau = 2: exp(-x / 2), at x = -200 held at exp(40) with no slope; chi_po: exp(r_w)."""
    got = value_and_slopes(DPOLoss(loss_type="discopop", discopop_tau=2.0, beta=1.0), -200.0, 0.0, {})
    assert got == pytest.approx((exp(40), -1.0, 1.0), rel=1e-12)
    got = value_and_slopes(DPOLoss(loss_type="discopop", discopop_tau=2.0, beta=1.0), -78.0, 0.0, {})
    assert got == pytest.approx((exp(39), -exp(39) / 2, exp(39) / 2), rel=1e-12)
    got = value_and_slopes(DPOLoss(loss_type="sba", beta=1.0), -200.0, 0.0, {})  # R^(1/2) twice, the first times 2
    assert got == pytest.approx((exp(40) - 0.5, 0, 0), rel=1e-12)
    got = value_and_slopes(DPOLoss(loss_type="sba", beta=1.0, sba_lambda=1.0), 50.0, 0.0, {})
    assert got == pytest.approx(((exp(-40) / 2 - exp(40) + 1) / 4, 0, 0), rel=1e-12, abs=1e-17)
    got = value_and_slopes(DPOLoss(loss_type="chi_po", beta=1e-17), 50.0, 0.0, {})
    x = 1e-17 * exp(40)
    assert got == pytest.approx((sp(-x), -1e-17 * sg(-x), 2e-17 * sg(-x)), rel=1e-12, abs=1e-25)
    got = value_and_slopes(DPOLoss(loss_type="chi_po", beta=1e-17), 39.0, 0.0, {})
    x = 1e-17 * exp(39)
    assert got == pytest.approx((sp(-x), -x * sg(-x), 2e-17 * sg(-x)), rel=1e-9, abs=1e-25)


@pytest.mark.parametrize(
    "loss_type",
    [
        "sigmoid",
        "cdpo",
        "exo_pair",
        "robust",
        "discopop",
        "beta_dpo",
        "chi_po",
        "dpop",
        "cauchy",
        "focal_po",
        "dr_dpo",
        "sba",
    ],
)
def test_finite_in_float32_wherever_the_ratios_are(loss_type):
    for r_w, r_l in ((1e4, -1e4), (-1e4, 1e4), (-200.0, 0.0), (100.0, 100.0)):
        policy = PairLogps(
            *(CompletionLogps(torch.tensor([[r]], requires_grad=True), torch.ones(1, 1).bool()) for r in (r_w, r_l))
        )
        ref = PairLogps(*(CompletionLogps(torch.zeros(1, 1), torch.ones(1, 1).bool()) for _ in range(2)))
        smoothing = {"label_smoothing": 0.01} if loss_type in DPO_TYPES.readers("label_smoothing") else {}
        loss = DPOLoss(loss_type=loss_type, **smoothing)
        value = loss(policy, ref, totals=Totals.of(policy, loss.collect(policy, ref))).loss
        value.backward()
        assert value.isfinite() and policy.chosen.per_token_logps.grad.isfinite().all()


@pytest.mark.parametrize(
    "loss_type", ["sigmoid_norm", "cdpo", "robust", "bco_pair", "irpo", "dpop", "r_dpo", "beta_dpo"]
)
def test_small_losses_keep_their_digits(loss_type):
    """At a margin of 24 the loss is log(1 + exp(-24)), and its wrong side 24 more: no threshold cuts the logarithm."""
    smoothing = {"label_smoothing": 0.25} if loss_type in DPO_TYPES.readers("label_smoothing") else {}
    plain = {"irpo_alpha": 0.0} if loss_type == "irpo" else {}
    loss = DPOLoss(loss_type=loss_type, beta=1.0, **smoothing, **plain)
    for r_w in (24.0, -24.0):
        policy, ref = (PairLogps(one([r]), one([0.0])) for r in (r_w, 0.0))
        value = loss(policy, ref, totals=Totals.of(policy, loss.collect(policy, ref) * 0)).loss.item()
        right, wrong = math.log1p(exp(-24)), 24 + math.log1p(exp(-24))
        near, far = (right, wrong) if r_w > 0 else (wrong, right)
        expected = {
            "cdpo": 0.75 * near + 0.25 * far,
            "robust": (0.75 * near - 0.25 * far) / 0.5,
            "bco_pair": near + math.log(2),
            "dpop": near if r_w > 0 else 51 * 24,
        }.get(loss_type, near)
        assert value == pytest.approx(expected, rel=1e-14)


def one(logps: list[float]) -> CompletionLogps:
    return CompletionLogps(torch.tensor([logps], dtype=torch.float64), torch.ones(1, len(logps)).bool())
