"""What was measured, in words and numbers: for the page, the terminal and the lines of JSON alike."""

from __future__ import annotations

import statistics
from typing import Any

from ..pages.words import duration, number
from .budgets import Budget
from .measuring import OURS, TRL, Figures, Measured

GPU_MEMORY, CPU_MEMORY = "peak memory", "kept for the backward pass"
COLUMNS = ("", "step, ms", "tokens/s", "examples/s", "time / ours", "memory, MiB", "host, ms")


def ms(value: float | None) -> str:
    return "–" if value is None else number(value, 3)


def mib(value: float | None) -> str:
    return "–" if value is None else number(value, 4 if value < 1e4 else 5)


def is_gpu(found: Measured) -> bool:
    return found.subject.device.type == "cuda"


def memory_of(row: Figures) -> float | None:
    """The peak, or on a CPU what autograd keeps."""
    value = row.get("peak_mem_mib")
    return row.get("saved_mib") if value is None else value


def line_of(name: str, row: Figures, short: bool = False) -> list[str]:
    """A contestant in `COLUMNS`. short: without the spread of its time."""
    spread = (
        ms(row["step_ms_p50"])
        if short
        else f"{ms(row['step_ms_p50'])} ({ms(row['step_ms_p20'])} to {ms(row['step_ms_p80'])})"
    )
    rate = [number(row["tokens_per_s"], 3), number(row["examples_per_s"], 3), f"{row['time_to_ours']:.2f}"]
    return [name, spread, *rate, mib(memory_of(row)), ms(row["host_ms"])]


def verdict(found: Measured) -> str:
    """One sentence on TRL; empty where it was not asked for."""
    row = found.rows.get(TRL)
    if row is None:
        return ""
    if row["status"] != "ok":
        why = {"refused": "not measured", "oom": "out of memory", "failed": "failed"}[row["status"]]
        return f"TRL: {why}: {row['error']}"
    ratio, (ours, theirs) = row["time_to_ours"], (memory_of(found.rows[OURS]), memory_of(row))
    said = f"{ratio:.2f} times faster than TRL" if ratio >= 1 else f"{1 / ratio:.2f} times slower than TRL"
    if ours and theirs:
        said += f", with {ours / theirs:.2f} times its memory"
    said += f"; the gradients differ by {row['grad_rel_err']:.1e}"
    subject = found.subject
    if subject.grouped and subject.run.step.reference is not None:
        said += "; the reference's pass is in our step, and in TRL's rollouts, which are not timed"
    return said


def budget_lines(found: Measured) -> list[str]:
    """What to set `micro_batch_tokens` to."""
    looked = found.budgets
    if looked is None:
        return []
    told = []
    fastest = looked.of(looked.fastest)
    if fastest is not None and fastest.tokens != looked.asked and fastest.to_asked:
        told.append(
            f"fastest: --micro_batch_tokens {fastest.tokens}, {100 * (1 - fastest.to_asked):.0f} % less time than "
            f"{looked.asked}"
        )
    elif fastest is not None:
        told.append(f"fastest: --micro_batch_tokens {looked.asked}, as it is")
    if looked.largest is None:
        told.append("largest: none that was tried fits")
    elif looked.bound == "memory":
        beyond = min((one.tokens for one in looked.budgets if one.why_not), default=0)
        told.append(f"largest: --micro_batch_tokens {looked.largest} fits, {beyond} does not")
    elif (largest := looked.of(looked.largest)) is not None:
        told.append(
            f"largest: --micro_batch_tokens {looked.largest} fits, and more changes nothing: the largest micro-batch "
            f"of these steps then has {largest.largest:,} tokens"
        )
    return told


def outcome(budget: Budget, found: Measured) -> str:
    """What a budget's row says in its last column."""
    looked = found.budgets
    assert looked is not None
    words = [
        *(["asked for"] if budget.tokens == looked.asked else []),
        *(["fastest"] if budget.tokens == looked.fastest else []),
        *(["largest"] if budget.tokens == looked.largest else []),
    ]
    return budget.why_not or ", ".join(words)


def rollout_line(found: Measured) -> str:
    """What comes before GRPO's update; empty for the others."""
    if not found.rollout_ms:
        return ""
    middle, step = statistics.median(found.rollout_ms), found.rows[OURS]["step_ms_p50"]
    per = found.subject.run.config.rollout.num_iterations  # type: ignore[union-attr]
    share = middle / (middle + per * step)
    took = f"{duration(middle / 1e3)} a batch of prompts, {100 * share:.0f} % of its time"
    return f"rollouts: {took}; the steps are without them"


def record(found: Measured, name: str) -> dict[str, Any]:
    """A contestant's figures as a line of JSON has them."""
    row = dict(found.rows[name])
    if name == OURS:
        row |= {"parts": found.parts, "memory_mib": found.memory, "planned_mib": found.plan.parts or None}
        row |= {"planned_step_ms": found.plan.step_ms, "no_plan": found.plan.why_not or None}
        row |= {"rollout_ms_p50": statistics.median(found.rollout_ms) if found.rollout_ms else None}
        if (looked := found.budgets) is not None:
            row["budgets"] = [vars(one) for one in looked.budgets]
            row |= {"largest": looked.largest, "largest_bound_by": looked.bound, "fastest": looked.fastest}
    return row
