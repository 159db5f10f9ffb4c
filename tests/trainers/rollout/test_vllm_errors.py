"""What is said where a server is absent, slow, old, or was started otherwise than is needed; and of adapters that vLLM
does not take."""

import threading
import time

import pytest
from peft import LoHaConfig, LoraConfig, get_peft_model

from logratio.trainers.config import RolloutConfig
from logratio.trainers.errors import UserError
from logratio.trainers.policy.policy import Policy
from logratio.trainers.rollout.engines import server as server_module
from logratio.trainers.rollout.engines.protocol import Request, Sampling
from logratio.trainers.rollout.engines.pushing import check_adapter
from logratio.trainers.rollout.engines.vllm import VLLM

from ._server import SmallServer, small_model, with_adapter

REQUESTS = [Request([5, 9, 11], [1, 2]), Request([7], [3])]
SAMPLING = Sampling(max_new_tokens=4)


@pytest.fixture
def small(tokenizer):
    server = SmallServer(small_model(), tokenizer)
    yield server
    server.close()


@pytest.fixture
def engine(small, tmp_path, monkeypatch):
    monkeypatch.setattr(server_module, "FIRST_PAUSE_S", 0.01)
    made = VLLM(with_adapter(small_model()), [small.url], timeout=60.0, folder=tmp_path / "out" / ".adapters")
    yield made
    made.close()


def said(engine, small, sampling=SAMPLING, version=1):
    """What the engine says, with the address and the adapter's name left out."""
    with pytest.raises(UserError) as error:
        engine.sync(version)
        engine.sample(REQUESTS, sampling)
    name = engine.adapters.loaded[-1] if engine.adapters.loaded else "?"
    folder = str(engine.adapters.folder)
    return str(error.value).replace(small.url, "URL").replace(name, "NAME").replace(folder, "FOLDER")


def impatient(engine, seconds=0.6):
    engine.servers[0].timeout = seconds


def gone(small, engine):
    small.close()
    impatient(engine)


def silent(small, engine):
    small.before = lambda path, body: time.sleep(1.5) if path == "/v1/completions" else None
    impatient(engine)


def failing(small, engine):
    small.before = lambda path, body: (500, {"error": {"message": "EngineCore died."}}) if "compl" in path else None
    impatient(engine)


def without_runtime(small, engine):
    small.runtime_lora = False


def small_rank(small, engine):
    small.max_rank = 1


def elsewhere(small, engine):
    small.load, load = (lambda name, path: load(name, path + "-on-another-disk")), small.load


def old(small, engine):
    small.without = {"token_ids"}


def older(small, engine):
    small.without = {"token_ids", "logprobs"}


def another_program(small, engine):
    small.before = lambda path, body: (200, {"hello": "world"})


def keyed(small, engine):
    small.before = lambda path, body: (401, {"error": "Unauthorized"})


def forgetful(small, engine):
    small.before = lambda path, body: small.adapters.clear() if path == "/v1/completions" else None


def not_numbers(small, engine):
    choice = {"token_ids": [1, 2], "logprobs": {"token_logprobs": [float("nan"), -1.0]}, "finish_reason": "length"}
    small.before = lambda path, body: (200, {"choices": [choice]}) if path == "/v1/completions" else None


def another_adapter(small, engine):
    choice = {"token_ids": [1, 2], "logprobs": {"token_logprobs": [-1.0, -1.0]}, "finish_reason": "length"}
    answer = {"model": "an-older-one", "choices": [choice]}
    small.before = lambda path, body: (200, answer) if path == "/v1/completions" else None


def aborting(small, engine):
    choice = {"token_ids": [1], "logprobs": {"token_logprobs": [-1.0]}, "finish_reason": "abort"}
    small.before = lambda path, body: (200, {"choices": [choice]}) if path == "/v1/completions" else None
    impatient(engine)


def dribbling(small, engine):
    """An answer of which a byte comes now and then, and never the last."""
    small.dribbles = lambda path: path == "/v1/completions"
    impatient(engine)


SENTENCES = [
    (
        gone,
        "the vLLM server URL has not answered for 0.6 s (Connection refused): start it, correct "
        "--vllm_server_base_url, or wait longer with --vllm_server_timeout",
    ),
    (
        silent,
        "the vLLM server URL has not answered for 0.6 s (it took the request, but no whole answer came back): start "
        "it, correct --vllm_server_base_url, or wait longer with --vllm_server_timeout",
    ),
    (
        failing,
        "the vLLM server URL has not answered for 0.6 s (500: EngineCore died): start it, correct "
        "--vllm_server_base_url, or wait longer with --vllm_server_timeout",
    ),
    (
        without_runtime,
        "the vLLM server URL was started without adapters at run time: start it with the variable "
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and the options --enable-lora --max-lora-rank 2",
    ),
    (
        small_rank,
        "the vLLM server URL does not take the adapter (500: Call to add_lora method failed: LoRA rank 2 is greater "
        "than max_lora_rank 1): it needs the options --enable-lora --max-lora-rank 2, and the base model that is "
        "trained",
    ),
    (
        elsewhere,
        "the vLLM server URL does not find the adapter in FOLDER/NAME (404: Loading lora NAME failed: No adapter found "
        "for FOLDER/NAME-on-another-disk): --output_dir must be on a disk that the server sees under the same path",
    ),
    (old, "the vLLM server URL answers without token_ids: it is too old, take vLLM 0.10.2 or newer"),
    (older, "the vLLM server URL answers without token_ids and logprobs: it is too old, take vLLM 0.10.2 or newer"),
    (
        another_program,
        "what answers at URL is no vLLM server (an answer without choices): correct --vllm_server_base_url",
    ),
    (
        keyed,
        "the vLLM server URL wants a key (401: Unauthorized): set the variable VLLM_API_KEY to the one that it was "
        "started with",
    ),
    (
        forgetful,
        "the vLLM server URL forgets the adapter that it is given (NAME): start it with --max-loras 2, and let no "
        "other run use it",
    ),
    (
        another_adapter,
        "the vLLM server URL answers as 'an-older-one' where the adapter NAME was asked: what another policy says is "
        "refused; look at its log, and at what stands between it and the run",
    ),
    (
        not_numbers,
        "the vLLM server URL gave 2 log-probabilities, not all of them numbers up to 0, for 2 tokens: look at its log, "
        "and take float32 or bfloat16",
    ),
    (
        aborting,
        "the vLLM server URL has not answered for 0.6 s (it ended a completion by 'abort'): start it, correct "
        "--vllm_server_base_url, or wait longer with --vllm_server_timeout",
    ),
    (
        dribbling,
        "the vLLM server URL has not answered for 0.6 s (it took the request, but no whole answer came back): start "
        "it, correct --vllm_server_base_url, or wait longer with --vllm_server_timeout",
    ),
]


@pytest.mark.parametrize(("flaw", "sentence"), SENTENCES, ids=lambda v: getattr(v, "__name__", ""))
def test_one_sentence_says_what_is_wrong_and_what_to_do(small, engine, flaw, sentence):
    flaw(small, engine)
    assert said(engine, small) == sentence


@pytest.mark.parametrize(
    ("ids", "logprobs", "sentence"),
    [
        ([1, None], [-1.0, -2.0], "gave the token None, and the model that is trained has those from 0 to 258"),
        ([1, 259], [-1.0, -2.0], "gave the token 259, and the model that is trained has those from 0 to 258"),
        ([-1], [-1.0], "gave the token -1, and the model that is trained has those from 0 to 258"),
        ([True], [-1.0], "gave the token True, and the model that is trained has those from 0 to 258"),
        ([1] * 5, [-1.0] * 5, "gave 5 tokens where 4 were asked for at most: look at its log"),
        ([1], [0.5], "gave 1 log-probabilities, not all of them numbers up to 0, for 1 tokens"),
        ([1], [None], "gave 1 log-probabilities, not all of them numbers up to 0, for 1 tokens"),
        ([1], ["-1"], "gave 1 log-probabilities, not all of them numbers up to 0, for 1 tokens"),
        ([1], None, "answers without logprobs"),
        ("1", [-1.0], "answers without token_ids"),
    ],
)
def test_what_no_model_of_this_vocabulary_says_is_refused(small, engine, ids, logprobs, sentence):
    choice = {"token_ids": ids, "logprobs": {"token_logprobs": logprobs}, "finish_reason": "length"}
    small.before = lambda path, body: (200, {"choices": [choice]}) if path == "/v1/completions" else None
    assert sentence in said(engine, small)


def test_what_is_no_completion_is_refused(small, engine):
    small.before = lambda path, body: (200, {"choices": ["hello"]}) if path == "/v1/completions" else None
    assert "answers without token_ids and logprobs and finish_reason" in said(engine, small)


def test_an_answer_that_is_not_wanted_any_more_is_let_go_in_its_middle(small, engine):
    engine.sync(1)
    small.dribbles = lambda path: path == "/v1/completions"
    begun = engine.begin(REQUESTS, SAMPLING)
    time.sleep(0.3)
    started = time.monotonic()
    begun.close()
    assert begun.done() and time.monotonic() - started < 3


def test_prompts_that_are_too_long_for_the_server(small, engine):
    assert said(engine, small, Sampling(max_new_tokens=2046)) == (
        "the vLLM server URL refuses a prompt of 3 tokens with up to 2046 more (400: This model's maximum context "
        "length is 2048 tokens): if it says that this is too long, start it with a larger --max-model-len"
    )


def test_raw_log_probs_are_found_where_they_matter(small, engine):
    small.raw_logprobs = True
    engine.sync(1)
    engine.sample(REQUESTS, SAMPLING)  # there they are the same thing
    assert said(engine, small, Sampling(max_new_tokens=4, temperature=0.5)) == (
        "the vLLM server URL gives log-probabilities before temperature, penalties and cuts: start it with "
        "--logprobs-mode processed_logprobs"
    )


def test_a_server_that_answers_now_and_then_is_waited_for(small, engine):
    """Each answer comes in time, though the last one comes later than the limit."""
    turns = threading.Lock()

    def slow(path, body):
        with turns:
            time.sleep(0.4)

    small.before = slow
    engine.sync(1)
    impatient(engine, 0.9)
    began = time.monotonic()
    assert [len(some) for some in engine.sample(REQUESTS, SAMPLING)] == [2, 1]
    assert time.monotonic() - began > 1.1


def test_a_failed_sync_can_be_tried_again_and_leaves_nothing(small, engine):
    small.max_rank = 1
    said(engine, small)
    small.max_rank = 16
    engine.sync(1)
    assert small.models() == [engine.adapters.name]
    engine.close()
    assert small.models() == [] and not engine.adapters.folder.exists()


def test_an_address_may_end_as_other_clients_want_it(small, tmp_path):
    engine = VLLM(with_adapter(small_model()), [small.url + "/v1/"], timeout=60.0, folder=tmp_path / "adapters")
    engine.sync(1)
    assert [path for path, _ in small.asked] == ["/v1/load_lora_adapter"]
    engine.close()


def test_a_key_is_sent(small, engine, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    engine.sync(1)
    assert small.keys == {"Bearer secret"}


ADAPTERS = [
    ({"use_dora": True}, "is DoRA (use_dora)"),
    ({"modules_to_save": ["embed_tokens"]}, "trains whole modules too (modules_to_save)"),
    ({"bias": "all"}, "trains biases (bias)"),
    ({"rank_pattern": {"q_proj": 4}}, "has ranks of its own for some modules (rank_pattern)"),
    ({"alpha_pattern": {"q_proj": 4}}, "has scales of its own for some modules (alpha_pattern)"),
    ({"init_lora_weights": "pissa"}, "changed the base model's weights when it began (init_lora_weights)"),
]


@pytest.mark.parametrize(("options", "what"), ADAPTERS, ids=[next(iter(o)) for o, _ in ADAPTERS])
def test_adapters_that_vllm_does_not_take_are_refused_before_anything_is_sampled(options, what):
    model = get_peft_model(small_model(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **options))
    with pytest.raises(UserError) as error:
        check_adapter(Policy(model))
    assert str(error.value) == (
        f"--rollout_engine vllm: the adapter {what}, which vLLM does not take: train a plain LoRA adapter "
        "(--lora_r 16), or leave the engine out"
    )


def test_so_are_other_kinds_and_whole_models():
    loha = get_peft_model(small_model(), LoHaConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(UserError, match="the adapter is of type LOHA, which vLLM does not take"):
        check_adapter(Policy(loha))
    with pytest.raises(UserError, match="gives the servers adapters, and here the whole model is trained"):
        check_adapter(Policy(small_model()))


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://a", "http://", "http://a:port", "http://a?b=c"])
def test_what_is_no_address(url, tmp_path):
    with pytest.raises(UserError) as error:
        VLLM(with_adapter(small_model()), [url], timeout=1.0, folder=tmp_path)
    assert str(error.value) == (
        f"--vllm_server_base_url {url} is no address: it is http:// or https://, a host and a port, as "
        "http://localhost:8000"
    )


def test_options_that_do_not_fit():
    with pytest.raises(UserError, match="^--rollout_engine vllm needs --vllm_server_base_url, as http://localhost"):
        RolloutConfig(rollout_engine="vllm", vllm_server_base_url=" , ")
    with pytest.raises(UserError, match="^--vllm_server_base_url http://a is read only with --rollout_engine vllm"):
        RolloutConfig(vllm_server_base_url="http://a")
    with pytest.raises(UserError, match="--vllm_server_timeout must be positive, got 0"):
        RolloutConfig(rollout_engine="vllm", vllm_server_base_url="http://a", vllm_server_timeout=0)
    with pytest.raises(
        UserError, match="^--keep_sampling_mask needs to know which tokens .* vLLM does not say: leave it"
    ):
        RolloutConfig(rollout_engine="vllm", vllm_server_base_url="http://a", keep_sampling_mask=True, top_k=5)
    several = RolloutConfig(rollout_engine="vllm", vllm_server_base_url="http://a/, http://b:1,http://a")
    assert several.servers == ["http://a", "http://b:1"]
