"""Whether it is one run: the same that a checkpoint is of, but for what never changes its result, and the same on every
process."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from ..config import ONCE, RunConfig
from ..errors import UserError
from ..ground.provenance import versions

MAY_CHANGE = frozenset(
    {
        *("output_dir", "model_revision", "save_steps", "save_total_limit", "micro_batch_tokens"),
        *("ddp_timeout", "dataset_num_proc", "log_completions", "log_completions_steps"),
        *("report_to", "push_to_hub", "hub_model_id", "hub_private_repo"),
        *("vllm_server_base_url", "vllm_server_timeout"),
    }
)
"""Options that a run may go on with changed."""
COMPARED = frozenset({"metric_for_best_model", "greater_is_better"})
"""The same of one that has compared no evaluation yet."""
EACH_ITS_OWN = frozenset(
    {
        *("output_dir", "dataset_num_proc", "report_to", "push_to_hub", "hub_model_id", "hub_private_repo"),
        *("dataset_name", "model_name_or_path", "adapter_name_or_path", "ref_model_name_or_path"),
        *("teacher_model_name_or_path", "chat_template_path"),
    }
)
"""Options in which the processes of a run may differ: what the main one alone reads, and where a node has its files,
whose content is compared once it is read."""
FINGERPRINTS = {
    "data": "on other data than are there now",
    "frozen": "from other weights than are there now",
    "configured": "with another configuration of its model or adapter (config.json, adapter_config.json) than is there "
    "now",
}


def differences(
    saved: Mapping[str, Any],
    now: Mapping[str, Any],
    may_change: Collection[str],
    *,
    was: str = "was",
    unknown: str = "which the checkpoint does not know",
) -> list[str]:
    """What else differs between two `RunConfig.as_dict`: "--learning_rate 0.1, was 0.01". was, unknown: what is said of
    the first, where it has the option and where it has not."""
    one, other = flat(saved), flat(now)
    found = []
    for name in sorted(one.keys() | other.keys()):
        if name in may_change or one.get(name) == other.get(name):
            continue
        before = f"{was} {shown(one[name])}" if name in one else unknown
        found.append(f"{name} {shown(other[name])}, {before}" if name in other else f"no {name}, {before}")
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


def agreed(config: RunConfig, accelerator: Accelerator) -> RunConfig:
    """The configuration with the main process's `output_dir`, which may have a time in its name. Raises UserError, on
    all processes, where one has other options than the main one: they would take other steps, or wait for ever."""
    if accelerator.num_processes == 1:
        return config
    begun = {name: getattr(part, name) for part in (config.train, config.save) for name in ONCE if hasattr(part, name)}
    main, *others = gather_object([config.as_dict() | begun])
    for rank, theirs in enumerate(others, start=1):
        found = differences(main, theirs, EACH_ITS_OWN, was="of process 0", unknown="which process 0 has not")
        if found:
            raise UserError(f"process {rank} has other options than process 0 ({'; '.join(found)}): give all the same")
    return dataclasses.replace(config, train=dataclasses.replace(config.train, output_dir=main["train"]["output_dir"]))


def check_fingerprints(folder: Path, saved: Mapping[str, Any], now: Mapping[str, str]) -> None:
    """Raise UserError where something of the same name is another than it was. saved, now: `FINGERPRINTS`."""
    same = saved["versions"].get("transformers") == versions().get("transformers")  # others read it in another way
    for name, what in FINGERPRINTS.items():
        was = saved.get(name, now[name])  # checkpoints of before do not know their configuration
        if was != now[name] and (same or name != "configured"):
            raise UserError(
                f"{folder} was trained {what}, under the same name: put the old one back, or start a new run in "
                "another --output_dir"
            )


def shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
