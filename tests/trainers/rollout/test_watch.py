"""What a user is told of the rewards."""

import json
import os

import pytest
import torch

from logratio.trainers import cli, setup
from logratio.trainers.rollout.rollouts import MOVED
from logratio.trainers.rollout.watch import FIRST, Watch

NAN = float("nan")
ALIKE = "told no completion of a prompt from another"


def watched(steps, sets=0):
    """steps: (rewards [prompts, G], advantages alike); one reward function. What is told after each step."""
    watch, told = Watch(torch.ones(1), ["one"], sets), []
    for number, (rewards, advantages) in enumerate(steps, start=1):
        watch.rollouts(number, torch.tensor(rewards)[..., None], torch.tensor(advantages))
        told.append(watch.take())
    return told


EQUAL = ([[0.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]])
WITHIN = ([[0.0, 0.0], [1.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]])  # nothing to compare in a group
PENALIZED = ([[0.0, 0.0], [0.0, 0.0]], [[0.1, -0.1], [0.0, 0.0]])  # by a KL
TOLD_APART = ([[0.0, 1.0], [0.0, 0.0]], [[-1.0, 1.0], [0.0, 0.0]])
UNSCORED = ([[NAN, NAN], [NAN, NAN]], [[0.0, 0.0], [0.0, 0.0]])


@pytest.mark.parametrize("step", [EQUAL, WITHIN, PENALIZED])
def test_first_steps_without_a_difference_are_said_once(step):
    told = watched([step] * (2 * FIRST))
    assert [len(notes) for notes in told] == [0] * (FIRST - 1) + [1] + [0] * FIRST
    assert (
        told[FIRST - 1][0].startswith(f"up to step {FIRST} the rewards {ALIKE}") and "SFT first" in told[FIRST - 1][0]
    )


def test_a_difference_is_enough_and_a_short_run_is_told_at_its_end():
    assert not any(watched([TOLD_APART] + [EQUAL] * 9)) and not any(watched([EQUAL] * 4 + [TOLD_APART] + [EQUAL] * 9))
    assert [len(notes) for notes in watched([EQUAL] * 2, sets=2)] == [0, 1]


def test_unscored_completions_are_counted_once():
    told = watched([TOLD_APART, UNSCORED, UNSCORED])
    assert [len(notes) for notes in told] == [0, 1, 0]
    assert told[1][0].startswith(
        "step 2: no reward function had an opinion on 4 of 4 completions, which count for nothing"
    )


def test_columns_that_go_nowhere_are_named():
    watch = Watch(torch.ones(1), ["one"])
    watch.columns([])
    watch.columns(["verdict", "cost"])
    assert watch.take() == [
        "completions are not kept (--no_log_completions), nor what rewards give to log_extra: cost, verdict"
    ]


REWARDS = """
states = []

def flat(completions, trainer_state, **_):
    states.append((trainer_state.global_step, trainer_state.max_steps, trainer_state.epoch))
    return [0.25] * len(completions)

def picky(completions, log_metric, **_):
    log_metric("picky/calls", len(completions))
    return [None] * len(completions)
"""


def test_a_run_tells_and_logs_it(tmp_path, monkeypatch, capsys):
    """Two rollouts of two steps each, of a data set of one step an epoch; an evaluation after every step."""
    (tmp_path / "watched_rewards.py").write_text(REWARDS)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1+1="}\n{"prompt": "1+2="}\n{"prompt": "1+3="}\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    words = "train grpo --dataset_name rows.jsonl --num_generations 2 --max_completion_length 2 --max_steps 4"
    words += " --num_iterations 2 --batch_size 2 --eval_size 1 --eval_steps 1 --output_dir out"
    words += " --reward_funcs watched_rewards:flat watched_rewards:picky"
    assert cli.main(words.split()) == 0
    said = capsys.readouterr().out
    assert said.count(ALIKE) == 1 and "up to step 3 the rewards" in said
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [row["picky/calls"] for row in rows] == [4.0] * 4 and rows[0]["eval_picky/calls"] == 2.0
    assert rows[0]["rewards/flat/std"] == 0.0 and rows[0]["rewards/flat/mean"] == 0.25
    assert not any(name.startswith("rewards/picky") for row in rows for name in row)
    import watched_rewards

    assert watched_rewards.states == [
        (0, 4, 0.0),
        (1, 4, 0.5),
        (2, 4, 1.0),
        (2, 4, 1.0),
        (3, 4, 1.5),
        (4, 4, 2.0),
    ], "before the first step, after it, ..."


@pytest.mark.parametrize("through", range(1, 2 * FIRST))
def test_a_run_that_goes_on_says_nothing_twice_and_counts_on(through):
    watch, told = Watch(torch.ones(1), ["one"]), []
    for number in range(1, 2 * FIRST + 1):
        if number == through:
            state, watch = json.loads(json.dumps(watch.state_dict())), Watch(torch.ones(1), ["one"])
            watch.load_state_dict(state)
        rewards, advantages = UNSCORED if number % 2 else EQUAL
        watch.rollouts(number, torch.tensor(rewards)[..., None], torch.tensor(advantages))
        told.append(len(watch.take()))
    assert told == [1] + [0] * (FIRST - 2) + [1] + [0] * FIRST


def test_a_reward_that_says_the_same_of_everything_is_named():
    """As one that takes the length of a list of messages for that of a text: 1 - 1 / 500."""
    watch, told = Watch(torch.ones(3), ["format", "length", "other"]), []
    for step in range(1, 2 * FIRST + 1):
        other = [[0.5, 0.5], [0.5, 0.25 if step == 2 else 0.5]]
        by_function = torch.stack([torch.eye(2), torch.full((2, 2), 0.998), torch.tensor(other)], -1)
        watch.rollouts(step, by_function, torch.eye(2))
        told += watch.take()
        watch.load_state_dict(json.loads(json.dumps(watch.state_dict())))
    assert told == [
        f"up to step {FIRST} the reward 'length' gave 0.998 to every completion, so that it taught nothing: look at "
        'what it is given (of a conversation a list of messages, whose text is completion[0]["content"])'
    ]


def test_completions_that_do_not_end_are_said_once():
    watch, told = Watch(torch.ones(1), ["one"]), []
    for step, ended in enumerate([[1] * 9 + [0], [0] * 9 + [1], [0] * 19 + [1], [0] * 10], start=1):
        watch.clipped(step, torch.tensor(ended), 64)
        told += watch.take()
    assert told == [
        "step 3: 95 % of the completions reached --max_completion_length 64 without an end: allow longer ones, or "
        "start from a model that ends its answers"
    ]


def test_where_only_right_answers_count_it_is_said_that_the_embedded_model_has_none(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = "train grpo --num_generations 2 --max_completion_length 2 --max_steps 1 --batch_size 1 --output_dir out"
    assert cli.main(words.split()) == 0
    assert setup.UNTRAINED.endswith("as --model_name_or_path, one with adapters as --adapter_name_or_path")
    assert setup.UNTRAINED in capsys.readouterr().out


WANDERING = """
import os, tempfile

def wandering(completions, **_):
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
    return [float(len(text)) for text in completions]
"""


def test_a_reward_that_changes_the_working_directory_takes_no_part_of_the_run_there(tmp_path, monkeypatch, capsys):
    """Into a folder that is gone when it returns, as of a `with`; what is saved is where the log is."""
    (tmp_path / "wandering_rewards.py").write_text(WANDERING)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    words = "train grpo --num_generations 2 --max_completion_length 2 --max_steps 2 --batch_size 1 --output_dir out"
    assert cli.main([*words.split(), "--save_steps", "1", "--reward_funcs", "wandering_rewards:wandering"]) == 0
    assert capsys.readouterr().out.count(MOVED) == 1 and os.getcwd() == str(tmp_path)
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"metrics.jsonl", "checkpoint-1", "checkpoint-2", "model.safetensors"} <= found
