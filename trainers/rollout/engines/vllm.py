"""vLLM as a server, or several: they sample from the base model with the policy's adapter, which they are given.

A server has to be started for it, with the model that is trained, or the same under another path:

    VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve MODEL --enable-lora --max-lora-rank R --logprobs-mode
    processed_logprobs

Every completion is a request of its own, since the protocol has one seed a request and vLLM gives completion k of
several the seed + k. So a completion depends on its prompt, the policy, the options and its own seed, whoever is asked
beside it, up to the rounding of vLLM's batches; a prompt is computed once for its group by vLLM's prefix cache. All of
a prompt's completions go to one server, which is its turn among them.

Differences from the engine in the process: the same seed gives another completion, since vLLM has a generator of its
own; min_p is applied before top_k and top_p; and a greedy completion's log-probs are those at temperature 1.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ...errors import UserError
from ...policy.policy import Policy
from ...processes.once import raised_together
from .background import Begun
from .protocol import Engine, Request, Said, Sample, Sampling, Say, is_logp
from .pushing import Adapters, version_of
from .server import Refused, Server, Unavailable

ROWS = 256
"""Requests under way at a time at one server, as many as vLLM computes together by itself."""
FORGETS = 3
"""Times in one request that a server may have lost the adapter that it was given."""
CERTAIN = 100
"""A bias that makes a token certain, whatever its logit: the largest that the protocol has."""
FIELDS: dict[str, Callable[[Any], bool]] = {
    "token_ids": lambda given: isinstance(given, list),
    "logprobs": lambda given: isinstance(given, dict) and isinstance(given.get("token_logprobs"), list),
    "finish_reason": lambda given: given is not None,
}
"""Of a completion, and whether one has it."""


class VLLM(Engine):
    """urls: of the servers. timeout: seconds that one may be silent. folder: of this run alone, for adapters, on a disk
    that the servers see under the same path. behind: versions by which what is still sampled may lag behind the last
    one."""

    def __init__(
        self,
        policy: Policy,
        urls: Sequence[str],
        *,
        timeout: float,
        folder: Path,
        accelerator: Accelerator | None = None,
        behind: int = 1,
    ) -> None:
        self.accelerator = accelerator or Accelerator()
        self.servers = [Server(url, timeout) for url in urls]
        self.adapters = Adapters(policy, self.servers, folder, self.accelerator, behind=behind)
        self.vocabulary = int(policy.causal_lm.get_output_embeddings().weight.shape[0])
        self.rows, self.version = ROWS, -1
        self.processed: set[Server] = set()  # those that were seen to give the log-probs of what they sample from
        self.begun: list[Begun[Any]] = []

    @property
    def name(self) -> str:
        return "vllm"

    def sync(self, version: int) -> None:
        """Does nothing where the policy of this version is there already."""
        if version != self.version:
            self.adapters.push(version)
            self.version = version

    def close(self) -> None:
        for begun in self.begun:
            begun.stop()  # all at once
        for begun in self.begun:
            begun.close()
        self.begun.clear()
        self.adapters.close()
        self.version = -1

    @contextlib.contextmanager
    def rounds(self) -> Iterator[Say]:
        """What one process raises inside, all raise at the end."""
        name, stop = self.adapters.name, threading.Event()
        with raised_together(self.accelerator):
            yield lambda requests, sampling: self._sample(requests, sampling, name, stop)

    def begin(self, requests: Sequence[Request], sampling: Sampling) -> Begun[Said]:
        """The same with the policy of now in the background; what is raised is this process's alone."""
        name = self.adapters.name
        self.begun = [begun for begun in self.begun if not begun.done()]
        self.begun.append(Begun(lambda stop: self._sample(requests, sampling, name, stop)))
        return self.begun[-1]

    def _sample(self, requests: Sequence[Request], sampling: Sampling, name: str, stop: threading.Event) -> Said:
        """name: of the adapter. stop: set where the answer is not wanted any more."""
        if sampling.reshapes and requests:
            for server in self.servers:
                self._check_processed(server, requests[0].prompt_ids, name, stop)
        options = {"model": name, **options_of(sampling)}
        first = self.accelerator.process_index  # where there are more servers than prompts, all have some
        futures: list[list[Future[Sample]]] = []
        count = sum(len(request.seeds) for request in requests)
        with ThreadPoolExecutor(max(1, min(count, self.rows * len(self.servers)))) as pool:
            try:
                for i, request in enumerate(requests):
                    server = self.servers[(first + i) % len(self.servers)]
                    of_prompt = {"prompt": list(request.prompt_ids), **options, "max_tokens": request.limit(sampling)}
                    futures.append([pool.submit(self._say, server, of_prompt, s, stop) for s in request.seeds])
                done, _ = wait([f for some in futures for f in some], return_when=FIRST_EXCEPTION)
                failed = next((f for f in done if f.exception() is not None), None)
                if failed is not None:
                    failed.result()
            except BaseException:
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return [[f.result() for f in some] for some in futures]

    def _say(self, server: Server, options: dict[str, Any], seed: int | None, stop: threading.Event) -> Sample:
        """One completion, whatever becomes of the server in the meantime, if it comes back in time."""
        if seed is None:
            options = {**options, "temperature": 0.0}
        else:
            options = {**options, "seed": seed - 2**64 if seed >= 2**63 else seed}  # the protocol's have a sign
        name = options["model"]
        body = {"n": 1, "logprobs": 0, "return_token_ids": True, **options}

        def read(answer: Any) -> Sample:
            return self._sample_of(server, answer, name, body["max_tokens"])

        for _ in range(FORGETS):
            began = time.monotonic()
            try:
                return server.ask("/v1/completions", body, read=read, stop=stop)
            except Refused as refused:
                if refused.status != 404 or name not in refused.reason:
                    raise UserError(
                        f"the vLLM server {server.url} refuses a prompt of {len(body['prompt'])} tokens with up to "
                        f"{body['max_tokens']} more ({refused}): if it says that this is too long, start it with a "
                        "larger --max-model-len"
                    ) from refused
            self.adapters.give_again(server, name, began, stop)
        raise UserError(
            f"the vLLM server {server.url} forgets the adapter that it is given ({name}): start it with "
            f"--max-loras {self.adapters.kept}, and let no other run use it"
        )

    def _sample_of(self, server: Server, answer: Any, name: str, limit: int) -> Sample:
        choice = choice_of(server, answer)
        if (said_by := answer.get("model", name)) != name:
            raise UserError(
                f"the vLLM server {server.url} answers as {said_by!r} where the adapter {name} was asked: what another "
                "policy says is refused; look at its log, and at what stands between it and the run"
            )
        if choice["finish_reason"] not in ("stop", "length"):
            raise Unavailable(f"it ended a completion by {choice['finish_reason']!r}")
        ids, logps = choice["token_ids"], choice["logprobs"]["token_logprobs"]
        if len(ids) != len(logps) or not ids or not all(map(is_logp, logps)):
            raise UserError(
                f"the vLLM server {server.url} gave {len(logps)} log-probabilities, not all of them numbers up to 0, "
                f"for {len(ids)} tokens: look at its log, and take float32 or bfloat16"
            )
        if len(ids) > limit:
            raise UserError(
                f"the vLLM server {server.url} gave {len(ids)} tokens where {limit} were asked for at most: look at "
                "its log, and at what stands between it and the run"
            )
        if foreign := [i for i in ids if type(i) is not int or not 0 <= i < self.vocabulary]:
            raise UserError(
                f"the vLLM server {server.url} gave the token {foreign[0]!r}, and the model that is trained has those "
                f"from 0 to {self.vocabulary - 1}: start it with that model"
            )
        return Sample(ids, choice["finish_reason"], logps, version_of(name))

    def _check_processed(self, server: Server, prompt_ids: Sequence[int], name: str, stop: threading.Event) -> None:
        """Raise UserError where the server's log-probs are of the raw logits: a token out of the vocabulary's middle
        that a bias makes certain has 0 then only in the distribution that it is drawn from."""
        if server in self.processed:
            return
        options = {"model": name, "prompt": list(prompt_ids), **options_of(Sampling(max_new_tokens=1))}
        options["logit_bias"] = {str(self.vocabulary // 2): CERTAIN}
        if self._say(server, options, 0, stop).logps[0] < -0.05:
            raise UserError(
                f"the vLLM server {server.url} gives log-probabilities before temperature, penalties and cuts: start "
                "it with --logprobs-mode processed_logprobs"
            )
        self.processed.add(server)


def options_of(sampling: Sampling) -> dict[str, Any]:
    """As the protocol has them. All are said, since a server takes what is not from the model's generation_config; so
    it does with ends, unless it is told to ignore them and given ours."""
    return {
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "ignore_eos": True,
        "stop_token_ids": sorted(sampling.stop_ids),
        "stop": list(sampling.stop_strings),
        "skip_special_tokens": False,  # else a stop string could not hold one
    }


def choice_of(server: Server, answer: Any) -> dict[str, Any]:
    """The only completion of an answer. UserError where it lacks what an older server does not know."""
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or len(choices) != 1:
        raise UserError(
            f"what answers at {server.url} is no vLLM server (an answer without choices): correct "
            "--vllm_server_base_url"
        )
    choice: dict[str, Any] = choices[0] if isinstance(choices[0], dict) else {}
    if missing := [name for name, has in FIELDS.items() if not has(choice.get(name))]:
        raise UserError(
            f"the vLLM server {server.url} answers without {' and '.join(missing)}: it is too old, take vLLM 0.10.2 or "
            "newer"
        )
    return choice
