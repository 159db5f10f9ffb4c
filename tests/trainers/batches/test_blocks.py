"""The blocks that packing lists for FlexAttention are those that torch finds by looking at every pair of tokens."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask

from logratio.trainers.attention.masks import attention_mask
from logratio.trainers.batches.blocks import Blocks, block_lists
from logratio.trainers.batches.packing import pack
from logratio.trainers.data.examples import Completion, Example

from ..attention._flex import groups

WINDOWS = (None, 1, 2, 5, 11, 40)


def listed(lists, of: str) -> list[list[list[int]]]:
    """row -> block -> the blocks that it is listed with."""
    counts, indices = getattr(lists, f"{of}_num_blocks"), getattr(lists, f"{of}_indices")
    rows = zip(counts[:, 0].tolist(), indices[:, 0].tolist(), strict=True)
    return [[which[:n] for n, which in zip(*row, strict=True)] for row in rows]


def assert_as_torch_has_them(lists, dense, size):
    """dense: [R, 1, L, L] bool."""
    rows, _, length, _ = dense.shape
    theirs = create_block_mask(
        lambda row, head, q, k: dense[row, 0, q, k], rows, None, length, length, device="cpu", BLOCK_SIZE=size
    )
    for of in ("kv", "full_kv", "q", "full_q"):
        assert listed(lists, of) == listed(theirs, of), of
        for part in ("num_blocks", "indices"):
            mine, other = getattr(lists, f"{of}_{part}"), getattr(theirs, f"{of}_{part}")
            assert (mine.dtype, mine.shape, mine.stride()) == (other.dtype, other.shape, other.stride())
            assert 0 <= int(mine.min()) and int(mine.max()) <= other.shape[-1]


@st.composite
def packed(draw: st.DrawFn):
    """Micro-batches of one long row or of several, of several groups a row or of one, some with padding at the end."""
    lengths = st.integers(1, 20)
    examples = [
        Example([5] * draw(lengths), [Completion([6] * draw(lengths)) for _ in range(draw(st.integers(1, 3)))], row=row)
        for row in range(draw(st.integers(1, 6)))
    ]
    size = draw(st.sampled_from([1, 2, 3, 4, 8]))
    blocks = draw(st.sampled_from([None, Blocks(size, WINDOWS)]))
    return size, pack(examples, draw(st.integers(1, 200)), shared=draw(st.booleans()), blocks=blocks)


@settings(max_examples=25, deadline=None)
@given(drawn=packed(), window=st.sampled_from(WINDOWS))
def test_they_are_torchs_own(drawn, window):
    size, batches = drawn
    for batch in batches:
        own = block_lists(batch.group, batch.segment, size, window)
        assert_as_torch_has_them(own, attention_mask(batch, window), size)
        if batch.blocks:
            carried = batch.blocks[window]
            assert all(torch.equal(a, b) for a, b in zip(own, carried, strict=True))


@pytest.mark.parametrize(("budget", "window"), [(1024, 50), (4096, None), (4096, 300)])
def test_they_are_torchs_own_in_blocks_of_real_size(budget, window):
    """Every kind of block is there: in part, in whole, left out; of prompts, of completions, and of padding."""
    batches = pack(groups(longest=400, sizes=(2, 1, 3, 2, 4)), budget, blocks=Blocks(128, (window,)))
    batches = [batch for batch in batches if not batch.plain]
    assert any((batch.group < 0).any() for batch in batches)
    for batch in batches:
        assert_as_torch_has_them(batch.blocks[window], attention_mask(batch, window), 128)
    some = sum(int(batch.blocks[window].full_kv_num_blocks.sum()) for batch in batches)
    assert bool(some) == (window != 50)


def test_a_long_completion_sees_whole_blocks_of_prompt_and_completion_together():
    """The block that a prompt ends in is seen in whole by the completion behind it, and not by a later one."""
    first, second = [6] * 600, [7] * 600
    (batch,) = pack([Example([5] * 200, [Completion(first), Completion(second)])], 2048, blocks=Blocks(128))
    (kv,), (whole,) = listed(batch.blocks[None], "kv"), listed(batch.blocks[None], "full_kv")
    assert (kv[4], whole[4]) == ([4], [0, 1, 2, 3])
    assert (kv[9], whole[9]) == ([1, 6, 9], [0, 7, 8])


@pytest.mark.parametrize("shared", [True, False])
def test_rows_without_a_mask_need_none(shared):
    (batch,) = pack([Example([5] * 200, [Completion([6] * 40)])], 2048, blocks=Blocks(128), shared=shared)
    assert batch.plain and batch.blocks == {} and batch.input_ids.shape == (1, 240)
