"""Generation against a plain loop: where it stops, what it pads with, what it samples from."""

import copy
import math

import pytest
import torch

from logratio.trainers.data.examples import Prompt
from logratio.trainers.policy.tiny import tiny_tokenizer
from logratio.trainers.rollout.rollouts import generate

from ._prompts import TEXTS, argmax_loop, prompts_of


def test_greedy_is_a_plain_argmax_loop_whatever_the_padding(policy, tokenizer):
    prompts = prompts_of(tokenizer, *TEXTS)
    wanted = [argmax_loop(policy.model, p.prompt_ids, {tokenizer.eos_token_id}, 12) for p in prompts]
    assert len({tuple(w.ids) for w in wanted}) > 1
    assert generate(policy, tokenizer, prompts, max_new_tokens=12, do_sample=False) == wanted
    assert [generate(policy, tokenizer, [p], max_new_tokens=12, do_sample=False)[0] for p in prompts] == wanted


@pytest.mark.parametrize("where", ["tokenizer", "generation_config", "list"])
def test_generation_stops_at_eos_and_keeps_it(policy, where, monkeypatch):
    """The EOS of the tokenizer, and every one that the checkpoint names."""
    tokenizer = tiny_tokenizer()
    prompts = prompts_of(tokenizer, *TEXTS)
    free = generate(policy, tokenizer, prompts, max_new_tokens=12, do_sample=False)
    stop = free[0].ids[3]
    eos = {"tokenizer": None, "generation_config": stop, "list": [stop, 1]}[where]
    monkeypatch.setattr(policy.model.generation_config, "eos_token_id", eos)
    if where == "tokenizer":
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(stop)
    stops = {tokenizer.eos_token_id, stop, *(eos if isinstance(eos, list) else [])}
    got = generate(policy, tokenizer, prompts, max_new_tokens=12, do_sample=False)
    assert got == [argmax_loop(policy.model, p.prompt_ids, stops, 12) for p in prompts]
    assert got[0].ended and len(got[0].ids) <= 4 and got[0].ids[-1] in stops
    assert all(s.ended == (s.ids[-1] in stops) and (s.ended or len(s.ids) == 12) for s in got)


def closing_with(token):
    """A tokenizer whose template closes turns with `token`, while its EOS is another one."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [token]})
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}" + token + "{% endfor %}"
    return tokenizer


def test_a_conversation_stops_where_its_template_closes_the_turn(policy):
    messages = [{"role": "user", "content": "hi"}]
    free = generate(policy, tiny_tokenizer(), [Prompt([65], "A", {}, 0)], max_new_tokens=12, do_sample=False)[0].ids
    tokenizer = closing_with("<|im_start|>")
    stop = tokenizer.convert_tokens_to_ids("<|im_start|>")
    with torch.no_grad():  # the token that it says fourth is another name of the closing one
        head = copy.deepcopy(policy)
        head.model.lm_head.weight = torch.nn.Parameter(policy.model.lm_head.weight.clone())
        head.model.lm_head.weight[[stop, free[3]]] = policy.model.lm_head.weight[[free[3], stop]]
    said = {
        kind: generate(head, tokenizer, [Prompt([65], prompt, {}, 0)], max_new_tokens=12, do_sample=False)[0]
        for kind, prompt in {"plain": "A", "chat": messages}.items()
    }
    assert said["chat"].ended and said["chat"].ids[-1] == stop and said["chat"].ids.count(stop) == 1
    assert said["plain"].ids[: len(said["chat"].ids)] == said["chat"].ids and len(said["plain"].ids) == 12


@pytest.mark.parametrize("where", ["beyond the embeddings", "nowhere"])
def test_padding_needs_no_row_in_the_embeddings(policy, tokenizer, where):
    prompts = prompts_of(tokenizer, *TEXTS)
    wanted = generate(policy, tokenizer, prompts, max_new_tokens=12, do_sample=False)
    other = tiny_tokenizer()
    other.pad_token = None
    if where != "nowhere":
        other.add_special_tokens({"pad_token": "[PAD]"})
        assert other.pad_token_id == policy.model.config.vocab_size
    assert generate(policy, other, prompts, max_new_tokens=12, do_sample=False) == wanted


def test_the_checkpoints_own_sampling_defaults_do_not_apply(policy, tokenizer, monkeypatch):
    """A repetition penalty would sample from another distribution than the one that is trained."""
    prompts = prompts_of(tokenizer, *TEXTS)
    wanted = generate(policy, tokenizer, prompts, max_new_tokens=12, do_sample=False)
    config = policy.model.generation_config
    for name, value in {"repetition_penalty": 9.0, "no_repeat_ngram_size": 1, "min_new_tokens": 12}.items():
        monkeypatch.setattr(config, name, value)
    assert generate(policy, tokenizer, prompts, max_new_tokens=12, do_sample=False) == wanted
    assert policy.model.generation_config is config


def test_sampling_follows_the_models_probabilities(policy, tokenizer):
    """First tokens of 2,000 samples at temperature 0.7 against softmax(logits / 0.7): total variation."""
    (prompt,) = prompts_of(tokenizer, "abc")
    torch.manual_seed(0)
    sampled = generate(policy, tokenizer, [prompt] * 2000, max_new_tokens=1, temperature=0.7, top_p=1.0)
    with torch.no_grad():
        p = (policy.model(torch.tensor([prompt.prompt_ids])).logits[0, -1] / 0.7).softmax(-1)
    seen = torch.bincount(torch.tensor([s.ids[0] for s in sampled]), minlength=len(p)) / 2000
    expected_distance = (p * (1 - p) / 2000).sqrt().sum() / math.sqrt(2 * math.pi)
    assert (seen - p).abs().sum() / 2 < 1.5 * expected_distance


def test_generation_draws_no_dropout_and_leaves_the_mode(policy, tokenizer):
    policy.train()
    generate(policy, tokenizer, prompts_of(tokenizer, "a"), max_new_tokens=2, do_sample=False)
    assert policy.training and policy.model.training
    policy.eval()
