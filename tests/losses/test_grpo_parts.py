"""GRPO's parts chosen apart, by hand: normalisers, the level of the ratio, advantages of tokens, KL estimators."""

from dataclasses import replace
from math import log, nan
from typing import Any

import pytest
import torch

from logratio.losses import GRPO_TYPES, KL_ESTIMATORS, LOSS_AGGREGATIONS, CompletionLogps, GRPOLoss, Totals
from logratio.reference import oracle

from ._families import refused

# rho = 3/2, 1, 1/2 and 3/2, 1/2 and 1. The first two completions are of one prompt, the third of another.
RATIOS = [[1.5, 1.0, 0.5], [1.5, nan, 0.5], [nan, 1.0, nan]]
OLD = [[-1.0, -2.0, -3.0], [-4.0, nan, -5.0], [nan, -0.5, nan]]
LOGPS = [[a + log(r) for a, r in zip(*rows, strict=True)] for rows in zip(OLD, RATIOS, strict=True)]
TOKENS, PROMPT_TOKENS = 6, [5, 5, 1]
TOTALS = Totals(num_sequences=3, num_tokens=TOKENS, num_prompts=2)
ADVANTAGES = [2.0, -1.0, 4.0]

Table = list[list[float]]


def logps(rows: Table) -> CompletionLogps:
    """NaN is a hole in the mask."""
    values = torch.tensor(rows, dtype=torch.float64)
    return CompletionLogps(values.requires_grad_(), ~values.detach().isnan())


def run(loss: GRPOLoss, advantages: Any = ADVANTAGES, rows: Any = slice(None), **others: Any) -> tuple[float, Table]:
    """(value, gradient of scored tokens)"""
    x = logps(LOGPS[rows])
    given = torch.tensor(advantages, dtype=torch.float64)
    if loss.wants_prompt_tokens:
        others = {"prompt_tokens": torch.tensor(PROMPT_TOKENS[rows])} | others
    whole = {"advantages": given, "old": logps(OLD)}
    if loss.wants_prompts:
        whole["prompts"] = torch.tensor([0, 0, 1])
        others = {"prompts": whole["prompts"][rows]} | others
    collected = loss.collect(logps(LOGPS), **whole) if loss.window_pass else None
    totals = replace(TOTALS, collected=collected)
    value = loss(x, advantages=given[rows], old=logps(OLD[rows]), totals=totals, **others).loss
    value.backward()
    return value.item(), [g[m].tolist() for g, m in zip(x.per_token_logps.grad, x.completion_mask, strict=True)]


# -min(rho A, clip(rho, 0.8, 1.2) A) and its slope in log p
LOSSES = [[-2.4, -2.0, -1.0], [1.5, 0.8], [-4.0]]
SLOPES = [[0.0, -2.0, -1.0], [1.5, 0.0], [-4.0]]
WEIGHTS = {
    "token_mean": [1 / 6] * 3,
    "sequence_mean": [1 / 9, 1 / 6, 1 / 3],
    "sequence_sum": [1 / 3] * 3,
    "constant_length": [1 / 30] * 3,
    "prompt_mean": [1 / 10, 1 / 10, 1 / 2],
}


def test_a_weight_for_each_aggregation():
    assert set(WEIGHTS) == set(LOSS_AGGREGATIONS)


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo", "luspo"])
@pytest.mark.parametrize("aggregation", WEIGHTS)
def test_an_aggregation_is_the_same_whatever_the_preset(aggregation, loss_type):
    loss = GRPOLoss(loss_type=loss_type, loss_aggregation=aggregation, max_completion_length=10)
    value, slopes = run(loss)
    assert value == pytest.approx(sum(w * sum(x) for w, x in zip(WEIGHTS[aggregation], LOSSES, strict=True)), rel=1e-12)
    for got, wanted, w in zip(slopes, SLOPES, WEIGHTS[aggregation], strict=True):
        assert got == pytest.approx([w * s for s in wanted], rel=1e-12)


@pytest.mark.parametrize(
    ("loss_type", "aggregation"),
    [("dapo", "token_mean"), ("grpo", "sequence_mean"), ("luspo", "sequence_sum"), ("dr_grpo", "constant_length")],
)
def test_a_preset_is_its_papers_aggregation(loss_type, aggregation):
    preset, other = GRPOLoss(loss_type=loss_type), GRPOLoss(loss_type="bnpo", loss_aggregation=aggregation)
    assert run(preset) == run(other)


def test_a_prompt_may_be_cut():
    """Its completions in two micro-batches, in either order: the same sum."""
    loss = GRPOLoss(loss_aggregation="prompt_mean")
    whole, slopes = run(loss)
    parts = [run(loss, rows=rows) for rows in (slice(1, 3), slice(0, 1))]
    assert sum(value for value, _ in parts) == pytest.approx(whole, rel=1e-14)
    assert [*parts[1][1], *parts[0][1]] == slopes


def test_a_prompt_with_nothing_scored_has_no_loss():
    policy, totals = logps([[nan] * 3, [-1.0, -1.0, -1.0]]), Totals(num_sequences=2, num_tokens=3, num_prompts=2)
    given = {"advantages": torch.ones(2, dtype=torch.float64), "prompt_tokens": torch.tensor([0, 3])}
    out = GRPOLoss(loss_aggregation="prompt_mean")(policy, **given, totals=totals).loss
    out.backward()
    assert out.item() == -0.5 and policy.per_token_logps.grad.tolist() == [[0] * 3, [pytest.approx(-1 / 6)] * 3]


def test_at_one_prompt_it_is_the_token_mean_and_at_one_completion_a_prompt_the_sequence_mean():
    old, rows = logps(OLD), logps(LOGPS)
    given = {"advantages": torch.tensor(ADVANTAGES, dtype=torch.float64), "old": old}
    prompt = GRPOLoss(loss_aggregation="prompt_mean")
    for num_prompts, tokens, other in ((1, [6, 6, 6], "token_mean"), (3, [3, 2, 1], "sequence_mean")):
        totals = Totals(num_sequences=3, num_tokens=6, num_prompts=num_prompts)
        got = prompt(rows, **given, prompt_tokens=torch.tensor(tokens), totals=totals).loss
        wanted = GRPOLoss(loss_aggregation=other)(rows, **given, totals=totals).loss
        assert got.item() == pytest.approx(wanted.item(), rel=1e-14)


def test_what_a_prompt_mean_needs():
    loss = GRPOLoss(loss_aggregation="prompt_mean")
    with refused("loss_aggregation=prompt_mean needs prompt_tokens, the scored tokens of each one's prompt"):
        run(loss, prompt_tokens=None)
    with refused("prompt_tokens must be [3], one a completion, got [3, 1]"):
        run(loss, prompt_tokens=torch.ones(3, 1))
    with refused(
        "loss_aggregation='mean' is unknown, expected one of: token_mean, sequence_mean, sequence_sum, "
        "constant_length, prompt_mean"
    ):
        GRPOLoss(loss_aggregation="mean")
    for name in ("gmpo", "rloo"):
        with pytest.raises(ValueError, match=f"^loss_aggregation=token_mean is not read by loss_type {name}; leave"):
            GRPOLoss(loss_type=name, loss_aggregation="token_mean")


# Advantages of tokens -------------------------------------------------------------------------------------------------

BY_TOKEN = [[2.0, -1.0, 4.0], [-1.0, nan, 3.0], [nan, 0.5, nan]]  # NaN where nothing is scored: it is not read


def test_a_token_has_its_own_advantage():
    """-min(rho A_t, clip(rho) A_t): 1.2, 1, 1/2 and 3/2, 1/2 and 1 times A_t."""
    value, slopes = run(GRPOLoss(), BY_TOKEN)
    assert value == pytest.approx((-2.4 + 1.0 - 2.0 + 1.5 - 1.5 - 0.5) / 6, rel=1e-12)
    wanted = [[0, 1.0, -2.0], [1.5, -1.5], [-0.5]]
    for got, row in zip(slopes, wanted, strict=True):
        assert got == pytest.approx([x / 6 for x in row], rel=1e-12)


def test_gspo_token():
    """sg[s] p / sg[p]: s_i A_t, and the slope s_i A_t of token t alone; s = (3/4)^(1/3), (3/4)^(1/2), 1."""
    loss = GRPOLoss(loss_type="grpo", importance_sampling_level="sequence_token")
    s = [0.75 ** (1 / 3), 0.75 ** (1 / 2), 1.0]
    given = [[2.0, -1.0, 4.0], [-1.0, 3.0], [0.5]]
    value, slopes = run(loss, BY_TOKEN)
    each = [[-x * a / len(row) / 3 for a in row] for x, row in zip(s, given, strict=True)]
    assert value == pytest.approx(sum(map(sum, each)), rel=1e-12)
    for got, row in zip(slopes, each, strict=True):
        assert got == pytest.approx(row, rel=1e-12)


OF_COMPLETIONS = ("gmpo", "rloo", "real", "target_po", "a2po", "vespo", "topr", "kimi")


@pytest.mark.parametrize("loss_type", [name for name in GRPO_TYPES if name not in OF_COMPLETIONS])
@pytest.mark.parametrize("level", ["token", "sequence_token"])
def test_equal_advantages_of_tokens_are_that_of_the_completion(loss_type, level):
    if level != "token" and loss_type not in GRPO_TYPES.readers("importance_sampling_level"):
        return
    loss = GRPOLoss(loss_type=loss_type, importance_sampling_level=level)
    assert run(loss, [[a] * 3 for a in ADVANTAGES]) == run(loss)


def test_of_three_completions_of_three_tokens_the_shape_decides():
    one, each = (run(GRPOLoss(), a) for a in (ADVANTAGES, [ADVANTAGES] * 3))
    assert one != each


@pytest.mark.parametrize("loss_type", OF_COMPLETIONS)
def test_a_loss_of_completions_refuses_advantages_of_tokens(loss_type):
    with refused(f"loss_type={loss_type} is of whole completions: advantages must be [3]"):
        run(GRPOLoss(loss_type=loss_type), BY_TOKEN)


def test_so_does_a_ratio_of_completions():
    with refused(
        "importance_sampling_level=sequence has one ratio a completion, whose gradient would spread a token's "
        "advantage over all of them: take sequence_token, or advantages of completions"
    ):
        run(GRPOLoss(importance_sampling_level="sequence"), BY_TOKEN)


def test_the_off_policy_mask_drops_tokens_of_negative_advantage():
    """mean log(p_old / p) = -log(3/4) / 3 = 0.096 and 0.144 are above 0.05; the third completion has not moved."""
    value, slopes = run(GRPOLoss(off_policy_mask_threshold=0.05), BY_TOKEN)
    assert value == pytest.approx((-2.4 - 2.0 - 1.5 - 0.5) / 6, rel=1e-12)
    assert slopes[0][1] == slopes[1][0] == 0


def test_the_oracle_takes_a_list_of_advantages_of_tokens():
    rows = [torch.tensor([x for x in row if x == x], dtype=torch.float64) for row in LOGPS]
    old = [torch.tensor([x for x in row if x == x], dtype=torch.float64) for row in OLD]
    given = [[x for x in row if x == x] for row in BY_TOKEN]
    assert oracle.grpo(rows, old, None, given).item() == pytest.approx(run(GRPOLoss(), BY_TOKEN)[0], rel=1e-12)
    with pytest.raises(ValueError, match="2 advantages for 3 tokens"):
        oracle.grpo(rows, old, None, [given[1], given[1], given[2]])


@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
def test_kl_estimators_are_the_oracles(estimator):
    d = torch.tensor([-1.5, -1e-6, 0.0, 1e-6, 0.7, 9.0], dtype=torch.float64)
    wanted = torch.stack([oracle.kl_estimate(x, torch.zeros(()), estimator) for x in d])
    torch.testing.assert_close(KL_ESTIMATORS[estimator](d), wanted, rtol=1e-6, atol=1e-15)
