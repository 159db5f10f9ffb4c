"""Masks, totals, metrics and the registry."""

import dataclasses

import pytest
import torch

from logratio.losses import (
    LOSSES,
    CompletionLogps,
    DPOLoss,
    Loss,
    Mean,
    PairLogps,
    SFTLoss,
    Totals,
    Variants,
    register,
    variant,
)
from logratio.losses.completions import OPTIONAL
from logratio.losses.options import check_choice, check_positive
from logratio.losses.types import choose, divide

MASK = torch.tensor([[True, True, False], [False, True, False], [False, False, False]])
LOGPS = torch.tensor([[-1.0, -2.0, torch.nan], [torch.inf, -3.0, -9.0], [torch.nan, torch.nan, -torch.inf]])


def test_only_scored_tokens_are_read():
    x = CompletionLogps(LOGPS, MASK)
    assert x.logps.tolist() == [[-1, -2, 0], [0, -3, 0], [0, 0, 0]]
    assert x.sums.tolist() == [-3, -3, 0]
    assert x.lengths.tolist() == [2, 1, 0]
    assert x.averages.tolist() == [-1.5, -3, 0]
    assert x.masked(LOGPS.double() * 2).tolist() == [[-2, -4, 0], [0, -6, 0], [0, 0, 0]]


def test_what_is_optional():
    """One tensor each, masked where it is read; detached, cut into rows and refused alike."""
    assert OPTIONAL == ("entropy", "log_z", "log_sum_p2", "is_top1", "divergence", "weights")
    for name in OPTIONAL:
        with pytest.raises(ValueError, match=f"this loss needs the policy's {name} of every token, which is None"):
            CompletionLogps(LOGPS, MASK).needed(name)
        with pytest.raises(ValueError, match=rf"{name} must be \[3, 3\] as the mask, got \[3, 2\]"):
            CompletionLogps(LOGPS, MASK, **{name: LOGPS[:, :2]})
        x = CompletionLogps(LOGPS, MASK, **{name: LOGPS.half().requires_grad_()})
        assert x.needed(name).tolist() == [[-1, -2, 0], [0, -3, 0], [0, 0, 0]]
        assert x.needed(name).dtype == torch.float32
        assert not getattr(x.detach(), name).requires_grad
        rows = x.rows(slice(1, 3))
        assert getattr(rows, name)[0, 1] == -3 and rows.completion_mask.equal(MASK[1:])
        assert rows.per_token_logps[:, 1].tolist()[0] == -3 and rows.sums.tolist() == [-3, 0]
        assert all((getattr(rows, other) is None) == (other != name) for other in OPTIONAL)


def test_what_holds_numbers_cannot_be_changed():
    """Nor filled by position where names would tell more."""
    x = CompletionLogps(LOGPS, MASK)
    for record, name in (
        (x, "per_token_logps"),
        (PairLogps(x, x), "chosen"),
        (Totals(num_sequences=1, num_tokens=1), "num_tokens"),
        *((loss(), "beta" if hasattr(loss, "beta") else "loss_type") for loss in LOSSES.values()),
    ):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(record, name, None)
    for named in (Totals, *LOSSES.values()):
        with pytest.raises(TypeError, match="positional argument"):
            named(0.1, 0.1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_sums_are_in_at_least_float32(dtype):
    x = CompletionLogps(torch.full((1, 4096), -1.0, dtype=dtype), torch.ones(1, 4096, dtype=torch.bool))
    assert x.sums.item() == -4096 and x.lengths.item() == 4096
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert x.logps.dtype == x.sums.dtype == x.lengths.dtype == expected


def test_detach_keeps_no_graph():
    logps = LOGPS.clone().requires_grad_()
    x = CompletionLogps(logps, MASK, logps * 2).detach()
    assert not x.per_token_logps.requires_grad and not x.entropy.requires_grad
    assert x.completion_mask.equal(MASK) and x.log_z is None


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((LOGPS, MASK[:2]), ValueError, r"must both be \[completions, tokens\], got \(3, 3\) and \(2, 3\)"),
        ((LOGPS[0], MASK[0]), ValueError, r"got \(3,\) and \(3,\)"),
        ((LOGPS, MASK.long()), TypeError, "completion_mask bool, got torch.float32 and torch.int64"),
        ((LOGPS.nan_to_num().long(), MASK), TypeError, "floating point .* got torch.int64 and torch.bool"),
        ((LOGPS, MASK, LOGPS[:, :1]), ValueError, r"entropy must be \[3, 3\] as the mask, got \[3, 1\]"),
    ],
)
def test_logps_that_do_not_fit(args, error, message):
    with pytest.raises(error, match=message):
        CompletionLogps(*args)


def test_pairs_that_do_not_fit():
    three, two = CompletionLogps(LOGPS, MASK), CompletionLogps(LOGPS[:2], MASK[:2])
    with pytest.raises(ValueError, match=r"one row a pair, got \[3, 2\] rows"):
        PairLogps(three, two)
    for third in ({"prompt": two}, {"gold": two}):
        message = r"chosen, rejected, prompt and gold must have one row a pair, got \[3, 3, 2\] rows"
        with pytest.raises(ValueError, match=message):
            PairLogps(three, three, **third)


def test_pairs_are_scored_where_either_side_is():
    """By one token of several."""
    nothing = [False, False]
    chosen, rejected = torch.tensor([[True, False], nothing, nothing]), torch.tensor([nothing, [False, True], nothing])
    pairs = PairLogps(*(CompletionLogps(torch.zeros(3, 2), mask) for mask in (chosen, rejected)))
    assert pairs.scored.tolist() == [True, True, False]


def test_check_like_names_who_and_what():
    policy = CompletionLogps(LOGPS, MASK)
    narrow, short = CompletionLogps(LOGPS[:, :1], MASK[:, :1]), CompletionLogps(LOGPS[:1], MASK[:1])
    policy.check_like(tokens=True, old=None, ref=policy)
    policy.check_like(tokens=False, ref=narrow)
    policy.check_like(tokens=False, ref=None)
    with pytest.raises(ValueError, match=r"ref must have the policy's rows and tokens, got \[3, 1\] for \[3, 3\]"):
        policy.check_like(tokens=True, ref=narrow)
    with pytest.raises(ValueError, match=r"old must have the policy's rows, got \[1, 3\] for \[3, 3\]"):
        policy.check_like(tokens=False, ref=policy, old=short)


def test_totals_count_what_is_scored():
    def counts(totals: Totals) -> Totals:
        assert totals.own.tolist() == [0, 1, 2] and totals.num_prompts == 3
        return dataclasses.replace(totals, own=None, num_prompts=0)

    x = CompletionLogps(LOGPS, MASK)
    assert counts(Totals.of(x)) == Totals(num_sequences=3, num_tokens=3)
    one = CompletionLogps(LOGPS[:, 1:2], MASK[:, 1:2])
    full = CompletionLogps(torch.zeros(3, 4), torch.ones(3, 4, dtype=torch.bool))
    expected = Totals(num_sequences=3, num_tokens=5, num_chosen_tokens=3, num_prompt_tokens=12)
    assert counts(Totals.of(PairLogps(x, one, full))) == expected
    assert counts(Totals.of(PairLogps(one, x))) == Totals(num_sequences=3, num_tokens=5, num_chosen_tokens=2)
    gold = Totals.of(PairLogps(one, x, gold=full))
    assert counts(gold) == Totals(num_sequences=3, num_tokens=17, num_chosen_tokens=2, num_gold_tokens=12)
    weights = torch.tensor([[0.5, 2.0, torch.nan], [9.0, 0.25, 9.0], [9.0, 9.0, 9.0]])
    weighted = Totals.of(CompletionLogps(LOGPS, MASK, weights=weights))
    assert counts(weighted) == Totals(num_sequences=3, num_tokens=3, sum_weights=2.75)
    assert Totals.of(x, advantages=torch.tensor([1.0, 0.0, 1.0])).num_positive_tokens == 2
    by_token = torch.tensor([[1.0, -1.0, 1.0], [1.0, 0.0, 1.0], [1.0, 1.0, 1.0]])
    assert Totals.of(x, advantages=by_token).num_positive_tokens == 1
    collected = torch.ones(2)
    assert Totals.of(x, collected).collected is collected


def test_totals_know_only_what_they_are_told():
    totals = Totals(num_sequences=2, num_tokens=3)
    counts = totals.num_chosen_tokens, totals.num_gold_tokens, totals.num_prompt_tokens
    assert counts == (0, 0, 0) and totals.state == {}
    assert totals.sum_weights is totals.collected is totals.own is None
    other = Totals(num_sequences=2, num_tokens=3)
    assert totals.state is not other.state


def test_means():
    values = torch.tensor([1.0, torch.nan, 4.0], requires_grad=True)
    mean = Mean.of(values, torch.tensor([True, False, True]))
    assert (mean.total.item(), mean.count.item()) == (5.0, 2) and not mean.total.requires_grad
    assert Mean.of(torch.tensor([1.0, 2.0])).count.item() == 2
    none = Mean.of(values, torch.zeros(3, dtype=torch.bool))
    assert (none.total.item(), none.count.item()) == (0.0, 0)


def test_divide_by_nothing_is_zero_with_a_graph():
    x = torch.tensor(3.0, requires_grad=True)
    assert divide(x, 2).item() == 1.5 and divide(x, 0.5).item() == 6
    assert divide(x, torch.tensor(4)).item() == 0.75
    zero = divide(x, 0)
    zero.backward()
    assert zero.item() == 0 and x.grad.item() == 0


def test_checks_say_what_is_wrong():
    with pytest.raises(ValueError, match="colour='red' is unknown, expected one of: blue, green"):
        check_choice("colour", "red", {"blue": 1, "green": 2})
    with pytest.raises(ValueError, match="expected one of: blue, green; did you mean green\\?"):
        check_choice("colour", "gren", {"blue": 1, "green": 2})
    check_positive("beta", 1e-9)
    for value in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"beta={value} must be positive and finite"):
            check_positive("beta", value)


def test_a_choice_keeps_all_digits():
    got = choose(torch.tensor([True, False]), 0.1, 0.7, torch.zeros(1, dtype=torch.float64))
    assert got.dtype == torch.float64 and got.tolist() == [0.1, 0.7]


def test_a_plain_loss_wants_nothing():
    loss, state = Loss(), {"mean": 1.0}
    assert (loss.wants_reference, loss.scores_prompt, loss.scores_gold) == (False, False, False)
    assert (loss.wants_prompts, loss.wants_margin, loss.divergence) == (False, False, None)
    assert loss.stats == () and loss.window_pass is None
    assert loss.advance(Totals(num_sequences=1, num_tokens=1, state=state)) is state


def test_names_are_registered_once():
    with pytest.raises(ValueError, match="a loss named 'dpo' is registered already: .*DPOLoss"):
        register("dpo")(Loss)
    assert LOSSES["dpo"] is DPOLoss
    table = Variants()
    assert variant(table)(divide) is divide and variant(table, "other")(divide) is divide
    assert table == {"divide": divide, "other": divide}
    with pytest.raises(ValueError, match="a variant named 'other' is registered already"):
        variant(table, "other")(divide)


def test_a_loss_that_collects_nothing_says_so():
    with pytest.raises(NotImplementedError, match=r"SFTLoss declares a window_pass but no collect\(\)"):
        SFTLoss().collect(None, None)
    with pytest.raises(NotImplementedError):
        Loss()()


def test_the_methods():
    assert set(LOSSES) >= {"sft", "dpo", "kto", "cpo", "tpo", "orpo", "grpo"}
