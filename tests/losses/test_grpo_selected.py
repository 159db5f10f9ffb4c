"""M2PO, Clip-Cov and KL-Cov by hand: which tokens of the step are chosen, and what becomes of them."""

from dataclasses import replace
from math import exp
from typing import Any

import pytest
import torch

from logratio.losses import CompletionLogps, GRPOLoss, Totals

from ._families import refused

Row = list[float]


def rows(values: list[Row]) -> CompletionLogps:
    """[C, T], every token scored."""
    x = torch.tensor(values, dtype=torch.float64)
    return CompletionLogps(x.requires_grad_(), torch.ones_like(x, dtype=torch.bool))


def step(loss: GRPOLoss, policy: list[Row], advantages: Any, **others: list[Row]) -> tuple[float, list[Row]]:
    """(value, gradient), both times the number of tokens, of a step that is this batch. others: old, behavior."""
    x, given = rows(policy), {name: rows(values) for name, values in others.items()}
    given["advantages"] = torch.tensor(advantages, dtype=torch.float64)
    value = loss(x, **given, totals=Totals.of(x, loss.collect(x, **given))).loss
    value.backward()
    count = x.completion_mask.sum().item()
    return value.item() * count, (x.per_token_logps.grad * count).tolist()


# log rho = 1/8, 1/4, -1/2, -3 of A = 1 and -1/8, 1/2, -1/2, 2 of A = -1. A step takes 1/8, 1/4, -1/8 and -1/2 further:
# squares of 1, 4, 1, 16 64ths, whose means from the smallest on are 1, 1, 2 and 5.5 64ths.
GAINS = [[1 / 8, 1 / 4, -1 / 2, -3.0], [-1 / 8, 1 / 2, -1 / 2, 2.0]]
OLD = [[-1.0, -2.0, -3.0, -4.0], [-5.0, -6.0, -7.0, -8.0]]
LOGPS = [[a + d for a, d in zip(*both, strict=True)] for both in zip(OLD, GAINS, strict=True)]
SIGNS = [1.0, -1.0]


@pytest.mark.parametrize(
    ("threshold", "gone"),
    [
        (5.5 / 64, []),
        (5.4 / 64, [(1, 2)]),
        (2 / 64, [(1, 2)]),
        (1.9 / 64, [(0, 1), (1, 2)]),
        (1 / 64, [(0, 1), (1, 2)]),
        (0.9 / 64, [(0, 0), (0, 1), (1, 0), (1, 2)]),
        (0.0, [(0, 0), (0, 1), (1, 0), (1, 2)]),
    ],
)
def test_m2po_leaves_out_the_largest(threshold, gone):
    """What comes back to a ratio of 1 always stays, however far it is."""
    expected = [
        [0.0 if (i, t) in gone else -exp(d) * a for t, d in enumerate(gains)]
        for i, (gains, a) in enumerate(zip(GAINS, SIGNS, strict=True))
    ]
    value, grad = step(GRPOLoss(loss_type="m2po", m2po_threshold=threshold), LOGPS, SIGNS, old=OLD)
    assert grad == [pytest.approx(row, rel=1e-12) for row in expected]
    assert value == pytest.approx(sum(map(sum, expected)), rel=1e-12)


def test_m2po_of_equals_leaves_out_all():
    """Squares of 1, 4, 4 64ths; of means 1, 2.5 and 3 the last is too large, and so both of the largest go."""
    gains = [1 / 8, 1 / 4, 1 / 4]
    loss = GRPOLoss(loss_type="m2po", m2po_threshold=2.9 / 64)
    _, grad = step(loss, [[d - 1 for d in gains]], [1.0], old=[[-1.0] * 3])
    assert grad == [[pytest.approx(-exp(1 / 8)), 0, 0]]


def test_m2po_takes_no_mean_with_what_stands_still():
    """A square of 4 64ths alone is above 3 64ths, whatever has rho = 1 or A = 0 beside it."""
    loss = GRPOLoss(loss_type="m2po", m2po_threshold=3 / 64)
    given = [[1.0, 1.0, 0.0]]
    _, grad = step(loss, [[-1.0, -0.75, -0.75]], given, old=[[-1.0] * 3])
    assert grad == [[-1, 0, 0]]


def test_m2po_counts_nothing_without_an_advantage():
    """Squares of 1 and 4 64ths have a mean of 2.5; with that of 1 64th of A = 0 it would be 2."""
    loss = GRPOLoss(loss_type="m2po", m2po_threshold=2.4 / 64)
    _, grad = step(loss, [[-7 / 8, -3 / 4, -7 / 8]], [[1.0, 1.0, 0.0]], old=[[-1.0] * 3])
    assert grad == [[pytest.approx(-exp(1 / 8)), 0, 0]]


def test_m2po_on_policy_is_reinforce():
    _, grad = step(GRPOLoss(loss_type="m2po", m2po_threshold=0.0), LOGPS, [2.0, -3.0])
    assert grad == [[-2] * 4, [3] * 4]


def test_m2pos_ratio_is_to_what_sampled():
    """Whatever the old policy is; and of a token without a gain in it nothing is left out."""
    loss = GRPOLoss(loss_type="m2po", m2po_threshold=2 / 64)
    elsewhere = [[-9.0] * 4] * 2
    assert step(loss, LOGPS, SIGNS, old=elsewhere, behavior=OLD) == step(loss, LOGPS, SIGNS, old=OLD)
    assert step(loss, LOGPS, SIGNS, behavior=OLD) == step(loss, LOGPS, SIGNS, old=OLD)


def test_m2po_takes_advantages_of_tokens():
    """Of the same gain, 1/2, what A > 0 takes further goes, and what A < 0 brings back stays."""
    _, grad = step(GRPOLoss(loss_type="m2po"), [[-1.0, -1.0]], [[1.0, -1.0]], old=[[-1.5, -1.5]])
    assert grad == [[0, pytest.approx(exp(0.5))]]


# log p = -1, -3 of A = 1, -2, -6 of A = -1, around means of -3 and 0: covariances 2, 0, -1, 3
POLICY = [[-1.0, -3.0], [-2.0, -6.0]]


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, [0.5, 1, 1, 0.5]),  # one of two
        ({"cov_share": 0.49}, [0.5, 1, 1, 0.5]),
        ({"cov_share": 0.5}, [0, 1, 1, 0]),
        ({"cov_share": 1.0}, [0, 1, 1, 0]),  # four of two
        ({"clip_cov_low": 2.0}, [1, 1, 1, 0]),
        ({"clip_cov_high": 3.0}, [0, 1, 1, 1]),
        ({"clip_cov_low": 3.0}, [1, 1, 1, 1]),
        ({"clip_cov_low": -2.0, "clip_cov_high": 2.0}, [1, 0.5, 0.5, 1]),
    ],
    ids=str,
)
def test_clip_cov(options, kept):
    """k tokens of m have no gradient; each has the mean over the draws."""
    value, grad = step(GRPOLoss(loss_type="clip_cov", **options), POLICY, SIGNS)
    expected = [-k * a for k, a in zip(kept, (1, 1, -1, -1), strict=True)]
    assert sum(grad, []) == pytest.approx(expected, rel=1e-12) and value == pytest.approx(sum(expected), abs=1e-12)


@pytest.mark.parametrize(("advantage", "gain", "clips"), [(1.0, 0.3, True), (1.0, -0.3, False), (-1.0, -0.3, True)])
def test_clip_cov_looks_at_what_the_clip_leaves_alone(advantage, gain, clips):
    """A token that is clipped has no gradient already, and is none of those that are drawn from."""
    policy = [[-1.0, -3.0], [-2.0, -6.0]] if advantage > 0 else [[-6.0, -2.0], [-3.0, -1.0]]
    old = [[policy[0][0] - gain, policy[0][1]], policy[1]]
    _, grad = step(GRPOLoss(loss_type="clip_cov"), policy, [advantage, -advantage], old=old)
    assert grad[1][1] == pytest.approx(advantage * (0 if clips else 0.5))
    assert grad[0][0] == pytest.approx(0 if clips else -0.5 * advantage * exp(gain))


@pytest.mark.parametrize(
    ("epsilon", "gains", "given", "clipped"),
    [
        (0.0, [0.0, 0.0, 0.0], [1.0, -1.0, 0.0], [0, 0, 0]),  # at both ends of the range
        (0.2, [1.0, 1.0, 1.0, 1.0], [2.0, 0.5, 0.0, -2.0], [1, 1, 0, 0]),
        (0.2, [-1.0, -1.0, -1.0, -1.0], [2.0, 0.5, 0.0, -2.0], [0, 0, 0, 1]),
    ],
)
def test_what_counts_as_clipped(epsilon, gains, given, clipped):
    """What is beyond the end that its advantage would carry it to."""
    policy, old = rows([[d - 2 for d in gains]]), rows([[-2.0] * len(gains)])
    loss = GRPOLoss(loss_type="clip_cov", epsilon=epsilon)
    terms = loss.collect(policy, advantages=torch.tensor([given], dtype=torch.float64), old=old)
    assert terms.tolist() == [[a, d - 2, c] for a, d, c in zip(given, gains, clipped, strict=True)]


def test_clip_cov_of_nothing_in_the_range_is_dapo():
    options = {"epsilon": 0.1, "epsilon_high": 0.3, "delta": 1.5}
    plain = step_of_dapo(GRPOLoss(**options))
    assert (
        step(GRPOLoss(loss_type="clip_cov", clip_cov_low=90, clip_cov_high=99, **options), LOGPS, SIGNS, old=OLD)
        == plain
    )


def step_of_dapo(loss: GRPOLoss) -> tuple[float, list[Row]]:
    x = rows(LOGPS)
    value = loss(x, advantages=torch.tensor(SIGNS, dtype=torch.float64), old=rows(OLD), totals=Totals.of(x)).loss
    value.backward()
    return value.item() * 8, (x.per_token_logps.grad * 8).tolist()


def test_clip_cov_counts_what_is_clipped_as_dapo_does():
    x, given = rows(LOGPS), {"advantages": torch.tensor(SIGNS, dtype=torch.float64), "old": rows(OLD)}
    loss = GRPOLoss(loss_type="clip_cov")
    got = loss(x, **given, totals=Totals.of(x, loss.collect(x, **given))).metrics
    assert got == GRPOLoss()(x, **given, totals=Totals.of(x)).metrics and got["clip_ratio/region_mean"].total == 2


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ({}, [0, 0, 0, 1]),
        ({"cov_share": 0.49}, [0, 0, 0, 1]),
        ({"cov_share": 0.5}, [1, 0, 0, 1]),
        ({"cov_share": 0.75}, [1, 1, 0, 1]),
        ({"cov_share": 1.0, "kl_cov_coef": 0.25}, [0.25] * 4),
    ],
    ids=str,
)
def test_kl_cov(options, weights):
    """-rho A + w |log rho|, without a clip."""
    gains = [[0.5, -0.5], [0.75, -0.25]]
    old = [[p - d for p, d in zip(*both, strict=True)] for both in zip(POLICY, gains, strict=True)]
    value, grad = step(GRPOLoss(loss_type="kl_cov", **options), POLICY, SIGNS, old=old)
    each = list(zip(sum(gains, []), (1, 1, -1, -1), weights, strict=True))
    assert value == pytest.approx(sum(-exp(d) * a + w * abs(d) for d, a, w in each), rel=1e-12)
    assert sum(grad, []) == pytest.approx([-exp(d) * a + w * (1 if d > 0 else -1) for d, a, w in each], rel=1e-12)


@pytest.mark.parametrize(
    ("share", "weights"), [(0.25, [0.5, 0, 0.5, 0]), (0.75, [1, 0.5, 1, 0.5]), (0.5, [1, 0, 1, 0])]
)
def test_kl_covs_last_places_are_shared(share, weights):
    """Covariances 1, -1, 1, -1."""
    _, grad = step(
        GRPOLoss(loss_type="kl_cov", cov_share=share),
        [[-1.0, -3.0], [-3.0, -1.0]],
        SIGNS,
        old=[[-2.0, -4.0], [-4.0, -2.0]],
    )
    assert sum(grad, []) == pytest.approx([-exp(1) * a + w for a, w in zip((1, 1, -1, -1), weights, strict=True)])


def test_kl_cov_on_policy_is_reinforce():
    _, grad = step(GRPOLoss(loss_type="kl_cov", cov_share=1.0, kl_cov_coef=9.0), POLICY, [2.0, -3.0])
    assert grad == [[-2, -2], [3, 3]]


def test_a_share_of_tokens_is_rounded_down_from_what_it_is():
    """0.29 of 100 are 29, though 0.29 * 100 is a little less in float64."""
    x, given = (
        rows([[-0.01 * t for t in range(100)]]),
        {"advantages": torch.arange(100, dtype=torch.float64)[None], "old": rows([[-9.0] * 100])},
    )
    loss = GRPOLoss(loss_type="kl_cov", cov_share=0.29, kl_cov_coef=1e6)
    loss(x, **given, totals=Totals.of(x, loss.collect(x, **given))).loss.backward()
    assert (x.per_token_logps.grad > 0).sum() == 29


@pytest.mark.parametrize("loss_type", ["m2po", "clip_cov", "kl_cov"])
def test_what_is_collected_and_what_is_asked_for(loss_type):
    """A row for each scored token, without a gradient; entropies come last, and change nothing of it."""
    loss = GRPOLoss(loss_type=loss_type)
    x, given = rows(LOGPS), {"advantages": torch.tensor(SIGNS, dtype=torch.float64), "old": rows(OLD)}
    x = replace(x, completion_mask=torch.tensor([[True, True, False, True], [False] * 4]))
    collected = loss.collect(x, **given)
    assert loss.window_pass == "own" and len(collected) == 3 and not collected.requires_grad
    with_entropy = replace(x, entropy=torch.arange(8.0, dtype=torch.float64).view(2, 4))
    both = replace(loss, top_entropy_quantile=0.5).collect(with_entropy, **given)
    assert torch.equal(both[:, :-1], collected) and both[:, -1].tolist() == [0, 1, 3]
    with refused(f"loss_type={loss_type} collects what it compares: it needs advantages"):
        loss.collect(x)
    with refused(f"loss_type={loss_type} compares with the whole step: it needs totals.collected"):
        loss(x, **given, totals=Totals.of(x))


def test_m2po_collects_squares_of_what_goes_further():
    x, given = rows(LOGPS), {"advantages": torch.tensor(SIGNS, dtype=torch.float64), "old": rows(OLD)}
    inf = float("inf")
    expected = [1 / 64, 4 / 64, inf, inf, 1 / 64, inf, 16 / 64, inf]
    assert GRPOLoss(loss_type="m2po").collect(x, **given)[:, 0].tolist() == pytest.approx(expected)


def test_options_that_mean_nothing_are_refused():
    with refused("clip_cov_low=5.0 must be below clip_cov_high=5.0"):
        GRPOLoss(loss_type="clip_cov", clip_cov_low=5.0)
    with refused("sampling_correction=token_mask does not fit loss_type m2po; leave it out"):
        GRPOLoss(loss_type="m2po", sampling_correction="token_mask")
    for name, option in (("kl_cov", "cov_share"), ("m2po", "m2po_threshold"), ("kl_cov", "kl_cov_coef")):
        with pytest.raises(ValueError, match=f"^{option}=-0.1 must "):
            GRPOLoss(loss_type=name, **{option: -0.1})


def test_an_entropys_quantile_leaves_out_more():
    """What has too little entropy has no policy term; the tokens are chosen among all."""
    x, given = rows(POLICY), {"advantages": torch.tensor(SIGNS, dtype=torch.float64)}
    x = replace(x, entropy=torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64))
    loss = GRPOLoss(loss_type="clip_cov", top_entropy_quantile=0.5)
    loss(x, **given, totals=Totals.of(x, loss.collect(x, **given))).loss.backward()
    assert (x.per_token_logps.grad * 4).tolist() == [[0, 0], [1, 0.5]]


def test_log_ratios_beyond_float32():
    """Held at exp(40); what would go there is left out."""
    for sign in (1.0, -1.0):
        value, grad = step(GRPOLoss(loss_type="m2po"), [[-1.0]], [sign], old=[[-90.0]])
        assert (value, grad) == ((0, [[0]]) if sign > 0 else (pytest.approx(exp(40)), [[0]]))
