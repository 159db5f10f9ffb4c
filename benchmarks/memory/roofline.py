"""Predicted time of an optimizer step on one GPU: FLOPs over what its tensor cores reach, bytes over its bandwidth.

A roofline estimate: parts are added as if nothing overlapped, matrix products run at `EFFICIENCY` of the data sheet,
and the host keeps up. Launches, packing, and the generation of rollouts are left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from logratio.losses import Kind, Loss
from logratio.trainers.batches.sequences import ROW_MULTIPLE

from .activations import Batch, activations
from .geometry import Geometry
from .gpus import Gpu
from .peak import Setup, optimizer_bytes, trained_bytes, trained_sizes, weight_bytes

EFFICIENCY = 0.6
# A kept activation is written and read in the forward pass; in the backward it is read, and its gradient written.
TRAFFIC = 4
# Of one float32 logit: written by the product, read twice by the row kernel, written and read in half precision.
TILE_TRAFFIC = 16
LIST = 4  # completions of a list, as UltraFeedback has them


@dataclass(frozen=True)
class Workload:
    """What a step trains on. Lengths in tokens, of a prompt and of each of its completions; batch_size as in training.

    num_generations: completions of a prompt, in methods that learn from rollouts. Lists are of `LIST`.
    """

    prompt_tokens: int = 200
    completion_tokens: int = 300
    batch_size: int = 8
    num_generations: int = 8

    def completions(self, setup: Setup) -> int:
        """Of one example."""
        return completions_of(setup.the_loss, self.num_generations)


def completions_of(loss: Loss, group: int) -> int:
    """Of one example of the loss; group: of a prompt with rollouts."""
    pair = 3 if loss.scores_gold else 2
    return {Kind.PAIRED: pair, Kind.LISTED: LIST, Kind.GROUPED: group}.get(loss.kind, 1)


@dataclass(frozen=True)
class Plan:
    """largest: the largest micro-batch. micro_batches: of a step. tokens, scored: of a step, with padding. pairs: of
    tokens that attend, by what the attention computes."""

    largest: Batch
    micro_batches: int
    tokens: int
    scored: int
    pairs: int


def plan(setup: Setup, work: Workload, micro_batch_tokens: int) -> Plan:
    """How examples of one and the same length fill micro-batches, as `trainers.packing.pack` would cut them.

    Real lengths vary, so that rows hold several short examples: a mask is there in any case.
    """
    loss, per_example = setup.the_loss, work.completions(setup)
    prompt, completion, examples = work.prompt_tokens, work.completion_tokens, work.batch_size
    if loss.kind is Kind.GROUPED:  # groups are divided where they do not fit; what is left of several goes together
        fitting = min(per_example, max(1, (micro_batch_tokens - prompt) // completion))
        per_example, examples = fitting, math.ceil(examples * per_example / fitting)
    used = prompt + per_example * completion
    if setup.long_rows:
        in_one = min(max(1, micro_batch_tokens // ROW_MULTIPLE * ROW_MULTIPLE // used), examples)
        rows, row = 1, _row_length(in_one * used)
        computed = examples // in_one * row + _row_length(examples % in_one * used)
    else:
        in_one = rows = min(max(1, micro_batch_tokens // used), examples)
        row, computed = used, examples * used
    scored = per_example * completion + (prompt - 1 if loss.scores_prompt else 0)
    paths = in_one * (per_example + loss.scores_prompt)
    seen = prompt**2 // 2 + per_example * (completion * prompt + completion**2 // 2)  # blocks that nobody sees: skipped
    return Plan(
        largest=Batch(rows, row, in_one * scored, paths),
        micro_batches=math.ceil(examples / in_one),
        tokens=computed,
        scored=examples * scored,
        pairs=examples * seen if setup.long_rows else examples * used**2,
    )


def _row_length(tokens: int) -> int:
    return math.ceil(tokens / ROW_MULTIPLE) * ROW_MULTIPLE


def step_seconds(size: Geometry, setup: Setup, step: Plan, gpu: Gpu) -> dict[str, float]:
    """Seconds of an optimizer step, by part."""
    flops = {2: gpu.tflops, 4: gpu.float32_tflops}[setup.element] * 1e12 * EFFICIENCY
    bandwidth = gpu.tb_per_s * 1e12
    lora, again = bool(setup.lora_r), setup.gradient_checkpointing
    products = 2 * size.in_linears * step.tokens
    attention = 4 * step.pairs * size.queries * size.layers
    unit = 2 * step.scored * size.hidden * size.vocab  # one product with the head
    policy, reference = passes(setup)
    forward = (products + attention) / flops
    teacher = 0.0
    if setup.teacher is not None:
        teacher = without_gradient(setup.teacher, step, flops, bandwidth)
        teacher += step.micro_batches * weight_bytes(setup.teacher, setup) / bandwidth
    adapters = 2 * sum(size.adapters(setup.lora_r)) * step.tokens * (3 + again)
    head = (2 if lora else 4) * unit / flops + TILE_TRAFFIC * step.scored * size.vocab / bandwidth
    head *= 1 + setup.anchored  # of the log-probs, and of the divergence
    once = without_gradient(size, step, flops, bandwidth)
    layer = activations(size, setup, step.largest).layer / step.largest.tokens * step.tokens * size.layers
    traffic = layer * (TRAFFIC + 2 * (again + policy + reference))
    read = weight_bytes(size, setup) + (size.in_linears * 4 if setup.load_in_4bit else 0)  # dequantized: written, read
    reads = step.micro_batches * read * (2 + again + policy + reference)
    trained = trained_sizes(size, setup)
    updated = 7 * trained_bytes(trained, setup) + 2 * optimizer_bytes(trained, setup)
    times = {
        "forward": forward,
        "backward": ((1 if lora else 2) * products + 2.5 * attention) / flops,
        "recomputation": again * forward,
        "adapters": adapters / (flops if setup.fused_lora else gpu.float32_tflops * 1e12 * EFFICIENCY),
        "head": head,
        "reference": reference * once,
        "teacher": teacher,
        "passes before the loss": policy * once,
        "activations (bandwidth)": traffic / bandwidth,
        "weights (bandwidth)": reads / bandwidth,
        "optimizer (bandwidth)": updated / bandwidth,
    }
    return {name: seconds for name, seconds in times.items() if seconds}


def without_gradient(size: Geometry, step: Plan, flops: float, bandwidth: float) -> float:
    """Seconds of a pass of this model over a step's tokens, which reads the tile once; but for its weights' reading."""
    products = 2 * size.in_linears * step.tokens + 2 * step.scored * size.hidden * size.vocab
    attention = 4 * step.pairs * size.queries * size.layers
    return (products + attention) / flops + 8 * step.scored * size.vocab / bandwidth


def passes(setup: Setup) -> tuple[int, int]:
    """Forward passes without gradient over a step's tokens: of the policy for the loss's window, of the reference.

    Completions that a window pass has moved to other prompts are not among the stored log-probabilities.
    """
    mismatched = setup.the_loss.window_pass == "mismatched"
    policy = int(setup.the_loss.window_pass is not None)
    if setup.teacher is not None and setup.the_loss.kind is Kind.GROUPED:  # which its log-probs are compared with
        policy += 1
    if not setup.with_reference:
        return policy, 0
    return policy, int(not setup.precompute_ref_log_probs) + int(mismatched)
