"""Completions as losses see them: log-probabilities of tokens, which of these are scored, and pairs of completions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

IGNORED = -100
"""Hugging Face's label of a token that is not scored."""
STATS = ("entropy", "log_z", "log_sum_p2", "is_top1")
"""The `stats` of `linear_logps`."""
OPTIONAL = (*STATS, "divergence", "weights")
"""What `CompletionLogps` may hold beside log-probabilities."""


@dataclass(frozen=True)
class CompletionLogps:
    """Log-probabilities of C completions, padded to T tokens.

    per_token_logps: [C, T], nats, any floating dtype. Values where the mask is False are never read,
        whatever they are (NaN included).
    completion_mask: [C, T] bool, True where a token is scored. A row may be empty.
    entropy, log_z, log_sum_p2, is_top1: [C, T], the `stats` of `linear_logps`, each None where it was not asked for.
    divergence: [C, T], `linear_jsd` of the token's place, where the loss has a `divergence`.
    weights: [C, T], at least 0, how much each token counts (SFT), or each row, the same at its tokens (KTO); None: 1.
    """

    per_token_logps: Tensor
    completion_mask: Tensor
    entropy: Tensor | None = None
    log_z: Tensor | None = None
    log_sum_p2: Tensor | None = None
    is_top1: Tensor | None = None
    divergence: Tensor | None = None
    weights: Tensor | None = None

    def __post_init__(self) -> None:
        logps, mask = self.per_token_logps, self.completion_mask
        if logps.ndim != 2 or logps.shape != mask.shape:
            raise ValueError(
                "per_token_logps and completion_mask must both be [completions, tokens], "
                f"got {tuple(logps.shape)} and {tuple(mask.shape)}"
            )
        for name in OPTIONAL:
            values = getattr(self, name)
            if values is not None and values.shape != mask.shape:
                raise ValueError(f"{name} must be {list(mask.shape)} as the mask, got {list(values.shape)}")
        if not logps.is_floating_point() or mask.dtype != torch.bool:
            raise TypeError(
                f"per_token_logps must be floating point and completion_mask bool, got {logps.dtype} and {mask.dtype}"
            )

    @staticmethod
    def from_logits(logits: Tensor, labels: Tensor, *, stats: tuple[str, ...] = ()) -> CompletionLogps:
        """What a model that returns logits says of labels in Hugging Face's form.

        logits: [C, L, V], any floating dtype; those at t predict the token at t + 1. labels: [C, L] int64, the tokens
        themselves, -100 where one is not scored. Returns [C, L - 1], nats, at least float32: log p of labels[:, 1:],
        masked where these are -100; logits there are never read. stats: as those of `linear_logps`, which gives the
        same from hidden states, without logits. Raises ValueError for shapes that do not fit.
        """
        if logits.ndim != 3 or logits.shape[:2] != labels.shape:
            raise ValueError(
                f"logits must be [C, L, V] and labels [C, L], got {list(logits.shape)} and {list(labels.shape)}"
            )
        mask = labels[:, 1:] != IGNORED
        rows = logits[:, :-1][mask]  # [N, V]
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        log_p = rows.log_softmax(-1)
        made: dict[str, Callable[[], Tensor]] = {
            "per_token_logps": lambda: log_p.gather(-1, labels[:, 1:][mask][:, None])[:, 0],
            "entropy": lambda: -(log_p.exp() * log_p).sum(-1),
            "log_z": lambda: rows.logsumexp(-1),
            "log_sum_p2": lambda: (2 * log_p).logsumexp(-1).detach(),
            "is_top1": lambda: rows.argmax(-1) == labels[:, 1:][mask],
        }
        values = {name: made[name]() for name in ("per_token_logps", *stats)}
        wanted = {name: x.new_zeros(mask.shape).masked_scatter(mask, x) for name, x in values.items()}
        return CompletionLogps(completion_mask=mask, **wanted)

    @property
    def logps(self) -> Tensor:
        """[C, T], 0 where masked, at least float32 (float16 sums of a few hundred tokens lose whole nats)."""
        return self.masked(self.per_token_logps)

    @property
    def sums(self) -> Tensor:
        """[C], log-probability of each completion: the sum over its scored tokens."""
        return self.logps.sum(-1)

    @property
    def lengths(self) -> Tensor:
        """[C], number of scored tokens, in the dtype of `logps`."""
        return self.completion_mask.sum(-1).to(torch.promote_types(self.per_token_logps.dtype, torch.float32))

    @property
    def averages(self) -> Tensor:
        """[C], mean log-probability of each completion's scored tokens; 0 where there are none."""
        return self.sums / self.lengths.clamp(min=1)

    def masked(self, values: Tensor) -> Tensor:
        """`values` [C, T] with 0 where masked, promoted to at least float32."""
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        return torch.where(self.completion_mask, values, 0.0)

    def detach(self) -> CompletionLogps:
        """The same without a graph."""
        return self._each(Tensor.detach)

    def rows(self, at: slice) -> CompletionLogps:
        """Some of the completions."""
        return self._each(lambda values: values[at])

    def _each(self, change: Callable[[Tensor], Tensor]) -> CompletionLogps:
        tensors = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return CompletionLogps(**{k: v if v is None else change(v) for k, v in tensors.items()})  # type: ignore[arg-type]

    def needed(self, stat: str) -> Tensor:
        """The optional tensor of that name [C, T], 0 where masked. ValueError where it is missing."""
        values = getattr(self, stat)
        if values is None:
            raise ValueError(f"this loss needs the policy's {stat} of every token, which is None")
        return self.masked(values)

    def check_like(self, *, tokens: bool, **others: CompletionLogps | None) -> None:
        """Raise ValueError for any of `others` with other rows (and `tokens`) than these, before they broadcast."""
        dims = None if tokens else 1
        for name, other in others.items():
            if other is not None and other.completion_mask.shape[:dims] != self.completion_mask.shape[:dims]:
                raise ValueError(
                    f"{name} must have the policy's {'rows and tokens' if tokens else 'rows'}, "
                    f"got {list(other.completion_mask.shape)} for {list(self.completion_mask.shape)}"
                )


@dataclass(frozen=True)
class PairLogps:
    """Pairs: `chosen` and `rejected` have one row a pair, in the same order.

    prompt: log-probabilities of the prompt's own tokens, for losses with `scores_prompt` (ORPO).
    gold: a third completion of each prompt, for losses with `scores_gold` (TPO).
    margin: [P], by how much chosen is better, of any unit, for losses with `wants_margin` (odpo, modpo, sppo).
    """

    chosen: CompletionLogps
    rejected: CompletionLogps
    prompt: CompletionLogps | None = None
    gold: CompletionLogps | None = None
    margin: Tensor | None = None

    def __post_init__(self) -> None:
        parts = (self.chosen, self.rejected, self.prompt, self.gold)
        rows = [len(x.completion_mask) for x in parts if x is not None]
        if len(set(rows)) != 1:
            raise ValueError(f"chosen, rejected, prompt and gold must have one row a pair, got {rows} rows")
        if self.margin is not None and self.margin.shape != (rows[0],):
            raise ValueError(f"margin must be [{rows[0]}], one number a pair, got {list(self.margin.shape)}")

    @property
    def scored(self) -> Tensor:
        """[P] bool: pairs that have at least one scored completion token."""
        return self.chosen.completion_mask.any(-1) | self.rejected.completion_mask.any(-1)
