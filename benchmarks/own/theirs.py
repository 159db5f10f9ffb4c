"""TRL's side: its trainer with the run's options, on the same weights and tokens; or why there is none."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import nn

from logratio.losses import Kind, Loss
from logratio.reference._trl_drive import METHODS, _classes
from logratio.trainers.config import RunConfig
from logratio.trainers.data.examples import Example
from logratio.trainers.policy.adapters import add_adapters
from logratio.trainers.policy.load import load_model

from ..measure.steps.step import Refused
from ..measure.steps.step_cases import StepCase
from ..measure.steps.trl_contestant import Trl
from ..peers.cases import CASES
from .subject import Subject


@dataclass(frozen=True)
class OwnCase(StepCase):
    """The run as the case of a step. own: its loss. longest: its max_length. per: completions or examples of TRL's
    micro-batches, where the run's options say so."""

    own: Any = None
    longest: int = 1024
    per: int | None = None

    @property
    def loss(self) -> Loss:
        return self.own  # type: ignore[no-any-return]

    @property
    def max_length(self) -> int:
        return self.longest

    def per_micro_batch(self, window: list[Example]) -> int:
        return self.per or super().per_micro_batch(window)


def case_of(asked: RunConfig, config: RunConfig) -> OwnCase:
    """asked: the run as it was given, with TRL's spelling of its batch size. config: with every default."""
    model, train = config.model, config.train
    adapters = bool(model.lora_r or model.adapter_name_or_path)
    return OwnCase(
        config.method,
        ("qlora" if model.load_in_4bit else "lora") if adapters else "full",
        model.model_name_or_path,
        ", ".join(name.rstrip("/").split("/")[-1] for name in config.data.dataset_name),
        train.batch_size or 0,
        train.first_micro_batch_tokens,
        dtype="bfloat16" if train.mixed_precision != "no" else model.dtype,
        gradient_checkpointing=model.gradient_checkpointing,
        num_generations=config.rollout.num_generations if config.rollout else 1,
        lora_r=model.lora_r,
        own=config.loss,
        longest=config.data.max_length,
        per=asked.train.per_device_train_batch_size,
    )


def trl_options(config: RunConfig) -> dict[str, Any]:
    """The run's options by the names of TRL's configuration. Raises Refused naming what it has not."""
    model, train = config.model, config.train
    named = {f.name for f in dataclasses.fields(configuration(config.method))}
    options: dict[str, Any] = loss_options(config.method, config.loss, named)
    options |= {
        "learning_rate": train.learning_rate,
        "weight_decay": train.weight_decay,
        "adam_beta1": train.adam_beta1,
        "adam_beta2": train.adam_beta2,
        "adam_epsilon": train.adam_epsilon,
        "optim": "adamw_torch_fused" if train.optim == "adamw_torch" else train.optim,
        "bf16": train.mixed_precision == "bf16",
    }
    if config.rollout is not None:
        options["temperature"] = config.rollout.temperature
    if "disable_dropout" in named:  # it is off already, and TRL would switch that of new adapters off too
        options["disable_dropout"] = False
    reasons = {
        "--mixed_precision fp16": train.mixed_precision == "fp16",
        "--precompute_ref_log_probs": model.precompute_ref_log_probs,
        "--sync_ref_model with adapters": model.sync_ref_model and bool(model.lora_r or model.adapter_name_or_path),
        "--adapter_name_or_path as its own reference": bool(model.adapter_name_or_path) and config.wants_reference,
        "--mask_truncated_completions": config.rollout is not None and config.rollout.mask_truncated_completions,
    }
    if told := [name for name, given in reasons.items() if given]:
        raise Refused(f"with {' and '.join(told)} the comparison with TRL is not set up")
    return options


def configuration(method: str) -> Any:
    """TRL's class of the method's options. Raises Refused where it is not installed, or another version is."""
    try:
        return _classes(method)[1]
    except ImportError as error:
        raise Refused(str(error)) from error


def loss_options(method: str, loss: Loss, named: set[str]) -> dict[str, Any]:
    """Those of the loss that are not its defaults, which are TRL's. Raises Refused naming what TRL has not."""
    known = {c.options.get("loss_type"): c.trl for c in reversed(CASES) if c.method == method and c.trl}
    types = getattr(loss, "loss_type", None)
    for one in types if isinstance(types, tuple) else (types,):
        if known.get(one, method if one is None else None) is None:
            raise Refused(f"TRL has no loss_type {one}")
        if known.get(one, method) != method:
            raise Refused(f"TRL has no loss_type {one}, but a trainer of its own for it")
    given = {
        f.name: value
        for f in dataclasses.fields(loss)  # type: ignore[arg-type]
        if (value := getattr(loss, f.name)) != f.default
    }
    if missing := [name for name in given if name not in named]:
        raise Refused(f"TRL's {method} has no option {' and no '.join(missing)}")
    if types == "cispo":
        given["epsilon_high"] = loss.epsilons[1]  # type: ignore[attr-defined]  # TRL's default is another
    return given


def check_rows(subject: Subject) -> None:
    """Raises Refused where the rows have what TRL's have not."""
    completions = [c for window in subject.windows for e in window for c in e.completions]
    if any(c.weights is not None for c in completions):
        raise Refused("TRL has no weights of tokens, which these rows have")
    if subject.run.config.method != "sft" and any(c.scored is not None for c in completions):
        raise Refused("TRL has no masks within a completion, which these rows have")


def make_trl(subject: Subject, case: OwnCase, stack: ExitStack) -> Trl:
    """TRL's trainer of this run. Raises Refused where the same cannot be asked of it."""
    config = subject.run.config
    if config.method not in METHODS or config.loss_class != config.method:
        raise Refused("TRL has no such loss")
    more = trl_options(config)
    check_rows(subject)
    model = plain_model(subject)
    ref_model = None
    if config.wants_reference and subject.ref_model is not None and config.loss.kind is not Kind.GROUPED:
        ref_model = loaded(subject, name=config.model.ref_model_name_or_path)
        share_weights(ref_model, subject.ref_model, every=True)
    return Trl(
        case,
        model,
        ref_model,
        subject.device,
        stack,
        liger=config.model.use_liger_kernel,
        old=subject.of_rollouts("old"),
        ref=subject.reference_logps() if config.loss.kind is Kind.GROUPED else None,
        more=more,
        max_grad_norm=config.train.max_grad_norm or float("inf"),
    )


def plain_model(subject: Subject) -> Any:
    """The run's model without what we make faster in it, over the same frozen weights; what trains is copied."""
    config = subject.run.config.model
    unfused = dataclasses.replace(config, fused_lora=False, gradient_checkpointing=False)
    model = add_adapters(loaded(subject), unfused, frozen_copy=False)
    share_weights(model, subject.run.policy.model)
    return model.train()


def loaded(subject: Subject, name: str | None = None) -> Any:
    """A bare model as transformers has it."""
    config = subject.run.config
    plain = dataclasses.replace(config.model, fused_layers=False, use_liger_kernel=False)
    return load_model(plain, subject.device, seed=config.train.seed, name=name)


def share_weights(model: nn.Module, source: nn.Module, every: bool = False) -> None:
    """Give `model` the frozen parameters of `source` by name (every: all), and the values of those that train."""
    theirs = dict(source.named_parameters(remove_duplicate=False))
    for name, own in list(model.named_parameters(remove_duplicate=False)):
        if own.requires_grad and not every:
            own.data.copy_(theirs[name].data)
            continue
        parent, _, leaf = name.rpartition(".")
        model.get_submodule(parent)._parameters[leaf] = theirs[name]
