"""What TRL 1.16 does by default otherwise than here, under the same option or another's name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from .verdicts import Kind, Verdict, said

_ALL = {
    "output_dir": "trainer_output",
    "per_device_train_batch_size": 8,
    "bf16": True,
    "gradient_checkpointing": True,
    "save_steps": 500,
}
_SAMPLED = {**_ALL, "disable_dropout": False, "log_completions": False}
TRL_DEFAULTS: dict[str, dict[str, Any]] = {
    "sft": _ALL,
    "dpo": _ALL,
    "kto": {**_ALL, "train_sampling_strategy": "sequential"},
    "orpo": _ALL,
    "cpo": _ALL,
    "tpo": _ALL,
    "grpo": _SAMPLED,
    "rloo": {**_SAMPLED, "num_generations": 2, "beta": 0.05},
}
"""method of TRL -> option -> its default there, where ours differs (bf16: as it is resolved, unless fp16 is set)."""


class Here(NamedTuple):
    """What is done here where a file leaves an option out. unless: options that decide it too. methods: TRL's that it
    is told for, all of them where empty; needs: an option and its value, without which it is not."""

    here: str
    unless: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    needs: tuple[str, Any] | None = None


HERE = {
    "bf16": Here("no autocast", unless=("fp16", "mixed_precision")),
    "per_device_train_batch_size": Here(
        "a step of 8 prompts, where TRL's is of 8 completions",
        unless=("batch_size", "gradient_accumulation_steps"),
        methods=("grpo", "rloo"),
    ),
    "train_sampling_strategy": Here("rows are shuffled", unless=("shuffle", "no_shuffle")),
    "disable_dropout": Here("true: without the model's own dropout"),
    "num_generations": Here("8"),
    "log_completions": Here("true: they are kept in completions.parquet", unless=("log_completions_steps",)),
    "beta": Here("no divergence is taken off the reward", unless=("reward_kl_coef",)),
    "save_steps": Here(
        "the trained model alone is saved", unless=("save_strategy", "save_total_limit", "load_best_model_at_end")
    ),
}
"""The options of `TRL_DEFAULTS` on which a run's result, or what it leaves, depends."""
ALSO = {
    "lora_target_modules": ("PEFT's choice for the architecture", Here("all-linear", needs=("use_peft", True))),
    "use_bnb_nested_quant": (False, Here("true", needs=("load_in_4bit", True), unless=("bnb_4bit_use_double_quant",))),
    "epsilon_high": (
        "epsilon's 0.2, as a cap",
        Here("5", needs=("loss_type", "cispo"), unless=("epsilon",)),
    ),
    "vllm_importance_sampling_mode": (
        "sequence_mask, at 3",
        Here(
            "none: nothing is corrected for",
            needs=("use_vllm", True),
            unless=(
                *("vllm_importance_sampling_correction", "vllm_importance_sampling_clip_min"),
                *("vllm_importance_sampling_clip_max", "sampling_correction"),
            ),
        ),
    ),
}
"""The same for options of TRL's scripts and of one loss: option -> (TRL's default, ours)."""


def absent_of(method: str, file: Mapping[str, Any]) -> list[Verdict]:
    """The defaults of TRL that a file relies on without a word, and what is done here instead."""
    found = {name: (value, HERE[name]) for name, value in TRL_DEFAULTS.get(method, {}).items() if name in HERE}
    verdicts = []
    for name, (value, here) in {**found, **ALSO}.items():
        given = {key for key, one in file.items() if one is not None}
        if given & {name, *here.unless} or (here.methods and method not in here.methods):
            continue
        if here.needs and file.get(here.needs[0]) != here.needs[1]:
            continue
        verdicts.append(Verdict(name, value, Kind.ABSENT, {}, f"TRL's default is {said(value)}, here {here.here}"))
    return verdicts
