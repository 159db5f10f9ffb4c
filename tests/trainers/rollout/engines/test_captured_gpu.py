"""CUDA graphs against the same steps launched kernel by kernel."""

import copy
from itertools import takewhile

import pytest
import torch

from logratio.trainers.memory import free
from logratio.trainers.policy.policy import Policy
from logratio.trainers.rollout.engines.captured import BROKEN
from logratio.trainers.rollout.engines.generating import generated
from logratio.trainers.rollout.engines.in_process import InProcess
from logratio.trainers.rollout.engines.protocol import Request, Sampling

from ._both import ENDS, REQUESTS, plainly, with_lora

pytestmark = pytest.mark.gpu
LONG = Sampling(max_new_tokens=40, stop_ids=ENDS)


@pytest.fixture(autouse=True)
def exact_float32():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def engine_of(tokenizer):
    """A policy on the GPU, its engine in five rows, and what that tells."""

    def make(model, rows=5):
        policy, told = Policy(model.cuda().eval()), {}
        return policy, InProcess(policy, tokenizer, rows=rows, tell=told.setdefault), told

    return make


def adapters(model, dtype):
    """LoRA of float32 over a model of another dtype."""
    model = with_lora(model.to(dtype))
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = p.data.float()
    return model


def alike(one, other):
    """All but one completion: where a number is as near to a step of the distribution as float32's rounding, another
    token is drawn, and what follows it has nothing to do with it."""
    differ = 0
    for a, b in ((a, b) for mine, his in zip(one, other, strict=True) for a, b in zip(mine, his, strict=True)):
        same = sum(1 for _ in takewhile(lambda ids: ids[0] == ids[1], zip(a.ids, b.ids, strict=False)))
        assert a.logps[:same] == pytest.approx(b.logps[:same], abs=1e-4)
        differ += (a.ids, a.finish_reason) != (b.ids, b.finish_reason)
    assert differ <= 1


def near(policy, samples, requests, bound):
    """The root mean square by which logps differ from a plain forward pass's, within a bound."""
    off = []
    for request, some in zip(requests, samples, strict=True):
        for sample in some:
            ids = torch.tensor([[*request.prompt_ids, *sample.ids]], device="cuda")
            with torch.no_grad():
                logps = policy.causal_lm(input_ids=ids).logits[0, len(request.prompt_ids) - 1 : -1].float()
            own = logps.log_softmax(-1).gather(-1, ids[0, len(request.prompt_ids) :, None])[:, 0]
            off.append(own.cpu() - torch.tensor(sample.logps))
    worst = torch.cat(off).pow(2).mean().sqrt().item()
    assert worst <= bound, worst


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gemma3", "mistral-window"])
def test_float32_says_the_same(random_model, tokenizer, engine_of, family):
    """Twice, the second time by the graphs of the first; rows end at different times, and others enter later."""
    policy, engine, told = engine_of(with_lora(random_model(family)))
    wanted = plainly(policy, tokenizer, LONG)
    for _ in range(2):
        alike(engine.sample(REQUESTS, LONG), wanted)
        assert told == {} and len(engine.captured.graphs) >= 1
    cut = Sampling(max_new_tokens=20, stop_ids=ENDS, top_k=20, temperature=0.8)
    alike(engine.sample(REQUESTS, cut), plainly(policy, tokenizer, cut))


@pytest.mark.parametrize("mixed", [False, True])
def test_bfloat16_says_what_a_forward_pass_says(random_model, engine_of, mixed):
    """Adapters of float32 over bfloat16 weights; and float32 under autocast; all weights change in place."""
    model = random_model("qwen2", num_attention_heads=14, num_key_value_heads=2, head_dim=64, hidden_size=64)
    policy, engine, told = engine_of(with_lora(model) if mixed else adapters(model, torch.bfloat16))
    for _ in range(2):
        with torch.autocast("cuda", torch.bfloat16, enabled=mixed):
            near(policy, engine.sample(REQUESTS, LONG), REQUESTS, 0.03)
        with torch.no_grad():
            for p in policy.parameters():
                p.mul_(1.05)
    assert told == {} and engine.captured is not None and bool(engine.captured.copies.own)


def test_adapters_changed_in_place_are_seen(random_model, tokenizer, engine_of):
    """By the graphs that were captured before, none of which is captured again."""
    policy, engine, told = engine_of(with_lora(random_model("qwen2")))
    free_run = Sampling(max_new_tokens=40)
    first = engine.sample(REQUESTS, free_run)
    kept = dict(engine.captured.graphs)
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if "lora_" in name:
                p.mul_(1.5)
    second = engine.sample(REQUESTS, free_run)
    alike(second, plainly(policy, tokenizer, free_run))
    assert engine.captured.graphs == kept and told == {}
    assert [s.ids for some in first for s in some] != [s.ids for some in second for s in some]


def test_greedy_is_generates(random_model, tokenizer, engine_of):
    policy, engine, _ = engine_of(random_model("llama"))
    greedy = [Request(r.prompt_ids, [None]) for r in REQUESTS]
    theirs = [generated(policy.causal_lm, tokenizer, [(r.prompt_ids, None)], LONG, 0) for r in greedy]
    alike(engine.sample(greedy, LONG), theirs)
    assert engine.captured is not None


def test_nf4_weights_are_captured(tokenizer):
    pytest.importorskip("bitsandbytes")
    from logratio.benchmarks.measure.models import build
    from logratio.trainers.layers.lora_layers import fuse_lora

    model = build("tiny", "qlora", dtype=torch.bfloat16, device=torch.device("cuda"))
    fuse_lora(model)
    policy, told = Policy(model.eval()), {}
    engine = InProcess(policy, tokenizer, rows=5, tell=told.setdefault)
    near(policy, engine.sample(REQUESTS, LONG), REQUESTS, 0.03)
    assert told == {} and engine.captured is not None


def test_memory_comes_back(random_model, engine_of):
    policy, engine, _ = engine_of(random_model("llama"))
    free()
    before = torch.cuda.memory_reserved()
    engine.sample(REQUESTS, LONG)
    assert engine.captured is not None
    free()
    assert engine.captured is None and torch.cuda.memory_reserved() - before < 100 * 2**20


@pytest.mark.parametrize("when", ["always", "captured"])
def test_a_model_that_waits_runs_kernel_by_kernel(random_model, tokenizer, engine_of, when):
    """Found before anything is captured; or, where it waits in a capture alone, without harm to what follows."""
    model = random_model("llama")
    policy, engine, told = engine_of(copy.deepcopy(model))

    def waits(module, given, out):
        if when == "always" or torch.cuda.is_current_stream_capturing():
            float(out.sum())

    policy.causal_lm.model.norm.register_forward_hook(waits)
    broken = len(BROKEN)
    alike(engine.sample(REQUESTS, LONG), plainly(policy, tokenizer, LONG))
    assert "without CUDA graphs" in told["captured"] and engine.captured is None
    assert (len(BROKEN) > broken) == (when == "captured")
    free()
    torch.randn(3, device="cuda")  # the generator is no longer the capture's
    again, engine, told = engine_of(model)
    alike(engine.sample(REQUESTS, LONG), plainly(again, tokenizer, LONG))
    assert told == {} and engine.captured is not None
