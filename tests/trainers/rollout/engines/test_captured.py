"""A token as one step on fixed buffers: it says what the other way says, and does nothing that a capture refuses."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from logratio.trainers.policy.policy import Policy
from logratio.trainers.rollout.engines import captured as module
from logratio.trainers.rollout.engines import in_process
from logratio.trainers.rollout.engines.captured import Captured, NotCaptured
from logratio.trainers.rollout.engines.decoding import Decoder
from logratio.trainers.rollout.engines.in_process import why_not
from logratio.trainers.rollout.engines.protocol import Request, Sampling

from ._both import ENDS, REQUESTS, close, engine_of, plainly, with_lora

FAMILIES = ["gemma2", "mistral-window"]
SLOW = ["llama-eager", "qwen2-window", "qwen3", "gemma3", "gpt2", "opt", "phi"]


@pytest.mark.parametrize("family", [*FAMILIES, *(pytest.param(f, marks=pytest.mark.slow) for f in SLOW)])
def test_it_says_what_is_said_kernel_by_kernel(random_model, tokenizer, small, keys, family, monkeypatch):
    """In rows that end at different times, under others that enter later, with rows that are not in use: these stay at
    the first place, or learned positions would end before them."""
    begin = module.SlotCache.begin

    def begun(self, rows, seen):
        place = begin(self, rows, seen)
        assert not place[self.rows :].any() and (place[: self.rows] < seen).all()
        return place

    monkeypatch.setattr(module.SlotCache, "begin", begun)
    policy = Policy(random_model(family).double().eval())
    sampling = Sampling(max_new_tokens=11 if family == "gpt2" else 30, stop_ids=ENDS, temperature=0.9)
    wanted = plainly(policy, tokenizer, sampling)
    engine, told = engine_of(policy, tokenizer)
    close(engine.sample(REQUESTS, sampling), wanted, 1e-6)  # scores of float32 in eager attention
    kept = engine.captured
    close(engine.sample(REQUESTS, sampling), wanted, 1e-6)
    assert told == {} and engine.captured is kept is not None
    assert policy.attention in ("sdpa", "eager") and len({(rows, seen) for rows, seen, _ in keys}) > 3
    assert {rows for rows, *_ in keys} == {2, 4, 5}


@pytest.mark.parametrize("options", [{"top_k": 20, "keep_support": True}, {"repetition_penalty": 1.3}], ids=str)
def test_what_is_cut_is_drawn_outside(random_model, tokenizer, small, keys, options):
    policy = Policy(random_model("llama").double().eval())
    sampling = Sampling(max_new_tokens=9, stop_ids=ENDS, **options)
    close(engine_of(policy, tokenizer)[0].sample(REQUESTS, sampling), plainly(policy, tokenizer, sampling), 1e-9)
    assert not keys[-1][2] and keys[0][2] == (1.0, True)  # the trial's


def test_room_for_all_tokens_is_made_at_once_where_it_is_little(random_model, tokenizer, small, monkeypatch):
    """Else when it is needed, which moves what graphs work on."""
    policy, rooms = Policy(random_model("llama").double().eval()), []
    sampling = Sampling(max_new_tokens=70)
    wanted = plainly(policy, tokenizer, sampling)
    for at_once in (0, 10**9):
        engine, _ = engine_of(policy, tokenizer)
        engine.obstacle = engine.uncaptured = ""
        engine.captured = Captured(policy, 5, torch.device("cpu"))
        engine.captured.cache.at_once = at_once
        step = Decoder.advance
        monkeypatch.setattr(Decoder, "advance", lambda self, step=step: (rooms.append(self.cache.room), step(self))[1])
        close(engine.sample(REQUESTS, sampling), wanted, 1e-9)
        monkeypatch.setattr(Decoder, "advance", step)
        rooms.append(None)
    first = rooms.index(None)
    assert len(set(rooms[:first])) > 1 and set(rooms[first + 1 : -1]) == {96} == {-(-(13 + 70) // 32) * 32}


REFUSED = ("_local_scalar_dense", "nonzero", "masked_select", "lift_fresh", "equal", "unique", "is_nonzero")


class Watched(TorchDispatchMode):
    """Raises where a GPU's host would wait, or copy from memory that is not pinned."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        assert not name.startswith(REFUSED), name
        if name.startswith("index"):
            assert not any(x is not None and x.dtype == torch.bool for x in args[1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", ["llama", *(pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES + SLOW)])
def test_a_step_waits_for_nothing_and_makes_nothing_of_numbers(random_model, tokenizer, small, monkeypatch, family):
    policy = Policy(with_lora(random_model(family)).eval())
    run, seen = Captured.run, []

    def watched(self, key, step):
        def inner():
            with Watched():
                seen.append(key)
                return step()

        return run(self, key, inner)

    monkeypatch.setattr(Captured, "run", watched)
    engine, told = engine_of(policy, tokenizer)
    for options in ({}, {"top_p": 0.9}):
        engine.sample(REQUESTS, Sampling(max_new_tokens=4, temperature=0.7, **options))
    assert told == {} and {bool(drawn) for *_, drawn in seen} == {True, False}


def test_fewer_rows_are_asked_for_than_buffers_have(random_model, tokenizer, small, keys):
    """What was made for more rows serves fewer, of which no more speak at a time than are asked for."""
    policy = Policy(random_model("llama").double().eval())
    engine, _ = engine_of(policy, tokenizer, rows=12)
    sampling = Sampling(max_new_tokens=6)
    engine.sample(REQUESTS, sampling)
    kept, engine.rows = engine.captured, 3
    keys.clear()
    few = [Request(r.prompt_ids, r.seeds[:1]) for r in REQUESTS]
    close(engine.sample(few, sampling), plainly(policy, tokenizer, sampling, few), 1e-9)
    assert engine.captured is kept and kept.cache.slots == 12 and max(rows for rows, *_ in keys) == 4


def test_the_trial_finds_steps_that_are_wrong(random_model, tokenizer, small, monkeypatch):
    policy, begin = Policy(random_model("llama")), module.SlotCache.begin
    assert why_not(policy, tokenizer, capturing=True) == ""

    def wrong(self, rows, seen):
        place = begin(self, rows, seen)
        return place + (self.slots == 3)  # a position too far, of the trial's buffers

    monkeypatch.setattr(in_process, "LEAST_ROWS", 3)
    monkeypatch.setattr(module.SlotCache, "begin", wrong)
    engine, told = engine_of(policy, tokenizer)
    engine.sample(REQUESTS, Sampling(max_new_tokens=2))
    assert "without CUDA graphs, which is slower: in the own loop its log-probabilities change by" in told["captured"]

    def raises(self, key, step):
        raise NotCaptured("RuntimeError: no")

    monkeypatch.setattr(Captured, "run", raises)
    assert why_not(policy, tokenizer, capturing=True) == "in the own loop it raises NotCaptured: RuntimeError: no"


@pytest.mark.parametrize("low", [-torch.inf, torch.finfo(torch.bfloat16).min])
def test_a_word_that_the_model_leaves_out_is_no_part_of_the_spread(random_model, tokenizer, small, monkeypatch, low):
    """In low precision, where an error is measured by that: beside -inf any would be too large, beside -1e38 none."""
    policy = Policy(random_model("llama").bfloat16())

    def leave_out(module, given, logits):
        logits = logits.clone()
        logits[..., 5] = low
        return logits

    policy.causal_lm.get_output_embeddings().register_forward_hook(leave_out)
    assert why_not(policy, tokenizer) == why_not(policy, tokenizer, capturing=True) == ""
    begin = module.SlotCache.begin
    monkeypatch.setattr(module.SlotCache, "begin", lambda *args: begin(*args) + 9)  # all positions are wrong
    assert "its log-probabilities change by" in why_not(policy, tokenizer)
