"""Which models take attention by sequences: where there are kernels for them, and a trial finds no fault in these."""

import copy
import math
import types

import pytest
import torch
import transformers as hf

from logratio.trainers.attention import varlen
from logratio.trainers.attention.varlen import VARLEN
from logratio.trainers.errors import UserError
from logratio.trainers.policy import sharing
from logratio.trainers.policy.policy import Policy
from logratio.trainers.policy.sharing import choose_attention, probe
from logratio.trainers.step import Step

from . import _varlen
from ._varlen import never, with_varlen

pytestmark = pytest.mark.usefixtures("varlen_on_cpu")


@pytest.mark.parametrize(
    ("name", "options", "taken"),
    [
        ("llama", {}, True),
        ("qwen2-window", {}, True),
        ("llama-eager", {}, False),
        ("gemma2", {}, False),
        ("llama", {"head_dim": 20}, False),
        ("llama", {"head_dim": 264}, False),
        ("llama", {"attention_dropout": 0.1}, False),
    ],
)
def test_a_model_takes_it_where_it_fits(random_model, name, options, taken):
    model = random_model(name, **options)
    before = model.config._attn_implementation
    assert varlen.adopt(model) == ""
    assert model.config._attn_implementation == (VARLEN if taken else before)


def test_heads_of_several_sizes_go_on_with_sdpa():
    """Of which transformers' configuration says no one size, but raises."""
    windows = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 16}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "hidden_size_per_layer_input": 0}
    config = hf.Gemma4TextConfig(vocab_size=97, pad_token_id=0, bos_token_id=1, **sizes, **heads, **windows)
    model = hf.AutoModelForCausalLM.from_config(config).float()
    assert varlen.adopt(model) == "" and model.config._attn_implementation == "sdpa"


def test_in_another_dtype_it_is_not_taken(monkeypatch, random_model):
    monkeypatch.setattr(varlen, "DTYPES", (torch.bfloat16,))
    model = random_model("llama")
    assert not varlen.fits(model) and varlen.fits(copy.deepcopy(model).bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert varlen.fits(model)


def scaled(grads):
    """The gradients of keys 10 % too large."""
    return grads[0], 1.1 * grads[1], grads[2]


FAULTS = {
    "values": ("flash_forward", lambda out: (out[0].index_fill(0, torch.tensor(700), math.nan), *out[1:]), "values"),
    "a token": ("flash_forward", lambda out: (out[0].index_fill(0, torch.tensor(700), 0), *out[1:]), "values"),
    "gradients": ("flash_backward", scaled, "keys' gradients"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_kernels_that_compute_something_else_are_not_taken(monkeypatch, random_model, fault):
    """The user is told, and the model goes on as without them."""
    of, spoil, said = FAULTS[fault]
    right = getattr(_varlen, of)
    monkeypatch.setattr(varlen, of, lambda *args, **options: spoil(right(*args, **options)))
    policy = Policy(random_model("llama"))
    obstacle, (note,) = choose_attention(policy)
    assert obstacle == "" and policy.attention != VARLEN and not policy.by_sequences
    assert note.startswith(f"rows are masked densely, not with FlashAttention: its {said} differ by")


def test_the_trial_of_sharing_goes_the_same_way(monkeypatch, random_model):
    policy = Policy(random_model("llama"))
    assert choose_attention(policy) == ("", []) and policy.attention == VARLEN
    assert policy.by_sequences
    monkeypatch.setattr(_varlen, "sees", lambda queries, keys, *window: torch.ones(queries, keys, dtype=torch.bool))
    assert probe(policy).startswith("a shared prompt changes its hidden states")


def test_a_step_packs_as_its_policy_attends(random_model):
    for policy in (with_varlen(random_model("llama")), Policy(random_model("llama"), shared=True)):
        step = Step(None, policy, types.SimpleNamespace(), None, micro_batch_tokens=1, max_length=1)
        assert step.packing["sequences"] == policy.by_sequences and step.packing["shared"]


def test_asked_for_another_it_is_not_tried(monkeypatch, random_model):
    monkeypatch.setattr(varlen, "flash_forward", never)
    policy = Policy(random_model("llama"))
    assert choose_attention(policy, "sdpa") == ("", []) and policy.attention == "sdpa"


def test_a_model_that_has_no_use_for_its_mask_gets_a_dense_one(monkeypatch, random_model):
    policy = with_varlen(random_model("llama"))
    monkeypatch.setattr(varlen, "adopt", lambda model: "")
    monkeypatch.setattr(sharing, "why_not_shared", lambda policy, *autocast: "it raises" if policy.by_sequences else "")
    monkeypatch.setattr(sharing, "adopt_stretches", lambda model: False)
    told = ["rows are masked densely, not with FlashAttention: it raises"]
    assert choose_attention(policy) == ("", told) and policy.attention == "sdpa"


def test_flex_attention_is_refused(random_model):
    said = "--attn_implementation flex_attention does not take packed rows; leave it out"
    with pytest.raises(UserError, match=f"^{said}$"):
        choose_attention(Policy(random_model("llama")), "flex_attention")
