"""FlexAttention's kernels: the unshared computation, within the budget of the dtype, compiled a few times."""

import copy
import types

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch._dynamo.utils import counters

from logratio.trainers.attention.flex import OURS, THEIRS
from logratio.trainers.batches.packing import pack
from logratio.trainers.data.examples import Completion, Example, Prompt
from logratio.trainers.policy.policy import Policy
from logratio.trainers.policy.sharing import choose_attention
from logratio.trainers.rollout.generation import generate

from ._flex import assert_close, groups, results, with_flex

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("name", ["llama", "qwen2-window", "mistral-window", "gemma3"])
def test_kernels_give_the_unshared_log_probs_and_gradients(exact_float32, random_model, name, head_dim):
    model = random_model(name, head_dim=head_dim).cuda()
    truth = results(Policy(model, shared=False), groups(longest=200), "cuda", budget=4096)
    policy = Policy(copy.deepcopy(model), shared=True)
    assert choose_attention(policy) == ("", []) and policy.causal_lm.config._attn_implementation == OURS
    for budget in (1024, 4096):
        assert_close(results(policy, groups(longest=200), "cuda", budget=budget), truth, 1e-4)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("heads", [(4, 2), (14, 2), (7, 7)])
def test_kernels_in_bfloat16_err_no_more_than_the_dense_mask(exact_float32, random_model, name, heads):
    """14 query heads on 2, as in Qwen2.5-0.5B. Budget: twice what sdpa errs with the same weights in bfloat16."""
    sizes = {"num_attention_heads": heads[0], "num_key_value_heads": heads[1], "head_dim": 64}
    model = random_model(name, **sizes).cuda()
    examples = groups(longest=200)
    truth = results(Policy(model, shared=False), examples, "cuda", budget=4096)
    low = copy.deepcopy(model).bfloat16()
    dense = results(Policy(low, shared=True), examples, "cuda", budget=4096)
    ours = results(with_flex(low), examples, "cuda", budget=4096)
    for mine, theirs, true in zip(ours, dense, truth, strict=True):
        assert (mine - true).norm() <= 2 * (theirs - true).norm()
    with torch.autocast("cuda", torch.bfloat16):
        mixed = results(with_flex(model), examples, "cuda", budget=4096)
    for mine, theirs, true in zip(mixed, dense, truth, strict=True):
        assert (mine - true).norm() <= 2 * (theirs - true).norm()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_in_mixed_precision_as_they_are_trained(exact_float32, random_model, checkpointing):
    """float32 weights under autocast, tried in it. Budget: twice what sdpa errs under it."""
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(random_model("llama", head_dim=64), lora).cuda()
    examples = groups(longest=200)
    truth = results(Policy(model, shared=False), examples, "cuda", budget=4096)
    found = []
    for asked in (THEIRS, "sdpa"):
        policy = Policy(copy.deepcopy(model), shared=True)
        assert choose_attention(policy, asked, torch.bfloat16) == ("", []) and policy.uses_flex == (asked == THEIRS)
        if checkpointing:
            policy.causal_lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with torch.autocast("cuda", torch.bfloat16):
            found.append(results(policy.train(), examples, "cuda", budget=4096))
    for mine, theirs, true in zip(*found, truth, strict=True):
        assert (mine - true).norm() <= 2 * (theirs - true).norm()


def test_new_lengths_compile_no_new_kernels(random_model):
    policy = with_flex(random_model("mistral-window", head_dim=16).cuda())
    torch._dynamo.reset()
    counters.clear()
    graphs = []
    for longest in (30, 60, 100, 300, 200, 400, 50, 500):
        for budget in (128, 2048, 8192):
            results(policy, groups(longest, longest, (3, 1, 2, 3, 3, 3)), "cuda", budget=budget)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[-1] <= 8 and graphs[-1] == graphs[3], graphs


def test_rollouts_and_updates_take_turns_on_one_model(exact_float32, random_model):
    """Sampled with sdpa, trained with kernels: greedy tokens are the most likely ones under the packed log-probs."""
    model = random_model("qwen2-window", head_dim=16).cuda()
    policy = with_flex(model)
    tokenizer = types.SimpleNamespace(eos_token_id=1, pad_token_id=0)
    optimizer = torch.optim.SGD(policy.parameters(), lr=1e-2)
    prompts = [Prompt(e.prompt_ids, "", {}) for e in groups(sizes=(1,) * 6)]
    for _ in range(3):
        sampled = generate(policy, tokenizer, prompts, max_new_tokens=20)
        again = Policy(copy.deepcopy(policy.model), shared=False)
        again.causal_lm.set_attn_implementation("sdpa")
        assert sampled == generate(again, tokenizer, prompts, max_new_tokens=20)
        examples = [
            Example(p.prompt_ids, [Completion(s.ids), Completion([5, 6])], row=i)
            for i, (p, s) in enumerate(zip(prompts, sampled, strict=True))
        ]
        assert_close(results(policy, examples, "cuda"), results(again, examples, "cuda"), 1e-4)
        for batch in pack(examples, 1000, **policy.packing):
            policy(batch.to(torch.device("cuda"))).logps.sum().neg().backward()
        optimizer.step()
        optimizer.zero_grad()
