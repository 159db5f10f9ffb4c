"""Completions asked for in turns: what each depends on, and how far it may go."""

import pytest

from logratio.trainers.errors import UserError
from logratio.trainers.rollout.calling.asked import TrainerState
from logratio.trainers.rollout.engines.in_process import InProcess
from logratio.trainers.rollout.engines.protocol import Request, Sampling
from logratio.trainers.rollout.generation import turn_seed
from logratio.trainers.rollout.own.turns import Turns

from .._prompts import prompts_of

LIMIT = 9


@pytest.fixture
def ask(policy, tokenizer):
    """ask(seeds, *texts) -> Turns, and the requests that have come from it."""
    engine, sampling = InProcess(policy, tokenizer), Sampling(max_new_tokens=LIMIT)

    def make(seeds, *texts):
        came = []

        def say(requests, options):
            came.append((requests, options))
            return engine.sample(requests, options)

        prompts = prompts_of(tokenizer, *texts)
        known = {"processing_class": tokenizer, "num_generations": 1, "state": TrainerState(), "words": 259}
        return Turns(prompts, seeds, say, sampling, **known), came

    make.engine, make.sampling = engine, sampling
    return make


def two_turns(turns, which, order=1):
    """[(ids of the first turn, of the second)] of each, with an environment's token 61 between them."""
    which = list(which)[::order]
    first = turns.sample([turns.prompt_ids[i] for i in which], which, max_new_tokens=3)
    after = [turns.prompt_ids[i] + s.ids + [61] for i, s in zip(which, first, strict=True)]
    second = turns.sample(after, which, max_new_tokens=4)
    said = {i: (a.ids, b.ids) for i, a, b in zip(which, first, second, strict=True)}
    return [said[i] for i in sorted(which)]


def test_a_completions_turns_depend_on_its_seed_and_their_number_alone(ask):
    """Not on which others are asked with it, nor in what order; in the first turn it is what it would be without."""
    texts = ("1+2=", "1+2=", "some longer prompt")
    together = two_turns(ask([5, 6, 7], *texts)[0], range(3))
    assert together == two_turns(ask([5, 6, 7], *texts)[0], range(3), order=-1)
    assert together[1:] == [two_turns(ask([5, 6, 7], *texts)[0], [i])[0] for i in (1, 2)]
    ((plain,),) = ask.engine.sample([Request(list(b"1+2="), [6])], ask.sampling)
    assert together[1][0] == plain.ids[:3]
    assert two_turns(ask([5, 6, 8], *texts)[0], range(3))[:2] == together[:2]
    assert [turn_seed(None, 3), turn_seed(6, 0)] == [None, 6] and len(
        {turn_seed(s, t) for s in (6, 7) for t in range(4)}
    ) == 8


def test_a_second_turn_has_numbers_of_its_own(ask):
    """Asked again from the same tokens, it says something else; a greedy one the same."""
    turns, came = ask([5, None], "1+2=", "1+2=")
    once, again = turns.sample(turns.prompt_ids), turns.sample(turns.prompt_ids)
    assert once[0].ids != again[0].ids and once[1].ids == again[1].ids
    assert [r.seeds for requests, _ in came for r in requests] == [[5, None], [turn_seed(5, 1), None]]


def test_tokens_that_several_go_on_from_are_asked_once(ask):
    turns, came = ask([1, 2, 3], "a", "a", "bb")
    turns.sample(turns.prompt_ids, stop_strings=["x"])
    ((requests, options),) = came
    assert [(list(r.prompt_ids), r.seeds) for r in requests] == [(list(b"a"), [1, 2]), (list(b"bb"), [3])]
    assert options.stop_strings == ("x",)


def test_no_turn_goes_beyond_the_limit(ask):
    """Of the completion, with what the environment wrote in it; nothing is said where nothing is left."""
    turns, came = ask([1, 2], "a", "a")
    prompt = [*b"a", *b"12345"]  # what is asked from first, whatever the data set has
    first = turns.sample([prompt, prompt], max_new_tokens=4)
    room = (2, 0)
    after = [prompt + s.ids + [61] * (LIMIT - left - len(s.ids)) for s, left in zip(first, room, strict=True)]
    two, nothing = turns.sample(after, max_new_tokens=4)
    assert [request.room for requests, _ in came for request in requests] == [4, 2]
    assert 1 <= len(two.ids) <= 2 and (nothing.ids, nothing.logps, nothing.finish_reason) == ([], [], "length")
    assert [len(heard) for heard in turns.heard] == [2, 1]


REFUSED = {
    "fewer": (([[97]],), {}, "sample() got 1 list of ids for 2 places in `which`"),
    "twice": (([[97], [98]], [1, 1]), {}, "sample(which=[1, 1]) must name places of the 2 prompts, each once"),
    "beyond": (([[97]], [2]), {}, "sample(which=[2]) must name places of the 2 prompts, each once"),
    "empty": (([[97], []],), {}, "sample() got no token for the prompt at place 1: hand on the prompt's at least"),
    "text": (([[97], "a"],), {}, "a token id must be a whole number, got 'a'"),
    "unknown": (([[97], [259]],), {}, "259 is no token of the model, whose ids end at 258"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_asked(what, ask):
    turns, came = ask([1, 2], "a", "b")
    given, options, message = REFUSED[what]
    with pytest.raises(UserError) as told:
        turns.sample(*given, **options)
    assert str(told.value) == message and not came
