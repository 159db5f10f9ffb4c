"""Options of the optimizer, the schedule and the precision."""

from __future__ import annotations

from .rules import rule
from .verdicts import Asked, Verdict, number

OPTIMIZERS = {
    "adamw_torch_fused": "adamw_torch",
    "adamw_hf": "adamw_torch",
    "adamw_apex_fused": "adamw_torch",
    "adamw_bnb_8bit": "adamw_8bit",
    "paged_adamw": "paged_adamw_32bit",
}
"""transformers' name -> ours of the same algorithm."""


@rule("bf16")
def bf16(a: Asked) -> Verdict:
    """mixed_precision bf16."""
    if not a.value:
        return a.no_effect("no autocast unless it is asked for")
    return a.translated(mixed_precision="bf16")


@rule("fp16")
def fp16(a: Asked) -> Verdict:
    """mixed_precision fp16; without a GPU, which it needs, without effect."""
    if not a.value:
        return a.no_effect("no autocast unless it is asked for")
    if a.says("bf16"):
        return a.refused("bf16 is asked for too; leave one of them out")
    if not a.gpu:
        return a.no_effect("autocast to float16 needs a GPU, and there is none: without autocast")
    return a.translated(mixed_precision="fp16")


@rule("optim")
def optimizer(a: Asked) -> Verdict:
    """AdamW under all its names; other optimizers are refused."""
    name = str(a.value)
    if name in ("adamw_torch", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"):
        return a.taken()
    if name in OPTIMIZERS:
        return a.translated("the same algorithm", optim=OPTIMIZERS[name])
    return a.refused("the optimizer is AdamW: adamw_torch, adamw_8bit, paged_adamw_32bit or paged_adamw_8bit")


@rule("max_steps")
def steps(a: Asked) -> Verdict:
    """As here; -1: as many as num_train_epochs takes."""
    return a.taken() if a.number() > 0 else a.no_effect("num_train_epochs says how long to train")


@rule("lr_scheduler_type")
def schedule(a: Asked) -> Verdict:
    """All of transformers' but reduce_lr_on_plateau and greedy, which follow a metric."""
    from ..config.train import Schedule

    known = Schedule.__args__  # type: ignore[attr-defined]
    return a.taken() if a.value in known else a.refused(f"must be one of {', '.join(known)}")


@rule("lr_scheduler_kwargs")
def schedule_options(a: Asked) -> Verdict:
    """As here, but with constant, which has none."""
    if a.value in ({}, "", "{}") or a.says("lr_scheduler_type") == "constant":
        return a.no_effect("the schedule has no options")
    return a.taken()


@rule("warmup_steps")
def warmup(a: Asked) -> Verdict:
    """As here, below 1 a share of all steps; with lr_scheduler_type constant without effect, as in TRL."""
    if a.says("warmup_ratio") and not a.number():
        return a.no_effect("warmup_ratio says how long")
    return _warmup(a)


@rule("warmup_ratio")
def warmup_ratio(a: Asked) -> Verdict:
    """warmup_steps below 1, the share of all steps, unless warmup_steps is given too."""
    if a.says("warmup_steps") and number(a.file["warmup_steps"]) > 0:
        return a.no_effect("warmup_steps goes before it, as in transformers")
    return _warmup(a)


def _warmup(a: Asked) -> Verdict:
    if a.says("lr_scheduler_type") == "constant" and a.number() > 0:
        return a.no_effect("the constant schedule has no warm-up, in TRL neither: constant_with_warmup has")
    return a.taken() if a.key == "warmup_steps" else a.translated(warmup_steps=a.number())


@rule("report_to")
def trackers(a: Asked) -> Verdict:
    """As here: names of trackers, or all; none: metrics.jsonl alone."""
    names = [a.value] if isinstance(a.value, str) else list(a.value)
    if all(name == "none" for name in names):
        return a.no_effect("every step is a line of metrics.jsonl")
    return a.taken() if isinstance(a.value, list) else a.translated(report_to=names)


@rule("data_seed")
def data_seed(a: Asked) -> Verdict:
    """The seed, if anything."""
    if a.value == a.says("seed", 42):
        return a.no_effect("the order of the data comes from seed")
    return a.refused("the order of the data comes from seed too; leave it out, or set seed")
