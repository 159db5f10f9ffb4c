"""Corrections for what was sampled: numbers by hand, what is logged, what is refused, and their laws."""

import dataclasses
import math
from math import log, nan, sqrt
from typing import Any

import pytest
import torch
from torch import Tensor

from logratio.losses import GRPO_TYPES, SAMPLING_CORRECTIONS, CompletionLogps, GRPOLoss, LossOutput, Totals
from logratio.reference import family_laws_grpo as laws
from logratio.reference._law_runs import run
from logratio.reference.strategies import Batch

from ._families import breaks, keeps, refused

# pi / mu = 2, a hole, 1/4 of a completion with A = 2; 4, 2 of one with A = -1. A step of 4 completions, 10 tokens.
PI = [[0.4, nan, 0.1], [0.8, 0.2, nan]]
MU = [[0.2, nan, 0.4], [0.2, 0.1, nan]]
STEP = Totals(num_sequences=4, num_tokens=10)
CORRECTED = [name for name in SAMPLING_CORRECTIONS if name != "none"]


def logps(probabilities: list[list[float]]) -> CompletionLogps:
    """NaN is a hole in the mask."""
    values = torch.tensor(probabilities, dtype=torch.float64).log()
    return CompletionLogps(values.requires_grad_(), ~values.detach().isnan())


def output(
    policy: CompletionLogps, advantages: tuple[float, ...] = (2.0, -1.0), mu: Any = MU, **options: Any
) -> LossOutput:
    behavior, given = logps(mu), torch.tensor(advantages, dtype=torch.float64)
    out = GRPOLoss(**options)(policy, advantages=given, behavior=behavior, totals=STEP)
    out.loss.backward()
    assert behavior.per_token_logps.grad is None
    return out


ROOT = sqrt(2)


@pytest.mark.parametrize(
    ("correction", "bounds", "advantages", "weights"),
    [
        ("none", (None, None), (2, -1), [1, 1, 1, 1]),
        ("token_truncate", (None, None), (2, -1), [2, 0.25, 3, 2]),
        ("token_truncate", (0.5, None), (2, -1), [2, 0.5, 3, 2]),
        ("token_truncate", (None, 1.5), (2, -1), [1.5, 0.25, 1.5, 1.5]),
        ("token_mask", (None, None), (2, -1), [2, 0.25, 0, 2]),
        ("token_mask", (0.5, 4.5), (2, -1), [2, 0, 4, 2]),
        ("sequence_truncate", (None, None), (2, -1), [0.5, 0.5, 3, 3]),
        ("sequence_mask", (None, None), (2, -1), [0.5, 0.5, 0, 0]),
        ("sequence_mask", (0.75, 9.0), (2, -1), [0, 0, 8, 8]),
        ("geometric_truncate", (None, None), (2, -1), [0.99, 0.99, 1.01, 1.01]),
        ("geometric_truncate", (0.5, 2.0), (2, -1), [1 / ROOT, 1 / ROOT, 2, 2]),
        ("geometric_mask", (0.5, 2.0), (2, -1), [1 / ROOT, 1 / ROOT, 0, 0]),
        ("geometric_mask", (0.75, 3.0), (2, -1), [0, 0, 2 * ROOT, 2 * ROOT]),
        ("icepop", (None, None), (2, -1), [2, 0, 4, 2]),
        ("icepop", (0.2, 3.5), (2, -1), [2, 0.25, 0, 2]),
        ("decoupled", (None, None), (2, -1), [2, 0.25, 4, 2]),
        # pi - mu = 0.2, -0.3; 0.6, 0.1: left out where the advantage would carry it further
        ("dppo_tv", (None, None), (2, -1), [0, 0.25, 4, 2]),
        ("dppo_tv", (None, None), (-2, 1), [2, 0, 0, 2]),
        ("dppo_tv", (None, None), (0.5, -0.5), [0, 0.25, 4, 2]),
        ("dppo_tv", (-0.25, 0.25), (2, -1), [2, 0.25, 4, 2]),
        ("dppo_tv", (-0.35, 0.65), (-2, 1), [2, 0.25, 4, 2]),
        # KL(mu || pi) of two outcomes = 0.0915, 0.3112; 0.8318, 0.0367, the second falling
        ("dppo_kl", (None, None), (2, -1), [0, 0.25, 4, 2]),
        ("dppo_kl", (None, None), (-2, 1), [2, 0, 0, 2]),
        ("dppo_kl", (-0.1, 0.1), (2, -1), [2, 0.25, 4, 2]),
        ("dppo_kl", (-0.3, 0.83), (-2, 1), [2, 0, 0, 2]),
        ("dppo_kl", (-0.32, 0.84), (-2, 1), [2, 0.25, 4, 2]),
        ("dppo_kl", (-0.3, 0.03), (2, 1), [0, 0.25, 0, 0]),
        ("ipo", (None, 0.25), (2, -1), [2, 0, 0, 2]),
        ("ipo", (None, 0.25), (-2, 1), [2, 0, 0, 2]),
        ("ipo", (-0.35, 0.15), (2, -1), [0, 0.25, 0, 2]),
    ],
)
def test_the_policy_term_is_weighed(correction, bounds, advantages, weights):
    """On policy a token of dapo gives -A w / N, and the same as its slope."""
    names = ("sampling_clip_min", "sampling_clip_max")
    given = {name: bound for name, bound in zip(names, bounds, strict=True) if bound is not None}
    policy = logps(PI)
    out = output(policy, advantages, sampling_correction=correction, **given)
    a, b = advantages
    expected = [-a * weights[0] / 10, -a * weights[1] / 10, -b * weights[2] / 10, -b * weights[3] / 10]
    assert out.loss.item() == pytest.approx(sum(expected), rel=1e-12)
    grad = policy.per_token_logps.grad
    assert grad is not None
    assert grad[policy.completion_mask].tolist() == pytest.approx(expected, rel=1e-12)


def test_a_ratio_to_the_sampler_stops_at_exp_40():
    mu = [[math.exp(-100), 0.5]]
    out = output(logps([[1.0, 0.5]]), (1.0,), mu, sampling_correction="decoupled")
    assert out.loss.item() == pytest.approx(-(math.exp(40) + 1) / 10, rel=1e-12)


def test_default_ranges():
    assert {name: (kind.clip_min, kind.clip_max) for name, kind in SAMPLING_CORRECTIONS.items() if kind.bound} == {
        "token_truncate": (0, 3),
        "token_mask": (0, 3),
        "sequence_truncate": (0, 3),
        "sequence_mask": (0, 3),
        "geometric_truncate": (0.99, 1.01),
        "geometric_mask": (0.99, 1.01),
        "icepop": (0.5, 5),
        "decoupled": (0, 3),  # which it does not read
        "dppo_tv": (-0.15, 0.15),
        "dppo_kl": (-0.05, 0.05),
        "ipo": (-0.2, 0.2),
    }


@pytest.mark.parametrize("ratio", [0.25, 4.0])
def test_of_one_token_all_levels_are_the_same(ratio):
    """And what is masked, where the ratio is 1, is neither the smallest nor the largest."""
    policy, behavior = logps([[0.2, nan]]), logps([[0.2 / ratio, nan]])
    for level in ("token", "sequence", "geometric"):
        loss = GRPOLoss(sampling_correction=f"{level}_mask", sampling_clip_min=0.2, sampling_clip_max=5.0)
        out = loss(policy, advantages=torch.ones(1), behavior=behavior, totals=Totals.of(policy))
        assert out.loss.item() == pytest.approx(-ratio)
        for name in ("ratio_mean", "ratio_min", "ratio_max"):
            assert out.metrics[f"sampling/{name}"].value == pytest.approx(ratio)
        assert out.metrics["sampling/logp_diff_max"].value == pytest.approx(log(4))


def test_a_completion_without_an_advantage_is_not_counted_as_left_out():
    out = output(logps(PI), (0.0, 0.0), sampling_correction="dppo_tv")
    assert out.metrics["sampling/masked_mean"].value == 0


def test_decoupled_ppo_clips_to_the_old_policy_and_weighs_by_it():
    """pi / old = 3/2 with A = 1 is held at 1.2, and without a slope; old / mu = 2 in both. 1.1 is not held."""
    policy, old, behavior = logps([[0.6, 0.22]]), logps([[0.4, 0.2]]), logps([[0.2, 0.1]])
    loss = GRPOLoss(sampling_correction="decoupled")
    totals = Totals(num_sequences=1, num_tokens=1)
    given = {"advantages": torch.ones(1, dtype=torch.float64), "totals": totals}
    out = loss(policy, old=old, behavior=behavior, **given)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(-2 * 1.2 - 2 * 1.1)
    assert policy.per_token_logps.grad.tolist()[0] == pytest.approx([0, -2 * 1.1])


def test_the_kl_term_is_not_weighed():
    """k3 at pi / ref = 1/2 is 2 - ln 2 - 1, of two tokens that a mask leaves out."""
    policy, ref, behavior = logps([[0.2, 0.2]]), logps([[0.4, 0.4]]), logps([[0.02, 0.02]])
    loss = GRPOLoss(sampling_correction="token_mask", beta=0.5)
    given = {"advantages": torch.ones(1, dtype=torch.float64), "behavior": behavior, "totals": Totals.of(policy)}
    assert loss(policy, ref, **given).loss.item() == pytest.approx(0.5 * (1 - log(2)))


@pytest.mark.parametrize(
    ("correction", "ratios", "outside"),
    [
        ("none", [2.0625, 0.25, 4], None),
        ("token_truncate", [2.0625, 0.25, 4], ("truncated", 1 / 4)),
        ("icepop", [2.0625, 0.25, 4], ("masked", 1 / 4)),
        ("decoupled", [2.0625, 0.25, 4], None),
        ("sequence_mask", [4.25, 0.5, 8], ("masked", 1 / 2)),
        ("sequence_truncate", [4.25, 0.5, 8], ("truncated", 1 / 2)),
        ("geometric_mask", [(1 / ROOT + 2 * ROOT) / 2, 1 / ROOT, 2 * ROOT], ("masked", 1)),
        ("dppo_tv", [2.0625, 0.25, 4], ("masked", 1 / 4)),
    ],
)
def test_what_is_logged(correction, ratios, outside):
    """The ratios before their bounds, of tokens or of the two completions that have any."""
    policy, behavior = logps([*PI, [nan] * 3]), logps([*MU, [nan] * 3])
    given = torch.tensor([2.0, -1.0, 1.0], dtype=torch.float64)
    out = GRPOLoss(sampling_correction=correction)(policy, advantages=given, behavior=behavior, totals=STEP)
    found = {name.removeprefix("sampling/"): m.value for name, m in out.metrics.items() if name.startswith("sampling")}
    expected = {"logp_diff_mean": 1.5 * log(2), "logp_diff_max": 2 * log(2)}
    expected |= dict(zip(("ratio_mean", "ratio_min", "ratio_max"), ratios, strict=True))
    expected |= {} if outside is None else {f"{outside[0]}_mean": outside[1]}
    assert found == pytest.approx(expected, rel=1e-12)
    out.loss.backward()
    assert policy.per_token_logps.grad is not None and policy.per_token_logps.grad.isfinite().all()


def test_the_off_policy_mask_is_measured_from_what_sampled():
    """log mu - log pi is -ln 2, 2 ln 2 of a completion with A < 0: its mean is 0.35, though old = pi."""
    policy, behavior = logps(PI[:1]), logps(MU[:1])
    given = {"advantages": torch.tensor([-1.0], dtype=torch.float64), "totals": Totals(num_sequences=1, num_tokens=2)}
    for threshold, value in ((0.3, 0.0), (0.4, 1.0)):
        loss = GRPOLoss(off_policy_mask_threshold=threshold)
        assert loss(policy, behavior=behavior, **given).loss.item() == value
        assert loss(policy, **given).loss.item() == 1.0


def test_a_token_that_the_sampler_does_not_know_is_found_out():
    mu = torch.tensor(MU, dtype=torch.float64).log()
    mu[1, 1] = nan
    policy = logps(PI)
    behavior = CompletionLogps(mu, policy.completion_mask)
    given = torch.tensor([2.0, -1.0], dtype=torch.float64)
    for name in CORRECTED:
        loss = GRPOLoss(sampling_correction=name)
        assert loss(policy, advantages=given, behavior=behavior, totals=STEP).loss.isnan(), name


# ---------------------------------------------------------------------------------------------- what is refused
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"sampling_correction": "tis"},
            "sampling_correction='tis' is unknown, expected one of: none, token_truncate, token_mask, "
            "sequence_truncate, sequence_mask, geometric_truncate, geometric_mask, icepop, decoupled, dppo_tv, "
            "dppo_kl, ipo",
        ),
        (
            {"sampling_clip_max": 2.0},
            "sampling_clip_max=2.0 is not read by sampling_correction none; leave it out: it is an option of all but "
            "none, decoupled",
        ),
        (
            {"sampling_correction": "decoupled", "sampling_clip_min": 0.5},
            "sampling_clip_min=0.5 is not read by sampling_correction decoupled; leave it out: it is an option of all "
            "but none, decoupled",
        ),
        (
            {"sampling_correction": "token_mask", "sampling_clip_max": 0.9},
            "sampling_clip_min=0 and sampling_clip_max=0.9 must have 1 between them for sampling_correction "
            "token_mask: it is what they bound where sampling and training agree",
        ),
        (
            {"sampling_correction": "icepop", "sampling_clip_min": 1.5},
            "sampling_clip_min=1.5 and sampling_clip_max=5 must have 1 between them for sampling_correction icepop: "
            "it is what they bound where sampling and training agree",
        ),
        (
            {"sampling_correction": "dppo_tv", "sampling_clip_min": 0.1},
            "sampling_clip_min=0.1 and sampling_clip_max=0.15 must have 0 between them for sampling_correction "
            "dppo_tv: it is what they bound where sampling and training agree",
        ),
        (
            {"sampling_correction": "sequence_mask", "sampling_clip_min": -0.1},
            "sampling_clip_min=-0.1 must not be negative for sequence_mask: no ratio is below 0",
        ),
        ({"sampling_correction": "token_mask", "sampling_clip_max": math.inf}, "sampling_clip_max=inf must be finite"),
        (
            {"sampling_correction": "token_mask", "loss_type": "gmpo"},
            "sampling_correction=token_mask does not fit loss_type gmpo; take one of: sequence_truncate, "
            "sequence_mask, geometric_truncate, geometric_mask",
        ),
        (
            {"sampling_correction": "sequence_mask", "loss_type": "vespo"},
            "sampling_correction=sequence_mask does not fit loss_type vespo; take one of: token_truncate, token_mask, "
            "icepop, decoupled",
        ),
        (
            {"sampling_correction": "dppo_tv", "loss_type": "rloo"},
            "sampling_correction=dppo_tv does not fit loss_type rloo; take one of: sequence_truncate, sequence_mask, "
            "geometric_truncate, geometric_mask",
        ),
    ],
)
def test_options_that_mean_nothing_are_refused(options, message):
    with refused(message):
        GRPOLoss(**options)


def test_a_correction_without_the_samplers_log_probs_is_refused():
    policy, given = logps(PI), torch.tensor([2.0, -1.0], dtype=torch.float64)
    assert GRPOLoss().wants_behavior
    with refused("sampling_correction=icepop needs the sampler's log-probs, `behavior`"):
        GRPOLoss(sampling_correction="icepop")(policy, advantages=given, totals=STEP)


def test_rows_that_would_broadcast_are_refused():
    policy, given = logps(PI), torch.tensor([2.0, -1.0], dtype=torch.float64)
    for behavior, shape in ((logps(MU[:1]), "[1, 3]"), (logps([row[:1] for row in MU]), "[2, 1]")):
        with refused(f"behavior must have the policy's rows and tokens, got {shape} for [2, 3]"):
            GRPOLoss()(policy, advantages=given, behavior=behavior, totals=STEP)


# ---------------------------------------------------------------------------------------------- laws
def fits(loss_type: str, correction: str) -> bool:
    return SAMPLING_CORRECTIONS[correction].level in GRPO_TYPES[loss_type].corrected


@pytest.mark.parametrize("loss_type", GRPO_TYPES)
def test_on_policy_every_correction_is_the_identity(loss_type):
    plain = GRPOLoss(loss_type=loss_type)
    for correction in (name for name in CORRECTED if fits(loss_type, name)):
        loss = dataclasses.replace(plain, sampling_correction=correction)
        keeps(lambda batch, loss=loss: laws.corrected_on_policy(loss, plain, batch), "grouped", max_examples=3)


@pytest.mark.parametrize("correction", [name for name in CORRECTED if name != "decoupled"])
def test_what_is_at_its_bound_is_inside(correction):
    """On policy the narrowest range is the identity, and nothing is outside of it."""
    at = SAMPLING_CORRECTIONS[correction].neutral
    loss = GRPOLoss(sampling_correction=correction, sampling_clip_min=at, sampling_clip_max=at)

    def law(batch: Batch) -> None:
        laws.corrected_on_policy(loss, GRPOLoss(), batch)
        metrics = run(loss, laws.put_role(batch, old="policy", behavior="policy")).metrics
        assert sum(m.total for name, m in metrics.items() if name.endswith(("masked_mean", "truncated_mean"))) == 0

    keeps(law, "grouped", max_examples=3)


def test_the_identity_is_broken_off_policy():
    def off(batch: Batch) -> None:
        got, plain = (run(GRPOLoss(**options), batch) for options in ({"sampling_correction": "decoupled"}, {}))
        assert got.loss == plain.loss

    with pytest.raises(AssertionError):
        keeps(off, "grouped", shrink=False)


TO_THE_SAMPLER = ("prime", "m2po")
"""What a penalty or a ratio of theirs is to, corrected or not."""


@pytest.mark.parametrize("loss_type", [name for name in GRPO_TYPES if name not in TO_THE_SAMPLER])
def test_without_a_correction_the_sampler_is_only_seen(loss_type):
    keeps(lambda batch: laws.only_seen(GRPOLoss(loss_type=loss_type), batch), "grouped", max_examples=3)


def exp(x: Tensor) -> Tensor:
    return x.clamp(max=40).exp()


def total(x: Tensor) -> Tensor:
    return x.sum(-1, keepdim=True)


def inside(w: Tensor, low: float, high: float) -> Tensor:
    return torch.where((w >= low) & (w <= high), w, 0.0)


WEIGHTS = {
    "token_truncate": lambda r: exp(r).clamp(max=3),
    "token_mask": lambda r: inside(exp(r), 0, 3),
    "sequence_truncate": lambda r: exp(total(r)).clamp(max=3),
    "sequence_mask": lambda r: inside(exp(total(r)), 0, 3),
    "icepop": lambda r: inside(exp(r), 0.5, 5),
    "decoupled": exp,
}


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "luspo", "cispo", "sapo", "dr_grpo"])
def test_weights_are_constants_and_leave_the_divisors_alone(loss_type):
    plain = GRPOLoss(loss_type=loss_type)
    for correction, weight in WEIGHTS.items():
        loss = dataclasses.replace(plain, sampling_correction=correction)

        def law(batch: Batch, loss: GRPOLoss = loss, weight: Any = weight) -> None:
            laws.constant_weights(loss, plain, batch, weight)

        keeps(law, "grouped", max_examples=3)
        if loss_type == "dapo" and correction != "decoupled":
            breaks(
                lambda batch, loss=loss: laws.constant_weights(loss, plain, batch, exp), "constant_weights", "grouped"
            )


@pytest.mark.parametrize("correction", [name for name in CORRECTED if name != "decoupled"])
def test_a_wider_range_weighs_no_less(correction):
    ratio = SAMPLING_CORRECTIONS[correction].neutral == 1
    narrow, wider = (
        GRPOLoss(sampling_correction=correction, sampling_clip_min=low, sampling_clip_max=high)
        for low, high in ([(0.0, 1.0), (0.0, 2.0)] if ratio else [(-0.01, 0.01), (-1.0, 1.0)])
    )
    keeps(lambda batch: laws.monotone_range(narrow, wider, batch), "grouped")
    breaks(lambda batch: laws.monotone_range(wider, narrow, batch), "monotone_range", "grouped", max_examples=60)
