"""What a training step would take of a GPU's memory and time, and how that is asked of a run's own settings.

`memory/peak.py` says what is modelled, `memory/activations.py` what autograd keeps, `memory/roofline.py` how the time
is estimated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from logratio.losses import LOSSES, Kind, Loss
from logratio.trainers.batches.sequences import VARLEN
from logratio.trainers.errors import UserError

from .memory.activations import Batch
from .memory.geometry import Geometry, find
from .memory.gpus import known_as
from .memory.peak import CONTEXT, MIB, Prediction, Setup, largest_fitting, predict
from .memory.roofline import LIST, Plan, Workload, plan, step_seconds


@dataclass(frozen=True, kw_only=True)
class Options(Setup, Workload):
    """What a plan depends on, under the names of `logratio train`."""

    model_name_or_path: str
    """A published shape (Qwen2.5-0.5B, Qwen2.5-1.5B, Llama-3.1-8B, SmolLM2-135M), a folder with config.json, or a hub
    name whose config.json is in the cache."""
    teacher_model_name_or_path: str | None = None
    """A teacher, of its own shape."""
    micro_batch_tokens: int = 8192
    """Tokens of one forward pass, padding included."""


def planned(options: Options) -> dict[str, Any]:
    """All that is printed, as plain values; UserError for options that cannot be planned with."""
    if options.teacher_model_name_or_path:
        options = dataclasses.replace(options, teacher=find(options.teacher_model_name_or_path))
    for name in ("micro_batch_tokens", "batch_size", "prompt_tokens", "completion_tokens", "num_generations"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} must be positive, got {getattr(options, name)}")
    size = find(options.model_name_or_path)

    def at(tokens: int) -> tuple[Prediction, Plan, Setup]:
        step = plan(options, options, tokens)
        cut = dataclasses.replace(options, accumulates=step.micro_batches > 1)
        if cut.accumulates:
            step = dataclasses.replace(step, largest=filled(step.largest, tokens))
        return predict(size, cut, step.largest), step, cut

    prediction, step, cut = at(options.micro_batch_tokens)
    assert options.device is not None
    gpu = options.device
    all_of_it = plan(options, options, 2**62).tokens
    largest = largest_fitting(lambda tokens: at(tokens)[0].fits(gpu), 1, all_of_it)
    seconds = step_seconds(size, cut, step, gpu)
    return {
        "model": options.model_name_or_path,
        "method": options.method,
        "parameters": prediction.parameters,
        "trained_parameters": prediction.trained,
        "gpu": gpu.name,
        "gpu_memory_mib": gpu.memory / MIB,
        "prompt_tokens": options.prompt_tokens,
        "completion_tokens": options.completion_tokens,
        "completions": options.completions(options),
        "micro_batch": dataclasses.asdict(step.largest),
        "micro_batches": step.micro_batches,
        "predicted_peak_mem_mib": prediction.peak_mem_mib,
        "peak_moment": prediction.peak.name,
        "parts_mib": {name: value / MIB for name, value in prediction.peak.parts.items()},
        "moments_mib": {moment.name: moment.total / MIB for moment in prediction.moments},
        "not_counted_by_torch_mib": CONTEXT / MIB,
        "needed_mib": prediction.needed / MIB,
        "fits": prediction.fits(gpu),
        "largest_micro_batch_tokens": largest,
        "whole_step_fits": largest == all_of_it,
        "step_tokens": step.tokens,
        "predicted_step_ms": sum(seconds.values()) * 1e3,
        "step_parts_ms": {name: value * 1e3 for name, value in seconds.items()},
        "geometry": summary(size),
    }


def filled(batch: Batch, tokens: int) -> Batch:
    """The largest micro-batch that a budget allows: rows of many lengths fill it, where those of one length stop at the
    last that fits whole."""
    length = max(batch.row_length, tokens // batch.rows)
    scored = round(batch.scored_tokens * length / batch.row_length)
    return dataclasses.replace(batch, row_length=length, scored_tokens=scored)


def summary(size: Geometry) -> str:
    return f"{size.layers} layers, hidden {size.hidden}, intermediate {size.intermediate}, vocabulary {size.vocab}"


def options_of(settings: Mapping[str, Any], **others: Any) -> Options:
    """Of a run's settings, as run_config.json has them. others: what they do not say, such as the rows' lengths."""
    known = {f.name for f in dataclasses.fields(Options)}
    given = {**section(settings, "model"), **section(settings, "train"), **section(settings, "rollout")}
    taken = {name: value for name, value in given.items() if name in known and value is not None}
    if taken.get("micro_batch_tokens") == "auto":
        del taken["micro_batch_tokens"]
    if given.get("lora_dropout"):  # PEFT's own forward runs then
        taken["fused_lora"] = False
    if given.get("mixed_precision", "no") != "no":  # in which float32 weights attend as half precision does
        taken.setdefault("attn_implementation", VARLEN)
    return Options(**{**taken, "method": str(settings.get("method", "")), "loss": loss_of(settings), **others})


def section(settings: Mapping[str, Any], part: str) -> Mapping[str, Any]:
    """A part of them; empty where there is none."""
    found = settings.get(part)
    return found if isinstance(found, Mapping) else {}


def loss_of(settings: Mapping[str, Any]) -> Loss | None:
    """The loss of a run's settings; None where it is not one of ours, or has options that this version has not."""
    kind, said = LOSSES.get(str(settings.get("loss_class"))), section(settings, "loss")
    if kind is None:
        return None
    try:
        return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in said.items()})
    except (TypeError, ValueError):
        return None


def not_modelled(settings: Mapping[str, Any]) -> list[str]:
    """What of a run's settings the plan leaves out, a sentence each."""
    loss = loss_of(settings)
    lists = [f"the plan is of lists of {LIST} completions"] if loss is not None and loss.kind is Kind.LISTED else []
    return left_out(settings) + lists


def left_out(settings: Mapping[str, Any]) -> list[str]:
    """The same of a step whose micro-batches are known."""
    model, train = section(settings, "model"), section(settings, "train")
    found = []
    if settings.get("loss_class", settings.get("method")) != settings.get("method"):
        found.append("the plan knows no loss of one's own")
    if train.get("mixed_precision", "no") != "no":
        found.append("the plan does not model autocast")
    if model.get("adapter_name_or_path"):
        found.append("the plan does not know the loaded adapter's rank")
    if model.get("lora_r") and list(model.get("lora_target_modules") or ["all-linear"]) != ["all-linear"]:
        found.append("the plan is of adapters on all linear layers")
    named = {"load_in_8bit": "8-bit weights", "use_dora": "DoRA", "lora_modules_to_save": "modules that train whole"}
    return found + [f"the plan does not model {what}" for name, what in named.items() if model.get(name)]


def plan_of_run(
    settings: Mapping[str, Any], card: Mapping[str, Any], completion_tokens: float | None = None
) -> dict[str, Any]:
    """`planned` of a run that has begun, with the mean lengths of its data. UserError where the plan does not apply.

    settings: run_config.json. card: data_card.json. completion_tokens: of what was sampled; None: as the rows have it,
    and of rollouts, which are not sampled yet, as long as they may get.
    """
    about, loss, rows = section(settings, "about"), section(settings, "loss"), section(card, "train")
    device = about.get("device")
    if device is None:
        raise UserError("run_config.json does not say on which device it ran")
    if device == "cpu":
        raise UserError("the plan is of a GPU's memory, and this ran on a CPU")
    gpu = known_as(str(device), int(float(about.get("device_mem_mib") or 0) * MIB))
    if gpu is None:
        raise UserError(f"the plan knows no {device}")
    if about.get("num_processes") != 1:
        raise UserError("the plan is of one process")
    if said := not_modelled(settings):
        raise UserError(said[0])
    for name in ("micro_batch_tokens", "batch_size"):
        if not isinstance(found := section(settings, "train").get(name), int):
            raise UserError(f"run_config.json has no number of {name}, but {found}")
    completion = completion_tokens or rows.get("completion_tokens") or loss.get("max_completion_length")
    lengths: dict[str, Any] = {"prompt_tokens": rows.get("prompt_tokens"), "completion_tokens": completion}
    if not all(isinstance(length, int | float) for length in lengths.values()):
        raise UserError("data_card.json does not say how long the rows are")
    return planned(options_of(settings, gpu=gpu, **{name: max(1, round(n)) for name, n in lengths.items()}))


def peak_of_run(settings: Mapping[str, Any], card: Mapping[str, Any]) -> float | None:
    """The peak of memory that `plan_of_run` predicts, in MiB; None where the plan does not apply."""
    try:
        return float(plan_of_run(settings, card)["predicted_peak_mem_mib"])
    except UserError:
        return None
