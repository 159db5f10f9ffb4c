"""A teacher beside the policy: which may be one, what its next words are, and what it says of sampled tokens.

Of a loss that is anchored the teacher is the policy as it was when training began.

On-policy distillation (Agarwal et al., arXiv 2306.13649; Gu et al., arXiv 2306.08543) goes down the reverse divergence
KL(p || p_T) = E_p[log p - log p_T] of what the policy itself samples. With A_t = log p_T(y_t) - log p_old(y_t), a
constant, as the advantage of token y_t, GRPO's -rho A has this gradient where rho = 1: that of log p under the
expectation is 0. It is the divergence of the next token alone at every place that the policy comes to; what a token
does to later places is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from logratio.losses import Loss, Mean

from ..batches.packing import PackedBatch
from ..batches.values import by_completion
from ..config import RunConfig
from ..data.examples import Example
from ..errors import UserError
from .policy import Policy
from .reference import AdapterReference, ModelReference, other_model

Teacher = ModelReference | AdapterReference


def check_teacher(tokenizer: Any, of_teacher: Any, name: str) -> None:
    """Raise UserError unless both tokenizers have the same ids for what both know: the models meet in ids alone.

    Either may know more, as a padding token that was added to one of them.
    """
    own, theirs = tokenizer.get_vocab(), of_teacher.get_vocab()
    by_id = {number: token for token, number in theirs.items()}
    for token, number in own.items():
        if theirs.get(token, number) != number or by_id.get(number, token) != token:
            raise UserError(
                f"--teacher_model_name_or_path {name} has another tokenizer: {token!r} is {number} to the model, and "
                f"{number} to the teacher is {by_id.get(number, 'nothing')!r}; distill from a model of the same family"
            )


def make_teacher(config: RunConfig, policy: Policy, accelerator: Accelerator) -> tuple[Teacher | None, list[str]]:
    """The teacher that the run names, frozen, and what to tell about it; or what training starts from, where the loss
    is anchored: the policy without what its adapters have learned, else the model once more."""
    named, anchored = config.model.teacher_model_name_or_path, config.anchored
    if anchored and policy.has_adapters:
        return AdapterReference(policy), []
    if named is None and not anchored:
        return None, []
    return other_model(config, policy, accelerator, named, "the teacher")


def distributions(teacher: Teacher | None, loss: Loss, batch: PackedBatch) -> dict[str, Any]:
    """What the policy's forward is given beside the batch: what `linear_jsd` takes of the teacher and of the loss, or
    nothing where the loss has no divergence."""
    if loss.divergence is None:
        return {}
    assert teacher is not None
    taught = {"teacher_hidden": teacher.compute(batch, states=True), **loss.divergence.jsd}
    if isinstance(teacher, ModelReference):  # else the head is the policy's, which adapters leave as it is
        taught |= teacher.policy.teaching_head()
    return {"taught": taught, "alone": loss.divergence.alone}


def log_ratios(examples: Sequence[Example], taught: Iterable[tuple[PackedBatch, Tensor]]) -> tuple[Tensor, Mean]:
    """log p_T - log p of each scored token, [n, T] float64, n completions in the order of the examples, 0 behind the
    last; and the mean of log p - log p_T over tokens, nats, an estimate of the reverse divergence.

    taught: batches of these examples with their log p_T - log p, [paths, T] as `batch.scored`. Raises UserError where
    one is not finite.
    """
    table = by_completion(taught)
    rows: list[Tensor] = []
    for example in examples:
        own = [table[id(c)].double() for c in example.completions]
        rows += own
        if not all(row.isfinite().all() for row in own):
            raise UserError(
                f"the teacher's log-probs are not finite (row {example.row} of the data set); take --dtype float32 or "
                "bfloat16 where it is float16"
            )
    padded = pad_sequence(rows, batch_first=True) if rows else torch.zeros(0, 0, dtype=torch.float64)
    return padded, Mean(-padded.sum(), torch.tensor(float(sum(map(len, rows)))))
