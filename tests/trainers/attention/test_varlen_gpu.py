"""FlashAttention's kernels for sequences: within twice the error of a dense mask in the same dtype."""

import copy
import types

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import scaled_dot_product_attention

from logratio.trainers.attention import varlen
from logratio.trainers.attention.masks import attention_mask
from logratio.trainers.attention.varlen import VARLEN, varlen_mask, varlen_or_sdpa
from logratio.trainers.batches.packing import pack
from logratio.trainers.data.examples import Completion, Example, Prompt
from logratio.trainers.policy.policy import Policy
from logratio.trainers.policy.sharing import choose_attention
from logratio.trainers.rollout.generation import generate

from ._rows import groups, results

pytestmark = pytest.mark.gpu

# (prompt, completions) in tokens, 1,557 of them, so that 11 are padding
LENGTHS = ((150, 90, 200, 75), (40, 333), (260, 61, 128, 2), (5, 1, 1, 80), (1, 1, 129))


def on_gpu():
    examples = [Example([5] * p, [Completion([6] * n) for n in lengths]) for p, *lengths in LENGTHS]
    (batch,) = pack(examples, 4096, sequences=True)
    assert batch.input_ids.numel() % 16 == 0 and (batch.group < 0).any()
    return batch.to(torch.device("cuda"))


def with_gradients(attend, tensors, slope):
    tensors = [x.detach().requires_grad_() for x in tensors]
    out = attend(*(x.transpose(1, 2) for x in tensors))
    return out.detach(), *torch.autograd.grad(out, tensors, slope.to(out.dtype))


@pytest.mark.parametrize("window", [None, 100, 2])
@pytest.mark.parametrize("size", [16, 64, 72, 128, 256])
@pytest.mark.parametrize("heads", [(14, 2), (4, 4)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_and_gradients(dtype, heads, size, window):
    """Truth: float64, of the same numbers."""
    batch, draw = on_gpu(), torch.Generator("cuda").manual_seed(size)
    of = {"generator": draw, "device": "cuda"}
    shapes = [(*batch.group.shape, n, size) for n in (heads[0], heads[1], heads[1])]
    tensors = [torch.randn(shape, **of).to(dtype) for shape in shapes]
    real = (batch.group >= 0)[:, :, None, None]
    slope = torch.randn(shapes[0], **of).to(dtype) * real
    dense, mask = attention_mask(batch, window), varlen_mask(batch, window)

    def by_mask(q, k, v):
        k, v = (x.repeat_interleave(heads[0] // heads[1], 1) for x in (k, v))
        return scaled_dot_product_attention(q, k, v, dense, scale=0.1).transpose(1, 2)

    ours = with_gradients(lambda *x: varlen_or_sdpa(None, *x, mask, scaling=0.1)[0], tensors, slope)
    theirs = with_gradients(by_mask, tensors, slope)
    truth = with_gradients(by_mask, [x.double() for x in tensors], slope)
    for mine, other, true in zip(ours, theirs, truth, strict=True):
        assert mine.isfinite().all() and mine.dtype == dtype
        error, budget = ((x.double() - true)[real.expand_as(true)].norm() for x in (mine, other))
        assert error <= 2 * budget + 1e-4 * true.norm()


def test_gradients_of_keys_are_the_same_to_the_bit_each_time():
    """And of the sum, the same as on a CPU, but for the order in which it has rounded."""
    batch, draw = on_gpu(), torch.Generator("cuda").manual_seed(0)
    lists = batch.sequences
    shape = (len(lists.source), 2, 64)
    grads = [torch.randn(shape, generator=draw, device="cuda").bfloat16() for _ in range(2)]
    once, again = (varlen.sum_copies(*grads, lists) for _ in range(2))
    on_cpu = type(lists)(*(x.cpu() if torch.is_tensor(x) else x for x in lists))
    for mine, other, true in zip(once, again, varlen.sum_copies(*(g.cpu() for g in grads), on_cpu), strict=True):
        assert torch.equal(mine, other)
        torch.testing.assert_close(mine.cpu(), true)


def taken(policy: Policy, autocast: torch.dtype | None = None) -> Policy:
    assert choose_attention(policy, None, autocast) == ("", []) and policy.attention == VARLEN
    return policy.eval()


@pytest.mark.parametrize("name", ["llama", "qwen2-window", "gemma3", "opt"])
def test_a_model_errs_no_more_than_under_the_dense_mask(exact_float32, random_model, name):
    model = random_model(name, **({} if name == "opt" else {"head_dim": 64})).cuda()
    examples = groups(longest=200 if name != "opt" else 30)
    truth = results(Policy(model, shared=False), examples, "cuda", budget=4096)
    low = copy.deepcopy(model).bfloat16()
    dense = results(Policy(low, shared=True), examples, "cuda", budget=4096)
    for budget in (1024, 4096):
        ours = results(taken(Policy(copy.deepcopy(low), shared=True)), examples, "cuda", budget=budget)
        for mine, theirs, true in zip(ours, dense, truth, strict=True):
            assert (mine - true).norm() <= 2 * (theirs - true).norm()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_in_mixed_precision_as_they_are_trained(exact_float32, random_model, checkpointing):
    """float32 weights under autocast, tried in it. Budget: twice what sdpa errs under it."""
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(random_model("llama", head_dim=64), lora).cuda()
    examples = groups(longest=200)
    truth = results(Policy(model, shared=False), examples, "cuda", budget=4096)
    dense, ours = (Policy(copy.deepcopy(model), shared=True) for _ in range(2))
    found = []
    for policy in (taken(ours, torch.bfloat16), dense):
        if checkpointing:
            policy.causal_lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with torch.autocast("cuda", torch.bfloat16):
            found.append(results(policy.train(), examples, "cuda", budget=4096))
    for mine, theirs, true in zip(*found, truth, strict=True):
        assert (mine - true).norm() <= 2 * (theirs - true).norm()


def test_rollouts_are_those_of_sdpa(random_model):
    model = random_model("qwen2-window", head_dim=64).cuda().bfloat16()
    policy = taken(Policy(copy.deepcopy(model), shared=True))
    tokenizer = types.SimpleNamespace(eos_token_id=1, pad_token_id=0)
    prompts = [Prompt(e.prompt_ids, "", {}) for e in groups(sizes=(1,) * 6)]
    sampled = generate(policy, tokenizer, prompts, max_new_tokens=20)
    assert sampled == generate(Policy(model), tokenizer, prompts, max_new_tokens=20)
