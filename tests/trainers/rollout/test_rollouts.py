"""GRPO's data: rewards in TRL's form, metrics, what is compared with what."""

import math
import types

import pytest
import torch
from accelerate import Accelerator

from logratio.losses import GRPOLoss
from logratio.reference import oracle
from logratio.trainers.batches.inputs import count_totals
from logratio.trainers.config import RolloutConfig
from logratio.trainers.data.examples import Prompt
from logratio.trainers.errors import UserError
from logratio.trainers.policy.tiny import tiny_model
from logratio.trainers.processes import once
from logratio.trainers.rollout import rollouts as rollouts_module
from logratio.trainers.rollout.rollouts import Rollouts
from logratio.trainers.rollout.sets.windows import give_advantages

from ._prompts import TEXTS, argmax_loop, prompts_of, sample_of


def rollouts(policy, tokenizer, rewards, **options):
    config = RolloutConfig(num_generations=2, reward_funcs=tuple(rewards), **options)
    return Rollouts(policy, tokenizer, config, rewards, max_completion_length=6)


def rolled_out(*args, **options):
    """(examples with their advantages, metrics) of a process that is the only one."""

    def run(prompts):
        each, alone = rollouts(*args, **options), Accelerator()
        rolled = each(prompts)
        advantages = each.advantages(rolled, alone).flatten().tolist()
        return give_advantages(rolled.examples, [], advantages), each.metrics(rolled, alone)

    return run


def test_rewards_are_called_in_trls_form(policy, tokenizer):
    seen = {}

    def watch(prompts, completions, completion_ids, max_completion_length, answer, **others):
        seen.update(
            prompts=prompts, completions=completions, ids=completion_ids, limit=max_completion_length,
            answer=answer, others=others,
        )  # fmt: skip
        return [float(i) for i in range(len(prompts))]

    prompts = [
        Prompt([65, 66], "AB", {"answer": "1", "level": 3}, 7),
        Prompt([67], "C", {"answer": "2", "level": 4}, 9),
    ]
    examples, _ = rolled_out(policy, tokenizer, {"watch": watch})(prompts)
    assert seen["prompts"] == ["AB", "AB", "C", "C"]
    assert seen["answer"] == ["1", "1", "2", "2"] and seen["others"]["level"] == [3, 3, 4, 4]
    assert seen["others"].keys() == {"level", "trainer_state", "log_metric", "log_extra"}
    assert seen["limit"] == 6
    ids = [c.ids for e in examples for c in e.completions]
    assert seen["ids"] == ids and all(1 <= len(i) <= 6 for i in ids)
    assert seen["completions"] == [tokenizer.decode(i, skip_special_tokens=True) for i in ids]
    assert [(e.row, e.prompt_ids) for e in examples] == [(7, [65, 66]), (9, [67])]
    assert all(c.scored is None for e in examples for c in e.completions)
    for e in examples:
        assert e.advantages == pytest.approx([-0.5 / (math.sqrt(0.5) + 1e-4), 0.5 / (math.sqrt(0.5) + 1e-4)])


def test_rollouts_are_sampled_as_configured(policy, tokenizer):
    """Next to temperature 0, and with next to no probability allowed, only the likeliest tokens are left."""
    prompts = prompts_of(tokenizer, *TEXTS)
    greedy = [argmax_loop(policy.model, p.prompt_ids, {tokenizer.eos_token_id}, 6)[0] for p in prompts]
    for options in ({"temperature": 1e-4}, {"top_p": 1e-4}):
        examples, _ = rolled_out(policy, tokenizer, {"none": lambda prompts, **_: [0.0] * len(prompts)}, **options)(
            prompts
        )
        assert [c.ids for e in examples for c in e.completions] == [ids for ids in greedy for _ in range(2)]


def test_rewards_see_no_special_tokens(policy, tokenizer):
    seen = []
    judge = rollouts(policy, tokenizer, {"watch": lambda completions, **_: seen.extend(completions) or [0.5]})
    scored = judge.score([Prompt([65], "A", {}, 0)], [sample_of([66, 67, tokenizer.eos_token_id], True)])
    assert seen == scored.texts == ["BC"] and scored.rewards.tolist() == [[0.5]]


def test_conversations_get_messages_back(policy, tokenizer):
    seen = {}

    def watch(prompts, completions, **_):
        seen.update(prompts=prompts, completions=completions)
        return [0.0] * len(prompts)

    messages = [{"role": "user", "content": "hi"}]
    rolled_out(policy, tokenizer, {"watch": watch})([Prompt([65], messages, {}, 0)])
    assert seen["prompts"] == [messages, messages]
    assert all(
        len(c) == 1 and c[0].keys() == {"role", "content"} and c[0]["role"] == "assistant" for c in seen["completions"]
    )


def given_rollouts(tokenizer, scores, lengths, group, **options):
    """(examples with their advantages, metrics) of completions of these lengths, 4 the limit; None: no opinion."""
    ended = [n < 4 for n in lengths]
    ids = [[65] * (n - 1) + [tokenizer.eos_token_id if e else 66] for n, e in zip(lengths, ended, strict=True)]
    rewards = {f"reward_{k}": lambda k=k, **_: [row[k] for row in scores] for k in range(len(scores[0]))}
    config = RolloutConfig(num_generations=group, reward_funcs=tuple(rewards), **options)
    each, alone = Rollouts(None, tokenizer, config, rewards, max_completion_length=4), Accelerator()
    said = [sample_of(i, e) for i, e in zip(ids, ended, strict=True)]
    each.sample = lambda requests, prompts: [said[i : i + group] for i in range(0, len(said), group)]
    rolled = each(prompts_of(tokenizer, *map(str, range(len(ids) // group))))
    advantages = each.advantages(rolled, alone).flatten().tolist()
    means = {name: m.total.item() / m.count.item() for name, m in each.metrics(rolled, alone).items() if m.count}
    return give_advantages(rolled.examples, [], advantages), means, ids


SCORES = [(1.0, None), (0.0, 0.5), (2.0, None), (2.0, None), (None, None), (1.0, 0.25)]
LENGTHS = [1, 4, 3, 4, 2, 4]


def test_metrics_count_what_is_known(tokenizer):
    """Three groups of two: weights 1 and 10, no opinion on some, a group of equal rewards, one with a single reward."""
    examples, means, _ = given_rollouts(tokenizer, SCORES, LENGTHS, 2, reward_weights=(1.0, 10.0))
    assert means == pytest.approx(
        {
            "reward": (1 + 5 + 2 + 2 + 3.5) / 5,
            "reward_std": math.sqrt((1.7**2 + 2.3**2 + 2 * 0.7**2 + 0.8**2) / 4),
            "frac_reward_zero_std": 1 / 3,
            "completions/mean_length": 3,
            "completions/min_length": 1,
            "completions/max_length": 4,
            "completions/mean_terminated_length": 2,
            "completions/min_terminated_length": 1,
            "completions/max_terminated_length": 3,
            "completions/clipped_ratio": 0.5,
            "completions/unscored_ratio": 1 / 6,
            "rewards/reward_0/mean": 1.2,
            "rewards/reward_0/std": math.sqrt((2 * 0.2**2 + 1.2**2 + 2 * 0.8**2) / 4),
            "rewards/reward_1/mean": 0.375,
            "rewards/reward_1/std": math.sqrt(2 * 0.125**2),
        },
        rel=1e-12,
    )
    assert examples[1].advantages == examples[2].advantages == (0.0, 0.0)
    assert examples[0].advantages[0] < 0 < examples[0].advantages[1]


@pytest.mark.parametrize("lengths", [LENGTHS, [4] * 6])
def test_metrics_are_trls(tokenizer, lengths):
    """Names and values of TRL's own trainer on the same completions and rewards, but for what the module says."""
    pytest.importorskip("trl")
    from logratio.reference._trl_drive import constructed

    weights = (1.0, 10.0)
    examples, ours, ids = given_rollouts(tokenizer, SCORES, lengths, 2, reward_weights=weights)
    scorers = [lambda k=k, **_: [row[k] for row in SCORES] for k in range(2)]
    for k, scorer in enumerate(scorers):
        scorer.__name__ = f"reward_{k}"
    options = {"num_generations": 2, "per_device_train_batch_size": 6, "beta": 0.0, "reward_weights": list(weights)}
    prompts = [{"prompt": str(i // 2)} for i in range(6)]
    model = tiny_model(num_hidden_layers=1)
    with constructed("grpo", model, tokenizer, prompts, options, reward_funcs=scorers, copied=False) as trainer:
        trainer.model.train()
        trainer._generate_single_turn = lambda *_, **__: (ids, None)
        trainer._get_per_token_logps_and_entropies = lambda *_, **__: (torch.zeros(6, 1), None, None)
        advantages = trainer._generate_and_score_completions(prompts)["advantages"].tolist()
        theirs = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    del theirs["num_tokens"]  # counted elsewhere
    assert theirs.keys() - ours.keys() <= {name for name, value in theirs.items() if "terminated" in name and not value}
    assert ours.keys() - theirs.keys() == {"completions/unscored_ratio"}
    assert {name: ours[name] for name in ours.keys() & theirs.keys()} == pytest.approx(
        {name: theirs[name] for name in ours.keys() & theirs.keys()}, rel=1e-5
    )
    assert [a for e in examples for a in e.advantages] == pytest.approx(advantages, rel=1e-3, abs=1e-3)


def test_a_completion_nobody_has_an_opinion_on_has_no_reward(policy, tokenizer):
    examples, metrics = rolled_out(policy, tokenizer, {"silent": lambda prompts, **_: [None] * len(prompts)})(
        prompts_of(tokenizer, "a")
    )
    assert examples[0].advantages == (0.0, 0.0)
    assert metrics["reward"].count == 0 and metrics["rewards/silent/mean"].count == 0
    assert metrics["completions/unscored_ratio"] == (2, 2)


def test_what_rewards_log_is_a_metric_of_the_step(policy, tokenizer):
    def reward(prompts, log_metric, **_):
        log_metric("judge/cost", len(prompts))
        log_metric("judge/cost", 1)
        return [0.0] * len(prompts)

    _, metrics = rolled_out(policy, tokenizer, {"r": reward}, advantage_type="remax")(prompts_of(tokenizer, "a", "b"))
    assert metrics["judge/cost"] == (5, 2), "of the greedy answers' call nothing"


def test_an_error_on_one_process_is_raised_on_all(policy, tokenizer, monkeypatch):
    """And a metric that only one process logs is one of all: they are added up in order."""
    prompts = [Prompt([65], "A", {}, 0)]
    sampled = [sample_of([66], True)]
    told = []

    def raised(mine):
        told.extend(mine)
        return [*mine, elsewhere]

    monkeypatch.setattr(once, "gather_object", raised)
    monkeypatch.setattr(rollouts_module, "gather_object", lambda names: [*names, "a", "b"])

    def score(reward):
        each = rollouts(policy, tokenizer, {"r": reward})
        each.accelerator = types.SimpleNamespace(num_processes=2)
        return each.score(prompts, sampled)

    def logs(log_metric, **_):
        log_metric("b", 3)
        return [1.0]

    def breaks(**_):
        raise ValueError("no")

    elsewhere = None
    scored = score(logs)
    assert scored.rewards.tolist() == [[1.0]] and {k: tuple(map(float, v)) for k, v in scored.logged.items()} == {
        "a": (0, 0),
        "b": (3, 1),
    }
    elsewhere = "the judge is out"
    with pytest.raises(UserError, match="^the judge is out$"):
        score(logs)
    elsewhere = None
    with pytest.raises(UserError, match="'r' raised ValueError") as caught:
        score(breaks)
    assert isinstance(caught.value.__cause__, ValueError), "its own, with the traceback"
    assert told[-1].startswith("the reward 'r' raised ValueError: no"), "it was told before it was raised"


def by_length(completion_ids, **_):
    return [float(len(ids)) for ids in completion_ids]


def test_truncated_completions_are_not_learned_from_but_compared_with(policy, tokenizer, monkeypatch):
    stops = [*range(25), tokenizer.eos_token_id]
    monkeypatch.setattr(policy.model.generation_config, "eos_token_id", stops)
    prompts = prompts_of(tokenizer, *TEXTS, *TEXTS, *TEXTS)
    taken = []
    for masked in (False, True):
        examples, _ = rolled_out(policy, tokenizer, {"r": by_length}, mask_truncated_completions=masked)(prompts)
        taken.append(examples)
    plain, masked = ([c for e in examples for c in e.completions] for examples in taken)
    cut = [c.ids[-1] not in stops for c in plain]
    assert {True, False} == set(cut), "nothing to tell apart"
    assert [c.ids for c in masked] == [c.ids for c in plain]
    assert [c.scored for c in masked] == [[False] * len(c.ids) if x else None for c, x in zip(masked, cut, strict=True)]
    assert [e.advantages for e in taken[0]] == [e.advantages for e in taken[1]]
    totals = count_totals(taken[1], GRPOLoss())
    assert totals.num_sequences == 24
    assert totals.num_tokens == sum(len(c.ids) for c, x in zip(masked, cut, strict=True) if not x)


def test_remax_compares_with_the_greedy_answer(policy, tokenizer):
    """R - R(greedy) under weights; where one of the rewards has no opinion, the other one's."""

    def picky(completions, **_):
        return [None if len(c) % 2 else 0.25 for c in completions]

    prompts = prompts_of(tokenizer, *TEXTS)
    rewards, weights = {"length": by_length, "picky": picky}, (2.0, 3.0)
    options = {"advantage_type": "remax", "reward_weights": weights}
    examples, _ = rolled_out(policy, tokenizer, rewards, **options)(prompts)

    def worth(ids):
        text = tokenizer.decode(ids, skip_special_tokens=True)
        return 2.0 * len(ids) + (0.0 if len(text) % 2 else 0.75)

    for prompt, example in zip(prompts, examples, strict=True):
        greedy = argmax_loop(policy.model, prompt.prompt_ids, {tokenizer.eos_token_id}, 6)[0]
        assert list(example.advantages) == pytest.approx([worth(c.ids) - worth(greedy) for c in example.completions])
    assert any(a != 0 for e in examples for a in e.advantages)
    assert rollouts(policy, tokenizer, rewards, **options)(prompts, "evaluation").baseline is None
    assert rollouts(policy, tokenizer, rewards)(prompts).baseline is None


@pytest.mark.parametrize(
    ("options", "formula"),
    [
        ({"advantage_type": "opo"}, lambda r, n: oracle.opo(r, n)),
        ({"advantage_type": "rloo"}, lambda r, n: oracle.rloo(r)),
        ({"advantage_type": "reinforce_pp_tokens"}, lambda r, n: oracle.reinforce_pp_tokens(r, n)),
        (
            {"advantage_type": ("rloo", "group"), "advantage_weights": (0.7, 0.3)},
            lambda r, n: [
                [0.7 * a + 0.3 * b for a, b in zip(*rows, strict=True)]
                for rows in zip(oracle.rloo(r), oracle.advantages(r), strict=True)
            ],
        ),
        ({"advantage_type": "rloo", "normalize_advantages": True}, lambda r, n: oracle.whiten(oracle.rloo(r))),
        ({"scale_rewards": "batch"}, lambda r, n: oracle.advantages(r, "batch")),
        ({"scale_rewards": "none"}, lambda r, n: oracle.advantages(r, "none")),
        ({"multi_objective_aggregation": "normalize_then_sum"}, lambda r, n: oracle.normalize_then_sum([r])),
    ],
    ids=lambda x: str(x) if isinstance(x, dict) else "",
)
def test_the_options_choose_the_formula(policy, tokenizer, options, formula):
    def reward(prompts, completions, completion_ids, **_):
        return [0.1 * i * i + len(c) for i, c in enumerate(completion_ids)]

    examples, _ = rolled_out(policy, tokenizer, {"r": reward}, **options)(prompts_of(tokenizer, *TEXTS))
    lengths = [[len(c.ids) for c in e.completions] for e in examples]
    rewards = [[0.1 * i * i + n for i, n in enumerate(ns, 2 * row)] for row, ns in enumerate(lengths)]
    got = [a for e in examples for a in e.advantages]
    assert got == pytest.approx([a for row in formula(rewards, lengths) for a in row], rel=1e-6, abs=1e-9)


def test_how_many_tokens_a_step_samples_at_most_is_said(policy, tokenizer):
    """A greedy completion too, where advantages want one."""
    each = rollouts(policy, tokenizer, {"one": lambda **given: []})
    assert each.at_most(1) == "a step samples up to 12 tokens: 1 prompt x 2 completions x --max_completion_length 6"
    greedy = rollouts(policy, tokenizer, {"one": lambda **given: []}, advantage_type="remax")
    said = "a step samples up to 1,800 tokens: 100 prompts x 3 completions x --max_completion_length 6"
    assert greedy.at_most(100) == said
