"""What a step takes of memory, by part: measured, and as `logratio plan` reckons it of the same micro-batches.

On a GPU the peak is torch's, and what is neither weights, gradients nor optimizer is the rest of it. A CPU's allocator
gives nothing back, so that there is no peak to be had: there the rest is what autograd keeps for the backward pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from logratio.trainers.data.examples import Example
from logratio.trainers.errors import UserError
from logratio.trainers.policy.policy import REFERENCE_ADAPTER

from ..measure.clock import gpu_of, peak_mem
from ..measure.saved import saved_mib
from ..measure.steps.contestants import stored_in, stored_in_optimizer, stored_mib
from ..memory.activations import Batch, activations
from ..memory.geometry import Geometry, find
from ..memory.gpus import GPUS
from ..memory.peak import MIB, Setup, predict
from ..memory.roofline import Plan, step_seconds
from ..planned import left_out, options_of
from ..reporting.records import device_name
from .ours import Turns
from .subject import Subject

STAYS = ("weights", "adapters", "reference", "teacher", "optimizer", "gradients")
REST = "activations, head, temporaries"
KEPT = "kept by autograd"


def measured_parts(subject: Subject) -> dict[str, float | None]:
    """MiB of each part of a step, and of all. Takes a step, behind others that have made the optimizer's state."""
    run, device, gpu = subject.run, subject.device, subject.device.type == "cuda"
    turns = Turns(subject, run.step.micro_batch_tokens, subject.heaviest)
    model, other, teacher = run.policy.model, subject.ref_model, subject.teacher_model
    kept = stored_in(model)
    named = dict(model.named_parameters())
    frozen = [p for name, p in named.items() if f".{REFERENCE_ADAPTER}." in name]
    adapters = list(run.trained) if run.policy.has_adapters else []
    reference = [*frozen, *([] if other is None else stored_in(other))]
    parts: dict[str, float | None] = {
        "weights": stored_mib(kept) - stored_mib(adapters) - stored_mib(frozen),
        "adapters": stored_mib(adapters),
        "reference": stored_mib(reference),
        "teacher": 0.0 if teacher is None else stored_mib(stored_in(teacher)),
        "optimizer": stored_mib(stored_in_optimizer(run.optimizer)),
        "gradients": trained_mib(subject),
    }
    stays = sum(value or 0.0 for value in parts.values())
    if gpu:
        peak = peak_mem(turns, device)
        return {**parts, REST: (peak or 0.0) - stays, "all": peak}
    rest = kept_by_autograd(subject, turns)
    return {**parts, KEPT: rest, "all": None if rest is None else stays + rest}


def kept_by_autograd(subject: Subject, turns: Turns) -> float | None:
    """MiB at the worst moment of a step; None with gradient checkpointing, which keeps what no hook sees."""
    kept = saved_mib(turns, subject.run.policy.model, subject.ref_model, subject.teacher_model)
    return None if subject.run.config.model.gradient_checkpointing else kept


@dataclasses.dataclass(frozen=True)
class Reckoned:
    """parts: MiB, by the names of `measured_parts`. step_ms: by part, None where the device is no GPU of the table.
    why_not: why there is no plan."""

    parts: dict[str, float] = dataclasses.field(default_factory=dict)
    step_ms: dict[str, float] | None = None
    why_not: str = ""


def reckoned(subject: Subject) -> Reckoned:
    """What `logratio plan` would say of the run's own micro-batches."""
    if why_not := unplanned(subject):
        return Reckoned(why_not=why_not)
    step, examples = subject.run.step, subject.windows[subject.heaviest]
    packed = [micro.batch for micro in step.micro_batches(examples, dealt=subject.grouped)]
    try:
        asked = options_of(subject.run.config.as_dict(), gpu=gpu_of(subject.device))
        attention = subject.run.policy.attention
        setup = dataclasses.replace(asked, attn_implementation=attention, accumulates=len(packed) > 1)
        size = Geometry.of(subject.run.policy.causal_lm.config)
        if asked.teacher_model_name_or_path:
            setup = dataclasses.replace(setup, teacher=find(asked.teacher_model_name_or_path))
    except UserError as error:
        return Reckoned(why_not=str(error))
    batches = [Batch.of(batch) for batch in packed]
    prediction = max((predict(size, setup, batch) for batch in batches), key=lambda one: one.peak_mem_mib)
    peak = prediction.peak.parts
    parts = {name: peak[name] / MIB for name in STAYS}
    if setup.gpu is None:
        head = (1 if setup.lora_r else 2) * size.hidden * setup.element
        kept = max(activations(size, setup, batch).saved + batch.scored_tokens * head for batch in batches)
        parts = parts | {"gradients": trained_mib(subject), KEPT: kept / MIB}
        return Reckoned({**parts, "all": sum(parts.values())})
    parts[REST] = prediction.peak_mem_mib - sum(parts.values())
    seconds = step_seconds(size, setup, plan_of(batches, examples, setup), GPUS[setup.gpu])
    return Reckoned({**parts, "all": prediction.peak_mem_mib}, {name: s * 1e3 for name, s in seconds.items()})


def trained_mib(subject: Subject) -> float:
    return sum(p.numel() * p.element_size() for p in subject.run.trained) / MIB


def unplanned(subject: Subject) -> str:
    """Why the plan does not apply; empty where it does."""
    config, device = subject.run.config, subject.device
    if config.model.lora_dropout:
        return "the plan does not model dropout"
    if said := left_out(config.as_dict()):
        return said[0]
    if device.type == "cuda" and gpu_of(device) is None:
        return f"the plan knows no {device_name(device)}"
    return ""


def plan_of(batches: Sequence[Batch], examples: Sequence[Example], setup: Setup) -> Plan:
    """The step as it was packed, as the roofline takes it."""
    pairs = sum(batch.rows * batch.row_length**2 for batch in batches)
    if setup.long_rows:  # by kernels that skip what nobody sees
        pairs = sum(seen(example) for example in examples)
    return Plan(
        largest=max(batches, key=lambda batch: batch.tokens),
        micro_batches=len(batches),
        tokens=sum(batch.tokens for batch in batches),
        scored=sum(batch.scored_tokens for batch in batches),
        pairs=pairs,
    )


def seen(example: Example) -> int:
    """Pairs of an example's tokens of which the one sees the other."""
    prompt, lengths = len(example.prompt_ids), [len(c.ids) for c in example.completions]
    return prompt**2 // 2 + sum(n * prompt + n**2 // 2 for n in lengths)


def as_rows(measured: dict[str, float | None], plan: Reckoned) -> list[tuple[str, float | None, float | None]]:
    """(part, measured, planned) MiB, without parts that neither has."""
    rows: list[tuple[str, Any, Any]] = [(name, value, plan.parts.get(name)) for name, value in measured.items()]
    return [row for row in rows if row[1] or row[2] or row[0] == "all"]
