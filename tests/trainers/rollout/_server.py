"""A small server of vLLM's protocol over a real socket, made of our own engine; and the real one, started and killed.

Both are a `base` model, adapters by name, and `url`; `kill` drops every connection and forgets the adapters, `start`
begins anew under the same address.
"""

import contextlib
import copy
import json
import os
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from logratio.trainers.layers.lora_layers import fuse_lora
from logratio.trainers.policy.policy import Policy
from logratio.trainers.policy.tiny import tiny_model
from logratio.trainers.rollout.engines.drawing import Drawing
from logratio.trainers.rollout.engines.in_process import InProcess
from logratio.trainers.rollout.engines.protocol import Request, Sample, Sampling


def with_adapter(model):
    model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    fuse_lora(model)
    return Policy(model).eval()


def small_model():
    return tiny_model(3, num_hidden_layers=1, hidden_size=32, intermediate_size=32, initializer_range=0.5)


@torch.no_grad()
def logps_of(policy, prompt, ids, sampling=None):
    """Of each token in the distribution that the options draw it from, by a plain forward pass."""
    logits = policy.model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1].float()
    found, sampling = [], sampling or Sampling(max_new_tokens=1)
    for at, row in enumerate(logits):
        history = torch.tensor([[*prompt, *ids[:at]]])
        drawing = Drawing(sampling)
        row = row[None] if drawing.penalty is None else drawing.penalty(history, row[None])
        found.append(float(drawing.cuts(history, row / sampling.temperature).log_softmax(-1)[0, ids[at]]))
    return found


class SmallServer:
    """before: called with (path, body) in front of every answer; what it returns, (status, JSON), is the answer, if it
    returns anything. Set runtime_lora, max_rank, without (fields) or raw_logprobs for a server that lacks something."""

    def __init__(self, base, tokenizer):
        self.base, self.tokenizer = base, tokenizer
        self.before, self.runtime_lora, self.max_rank = (lambda path, body: None), True, 16
        self.dribbles = lambda path: False
        self.without, self.raw_logprobs, self.asked, self.keys = set(), False, [], set()
        self.lock, self.port, self.http = threading.Lock(), 0, None
        self.start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def start(self):
        self.adapters = {}
        self.http = ThreadingHTTPServer(("127.0.0.1", self.port), handler(self))
        self.port = self.http.server_address[1]
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def kill(self):
        gone, self.http = self.http, None
        gone.shutdown()
        gone.server_close()

    def close(self):
        if self.http is not None:
            self.kill()

    def models(self):
        return sorted(self.adapters)

    def answer(self, path, body):
        """(status, JSON)"""
        self.asked.append((path, body))
        said = self.before(path, body)
        if said is not None:
            return said
        if path == "/v1/load_lora_adapter":
            return self.load(body["lora_name"], body["lora_path"])
        if path == "/v1/unload_lora_adapter":
            found = self.adapters.pop(body["lora_name"], None)
            return (200, "done") if found else refusal(404, "The lora adapter cannot be found.")
        if path == "/v1/completions":
            return self.complete(body)
        return 404, {"detail": "Not Found"}

    def load(self, name, path):
        if not self.runtime_lora:
            return 404, {"detail": "Not Found"}
        if name in self.adapters:
            return refusal(400, f"The lora adapter '{name}' has already been loaded.")
        if not Path(path, "adapter_model.safetensors").exists():
            return refusal(404, f"Loading lora {name} failed: No adapter found for {path}")
        rank = json.loads(Path(path, "adapter_config.json").read_text())["r"]
        if rank > self.max_rank:
            return refusal(
                500, f"Call to add_lora method failed: LoRA rank {rank} is greater than max_lora_rank {self.max_rank}."
            )
        with self.lock, torch.random.fork_rng(devices=[]):
            model = PeftModel.from_pretrained(copy.deepcopy(self.base), path)
            self.adapters[name] = InProcess(Policy(model).eval(), self.tokenizer)
            self.adapters[name].obstacle = ""
        return 200, f"Success: LoRA adapter '{name}' added successfully."

    def complete(self, body):
        engine = self.adapters.get(body["model"])
        if engine is None:
            return refusal(404, f"The model `{body['model']}` does not exist.")
        if len(body["prompt"]) + body["max_tokens"] > 2048:
            return refusal(400, "This model's maximum context length is 2048 tokens.")
        assert body["n"] == 1 and body["ignore_eos"] and not body["skip_special_tokens"] and body["logprobs"] == 0
        greedy = body["temperature"] == 0
        sampling = Sampling(
            max_new_tokens=body["max_tokens"],
            temperature=1.0 if greedy else body["temperature"],
            stop_ids=frozenset(body["stop_token_ids"]),
            stop_strings=tuple(body["stop"]),
            **{name: body[name] for name in ("top_p", "top_k", "min_p", "repetition_penalty")},
        )
        request = Request(body["prompt"], [None if greedy else body["seed"] % 2**64])
        with self.lock:
            ((sample,),) = engine.sample([request], sampling)
        if bias := body.get("logit_bias"):
            sample = Sample([int(next(iter(bias)))], "length", [0.0])
        logps = [logp - 1 for logp in sample.logps] if self.raw_logprobs else sample.logps
        choice = {
            "token_ids": sample.ids,
            "logprobs": {"token_logprobs": logps},
            "finish_reason": sample.finish_reason,
        }
        choice = {name: value for name, value in choice.items() if name not in self.without}
        return 200, {"model": body["model"], "choices": [choice]}


def refusal(status, message):
    return status, {"error": {"message": message, "type": "Error", "code": status}}


def handler(server):
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.keys.add(self.headers["Authorization"])
            status, answer = server.answer(self.path, body)
            if server.http is not self.server:  # it was killed meanwhile: the connection breaks
                self.close_connection = True
                return
            sent = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(sent) + server.dribbles(self.path)))
            self.end_headers()
            with contextlib.suppress(OSError):  # who asked has gone
                while server.dribbles(self.path) and server.http is self.server:
                    self.wfile.write(b" ")
                    time.sleep(0.05)
                self.wfile.write(sent)

        def log_message(self, *_):
            pass

    return Handler


class RealServer:
    """vLLM itself, in the environment that `make test-vllm` makes. folder: of the model."""

    def __init__(self, program, folder, log):
        self.program, self.folder, self.log = program, folder, log
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url, self.process = f"http://127.0.0.1:{self.port}", None
        self.start()
        self.wait()

    def start(self):
        options = (
            f"--host 127.0.0.1 --port {self.port} --enable-lora --max-lora-rank 16 --max-loras 2 --dtype float32 "
            "--max-model-len 512 --max-num-seqs 32 --enforce-eager --logprobs-mode processed_logprobs"
        )
        own = {
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        dropped = ("PYTHONPATH", "OMP_NUM_THREADS")
        environment = {k: v for k, v in os.environ.items() if k not in dropped} | own
        command = [self.program, "serve", str(self.folder), "--served-model-name", "base", *options.split()]
        with open(self.log, "a") as log:
            self.process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, start_new_session=True, cwd=Path(self.log).parent
            )

    def wait(self, seconds=900):
        limit = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < limit:
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return
            except OSError:
                time.sleep(1)
        raise RuntimeError(f"vLLM did not start: {Path(self.log).read_text()[-2000:]}")

    def kill(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    close = kill

    def models(self):
        with urllib.request.urlopen(f"{self.url}/v1/models", timeout=30) as answer:
            return sorted(m["id"] for m in json.load(answer)["data"] if m["id"] != "base")
