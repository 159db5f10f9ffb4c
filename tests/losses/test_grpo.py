"""GRPO, DAPO, Dr. GRPO, BNPO and GSPO: numbers by hand, and the laws of a clipped surrogate."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from logratio.losses import GRPO_TYPES, CompletionLogps, GRPOLoss, Totals
from logratio.losses.grpo import LEVELS
from logratio.reference.strategies import Batch, batches

CLIPPED = ("dapo", "grpo", "dr_grpo", "bnpo", "luspo")
OWN_RATIO = ("gmpo", "rloo")  # of the sequence, whatever the level
every_type = pytest.mark.parametrize("loss_type", [*CLIPPED, "cispo", "sapo", "vespo", *OWN_RATIO])
every_level = pytest.mark.parametrize("level", LEVELS)
OTHERS_TOO = (
    "real",
    "target_po",
    "clip_cov",
    "a2po",
)  # what a completion is beside others, or the reference, has a say
AT_LEVELS = [*(("token", name) for name in GRPO_TYPES if name not in OTHERS_TOO)]
AT_LEVELS += [
    (level, name)
    for level in ("sequence", "sequence_token")
    for name in GRPO_TYPES.readers("importance_sampling_level")
    if name not in OTHERS_TOO
]
quick = settings(max_examples=15, deadline=None)

# Ratios 1.5, 1, 0.5 (mean log -0.0959) of a completion with advantage 2, and 1.5, 0.5 of one with advantage -1
MASK = torch.tensor([[True, True, True], [True, True, False]])
RATIOS = torch.tensor([[1.5, 1.0, 0.5], [1.5, 0.5, torch.nan]], dtype=torch.float64)
ADVANTAGES = torch.tensor([2.0, -1.0], dtype=torch.float64)
OLD = torch.tensor([[-1.0, -2.0, -3.0], [-4.0, -5.0, -6.0]], dtype=torch.float64)

# -min(rho A, clip(rho, 0.8, 1.2) A) and its slope in log p: 0 where clipped, -rho A elsewhere
TOKEN_LOSS = torch.tensor([[-2.4, -2.0, -1.0], [1.5, 0.8, 0.0]], dtype=torch.float64)
TOKEN_SLOPE = torch.tensor([[0.0, -2.0, -1.0], [1.5, 0.0, 0.0]], dtype=torch.float64)
WEIGHTS = {
    "grpo": torch.tensor([[1 / 6], [1 / 4]], dtype=torch.float64),
    "dapo": torch.full((2, 1), 1 / 5, dtype=torch.float64),
    "bnpo": torch.full((2, 1), 1 / 5, dtype=torch.float64),
    "dr_grpo": torch.full((2, 1), 1 / 20, dtype=torch.float64),
}


def completions(logps: Tensor, mask: Tensor = MASK, entropy: Tensor | None = None) -> CompletionLogps:
    return CompletionLogps(logps.detach().clone().requires_grad_(), mask, entropy)


def run(loss: GRPOLoss, policy: CompletionLogps, advantages: Tensor, **others: Any) -> tuple[float, Tensor]:
    """(value, gradient) with the totals of this batch."""
    policy.per_token_logps.grad = None
    collected = loss.collect(policy, advantages=advantages, **others) if loss.window_pass else None
    value = loss(policy, advantages=advantages, **{"totals": Totals.of(policy, collected)} | others).loss
    value.backward()
    return value.item(), policy.per_token_logps.grad.clone()


@pytest.mark.parametrize("loss_type", WEIGHTS)
def test_token_level_by_hand(loss_type):
    policy, old = completions(OLD + RATIOS.log()), completions(OLD)
    value, grad = run(GRPOLoss(loss_type=loss_type, max_completion_length=10), policy, ADVANTAGES, old=old)
    assert value == pytest.approx((WEIGHTS[loss_type] * TOKEN_LOSS).sum().item(), rel=1e-12)
    torch.testing.assert_close(grad, WEIGHTS[loss_type] * TOKEN_SLOPE, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("loss_type", WEIGHTS)
def test_sequence_level_by_hand(loss_type):
    """One ratio a completion, exp of the mean: 0.75^(1/3) = 0.909 within the clip, 0.75^(1/2) = 0.866 too."""
    policy, old = completions(OLD + RATIOS.log()), completions(OLD)
    loss = GRPOLoss(loss_type=loss_type, importance_sampling_level="sequence", max_completion_length=10)
    ratio = torch.tensor([[0.75 ** (1 / 3)], [0.75 ** (1 / 2)]], dtype=torch.float64)
    per_token = (-ratio * ADVANTAGES[:, None]).where(MASK, 0.0)
    value, grad = run(loss, policy, ADVANTAGES, old=old)
    assert value == pytest.approx((WEIGHTS[loss_type] * per_token).sum().item(), rel=1e-12)
    torch.testing.assert_close(grad, WEIGHTS[loss_type] * per_token, rtol=1e-12, atol=1e-15)


def test_sequence_ratio_outside_the_clip_has_no_slope():
    policy, old = completions(OLD + 0.3), completions(OLD)
    loss = GRPOLoss(importance_sampling_level="sequence", epsilon=0.2, epsilon_high=0.3)
    value, grad = run(loss, policy, ADVANTAGES, old=old)
    assert value == pytest.approx((-1.3 * 2 * 3 + math.exp(0.3) * 2) / 5, rel=1e-12)
    assert (grad[0] == 0).all() and (grad[1, :2] > 0).all()


@pytest.mark.parametrize("corrected", [True, False])
def test_kl_by_hand(corrected):
    """d = log 2 for every token: k3 = 1/2 + log 2 - 1, its slope 1 - exp(-d) = 1/2."""
    policy, old = completions(OLD + RATIOS.log()), completions(OLD)
    ref = completions(policy.per_token_logps.detach() - math.log(2))
    loss = GRPOLoss(beta=0.25, use_bias_correction_kl=corrected)
    value, grad = run(loss, policy, ADVANTAGES, old=old, ref=ref)
    rho = RATIOS.nan_to_num(0.0) if corrected else MASK.double()
    k3 = math.log(2) - 0.5
    assert value == pytest.approx((TOKEN_LOSS + 0.25 * rho * k3).sum().item() / 5, rel=1e-12)
    kl_slope = rho * math.log(2) if corrected else MASK * 0.5  # d(rho k3) = rho (k3 + k3') = rho d
    torch.testing.assert_close(grad, (TOKEN_SLOPE + 0.25 * kl_slope) / 5, rtol=1e-12, atol=1e-15)


def test_metrics_by_hand():
    entropy = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, torch.nan]], dtype=torch.float64)
    policy, old = completions(OLD + RATIOS.log(), entropy=entropy), completions(OLD)
    ref = completions(policy.per_token_logps.detach() - (RATIOS == 1.5) * math.log(2))
    _, metrics = GRPOLoss(beta=0.1)(policy, ref, advantages=ADVANTAGES, old=old, totals=Totals.of(policy))
    means = {name: (mean.total.item(), mean.count.item()) for name, mean in metrics.items()}
    assert means == {
        "clip_ratio/low_mean": (1.0, 5),  # 0.5 with A < 0
        "clip_ratio/high_mean": (1.0, 5),  # 1.5 with A > 0
        "clip_ratio/region_mean": (2.0, 5),
        "kl": (pytest.approx(2 * 1.5 * (math.log(2) - 0.5)), 5),  # what enters the loss: rho k3
        "entropy": (15.0, 5),
    }


@pytest.mark.parametrize(
    ("advantages", "low", "high"), [((2, 1), 0, 2), ((-2, -1), 2, 0), ((2, -1), 1, 1), ((0, 0), 0, 0)]
)
def test_clip_metrics_count_what_the_clip_stops(advantages, low, high):
    """Two ratios above the range matter only where A > 0, two below only where A < 0."""
    policy, old = completions(OLD + RATIOS.log()), completions(OLD)
    _, metrics = GRPOLoss()(policy, advantages=torch.tensor(advantages), old=old, totals=Totals.of(policy))
    got = [metrics[f"clip_ratio/{name}_mean"].total.item() for name in ("low", "high", "region")]
    assert got == [low, high, low + high]


def test_what_does_not_fit_is_refused():
    policy = completions(OLD)
    totals = Totals.of(policy)
    with pytest.raises(
        ValueError, match=r"advantages must be \[2\], one a completion, or \[2, 3\], one a token, got \[2, 1\]"
    ):
        GRPOLoss()(policy, advantages=ADVANTAGES[:, None], totals=totals)
    with pytest.raises(ValueError, match="beta=0.1 needs the reference log-probs, ref is None"):
        GRPOLoss(beta=0.1)(policy, advantages=ADVANTAGES, totals=totals)
    narrow = CompletionLogps(OLD[:, :1], MASK[:, :1])
    with pytest.raises(ValueError, match=r"old must have the policy's rows and tokens, got \[2, 1\] for \[2, 3\]"):
        GRPOLoss()(policy, advantages=ADVANTAGES, old=narrow, totals=totals)
    with pytest.raises(ValueError, match=r"ref must have the policy's rows and tokens, got \[2, 1\] for \[2, 3\]"):
        GRPOLoss(beta=0.1)(policy, narrow, advantages=ADVANTAGES, totals=totals)
    with pytest.raises(
        ValueError,
        match="importance_sampling_level='word' is unknown, expected one of: token, sequence, sequence_token",
    ):
        GRPOLoss(importance_sampling_level="word")
    for field in ("epsilon", "epsilon_high", "max_completion_length"):
        must = "positive" if field == "max_completion_length" else "not be negative"
        with pytest.raises(ValueError, match=f"^{field}=-1 must (be )?{must}$"):
            GRPOLoss(**{field: -1})


@pytest.mark.parametrize(("beta", "wanted"), [(0.0, False), (0.1, True)])
def test_a_reference_is_wanted_only_for_the_kl(beta, wanted):
    assert GRPOLoss(beta=beta).wants_reference is wanted


def given_logps(batch: Batch, role: str) -> CompletionLogps:
    return completions(batch.tokens[role]["completion"], batch.masks["completion"])


def weight_of(loss_type: str, batch: Batch) -> Tensor:
    """[C, 1], the documented weight of a token's loss."""
    mask = batch.masks["completion"]
    lengths, count = mask.sum(-1, keepdim=True).double(), len(mask)
    if loss_type in ("grpo", "sapo", "cfpo", "pspo", *OWN_RATIO):
        return 1 / lengths.clamp(min=1) / count
    per_step = {"dr_grpo": 1 / (256 * count)} | dict.fromkeys(("luspo", "topr", "kimi"), 1 / count)
    return torch.full_like(lengths, per_step.get(loss_type, 1 / max(mask.sum().item(), 1)))


@pytest.mark.parametrize(("level", "loss_type"), AT_LEVELS)
@quick
@given(batches("grouped"))
def test_on_policy_it_is_reinforce(loss_type, level, batch):
    """old = policy, given or left out: gradient -A grad log p, by the loss's weights (rloo: of the whole sequence)."""
    policy, advantages = given_logps(batch, "policy"), batch.rows["advantages"]
    loss = GRPOLoss(loss_type=loss_type, importance_sampling_level=level, max_completion_length=256)
    expected = -(weight_of(loss_type, batch) * advantages[:, None]).where(policy.completion_mask, 0.0)
    slope = expected * (policy.completion_mask.sum(-1, keepdim=True) if loss_type == "rloo" else 1)
    slope = slope * (0.9 if loss_type == "pspo" else 1)  # a tenth of the ratio is the old policy's
    for others in ({}, {"old": given_logps(batch, "policy")}):
        value, grad = run(loss, policy, advantages, **others)
        torch.testing.assert_close(grad, slope, rtol=1e-9, atol=1e-15)
        if loss_type in (*CLIPPED, *OWN_RATIO):  # the value, too, is -A
            assert value == pytest.approx(expected.sum().item(), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("loss_type", CLIPPED)
@every_level
@quick
@given(batches("grouped", max_size=1.0))
def test_a_wide_clip_is_plain_importance_sampling_and_a_lower_bound(loss_type, level, batch):
    """epsilon -> 1, epsilon_high -> inf: -rho A; any other epsilon gives at least as large a loss (pessimism)."""
    policy, old, advantages = given_logps(batch, "policy"), given_logps(batch, "old"), batch.rows["advantages"]
    mask = policy.completion_mask
    log_ratio = (policy.per_token_logps - old.per_token_logps).detach().where(mask, 0.0)
    if level != "token":
        log_ratio = (log_ratio.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)).expand(mask.shape)
    plain = (-(weight_of(loss_type, batch) * log_ratio.exp() * advantages[:, None])).where(mask, 0.0)
    options = {"loss_type": loss_type, "importance_sampling_level": level, "max_completion_length": 256}
    value, grad = run(GRPOLoss(**options, epsilon=math.nextafter(1, 0), epsilon_high=1e6), policy, advantages, old=old)
    assert value == pytest.approx(plain.sum().item(), rel=1e-9, abs=1e-12)
    torch.testing.assert_close(grad, plain, rtol=1e-9, atol=1e-15)  # rho is its own derivative in log p
    clipped, _ = run(GRPOLoss(**options), policy, advantages, old=old)
    assert clipped >= value - 1e-12 * abs(plain).sum().item()


def assert_same(one: tuple[float, Tensor], other: tuple[float, Tensor]) -> None:
    assert one[0] == pytest.approx(other[0], rel=1e-12, abs=1e-14)
    torch.testing.assert_close(one[1], other[1], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("loss_type", GRPO_TYPES.readers("importance_sampling_level"))
@quick
@given(batches("grouped", max_tokens=1))
def test_one_token_is_the_whole_sequence(loss_type, batch):
    policy, old, advantages = given_logps(batch, "policy"), given_logps(batch, "old"), batch.rows["advantages"]
    token, *others = (
        run(GRPOLoss(loss_type=loss_type, importance_sampling_level=level), policy, advantages, old=old)
        for level in LEVELS
    )
    for other in others:
        assert_same(token, other)


@quick
@given(batches("grouped"), st.sampled_from(["token", "sequence"]))
def test_bnpo_is_dapo_and_grpo_is_dapo_at_equal_lengths(batch, level):
    policy, old, advantages = given_logps(batch, "policy"), given_logps(batch, "old"), batch.rows["advantages"]

    def of(loss_type: str, policy: CompletionLogps) -> tuple[float, Tensor]:
        return run(GRPOLoss(loss_type=loss_type, importance_sampling_level=level), policy, advantages, old=old)

    bnpo, dapo = of("bnpo", policy), of("dapo", policy)
    assert_same(bnpo, dapo)
    full = torch.ones_like(policy.completion_mask)
    old = completions(old.per_token_logps, full)
    grpo, dapo = (of(loss_type, completions(policy.per_token_logps, full)) for loss_type in ("grpo", "dapo"))
    torch.testing.assert_close(grpo[1], dapo[1], rtol=1e-9, atol=1e-15)


@quick
@given(batches("grouped"), st.booleans())
def test_the_kl_estimate_is_never_negative_and_zero_at_the_reference(batch, corrected):
    policy, ref, old = (given_logps(batch, role) for role in ("policy", "ref", "old"))
    loss, none = GRPOLoss(beta=1.0, use_bias_correction_kl=corrected), batch.rows["advantages"] * 0
    value, _ = run(loss, policy, none, ref=ref, old=old)
    assert value >= 0
    value, grad = run(loss, policy, none, ref=given_logps(batch, "policy"), old=old)
    assert value == 0 and (grad == 0).all()


def test_the_kl_of_a_small_change_is_not_rounded_away():
    """k3 = d^2 / 2 at d = 1e-4: `exp(-d) - 1 + d` in float32 would be 0 or several times that."""
    old = torch.full((1, 1), -1.0)
    mask = torch.ones(1, 1, dtype=torch.bool)
    policy = CompletionLogps(old + 2**-13, mask)
    loss = GRPOLoss(beta=1.0)(
        policy, CompletionLogps(old, mask), advantages=torch.zeros(1), totals=Totals.of(policy)
    ).loss
    assert loss.item() == pytest.approx(2.0**-27, rel=2e-3)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("log_ratio", "advantage"), [(100.0, 1.0), (100.0, -1.0), (-100.0, 1.0), (-100.0, -1.0), (1e4, -1.0)]
)
def test_ratios_beyond_float32(level, log_ratio, advantage):
    """Finite value and gradient, and still clipped to the right side."""
    old = CompletionLogps(torch.full((1, 2), min(-log_ratio, 0.0) - 1), torch.ones(1, 2, dtype=torch.bool))
    policy = completions(old.per_token_logps + log_ratio, old.completion_mask)
    loss = GRPOLoss(importance_sampling_level=level, beta=0.1)
    value, grad = run(loss, policy, torch.tensor([advantage]), old=old, ref=policy.detach())
    assert math.isfinite(value) and grad.isfinite().all()
    if log_ratio > 0:
        assert value == pytest.approx(-1.2) if advantage > 0 else value > 1e17
    else:
        assert value == pytest.approx(0.8) if advantage < 0 else abs(value) < 1e-40
