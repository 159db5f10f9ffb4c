"""Lists: numbers by hand, what they are of two completions, and what does not matter."""

import math
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor

from logratio.losses import LISTWISE_TYPES, CompletionLogps, DPOLoss, ListwiseLoss, Loss, LossOutput, PairLogps, Totals
from logratio.reference._law_runs import inputs
from logratio.reference.laws import for_every_batch
from logratio.reference.strategies import Batch

from ._families import refused

every_type = pytest.mark.parametrize("name", LISTWISE_TYPES)
LN = {n: math.log(n) for n in (2, 3, 4, 5, 6, 8)}


def flat(values: list[float]) -> CompletionLogps:
    """Completions of one scored token each."""
    logps = torch.tensor([[v] for v in values], dtype=torch.float64)
    return CompletionLogps(logps, torch.ones_like(logps, dtype=torch.bool))


def run(loss: Loss, scores: list[float], rewards: list[float], sizes: list[int]) -> tuple[LossOutput, list[float]]:
    """Value and slopes where each completion has this log-ratio, over a reference of -50 nats."""
    leaf = torch.tensor([[s - 50.0] for s in scores], dtype=torch.float64, requires_grad=True)
    policy = CompletionLogps(leaf, torch.ones_like(leaf, dtype=torch.bool))
    graded = torch.tensor(rewards, dtype=torch.float64, requires_grad=True)
    out = loss(policy, flat([-50.0] * len(scores)), graded, sizes, totals=Totals.of(policy, sizes=sizes))
    out.loss.backward()
    assert leaf.grad is not None and graded.grad is None
    return out, leaf.grad[:, 0].tolist()


# p = (2, 1, 5) / 8 and q = (1, 1, 2) / 4
SCORES, REWARDS = [LN[2], 0.0, LN[5]], [0.0, 0.0, LN[2]]
BY_HAND = {
    "infonca": LN[4] / 4 + LN[8] / 4 + (LN[8] - LN[5]) / 2,
    # q of softplus(-s) = ln 3/2, ln 2, ln 6/5, and a third of softplus(s) = ln 3, ln 2, ln 6
    "nca": (LN[3] - LN[2]) / 4 + LN[2] / 4 + (LN[6] - LN[5]) / 2 + (LN[3] + LN[2] + LN[6]) / 3,
    "exo_rw": -LN[2] / 8 + 5 / 8 * (LN[5] - LN[4]),
    "plackett_luce": LN[8] - LN[5],  # the third before the others, of which neither is before the other
}
SLOPES = {
    "infonca": [2 / 8 - 1 / 4, 1 / 8 - 1 / 4, 5 / 8 - 2 / 4],  # p - q
    "nca": [-1 / 4 / 3 + 2 / 9, -1 / 8 + 1 / 6, -1 / 2 / 6 + 5 / 18],  # -q (1 - s(x)) + s(x) / 3
    "plackett_luce": [2 / 8, 1 / 8, 5 / 8 - 1],
}


@every_type
def test_by_hand(name):
    out, slopes = run(ListwiseLoss(loss_type=name, beta=1.0), SCORES, REWARDS, [3])
    assert out.loss.item() == pytest.approx(BY_HAND[name], rel=1e-12)
    kl = BY_HAND["exo_rw"]
    logs = [0.0, -LN[2], LN[5] - LN[4]]  # log p / q
    expected = SLOPES.get(name) or [p * (x - kl) for p, x in zip([2 / 8, 1 / 8, 5 / 8], logs, strict=True)]
    assert slopes == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_a_ranking_by_hand():
    """Third, first, second: 5/8, then 2/3 of what is left, then 1."""
    out, slopes = run(ListwiseLoss(loss_type="plackett_luce", beta=1.0), SCORES, [1.0, -7.0, 2.0], [3])
    assert out.loss.item() == pytest.approx(LN[8] - LN[5] + LN[3] - LN[2], rel=1e-12)
    assert slopes == pytest.approx([2 / 8 + 2 / 3 - 1, 1 / 8 + 1 / 3, 5 / 8 - 1], rel=1e-12)


@every_type
def test_lists_of_different_sizes_are_a_mean_of_each_alone(name):
    loss, scores, rewards = ListwiseLoss(loss_type=name), [0.4, -1.0, *SCORES], [0.0, 2.0, *REWARDS]
    whole, slopes = run(loss, scores, rewards, [2, 3])
    (one, of_one), (other, of_other) = run(loss, scores[:2], rewards[:2], [2]), run(loss, scores[2:], rewards[2:], [3])
    assert whole.loss.item() == pytest.approx((one.loss + other.loss).item() / 2, rel=1e-12)
    assert slopes == pytest.approx([slope / 2 for slope in of_one + of_other], rel=1e-12)


@pytest.mark.parametrize("sizes", [[2], [3], [4, 2]])
def test_at_the_reference(sizes):
    """ln K; 2 ln 2; KL(uniform || q); ln K!, whatever beta is."""
    rewards = [float(i) for size in sizes for i in range(size)]
    mean = lambda values: sum(values) / len(sizes)  # noqa: E731
    log_sums = [math.log(sum(math.exp(i) for i in range(size))) for size in sizes]
    expected = {
        "infonca": mean([math.log(size) for size in sizes]),
        "nca": 2 * LN[2],
        "exo_rw": mean([z - (size - 1) / 2 - math.log(size) for z, size in zip(log_sums, sizes, strict=True)]),
        "plackett_luce": mean([math.lgamma(size + 1) for size in sizes]),
    }
    for name, constant in expected.items():
        for beta in (0.1, 3.0):
            out, _ = run(ListwiseLoss(loss_type=name, beta=beta), [0.0] * len(rewards), rewards, sizes)
            assert out.loss.item() == pytest.approx(constant, rel=1e-12), name


def test_nca_rests_where_each_is_as_likely_as_its_reward_says():
    q = [1 / 4, 1 / 4, 2 / 4]
    scores = [math.log(3 * x) for x in q]  # sigmoid(s) = q / (q + 1/3)
    _, slopes = run(ListwiseLoss(loss_type="nca", beta=1.0), scores, REWARDS, [3])
    assert slopes == pytest.approx([0.0] * 3, abs=1e-15)
    for name in ("infonca", "exo_rw"):  # these, wherever the scores are as far from each other
        _, slopes = run(ListwiseLoss(loss_type=name, beta=1.0), [s - 3.0 for s in scores], REWARDS, [3])
        assert slopes == pytest.approx([0.0] * 3, abs=1e-15)


def test_equal_rewards_are_not_ranked_and_are_drawn_together():
    loss, scores = ListwiseLoss(loss_type="plackett_luce", beta=1.0), [2.0, -1.0, 0.5]
    out, slopes = run(loss, scores, [1.0, 1.0, 1.0], [3])
    assert out.loss.item() == 0 and slopes == [0.0] * 3
    assert {name: mean.count.item() for name, mean in out.metrics.items()} == {
        **dict.fromkeys(["rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"], 0),
        **{"logps/chosen": 0, "logps/rejected": 0, "frac_reward_zero_std": 1},
    }
    assert out.metrics["frac_reward_zero_std"].value == 1
    _, slopes = run(ListwiseLoss(beta=1.0), scores, [1.0, 1.0, 1.0], [3])
    assert slopes[0] > 0 > slopes[1]


def test_metrics_by_hand():
    """The best two are equal, of the three pairs with different rewards two are won; a list of equals counts apart."""
    scores, rewards = [1.0, 3.0, -2.0, 2.0, 5.0, 5.0], [4.0, 4.0, 0.0, 1.0, 9.0, 9.0]
    out, _ = run(ListwiseLoss(beta=0.5), scores, rewards, [4, 2])
    means = {name: (mean.total.item(), mean.count.item()) for name, mean in out.metrics.items()}
    assert means == {
        "rewards/chosen": (1.0, 1),
        "rewards/rejected": (-1.0, 1),
        "rewards/margins": (2.0, 1),
        "rewards/accuracies": (4.0, 5),  # 1 and 3 over -2, 3 over 2, 2 over -2; not 1 over 2
        "logps/chosen": (-48.0, 1),
        "logps/rejected": (-52.0, 1),
        "frac_reward_zero_std": (1.0, 2),
    }


def test_a_list_with_nothing_scored_is_in_no_metric():
    scored = torch.tensor([[True], [True], [False], [False]])
    policy, ref = (CompletionLogps(torch.full((4, 1), x, dtype=torch.float64), scored) for x in (-1.0, -2.0))
    rewards = torch.tensor([1.0, 1.0, 0.0, 3.0], dtype=torch.float64)
    metrics = ListwiseLoss()(policy, ref, rewards, [2, 2], totals=Totals.of(policy, sizes=[2, 2])).metrics
    share = metrics["frac_reward_zero_std"]
    assert (share.total.item(), share.count.item(), metrics["rewards/margins"].count.item()) == (1, 1, 0)


def test_the_reference_has_no_gradient_and_may_have_tokens_of_its_own():
    policy, rewards = flat([-1.0, -2.0]), torch.tensor([1.0, 0.0]).double()
    totals = Totals(num_sequences=1, num_tokens=2)
    before = torch.tensor([[-1.0, -0.5], [-1.0, -0.5]], dtype=torch.float64, requires_grad=True)
    ref = CompletionLogps(before, torch.ones(2, 2, dtype=torch.bool))
    out = ListwiseLoss(loss_type="plackett_luce")(policy, ref, rewards, [2], totals=totals)
    assert out.loss.item() == pytest.approx(math.log(1 + math.exp(-0.1))) and not out.loss.requires_grad
    with refused("ref must have the policy's rows, got [1, 1] for [2, 1]"):
        ListwiseLoss()(policy, flat([-1.0]), rewards, [2], totals=totals)


# q of the worse completion is what exo_pair and cdpo call label_smoothing
PAIRS: dict[str, tuple[Any, Any, float]] = {
    "plackett_luce": (ListwiseLoss(loss_type="plackett_luce", beta=0.3), DPOLoss(beta=0.3), 1.0),
    "infonca as cdpo": (
        ListwiseLoss(beta=0.3, temperature_alpha=2.0),
        DPOLoss(beta=0.3, loss_type="cdpo", label_smoothing=0.2),
        2 * math.log(0.8 / 0.2),
    ),
    "infonca as sigmoid": (ListwiseLoss(beta=0.3, temperature_alpha=1e-3), DPOLoss(beta=0.3), 1.0),
    "exo_rw": (
        ListwiseLoss(loss_type="exo_rw", beta=0.3),
        DPOLoss(loss_type="exo_pair", beta=0.3, label_smoothing=0.2),
        math.log(0.8 / 0.2),
    ),
    "nca": (
        ListwiseLoss(loss_type="nca", beta=0.3, temperature_alpha=1e-3),
        DPOLoss(loss_type="nca_pair", beta=0.3),
        1.0,
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_two_completions_are_a_pair(name):
    """Value, gradient and metrics, whichever of the two stands first."""
    loss, of_pairs, gap = PAIRS[name]

    def law(batch: Batch) -> None:
        width = max(batch.masks[part].shape[1] for part in ("chosen", "rejected"))

        pairs = {role: {p: batch.tokens[role][p] for p in ("chosen", "rejected")} for role in ("policy", "ref")}
        leaves = {p: x.clone().requires_grad_() for p, x in pairs["policy"].items()}
        policy = PairLogps(*(CompletionLogps(leaves[p], batch.masks[p]) for p in leaves))
        ref = PairLogps(*(CompletionLogps(pairs["ref"][p], batch.masks[p]) for p in leaves))
        expected = of_pairs(policy, ref, totals=Totals.of(policy))
        before = torch.autograd.grad(expected.loss, list(leaves.values()))

        # every other pair with its rejected completion first
        order = [(("chosen", "rejected") if i % 2 else ("rejected", "chosen"), i) for i in range(len(batch))]
        rows = [(part, i) for parts, i in order for part in parts]

        def of(values: dict[str, Tensor]) -> Tensor:
            return torch.stack(
                [torch.nn.functional.pad(values[p][i], (0, width - values[p].shape[1])) for p, i in rows]
            )

        mask = of(batch.masks)
        mine = CompletionLogps(of(leaves), mask)
        rewards = torch.tensor([gap if part == "chosen" else 0.0 for part, _ in rows], dtype=torch.float64)
        sizes = [2] * len(batch)
        totals = Totals.of(mine, sizes=sizes)
        got = loss(mine, CompletionLogps(of(pairs["ref"]), mask), rewards, sizes, totals=totals)
        after = torch.autograd.grad(got.loss, list(leaves.values()))
        torch.testing.assert_close(got.loss, expected.loss, rtol=1e-10, atol=1e-12)
        for a, b in zip(after, before, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
        for metric, mean in expected.metrics.items():
            assert got.metrics[metric].count == mean.count
            torch.testing.assert_close(got.metrics[metric].total, mean.total, rtol=1e-10, atol=1e-12)

    for_every_batch("paired", law, max_examples=10, max_size=30.0, spreads=(0.25, 4.0))


@every_type
def test_the_order_within_a_list_does_not_matter(name):
    loss = ListwiseLoss(loss_type=name, beta=0.5)

    def outcome(given: dict[str, Any], order: list[int]) -> tuple[Tensor, Tensor, dict[str, float]]:
        policy, ref = given["policy"], given["ref"]
        leaf = policy.per_token_logps[order].clone().requires_grad_()
        mine, mask = CompletionLogps(leaf, policy.completion_mask[order]), ref.completion_mask[order]
        theirs = CompletionLogps(ref.per_token_logps[order], mask)
        totals = Totals.of(mine, sizes=given["sizes"])
        out = loss(mine, theirs, given["rewards"][order], given["sizes"], totals=totals)
        out.loss.backward()
        assert leaf.grad is not None
        return out.loss.detach(), leaf.grad, {k: float(m.total) for k, m in out.metrics.items()}

    def law(batch: Batch) -> None:
        given = inputs(loss, batch)
        starts = [0, *accumulate(given["sizes"])][:-1]
        order = [
            i for start, size in zip(starts, given["sizes"], strict=True) for i in reversed(range(start, start + size))
        ]
        plain, moved = outcome(given, list(range(len(order)))), outcome(given, order)
        torch.testing.assert_close(moved[0], plain[0], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(moved[1], plain[1][order], rtol=1e-9, atol=1e-12)
        assert moved[2] == pytest.approx(plain[2], rel=1e-9, abs=1e-9)

    for_every_batch("listed", law, max_examples=15, max_size=30.0, spreads=(0.25, 4.0))


def test_what_a_variant_gives_where_a_list_has_ended_is_not_read(monkeypatch):
    monkeypatch.setitem(LISTWISE_TYPES, "nca", lambda x, loss: 1 + 0 * x.scores)
    out, _ = run(ListwiseLoss(loss_type="nca"), [0.0] * 7, [0.0] * 7, [2, 3, 2])
    assert out.loss.item() == 7 / 3


@pytest.mark.parametrize("rewards", [torch.zeros(2), torch.zeros(3, 1), torch.zeros(3, dtype=torch.int64)], ids=str)
def test_rewards_that_do_not_fit(rewards):
    x = flat([-1.0, -2.0, -3.0])
    with refused(f"rewards must be floating point [3], got {rewards.dtype} {list(rewards.shape)}"):
        ListwiseLoss()(x, x, rewards, [3], totals=Totals.of(x, sizes=[3]))


def test_sizes_that_do_not_add_up():
    x = flat([-1.0, -2.0, -3.0])
    for sizes in ([2, 2], [2, 1], [3, 0]):
        with refused(f"sizes must be 2 or more and add up to the 3 completions, got {sizes}"):
            ListwiseLoss()(x, x, torch.zeros(3), sizes, totals=Totals.of(x, sizes=[3]))


def test_the_step_is_counted_in_lists():
    x = flat([-1.0, -2.0, -3.0, -4.0, -5.0])
    totals = Totals.of(x, sizes=[2, 3])
    assert (totals.num_sequences, totals.num_tokens) == (2, 5)
