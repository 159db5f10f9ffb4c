"""Which models may share a prompt: the allow-list and the trial classify rightly, and what is wrong is refused."""

import re
from types import MethodType

import pytest
import torch
import transformers as hf

from logratio.trainers.errors import UserError
from logratio.trainers.policy.load import check_architecture
from logratio.trainers.policy.policy import Policy
from logratio.trainers.policy.sharing import (
    choose_attention,
    configured_obstacle,
    probe,
    why_not_shared,
)

SHARES = (
    "llama qwen2 qwen2-window qwen3 mistral mistral-window phi phi3-window gpt2 opt gemma gemma3 granite cohere olmo2 "
    "gpt-neox mixtral qwen3-moe phimoe"
)
REASONS = {
    "llama-eager": "its attention implementation 'eager' does not take the mask that this needs",
    "llama-dynamic-rope": "its rope (dynamic) depends on the length of the batch",
    "gemma2": "its attention implementation 'eager' does not take the mask that this needs",
    "bloom": "its attention implementation 'eager' does not take the mask that this needs",
    "mpt": "its attention implementation 'eager' does not take the mask that this needs",
    "gpt-oss": "its attention implementation 'eager' does not take the mask that this needs",
    "llama4": "it has layers of type chunked_attention",
    "mamba": "it has layers of type linear_attention",
    "falcon-alibi": "with a shared prompt it raises ValueError",
}


@pytest.mark.parametrize("name", SHARES.split())
def test_may_share(random_model, name):
    assert why_not_shared(Policy(random_model(name))) == ""


@pytest.mark.parametrize("name", REASONS)
def test_may_not_share_and_says_why(random_model, name):
    assert choose_attention(Policy(random_model(name)))[0].startswith(REASONS[name])


@pytest.fixture
def capped(monkeypatch, random_model):
    """Gemma 2 with "sdpa", which some releases of transformers take for it."""
    monkeypatch.setattr(hf.Gemma2ForCausalLM, "_supports_sdpa", True)
    monkeypatch.setattr(hf.Gemma2Model, "_supports_sdpa", True)
    model = random_model("gemma2", attn_logit_softcapping=0.5)
    model.set_attn_implementation("sdpa")
    return model


def test_a_soft_cap_of_attention_is_not_lost(capped, random_model):
    policy = Policy(capped)
    obstacle, notes = choose_attention(policy)
    assert policy.attention == "eager" and notes == [] and "'eager' does not take the mask" in obstacle
    with torch.no_grad():
        with_cap, without, ours = (
            model(input_ids=torch.arange(12)[None]).logits
            for model in (
                random_model("gemma2", attn_logit_softcapping=0.5, _attn_implementation="eager"),
                random_model("gemma2", attn_logit_softcapping=None, _attn_implementation="eager"),
                capped,
            )
        )
    assert torch.equal(ours, with_cap) and (ours - without).norm() > 1e-2 * ours.norm()


def test_attention_without_the_models_soft_cap_is_refused(capped):
    asked = "--attn_implementation sdpa: "
    message = f"{asked}it has no soft-cap, and the model's attn_logit_softcapping is 0.5; leave it out"
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        choose_attention(Policy(capped), "sdpa")


@pytest.mark.parametrize("name", ["llama-eager", "bloom"])
def test_the_trial_alone_finds_attention_that_adds_the_mask(random_model, name):
    """The allow-list is not the only guard: hidden states change, or the model cannot do it at all."""
    assert re.match(
        "a shared prompt changes its hidden states by|with a shared prompt it raises", probe(Policy(random_model(name)))
    )


@pytest.mark.parametrize("name", ["llama", "qwen2-window", "gemma"])
def test_a_trial_in_the_precision_that_trains(random_model, name):
    """What is right or wrong in any precision is tried in the model's own, where rounding hides least."""
    policy, seen = Policy(random_model(name)), []
    policy.causal_lm.model.layers[0].mlp.down_proj.register_forward_hook(lambda *a: seen.append(a[2].dtype))
    assert probe(policy, torch.bfloat16) == ""
    assert seen[:3] == [torch.float32] * 3 and seen[-2:] == [torch.bfloat16] * 2


def test_no_room_is_no_reason_to_train_otherwise(monkeypatch, random_model):
    policy = Policy(random_model("llama"))

    def full(batch):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(policy, "mask", full)
    with pytest.raises(torch.OutOfMemoryError):
        choose_attention(policy)


def test_the_configuration_alone_finds_what_twelve_tokens_do_not_show(random_model):
    policy = Policy(random_model("llama-dynamic-rope"))
    assert probe(policy) == ""
    assert configured_obstacle(policy.causal_lm.config)


def test_layer_types_beyond_full_and_sliding_are_an_obstacle(random_model):
    config = random_model("qwen2-window").config
    assert configured_obstacle(config) == ""
    config.layer_types = ["sliding_attention", "chunked_attention"]
    assert configured_obstacle(config) == "it has layers of type chunked_attention"


def test_the_rope_of_a_single_layer_type_counts():
    config = hf.Gemma3TextConfig(num_hidden_layers=2)
    config._attn_implementation = "sdpa"
    assert configured_obstacle(config) == ""
    config.rope_parameters["sliding_attention"] = {"rope_type": "longrope", "rope_theta": 1e4}
    assert configured_obstacle(config) == "its rope (longrope) depends on the length of the batch"


def test_the_trial_leaves_the_model_as_it_was(random_model):
    policy = Policy(random_model("llama"))
    for training in (True, False):
        policy.train(training)
        why_not_shared(policy)
        assert policy.training is training is policy.model.training
    assert all(p.grad is None and p.requires_grad for p in policy.parameters())


@pytest.mark.parametrize("name", ["llama", "bloom", "mamba"])
def test_a_head_that_does_something_unknown_is_refused(random_model, name):
    """Whether prompts are shared or not: the log-probs would be wrong in both cases."""
    model = random_model(name)
    plain = model.forward

    def tripled(self, *args, **kwargs):
        output = plain(*args, **kwargs)
        output.logits = output.logits * 3
        return output

    model.forward = MethodType(tripled, model)
    with pytest.raises(UserError, match=f"{type(model).__name__} turns hidden states into logits in a way"):
        why_not_shared(Policy(model))


def test_a_model_that_sees_what_follows_is_refused(random_model):
    with pytest.raises(UserError, match=r"BertLMHeadModel lets tokens see what follows them"):
        why_not_shared(Policy(random_model("bert")))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (hf.T5Config(), "is an encoder-decoder (t5); only decoder-only models are supported"),
        (hf.BartConfig(), "is an encoder-decoder (bart); only decoder-only models are supported"),
        (hf.LlavaConfig(), "is not a model of text alone (llava); only language models are supported"),
        (hf.Gemma3Config(), "is not a model of text alone (gemma3); only language models are supported"),
        (hf.Qwen2AudioConfig(), "is not a model of text alone (qwen2_audio); only language models are supported"),
        (hf.ViTConfig(), "(vit) is not a causal language model that transformers knows"),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_other_kinds_of_models_are_refused_by_name(tmp_path, config, message):
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError) as raised:
        check_architecture(str(tmp_path))
    assert message in str(raised.value) and repr(str(tmp_path)) in str(raised.value)


def test_low_precision_models_are_judged_by_their_precision(random_model):
    """bfloat16 rounds 2^-8: sharing is found exact within it, and a wrong mask is still found."""
    policy = Policy(random_model("llama").to(torch.bfloat16))
    assert why_not_shared(policy) == ""
    wrong = Policy(random_model("llama-eager").to(torch.bfloat16))
    assert probe(wrong).startswith("a shared prompt changes its hidden states")


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_an_offset_that_bfloat16_rounds_away_is_no_other_head(random_model, softcap):
    """Of all words' logits, as GPT-2's and BLOOM's have: around -300 theirs are rounded to 2. A cap that is not told
    is still seen."""
    model = random_model("gpt2").bfloat16()
    model.transformer.ln_f.bias.data += 4.0
    model.transformer.wte.weight.data -= 300 / 128
    if softcap is not None:
        model.lm_head.register_forward_hook(lambda module, given, out: softcap * torch.tanh(out / softcap))
        with pytest.raises(UserError, match="turns hidden states into logits in a way"):
            why_not_shared(Policy(model))
        return
    assert model(torch.arange(6)[None]).logits.mean() < -250
    assert why_not_shared(Policy(model)) == ""
