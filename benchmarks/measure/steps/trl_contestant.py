"""TRL's trainers as contestants: built as its users build them, taking their steps as `Trainer.train` does.

The update around a step (clipping, AdamW) is the one of all contestants. Batches are made by the trainer's own collator
from the examples' token ids, so that both sides see the same tokens without a tokenizer of the model's vocabulary.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from logratio.losses import Kind
from logratio.reference._trl_batches import rollouts
from logratio.reference._trl_drive import constructed
from logratio.trainers.data.examples import Completion, Example
from logratio.trainers.loop import count_tokens
from logratio.trainers.policy.mismatch import mismatched
from logratio.trainers.policy.reference import inference, tokens_key
from logratio.trainers.policy.tiny import tiny_tokenizer

from .contestants import LEARNING_RATE, MAX_GRAD_NORM, OldLogps, apply_update
from .step_cases import StepCase


class Trl:
    """TRL's trainer, perhaps with Liger's kernels for the model's layers. Close it with the stack that it was given.

    old, ref: log-probs of rollouts: of the policy that sampled them, and of the reference. more: options by its
    configuration's names, beside or instead of those that the case decides. max_grad_norm: to which its update clips.
    """

    def __init__(
        self,
        case: StepCase,
        model: Any,
        ref_model: Any,
        device: torch.device,
        stack: ExitStack,
        *,
        liger: bool = False,
        old: OldLogps | None = None,
        ref: OldLogps | None = None,
        more: Mapping[str, Any] | None = None,
        max_grad_norm: float = MAX_GRAD_NORM,
    ) -> None:
        self.case, self.device, self.old, self.ref, self.ref_model = case, device, old, ref, ref_model
        self.max_grad_norm = max_grad_norm
        options: dict[str, Any] = {
            "per_device_train_batch_size": 2,
            "learning_rate": LEARNING_RATE,
            "optim": "adamw_torch_fused",  # its default
            "use_cpu": device.type == "cpu",
            # on a GPU as its users have it, with autocast on weights in bfloat16
            "bf16": case.dtype == "bfloat16" and device.type == "cuda",
            "gradient_checkpointing": case.gradient_checkpointing,
            "use_liger_kernel": liger,
        }
        arguments: dict[str, Any] = {"ref_model": ref_model}
        grouped = case.loss.kind is Kind.GROUPED
        if grouped:
            options |= {"num_generations": 2}
            arguments = {"reward_funcs": [lambda completions, **_: [0.0] * len(completions)]}
        else:
            options["max_length"] = case.max_length
        options |= dict(more or {})
        beta = options.get("beta", 0.0)
        options |= {"beta": 0.0} if grouped else {}  # or it would load a reference of its own
        entered = constructed(
            case.method, model, tiny_tokenizer(), placeholder(case), options, copied=False, **arguments
        )
        self.trainer = trainer = stack.enter_context(entered)
        # what `Trainer.train` does before its first step
        if case.gradient_checkpointing:
            trainer.model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
        self.names = liger_names(trainer) if liger else {}
        if grouped:
            trainer._prepare_inputs = lambda batch: {k: v.to(device) for k, v in batch.items()}
            trainer.beta = beta
        trainer.create_optimizer()
        trainer.model_wrapped, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
        self.model, self.optimizer = trainer.model, trainer.optimizer
        self.attention = trainer.accelerator.unwrap_model(trainer.model).config._attn_implementation

    def prepare(self, window: Sequence[Example], per_micro_batch: int | None = None) -> list[Any]:
        """The step's micro-batches, collated by the trainer."""
        per = per_micro_batch or self.case.per_micro_batch(list(window))
        rows = ROWS[self.case.method](self.case, window)
        for who, table in (("old", self.old), ("ref", self.ref)):
            if table is not None:  # without old ones, the policy that sampled the rollouts is today's
                logps = [x for e in window for x in table[tokens_key(e)]]
                rows = [row | {f"{who}_per_token_logps": x} for row, x in zip(rows, logps, strict=True)]
        parts = [rows[i : i + per] for i in range(0, len(rows), per)]
        if self.case.loss.kind is not Kind.GROUPED:
            return [self.trainer.data_collator(part) for part in parts]
        tokens = sum(len(row["completion_ids"]) for row in rows)
        return [rollouts("grpo", part, 0, num_items_in_batch=tokens) for part in parts]

    def backward(self, batch: list[Any], following: Any = None) -> None:
        trainer = self.trainer
        trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps = len(batch)
        samples, tokens = trainer.get_batch_samples(iter(batch), len(batch), self.device)
        with put_in(modeling(trainer.model), self.names):
            for micro in samples:
                trainer.training_step(trainer.model_wrapped, dict(micro), tokens)

    def update(self) -> None:
        apply_update(self.optimizer, self.max_grad_norm)

    def computed(self, window: Sequence[Example]) -> tuple[int, int]:
        return self.case.padded_by_peer(list(window)), count_tokens(window)

    def logps(self, examples: Sequence[Example]) -> Tensor:
        parts = []
        with inference(self.model), put_in(modeling(self.trainer.model), self.names):
            for example in examples:
                for completion in example.completions:
                    ids = torch.tensor([example.prompt_ids + completion.ids], device=self.device)
                    logits = self.trainer.model_wrapped(input_ids=ids, use_cache=False).logits[0].float()
                    logits, targets = logits[len(example.prompt_ids) - 1 : -1], ids[0, len(example.prompt_ids) :]
                    parts.append(logits.log_softmax(-1).gather(1, targets[:, None])[:, 0])
        return torch.cat(parts)


def modeling(model: Any) -> dict[str, Any]:
    """The names of the module that the model's architecture is written in."""
    causal_lm = model.get_base_model() if hasattr(model, "peft_config") else model
    return vars(sys.modules[type(causal_lm).__module__])


def liger_names(trainer: Any) -> dict[str, Any]:
    """Put Liger's layers into the trainer's model; the names that it would put into the model's module for everyone.

    Liger replaces RoPE there, and the classes of later models: of the other contestants, and of the cases to come.
    """
    from transformers.integrations.liger import apply_liger_kernel

    names = modeling(trainer.model)
    before = dict(names)
    apply_liger_kernel(trainer.model, trainer.args.liger_kernel_config)
    changed = {name: value for name, value in names.items() if name in before and before[name] is not value}
    names.update({name: before[name] for name in changed})
    return changed


@contextmanager
def put_in(names: dict[str, Any], values: Mapping[str, Any]) -> Iterator[None]:
    """Inside, `names` has these values."""
    before = {name: names[name] for name in values}
    names.update(values)
    try:
        yield
    finally:
        names.update(before)


def placeholder(case: StepCase) -> list[dict[str, Any]]:
    """Rows that the trainer may tokenize when it is built; it is never trained on them."""
    row = {"prompt": "a b", "completion": " c", "chosen": " c", "rejected": " d", "reference": " e", "label": True}
    names = {
        Kind.PAIRED: ("prompt", "chosen", "rejected", *(["reference"] if case.loss.scores_gold else [])),
        Kind.LABELED: ("prompt", "completion", "label"),
        Kind.GROUPED: ("prompt",),
    }.get(case.loss.kind, ("prompt", "completion"))
    return [{name: row[name] for name in names} for _ in range(4)]


def sft_rows(case: StepCase, window: Sequence[Example]) -> list[dict[str, Any]]:
    return [
        {"input_ids": e.prompt_ids + c.ids, "labels": [-100] * len(e.prompt_ids) + scored_ids(c)}
        for e in window
        for c in e.completions
    ]


def scored_ids(completion: Completion) -> list[int]:
    """Labels: -100 where the loss sees nothing."""
    if completion.scored is None:
        return completion.ids
    return [i if on else -100 for i, on in zip(completion.ids, completion.scored, strict=True)]


def pair_rows(case: StepCase, window: Sequence[Example]) -> list[dict[str, Any]]:
    """TPO's with the gold answer, where the loss scores it."""
    names = ("chosen", "rejected", "reference")
    return [
        {"prompt_ids": e.prompt_ids, **{f"{n}_ids": c.ids for n, c in zip(names, e.completions, strict=False)}}
        for e in window
    ]


def kto_rows(case: StepCase, window: Sequence[Example]) -> list[dict[str, Any]]:
    others = mismatched(window, case.max_length)
    return [
        {
            "prompt_ids": e.prompt_ids,
            "completion_ids": e.completions[0].ids,
            "KL_completion_ids": other.completions[0].ids,
            "label": e.label,
        }
        for e, other in zip(window, others, strict=True)
    ]


def orpo_rows(case: StepCase, window: Sequence[Example]) -> list[dict[str, Any]]:
    rows = []
    for e in window:
        row: dict[str, Any] = {"prompt_input_ids": e.prompt_ids, "prompt_attention_mask": [1] * len(e.prompt_ids)}
        for name, completion in zip(("chosen", "rejected"), e.completions, strict=True):
            ids = e.prompt_ids + completion.ids
            row[f"{name}_input_ids"], row[f"{name}_attention_mask"] = ids, [1] * len(ids)
            row[f"{name}_labels"] = [-100] * len(e.prompt_ids) + completion.ids
        rows.append(row)
    return rows


def grpo_rows(case: StepCase, window: Sequence[Example]) -> list[dict[str, Any]]:
    return [
        {"prompt_ids": e.prompt_ids, "completion_ids": c.ids, "advantage": a}
        for e in window
        for c, a in zip(e.completions, e.advantages or (), strict=True)
    ]


ROWS = {
    "sft": sft_rows,
    "dpo": pair_rows,
    "kto": kto_rows,
    "orpo": orpo_rows,
    "cpo": orpo_rows,
    "tpo": pair_rows,
    "grpo": grpo_rows,
}
"""method -> examples as the rows that TRL's collator takes."""
