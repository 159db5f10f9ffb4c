"""Attention by sequences: with FlashAttention's operators done in float64, it is that under a dense mask.

What only the kernels can get wrong is in `test_varlen_gpu.py`.
"""

import dataclasses
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from logratio.trainers.attention import varlen
from logratio.trainers.attention.masks import attention_mask
from logratio.trainers.attention.varlen import VARLEN, varlen_mask, varlen_or_sdpa
from logratio.trainers.batches.packing import pack
from logratio.trainers.data.examples import Completion, Example, Prompt
from logratio.trainers.policy.policy import Policy
from logratio.trainers.rollout.generation import generate

from ._rows import assert_close, batches, groups, results
from ._varlen import never, with_varlen

pytestmark = pytest.mark.usefixtures("varlen_on_cpu")


def by_sequences(query, key, value, mask):
    return varlen_or_sdpa(None, query, key, value, mask, scaling=0.3)[0]


def dense(query, key, value, mask):
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    found = (query @ key.mT * 0.3).masked_fill(~mask, -torch.inf)
    return (found.softmax(-1) @ value).transpose(1, 2)


def with_gradients(attend, mask, tensors, real):
    out = attend(*tensors, mask)
    slope = torch.cos(torch.arange(out.numel(), dtype=out.dtype)).view_as(out) * real
    return out.detach() * real, *torch.autograd.grad((out * slope).sum(), tensors)


HEADS = [(4, 2), (3, 3), (6, 1)]


@settings(max_examples=25, deadline=None)
@given(
    packed=batches(),
    window=st.sampled_from([None, 1, 3, 8, 100]),
    heads=st.sampled_from(HEADS),
    by_head=st.booleans(),
)
def test_values_and_gradients_are_those_under_a_dense_mask(packed, window, heads, by_head):
    """Of lists that came with the batch, and of those made for one that was packed for another attention; and padding
    is finite."""
    for batch in packed:
        rows, length = batch.input_ids.shape
        draw = torch.Generator().manual_seed(length)
        sizes = [(rows, length, n, 8) for n in (heads[0], heads[1], heads[1])]
        tensors = [torch.randn(size, generator=draw, dtype=torch.float64).transpose(1, 2) for size in sizes]
        if by_head:
            tensors = [x.contiguous() for x in tensors]
        for x in tensors:
            x.requires_grad_()
        real = (batch.group >= 0)[:, :, None, None]
        ours = with_gradients(by_sequences, varlen_mask(batch, window), tensors, real)
        truth = with_gradients(dense, attention_mask(batch, window), tensors, real)
        for mine, true in zip(ours, truth, strict=True):
            torch.testing.assert_close(mine, true, rtol=0, atol=1e-12)


def test_sequences_by_hand():
    """Two groups and padding: a prompt is seen again by every completion but the one right behind it."""
    examples = [
        Example([5] * 3, [Completion([6] * 2), Completion([7] * 4), Completion([8])]),
        Example([5], [Completion([6])]),
    ]
    (batch,) = pack(examples, 16, sequences=True)
    lists = batch.sequences
    assert batch.input_ids.shape == (1, 16)
    assert lists.query_ends.tolist() == [0, 5, 9, 10, 12, 16]
    assert lists.key_ends.tolist() == [0, 5, 12, 16, 18, 22]
    assert (lists.longest_query, lists.longest_key) == (5, 7)
    keys = [*range(5), 0, 1, 2, *range(5, 9), 0, 1, 2, 9, *range(10, 16)]
    assert lists.source.tolist() == keys
    copies, of = lists.copies.tolist(), lists.copies_of.tolist()
    assert [copies[a:b] for a, b in zip(of, of[1:], strict=False)] == [
        [i for i, key in enumerate(keys) if key == token] for token in range(16)
    ]
    moved = batch.to(torch.device("meta")).sequences
    assert {x.device.type for x in moved if torch.is_tensor(x)} == {"meta"} and moved.longest_key == 7


def test_prompts_of_one_completion_are_copied_nowhere():
    """Nothing is gathered, and no gradient is summed."""
    (batch,) = pack([Example([5] * 3, [Completion([6] * n)]) for n in (2, 4, 9)], 64, sequences=True)
    lists = batch.sequences
    assert (lists.source, lists.copies, lists.copies_of) == (None, None, None)
    x = torch.randn(1, 2, batch.input_ids.shape[1], 8)
    assert varlen.copied(x, lists).data_ptr() == x.data_ptr()
    assert varlen.sum_copies(x, x, lists) == (x, x)


def test_rows_are_as_long_as_the_budget_allows_in_multiples_of_16():
    examples = [Example([5] * 10, [Completion([6] * 9), Completion([7] * 8)]) for _ in range(9)]
    shapes = [tuple(batch.input_ids.shape) for batch in pack(examples, 100, sequences=True)]
    assert shapes == [(1, 96 - 96 % 27 + -(96 // 27 * 27) % 16)] * 3


MODELS = "llama qwen2-window mistral-window gpt2 opt gpt-neox phi3-window gemma3 cohere olmo2".split()


@pytest.mark.parametrize("name", MODELS)
def test_a_model_gives_the_unshared_log_probs_and_gradients(random_model, name):
    model, examples = random_model(name), groups(longest=12 if name == "gpt2" else 30)  # which has 24 positions
    truth = results(Policy(model, shared=False), examples)
    for budget in (128, 1000):
        assert_close(results(with_varlen(model), examples, budget=budget), truth, 1e-5)


def test_under_gradient_checkpointing_with_adapters(random_model):
    lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    lora = get_peft_model(random_model("qwen2-window"), lora)
    truth = results(Policy(lora, shared=False), groups())
    policy = with_varlen(lora)
    policy.causal_lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy.causal_lm.enable_input_require_grads()
    assert_close(results(policy.train(), groups()), truth, 1e-5)


def test_under_autocast(random_model):
    """Queries come out of the rope in float32, values in bfloat16."""
    policy = with_varlen(random_model("llama"))
    truth = results(policy, groups())
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(results(policy, groups()), truth, 0.05)


def test_a_layer_keeps_what_attention_keeps(pack_one):
    """Queries, keys, values, what comes out, a float a head; and no copy of a prompt's keys."""
    batch = pack_one([Example([5] * 20, [Completion([6] * 4)] * 8)], sequences=True)
    length = batch.input_ids.shape[1]
    tensors = [torch.randn(1, length, n, 8).transpose(1, 2).requires_grad_() for n in (4, 2, 2)]
    kept = []

    def keep(x):
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        varlen_or_sdpa(None, *tensors, varlen_mask(batch))
    assert len(kept) == 5 and sum(x.numel() for x in kept) == length * (2 * 4 * 8 + 2 * 2 * 8 + 4)
    assert {x.untyped_storage().data_ptr() for x in kept} >= {x.untyped_storage().data_ptr() for x in tensors}


def test_gradients_of_copies_are_summed_in_float32(pack_one):
    """1 and 256 times 1/256 in bfloat16, one by one: 1, in float32: 2."""
    lists = pack_one([Example([5], [Completion([6])] * 257)], sequences=True).sequences
    grads = torch.full((len(lists.source), 1, 1), 2**-8, dtype=torch.bfloat16)
    grads[0] = 1
    for of in varlen.sum_copies(grads, grads, lists):
        assert of.dtype == torch.bfloat16 and of[0] == 2 and (of[2:257] == 2**-8).all()


@pytest.mark.parametrize("window", [None, 7])
def test_the_operators_of_this_torch_take_these_arguments(monkeypatch, pack_one, window):
    """Of their shapes and dtypes, on the meta device."""
    for name, own in (("forward", "flash_forward"), ("backward", "flash_backward")):
        monkeypatch.setattr(varlen, own, getattr(torch.ops.aten, f"_flash_attention_{name}").default)
    batch = pack_one(groups(), sequences=True).to(torch.device("meta"))
    rows, length = batch.input_ids.shape
    tensors = [
        torch.empty(rows, length, n, 16, dtype=torch.bfloat16, device="meta").transpose(1, 2).requires_grad_()
        for n in (4, 2, 2)
    ]
    out = varlen._Attention.apply(*tensors, varlen_mask(batch, window).seen, 0.25)
    assert out.shape == (rows, length, 4, 16) and out.is_contiguous()
    grads = torch.autograd.grad(out.sum(), tensors)
    assert [g.shape for g in grads] == [x.shape for x in tensors]


@pytest.mark.parametrize("name", ["mistral-window", "granite"])
def test_without_our_mask_the_model_runs_as_with_sdpa(monkeypatch, random_model, name):
    """Plain batches and generation, whose prompts are padded on the left; in granite with a scale of its own."""
    model = random_model(name)
    policy = with_varlen(model)
    monkeypatch.setattr(varlen, "flash_forward", never)
    (batch,) = pack(groups(sizes=(1, 1)), 10_000, shared=False)
    assert batch.plain
    assert torch.equal(policy.hidden_states(batch), Policy(model).hidden_states(batch))
    tokenizer = types.SimpleNamespace(eos_token_id=1, pad_token_id=0)
    prompts = [Prompt(e.prompt_ids, "", {}) for e in groups(1)]
    sampled = generate(policy, tokenizer, prompts, max_new_tokens=12)
    assert sampled == generate(Policy(model), tokenizer, prompts, max_new_tokens=12)
    with pytest.raises(AssertionError, match="called FlashAttention"):
        policy(pack(groups(), 1000)[0])


def test_attention_that_does_not_know_the_mask_refuses_it(random_model, pack_one):
    """An implementation of another name would see everything, or nothing."""
    batch = pack_one(groups(), sequences=True)
    for name in ("sdpa", "eager"):
        model = random_model("llama")
        model.set_attn_implementation(name)
        with pytest.raises(RuntimeError, match="size"):
            model(input_ids=batch.input_ids, position_ids=batch.position_ids, attention_mask=varlen_mask(batch))


@pytest.mark.parametrize("option", varlen.NOT_DONE)
def test_what_it_leaves_out_is_refused(pack_one, option):
    mask = varlen_mask(pack_one(groups(longest=9), sequences=True))
    q = torch.zeros(1, 2, int(mask.seen.lists.query_ends[-1]), 16)
    options = {"dropout": 0.0, "softcap": None, "scaling": 0.25}
    assert varlen_or_sdpa(None, q, q, q, mask, **options)[0].shape == (1, q.shape[2], 2, 16)
    with pytest.raises(ValueError, match=f"{VARLEN} does not support {option}"):
        varlen_or_sdpa(None, q, q, q, mask, **(options | {option: 0.5}))
    with pytest.raises(ValueError, match=f"{VARLEN} does not support torch.float16"):
        varlen_or_sdpa(None, q.half(), q.half(), q.half(), mask)


def test_packed_for_another_attention_the_lists_are_made(pack_one):
    batch = pack_one(groups(), sequences=True)
    made, own = varlen_mask(dataclasses.replace(batch, sequences=None)).seen.lists, batch.sequences
    assert all(torch.equal(a, b) if torch.is_tensor(a) else a == b for a, b in zip(made, own, strict=True))
