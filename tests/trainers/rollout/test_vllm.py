"""Completions from vLLM's servers: a small one of the same protocol, and with `make test-vllm` the real one too."""

import copy
import os
import threading
import types
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from logratio.trainers.rollout.engines.in_process import InProcess
from logratio.trainers.rollout.engines.protocol import Request, Sampling
from logratio.trainers.rollout.engines.server import Cancelled
from logratio.trainers.rollout.engines.vllm import VLLM

from ._server import RealServer, SmallServer, logps_of, small_model, with_adapter

PROMPTS = ([5, 9, 11], [7], [3, 3, 8, 12, 40, 41, 42, 43], [20, 21])
SEEDS = [[1, 2, 2**64 - 5], [None, 4], [5], [6, None, 7]]
REQUESTS = [Request(ids, seeds) for ids, seeds in zip(PROMPTS, SEEDS, strict=True)]
SAMPLING = Sampling(max_new_tokens=7)
SHAPED = Sampling(max_new_tokens=7, temperature=0.7, top_p=0.9, top_k=20, repetition_penalty=1.3)
MIN_P = Sampling(max_new_tokens=7, temperature=1.4, min_p=0.1)  # alone: with the others it is another cut in vLLM


def another(policy):
    """The policy with another adapter, in place."""
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if "lora_B" in name:
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))) * p.std())


@pytest.fixture
def small(tokenizer):
    server = SmallServer(small_model(), tokenizer)
    yield server
    server.close()


@pytest.fixture(scope="session")
def real(tmp_path_factory):
    log = tmp_path_factory.mktemp("vllm") / "log"
    server = RealServer(os.environ["LOGRATIO_VLLM"], os.environ["LOGRATIO_VLLM_MODEL"], log)
    yield server
    server.close()


@pytest.fixture(params=["small", pytest.param("real", marks=pytest.mark.vllm)])
def served(request, tokenizer):
    """server, policy, tokenizer, and the tolerance of log-probs."""
    server = request.getfixturevalue(request.param)
    torch.manual_seed(0)
    if request.param == "small":
        return types.SimpleNamespace(server=server, policy=with_adapter(small_model()), tokenizer=tokenizer, tol=1e-5)
    policy = with_adapter(AutoModelForCausalLM.from_pretrained(server.folder, dtype=torch.float32))
    with torch.no_grad():  # as large as a trained one's
        for name, p in policy.named_parameters():
            if "lora_B" in name:
                p.mul_(0.02)
    own = AutoTokenizer.from_pretrained(server.folder)
    return types.SimpleNamespace(server=server, policy=policy, tokenizer=own, tol=1e-4)


@pytest.fixture
def engine_of(tmp_path):
    """engine_of(policy, *urls, timeout=...), closed at the end."""
    made = []

    def make(policy, *urls, timeout=60.0, behind=1):
        made.append(VLLM(policy, urls, timeout=timeout, folder=tmp_path / "adapters", behind=behind))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


def sampled(said):
    """[(prompt, sample)] of the completions that are not greedy."""
    pairs = zip(REQUESTS, said, strict=True)
    return [(r.prompt_ids, s) for r, some in pairs for seed, s in zip(r.seeds, some, strict=True) if seed is not None]


@pytest.mark.parametrize("sampling", [SAMPLING, SHAPED, MIN_P], ids=["plain", "shaped", "min_p"])
def test_log_probs_are_the_policys_with_its_newest_adapter(served, engine_of, sampling):
    engine = engine_of(served.policy, served.server.url)
    before = None
    for version in (3, 4):
        engine.sync(version)
        said = engine.sample(REQUESTS, sampling)
        assert [len(some) for some in said] == [3, 2, 1, 3]
        for prompt, sample in sampled(said):
            assert sample.version == version and len(sample.ids) == 7 and not sample.ended
            assert sample.logps == pytest.approx(logps_of(served.policy, prompt, sample.ids, sampling), abs=served.tol)
        assert said != before
        before = said
        another(served.policy)


def test_what_a_completion_depends_on(served, engine_of):
    """Its seed, not who is asked beside it; a greedy one is that of the engine in the process."""
    engine = engine_of(served.policy, served.server.url)
    engine.sync(1)
    said = engine.sample(REQUESTS, SAMPLING)
    alone = [engine.sample([Request(r.prompt_ids, [seed])], SAMPLING) for r in REQUESTS for seed in r.seeds]
    assert [s.ids for ((s,),) in alone] == [s.ids for some in said for s in some]
    assert len({tuple(s.ids) for s in said[0]}) == 3
    here = InProcess(served.policy, served.tokenizer).sample(REQUESTS, SAMPLING)
    assert [said[1][0].ids, said[3][1].ids] == [here[1][0].ids, here[3][1].ids]


def test_ends(served, engine_of):
    """By any of several tokens, or by a string, with the token that completes it."""
    engine = engine_of(served.policy, served.server.url)
    engine.sync(1)
    free = engine.sample(REQUESTS[:1], SAMPLING)[0][0].ids
    at = next(i for i in range(2, 7) if free[i] not in free[:i])
    for stop in ({free[at], 0 if free[at] else 1}, {free[at]}):
        stopped = engine.sample(REQUESTS[:1], Sampling(max_new_tokens=7, stop_ids=frozenset(stop)))[0][0]
        assert stopped.ids == free[: at + 1] and stopped.finish_reason == "stop" and len(stopped.logps) == at + 1
    string = served.tokenizer.decode(free)[4:6]
    stopped = engine.sample(REQUESTS[:1], Sampling(max_new_tokens=7, stop_strings=(string, "never")))[0][0]
    n = len(stopped.ids)
    assert stopped.ended and stopped.ids == free[:n] and string in served.tokenizer.decode(free[:n])
    assert string not in served.tokenizer.decode(free[: n - 1])


def test_two_versions_are_loaded_and_one_more_has_its_files(served, engine_of, tmp_path):
    engine = engine_of(served.policy, served.server.url)
    names, files = [], []
    for version in (0, 1, 1, 2, 3):
        engine.sync(version)
        names.append([name.rpartition("-")[2] for name in served.server.models()])
        files.append(sorted(path.name.rpartition("-")[2] for path in Path(tmp_path, "adapters").iterdir()))
    assert names == [["0"], ["0", "1"], ["0", "1"], ["1", "2"], ["2", "3"]]
    assert files == [["0"], ["0", "1"], ["0", "1"], ["0", "1", "2"], ["1", "2", "3"]]
    engine.close()
    assert served.server.models() == [] and not Path(tmp_path, "adapters").exists()


def test_a_server_that_dies_in_the_middle_and_comes_back_loses_nothing(served, engine_of):
    """It has no adapter then, and is given the last one again."""
    engine = engine_of(served.policy, served.server.url, timeout=900.0)
    engine.sync(1)
    sampling = Sampling(max_new_tokens=7 if isinstance(served.server, SmallServer) else 100)
    wanted = engine.sample(REQUESTS, sampling)

    def die():
        served.server.kill()
        served.server.start()

    if isinstance(served.server, SmallServer):
        seen = []
        served.server.before = lambda path, body: seen.append(path) or (die() if len(seen) == 4 else None)
    else:
        threading.Timer(0.3, die).start()
    again = engine.sample(REQUESTS, sampling)
    assert [[s.ids for s in some] for some in again] == [[s.ids for s in some] for some in wanted]
    assert served.server.models() == [engine.adapters.name]


# What follows asks for a server that can be told how to behave.


def test_completions_are_those_of_the_engine_in_the_process(small, engine_of, tokenizer):
    """But for float32's rounding in other company, up to 1.4e-5 seen; two servers say what one says, all are told."""
    policy, other = with_adapter(small_model()), SmallServer(small_model(), tokenizer)
    here = InProcess(policy, tokenizer).sample(REQUESTS, SHAPED)
    for servers in ([small], [small, other]):
        engine = engine_of(policy, *(server.url for server in servers))
        engine.sync(2)
        for mine, theirs, seeds in zip(engine.sample(REQUESTS, SHAPED), here, SEEDS, strict=True):
            assert [s.ids for s in mine] == [s.ids for s in theirs]
            for a, b, seed in zip(mine, theirs, seeds, strict=True):
                assert seed is None or a.logps == pytest.approx(b.logps, abs=5e-5)
        assert all(server.models() == [engine.adapters.name] for server in servers)
        prompts = [[b["prompt"] for p, b in s.asked if p == "/v1/completions" and b["max_tokens"] > 1] for s in servers]
        assert all(prompts), "each has its share"
        engine.close()
        small.asked.clear()
    assert {tuple(p) for p in prompts[0]}.isdisjoint({tuple(p) for p in prompts[1]}), "a prompt has one server"
    other.close()


def test_in_the_background_the_policy_of_then_says_it_while_newer_ones_come(small, engine_of):
    """As many as may be behind stay loaded, and are given again by name."""
    policy = with_adapter(small_model())
    engine = engine_of(policy, small.url, behind=2)
    engine.sync(1)
    wanted = engine.sample(REQUESTS, SAMPLING)
    held, asked = threading.Event(), threading.Event()

    def hold(path, body):
        if body.get("model", "").endswith("-1"):
            asked.set()
            assert held.wait(30)

    small.before = hold
    begun = engine.begin(REQUESTS, SAMPLING)
    assert asked.wait(30)
    for version in (2, 3):
        another(policy)
        engine.sync(version)
        ((newer,),) = engine.sample(REQUESTS[2:3], SAMPLING)
        assert newer.version == version
    assert [name.rpartition("-")[2] for name in small.models()] == ["1", "2", "3"]
    small.kill()
    small.start()
    held.set()
    assert begun.result() == wanted and {s.version for some in wanted for s in some} == {1}
    assert [name.rpartition("-")[2] for name in small.models()] == ["1"], "given again, as it was asked for"
    engine.sync(4)
    assert [name.rpartition("-")[2] for name in small.models()] == ["4"], "three behind, it is not any more"


def test_what_is_begun_ends_with_the_engine(small, engine_of):
    engine = engine_of(with_adapter(small_model()), small.url)
    engine.sync(1)
    never = threading.Event()
    small.before = lambda path, body: never.wait(30) and None if path == "/v1/completions" else None
    begun = engine.begin(REQUESTS, SAMPLING)
    engine.close()
    assert begun.done()
    with pytest.raises(Cancelled):
        begun.result()
    never.set()


def test_it_is_asked_again_while_it_is_not_well(small, engine_of):
    """Errors of its own, answers that are none, completions that it gives up."""
    engine = engine_of(with_adapter(small_model()), small.url)
    engine.sync(1)
    wanted = engine.sample(REQUESTS, SAMPLING)
    aborted = {"choices": [{"token_ids": [1], "logprobs": {"token_logprobs": [0.0]}, "finish_reason": "abort"}]}
    bad = [(500, {"error": {"message": "engine is busy"}}), (503, None), (200, aborted), (429, None)]
    small.before = lambda path, body: bad.pop() if bad else None
    assert engine.sample(REQUESTS, SAMPLING) == wanted and not bad
    engine.sync(2)
    assert small.models()[-1].endswith("-2")


def test_an_adapter_is_written_whole_or_not_at_all(small, engine_of, monkeypatch, tmp_path):
    from logratio.trainers.errors import UserError
    from logratio.trainers.rollout.engines import pushing

    engine = engine_of(with_adapter(small_model()), small.url)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(pushing, "save_file", full)
        with pytest.raises(UserError, match="could not be written for the vLLM servers to .*: No space left on device"):
            engine.sync(1)
    assert list(Path(tmp_path, "adapters").iterdir()) == [] and not small.asked
    engine.sync(1)
    assert len(small.models()) == 1


def test_the_policy_is_left_as_it_was(small, engine_of):
    policy = with_adapter(small_model())
    before = copy.deepcopy(policy.state_dict())
    engine = engine_of(policy, small.url)
    state = torch.get_rng_state()
    engine.sync(1)
    engine.sample(REQUESTS, SAMPLING)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], p) for name, p in policy.state_dict().items())
