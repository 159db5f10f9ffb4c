"""A token as one launch, here by calling the step itself on the same buffers: what it says is what the other way says."""

import pytest

from logratio.trainers.policy.policy import Policy
from logratio.trainers.rollout.engines import captured, in_process
from logratio.trainers.rollout.engines.in_process import InProcess
from logratio.trainers.rollout.engines.protocol import Request, Sampling

PROMPTS = [[5, 9, 11], [7], [3, 3, 8, 12, 40, 41, 42, 43], [20, 21], [30] * 13]
SEEDS = [[1, 2, 3], [None, 4], [5], [6, None, 7, 8], [9, 10]]
REQUESTS = [Request(ids, seeds) for ids, seeds in zip(PROMPTS, SEEDS, strict=True)]
ENDS = frozenset(range(0, 256, 8))


@pytest.fixture
def capturing(monkeypatch):
    """Buffers on a CPU too, small ones, so that rows and places pass through several shapes."""
    monkeypatch.setattr(in_process, "CAPTURING", ("cpu",))
    monkeypatch.setattr(captured, "LEAST_ROWS", 2)
    monkeypatch.setattr(captured, "LEAST_SEEN", 8)


def close(one, other, tolerance=1e-6):
    for mine, his in zip(one, other, strict=True):
        for a, b in zip(mine, his, strict=True):
            assert (a.ids, a.finish_reason) == (b.ids, b.finish_reason)
            assert a.logps == pytest.approx(b.logps, abs=tolerance)


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral-window", "qwen2-window", "gpt2"])
def test_static(random_model, tokenizer, family, monkeypatch):
    policy = Policy(random_model(family).double().eval())
    sampling = Sampling(max_new_tokens=18, stop_ids=ENDS)
    want = InProcess(policy, tokenizer, rows=5).sample(REQUESTS, sampling)
    monkeypatch.setattr(in_process, "CAPTURING", ("cpu",))
    monkeypatch.setattr(captured, "LEAST_ROWS", 2)
    monkeypatch.setattr(captured, "LEAST_SEEN", 8)
    told = {}
    engine = InProcess(policy, tokenizer, rows=5, tell=told.setdefault)
    for _ in range(2):
        close(engine.sample(REQUESTS, sampling), want)
    assert told == {} and engine.captured is not None, told
