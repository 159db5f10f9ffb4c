"""Whether a run may go on from a checkpoint: it is the same run, but for what never changes its result."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError

MAY_CHANGE = frozenset(
    {
        *("output_dir", "save_steps", "save_total_limit", "micro_batch_tokens"),
        *("ddp_timeout", "dataset_num_proc", "log_completions", "log_completions_steps"),
        *("report_to", "push_to_hub", "hub_model_id", "hub_private_repo"),
        *("vllm_server_base_url", "vllm_server_timeout"),
    }
)
"""Options that a run may go on with changed."""
COMPARED = frozenset({"metric_for_best_model", "greater_is_better"})
"""The same of one that has compared no evaluation yet."""


def differences(saved: Mapping[str, Any], now: Mapping[str, Any], may_change: Collection[str]) -> list[str]:
    """What else differs between two `RunConfig.as_dict`: "--learning_rate 0.1, was 0.01"."""
    one, other = flat(saved), flat(now)
    found = []
    for name in sorted(one.keys() | other.keys()):
        if name in may_change or one.get(name) == other.get(name):
            continue
        was = f"was {shown(one[name])}" if name in one else "which the checkpoint does not know"
        found.append(f"{name} {shown(other[name])}, {was}" if name in other else f"no {name}, {was}")
    return found


def flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Options by their names on the command line; lists and tuples are alike, as in JSON."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            found |= flat(value)
        else:
            found[name] = list(value) if isinstance(value, tuple) else value
    return found


def check_options(folder: Path, saved: Mapping[str, Any], now: Mapping[str, Any], *, compared: bool) -> None:
    """Raise UserError where the options are others than those of the checkpoint's run. compared: whether that has
    compared evaluations."""
    found = differences(saved, now, MAY_CHANGE if compared else MAY_CHANGE | COMPARED)
    if found:
        raise UserError(
            f"{folder} is of a run with other options ({'; '.join(found)}): go on with the same ones, or start a new "
            "run in another --output_dir"
        )


def shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
