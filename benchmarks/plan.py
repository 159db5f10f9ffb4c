"""`logratio plan METHOD`: what `logratio train METHOD` with the same options would take of a GPU's memory and time,
without GPU or weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from logratio.losses.options import Count
from logratio.trainers.config import RunConfig
from logratio.trainers.config.numbers import check_numbers
from logratio.trainers.errors import UserError, counted
from logratio.trainers.options import parse

from .memory.peak import MARGIN
from .memory.roofline import EFFICIENCY
from .planned import Options, not_modelled, options_of, peak_of_run, planned

__all__ = ["Options", "PlanConfig", "main", "peak_of_run", "planned", "show", "verdict"]

ADVICE = "try --gradient_checkpointing, --lora_r 16 --load_in_4bit, or a larger --gpu"


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """What it is planned for."""

    gpu: str = "H100"
    """H100, H200, A100-80GB, A100-40GB, L40S, L4, A10, RTX4090, RTX3090 or T4."""
    prompt_tokens: Count = 200
    """Mean length of the prompts; what is longer than max_length is cut, as in training."""
    completion_tokens: Count = 300
    """Mean length of the completions; of rollouts at most max_completion_length."""
    json: bool = False
    """Print one JSON object instead of tables."""

    def __post_init__(self) -> None:
        check_numbers(self)


def main(argv: list[str] | None = None) -> int:
    """Predict a training step's peak memory and time on a named GPU; needs neither the GPU nor the weights."""
    words = list(argv or [])
    if any(word == "--method" or word.startswith("--method=") for word in words):
        raise UserError("plan takes the method as train does, in front: logratio plan dpo --lora_r 16 ...")
    run, asked = parse(words, "plan", more=PlanConfig, gpu=True, quiet="--json" in words)
    answer = of_run(run, asked)
    if asked.json:
        print(json.dumps(answer))
    else:
        show(answer)
    return 0


def of_run(run: RunConfig, asked: PlanConfig) -> dict[str, Any]:
    """The plan of a run in one process, and what it leaves out. UserError for a loss of the user's own."""
    if run.loss_class != run.method:
        raise UserError("the plan knows no loss of one's own: plan the method that it is like, logratio plan dpo ...")
    run = run.resolved(1)
    longest = run.data.max_length
    prompt = min(asked.prompt_tokens, longest - 1)
    completion = min(asked.completion_tokens, longest - prompt)
    if run.rollout:
        completion = min(asked.completion_tokens, run.loss.max_completion_length)
    settings = run.as_dict()
    options = options_of(settings, gpu=asked.gpu, prompt_tokens=prompt, completion_tokens=completion)
    return {**planned(options), "not_modelled": not_modelled(settings)}


def show(answer: dict[str, Any]) -> None:
    """Two tables and three lines."""
    console = Console(markup=False)
    trained = f"{answer['trained_parameters'] / 1e6:,.1f} M of {answer['parameters'] / 1e6:,.1f} M parameters trained"
    console.print(f"{answer['model']}: {answer['geometry']}; {answer['method']}, {trained}")
    batch = answer["micro_batch"]
    several = "es" if answer["micro_batches"] > 1 else ""
    console.print(
        f"{answer['micro_batches']} micro-batch{several} a step, the largest {counted(batch['rows'], 'row')} of "
        f"{batch['row_length']:,} tokens, {batch['scored_tokens']:,} scored; a prompt of {answer['prompt_tokens']} "
        f"tokens and {counted(answer['completions'], 'completion')} of {answer['completion_tokens']} (--prompt_tokens, "
        "--completion_tokens)"
    )
    spent = {name: value for name, value in answer["parts_mib"].items() if value}
    totals = {
        "peak of torch's allocations": answer["predicted_peak_mem_mib"],
        "CUDA context, not counted by torch": answer["not_counted_by_torch_mib"],
        f"with {MARGIN:.0%} for fragments": answer["needed_mib"],
    }
    console.print(by_part(f"predicted peak memory, in the {answer['peak_moment']}", "MiB", spent, totals, 1))
    console.print(verdict(answer))
    for why in answer.get("not_modelled", ()):
        console.print(f"Not all of it: {why}.")
    whole = {"step": answer["predicted_step_ms"]}
    console.print(by_part(f"predicted step on {answer['gpu']}", "ms", answer["step_parts_ms"], whole, 2))
    console.print(
        f"A roofline estimate: {EFFICIENCY:.0%} of the data sheet's FLOPs, full bandwidth, no launches or packing"
        + (", no generation." if answer["method"] == "grpo" else ".")
    )


def by_part(title: str, unit: str, parts: dict[str, float], totals: dict[str, float], digits: int) -> Table:
    table = Table("part", unit, title=title)
    table.columns[1].justify = "right"
    for rows in (parts, totals):
        for name, value in rows.items():
            table.add_row(name, f"{value:,.{digits}f}")
        table.add_section()
    return table


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
