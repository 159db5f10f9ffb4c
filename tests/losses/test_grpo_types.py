"""Every variant of GRPO by hand: values, slopes and divisors, inside and outside of clips, for both signs of A."""

import math
from dataclasses import replace
from math import exp, inf, log, nan
from typing import Any

import pytest
import torch

from logratio.losses import GRPO_TYPES, CompletionLogps, GRPOLoss, Totals

# rho = 3/2, a hole, 1, 1/2 of a completion with A = 2; 3/2, 1/2 of one with A = -1; an empty one with A = 5.
# Products 3/4. A step of 4 completions with 10 tokens.
RATIOS = [[1.5, nan, 1.0, 0.5], [1.5, 0.5, nan, nan], [nan, nan, nan, nan]]
OLD = [[-1.0, nan, -2.0, -3.0], [-4.0, -5.0, nan, nan], [nan, nan, nan, nan]]
ADVANTAGES = [2.0, -1.0, 5.0]
LENGTHS = [3, 2, 0]
TOTALS = Totals(num_sequences=4, num_tokens=10)
LOGPS = [[a + log(r) for a, r in zip(*rows, strict=True)] for rows in zip(OLD, RATIOS, strict=True)]

Table = list[list[float]]


def sg(x: float) -> float:
    return 1 / (1 + exp(-x))


def bump(x: float) -> float:
    """The slope of sg."""
    return sg(x) * sg(-x)


def logps(rows: Table) -> CompletionLogps:
    """NaN is a hole in the mask."""
    values = torch.tensor(rows, dtype=torch.float64)
    return CompletionLogps(values.requires_grad_(), ~values.detach().isnan())


def run(
    loss: GRPOLoss, policy: Table = LOGPS, old: Table = OLD, advantages: Any = ADVANTAGES, totals: Totals = TOTALS
) -> tuple[float, Table]:
    """(value, gradient)"""
    x, before = logps(policy), logps(old)
    given = {"advantages": torch.tensor(advantages, dtype=torch.float64), "old": before}
    if loss.wants_reference:
        given["ref"] = before
    if loss.wants_prompts:
        given["prompts"] = torch.zeros(len(policy), dtype=torch.int64)
    if loss.window_pass:
        totals = replace(totals, collected=loss.collect(x, **given))
    value = loss(x, **given, totals=totals).loss
    value.backward()
    assert before.per_token_logps.grad is None
    return value.item(), x.per_token_logps.grad.tolist()


def check(got: tuple[float, Table], losses: Table, slopes: Table, weights: list[float]) -> None:
    """Sum of weight * loss over the rows' scored tokens; weight * slope in each."""
    value, grad = got
    scored = [[not math.isnan(r) for r in row] for row in RATIOS]
    assert value == pytest.approx(
        sum(w * sum(row) for w, row in zip(weights, losses, strict=True)), rel=1e-12
    )  # the rows of `losses` hold scored tokens only
    for row, of_row, mask, w in zip(grad, slopes, scored, weights, strict=True):
        assert [g for g, s in zip(row, mask, strict=True) if s] == pytest.approx([w * s for s in of_row], rel=1e-12)
        assert all(g == 0 for g, s in zip(row, mask, strict=True) if not s)


BY_SEQUENCE = [1 / 4 / 3, 1 / 4 / 2, 0]
BY_TOKEN = [1 / 10] * 3
WEIGHTS = {
    "grpo": BY_SEQUENCE,
    "sapo": BY_SEQUENCE,
    "gmpo": BY_SEQUENCE,
    "rloo": BY_SEQUENCE,
    "a2po": BY_SEQUENCE,
    "dapo": BY_TOKEN,
    "bnpo": BY_TOKEN,
    "cispo": BY_TOKEN,
    "vespo": BY_TOKEN,
    **dict.fromkeys(("cfpo", "pspo"), BY_SEQUENCE),
    **dict.fromkeys(("reinforce", "prime", "fipo", "m2po", "clip_cov", "kl_cov"), BY_TOKEN),
    **dict.fromkeys(("real", "target_po"), [0] * 3),  # a step of no prompts
    **dict.fromkeys(("luspo", "topr", "kimi"), [1 / 4] * 3),
    "dr_grpo": [1 / 4 / 50] * 3,
}
CLIPPED = ("grpo", "dapo", "bnpo", "luspo", "dr_grpo")


def test_a_weight_for_each_variant():
    assert set(WEIGHTS) == set(GRPO_TYPES)


# (options, losses, slopes); where the clip does not bind: -rho A and the same slope
TOKEN_LEVEL = [
    ({}, [[-2.4, -2, -1], [1.5, 0.8], []], [[0, -2, -1], [1.5, 0], []]),
    ({"epsilon": 0.6}, [[-3, -2, -1], [1.5, 0.5], []], [[-3, -2, -1], [1.5, 0.5], []]),
    ({"epsilon_high": 0.6}, [[-3, -2, -1], [1.5, 0.8], []], [[-3, -2, -1], [1.5, 0], []]),
    ({"epsilon": 0.1, "epsilon_high": 0.3}, [[-2.6, -2, -1], [1.5, 0.9], []], [[0, -2, -1], [1.5, 0], []]),
    # delta above 1 + epsilon_high: dual clip of A < 0 only
    ({"delta": 1.4}, [[-2.4, -2, -1], [1.4, 0.8], []], [[0, -2, -1], [0, 0], []]),
    ({"delta": 3.0}, [[-2.4, -2, -1], [1.5, 0.8], []], [[0, -2, -1], [1.5, 0], []]),
    # below it, A > 0 is capped at delta, and A < 0 at 1 + epsilon_high
    ({"delta": 0.7}, [[-1.4, -1.4, -1], [1.2, 0.8], []], [[0, 0, -1], [0, 0], []]),
]


@pytest.mark.parametrize("loss_type", CLIPPED)
@pytest.mark.parametrize("case", TOKEN_LEVEL, ids=lambda case: str(case[0]))
def test_clipped_token_ratios(loss_type, case):
    options, losses, slopes = case
    loss = GRPOLoss(loss_type=loss_type, max_completion_length=50, **options)
    check(run(loss), losses, slopes, WEIGHTS[loss_type])


# One ratio a completion, g = 0.75^(1/3) = 0.909 and 0.75^(1/2) = 0.866
G = [0.75 ** (1 / 3), 0.75 ** (1 / 2)]
SEQUENCE_LEVEL = [
    ({}, [-2 * G[0], G[1]], [-2 * G[0], G[1]]),
    ({"epsilon": 0.1}, [-2 * G[0], 0.9], [-2 * G[0], 0]),
    ({"epsilon_high": 1e-9, "epsilon": 0.05}, [-2 * G[0], 0.95], [-2 * G[0], 0]),
    ({"delta": 0.88}, [-2 * 0.88, G[1]], [0, G[1]]),
]


@pytest.mark.parametrize("loss_type", CLIPPED)
@pytest.mark.parametrize("case", SEQUENCE_LEVEL, ids=lambda case: str(case[0]))
def test_clipped_sequence_ratios(loss_type, case):
    options, losses, slopes = case
    options = options | {"importance_sampling_level": "sequence", "max_completion_length": 50}
    tables = ([[x] * n for x, n in zip([*row, 0.0], LENGTHS, strict=True)] for row in (losses, slopes))
    check(run(GRPOLoss(loss_type=loss_type, **options)), *tables, WEIGHTS[loss_type])


@pytest.mark.parametrize(
    ("level", "cap", "weights"),
    [
        ("token", None, [[1.5, 1, 0.5], [1.5, 0.5]]),  # 5
        ("token", 0.2, [[0.2] * 3, [0.2] * 2]),  # TRL's default caps all of them
        ("token", 1.2, [[1.2, 1, 0.5], [1.2, 0.5]]),
        ("token", 5.0, [[1.5, 1, 0.5], [1.5, 0.5]]),
        ("sequence", 0.9, [[0.9] * 3, [G[1]] * 2]),
    ],
)
def test_cispo(level, cap, weights):
    """-min(rho, epsilon_high) A log p, the weight without gradient."""
    loss = GRPOLoss(loss_type="cispo", epsilon_high=cap, importance_sampling_level=level)
    slopes = [[-w * a for w in row] for row, a in zip(weights, ADVANTAGES, strict=False)]
    scored = [[x for x in row if not math.isnan(x)] for row in LOGPS]
    losses = [[s * x for s, x in zip(*rows, strict=True)] for rows in zip(slopes, scored, strict=False)]
    check(run(loss), [*losses, []], [*slopes, []], BY_TOKEN)


@pytest.mark.parametrize(
    ("options", "pos", "neg"),
    [({}, 1.0, 1.05), ({"sapo_temperature_pos": 2.0, "sapo_temperature_neg": 0.5}, 2.0, 0.5)],
    ids=["default", "given"],
)
def test_sapo(options, pos, neg):
    """-(4 / tau) sigmoid(tau (rho - 1)) A."""
    loss = GRPOLoss(loss_type="sapo", **options)
    tau = [pos, neg]
    rho = [[1.5, 1, 0.5], [1.5, 0.5]]
    losses = [[-4 / t * sg(t * (r - 1)) * a for r in row] for t, row, a in zip(tau, rho, ADVANTAGES, strict=False)]
    slopes = [[-4 * bump(t * (r - 1)) * r * a for r in row] for t, row, a in zip(tau, rho, ADVANTAGES, strict=False)]
    check(run(loss), [*losses, []], [*slopes, []], BY_SEQUENCE)
    assert slopes[0][1] == -2  # rho = 1: -A
    loss = GRPOLoss(loss_type="sapo", importance_sampling_level="sequence", **options)
    rows = list(zip(tau, G, ADVANTAGES, LENGTHS, strict=False))
    losses = [[-4 / t * sg(t * (g - 1)) * a] * n for t, g, a, n in rows]
    slopes = [[-4 * bump(t * (g - 1)) * g * a] * n for t, g, a, n in rows]
    check(run(loss), [*losses, []], [*slopes, []], BY_SEQUENCE)


@pytest.mark.parametrize(
    ("options", "pos", "neg"),
    [
        ({}, (2, 3), (3, 2)),
        (
            {"vespo_k_pos": 1.5, "vespo_lambda_pos": 1.0, "vespo_k_neg": 2.5, "vespo_lambda_neg": 0.5},
            (1.5, 1.0),
            (2.5, 0.5),
        ),
    ],
    ids=["default", "given"],
)
def test_vespo(options, pos, neg):
    """-phi A log p, phi = exp(lam + k log W - lam W) without gradient, W = 3/4 the product of ratios."""
    phi = [exp(lam + k * log(0.75) - lam * 0.75) for k, lam in (pos, neg)]
    slopes = [[-f * a] * n for f, a, n in zip(phi, ADVANTAGES, LENGTHS, strict=False)]
    scored = [[x for x in row if not math.isnan(x)] for row in LOGPS]
    losses = [[s * x for s, x in zip(*rows, strict=True)] for rows in zip(slopes, scored, strict=False)]
    loss = GRPOLoss(loss_type="vespo", **options)
    check(run(loss), [*losses, []], [*slopes, []], BY_TOKEN)


@pytest.mark.parametrize(
    ("log_ratios", "log_w"),
    [
        ([25.0, -20.0], 0.0),
        ([-30.0, 20.0], 0.0),
        ([19.0, -18.5], 0.5),
        ([-9.0, -9.0], -18.0),
        ([-9.5, -9.5], log(1e-8)),
        ([9.5, 9.5], 19.0),
        ([12.0, 12.0], 20.0),
    ],
)
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_vespo_holds_log_ratios(log_ratios, log_w, advantage):
    """+-20 a token, log 1e-8 to 20 a completion."""
    options = {"vespo_lambda_pos": 1e-9, "vespo_k_pos": 1.0, "vespo_lambda_neg": 1e-9, "vespo_k_neg": 1.0}
    policy = [[-1.0, -1.0]]
    old = [[-1.0 - x for x in log_ratios]]
    _, grad = run(GRPOLoss(loss_type="vespo", **options), policy, old, [advantage])
    phi = exp(1e-9 + log_w - 1e-9 * exp(log_w))
    assert grad == [pytest.approx([-advantage * phi / 10] * 2, rel=1e-12)]


@pytest.mark.parametrize(
    ("options", "pos", "neg"),
    [  # log-ratios after the clip, None where it binds
        ({}, [0.4, 0, log(0.5)], [log(1.5), -0.4]),
        ({"epsilon": 0.8}, [log(1.5), 0, log(0.5)], [log(1.5), log(0.5)]),
        ({"epsilon": 0.1, "epsilon_high": 0.3}, [0.3, 0, log(0.5)], [log(1.5), -0.1]),
        ({"epsilon_high": 0.5}, [log(1.5), 0, log(0.5)], [log(1.5), -0.4]),
    ],
    ids=str,
)
def test_gmpo(options, pos, neg):
    """-A exp(mean of the clipped log-ratios); tokens beyond the clip have no slope."""
    means = [exp(sum(pos) / 3), exp(sum(neg) / 2)]
    losses = [[-a * m] * n for a, m, n in zip(ADVANTAGES, means, LENGTHS, strict=False)]
    free = [[x == y for x, y in zip(h, (log(1.5), 0, log(0.5)), strict=True)] for h in (pos, [neg[0], 0, neg[1]])]
    slopes = [
        [-2 * means[0] * f for f in free[0]],
        [means[1] * f for f in (free[1][0], free[1][2])],
    ]
    loss = GRPOLoss(loss_type="gmpo", **options)
    check(run(loss), [*losses, []], [*slopes, []], BY_SEQUENCE)


@pytest.mark.parametrize(
    ("options", "losses", "slopes"),
    [
        ({}, [-1.5, 0.8], [-1.5, 0]),
        ({"epsilon": 0.3}, [-1.5, 0.75], [-1.5, 0.75]),
        ({"epsilon": 0.01, "epsilon_high": 0.9}, [-1.5, 0.99], [-1.5, 0]),
    ],
    ids=str,
)
def test_rloo(options, losses, slopes):
    """-min(W A, clip(W) A), W the product of the ratios, over B: each token has the slope of the whole."""
    loss = GRPOLoss(loss_type="rloo", **options)
    values = [[x] * n for x, n in zip([*losses, 0], LENGTHS, strict=True)]
    each = [[x * n] * n for x, n in zip([*slopes, 0], LENGTHS, strict=True)]
    check(run(loss), values, each, BY_SEQUENCE)


def test_rloo_above_the_clip():
    """W = 3/2 of two tokens: stopped where A > 0, the whole gradient where A < 0."""
    policy, old = [[log(2), log(0.75)]] * 2, [[0.0, 0.0]] * 2
    value, grad = run(GRPOLoss(loss_type="rloo"), policy, old, [2.0, -1.0])
    assert value == pytest.approx((-2.4 + 1.5) / 4, rel=1e-12)
    assert grad == [[0, 0], pytest.approx([1.5 / 4] * 2, rel=1e-12)]


@pytest.mark.parametrize("loss_type", ["gmpo", "rloo", "grpo", "sapo"])
def test_exponents_stop_at_forty(loss_type):
    """Log-ratios of 50 and a completion of A < 0: exp(40) without a slope (sapo: 2 / tau of a bounded gate)."""
    options = {"importance_sampling_level": "sequence"} if loss_type in ("grpo", "sapo") else {}
    loss = GRPOLoss(loss_type=loss_type, **options)
    for log_ratio, held in ((50.0, 40), (38.0, 38)):
        total = log_ratio / 2 if loss_type == "rloo" else log_ratio
        value, grad = run(loss, [[-1.0, -1.0]], [[-1.0 - total] * 2], [-1.0])
        if loss_type == "sapo":
            assert (value, grad) == (pytest.approx(4 / 1.05 / 4, rel=1e-12), [[0, 0]])
            continue
        assert value == pytest.approx(exp(held) / 4, rel=1e-9)
        assert (grad[0][0] == 0) == (held == 40)


@pytest.mark.parametrize("loss_type", GRPO_TYPES)
def test_an_empty_completion_has_no_loss(loss_type):
    """Nor its advantage a say; a step with nothing to divide by costs nothing."""
    loss = GRPOLoss(loss_type=loss_type)
    one, two = ([*ADVANTAGES[:2], a] for a in (5.0, -1e3))
    assert run(loss, advantages=one) == run(loss, advantages=two)
    value, grad = run(loss, advantages=[1.0] * 3, totals=Totals(num_sequences=0, num_tokens=0))
    assert value == 0 and grad == [[0] * 4] * 3


PENALIZED = ("kimi", "prime", "a2po", "clip_cov", "kl_cov", "real", "target_po")
"""Of which a part does not depend on the advantage, or on its sign alone, or on what it is beside others."""


@pytest.mark.parametrize("loss_type", [name for name in GRPO_TYPES if name not in PENALIZED])
def test_proportional_to_the_size_of_the_advantage(loss_type):
    """On either side of 0, however near."""
    loss = GRPOLoss(loss_type=loss_type, **({"sapo_temperature_neg": 3.0} if loss_type == "sapo" else {}))
    value, grad = run(loss)
    tenth, slopes = run(loss, advantages=[a / 10 for a in ADVANTAGES])
    assert tenth == pytest.approx(value / 10, rel=1e-12)
    assert slopes == [pytest.approx([g / 10 for g in row], rel=1e-12) for row in grad]


def test_infinite_clip_is_no_clip():
    """The ratios as they are, where nothing caps them."""
    value, _ = run(GRPOLoss(loss_type="grpo", epsilon=math.nextafter(1, 0), epsilon_high=1e9))
    assert value == pytest.approx((-(1.5 + 1 + 0.5) * 2 / 3 + (1.5 + 0.5) / 2) / 4, rel=1e-12) and value < inf
