"""KTO's mismatched completions, and what the reference says of them: the same together as apart, of fewer tokens."""

from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig

from logratio.benchmarks.peers import truths
from logratio.benchmarks.peers.randoms import random_model
from logratio.losses import LOSSES, Kind
from logratio.trainers.batches.packing import pack
from logratio.trainers.data.examples import Completion, Example
from logratio.trainers.policy.mismatch import mismatched, refer_together, together
from logratio.trainers.policy.reference import StoredReference, precompute

from ..test_step import examples_for, make_step


def test_mismatched_gives_every_prompt_its_predecessors_completion():
    examples = [
        Example([1, 2, 3], [Completion([10, 11, 12, 13], [False, True, True, True])], True, row=0),
        Example([4, 5, 6, 7, 8], [Completion([20])], False, row=1),
        Example([9], [Completion([30, 31])], True, row=2),
    ]
    others = mismatched(examples, max_length=7)
    assert [e.prompt_ids for e in others] == [e.prompt_ids for e in examples]
    assert [e.completions for e in others] == [
        [Completion([30, 31])],
        [Completion([10, 11], [False, True])],
        [Completion([20])],
    ]
    assert {e.row for e in others} == {-1}, "no row of the data set, whose stored log-probs it could be taken for"
    # where a prompt leaves no room, one token of the other completion still has a log-prob
    assert [len(e.completions[0].ids) for e in mismatched(examples, max_length=5)] == [2, 1, 1]


class Watched:
    """A reference that says how often it was asked, and for how many tokens."""

    def __init__(self, reference):
        self.reference, self.tokens, self.calls = reference, 0, 0

    def __call__(self, batch):
        self.tokens, self.calls = self.tokens + batch.num_tokens, self.calls + 1
        return self.reference(batch)


@pytest.fixture
def step():
    return make_step(truths.exact(random_model(LlamaConfig, 0)), LOSSES["kto"](), micro_batch_tokens=40)


def tokens_of(example: Example) -> int:
    return len(example.prompt_ids) + sum(len(c.ids) for c in example.completions)


@pytest.mark.parametrize("budget", [20, 40, 1000])
def test_the_reference_sees_a_prompt_once_for_both_completions(step, budget):
    live, step.micro_batch_tokens = step.reference, budget
    step.reference = watched = Watched(live)
    examples = examples_for(Kind.LABELED)
    micros = step.micro_batches(examples)
    totals = step.totals(examples, micros)
    for micro in micros:
        torch.testing.assert_close(micro.ref, live(micro.batch), rtol=1e-9, atol=1e-9)
    step(micros, totals)
    pairs = list(zip(examples, mismatched(examples, step.max_length), strict=True))
    apart = [sum(map(tokens_of, pair)) for pair in pairs]
    shared = [a - len(e.prompt_ids) for a, (e, _) in zip(apart, pairs, strict=True)]
    assert watched.tokens == sum(s if s <= budget else a for s, a in zip(shared, apart, strict=True)) < sum(apart)
    assert (max(shared) > budget) == (budget == 20), "what does not fit together is computed apart"


def test_unshared_prompts_have_nothing_to_win(step):
    step.policy.shared = step.packing["shared"] = False
    step.reference = watched = Watched(step.reference)
    examples = examples_for(Kind.LABELED)
    micros = step.micro_batches(examples)
    totals = step.totals(examples, micros)
    assert all(micro.ref is None for micro in micros)
    step(micros, totals)
    assert watched.tokens == sum(map(tokens_of, [*examples, *mismatched(examples, step.max_length)]))


def test_a_process_without_an_example_takes_part(step):
    """The third of three in a step of two: as many passes as the others, of which nothing is kept."""
    step.accelerator = SimpleNamespace(
        num_processes=3, process_index=2, device=torch.device("cpu"), gather=lambda mine: torch.tensor([1, 1, 0])
    )
    step.reference = watched = Watched(step.reference)
    examples = examples_for(Kind.LABELED, count=2)
    micros = step.micro_batches(examples)
    passed = step._mismatched(examples, micros)
    assert [micro.batch.is_filler for micro in (*micros, *passed)] == [True, True]
    assert watched.calls == 1 and not any(micro.ref.any() for micro in (*micros, *passed))


def test_a_stored_reference_is_asked_for_mismatched_completions_alone(step):
    live, examples = Watched(step.reference), examples_for(Kind.LABELED)
    table = precompute(step.reference, examples, 1000, torch.device("cpu"), shared=True)
    step.reference = StoredReference(table, live)
    micros = step.micro_batches(examples)
    step(micros, step.totals(examples, micros))
    assert live.tokens == sum(map(tokens_of, mismatched(examples, step.max_length)))


def test_fillers_take_part_and_say_nothing(step):
    """Of a process that has no example left: processes that share weights compute together, or one of them hangs."""
    one, two = examples_for(Kind.LABELED, count=2)
    both, own, other = (pack([e], 100)[0] for e in (*together(one, two, 100), one, two))
    watched = Watched(step.reference)
    refs = refer_together(watched, [both, both.unscored()], [own, own.unscored(), other.unscored()])
    assert watched.calls == 2
    torch.testing.assert_close(refs[0], step.reference(own), rtol=1e-9, atol=1e-9)
    assert [ref.shape for ref in refs[1:]] == [(1, 1), (1, 1)] and not any(ref.any() for ref in refs[1:])
