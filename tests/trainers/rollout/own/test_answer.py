"""What a rollout function answers, read: who wrote what, by which log-probabilities, and what cannot be trained on."""

import pytest
import torch

from logratio.losses import Support
from logratio.trainers.data.examples import Prompt
from logratio.trainers.errors import UserError
from logratio.trainers.rollout.calling.asked import TrainerState
from logratio.trainers.rollout.engines.protocol import Sample, Sampling
from logratio.trainers.rollout.own.answer import read
from logratio.trainers.rollout.own.turns import Turns

PROMPTS = [
    Prompt([1, 2], "ab", {"answer": "x"}, 7),
    Prompt([1, 2], "ab", {"answer": "x"}, 7),
    Prompt([3], "c", {"answer": "y"}, 9),
]


def turns_of(*heard, group=1, **sampling):
    """heard: of each completion [(what the model went on from, what it said, its log-probs)]."""
    known = {"processing_class": None, "num_generations": group, "state": TrainerState(global_step=4), "words": 100}
    turns = Turns(PROMPTS, [1, 2, 3], None, Sampling(max_new_tokens=6, stop_ids=frozenset({99}), **sampling), **known)
    for own, some in zip(turns.heard, heard, strict=False):
        own += [(context, Sample(ids, "stop", logps, 3, support)) for context, ids, logps, support in some]
    return turns


def support(*sizes):
    """Of as many tokens as sizes, each with so many words; 0: all."""
    return Support(torch.arange(sum(sizes), dtype=torch.int32), torch.tensor([0, *sizes]).cumsum(0))


def given(**changes):
    whole = {"completion_ids": [[4, 5], [6], [7, 99]], "logprobs": [[-1.0, -2.0], [-3.0], [-4.0, -5.0]]}
    return {name: value for name, value in {**whole, **changes}.items() if value != "nothing"}


def test_what_trl_is_answered_is_read():
    """With tensors, and numbers for masks; what stands for the environment's tokens is not looked at."""
    answer = given(
        prompt_ids=[torch.tensor([8, 9])] * 2 + [[3]],
        env_mask=[[1, 0], torch.tensor([1]), [True, True]],
        logprobs=[[-1.0, None], torch.tensor([-3.0]), [-4.0, -5.0]],
        reward_of_game=[0.5, 1.0, None],
        level=3,
    )
    found = read(answer, turns_of(group=2), PROMPTS, None)
    assert [s.told.prompt_ids for s in found] == [[8, 9], [8, 9], [3]]
    assert [(s.ids, s.logps, s.written, s.own_logps) for s in found] == [
        ([4, 5], [-1.0, 0.0], [True, False], [-1.0]),
        ([6], [-3.0], None, [-3.0]),
        ([7, 99], [-4.0, -5.0], None, [-4.0, -5.0]),
    ]
    assert [s.finish_reason for s in found] == ["length", "length", "stop"], "by the last token, as in TRL"
    assert [s.told.columns for s in found] == [
        {"answer": prompt.columns["answer"], "reward_of_game": game, "level": 3}
        for prompt, game in zip(PROMPTS, [0.5, 1.0, None], strict=True)
    ]
    assert [s.version for s in found] == [4] * 3
    told = read(given(finish_reason=["stop", "length", "length"]), turns_of(), PROMPTS, None)
    assert [s.finish_reason for s in told] == ["stop", "length", "length"]


HEARD = (
    [([1, 2], [4, 5], [-1.0, -2.0], support(2, 0)), ([1, 2, 4, 5, 50, 51], [6], [-3.0], support(3))],
    [([1, 2], [8], [-9.0], None), ([1, 2], [6, 7], [-4.0, -5.0], None)],
    [([3], [7, 98, 97], [-6.0, -7.0, -8.0], support(1, 1, 1))],
)
ANSWER = {
    "completion_ids": [[4, 5, 50, 51, 6], [6, 7], [7, 98]],
    "env_mask": [[1, 1, 0, 0, 1], [1, 1], [1, 1]],
}


def test_log_probs_and_supports_are_the_samples():
    """Of several turns, of a second try, and of a sample that was cut."""
    found = read(ANSWER, turns_of(*HEARD), PROMPTS, None)
    assert [s.logps for s in found] == [[-1.0, -2.0, 0.0, 0.0, -3.0], [-4.0, -5.0], [-6.0, -7.0]]
    assert [s.finish_reason for s in found] == ["stop", "stop", "length"]
    assert [s and [part.tolist() for part in s] for s in (s.support for s in found)] == [
        [[0, 1, 0, 1, 2], [0, 2, 2, 2, 2, 5]],
        None,
        [[0, 1], [0, 1, 2]],
    ]
    assert [s.version for s in found] == [3] * 3


def test_where_the_environment_has_the_last_word_no_sample_says_why_it_ended():
    answer = {"completion_ids": [[4, 5, 50], [6, 7, 99], [7, 98]], "env_mask": [[1, 1, 0], [1, 1, 0], [1, 1]]}
    found = read(answer, turns_of(*HEARD), PROMPTS, None)
    assert [s.finish_reason for s in found] == ["length", "stop", "length"], "by the last token"


DICT = (
    'it must return a dict with "completion_ids", and perhaps env_mask, logprobs, prompt_ids, finish_reason and fields '
    "for the rewards; got "
)
SHORT = (
    " has the length 1 for 3 completions: a function is given a prompt as often as completions of it are wanted, and "
    "answers each time with one"
)
IDS = "its completion_ids must be a list of token ids, one at least; got "
LONG = (
    "it has 7 tokens, the environment's among them, and --max_completion_length is 6: leave out what does not fit, or "
    "allow more"
)
MASK = "its env_mask must have a 1 for each of its 1 token that the model wrote and a 0 for each other, got "
DREW = (
    ": the log-probability that the model drew it with, a finite number not above 0, or leave logprobs out where "
    "sample() drew"
)
GROUP = (
    "its prompt_ids are others than those of the prompt's first completion: let what differs begin the "
    "completion_ids, false in env_mask"
)
OF_ALL = {
    "nothing": (None, DICT + "NoneType None"),
    "no completions": ({"logprobs": []}, DICT + "dict {'logprobs': []}"),
    "too few": (given(completion_ids=[[4]]), "completion_ids" + SHORT),
    "text": (
        given(completion_ids="abc"),
        "completion_ids must be a list with an entry for each of 3 completions, got str 'abc'",
    ),
    "a column": (
        given(answer=["1", "2", "3"]),
        "its field 'answer' has a name that a column of the data set has: choose another",
    ),
    "a reward's": (
        given(completions=["1", "2", "3"]),
        "its field 'completions' has a name that rewards are given something else by: choose another",
    ),
    "a field": (given(score=[1.0]), "score" + SHORT),
}
OF_ONE = {  # key -> (what is said of the second completion, the message)
    "completion_ids": [
        ([], IDS + "list []"),
        ("a", IDS + "str 'a'"),
        ([100], "100 is no token of the model, whose ids end at 99"),
        ([True], "True is no token of the model, whose ids end at 99"),
        ([1.5], "a token id must be a whole number, got 1.5"),
        ([6] * 7, LONG),
    ],
    "env_mask": [
        ([1, 0], MASK + "list [1, 0]"),
        ([2], MASK + "list [2]"),
        ([0], "by its env_mask the model wrote none of it: let the model write one token at least"),
    ],
    "logprobs": [
        ([], "its logprobs must have a number for each of its 1 token, got list []"),
        ([[-3.0]], "the logprob of its token 0 is list [-3.0]" + DREW),
        ([float("nan")], "the logprob of its token 0 is float nan" + DREW),
        ([0.4], "the logprob of its token 0 is float 0.4" + DREW),
        ([False], "the logprob of its token 0 is bool False" + DREW),
    ],
    "finish_reason": [("eos", "its finish_reason must be one of stop, length, got str 'eos'")],
    "prompt_ids": [([2], GROUP)],
}
OTHERS = {"env_mask": [[1, 1], None, [1, 1]], "finish_reason": ["stop"] * 3, "prompt_ids": [[1], None, [3]]}


@pytest.mark.parametrize("what", OF_ALL)
def test_what_is_no_answer_is_told(what):
    answer, message = OF_ALL[what]
    with pytest.raises(UserError) as told:
        read(answer, turns_of(), PROMPTS, None)
    assert str(told.value) == message


@pytest.mark.parametrize(("key", "value", "message"), [(k, *one) for k, some in OF_ONE.items() for one in some])
def test_a_completion_that_cannot_be_trained_on_is_named(key, value, message):
    around = given().get(key) or OTHERS[key]
    with pytest.raises(UserError) as told:
        read(given(**{key: [around[0], value, around[2]]}), turns_of(group=2), PROMPTS, None)
    assert str(told.value) == f"completion 1 of row 7 of the data set: {message}"


def test_what_no_sample_explains_is_named():
    """Text that was tokenized again, or a context that the model was not given: the token at which it shows."""
    told = {}
    for name, ids, keeps in (
        ("again", [4, 9, 50, 51, 6], False),
        ("context", [4, 5, 50, 52, 6], False),
        ("support", [4, 9, 50, 51, 6], True),
    ):
        answer = {**ANSWER, "completion_ids": [ids, *ANSWER["completion_ids"][1:]]}
        answer |= {"logprobs": [[-1.0] * 5, [-1.0] * 2, [-1.0] * 2]} if keeps else {}
        with pytest.raises(UserError) as error:
            read(answer, turns_of(*HEARD, keep_support=keeps), PROMPTS, None)
        told[name] = str(error.value)
    at = (
        "completion 0 of row 7 of the data set: its token {} is the model's by env_mask, but not what sample() gave "
        "behind those before it, and {}: hand on its ids as they are, not text that is tokenized again, or "
    )
    assert told == {
        "again": at.format(1, 'there are no "logprobs"') + "return logprobs",
        "context": at.format(4, 'there are no "logprobs"') + "return logprobs",
        "support": at.format(1, "--keep_sampling_mask needs what could have been drawn") + "leave that option out",
    }


def test_positions_that_were_learned_are_not_passed():
    with pytest.raises(
        UserError,
        match="^completion 0 of row 7 .*: it and its prompt have 4 tokens, and the model has learned 3 positions",
    ):
        read(given(), turns_of(), PROMPTS, 3)
