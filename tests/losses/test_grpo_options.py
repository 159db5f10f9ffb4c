"""GRPO's options by hand: KL estimators, entropy, its quantile, the off-policy mask, and what has no meaning."""

import dataclasses
import math
from math import exp, log, nan
from typing import Any

import pytest
import torch
from torch import Tensor

from logratio.losses import GRPO_TYPES, KL_ESTIMATORS, CompletionLogps, GRPOLoss, LossOutput, Totals

# rho = 3/2, a hole, 1/2 of a completion with A = 2; 3/2, 1/2 of one with A = -1. A step of 4 completions, 10 tokens.
RATIOS = [[1.5, nan, 0.5], [1.5, 0.5, nan]]
OLD = [[-1.0, nan, -3.0], [-4.0, -5.0, nan]]
LOGPS = [[a + log(r) for a, r in zip(*rows, strict=True)] for rows in zip(OLD, RATIOS, strict=True)]
ENTROPY = [[1.0, nan, 3.0], [4.0, 2.0, nan]]
ADVANTAGES = [2.0, -1.0]
STEP = {"num_sequences": 4, "num_tokens": 10}

Table = list[list[float]]


def logps(rows: Table, entropy: Table | None = None) -> CompletionLogps:
    """NaN is a hole in the mask."""
    values = torch.tensor(rows, dtype=torch.float64)
    kept = None if entropy is None else torch.tensor(entropy, dtype=torch.float64, requires_grad=True)
    return CompletionLogps(values.requires_grad_(), ~values.detach().isnan(), kept)


def output(loss: GRPOLoss, policy: CompletionLogps, ref: Table | None = None, **others: Any) -> LossOutput:
    advantages = torch.tensor(others.pop("advantages", ADVANTAGES), dtype=torch.float64)
    reference = None if ref is None else logps(ref)
    out = loss(policy, reference, advantages=advantages, old=logps(OLD), totals=Totals(**STEP | others))
    out.loss.backward()
    assert reference is None or reference.per_token_logps.grad is None
    return out


def scored(values: Tensor) -> list[float]:
    return values[~torch.tensor(RATIOS).isnan()].tolist()


PLAIN = {"losses": [-2.4, -1.0, 1.5, 0.8], "slopes": [0, -1.0, 1.5, 0]}
"""Of dapo at beta = 0, times 10."""


def test_defaults():
    assert dataclasses.asdict(GRPOLoss()) == {
        "loss_type": "dapo",
        "loss_aggregation": None,
        "beta": 0.0,
        "kl_estimator": "k3",
        "use_bias_correction_kl": True,
        "epsilon": None,
        "epsilon_high": None,
        "delta": None,
        "importance_sampling_level": "token",
        "off_policy_mask_threshold": None,
        "sampling_correction": "none",
        "sampling_clip_min": None,
        "sampling_clip_max": None,
        "top_entropy_quantile": 1.0,
        "entropy_coef": 0.0,
        "positive_nll_coef": 0.0,
        "optimal_token_baseline": False,
        "max_completion_length": 512,
        "log_ratio_coef": 1e-3,
        "pspo_alpha": 0.1,
        "fipo_half_life": 32.0,
        "fipo_clip": 0.2,
        "sapo_temperature_pos": 1.0,
        "sapo_temperature_neg": 1.05,
        "a2po_beta": 1e-3,
        "m2po_threshold": 0.04,
        "cov_share": 2e-4,
        "clip_cov_low": 1.0,
        "clip_cov_high": 5.0,
        "kl_cov_coef": 1.0,
        "real_temperature": 0.5,
        "target_po_temperature": 1.0,
        "vespo_k_pos": 2.0,
        "vespo_lambda_pos": 3.0,
        "vespo_k_neg": 3.0,
        "vespo_lambda_neg": 2.0,
    }
    loss = GRPOLoss()
    assert (loss.stats, loss.window_pass, loss.scores_prompt, loss.scores_gold) == (("entropy",), None, False, False)


def test_epsilons():
    assert {name: GRPOLoss(loss_type=name).epsilons for name in GRPO_TYPES} == {
        name: {"gmpo": (0.4, 0.4), "cispo": (0.2, 5.0)}.get(name, (0.2, 0.2)) for name in GRPO_TYPES
    }
    assert GRPOLoss(loss_type="gmpo", epsilon=0.1).epsilons == (0.1, 0.1)
    assert GRPOLoss(epsilon=0.1, epsilon_high=0.28).epsilons == (0.1, 0.28)


# d = log p - log p_ref of the four tokens; k(d) and k'(d)
D = [0.5, -2.0, log(2), 0.0]
REF = [[LOGPS[0][0] - D[0], nan, LOGPS[0][2] - D[1]], [LOGPS[1][0] - D[2], LOGPS[1][1] - D[3], nan]]
KL = {
    "k1": (D, [1.0] * 4),
    "k2": ([d**2 / 2 for d in D], D),
    "k3": ([exp(-d) + d - 1 for d in D], [1 - exp(-d) for d in D]),
    "k3+": ([exp(-d) + d - 1 for d in D], D),
    "abs": ([abs(d) for d in D], [1.0, -1.0, 1.0, 0.0]),
}
RHO = [1.5, 0.5, 1.5, 0.5]


@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_kl_by_hand(estimator, corrected, level):
    """beta k(d), times rho where corrected: with the ratio's gradient. At A = 0, so that it is all there is."""
    k, slope = KL[estimator]
    loss = GRPOLoss(beta=0.5, kl_estimator=estimator, use_bias_correction_kl=corrected, importance_sampling_level=level)
    policy = logps(LOGPS)
    out = output(loss, policy, REF, advantages=[0.0, 0.0])
    if not corrected:
        values, slopes = k, slope
    elif level == "token":
        values = [r * x for r, x in zip(RHO, k, strict=True)]
        slopes = [r * (x + s) for r, x, s in zip(RHO, k, slope, strict=True)]
    else:  # g = sqrt(3/4), whose slope in each of its two tokens is g / 2
        g = 0.75**0.5
        values = [g * x for x in k]
        slopes = [g * (s + (k[at] + k[at + 1]) / 2) for s, at in zip(slope, (0, 0, 2, 2), strict=True)]
    assert out.loss.item() == pytest.approx(0.5 * sum(values) / 10, rel=1e-12)
    assert scored(policy.per_token_logps.grad) == pytest.approx([0.5 * s / 10 for s in slopes], rel=1e-12)
    assert out.metrics["kl"].total.item() == pytest.approx(sum(values), rel=1e-12)
    assert out.metrics["kl"].count.item() == 4


@pytest.mark.parametrize("loss_type", GRPO_TYPES.readers("beta"))
def test_the_kl_has_the_weights_of_the_loss(loss_type):
    """gmpo's is never corrected; the others' here neither, at ratio 1."""
    policy = logps(OLD)
    ref = [[x - log(2) for x in row] for row in OLD]
    loss = GRPOLoss(loss_type=loss_type, beta=0.5, max_completion_length=50)
    none = torch.zeros(2, dtype=torch.float64)
    collected = loss.collect(policy, advantages=none, old=logps(OLD)) if loss.window_pass else None
    value = output(loss, policy, ref, advantages=[0.0, 0.0], collected=collected).loss.item()
    k3 = log(2) - 0.5
    by_token = {"dr_grpo": 4 / 4 / 50} | dict.fromkeys(("luspo", "topr", "kimi"), 4 / 4)
    by_token |= dict.fromkeys(
        ("dapo", "bnpo", "cispo", "vespo", "reinforce", "prime", "fipo", "m2po", "clip_cov", "kl_cov"), 4 / 10
    )
    assert value == pytest.approx(0.5 * k3 * by_token.get(loss_type, 2 / 4), rel=1e-12)


def test_gmpos_kl_is_not_corrected():
    policy = logps(LOGPS)
    out = output(GRPOLoss(loss_type="gmpo", beta=0.5), policy, REF, advantages=[0.0, 0.0])
    assert out.loss.item() == pytest.approx(0.5 * sum(KL["k3"][0]) / 2 / 4, rel=1e-12)
    assert scored(policy.per_token_logps.grad) == pytest.approx([0.5 * s / 8 for s in KL["k3"][1]], rel=1e-12)


def test_the_exponent_of_k3_stops_at_forty():
    d = torch.tensor([-39.0, -50.0], dtype=torch.float64, requires_grad=True)
    k3 = KL_ESTIMATORS["k3"](d)
    k3.sum().backward()
    assert k3.tolist() == pytest.approx([exp(39) - 40, exp(40) - 51], rel=1e-12)
    assert d.grad.tolist() == pytest.approx([1 - exp(39), 1], rel=1e-12)


def test_entropy_bonus():
    """0.1 * (1 + 3 + 4 + 2) / 10, with a gradient in the entropy."""
    policy = logps(LOGPS, ENTROPY)
    out = output(GRPOLoss(entropy_coef=0.1), policy)
    assert out.loss.item() == pytest.approx((sum(PLAIN["losses"]) - 0.1 * 10) / 10, rel=1e-12)
    assert scored(policy.per_token_logps.grad) == pytest.approx([s / 10 for s in PLAIN["slopes"]])
    assert policy.entropy.grad.tolist() == [pytest.approx([-0.01, 0, -0.01]), pytest.approx([-0.01, -0.01, 0])]
    assert (out.metrics["entropy"].total.item(), out.metrics["entropy"].count.item()) == (10, 4)
    one, totals = logps([[-1.0]], [[3.0]]), Totals(num_sequences=1, num_tokens=1)
    out = GRPOLoss(entropy_coef=0.1)(one, advantages=torch.zeros(1), totals=totals)
    assert out.loss.item() == pytest.approx(-0.3, rel=1e-12)
    with pytest.raises(ValueError, match="this loss needs the policy's entropy of every token, which is None"):
        output(GRPOLoss(entropy_coef=0.1), logps(LOGPS))
    assert "entropy" not in output(GRPOLoss(), logps(LOGPS)).metrics


def test_entropies_are_collected():
    """Of scored tokens, without gradient."""
    loss = GRPOLoss(top_entropy_quantile=0.4)
    collected = loss.collect(logps(LOGPS, ENTROPY))
    assert loss.window_pass == "own" and collected.tolist() == [[1], [3], [4], [2]] and not collected.requires_grad


# Of the step's seven entropies 1, 2, 3, 3, 4, 5, 6 the quantile 1 - rho is at place 6 (1 - rho).
COLLECTED = torch.tensor([[5.0], [1], [3], [4], [3], [2], [6]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("share", "kept", "number"),
    [
        (0.0, [0, 0, 0, 0], 1),  # only the highest, which is elsewhere
        (1 / 3, [0, 0, 1, 0], 3),  # from place 4 on: 4, itself
        (0.4, [0, 0, 1, 0], 3),  # place 3.6: 3.6
        (0.5, [0, 1, 1, 0], 5),  # place 3: 3 and its like
        (0.999, [0, 1, 1, 1], 6),
    ],
)
def test_top_entropy_quantile(share, kept, number):
    """The policy term only of tokens at or above the step's quantile; the divisor stays, and so does the KL term."""
    policy = logps(LOGPS, ENTROPY)
    loss = GRPOLoss(top_entropy_quantile=share, beta=0.5, use_bias_correction_kl=False, entropy_coef=0.1)
    out = output(loss, policy, REF, collected=COLLECTED)
    k, slope = KL["k3"]
    bonus = 0.1 * sum(h * m for h, m in zip((1, 3, 4, 2), kept, strict=True)) / number
    expected = sum(x * m + 0.5 * y for x, m, y in zip(PLAIN["losses"], kept, k, strict=True)) / 10 - bonus
    assert out.loss.item() == pytest.approx(expected, rel=1e-12)
    slopes = [(x * m + 0.5 * y) / 10 for x, m, y in zip(PLAIN["slopes"], kept, slope, strict=True)]
    assert scored(policy.per_token_logps.grad) == pytest.approx(slopes, rel=1e-12)
    assert scored(policy.entropy.grad) == pytest.approx([-0.1 * m / number for m in kept])


def test_gmpo_averages_the_kept_tokens():
    """Entropies 1, 3 and 4, 2 against 3: the second and the first token; against 5, none: exp of nothing, no slope."""
    policy = logps(LOGPS, ENTROPY)
    loss = GRPOLoss(loss_type="gmpo", top_entropy_quantile=0.5, epsilon=1.0)
    out = output(loss, policy, collected=COLLECTED)
    assert out.loss.item() == pytest.approx((-2 * 0.5 + 1.5) / 4, rel=1e-12)
    assert scored(policy.per_token_logps.grad) == pytest.approx([0, -2 * 0.5 / 4, 1.5 / 4, 0], rel=1e-12)
    policy = logps(LOGPS, [[0.0] * 3] * 2)  # all the same, as where nothing is scored
    out = output(loss, policy, collected=torch.zeros(7, 1, dtype=torch.float64))
    assert out.loss.item() == pytest.approx((-2 + 1) * 0.75**0.5 / 4, rel=1e-12)
    policy = logps(LOGPS, ENTROPY)
    out = output(loss, policy, collected=torch.tensor([[5.0]], dtype=torch.float64))
    assert out.loss.item() == pytest.approx((-2 + 1) / 4) and (policy.per_token_logps.grad == 0).all()


def test_the_quantile_of_nothing():
    """A step with nothing scored: no loss and no bonus, and no NaN."""
    rows = [[nan, nan, nan]] * 2
    policy = logps(rows, ENTROPY)
    loss = GRPOLoss(top_entropy_quantile=0.5, entropy_coef=0.1)
    out = output(loss, policy, collected=torch.zeros(0, 1, dtype=torch.float64), num_tokens=0)
    assert out.loss.item() == 0 and (policy.per_token_logps.grad == 0).all()
    with pytest.raises(ValueError, match="top_entropy_quantile needs the entropies of the whole step in totals.coll"):
        output(loss, policy)


# The mean of log(p_old / p) is -log(3/4) / 2 = 0.144 in both completions.
@pytest.mark.parametrize(
    ("threshold", "advantages", "kept"),
    [
        (0.143, [2.0, -1.0], [1, 0]),
        (0.145, [2.0, -1.0], [1, 1]),
        (0.0, [-2.0, -1.0], [0, 0]),
        (0.0, [0.0, -1.0], [1, 0]),
        (-0.5, [2.0, 0.5], [1, 1]),
    ],
)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_off_policy_mask(threshold, advantages, kept, level):
    """Drops a completion of negative advantage that has drifted; its KL term stays, and so does the divisor."""
    options = {
        "importance_sampling_level": level,
        "epsilon": 0.75,
        "epsilon_high": 1.0,
        "beta": 0.5,
        "use_bias_correction_kl": False,
    }
    policy = logps(LOGPS)
    out = output(GRPOLoss(off_policy_mask_threshold=threshold, **options), policy, REF, advantages=advantages)
    rho = RHO if level == "token" else [0.75**0.5] * 4
    each = [-r * advantages[at] * kept[at] for r, at in zip(rho, (0, 0, 1, 1), strict=True)]
    assert out.loss.item() == pytest.approx((sum(each) + 0.5 * sum(KL["k3"][0])) / 10, rel=1e-12)
    slopes = [(x + 0.5 * s) / 10 for x, s in zip(each, KL["k3"][1], strict=True)]
    assert scored(policy.per_token_logps.grad) == pytest.approx(slopes, rel=1e-12)


def test_at_the_threshold_a_completion_is_kept():
    """A drift of exactly 1/2."""
    policy, old = logps([[-2.0, -1.0]]), logps([[-1.0, -1.0]])
    loss = GRPOLoss(off_policy_mask_threshold=0.5, epsilon=0.9)
    totals = Totals.of(policy)
    value = loss(policy, advantages=torch.tensor([-1.0]).double(), old=old, totals=totals).loss
    assert value.item() == pytest.approx((exp(-1) + 1) / 2)


def test_the_off_policy_mask_drops_no_penalty_without_an_advantage():
    """A drift of 1 is beyond 1/2, but A = 0: tau / 2 of a squared log-ratio of 1 stays."""
    loss = GRPOLoss(loss_type="kimi", log_ratio_coef=0.4, off_policy_mask_threshold=0.5)
    policy, old = logps([[-2.0]]), logps([[-1.0]])
    value = loss(policy, advantages=torch.zeros(1).double(), old=old, totals=Totals.of(policy)).loss
    assert value.item() == pytest.approx(0.2)


def test_clip_metrics_at_the_edges():
    """A ratio of exactly 1 - epsilon or 1 + epsilon_high is within; a sequence's tokens count alike."""
    policy, old = logps([[0.0, -0.3], [0.0, 0.3]]), logps([[0.0, 0.0]] * 2)

    def counts(advantages: list[float], **options: Any) -> list[float]:
        loss, given = GRPOLoss(epsilon=1e-300, **options), torch.tensor(advantages, dtype=torch.float64)
        metrics = loss(policy, advantages=given, old=old, totals=Totals.of(policy)).metrics
        assert {metrics[f"clip_ratio/{name}_mean"].count.item() for name in ("low", "high", "region")} == {4}
        return [metrics[f"clip_ratio/{name}_mean"].total.item() for name in ("low", "high", "region")]

    assert counts([-1.0, 1.0]) == [1, 1, 2]
    assert counts([1.0, -1.0]) == counts([0.0, 0.0]) == [0, 0, 0]
    assert counts([-1.0, 1.0], importance_sampling_level="sequence") == [2, 2, 4]
    assert counts([-1.0, 1.0], epsilon_high=0.5) == [1, 0, 1]


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_clip_metrics_of_cispo(level):
    """The cap is epsilon_high itself, above which A > 0 is counted; nothing bounds the ratio from below."""
    policy, old = logps([[log(5.5)], [log(0.5)], [log(4.5)], [log(5.5)]]), logps([[0.0]] * 4)
    given = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    for options, high in (({}, 1), ({"epsilon_high": 4.0}, 2)):
        loss = GRPOLoss(loss_type="cispo", importance_sampling_level=level, **options)
        metrics = loss(policy, advantages=given, old=old, totals=Totals.of(policy)).metrics
        counted = {name: mean.total.item() for name, mean in metrics.items() if mean.count == 4}
        assert counted == {
            "clip_ratio/low_mean": 0,
            "clip_ratio/high_mean": high,
            "clip_ratio/region_mean": high,
        }


@pytest.mark.parametrize("loss_type", ["sapo", "vespo"])
def test_what_clips_nothing_has_no_clip_metrics(loss_type):
    assert output(GRPOLoss(loss_type=loss_type), logps(LOGPS)).metrics == {}
    assert set(output(GRPOLoss(loss_type=loss_type), logps(LOGPS, ENTROPY)).metrics) == {"entropy"}


@pytest.mark.parametrize(
    ("loss_type", "low", "high"),
    [("dapo", 1, 1), ("gmpo", 1, 1), ("rloo", 2, 0)],  # rloo: 3/4 of both tokens, A < 0 in the second completion
)
def test_what_is_clipped_is_counted_in_its_own_measure(loss_type, low, high):
    metrics = output(GRPOLoss(loss_type=loss_type), logps(LOGPS)).metrics
    assert [metrics[f"clip_ratio/{name}_mean"].total.item() for name in ("low", "high")] == [low, high]


@pytest.mark.parametrize(
    ("loss_type", "option", "value"),
    [
        *((name, "delta", 4.0) for name in ("cispo", "sapo", "vespo", "gmpo", "rloo")),
        ("rloo", "beta", 0.1),
        ("rloo", "top_entropy_quantile", 0.5),
    ],
)
def test_options_without_a_meaning_are_refused(loss_type, option, value):
    said = {"delta": "dapo, grpo, dr_grpo, bnpo, luspo, clip_cov, fipo"}.get(
        option, "all but rloo, real, target_po, a2po"
    )
    message = f"{option}={value} is not read by loss_type {loss_type}; leave it out: it is an option of {said}"
    with pytest.raises(ValueError, match=f"^{message}$"):
        GRPOLoss(**{"loss_type": loss_type, option: value})
    GRPOLoss(loss_type="dapo", **{option: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "ppo"}, "loss_type='ppo' is unknown, expected one of: dapo, grpo, dr_grpo, bnpo, luspo, "),
        ({"kl_estimator": "k4"}, "kl_estimator='k4' is unknown, expected one of: k1, k2, k3"),
        ({"beta": -0.1}, "beta=-0.1 must not be negative"),
        ({"top_entropy_quantile": 1.1}, r"top_entropy_quantile=1.1 must be in \[0, 1\]"),
        ({"top_entropy_quantile": -0.1}, r"top_entropy_quantile=-0.1 must be in \[0, 1\]"),
        *(
            ({name: 0.0}, f"{name}=0.0 must be positive$")
            for name in ("delta", "sapo_temperature_pos", "sapo_temperature_neg")
        ),
        ({"epsilon": math.inf}, "epsilon=inf must be finite$"),
        ({"epsilon": -0.1}, "epsilon=-0.1 must not be negative$"),
        ({"epsilon": 1.0}, r"^epsilon=1.0 must be in \[0, 1\): no ratio is below 0$"),
        ({"loss_type": "rloo", "epsilon": 1.5}, r"^epsilon=1.5 must be in \[0, 1\): no ratio is below 0$"),
        ({"epsilon_high": -0.1}, "epsilon_high=-0.1 must not be negative$"),
        (
            {"loss_type": "cispo", "epsilon_high": 0.0},
            "^epsilon_high=0.0 must be positive: cispo multiplies every gradient by it at most$",
        ),
        ({"max_completion_length": 0}, "max_completion_length=0 must be positive$"),
    ],
    ids=str,
)
def test_what_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GRPOLoss(**options)
