"""FlexAttention: its mask says what the dense one says, and what it computes is the unshared computation.

On a CPU torch refuses its backward pass, although its reference implementation has one; `flex_on_cpu` lets it through.
What only kernels can get wrong is in `test_flex_gpu.py`.
"""

import functools
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch._dynamo.utils import counters
from torch.nn.attention import flex_attention as torch_flex
from torch.nn.attention.flex_attention import BlockMask, create_mask

from logratio.trainers.attention import flex
from logratio.trainers.attention.flex import OURS, THEIRS, adopt, block_mask
from logratio.trainers.attention.masks import attention_mask
from logratio.trainers.batches.blocks import Blocks, block_lists
from logratio.trainers.batches.packing import pack
from logratio.trainers.data.examples import Completion, Example, Prompt
from logratio.trainers.errors import UserError
from logratio.trainers.policy import sharing
from logratio.trainers.policy.policy import Policy
from logratio.trainers.policy.sharing import choose_attention, probe
from logratio.trainers.rollout.generation import generate
from logratio.trainers.step import Step

from ._flex import assert_close, batches, groups, results, with_flex

# Compiling takes seconds for each. The first have every form of mask between them.
MODELS = "llama qwen2-window mistral-window".split()
MORE = "gemma3 phi3-window granite opt gpt-neox".split()


@functools.cache
def reference_implementation():
    return torch.compile(flex._attend, dynamic=True, fullgraph=True, backend="aot_eager")


@pytest.fixture
def flex_on_cpu(monkeypatch):
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(flex, "compiled", reference_implementation)
    monkeypatch.setattr(flex, "DEVICES", ("cpu",))


@settings(max_examples=10, deadline=None)
@given(packed=batches(), window=st.sampled_from([None, 3, 5, 8]))
def test_the_block_mask_says_what_the_dense_mask_says(packed, window):
    """Of every pair of tokens; of blocks, see `test_blocks.py`."""
    for batch in packed:
        dense, blocks = attention_mask(batch, window), block_mask(batch, window)
        rows, length = batch.input_ids.shape
        assert blocks.shape == (rows, 1, length, length)
        assert torch.equal(create_mask(blocks.mask_mod, rows, 1, length, length, device="cpu"), dense)


def test_a_forward_takes_the_blocks_that_came_with_the_batch(flex_on_cpu, random_model):
    """It looks at no pair of tokens, and waits for no device; for another window than packing knew of they are made."""
    policy = with_flex(random_model("qwen2-window"))
    (batch,) = pack(groups(), 1000, **policy.packing)
    by_type, window = policy.mask(batch), policy.windows[1]
    for kind, lists in (("full_attention", batch.blocks[None]), ("sliding_attention", batch.blocks[window])):
        assert all(getattr(by_type[kind], name) is value for name, value in lists._asdict().items())
    other = block_mask(batch, 3)
    assert torch.equal(other.kv_num_blocks, block_lists(batch.group, batch.segment, 128, 3).kv_num_blocks)
    moved = batch.to(torch.device("meta"))
    assert {x.device.type for lists in moved.blocks.values() for x in lists} == {"meta"}


@pytest.mark.parametrize("name", [*MODELS, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def test_flex_gives_the_unshared_log_probs_and_gradients(flex_on_cpu, random_model, name):
    model = random_model(name)
    truth = results(Policy(model, shared=False), groups())
    policy = with_flex(model)
    for budget in (128, 1000):
        assert_close(results(policy, groups(), budget=budget), truth, 1e-5)


@pytest.mark.parametrize("name", ["llama", "qwen2-window", "mistral-window", "gpt2"])
def test_one_long_row_gives_the_same_log_probs_and_gradients(monkeypatch, random_model, name):
    policy, examples = Policy(random_model(name), shared=True), groups(longest=12)  # GPT-2 has 24 positions
    truth = results(policy, examples, budget=100)
    monkeypatch.setattr(Policy, "blocks", Blocks(128, policy.windows))
    assert_close(results(policy, examples), truth, 1e-5)


def test_flex_with_gradient_checkpointing_and_adapters(flex_on_cpu, random_model):
    model = random_model("qwen2-window")
    lora = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    truth = results(Policy(lora, shared=False), groups())
    policy = with_flex(lora)
    policy.causal_lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy.causal_lm.enable_input_require_grads()
    assert_close(results(policy.train(), groups()), truth, 1e-5)


def test_flex_under_autocast(flex_on_cpu, random_model):
    """Queries come out of the rope in float32, values in bfloat16."""
    policy = with_flex(random_model("llama"))
    truth = results(policy, groups())
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(results(policy, groups()), truth, 0.05)


@pytest.mark.parametrize("name", ["llama", pytest.param("qwen2-window", marks=pytest.mark.slow)])
def test_training_takes_the_graph_that_was_compiled_on_trial(flex_on_cpu, random_model, name):
    model = random_model(name)
    torch._dynamo.reset()
    counters.clear()
    assert flex.why_not(model) == "" and counters["stats"]["unique_graphs"] == 1
    policy = with_flex(model)
    for budget in (256, 500, 1000):  # of one block there is a graph of its own
        results(policy, groups(), budget=budget)
    assert counters["stats"]["unique_graphs"] == 1


def test_layers_with_and_without_a_window_get_masks_of_their_own(flex_on_cpu, random_model, pack_one):
    batch = pack_one(groups())
    by_type = with_flex(random_model("qwen2-window")).mask(batch)
    assert {kind: type(mask) for kind, mask in by_type.items()} == dict.fromkeys(
        ("full_attention", "sliding_attention"), BlockMask
    )
    assert isinstance(with_flex(random_model("mistral-window")).mask(batch), BlockMask)
    assert isinstance(Policy(random_model("mistral-window")).mask(batch), torch.Tensor)


@pytest.mark.slow
@pytest.mark.parametrize("grad", [False, True])
def test_kernels_are_compiled_a_few_times_whatever_the_lengths(grad):
    """One row or more x one block or more: four, whichever windows; and one where blocks and heads were as many."""
    # Which graphs there are, and their guards, does not depend on what makes kernels of them.
    attend = torch.compile(flex._attend, dynamic=True, fullgraph=True, backend="eager")
    torch._dynamo.reset()
    counters.clear()
    graphs = []
    for rows, blocks in [(1, 1), (2, 1), (1, 2), (2, 2), (3, 4), (4, 3), (1, 5), (5, 1), (3, 6)]:
        examples = [Example([2] * 9, [Completion([3] * (128 * blocks - 10)), Completion([3])])] * rows
        (batch,) = pack(examples, 10**6)
        query, key, value = (torch.randn(rows, heads, 128 * blocks, 8, requires_grad=grad) for heads in (2, 1, 1))
        for window in (None, 7):
            with torch.set_grad_enabled(grad), pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch_flex, "_validate_device", lambda *tensors: None)
                attend(query, key, value, block_mask(batch, window), 0.3)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[-1] <= 6 and graphs[-1] == graphs[5], graphs


@pytest.mark.slow
def test_long_rows_of_any_length_share_their_kernels(flex_on_cpu):
    """Of one block, of more, and of as many blocks as there are heads."""
    attend = torch.compile(flex._attend, dynamic=True, fullgraph=True, backend="eager")
    torch._dynamo.reset()
    counters.clear()
    graphs, lengths = [], set()
    for seed, budget in enumerate((128, 256, 1024, 512, 2048, 700, 1500, 3000)):
        for batch in pack(groups(seed, 200, (2, 3, 2, 4, 2)), budget, blocks=Blocks(128, (None, 7))):
            length = batch.input_ids.shape[1]
            query, key, value = (torch.randn(1, heads, length, 8, requires_grad=True) for heads in (4, 2, 2))
            for window in batch.blocks:
                attend(query, key, value, block_mask(batch, window), 0.3)
            lengths.add(length)
        graphs.append(counters["stats"]["unique_graphs"])
    assert len(lengths) >= 8 and graphs[-1] <= 3 and graphs[-1] == graphs[3], (graphs, lengths)


def never(*arguments):
    raise AssertionError("called FlexAttention")


@pytest.mark.parametrize("name", [pytest.param("llama", marks=pytest.mark.slow), "mistral-window"])
def test_without_our_mask_the_model_runs_as_with_sdpa(flex_on_cpu, monkeypatch, random_model, name):
    """Plain batches and generation, whose prompts are padded on the left."""
    model = random_model(name)
    policy = with_flex(model)
    monkeypatch.setattr(flex, "compiled", lambda: never)
    (batch,) = pack(groups(sizes=(1, 1)), 10_000, shared=False)
    assert batch.plain
    assert torch.equal(policy.hidden_states(batch), Policy(model).hidden_states(batch))
    tokenizer = types.SimpleNamespace(eos_token_id=1, pad_token_id=0)
    prompts = [Prompt(e.prompt_ids, "", {}) for e in groups(1)]
    options = {"max_new_tokens": 12}
    sampled = generate(policy, tokenizer, prompts, **options)
    assert sampled == generate(Policy(model), tokenizer, prompts, **options)
    with pytest.raises(AssertionError, match="called FlexAttention"):
        policy(pack(groups(), 1000)[0])


def test_the_trial_of_sharing_goes_the_same_way(flex_on_cpu, monkeypatch, random_model):
    policy = with_flex(random_model("llama"))
    lengths = []

    def watched(query, *others):
        lengths.append(query.shape[2])
        return reference_implementation()(query, *others)

    monkeypatch.setattr(flex, "compiled", lambda: watched)
    assert probe(policy) == ""
    assert lengths == [128] * 2
    monkeypatch.setattr(flex, "may_see", lambda query, key, sight: query >= key)
    assert probe(policy).startswith("a shared prompt changes its hidden states")


def on_gpu(model):
    """What `adopt` sees of a model, as if it were on a GPU."""
    return types.SimpleNamespace(
        device=torch.device("cuda"),
        config=model.config,
        _supports_sdpa=model._supports_sdpa,
        _supports_flex_attn=model._supports_flex_attn,
        set_attn_implementation=model.set_attn_implementation,
    )


@pytest.mark.parametrize(
    ("name", "asked", "taken"),
    [
        ("llama", None, OURS),
        ("llama", THEIRS, OURS),
        ("llama", "sdpa", "sdpa"),
        ("llama-eager", None, "eager"),
        ("gpt2", None, "sdpa"),
        ("gemma2", None, None),  # as transformers has it
        ("gemma2", THEIRS, THEIRS),
    ],
)
def test_a_gpu_takes_flex_where_it_fits(monkeypatch, random_model, name, asked, taken):
    monkeypatch.setattr(flex, "why_not", lambda model: "")
    model = random_model(name)
    if asked:
        model.set_attn_implementation(asked)
    taken = taken or model.config._attn_implementation
    assert adopt(on_gpu(model), asked) == [] and model.config._attn_implementation == taken


def scaled_backward(out):
    """The same values, gradients that are 10 % too large."""
    return 1.1 * out - 0.1 * out.detach()


# What a kernel may get wrong -> what is done to its [R, heads, L, D], and said of it.
FAULTS = {
    "a token that is NaN": (lambda out: out.index_fill(2, torch.tensor([700]), torch.nan), "its values differ by nan"),
    "a token that sees nothing": (lambda out: out.index_fill(2, torch.tensor([700]), 0.0), "its values differ by"),
    "gradients": (scaled_backward, "its queries' gradients differ by"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_kernels_that_compute_something_else_are_not_taken(flex_on_cpu, monkeypatch, random_model, fault):
    """All that a run would show of them is a loss that is not finite, or nothing."""
    spoil, said = FAULTS[fault]
    right = reference_implementation()
    monkeypatch.setattr(flex, "compiled", lambda: lambda *args: spoil(right(*args)))
    assert flex.why_not(random_model("llama")).startswith(said)


def test_a_model_takes_it_after_a_trial(flex_on_cpu, random_model):
    assert adopt(model := random_model("qwen2-window"), THEIRS) == []
    assert model.config._attn_implementation == OURS


def test_where_flex_does_not_work_the_mask_stays_dense_and_the_user_is_told(monkeypatch, random_model):
    model = random_model("llama")
    monkeypatch.setattr(flex, "why_not", lambda model: "it raises OutOfResources")
    assert adopt(on_gpu(model)) == ["rows are masked densely, not with FlexAttention: it raises OutOfResources"]
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(UserError, match="--attn_implementation flex_attention: it raises OutOfResources; leave it out"):
        adopt(on_gpu(model), THEIRS)


def test_a_cpu_refuses_flex(random_model):
    model = random_model("llama")
    assert adopt(model) == [] and model.config._attn_implementation == "sdpa"
    with pytest.raises(UserError, match="flex_attention: it does not train on a cpu; leave it out"):
        adopt(model, THEIRS)


def test_dropout_inside_the_attention_is_an_obstacle(flex_on_cpu, random_model):
    with pytest.raises(UserError, match="it has no dropout, and the model's attention_dropout is 0.1"):
        adopt(random_model("llama", attention_dropout=0.1), THEIRS)


@pytest.mark.parametrize("option", flex.NOT_DONE)
def test_what_flex_leaves_out_is_refused(flex_on_cpu, random_model, pack_one, option):
    q = torch.zeros(1, 2, 128, 16)
    mask = block_mask(pack_one(groups(longest=9), blocks=Blocks(128)))
    options = {"dropout": 0.0, "softcap": None, "scaling": 0.25}
    assert flex.flex_or_sdpa(None, q, q, q, mask, **options)[0].shape == (1, 128, 2, 16)
    with pytest.raises(ValueError, match=f"{OURS} does not support {option}"):
        flex.flex_or_sdpa(None, q, q, q, mask, **(options | {option: 0.5}))


def test_a_model_that_has_no_use_for_a_block_mask_gets_a_dense_one(monkeypatch, random_model):
    policy = Policy(random_model("llama"))
    policy.causal_lm.set_attn_implementation(OURS)
    monkeypatch.setattr(sharing, "adopt", lambda model, asked: [])
    monkeypatch.setattr(sharing, "why_not_shared", lambda policy, *autocast: "it raises" if policy.uses_flex else "")
    told = ["rows are masked densely, not with FlexAttention: it raises"]
    assert choose_attention(policy) == ("", told) and not policy.uses_flex


def test_a_step_packs_as_its_policy_attends(flex_on_cpu, random_model):
    flexible, dense = with_flex(random_model("llama")), Policy(random_model("llama"), shared=True)
    for policy, blocks in ((flexible, Blocks(128)), (dense, None)):
        step = Step(None, policy, types.SimpleNamespace(), None, micro_batch_tokens=1, max_length=1)
        assert step.packing["blocks"] == blocks and step.packing["shared"]
    assert with_flex(random_model("mistral-window")).blocks == Blocks(128, (7,))
    assert with_flex(random_model("qwen2-window")).blocks == Blocks(128, (None, 7))
