"""What TRL's trainers are fed: rollouts made into GRPO's batches, and any method's batch read back as sequences."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

Rows = Sequence[Mapping[str, Any]]

ROLLOUT_METHODS = ("grpo", "rloo", "gmpo")
"""Methods whose rows are rollouts."""


class Scored(NamedTuple):
    """One sequence as TRL fed it to the model, padding removed: ids, and for each whether its log-prob is scored."""

    ids: list[int]
    scored: list[bool]

    def split(self) -> tuple[list[int], list[int]]:
        """(prompt ids, completion ids), cut before the first scored token."""
        start = self.scored.index(True) if any(self.scored) else len(self.ids)
        return self.ids[:start], self.ids[start:]


def rollouts(method: str, rows: Rows, pad_token_id: int, num_items_in_batch: int | None = None) -> dict[str, Tensor]:
    """Rollouts as the `compute_loss` of GRPO, GMPO or RLOO takes them: prompts padded left, completions right.

    num_items_in_batch: completion tokens of the optimizer step; of these rows where it is None.
    """

    def padded(name: str, side: str, value: float) -> Tensor:
        return pad_sequence([torch.as_tensor(row[name]) for row in rows], True, value, side)

    def mask(name: str, side: str) -> Tensor:
        return pad_sequence([torch.ones(len(row[name]), dtype=torch.long) for row in rows], True, 0, side)

    batch = {
        "prompt_ids": padded("prompt_ids", "left", pad_token_id),
        "prompt_mask": mask("prompt_ids", "left"),
        "completion_ids": padded("completion_ids", "right", pad_token_id),
        "completion_mask": mask("completion_ids", "right"),
        "advantages": torch.tensor([float(row["advantage"]) for row in rows]),
    }
    for name in ("old_per_token_logps", "ref_per_token_logps"):
        if all(row.get(name) is None for row in rows):
            continue
        for i, row in enumerate(rows):
            if row.get(name) is None or len(row[name]) != len(row["completion_ids"]):
                raise ValueError(f"row {i}: {name} must have one number a completion token, in every row or in none")
        batch[name] = padded(name, "right", 0.0).float()
    if method == "rloo":
        if "old_per_token_logps" not in batch:
            raise ValueError("rloo needs old_per_token_logps in every row: its trainer always computes them")
        batch["old_logps"] = batch["old_per_token_logps"].sum(1)
    batch["num_items_in_batch"] = torch.as_tensor(num_items_in_batch or batch["completion_mask"].sum())
    return batch


def next_rollouts(
    method: str,
    rows: Rows,
    args: Any,
    pad_token_id: int,
    finish: Callable[[Rows, dict[str, Tensor]], dict[str, Tensor]],
) -> Callable[[Any], dict[str, Tensor]]:
    """A `_prepare_inputs` for a trainer of rollouts: every micro-batch is the next rows, not something sampled.

    finish(rows, batch): the batch as the loss takes it.
    """
    size = args.per_device_train_batch_size
    window = size * args.gradient_accumulation_steps
    starts = iter(range(0, len(rows), size))

    def prepare_inputs(_: Any) -> dict[str, Tensor]:
        start = next(starts)
        first = start - start % window
        tokens = sum(len(row["completion_ids"]) for row in rows[first : first + window])
        part = rows[start : start + size]
        return finish(part, rollouts(method, part, pad_token_id, num_items_in_batch=tokens))

    return prepare_inputs


def unpadded(method: str, batch: Mapping[str, Tensor], gold: bool = False) -> dict[str, list[Scored]]:
    """The sequences in a trainer's batch: "completion" (and KTO's "mismatched"), or the sides of a pair.

    gold: the third part of the batch is TPO's gold answers, "reference" after its column.
    """

    def sequences(ids: Tensor, attention: Tensor, scored: Tensor) -> list[Scored]:
        kept = attention.bool()
        return [Scored(i[k].tolist(), s[k].bool().tolist()) for i, k, s in zip(ids, kept, scored, strict=True)]

    if method in ("orpo", "cpo"):
        names = ("chosen", "rejected")
        keys = [[f"{name}_{key}" for key in ("input_ids", "attention_mask", "labels")] for name in names]
        return {
            name: sequences(batch[i], batch[a], batch[k] != -100) for name, (i, a, k) in zip(names, keys, strict=True)
        }
    if method in ROLLOUT_METHODS:
        ids, attention = (torch.cat([batch[f"prompt_{x}"], batch[f"completion_{x}"]], 1) for x in ("ids", "mask"))
        is_completion = torch.arange(ids.shape[1]) >= batch["prompt_ids"].shape[1]
        return {"completion": sequences(ids, attention, is_completion.expand_as(ids))}
    scored = batch["labels"] != -100 if method == "sft" else batch["completion_mask"]
    own = sequences(batch["input_ids"], batch["attention_mask"], scored)
    if method in ("dpo", "tpo"):  # chosen ones first
        sides = ("chosen", "rejected", "reference")[: 2 + gold]
        size = len(own) // len(sides)
        return {name: own[k * size : (k + 1) * size] for k, name in enumerate(sides)}
    if method == "kto" and "KL_input_ids" in batch:
        mismatched = sequences(batch["KL_input_ids"], batch["KL_attention_mask"], batch["KL_completion_mask"])
        return {"completion": own, "mismatched": mismatched}
    return {"completion": own}
