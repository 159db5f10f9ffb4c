"""Generation against a plain loop: where it stops, what it pads with, what it samples from, what that depends on."""

import copy
import dataclasses
import math
import random
import types

import pytest
import torch

from logratio.trainers.config import RolloutConfig
from logratio.trainers.data.examples import Prompt
from logratio.trainers.policy.tiny import tiny_tokenizer
from logratio.trainers.processes.dealing import share
from logratio.trainers.rollout.generation import completion_seed, generate, numbered
from logratio.trainers.rollout.rollouts import Rollouts

from ._prompts import TEXTS, argmax_loop, prompts_of, said


def test_greedy_is_a_plain_argmax_loop_whatever_the_padding(policy, tokenizer):
    prompts = prompts_of(tokenizer, *TEXTS)
    wanted = [argmax_loop(policy.model, p.prompt_ids, {tokenizer.eos_token_id}, 12) for p in prompts]
    assert len({tuple(ids) for ids, _ in wanted}) > 1
    assert said(generate(policy, tokenizer, prompts, max_new_tokens=12)) == wanted
    assert said(generate(policy, tokenizer, [p], max_new_tokens=12)[0] for p in prompts) == wanted


@pytest.mark.parametrize("where", ["tokenizer", "generation_config", "list"])
def test_generation_stops_at_eos_and_keeps_it(policy, where, monkeypatch):
    """The EOS of the tokenizer, and every one that the checkpoint names."""
    tokenizer = tiny_tokenizer()
    prompts = prompts_of(tokenizer, *TEXTS)
    free = generate(policy, tokenizer, prompts, max_new_tokens=12)
    stop = free[0].ids[3]
    eos = {"tokenizer": None, "generation_config": stop, "list": [stop, 1]}[where]
    monkeypatch.setattr(policy.model.generation_config, "eos_token_id", eos)
    if where == "tokenizer":
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(stop)
    stops = {tokenizer.eos_token_id, stop, *(eos if isinstance(eos, list) else [])}
    got = generate(policy, tokenizer, prompts, max_new_tokens=12)
    assert said(got) == [argmax_loop(policy.model, p.prompt_ids, stops, 12) for p in prompts]
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
    free = generate(policy, tiny_tokenizer(), [Prompt([65], "A", {}, 0)], max_new_tokens=12)[0].ids
    tokenizer = closing_with("<|im_start|>")
    stop = tokenizer.convert_tokens_to_ids("<|im_start|>")
    with torch.no_grad():  # the token that it says fourth is another name of the closing one
        head = copy.deepcopy(policy)
        head.model.lm_head.weight = torch.nn.Parameter(policy.model.lm_head.weight.clone())
        head.model.lm_head.weight[[stop, free[3]]] = policy.model.lm_head.weight[[free[3], stop]]
    told = {
        kind: generate(head, tokenizer, [Prompt([65], prompt, {}, 0)], max_new_tokens=12)[0]
        for kind, prompt in {"plain": "A", "chat": messages}.items()
    }
    assert told["chat"].ended and told["chat"].ids[-1] == stop and told["chat"].ids.count(stop) == 1
    assert told["plain"].ids[: len(told["chat"].ids)] == told["chat"].ids and len(told["plain"].ids) == 12


@pytest.mark.parametrize("where", ["beyond the embeddings", "nowhere"])
def test_padding_needs_no_row_in_the_embeddings(policy, tokenizer, where):
    prompts = prompts_of(tokenizer, *TEXTS)
    wanted = said(generate(policy, tokenizer, prompts, max_new_tokens=12))
    other = tiny_tokenizer()
    other.pad_token = None
    if where != "nowhere":
        other.add_special_tokens({"pad_token": "[PAD]"})
        assert other.pad_token_id == policy.model.config.vocab_size
    assert said(generate(policy, other, prompts, max_new_tokens=12)) == wanted


def test_the_checkpoints_own_sampling_defaults_do_not_apply(policy, tokenizer, monkeypatch):
    """A repetition penalty would sample from another distribution than the one that is trained."""
    prompts = prompts_of(tokenizer, *TEXTS)
    wanted = said(generate(policy, tokenizer, prompts, max_new_tokens=12))
    config = policy.model.generation_config
    for name, value in {"repetition_penalty": 9.0, "no_repeat_ngram_size": 1, "min_new_tokens": 12}.items():
        monkeypatch.setattr(config, name, value)
    assert said(generate(policy, tokenizer, prompts, max_new_tokens=12)) == wanted
    assert policy.model.generation_config is config


def test_sampling_follows_the_models_probabilities(policy, tokenizer):
    """First tokens of 2,000 samples at temperature 0.7 against softmax(logits / 0.7): total variation."""
    (prompt,) = prompts_of(tokenizer, "abc")
    sampled = generate(policy, tokenizer, [prompt] * 2000, max_new_tokens=1, seeds=range(2000), temperature=0.7)
    with torch.no_grad():
        p = (policy.model(torch.tensor([prompt.prompt_ids])).logits[0, -1] / 0.7).softmax(-1)
    seen = torch.bincount(torch.tensor([s.ids[0] for s in sampled]), minlength=len(p)) / 2000
    expected_distance = (p * (1 - p) / 2000).sqrt().sum() / math.sqrt(2 * math.pi)
    assert (seen - p).abs().sum() / 2 < 1.5 * expected_distance


def test_generation_draws_no_dropout_and_leaves_the_mode(policy, tokenizer):
    policy.train()
    generate(policy, tokenizer, prompts_of(tokenizer, "a"), max_new_tokens=2)
    assert policy.training and policy.model.training
    policy.eval()


def test_seeds_are_stable_and_all_different():
    assert completion_seed("train", 42, 0, 0, 0) == completion_seed("train", 42, 0, 0, 0) == FIRST_SEED
    names = [(p, s, t, r, n) for p in ("train", "evaluation") for s in (1, 11) for t in (1, 11) for r in (-1, 1, 11)
             for n in (0, 1, 11)]  # fmt: skip
    seeds = {completion_seed(*name) for name in names}
    assert len(seeds) == len(names) and all(0 <= seed < 2**64 for seed in seeds)


# sha256 of "train/42/0/0/0": a run resumed by another version of Python draws the same
FIRST_SEED = int.from_bytes(bytes.fromhex("faf4215c2a01cb81"), "little")


def sample_rows(policy, tokenizer, prompts, purpose="train", step=0, rows=256):
    """What each prompt got, by row and occurrence."""
    config = RolloutConfig(num_generations=3, reward_funcs=("r",))
    rollouts = Rollouts(policy, tokenizer, config, {"r": lambda prompts, **_: [0.0] * len(prompts)}, 12, seed=5)
    rollouts.state.global_step, rollouts.engine.rows = step, rows
    examples = rollouts(prompts, purpose).examples
    return {(p.row, p.occurrence): [c.ids for c in e.completions] for p, e in zip(prompts, examples, strict=True)}


def flips(one, two):
    assert one.keys() == two.keys()
    return sum(a != b for key in one for a, b in zip(one[key], two[key], strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_completion_depends_on_no_other(policy, tokenizer, dtype):
    """Generated alone or beside others, in another order, by one process or by three: the same. In float32 padding
    moves the logits' last bits, so that a token may flip now and then."""
    policy = copy.deepcopy(policy).to(dtype)
    prompts = numbered(prompts_of(tokenizer, *TEXTS, "b" * 40, *map(str, range(11))))
    whole = sample_rows(policy, tokenizer, prompts)
    assert len({tuple(ids) for group in whole.values() for ids in group}) > 40
    shuffled = random.Random(0).sample(prompts, len(prompts))
    others = [sample_rows(policy, tokenizer, shuffled, rows=rows) for rows in (1, 5, 7)]
    parts = {}
    for rank in range(3):
        process = types.SimpleNamespace(num_processes=3, process_index=rank)
        parts |= sample_rows(policy, tokenizer, share(prompts, process))
    others.append(parts)
    allowed = 0 if dtype == torch.float64 else 2
    assert [flips(whole, other) <= allowed for other in others] == [True] * 4


def test_streams_differ_by_purpose_step_row_and_occurrence(policy, tokenizer):
    """Of one prompt: in the next step, in an evaluation, and where it comes twice in a step."""
    (prompt,) = prompts_of(tokenizer, "abc")
    other = dataclasses.replace(prompt, row=1)
    step = numbered([prompt, other, prompt])
    assert [p.occurrence for p in step] == [0, 0, 1]
    drawn = sample_rows(policy, tokenizer, step)
    said = [*drawn[0, 0], *drawn[1, 0], *drawn[0, 1]]
    said += sample_rows(policy, tokenizer, [prompt], step=1)[0, 0]
    said += sample_rows(policy, tokenizer, [prompt], purpose="evaluation")[0, 0]
    assert len({tuple(ids) for ids in said}) == len(said) == 15


def test_rollouts_leave_the_global_random_numbers_alone(policy, tokenizer):
    """They neither read nor move them: these are dropout's."""
    prompts = prompts_of(tokenizer, *TEXTS)
    torch.manual_seed(1)
    one, state = sample_rows(policy, tokenizer, prompts), torch.get_rng_state()
    torch.manual_seed(2)
    assert sample_rows(policy, tokenizer, prompts) == one
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)
