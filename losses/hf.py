"""A loss for Hugging Face's Trainer, whatever it cuts a step into.

Trainer(model, args, train_dataset=..., compute_loss_func=hf_compute_loss(SFTLoss(loss_type="dft")))
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from .types import CompletionLogps, Kind, Loss, Totals


def hf_compute_loss(loss: Loss) -> Callable[..., Tensor]:
    """compute_loss_func(outputs, labels, num_items_in_batch) of transformers' Trainer.

    loss: of one completion each (Kind.SEQUENCE), without a pass over the whole step. The value is the micro-batch's sum
    divided by `num_items_in_batch`, which the Trainer counts over the whole optimizer step (labels that are not -100;
    over processes too with average_tokens_across_devices, its default), so that the gradient is the same however the
    step is cut. Differs from `logratio train`: a token at a row's beginning counts among these, though nothing predicts
    it. Without num_items_in_batch (an evaluation) the batch is a step by itself. Raises ValueError for other losses.
    """
    if loss.kind is not Kind.SEQUENCE or loss.wants_reference or loss.window_pass is not None or loss.divergence:
        raise ValueError(
            f"{type(loss).__name__} needs more than logits and labels; hf_compute_loss takes losses of single "
            "completions such as SFTLoss"
        )

    def compute_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs.logits
        policy = CompletionLogps.from_logits(logits, labels, stats=loss.stats)
        totals = Totals.of(policy)
        if num_items_in_batch is not None:
            totals = replace(totals, num_tokens=float(num_items_in_batch))
        return loss(policy, totals=totals).loss

    return compute_loss
