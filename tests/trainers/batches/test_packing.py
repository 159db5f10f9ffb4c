"""Packing: nothing lost, nothing twice, and every token sees exactly what it would see alone."""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from logratio.benchmarks.measure.steps import workloads
from logratio.losses import DPOLoss, Support
from logratio.trainers.attention.masks import attention_mask
from logratio.trainers.batches.packing import PackedBatch, example_tokens, pack, split_groups
from logratio.trainers.data.examples import Completion, Example

PAD = 9999
quick = settings(max_examples=60, deadline=None)


@st.composite
def ragged(draw: st.DrawFn, max_examples: int = 5, max_completions: int = 3) -> list[Example]:
    """Examples whose token ids are all different, so that each can be found again."""
    fresh = itertools.count(1)
    examples = []
    for row in range(draw(st.integers(1, max_examples))):
        prompt = [next(fresh) for _ in range(draw(st.integers(1, 6)))]
        completions = []
        for _ in range(draw(st.integers(1, max_completions))):
            ids = [next(fresh) for _ in range(draw(st.integers(1, 6)))]
            scored = draw(st.none() | st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
            completions.append(Completion(ids, scored))
        advantages = tuple(float(next(fresh)) for _ in completions)
        examples.append(Example(prompt, completions, row=row, advantages=advantages))
    return examples


def is_scored(completion: Completion) -> list[bool]:
    return [True] * len(completion.ids) if completion.scored is None else completion.scored


def expected_paths(example: Example, scores_prompt: bool) -> tuple[list[list[tuple[int, int] | None]], list]:
    """For each completion, and for the prompt, a list over places of (predecessor's token, token) or None."""
    completions = []
    for c in example.completions:
        before = [example.prompt_ids[-1], *c.ids[:-1]]
        completions.append(
            [p if s else None for p, s in zip(zip(before, c.ids, strict=True), is_scored(c), strict=True)]
        )
    prompt: list[tuple[int, int] | None] = list(zip(example.prompt_ids[:-1], example.prompt_ids[1:], strict=True))
    chosen = example.completions[0]
    before = [example.prompt_ids[-1], *chosen.ids[:-1]]
    prompt += [p for p, s in zip(zip(before, chosen.ids, strict=True), is_scored(chosen), strict=True) if not s]
    return completions, [prompt] if scores_prompt else []


def got_paths(batch: PackedBatch) -> list[list[tuple[int, int] | None]]:
    """The same, read off `hidden_index`, `targets`, `slot` and `scored`."""
    width = batch.scored.shape[1]
    paths: list[list[tuple[int, int] | None]] = [[None] * width for _ in batch.scored]
    flat = batch.input_ids.flatten()
    for hidden, target, slot in zip(
        batch.hidden_index.tolist(), batch.targets.tolist(), batch.slot.tolist(), strict=True
    ):
        assert paths[slot // width][slot % width] is None
        paths[slot // width][slot % width] = (int(flat[hidden]), target)
    for path, scored in zip(paths, batch.scored.tolist(), strict=True):
        assert [p is not None for p in path] == scored
    return paths


def stripped(path: list) -> list:
    """Without the Nones at the end."""
    while path and path[-1] is None:
        path = path[:-1]
    return path


def row_tokens(example: Example, shared: bool) -> list[int]:
    prompts = [example.prompt_ids] * (1 if shared else len(example.completions))
    return sorted(itertools.chain(*prompts, *(c.ids for c in example.completions)))


@pytest.mark.parametrize("shared", [True, False])
@quick
@given(examples=ragged(), budget=st.integers(1, 60), scores_prompt=st.booleans())
def test_every_token_of_every_example_is_there_once(shared, examples, budget, scores_prompt):
    batches = pack(examples, budget, shared=shared, scores_prompt=scores_prompt, pad_id=PAD)
    inside = [e for batch in batches for e in batch.examples]
    assert sorted(e.row for e in inside) == [e.row for e in examples]
    for batch in batches:
        tokens = [t for t in batch.input_ids.flatten().tolist() if t != PAD]
        assert sorted(tokens) == sorted(itertools.chain(*(row_tokens(e, shared) for e in batch.examples)))
        assert batch.num_tokens == len(tokens) == sum(example_tokens(e, shared) for e in batch.examples)
        assert ((batch.input_ids == PAD) == (batch.group == -1)).all()
        assert not (batch.input_ids[:, -1] == PAD).all(), "a column of padding alone"


@pytest.mark.parametrize("shared", [True, False])
@quick
@given(examples=ragged(), budget=st.integers(1, 60))
def test_the_budget_counts_padding_and_only_a_single_example_exceeds_it(shared, examples, budget):
    for batch in pack(examples, budget, shared=shared):
        assert batch.input_ids.numel() <= budget or len(batch.examples) == 1


@pytest.mark.parametrize("shared", [True, False])
@quick
@given(examples=ragged(), budget=st.integers(1, 60), scores_prompt=st.booleans())
def test_what_is_scored_is_predicted_by_its_predecessor_on_its_own_path(shared, examples, budget, scores_prompt):
    for batch in pack(examples, budget, shared=shared, scores_prompt=scores_prompt, pad_id=PAD):
        expected = [expected_paths(e, scores_prompt) for e in batch.examples]
        paths = [path for completions, _ in expected for path in completions]
        assert len(batch.completions) == len(paths)
        paths += [path for _, prompts in expected for path in prompts]
        assert [stripped(p) for p in got_paths(batch)] == [stripped(p) for p in paths]


def visible_tokens(example: Example, k: int, place: int) -> list[int]:
    """Tokens that the one at `place` of prompt + completion k sees, itself included."""
    return [*example.prompt_ids, *example.completions[k].ids][: place + 1]


@pytest.mark.parametrize("shared", [True, False])
@quick
@given(examples=ragged(), budget=st.integers(1, 80), window=st.none() | st.integers(1, 8))
def test_a_token_sees_its_prompt_and_its_own_completion_up_to_itself(shared, examples, budget, window):
    for batch in pack(examples, budget, shared=shared, pad_id=PAD):
        mask = attention_mask(batch, window)
        assert mask.shape == (len(batch.input_ids), 1, *batch.input_ids.shape[1:], batch.input_ids.shape[1])
        expected = {}
        for e in batch.examples:
            for k, c in enumerate(e.completions):
                for place, token in enumerate([*e.prompt_ids, *c.ids]):
                    seen = visible_tokens(e, k, place)
                    expected[token] = (place, seen if window is None else seen[-window:])
        for r, row in enumerate(batch.input_ids.tolist()):
            for q, token in enumerate(row):
                sees = [row[i] for i in mask[r, 0, q].nonzero()[:, 0].tolist()]
                if token == PAD:
                    assert sees == [PAD], "padding must see itself, and nothing else"
                else:
                    place, seen = expected[token]
                    assert sorted(sees) == sorted(seen)
                    assert batch.position_ids[r, q] == place


@quick
@given(examples=ragged(), budget=st.integers(1, 80))
def test_unshared_rows_hold_one_sequence_and_need_no_mask(examples, budget):
    for batch in pack(examples, budget, shared=False, pad_id=PAD):
        assert batch.plain
        assert batch.position_ids.tolist() == [list(range(batch.input_ids.shape[1]))] * len(batch.input_ids)
        held = [[t for t in row if t != PAD] for row in batch.input_ids.tolist()]
        assert sorted(held) == sorted([*e.prompt_ids, *c.ids] for e in batch.examples for c in e.completions)
        assert all(row[: len(kept)] == kept for row, kept in zip(batch.input_ids.tolist(), held, strict=True))


@quick
@given(examples=ragged(), budget=st.integers(1, 80))
def test_plain_says_what_the_mask_says(examples, budget):
    """Where a batch calls itself plain, the mask is causal attention over right-padded rows."""
    for batch in pack(examples, budget, pad_id=PAD):
        rows, length = batch.input_ids.shape
        causal = torch.ones(length, length, dtype=torch.bool).tril().expand(rows, 1, -1, -1)
        real = (batch.input_ids != PAD)[:, None, :, None]
        same = torch.equal(attention_mask(batch) & real, causal & real)
        restarts = not torch.equal(
            batch.position_ids[batch.group >= 0], torch.arange(length).repeat(rows, 1)[batch.group >= 0]
        )
        assert batch.plain == (same and not restarts)


def test_positions_stay_within_the_longest_sequence():
    """A row of many groups is longer than any sequence, and a table of positions may end with the longest one."""
    examples = [Example([1] * 3, [Completion([2] * 4)] * 5), Example([1] * 3, [Completion([2] * 4)] * 4)]
    for batch in pack(examples, 46):
        assert batch.input_ids.shape[1] == 23
        assert int(batch.position_ids.max()) == 6
    assert (attention_mask(batch).any(-1)).all()


def sized(length: int, row: int, completions: int = 1) -> Example:
    return Example([1], [Completion([2] * (length - completions)), *[Completion([2])] * (completions - 1)], row=row)


def test_rows_are_filled_up_by_shorter_groups():
    examples = [sized(2, 0), sized(10, 1), sized(12, 2)]
    (batch,) = pack(examples, 24)
    assert batch.input_ids.shape == (2, 12) and batch.num_tokens == 24
    assert [e.row for e in batch.examples] == [0, 1, 2]
    assert [b.input_ids.shape for b in pack(examples, 23)] == [(1, 12), (1, 10), (1, 2)]


def test_a_short_example_begins_no_row_of_a_long_one():
    """It would be padded to three times its length; a micro-batch of shorter rows is better."""
    examples = [sized(12, 0), sized(4, 1), sized(4, 2)]
    assert [b.input_ids.shape for b in pack(examples, 36)] == [(1, 12), (2, 4)]


def test_fewer_micro_batches_are_worth_some_padding():
    """20 tokens in two micro-batches, or 24 in one."""
    examples = [sized(12, 0), sized(4, 1), sized(4, 2)]
    for cost, shapes in ((3, [(1, 12), (2, 4)]), (5, [(2, 12)])):
        assert [b.input_ids.shape for b in pack(examples, 36, micro_batch_cost=cost)] == shapes


def test_a_supports_offsets_stay_on_the_cpu_where_they_are_read():
    example = Example([5] * 3, [Completion([6, 7], behavior=[-1.0, -1.0], support=Support.of(torch.eye(2, 9).bool()))])
    (batch,) = pack([example], 16)
    moved = batch.to(torch.device("meta"))
    assert (moved.support.ids.device.type, moved.support.offsets.tolist()) == ("meta", [0, 1, 2])


def test_by_sequences_a_micro_batch_is_one_long_row():
    """First fit, longest first; padded to a multiple of 16, and no longer than its groups need."""
    examples = [sized(length, row, 2) for row, length in enumerate((30, 9, 25, 14, 7, 20))]
    batches = pack(examples, 64, sequences=True)
    assert [sorted(e.row for e in b.examples) for b in batches] == [[0, 1, 2], [3, 4, 5]]
    assert [b.input_ids.shape for b in batches] == [(1, 64), (1, 48)]
    assert [b.num_tokens for b in batches] == [64, 41]
    assert all((b.group[:, b.num_tokens :] == -1).all() for b in batches)


def test_a_long_row_leaves_room_for_its_padding():
    """62 tokens have room for 48; what is longer is alone, and what needs no mask is not padded."""

    def shapes(budget: int, *examples: Example) -> list[tuple[int, ...]]:
        return [tuple(batch.input_ids.shape) for batch in pack(examples, budget, sequences=True)]

    assert shapes(64, sized(30, 0, 2), sized(27, 1, 2)) == [(1, 64)]
    assert shapes(62, sized(30, 0, 2), sized(27, 1, 2)) == [(1, 32), (1, 32)]
    assert shapes(62, sized(70, 0, 2), sized(3, 1, 2)) == [(1, 80), (1, 16)]
    assert shapes(62, sized(30, 0)) == [(1, 30)]


@pytest.mark.parametrize("budget", [8192, 16384, 32768])
def test_long_rows_are_hardly_padded(budget):
    """Of 64 pairs like UltraFeedback's, within 1 %; the last micro-batch is as long as what is left for it."""
    computed = real = 0
    for seed in range(5):
        pairs = workloads.examples(DPOLoss(), workloads.WORKLOADS["ultrafeedback"], 64, vocab_size=9, seed=seed)
        batches = pack(pairs, budget, sequences=True)
        assert len(batches) == -(-sum(map(example_tokens, pairs)) // budget)
        computed += sum(b.input_ids.numel() for b in batches)
        real += sum(b.num_tokens for b in batches)
    assert real < computed <= 1.01 * real


def test_an_example_longer_than_the_budget_is_alone():
    long, short = Example([1] * 4, [Completion([2] * 8)], row=0), Example([1], [Completion([2] * 3)], row=1)
    batches = pack([short, long, short], 8)
    assert [[e.row for e in batch.examples] for batch in batches] == [[0], [1, 1]]


@pytest.mark.parametrize("shared", [True, False])
@quick
@given(examples=ragged(max_completions=6), budget=st.integers(1, 60))
def test_divided_groups_keep_completions_and_advantages_and_fit(shared, examples, budget):
    parts = split_groups(examples, budget, shared)
    for example in examples:
        mine = [p for p in parts if p.row == example.row]
        assert [c for p in mine for c in p.completions] == example.completions
        assert tuple(a for p in mine for a in p.advantages) == example.advantages
        assert all(p.prompt_ids == example.prompt_ids for p in mine)
        for part, following in itertools.pairwise(mine):
            more = dataclasses.replace(part, completions=[*part.completions, following.completions[0]])
            (whole,) = pack([more], 10**6, shared=shared)
            assert whole.input_ids.numel() > budget, "divided without need"
    for part in parts:
        (batch,) = pack([part], 10**6, shared=shared)
        assert batch.input_ids.numel() <= budget or len(part.completions) == 1
    assert [p.row for p in parts] == sorted(p.row for p in parts)


@quick
@given(examples=ragged(), budget=st.integers(1, 80), scores_prompt=st.booleans())
def test_unscored_is_the_same_work_with_nothing_scored(examples, budget, scores_prompt):
    for batch in pack(examples, budget, scores_prompt=scores_prompt):
        filler = batch.unscored()
        assert torch.equal(filler.input_ids, batch.input_ids) and filler.examples == batch.examples
        assert filler.is_filler and not batch.is_filler and filler.num_tokens == 0
        assert len(filler.hidden_index) == len(filler.targets) == len(filler.slot) == 0
        assert filler.scored.shape == (len(batch.scored), 1) and not filler.scored.any()
        assert filler.unflatten(torch.zeros(0)).shape == filler.scored.shape


@quick
@given(examples=ragged(), scores_prompt=st.booleans())
def test_unflatten_puts_values_in_their_slots_and_gradients_back(examples, scores_prompt):
    for batch in pack(examples, 60, scores_prompt=scores_prompt):
        values = torch.arange(1.0, 1 + len(batch.targets), requires_grad=True)
        laid_out = batch.unflatten(values)
        assert ((laid_out != 0) == batch.scored).all()
        assert torch.equal(laid_out.flatten()[batch.slot], values)
        (laid_out * laid_out).sum().backward()
        assert torch.equal(values.grad, 2 * values.detach())
