"""`logratio plan`: what a training step would take of a GPU's memory and time, without GPU or weights.

`memory.py` says what is modelled, `activations.py` what autograd keeps, `roofline.py` how the time is estimated.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from logratio.trainers.errors import UserError

from .memory.geometry import Geometry, find
from .memory.gpus import GPUS
from .memory.peak import CONTEXT, MARGIN, MIB, Prediction, Setup, largest_fitting, predict
from .memory.roofline import EFFICIENCY, Plan, Workload, plan, step_seconds

ADVICE = "try --gradient_checkpointing, --lora_r 16 --load_in_4bit, or a larger --gpu"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Names are those of `logratio train`."""

    model_name_or_path: str
    """A published shape (Qwen2.5-0.5B, Qwen2.5-1.5B, Llama-3.1-8B, SmolLM2-135M), a folder with config.json, or a hub
    name whose config.json is in the cache."""
    method: str = "dpo"
    """sft, dpo, kto, orpo, cpo, tpo or grpo, with its default options."""
    gpu: str = "H100"
    """H100, H200, A100-80GB, A100-40GB, L40S, L4, A10, RTX4090, RTX3090 or T4."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Of the model's weights; `logratio train` takes float32 if nothing is said."""
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
    attn_implementation: Literal["flex_attention", "sdpa"] = "flex_attention"
    """sdpa has a dense mask in every layer."""
    optim: str = "adamw_torch"
    """adamw_torch, adamw_8bit, paged_adamw_32bit or paged_adamw_8bit."""
    ref_model_name_or_path: str | None = None
    """A reference model of its own, counted as large as the policy."""
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
    json: bool = False
    """Print one JSON object instead of tables."""


def main(argv: list[str] | None = None) -> int:
    """Predict a training step's peak memory and time on a named GPU; needs neither the GPU nor the weights."""
    options = tyro.cli(Options, args=argv, prog="logratio plan", use_underscores=True)
    answer = planned(options)
    if options.json:
        print(json.dumps(answer))
    else:
        show(answer)
    return 0


def planned(options: Options) -> dict[str, Any]:
    """All that is printed, as plain values; UserError for options that cannot be planned with."""
    names = {f.name for f in dataclasses.fields(Setup)}
    setup = Setup(**{k: v for k, v in dataclasses.asdict(options).items() if k in names})
    for name in ("micro_batch_tokens", "batch_size", "prompt_tokens", "completion_tokens", "num_generations"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} must be positive, got {getattr(options, name)}")
    size = find(options.model_name_or_path)
    work = Workload(options.prompt_tokens, options.completion_tokens, options.batch_size, options.num_generations)

    def at(tokens: int) -> tuple[Prediction, Plan, Setup]:
        step = plan(setup, work, tokens)
        cut = dataclasses.replace(setup, accumulates=step.micro_batches > 1)
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


def summary(size: Geometry) -> str:
    return f"{size.layers} layers, hidden {size.hidden}, intermediate {size.intermediate}, vocabulary {size.vocab}"


def show(answer: dict[str, Any]) -> None:
    """Two tables and three lines."""
    console = Console()
    trained = f"{answer['trained_parameters'] / 1e6:,.1f} M of {answer['parameters'] / 1e6:,.1f} M parameters trained"
    console.print(f"{answer['model']}: {answer['geometry']}; {answer['method']}, {trained}")
    batch = answer["micro_batch"]
    console.print(
        f"{answer['micro_batches']} micro-batches a step, the largest {batch['rows']} rows of {batch['row_length']} "
        f"tokens, {batch['scored_tokens']} scored"
    )
    memory = Table("part", "MiB", title=f"predicted peak memory, in the {answer['peak_moment']}")
    memory.columns[1].justify = "right"
    for name, value in answer["parts_mib"].items():
        if value:
            memory.add_row(name, f"{value:,.1f}")
    memory.add_section()
    memory.add_row("peak of torch's allocations", f"{answer['predicted_peak_mem_mib']:,.1f}")
    memory.add_row("CUDA context, not counted by torch", f"{answer['not_counted_by_torch_mib']:,.1f}")
    memory.add_row(f"with {MARGIN:.0%} for fragments", f"{answer['needed_mib']:,.1f}")
    console.print(memory)
    console.print(verdict(answer))
    times = Table("part", "ms", title=f"predicted step on {answer['gpu']}")
    times.columns[1].justify = "right"
    for name, value in answer["step_parts_ms"].items():
        times.add_row(name, f"{value:,.2f}")
    times.add_section()
    times.add_row("step", f"{answer['predicted_step_ms']:,.2f}")
    console.print(times)
    console.print(
        f"A roofline estimate: {EFFICIENCY:.0%} of the data sheet's FLOPs, full bandwidth, no launches or packing"
        + (", no generation." if answer["method"] == "grpo" else ".")
    )


def verdict(answer: dict[str, Any]) -> str:
    """One line: whether it fits, and up to where."""
    place = f"{answer['gpu']} ({answer['gpu_memory_mib']:,.0f} MiB)"
    said = f"It {'fits' if answer['fits'] else 'does not fit'} {place}; "
    if answer["largest_micro_batch_tokens"] is None:
        return said + f"no --micro_batch_tokens does: {ADVICE}."
    if answer["whole_step_fits"]:
        return (
            said
            + f"so does a whole step in one micro-batch, --micro_batch_tokens {answer['largest_micro_batch_tokens']}."
        )
    return said + f"the largest --micro_batch_tokens that does is {answer['largest_micro_batch_tokens']}."
