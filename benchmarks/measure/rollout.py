"""The suite `rollout`: completions of prompts, and the whole GRPO steps that learn from them, beside TRL's trainer.

A step is what a run does with its prompts: rollouts, rewards, advantages, packing or padding, forward, backward and
the update. Of it `rollout_ms` is the time in which completions are sampled, on the host's clock: at its end all have
their tokens there. Where only the limit ends completions, `token_ms_p50` is that by token of one completion, to be
put beside `bandwidth_limit_ms`, in which a GPU of this kind reads the weights and what is kept of the tokens so far.
Of our graphs `graph_ms_p50` is what one takes, and `host_ms_per_token` how long the GPU waits between two.
Contestants take turns, each on a copy of the same weights under the same adapters, with the same prompts, options and
number of completions; what they sample are tokens of their own. With `ends` a completion ends at every token with the
same probability, so that lengths are geometric with a mean of half the limit; else only the limit ends one.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import GenerationConfig

from logratio.losses import GRPOLoss
from logratio.reference._trl_drive import constructed
from logratio.trainers.config import RolloutConfig
from logratio.trainers.data.examples import Prompt
from logratio.trainers.layers.fused import fuse_layers
from logratio.trainers.layers.lora_layers import fuse_lora
from logratio.trainers.optimizer import adamw, trained_parameters
from logratio.trainers.policy.policy import Policy
from logratio.trainers.policy.reference import inference
from logratio.trainers.policy.sharing import share_prompts
from logratio.trainers.policy.tiny import tiny_tokenizer
from logratio.trainers.rollout.generation import numbered
from logratio.trainers.rollout.rollouts import Rollouts
from logratio.trainers.rollout.sets.windows import roll_out
from logratio.trainers.setup import start_accelerator
from logratio.trainers.step import Step, learn

from .clock import interleaved
from .models import build
from .rollout_case import RolloutCase
from .steps.contestants import LEARNING_RATE, apply_update
from .steps.step import Figures, attempt
from .token import figures_of_a_token, launched

CONTESTANTS = ("logratio", "trl", "transformers")
ENDS = 1.6
"""Of the limit: the rate at which completions end, which makes their mean half of it."""
MICRO_BATCH_TOKENS = 4096


class Sampled(NamedTuple):
    """Of one turn. ms: that sampling took. tokens: that were sampled."""

    ms: float
    tokens: int


class Contestant(Protocol):
    learns: bool
    """A turn is a whole step, and not of rollouts alone."""

    def turn(self) -> Sampled: ...


def reward(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
    """Half of the completions are right, whatever they say."""
    return [float(sum(ids) % 2) for ids in completion_ids]


class Ours:
    """logratio, as `logratio train grpo` takes a step."""

    learns = True

    def __init__(self, case: RolloutCase, model: Any, device: torch.device, stack: ExitStack) -> None:
        tokenizer, loss = tiny_tokenizer(), GRPOLoss(max_completion_length=case.tokens)
        fuse_lora(model)
        fuse_layers(model)
        policy = Policy(model, stats=(*loss.stats, *loss.metric_stats))
        share_prompts(policy)
        accelerator = start_accelerator("no")
        self.step = Step(accelerator, policy, loss, None, micro_batch_tokens=MICRO_BATCH_TOKENS, max_length=4096)
        config = RolloutConfig(num_generations=case.group, reward_funcs=("reward",), log_completions=False)
        self.rollouts = Rollouts(policy, tokenizer, config, {"reward": reward}, case.tokens, accelerator=accelerator)
        self.optimizer = adamw(trained_parameters(policy), LEARNING_RATE)
        self.prompts = numbered(
            [Prompt(tokenizer(text)["input_ids"], text, {}, row) for row, text in enumerate(case.texts())]
        )

        policy.train()

    def turn(self) -> Sampled:
        self.rollouts.state.global_step += 1  # other random numbers
        window = roll_out(self.rollouts, self.step, self.prompts)
        learn(self.step, window).reduced(self.step.accelerator)  # the metrics, which TRL counts in its step as well
        apply_update(self.optimizer)
        tokens = sum(len(c.ids) for e in window.examples for c in e.completions)
        return Sampled(float(window.metrics["rollout_ms"].total), tokens)


class Trl:
    """TRL's GRPOTrainer, its rollouts by transformers, all completions in one micro-batch."""

    learns = True

    def __init__(self, case: RolloutCase, model: Any, device: torch.device, stack: ExitStack) -> None:
        count = case.prompts * case.group
        options = {
            "per_device_train_batch_size": count,
            "num_generations": case.group,
            "max_completion_length": case.tokens,
            "learning_rate": LEARNING_RATE,
            "optim": "adamw_torch_fused",
            "beta": 0.0,
            "use_cpu": device.type == "cpu",
            "bf16": case.dtype == "bfloat16" and device.type == "cuda",
        }
        self.rows = [{"prompt": text} for text in case.texts() for _ in range(case.group)]
        entered = constructed("grpo", model, tiny_tokenizer(), self.rows, options, copied=False, reward_funcs=[reward])
        self.trainer = trainer = stack.enter_context(entered)
        trainer.create_optimizer()
        trainer.model_wrapped, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
        trainer.current_gradient_accumulation_steps = 1
        self.sampled: list[Sampled] = []
        generate = trainer._generate

        def timed(prompts: Any) -> Any:
            begun = time.perf_counter()
            said = generate(prompts)
            took = 1e3 * (time.perf_counter() - begun)
            self.sampled.append(Sampled(took, sum(len(ids) for ids in said[1])))  # (prompts, completions, ...)
            return said

        trainer._generate = timed

    def turn(self) -> Sampled:
        trainer = self.trainer
        trainer.model.train()
        trainer.training_step(trainer.model_wrapped, list(self.rows), None)
        apply_update(trainer.optimizer)
        (sampled,) = self.sampled  # once in every step
        self.sampled.clear()
        return sampled


class Generate:
    """transformers' `generate` alone."""

    learns = False

    def __init__(self, case: RolloutCase, model: Any, device: torch.device, stack: ExitStack) -> None:
        self.model, tokenizer = model, tiny_tokenizer()
        texts = [text for text in case.texts() for _ in range(case.group)]
        self.inputs = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt").to(device)
        self.eos = tokenizer.eos_token_id
        self.config = GenerationConfig(
            max_new_tokens=case.tokens,
            do_sample=True,
            top_k=0,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=self.eos,
        )

    def turn(self) -> Sampled:
        begun = time.perf_counter()
        with inference(self.model):
            out = self.model.generate(**self.inputs, generation_config=self.config)
        said = out[:, self.inputs["input_ids"].shape[1] :].cpu()
        took = 1e3 * (time.perf_counter() - begun)
        ended = (said == self.eos).long().cumsum(1) - (said == self.eos).long()
        return Sampled(took, int((ended == 0).sum()))


MAKES: dict[str, Any] = {"logratio": Ours, "trl": Trl, "transformers": Generate}


def run(
    case: RolloutCase, device: torch.device, *, repeats: int, seed: int, only: Sequence[str] = CONTESTANTS
) -> dict[str, Figures]:
    """{contestant: status and figures}; a contestant that cannot be built or takes no first turn does not end the
    others."""
    dtype = getattr(torch, case.dtype)
    whole = build(case.model, case.adapter, dtype=dtype, device=device, seed=seed)
    whole.generation_config.eos_token_id = tiny_tokenizer().eos_token_id  # a published one is a word like others here
    rows: dict[str, Figures] = {}
    running: dict[str, Any] = {}
    turns: dict[str, list[Sampled]] = {name: [] for name in only}

    def make(name: str, stack: ExitStack) -> Contestant:
        model = copy.deepcopy(whole)
        contestant: Contestant = MAKES[name](case, model, device, stack)
        stack.callback(ending(model, ENDS / case.tokens if case.ends else None).remove)
        contestant.turn()  # compiles, and makes the optimizer's state
        return contestant

    def take(name: str, round_: int) -> None:
        turns[name].append(running[name].turn())

    torch.manual_seed(seed)  # what peers sample by
    with ExitStack() as stack:
        for name in sorted(only, key=CONTESTANTS.index):  # ours resets accelerate's state, too
            attempt(name, rows, running, partial(make, name, stack))
        works: dict[str, Callable[[int], None]] = {name: partial(take, name) for name in running}
        times = interleaved(works, device, repeats=repeats, warmup=0) if works else {}
        for name, values in times.items():
            rows[name] |= figures(turns[name], values if running[name].learns else None)
            rows[name] |= figures_of_a_token(case, whole, device, rows[name])
        if "logratio" in times and device.type == "cuda":
            rows["logratio"] |= launched(running["logratio"].turn)
            engine = running["logratio"].rollouts.engine
            rows["logratio"]["without_graphs"] = engine.obstacle or engine.uncaptured  # why; "": with them
    return rows


def ending(model: Any, rate: float | None) -> Any:
    """Let completions end at this rate, or never: a handle whose `remove` ends it. In training it does nothing."""
    eos = tiny_tokenizer().eos_token_id
    odds = -math.inf if rate is None else math.log(rate / (1 - rate))

    def hook(module: Any, given: Any, logits: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return logits
        logits = logits.clone()
        logits[..., eos] = -torch.inf
        logits[..., eos] = logits.logsumexp(-1) + odds
        return logits

    base = model.get_base_model() if hasattr(model, "peft_config") else model
    return base.get_output_embeddings().register_forward_hook(hook)


def figures(sampled: Sequence[Sampled], step_ms: Sequence[float] | None) -> Figures:
    """Medians over the turns. step_ms: None where nothing was learned."""
    found: Figures = {
        "rollout_ms_p50": statistics.median(one.ms for one in sampled),
        "rollout_tokens_per_s": sum(one.tokens for one in sampled) / sum(one.ms for one in sampled) * 1e3,
        "sampled_tokens": [one.tokens for one in sampled],
        "rollout_times_ms": [one.ms for one in sampled],
    }
    if step_ms is not None:
        found |= {"step_ms_p50": statistics.median(step_ms), "times_ms": list(step_ms)}
    return found
