"""What is kept between tokens and calls: graphs, imitated where there is no GPU, and what they depend on."""

import contextlib
import copy
import types

import pytest
import torch

from logratio.trainers import memory
from logratio.trainers.policy.policy import Policy
from logratio.trainers.rollout.engines import captured as module
from logratio.trainers.rollout.engines.captured import Captured, Copies, fingerprint
from logratio.trainers.rollout.engines.protocol import Sampling

from ._both import ENDS, REQUESTS, close, engine_of, plainly, with_lora


class Graph:
    """In place of a CUDA graph: calls what it was captured from."""

    def replay(self):
        self.launch()


@pytest.fixture
def imitated(small, monkeypatch):
    """Graphs without a GPU: all that Python does around them; returns what was captured, and how."""
    made = types.SimpleNamespace(graphs=0, strict=0, pools=0)

    def captured(self, graph, step):
        state = [x.clone() for x in (self.tokens, self.cache.lengths)]
        out = step()  # which a GPU would not execute
        self.restore(state)
        room = self.room

        def launch():
            assert room == self.cache.room
            again = step()
            if out is not None:
                out.copy_(again)

        graph.launch = launch
        made.graphs += 1
        return out

    @contextlib.contextmanager
    def refused():
        made.strict += 1
        yield

    def pool():
        made.pools += 1
        return (0, made.pools)

    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(module, "GRAPHS", ("cpu",))
    monkeypatch.setattr(module, "memory_of", lambda device: 10**5)
    monkeypatch.setattr(module, "side_stream", lambda device: stream)
    monkeypatch.setattr(module, "waiting_refused", refused)
    monkeypatch.setattr(Captured, "captured", captured)
    fakes = {
        "CUDAGraph": Graph,
        "current_stream": lambda device: stream,
        "graph_pool_handle": pool,
        "memory_reserved": lambda device: 0,
        "stream": lambda side: contextlib.nullcontext(),
        "synchronize": lambda device: None,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *a, pin_memory=False, **k: zeros(*a, **k))
    return made


def test_graphs_are_kept_between_calls(random_model, tokenizer, imitated, monkeypatch):
    """Warming up leaves rows as they were; once a shape, and again only where what they work on has moved."""
    policy = Policy(random_model("llama").double().eval())
    sampling = Sampling(max_new_tokens=60, stop_ids=frozenset(range(0, 97, 32)))
    cut = Sampling(max_new_tokens=60, stop_ids=sampling.stop_ids, top_k=30)
    wanted, wanted_cut = plainly(policy, tokenizer, sampling), plainly(policy, tokenizer, cut)
    engine, told = engine_of(policy, tokenizer)
    monkeypatch.setattr(module, "KEPT", 1e9)
    close(engine.sample(REQUESTS, sampling), wanted, 1e-9)
    first, pools = imitated.graphs, imitated.pools
    assert told == {} and imitated.strict == 1 and first > 5 and pools > 3  # trial's, ours, and room made anew
    for _ in range(2):
        close(engine.sample(REQUESTS, sampling), wanted, 1e-9)
        close(engine.sample(REQUESTS, cut), wanted_cut, 1e-9)
    all_shapes, pools = imitated.graphs, imitated.pools
    with torch.no_grad():
        for p in policy.parameters():
            p.mul_(1.01)
    close(engine.sample(REQUESTS, sampling), plainly(policy, tokenizer, sampling), 1e-9)
    assert imitated.pools == pools and imitated.graphs - all_shapes <= 3  # shapes that only these lengths have
    monkeypatch.setattr(module, "KEPT", 0.0)
    engine.sample(REQUESTS, sampling)
    assert engine.captured is None


def test_a_shape_that_cannot_be_captured_ends_graphs_and_nothing_else(random_model, tokenizer, imitated, monkeypatch):
    policy = Policy(random_model("llama").double().eval())
    sampling = Sampling(max_new_tokens=30, stop_ids=ENDS)
    wanted, take = plainly(policy, tokenizer, sampling), Captured.captured

    def fails(self, graph, step):
        if len(self.graphs) == 3:
            raise RuntimeError("operation not permitted\nwhen stream is capturing")
        return take(self, graph, step)

    monkeypatch.setattr(Captured, "captured", fails)
    engine, told = engine_of(policy, tokenizer)
    close(engine.sample(REQUESTS, sampling), wanted, 1e-9)
    assert told == {
        "captured": "completions are sampled without CUDA graphs, which is slower: RuntimeError: operation not "
        "permitted"
    }
    assert engine.captured is None and engine.name == "logratio"


def test_weights_that_move_are_not_captured(random_model, tokenizer, small):
    policy = Policy(random_model("llama"))
    policy.causal_lm.lm_head._hf_hook = object()
    engine, told = engine_of(policy, tokenizer)
    engine.sample(REQUESTS, Sampling(max_new_tokens=1))
    assert told["captured"].endswith("which is slower: the weights are moved while the model computes")


def test_what_is_kept_goes_where_memory_ends(random_model, tokenizer, small):
    policy = Policy(random_model("llama"))
    engine, _ = engine_of(policy, tokenizer)
    for let_go in (memory.free, engine.close):
        engine.sample(REQUESTS, Sampling(max_new_tokens=3))
        assert engine.captured is not None
        let_go()
        assert engine.captured is None


def test_adapters_are_cast_once_a_call(random_model, tokenizer, small):
    """Of a bfloat16 model: by copies that are the casts, bit for bit, and follow what an optimizer changes."""
    model = with_lora(random_model("llama").bfloat16())
    policy = Policy(model.eval())
    adapters = {n: p.data.float() for n, p in model.named_parameters() if "lora_" in n}
    for name, p in model.named_parameters():
        p.data = adapters.get(name, p.data)
    ids = torch.tensor([[3, 7, 5], [1, 2, 3]])
    copies = Copies(policy)
    assert len(copies.own) == len(adapters) == 28
    for factor in (1, 2):
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.mul_(factor if "lora_" in name else 1)
            own = model(input_ids=ids).logits
            copies.refresh()
            with copies.in_place():
                assert model.base_model.model.model.layers[0].mlp.up_proj.lora_A.default.weight.dtype == torch.bfloat16
                assert torch.equal(model(input_ids=ids).logits, own)
    assert all(isinstance(p, torch.nn.Parameter) and p.dtype == torch.float32 for p in
               (p for n, p in model.named_parameters() if "lora_" in n))  # fmt: skip
    assert Copies(Policy(with_lora(random_model("llama")))).own == []
    engine, _ = engine_of(policy, tokenizer)
    for _ in range(2):
        engine.sample(REQUESTS, Sampling(max_new_tokens=2))
        assert all(torch.equal(weight.bfloat16(), copied) for _, weight, copied in engine.captured.copies.own)
        with torch.no_grad():
            for p in policy.parameters():
                p.mul_(1.5)


def test_what_a_graph_depends_on_is_in_its_fingerprint(random_model):
    policy = Policy(with_lora(random_model("llama")))
    before = fingerprint(policy)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(1.0)
    assert fingerprint(policy) == before
    with policy.as_reference():
        assert fingerprint(policy) != before
    with torch.autocast("cpu", torch.bfloat16):
        assert fingerprint(policy) != before
    hook = policy.causal_lm.lm_head.register_forward_hook(lambda *_: None)
    assert fingerprint(policy) != before
    hook.remove()
    assert fingerprint(policy) == before
    layer = policy.causal_lm.model.layers[0].mlp.up_proj
    layer.scaling["default"] *= 2
    assert fingerprint(policy) != before
    layer.scaling["default"] /= 2
    moved = copy.deepcopy(layer.lora_A.default.weight.data)
    old, layer.lora_A.default.weight.data = layer.lora_A.default.weight.data, moved
    assert fingerprint(policy) != before
    layer.lora_A.default.weight.data = old
    assert fingerprint(policy) == before
