"""Variants of DPO that compare a pair with the other pairs of the step, and what of a step is divided by what."""

import math
from math import exp

import pytest
import torch
from torch import Tensor

from logratio.losses import DPO_TYPES, CompletionLogps, DPOLoss, PairLogps, Totals

# One token a completion. Margins log p_w - log p_l of the policy 1, 3, -2, of the reference 0.5, -1, 2.
CHOSEN, REJECTED = [-1.0, -2.0, -3.0], [-2.0, -5.0, -1.0]
REF_CHOSEN, REF_REJECTED = [-1.0, -1.0, -1.0], [-1.5, 0.0, -3.0]
R_W, R_L = [0.0, -1.0, -2.0], [-0.5, -5.0, 2.0]
NOTHING = [math.nan] * 5


def smooth(x: float, e: float) -> float:
    return math.log1p(exp(-x)) * (1 - e) + math.log1p(exp(x)) * e


def slope(x: float, e: float) -> float:
    """Of smooth."""
    return 1 / (1 + exp(-x)) - (1 - e)


def column(values: list[float], rows: list[int], mask: list[bool] | None = None) -> CompletionLogps:
    logps = torch.tensor([[values[row]] for row in rows], dtype=torch.float64, requires_grad=True)
    scored = torch.tensor([[True if mask is None else mask[row]] for row in rows])
    return CompletionLogps(logps, scored)


def step(rows: list[int]) -> tuple[PairLogps, PairLogps]:
    policy = PairLogps(column(CHOSEN, rows), column(REJECTED, rows))
    return policy, PairLogps(column(REF_CHOSEN, rows), column(REF_REJECTED, rows))


def collected_of(loss: DPOLoss) -> Tensor:
    """Of the step of three pairs, and of a fourth with nothing scored."""
    return torch.cat([loss.collect(*step([0, 1, 2])), torch.tensor([NOTHING], dtype=torch.float64)])


def run(loss: DPOLoss, rows: list[int], **totals: object) -> tuple[float, list[float], list[float]]:
    """(value, slopes of chosen, slopes of rejected) of a micro-batch of these pairs, in a step of four."""
    policy, ref = step(rows)
    known = {"num_sequences": 4, "num_tokens": 99, "collected": collected_of(loss), "own": torch.tensor(rows)} | totals
    value = loss(policy, ref, totals=Totals(**known)).loss
    value.backward()
    grads = (x.per_token_logps.grad.flatten().tolist() for x in (policy.chosen, policy.rejected))
    return value.item(), *grads


# What pair k is compared with: its rank among the policy's margins (1, 2, 0) finds the reference's sorted -1, 0.5, 2;
# r_w's rank (2, 1, 0) finds sorted r_l -5, -0.5, 2, and r_l's (1, 0, 2) finds sorted r_w -2, -1, 0.
AOT = [1 - 0.5, 3 - 2.0, -2 + 1.0]
OF_CHOSEN, OF_REJECTED = [0 - 2.0, -1 + 0.5, -2 + 5.0], [-1 + 0.5, -2 + 5.0, 0 - 2.0]


@pytest.mark.parametrize("rows", [[0, 1, 2], [2, 0, 1], [2, 0], [1]], ids=str)
@pytest.mark.parametrize("e", [0.0, 0.2])
def test_aot_matches_ranks_over_the_whole_step(rows, e):
    value, up, down = run(DPOLoss(loss_type="aot", beta=0.5, label_smoothing=e), rows)
    assert value == pytest.approx(sum(smooth(0.5 * AOT[k], e) for k in rows) / 4, rel=1e-12)
    assert up == pytest.approx([0.5 * slope(0.5 * AOT[k], e) / 4 for k in rows], rel=1e-12)
    assert down == pytest.approx([-0.5 * slope(0.5 * AOT[k], e) / 4 for k in rows], rel=1e-12)


@pytest.mark.parametrize("rows", [[0, 1, 2], [2, 0, 1], [2, 0], [1]], ids=str)
@pytest.mark.parametrize("e", [0.0, 0.2])
def test_aot_unpaired_gives_each_side_the_gradient_of_its_match(rows, e):
    """And each side half of its match's value, so that the step's sum is that over ranks."""
    value, up, down = run(DPOLoss(loss_type="aot_unpaired", beta=0.5, label_smoothing=e), rows)
    halves = sum(smooth(0.5 * OF_CHOSEN[k], e) + smooth(0.5 * OF_REJECTED[k], e) for k in rows) / 2
    assert value == pytest.approx(halves / 4, rel=1e-12)
    assert up == pytest.approx([0.5 * slope(0.5 * OF_CHOSEN[k], e) / 4 for k in rows], rel=1e-12)
    assert down == pytest.approx([-0.5 * slope(0.5 * OF_REJECTED[k], e) / 4 for k in rows], rel=1e-12)


def test_equal_margins_keep_the_order_of_the_rows():
    loss = DPOLoss(loss_type="aot", beta=1.0)
    same = torch.tensor([[0.0, 3.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], [0.0, 2.0, 0.0, 0.0]], dtype=torch.float64)
    one = PairLogps(column([-1.0] * 3, [0, 1, 2]), column([-1.0] * 3, [0, 1, 2]))
    totals = Totals(num_sequences=1, num_tokens=6, collected=same, own=torch.tensor([0, 1, 2]))
    out = loss(one, one, totals=totals).loss
    out.backward()
    grads = one.chosen.per_token_logps.grad.flatten().tolist()
    assert grads == pytest.approx([slope(-1, 0), slope(-2, 0), slope(-3, 0)], rel=1e-12)


def test_a_pair_with_nothing_scored_is_not_matched():
    """Last in both orders: it neither takes a rank from the others nor has a loss, nor a gradient."""
    for loss_type in ("aot", "aot_unpaired"):
        loss = DPOLoss(loss_type=loss_type, beta=0.5)
        rows, mask = [0, 1, 2, 3], [True, True, True, False]
        roles = ((CHOSEN, REJECTED), (REF_CHOSEN, REF_REJECTED))
        policy, ref = (PairLogps(*(column([*x, math.nan], rows, mask) for x in sides)) for sides in roles)
        value = loss(policy, ref, totals=Totals.of(policy, loss.collect(policy, ref))).loss
        value.backward()
        assert value.item() == pytest.approx(run(loss, [0, 1, 2])[0], rel=1e-12)
        assert policy.chosen.per_token_logps.grad[3] == policy.rejected.per_token_logps.grad[3] == 0


# Margins r_w - r_l of 0.5, 4, -4: their mean is 1/6.
@pytest.mark.parametrize("rows", [[0, 1, 2], [2, 0], [1]], ids=str)
@pytest.mark.parametrize(("state", "beta"), [({}, 0.5 * (1 + 0.6 / 6)), ({"margin": 1.0}, 0.5 * (1 - 0.6 * 5 / 6))])
def test_beta_dpo_has_one_beta_for_the_step(rows, state, beta):
    """No gradient flows into beta, of the pairs of this micro-batch as little as of the others."""
    value, up, down = run(DPOLoss(loss_type="beta_dpo", beta=0.5), rows, state=state, own=None)
    margins = [R_W[k] - R_L[k] for k in rows]
    assert value == pytest.approx(sum(smooth(beta * m, 0) for m in margins) / 4, rel=1e-12)
    assert up == pytest.approx([beta * slope(beta * m, 0) / 4 for m in margins], rel=1e-12)
    assert down == pytest.approx([-x for x in up], rel=1e-12)


def test_what_is_collected():
    """Both models' margins, log-ratios, and what these differ by a token; a pair counts where either side is scored."""
    chosen, rejected = [True, True, False], [True, False, False]
    policy = PairLogps(column(CHOSEN, [0, 1, 2], chosen), column(REJECTED, [0, 1, 2], rejected))
    ref = PairLogps(column(REF_CHOSEN, [0, 1, 2], chosen), column(REF_REJECTED, [0, 1, 2], rejected))
    collected = DPOLoss(loss_type="aot").collect(policy, ref)
    assert collected[:2].tolist() == [[1.0, 0.5, 0.0, -0.5, 0.5], [-2.0, -1.0, -1.0, 0.0, -1.0]]
    assert collected[2].isnan().all() and collected.shape == (3, 5) and not collected.requires_grad


def test_collect_weighs_tokens_as_the_loss_does():
    """ld_alpha = 1/4: the second token of three counts, of one shared, a quarter."""
    mask = torch.ones(1, 2, dtype=torch.bool)
    long = CompletionLogps(torch.tensor([[-1.0, -2.0]]), mask)
    short = CompletionLogps(torch.tensor([[-4.0]]), mask[:, :1])
    ref = PairLogps(CompletionLogps(torch.tensor([[-1.0, -6.0]]), mask), short)
    collected = DPOLoss(loss_type="aot", ld_alpha=0.25).collect(PairLogps(long, short), ref)
    assert collected.tolist() == [[2.5, 1.5, 1.0, 0.0, 0.5]]


def test_the_state_of_beta_dpo_is_a_running_mean_of_margins():
    loss = DPOLoss(loss_type=("sigmoid", "beta_dpo"), beta_dpo_momentum=0.75)
    totals = Totals(num_sequences=4, num_tokens=6, collected=collected_of(loss))
    assert loss.advance(totals) == {"margin": pytest.approx(0.25 / 6)}
    later = Totals(num_sequences=4, num_tokens=6, collected=totals.collected, state={"margin": 2.0})
    assert loss.advance(later) == {"margin": pytest.approx(1.5 + 0.25 / 6)}
    nothing = Totals(num_sequences=1, num_tokens=0, collected=torch.tensor([NOTHING]), state={"margin": 2.0})
    assert loss.advance(nothing) == {"margin": 1.5}


def test_where_there_is_nothing_to_advance_the_state_stays():
    known = {"margin": 2.0}
    totals = Totals(num_sequences=3, num_tokens=6, collected=torch.ones(3, 4), state=known)
    assert DPOLoss(loss_type="aot").advance(totals) is known
    assert DPOLoss(loss_type="beta_dpo").advance(Totals(num_sequences=3, num_tokens=6, state=known)) is known


def test_a_step_of_nothing_leaves_beta_as_it_is():
    policy, ref = step([0])
    totals = Totals(num_sequences=1, num_tokens=0, collected=torch.tensor([NOTHING], dtype=torch.float64))
    value = DPOLoss(loss_type="beta_dpo", beta=0.5)(policy, ref, totals=totals).loss
    assert value.item() == pytest.approx(smooth(0.5 * 0.5, 0), rel=1e-12)


def test_what_was_not_collected_is_asked_for():
    policy, ref = step([0])
    collected, own = torch.zeros(1, 4), torch.tensor([0])
    message = "(aot|alpha_dpo) compares the pairs of the whole step: it needs totals.collected and totals.own"
    for loss_type in ("aot", "aot_unpaired", "alpha_dpo"):
        for known in ({"collected": collected}, {"own": own}):
            with pytest.raises(ValueError, match=message):
                DPOLoss(loss_type=loss_type)(policy, ref, totals=Totals(num_sequences=1, num_tokens=2, **known))
    with pytest.raises(ValueError, match="beta_dpo adapts beta to the pairs of the whole step: it needs totals.coll"):
        DPOLoss(loss_type="beta_dpo")(policy, ref, totals=Totals(num_sequences=1, num_tokens=2, own=own))
    with pytest.raises(ValueError, match="dr_dpo weighs the pairs of the whole step: it needs totals.collected"):
        DPOLoss(loss_type="dr_dpo")(policy, ref, totals=Totals(num_sequences=1, num_tokens=2, own=own))


@pytest.mark.parametrize("loss_type", DPO_TYPES)
def test_which_variants_need_a_pass_over_the_step(loss_type):
    e = 0.1 if loss_type == "exo_pair" else 0.0
    needed = "own" if loss_type in ("aot", "aot_unpaired", "beta_dpo", "alpha_dpo", "dr_dpo") else None
    assert DPOLoss(loss_type=loss_type, label_smoothing=e).window_pass == needed
    assert DPOLoss(loss_type=("sigmoid", loss_type), label_smoothing=e).window_pass == needed


@pytest.mark.parametrize(("pairs", "tokens", "expected"), [(8, 10, 6 / 10), (3, 1, 6), (2, 0, 6)])
def test_sft_is_divided_by_the_chosen_tokens_of_the_step(pairs, tokens, expected):
    """Log-probs of -1, -2, -3; by one where the step has none."""
    policy, ref = step([0, 1, 2])
    totals = Totals(num_sequences=pairs, num_tokens=77, num_chosen_tokens=tokens)
    value = DPOLoss(loss_type="sft")(policy, ref, totals=totals).loss
    value.backward()
    assert value.item() == pytest.approx(expected, rel=1e-12)
    assert policy.chosen.per_token_logps.grad.flatten().tolist() == pytest.approx([-expected / 6] * 3, rel=1e-12)
    assert (policy.rejected.per_token_logps.grad == 0).all()


def test_a_step_without_pairs_costs_nothing():
    policy, ref = step([0])
    value = DPOLoss(loss_type="hinge")(policy, ref, totals=Totals(num_sequences=0, num_tokens=0)).loss
    value.backward()
    assert value.item() == 0 and policy.chosen.per_token_logps.grad.item() == 0
