"""One optimizer step of each contestant, on the same weights and the same token ids: what one is, and ours.

A step is everything from token ids to updated weights: packing or padding (TRL's is done beforehand, as its data
loader's workers would; ours of the next step while a device works, as the loop does), reference, forward, backward,
clipping, AdamW. TRL's are in `trl_contestant.py`.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from logratio.trainers.batches.packing import pack
from logratio.trainers.data.examples import Example
from logratio.trainers.layers.fused import fuse_layers
from logratio.trainers.layers.lora_layers import fuse_lora
from logratio.trainers.optimizer import adamw, trained_parameters
from logratio.trainers.policy.policy import Policy
from logratio.trainers.policy.reference import (
    AdapterReference,
    ModelReference,
    Reference,
    StoredReference,
    inference,
)
from logratio.trainers.policy.sharing import choose_attention, share_prompts
from logratio.trainers.setup import start_accelerator
from logratio.trainers.step import Step
from logratio.trainers.window import MicroBatch

from ..clock import wait
from .step_cases import StepCase

LEARNING_RATE = 1e-5
MAX_GRAD_NORM = 1.0

OldLogps = dict[str, list[Tensor]]
"""`tokens_key` of an example -> log-probs of its completions under the policy that sampled them."""


class Contestant(Protocol):
    """attention: its implementation's name. model: with the parameters that train. ref_model: if it is another."""

    attention: str
    model: Any
    ref_model: Any
    optimizer: Any

    def prepare(self, window: Sequence[Example], per_micro_batch: int | None = None) -> Any:
        """What `backward` takes, of the examples of a step."""

    def backward(self, batch: Any, following: Any = None) -> None:
        """Reference, forward and backward: the step's gradient is added up. following: the next step's batch."""

    def update(self) -> None:
        """Clip, step, reset."""

    def logps(self, examples: Sequence[Example]) -> Tensor:
        """Of every completion's tokens, flat, without gradient, as the step's forward pass computes them."""

    def computed(self, window: Sequence[Example]) -> tuple[int, int]:
        """Tokens that the step's forward pass computes, padding and repeated prompts included, and those that are no
        padding."""


def apply_update(optimizer: torch.optim.Optimizer, max_grad_norm: float = MAX_GRAD_NORM) -> None:
    """What both sides do with a gradient."""
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()


class Ours:
    """logratio, as `logratio train` runs a step. old: of GRPO's rollouts. shared: False for the plain path, every
    completion behind a prompt of its own."""

    def __init__(
        self,
        case: StepCase,
        model: Any,
        ref_model: Any,
        device: torch.device,
        old: OldLogps | None = None,
        *,
        shared: bool = True,
    ) -> None:
        self.case, self.model, self.ref_model, self.device = case, model, ref_model, device
        loss = case.loss
        fuse_lora(model)
        fuse_layers(model)
        if case.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        policy = self.policy = Policy(model, stats=(*loss.stats, *loss.metric_stats))
        if shared:
            share_prompts(policy)
        self.attention = policy.causal_lm.config._attn_implementation
        reference: Reference | None = None
        if loss.wants_reference:
            reference = AdapterReference(policy, loss.ref_stats)
            if not policy.has_adapters:
                other = Policy(ref_model, stats=loss.ref_stats, shared=policy.shared)
                if shared:
                    choose_attention(other)
                reference = ModelReference(other)
        self.step = Step(
            start_accelerator("no"),
            policy,
            loss,
            reference,
            micro_batch_tokens=case.micro_batch_tokens,
            max_length=case.max_length,
        )
        self.old = None if old is None else StoredReference(old, AdapterReference(policy))
        self.optimizer = adamw(trained_parameters(policy), LEARNING_RATE)
        self.ahead: tuple[list[Example], list[MicroBatch]] | None = None
        policy.train()

    def prepare(self, window: Sequence[Example], per_micro_batch: int | None = None) -> list[Example]:
        return list(window)

    def micro_batches(self, window: list[Example]) -> list[MicroBatch]:
        micros = self.step.micro_batches(window)
        if self.old is not None:
            for micro in micros:
                micro.old = self.old(micro.batch)
        return micros

    def backward(self, batch: list[Example], following: list[Example] | None = None) -> None:
        packed, self.ahead = self.ahead, None
        micros = packed[1] if packed is not None and packed[0] is batch else self.micro_batches(batch)

        def prepare() -> None:
            assert following is not None
            self.ahead = following, self.micro_batches(following)

        known = following is not None and self.old is None  # what is sampled needs the updated policy
        result = self.step(micros, self.step.totals(batch, micros), meanwhile=prepare if known else None)
        result.reduced(self.step.accelerator)  # the metrics, which TRL counts in its step as well

    def update(self) -> None:
        apply_update(self.optimizer)

    def logps(self, examples: Sequence[Example]) -> Tensor:
        return policy_logps(self.policy, examples)

    def computed(self, window: Sequence[Example]) -> tuple[int, int]:
        return computed_in(self.step.micro_batches(window))

    def timed_parts(self, window: list[Example]) -> dict[str, float]:
        """As `timed_parts`, of these examples."""
        return timed_parts(self.step, self.device, window, lambda: self.micro_batches(window), self.update)


def computed_in(micros: Sequence[MicroBatch]) -> tuple[int, int]:
    """See `Contestant.computed`."""
    return sum(m.batch.input_ids.numel() for m in micros), sum(m.batch.num_tokens for m in micros)


def timed_parts(
    step: Step,
    device: torch.device,
    examples: Sequence[Example],
    cut: Callable[[], list[MicroBatch]],
    update: Callable[[], Any],
    *,
    dealt: bool = False,
) -> dict[str, float]:
    """The milliseconds that each part of one step takes, with the device drained in between."""
    parts: dict[str, float] = {}
    last = time.perf_counter()

    def mark(name: str) -> None:
        nonlocal last
        wait(device)
        now = time.perf_counter()
        parts[name], last = (now - last) * 1e3, now

    wait(device)
    micros = cut()
    mark("packing")
    totals = step.totals(examples, micros, dealt)
    mark("pass before the step")
    step.fill_reference(micros)
    mark("reference")
    step(micros, totals)
    mark("forward and backward")
    update()
    mark("optimizer")
    return {k: v for k, v in parts.items() if v > 0.5}


def policy_logps(policy: Policy, examples: Sequence[Example]) -> Tensor:
    """Log-probs of every completion's tokens, flat, one example at a time, its prompt shared as the policy does."""
    device = policy.causal_lm.get_output_embeddings().weight.device
    parts = []
    with inference(policy):
        for example in examples:
            (batch,) = pack([example], 1 << 30, **policy.packing)
            moved = batch.to(device)
            parts.append(policy(moved).logps[moved.scored])
    return torch.cat(parts)


def share_frozen(model: Any) -> Any:
    """A copy that has parameters of its own where they train, and shares the frozen ones and all buffers."""
    shared = [p for p in model.parameters() if not p.requires_grad] + list(model.buffers())
    return copy.deepcopy(model, {id(t): t for t in shared})


def trainable_copy(model: Any, adapter: str) -> Any:
    """A copy whose adapters train, over shared weights, or all of whose weights do."""
    return copy.deepcopy(model).requires_grad_(True) if adapter == "full" else share_frozen(model)


def kept_mib(contestant: Contestant) -> float:
    """What stays allocated between two steps: weights (of the reference too), nf4's scales, AdamW's state; MiB."""
    models = [m for m in (contestant.model, contestant.ref_model) if m is not None]
    return stored_mib([*(t for model in models for t in stored_in(model)), *stored_in_optimizer(contestant.optimizer)])


def stored_in(model: Any) -> list[Tensor]:
    """Its parameters, buffers and nf4's scales."""
    kept = [*model.parameters(), *model.buffers()]
    for weight in list(kept):
        state = getattr(weight, "quant_state", None)
        if state is not None:
            kept += [state.absmax, state.code, *((state.state2.absmax, state.state2.code) if state.nested else ())]
    return kept


def stored_in_optimizer(optimizer: Any) -> list[Tensor]:
    """Its state of every parameter."""
    return [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]


def stored_mib(tensors: Iterable[Tensor]) -> float:
    """MiB of these tensors' distinct storages."""
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(sizes.values()) / 2**20
