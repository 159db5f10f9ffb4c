"""Advantages of one's own, of completions and of tokens: from the command line's name to what the loss is given."""

import sys
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator

from logratio.losses import GRPOLoss, TokenLogps
from logratio.trainers.batches.inputs import count_totals, loss_inputs
from logratio.trainers.batches.packing import pack, split_groups
from logratio.trainers.config import RolloutConfig
from logratio.trainers.config.advantages import advantage_called
from logratio.trainers.data.examples import Completion, Example
from logratio.trainers.data.sample import sample
from logratio.trainers.errors import UserError
from logratio.trainers.rollout.kept import of_completions
from logratio.trainers.rollout.sets.rolled import Rolled
from logratio.trainers.rollout.sets.stored import example_of
from logratio.trainers.rollout.sets.windows import give_advantages, of_examples

from .test_rollouts import TEXTS, prompts_of, rollouts

MODULE = '''
import torch
from logratio.losses import ADVANTAGES, advantage

def squared(rewards, context):
    return rewards.square()

def ramp(rewards, context):
    """The reward, and one more for each token; none behind the last."""
    places = torch.arange(int(context.lengths.max()), dtype=torch.float64)
    return torch.where(places < context.lengths[..., None], rewards[..., None] + places, torch.nan)

def short(rewards, context):
    return ramp(rewards, context)[..., :1]

def wrong(rewards, context):
    return rewards.sum()

def alone(rewards, context):
    return rewards
if "alone" not in ADVANTAGES:
    advantage(smallest_group=1, wants_greedy=True)(alone)
'''


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    (tmp_path / "my_advantage.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_advantage", raising=False)
    advantage_called.cache_clear()
    yield
    from logratio.losses import ADVANTAGES

    for table in (ADVANTAGES, ADVANTAGES.reads, ADVANTAGES.ignores):
        table.pop("alone", None)
    advantage_called.cache_clear()
    sys.modules.pop("my_advantage", None)


def called(policy, tokenizer, name, **options):
    def reward(completion_ids, **_):
        return [0.1 * i + 1 for i in range(len(completion_ids))]

    each = rollouts(policy, tokenizer, {"r": reward}, advantage_type=name, **options)
    rolled = each(prompts_of(tokenizer, *TEXTS))
    return each.advantages(rolled, Accelerator()), rolled


def test_of_completions(policy, tokenizer):
    got, rolled = called(policy, tokenizer, "my_advantage:squared")
    assert torch.equal(got, rolled.by_function[..., 0].square())
    mixed, _ = called(policy, tokenizer, ("my_advantage:squared", "rloo"), advantage_weights=(2.0, 0.0))
    torch.testing.assert_close(mixed, 2 * got)


def test_of_tokens_they_reach_the_loss_wherever_the_group_is_cut(policy, tokenizer):
    got, rolled = called(policy, tokenizer, "my_advantage:ramp")
    given = of_examples(got, rolled)
    lengths = [len(c.ids) for e in rolled.examples for c in e.completions]
    rewards = rolled.by_function.flatten().tolist()
    assert given == [tuple(pytest.approx(r + t) for t in range(n)) for r, n in zip(rewards, lengths, strict=True)]
    longest = max(len(e.prompt_ids) for e in rolled.examples) + max(lengths)
    parts = split_groups(rolled.examples, longest)
    assert len(parts) > len(rolled.examples)
    seen = []
    for batch in pack(give_advantages(parts, [], given), longest):
        logps = torch.zeros(batch.scored.shape, dtype=torch.float64)
        inputs = loss_inputs(GRPOLoss(loss_aggregation="prompt_mean"), batch, TokenLogps(logps))
        assert inputs["advantages"].shape == batch.scored.shape and not inputs["advantages"][~batch.scored].any()
        seen += [a[m].tolist() for a, m in zip(inputs["advantages"], batch.scored, strict=True)]
        whole = {e.row: sum(len(c.ids) for c in e.completions) for e in rolled.examples}
        wanted = [whole[e.row] for e in batch.examples for _ in e.completions]
        assert inputs["prompt_tokens"].tolist() == wanted
    assert sorted([round(x, 9) for x in one] for one in seen) == sorted([round(x, 9) for x in one] for one in given)
    totals = count_totals(rolled.examples, GRPOLoss())
    assert totals.num_prompts == len(TEXTS) and totals.num_positive_tokens is None, "not rewarded yet"


def test_they_lie_where_their_tokens_are_scored_and_no_device_is_asked(pack_one):
    """A tensor on the device `meta` has no values that could be waited for."""
    completions = [
        Completion([1, 2, 3, 4], [False, True, True, False]),
        Completion([5, 6], [False, False]),
        Completion([7, 8, 9], [True, False, True]),
    ]
    batch = pack_one([Example([1], completions, row=0, advantages=((1.0, 2.0), (), (3.0, 4.0)))])
    for device in ("cpu", "meta"):
        there = batch.to(torch.device(device))
        inputs = loss_inputs(GRPOLoss(), there, TokenLogps(torch.zeros(there.scored.shape, device=device)))
        assert inputs["advantages"].device.type == device
        if device == "cpu":
            assert inputs["advantages"].tolist() == [[0, 1, 2], [0, 0, 0], [3, 0, 4]]


@pytest.mark.parametrize(("advantages", "positive"), [((0.5, -1.0, 0.0), 2), (((1.0, 0.0), (), (-3.0, 4.0)), 2)])
def test_positive_tokens_are_scored_ones_of_an_advantage_above_0(advantages, positive):
    completions = [Completion([1, 2, 3], [True, False, True]), Completion([4], [False]), Completion([5, 6])]
    example = Example([1], completions, row=0, advantages=advantages)
    assert count_totals([example], GRPOLoss()).num_positive_tokens == positive
    assert count_totals([example, replace(example, advantages=None)], GRPOLoss()).num_positive_tokens is None


def test_what_is_kept_and_shown_of_them_is_their_mean(tokenizer):
    values = torch.tensor([[[1.0, 2.0, 9.0], [4.0, 9.0, 9.0]]])
    assert of_completions(values, torch.tensor([[2, 1]])).tolist() == [1.5, 4.0]
    example = Example([1], [Completion([2, 3])], row=0, advantages=((1.0, 2.0),))
    assert sample(example, tokenizer)[1][0] == "advantage 1.5"


def test_masked_completions_have_none_and_a_checkpoint_keeps_them():
    completions = [Completion([1, 2, 3], [True, False, True]), Completion([4, 5], [False, False])]
    example = Example([1], completions, row=0)
    rolled = Rolled([example], torch.zeros(1, 2, 1))
    given = of_examples(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), rolled)
    assert given == [(1.0, 2.0), ()]
    entry = {"prompt_ids": [1], "completions": [], "label": None, "row": 0, "advantages": [[1.0, 2.0], []]}
    assert example_of(entry).advantages == ((1.0, 2.0), ())
    entry = {"prompt_ids": [1], "completions": [], "label": None, "row": 0, "advantages": [1.0, 2.0]}
    assert example_of(entry).advantages == (1.0, 2.0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wrong", r"wrong must return \[4, 2\], or that with one a token behind it, got \[\]"),
        ("short", r"gave advantages of 1 tokens, and a completion has \d"),
    ],
)
def test_what_they_cannot_be_is_said(policy, tokenizer, name, message):
    with pytest.raises(UserError, match=rf"^--advantage_type my_advantage:{name}:? {message}$"):
        called(policy, tokenizer, f"my_advantage:{name}")


def test_a_function_that_is_entered_says_what_it_asks():
    assert RolloutConfig(advantage_type="my_advantage:alone", num_generations=1).wants_greedy
    with pytest.raises(UserError, match="^--num_generations 1: a group needs at least 2 to compare$"):
        RolloutConfig(advantage_type="my_advantage:squared", num_generations=1)
    with pytest.raises(UserError, match="^--advantage_type='my_advantage:none': the module 'my_advantage' .* has no"):
        RolloutConfig(advantage_type="my_advantage:none")
