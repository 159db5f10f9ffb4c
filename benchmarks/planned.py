"""What a training step would take of a GPU's memory and time, and how that is asked of a run's own settings.

`memory/peak.py` says what is modelled, `memory/activations.py` what autograd keeps, `memory/roofline.py` how the time
is estimated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from logratio.losses import LOSSES, Kind, Loss
from logratio.trainers.batches.sequences import VARLEN
from logratio.trainers.errors import UserError

from .memory.activations import Batch
from .memory.geometry import Geometry, find
from .memory.gpus import GPUS, known_as
from .memory.peak import CONTEXT, MIB, Prediction, Setup, largest_fitting, predict
from .memory.roofline import LIST, Plan, Workload, plan, step_seconds


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a plan depends on, under the names of `logratio train`."""

    model_name_or_path: str
    """A published shape (Qwen2.5-0.5B, Qwen2.5-1.5B, Llama-3.1-8B, SmolLM2-135M), a folder with config.json, or a hub
    name whose config.json is in the cache."""
    method: str = "dpo"
    """sft, dpo, kto, orpo, cpo, tpo or grpo."""
    loss: Any = None
    """Its options, if not the defaults."""
    gpu: str = "H100"
    """One of `GPUS`."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Of the model's weights."""
    lora_r: int = 0
    """Rank of adapters on all linear layers; 0 trains the whole model."""
    fused_lora: bool = True
    """As in training."""
    fused_layers: bool = True
    """As in training."""
    use_liger_kernel: bool = False
    """As in training."""
    load_in_4bit: bool = False
    """QLoRA: frozen weights in nf4."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    attn_implementation: Literal["sdpa", "logratio_varlen"] | None = None
    """sdpa has a dense mask in every layer, as float32 has by default; half precision's skips what nobody sees."""
    optim: str = "adamw_torch"
    """adamw_torch, adamw_8bit, paged_adamw_32bit or paged_adamw_8bit."""
    ref_model_name_or_path: str | None = None
    """A reference model of its own, counted as large as the policy."""
    teacher_model_name_or_path: str | None = None
    """A teacher, of its own shape."""
    precompute_ref_log_probs: bool = False
    """No reference pass in a step."""
    sync_ref_model: bool = False
    """The reference follows the policy."""
    ref_model_mixup_alpha: float = 0.6
    """How fast; with adapters it decides how far the reference's rank grows."""
    micro_batch_tokens: int = 8192
    """Tokens of one forward pass, padding included."""
    batch_size: int = 8
    """Examples of an optimizer step."""
    prompt_tokens: int = 200
    """Mean length of the prompts."""
    completion_tokens: int = 300
    """Mean length of the completions."""
    num_generations: int = 8
    """GRPO: completions of each prompt."""
    reward_kl_coef: float = 0.0
    """GRPO: a reference is there for the rewards too."""


def planned(options: Options) -> dict[str, Any]:
    """All that is printed, as plain values; UserError for options that cannot be planned with."""
    names = {f.name for f in dataclasses.fields(Setup)}
    setup = Setup(**{name: getattr(options, name) for name in names & {f.name for f in dataclasses.fields(Options)}})
    if options.teacher_model_name_or_path:
        setup = dataclasses.replace(setup, teacher=find(options.teacher_model_name_or_path))
    for name in ("micro_batch_tokens", "batch_size", "prompt_tokens", "completion_tokens", "num_generations"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} must be positive, got {getattr(options, name)}")
    size = find(options.model_name_or_path)
    work = Workload(options.prompt_tokens, options.completion_tokens, options.batch_size, options.num_generations)

    def at(tokens: int) -> tuple[Prediction, Plan, Setup]:
        step = plan(setup, work, tokens)
        cut = dataclasses.replace(setup, accumulates=step.micro_batches > 1)
        if cut.accumulates:
            step = dataclasses.replace(step, largest=filled(step.largest, tokens))
        return predict(size, cut, step.largest), step, cut

    prediction, step, cut = at(options.micro_batch_tokens)
    gpu = GPUS[options.gpu]
    all_of_it = plan(setup, work, 2**62).tokens
    largest = largest_fitting(lambda tokens: at(tokens)[0].fits(gpu), 1, all_of_it)
    seconds = step_seconds(size, cut, step, gpu)
    return {
        "model": options.model_name_or_path,
        "method": options.method,
        "parameters": prediction.parameters,
        "trained_parameters": prediction.trained,
        "gpu": gpu.name,
        "gpu_memory_mib": gpu.memory / MIB,
        "prompt_tokens": work.prompt_tokens,
        "completion_tokens": work.completion_tokens,
        "completions": work.completions(setup),
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


def options_of(settings: Mapping[str, Any], *, gpu: str, prompt_tokens: int, completion_tokens: int) -> Options:
    """Of a run's settings, as run_config.json has them, on rows of these lengths."""
    known = {f.name for f in dataclasses.fields(Options)}
    given = {**section(settings, "model"), **section(settings, "train"), **section(settings, "rollout")}
    taken = {name: value for name, value in given.items() if name in known and value is not None}
    if taken.get("micro_batch_tokens") == "auto":
        taken["micro_batch_tokens"] = 8192
    if given.get("lora_dropout"):  # PEFT's own forward runs then
        taken["fused_lora"] = False
    if given.get("mixed_precision", "no") != "no":  # in which float32 weights attend as half precision does
        taken.setdefault("attn_implementation", VARLEN)
    method = str(settings.get("method", ""))
    lengths = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
    return Options(**{**taken, **lengths, "method": method, "loss": loss_of(settings), "gpu": gpu})


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
    model, train = section(settings, "model"), section(settings, "train")
    found = []
    if train.get("mixed_precision", "no") != "no":
        found.append("the plan does not model autocast")
    if model.get("adapter_name_or_path"):
        found.append("the plan does not know the loaded adapter's rank")
    if model.get("lora_r") and list(model.get("lora_target_modules") or ["all-linear"]) != ["all-linear"]:
        found.append("the plan is of adapters on all linear layers")
    loss = loss_of(settings)
    if loss is not None and loss.kind is Kind.LISTED:
        found.append(f"the plan is of lists of {LIST} completions")
    named = {"load_in_8bit": "8-bit weights", "use_dora": "DoRA", "lora_modules_to_save": "modules that train whole"}
    found += [f"the plan does not model {what}" for name, what in named.items() if model.get(name)]
    return found


def peak_of_run(settings: Mapping[str, Any], card: Mapping[str, Any]) -> float | None:
    """The peak of memory that is predicted of a run, in MiB, with the mean lengths of its data; None where the plan
    does not apply. card: data_card.json. Of rollouts, which are not sampled yet, as long as they may get."""
    about, loss, train = (section(settings, name) for name in ("about", "loss", "train"))
    gpu = known_as(str(about.get("device")), int(float(about.get("device_mem_mib") or 0) * MIB))
    prompt, completion = (section(card, "train").get(f"{name}_tokens") for name in ("prompt", "completion"))
    completion = completion or loss.get("max_completion_length")
    if gpu is None or about.get("num_processes") != 1 or not prompt or not completion or not_modelled(settings):
        return None
    if train.get("micro_batch_tokens") == "auto":  # which grow
        return None
    try:
        lengths = {"prompt_tokens": max(1, round(prompt)), "completion_tokens": max(1, round(completion))}
        return float(planned(options_of(settings, gpu=gpu, **lengths))["predicted_peak_mem_mib"])
    except UserError:
        return None
