"""Attention a stretch at a time: what it computes is attention under the dense mask, and no model notices."""

import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch.nn.functional import scaled_dot_product_attention

from logratio.trainers.attention import stretches as module
from logratio.trainers.attention.masks import attention_mask
from logratio.trainers.attention.stretches import STRETCHES, attend, stretch_mask, stretches, stretches_or_sdpa
from logratio.trainers.batches.packing import pack
from logratio.trainers.data.examples import Completion, Example
from logratio.trainers.policy.policy import Policy
from logratio.trainers.policy.sharing import choose_attention

from ._rows import assert_close, batches, groups, results


@settings(max_examples=50, deadline=None)
@given(packed=batches(), window=st.none() | st.integers(1, 8))
def test_stretches_hold_every_pair_that_is_seen(packed, window):
    """Put back where they were cut out, they are the dense mask."""
    for batch in packed:
        mask = attention_mask(batch, window)
        found = stretches(batch, mask)
        rebuilt, starts, at = torch.zeros_like(mask), [], 0
        length = mask.shape[-1]
        for stretch in found:
            row, start = divmod(at, length)
            starts.append(start)
            parts = [stretch] if stretch.prompt is None else [found[stretch.prompt], stretch]
            firsts = [start] if stretch.prompt is None else [starts[stretch.prompt], start]
            keys = torch.cat([torch.arange(s, s + p.length) for p, s in zip(parts, firsts, strict=True)])
            rebuilt[row, 0, start : start + stretch.length, keys] = stretch.sees
            at += stretch.length
        assert at == mask.shape[0] * length
        assert torch.equal(rebuilt, mask)


@settings(max_examples=25, deadline=None)
@given(packed=batches(), window=st.none() | st.integers(1, 8), key_heads=st.sampled_from([1, 2, 4]))
def test_it_is_attention_under_the_dense_mask(packed, window, key_heads):
    for batch in packed:
        rows, length = batch.input_ids.shape
        mask = attention_mask(batch, window)
        generator = torch.Generator().manual_seed(length)
        query, key, value = (
            torch.randn(rows, heads, length, 8, generator=generator, dtype=torch.float64, requires_grad=True)
            for heads in (4, key_heads, key_heads)
        )
        weight = torch.randn(rows, length, 4, 8, generator=generator, dtype=torch.float64)
        dense = scaled_dot_product_attention(query, key, value, mask, scale=0.3, enable_gqa=True).transpose(1, 2)
        ours = attend(query, key, value, stretches(batch, mask), 0.0, 0.3)
        torch.testing.assert_close(ours, dense, rtol=1e-12, atol=1e-12)
        grads = [torch.autograd.grad((out * weight).sum(), (query, key, value)) for out in (ours, dense)]
        for mine, truth in zip(*grads, strict=True):
            torch.testing.assert_close(mine, truth, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", "llama qwen2-window mistral-window phi3-window gemma3 granite opt gpt-neox".split())
def test_models_give_the_unshared_log_probs_and_gradients(monkeypatch, random_model, name):
    model = random_model(name)
    truth = results(Policy(model, shared=False), groups())
    policy = Policy(model, shared=True).eval()
    assert choose_attention(policy) == ("", []) and policy.attention == STRETCHES
    monkeypatch.setattr(module, "CALL_PAIRS", 0)
    calls = []
    monkeypatch.setattr(module, "attend", lambda *arguments: calls.append(1) or attend(*arguments))
    assert_close(results(policy, groups()), truth, 1e-5)
    assert len(calls) == sum(not batch.plain for batch in pack(groups(), 1000)) * model.config.num_hidden_layers


def test_with_gradient_checkpointing_and_adapters(monkeypatch, random_model):
    lora = get_peft_model(
        random_model("qwen2-window"), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    )
    truth = results(Policy(lora, shared=False), groups())
    policy = Policy(lora, shared=True)
    choose_attention(policy)
    policy.causal_lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy.causal_lm.enable_input_require_grads()
    monkeypatch.setattr(module, "CALL_PAIRS", 0)
    monkeypatch.setattr(module, "scaled_dot_product_attention", counted := Counted())
    assert_close(results(policy.train(), groups()), truth, 1e-5)
    masked = [batch for batch in pack(groups(), 1000, **policy.packing) if not batch.plain]
    stretches_a_layer = sum(len(stretches(batch, attention_mask(batch))) for batch in masked)
    assert counted.calls == 2 * 2 * stretches_a_layer  # two layers, each computed twice


class Counted:
    calls = 0

    def __call__(self, *arguments, **options):
        self.calls += 1
        return scaled_dot_product_attention(*arguments, **options)


def test_they_are_taken_where_they_save_more_than_they_cost():
    """A prompt of 100 and eight completions of 130: 1140^2 pairs in a row, of which a fifth are in a stretch."""
    (long,) = pack([Example([2] * 100, [Completion([3] * 130) for _ in range(8)])], 10_000)
    found = stretch_mask(long).stretches  # type: ignore[attr-defined]
    assert [s.length for s in found] == [100] + [130] * 8
    assert sum(s.pairs for s in found) == 100 * 100 + 8 * 130 * 230
    (short,) = pack([Example([2] * 10, [Completion([3] * 13) for _ in range(8)])], 10_000)
    assert not hasattr(stretch_mask(short), "stretches")


def test_what_it_does_not_do_is_left_to_sdpa(monkeypatch):
    (batch,) = pack([Example([2] * 100, [Completion([3] * 130) for _ in range(8)])], 10_000)
    mask = stretch_mask(batch)
    monkeypatch.setattr(module, "attend", None)
    query = torch.randn(1, 2, 1140, 8)
    layer = torch.nn.Module()
    bias = torch.zeros(1, 2, 1140, 1140)
    out, _ = stretches_or_sdpa(layer, query, query, query, mask, position_bias=bias)
    torch.testing.assert_close(out, scaled_dot_product_attention(query, query, query, mask).transpose(1, 2))
    with pytest.raises(TypeError):
        stretches_or_sdpa(layer, query, query, query, mask)


def test_attention_that_the_user_asked_for_stays(random_model):
    policy = Policy(random_model("llama"), shared=True)
    assert choose_attention(policy, "sdpa") == ("", []) and policy.attention == "sdpa"
    eager = Policy(random_model("llama-eager"))
    assert choose_attention(eager)[0] != "" and eager.attention == "eager"


def test_dropout_is_drawn():
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()
    found = [module.Stretch(4, None, mask[0, 0])]
    query = torch.ones(1, 2, 4, 8)
    assert torch.equal(attend(query, query, query, found, 0.0, None), torch.ones(1, 4, 2, 8))
    assert not torch.equal(attend(query, query, query, found, 0.5, None), torch.ones(1, 4, 2, 8))


def test_what_is_trained_with_is_tried(monkeypatch, random_model):
    """On the user's model, at any length: where stretches change what it computes, it does without."""
    policy, calls = Policy(random_model("qwen2-window"), shared=True), []
    monkeypatch.setattr(module, "attend", lambda *arguments: calls.append(1) or attend(*arguments))
    assert choose_attention(policy) == ("", []) and policy.attention == STRETCHES and len(calls) == 2
    wrong = Policy(random_model("qwen2-window"), shared=True)
    monkeypatch.setattr(module, "attend", lambda *arguments: 1.1 * attend(*arguments))
    assert choose_attention(wrong) == ("", []) and wrong.attention == "sdpa"


def test_a_mask_goes_with_its_last_user():
    (batch,) = pack([Example([2] * 100, [Completion([3] * 130) for _ in range(8)])], 10_000)
    mask = stretch_mask(batch)
    gone = weakref.ref(mask)
    del mask
    assert gone() is None
