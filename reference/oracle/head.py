"""From hidden states, or from a model, to the log-probabilities and the row statistics of softmax(logits)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class TokenLogps(NamedTuple):
    """All [N] float64, nats: log p(target), -sum p log p, log sum exp z, log sum p^2."""

    logps: Tensor
    entropy: Tensor
    log_z: Tensor
    log_sum_p2: Tensor


class SequenceLogps(NamedTuple):
    """completion: [C] of every completion token; prompt: [P - 1], of every prompt token but the first.

    entropy, log_sum_p2, log_z: [C], of the distributions that the completion tokens are drawn from.
    """

    completion: Tensor
    prompt: Tensor
    entropy: Tensor
    log_sum_p2: Tensor
    log_z: Tensor


def token_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    support: Sequence[Sequence[int] | None] | None = None,
) -> TokenLogps:
    """log p(target) under softmax(z), z = softcap tanh(logit_scale (W h + b) / softcap) / temperature.

    hidden [N, H], weight [V, H], targets [N] int64, bias [V]. support: of each token the words that the softmax is
    over, None: all.
    """
    rows = []
    supports = support or [None] * len(targets)
    for h, target, words in zip(hidden.double(), targets.tolist(), supports, strict=True):
        z = weight.double() @ h
        if bias is not None:
            z = z + bias.double()
        z = z * logit_scale
        if softcap is not None:
            z = softcap * torch.tanh(z / softcap)
        z = z / temperature
        rows.append(_row(z, target, words))
    if not rows:
        return TokenLogps(*(hidden.new_zeros(0, dtype=torch.float64) for _ in TokenLogps._fields))
    return TokenLogps(*(torch.stack(column) for column in zip(*rows, strict=True)))


def sequence_logps(
    model: Any,
    prompt_ids: Sequence[int],
    completion_ids: Sequence[int],
    support: Sequence[Sequence[int] | None] | None = None,
) -> SequenceLogps:
    """One forward of a causal language model on prompt + completion alone, neither padded nor packed: full logits.

    In the model's dtype (meant for a float64 model), with its graph and on its device. support: of each completion
    token the words that the softmax is over, None: all. Raises ValueError without a prompt, since nothing then predicts
    the first token.
    """
    if not len(prompt_ids):
        raise ValueError("sequence_logps needs at least one prompt token to predict the first completion token")
    ids = [*prompt_ids, *completion_ids]
    device = model.get_input_embeddings().weight.device
    logits = model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0]
    first = len(prompt_ids) - 1  # the row that predicts the first completion token
    supports = [*[None] * first, *(support or [None] * len(completion_ids))]
    rows = [_row(logits[t], ids[t + 1], supports[t]) for t in range(len(ids) - 1)]

    def column(name: str, start: int, end: int) -> Tensor:
        values = [getattr(row, name) for row in rows[start:end]]
        return torch.stack(values) if values else logits[:0, 0]

    return SequenceLogps(
        completion=column("logps", first, len(rows)),
        prompt=column("logps", 0, first),
        entropy=column("entropy", first, len(rows)),
        log_sum_p2=column("log_sum_p2", first, len(rows)),
        log_z=column("log_z", first, len(rows)),
    )


def _row(z: Tensor, target: int, words: Sequence[int] | None = None) -> TokenLogps:
    """The statistics of one position's logits z [V], or of those of some words, as scalars."""
    if words is not None:
        z, target = z[list(words)], list(words).index(target)
    largest = z.detach().max()
    log_z = largest + torch.log(torch.sum(torch.exp(z - largest)))
    log_p = z - log_z
    highest = log_p.detach().max()
    return TokenLogps(
        logps=log_p[target],
        entropy=log_z - torch.sum(torch.exp(log_p) * z),  # -sum p log p, log p = z - log Z
        log_z=log_z,
        log_sum_p2=2 * highest + torch.log(torch.sum(torch.exp(2 * (log_p - highest)))),
    )
