"""The vocabulary of every loss: what it is given, what it divides by, what it returns.

A loss is a frozen dataclass (its fields are its configuration and its command-line options) that is
called on log-probabilities. It sees no model, no tokenizer and no other process. Its value is a *sum
over the micro-batch divided by totals of the whole optimizer step* (`Totals`), so the sum over any
split of a step into micro-batches and processes is the same number with the same gradient.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor


class Kind(StrEnum):
    """What one example of a loss is; it decides how rows become tensors and what the loss is called with."""

    SEQUENCE = "sequence"  # a prompt and one completion:            loss(policy, totals=...)
    LABELED = "labeled"  # the same with a True/False label [C]:     loss(policy, ref, label, totals=...)
    PAIRED = "paired"  # a prompt, a chosen and a rejected one:      loss(policy, [ref,] totals=...)
    GROUPED = "grouped"  # a prompt and its rollouts:                loss(policy, [ref,] advantages, old, totals=...)


@dataclass(frozen=True)
class CompletionLogps:
    """Log-probabilities of C completions, padded to T tokens.

    per_token_logps: [C, T], nats, any floating dtype. Values where the mask is False are never read,
        whatever they are (NaN included).
    completion_mask: [C, T] bool, True where a token is scored. A row may be empty.
    entropy: [C, T] in nats, or None where it was not asked for.
    """

    per_token_logps: Tensor
    completion_mask: Tensor
    entropy: Tensor | None = None

    def __post_init__(self) -> None:
        logps, mask = self.per_token_logps, self.completion_mask
        if logps.ndim != 2 or logps.shape != mask.shape:
            raise ValueError(
                "per_token_logps and completion_mask must both be [completions, tokens], "
                f"got {tuple(logps.shape)} and {tuple(mask.shape)}"
            )
        if self.entropy is not None and self.entropy.shape != mask.shape:
            raise ValueError(f"entropy must be {list(mask.shape)} as the mask, got {list(self.entropy.shape)}")
        if not logps.is_floating_point() or mask.dtype != torch.bool:
            raise TypeError(
                f"per_token_logps must be floating point and completion_mask bool, got {logps.dtype} and {mask.dtype}"
            )

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
        return self.completion_mask.sum(-1).to(self.logps.dtype)

    def masked(self, values: Tensor) -> Tensor:
        """`values` [C, T] with 0 where masked, promoted to at least float32."""
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        return torch.where(self.completion_mask, values, values.new_zeros(()))

    def detach(self) -> CompletionLogps:
        """The same without a graph."""
        entropy = None if self.entropy is None else self.entropy.detach()
        return dataclasses.replace(self, per_token_logps=self.per_token_logps.detach(), entropy=entropy)

    def check_like(self, *, tokens: bool, **others: CompletionLogps | None) -> None:
        """Raise ValueError for any of `others` with other rows (and `tokens`) than these, before they broadcast."""
        dims = 2 if tokens else 1
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
    """

    chosen: CompletionLogps
    rejected: CompletionLogps
    prompt: CompletionLogps | None = None

    def __post_init__(self) -> None:
        rows = [len(x.completion_mask) for x in (self.chosen, self.rejected, self.prompt) if x is not None]
        if len(set(rows)) != 1:
            raise ValueError(f"chosen, rejected and prompt must have one row a pair, got {rows} rows")

    @property
    def scored(self) -> Tensor:
        """[P] bool: pairs that have at least one scored completion token."""
        return self.chosen.completion_mask.any(-1) | self.rejected.completion_mask.any(-1)


@dataclass(frozen=True, kw_only=True)
class Totals:
    """What a loss divides by: counts over the whole optimizer step, all micro-batches and processes.

    num_sequences: examples of the kind: rows (SFT, KTO), pairs (DPO, ORPO), completions (GRPO).
    num_tokens: scored completion tokens, of chosen and rejected together for pairs.
    num_chosen_tokens: scored completion tokens of chosen completions (pairs).
    num_prompt_tokens: scored prompt tokens (losses with `scores_prompt`).
    collected: [n], what `Loss.collect` returned, concatenated over the whole step (`window_pass`).
    """

    num_sequences: float
    num_tokens: float
    num_chosen_tokens: float = 0
    num_prompt_tokens: float = 0
    collected: Tensor | None = None

    @staticmethod
    def of(policy: CompletionLogps | PairLogps, collected: Tensor | None = None) -> Totals:
        """The totals of a step that consists of this one batch."""
        if isinstance(policy, CompletionLogps):
            mask = policy.completion_mask
            return Totals(num_sequences=len(mask), num_tokens=int(mask.sum()), collected=collected)
        chosen = int(policy.chosen.completion_mask.sum())
        return Totals(
            num_sequences=len(policy.chosen.completion_mask),
            num_tokens=chosen + int(policy.rejected.completion_mask.sum()),
            num_chosen_tokens=chosen,
            num_prompt_tokens=0 if policy.prompt is None else int(policy.prompt.completion_mask.sum()),
            collected=collected,
        )


class Mean(NamedTuple):
    """A metric as a detached sum and its count, both scalars: means over a step are exact whatever the split."""

    total: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count

    @staticmethod
    def of(values: Tensor, where: Tensor | None = None) -> Mean:
        """The mean of `values`, or of those `where` is True."""
        values = values.detach()
        where = torch.ones_like(values, dtype=torch.bool) if where is None else where
        return Mean(torch.where(where, values, values.new_zeros(())).sum(), where.sum())


class LossOutput(NamedTuple):
    """loss: scalar with a graph, this micro-batch's share of the step's loss. metrics: TRL's names."""

    loss: Tensor
    metrics: dict[str, Mean]


@dataclass(frozen=True, kw_only=True)
class Loss:
    """What every loss declares beside its own fields; see `Kind` for what it is called with."""

    kind: ClassVar[Kind]
    # The loss compares with a reference model: it is called with `ref`.
    uses_reference: ClassVar[bool] = False
    # The prompt's own tokens are scored along the chosen path (`PairLogps.prompt`).
    scores_prompt: ClassVar[bool] = False
    # A pass without gradient over the whole step before its losses: on the examples as they are ("own"),
    # or on prompts each with another example's completion ("mismatched"). `collect` says what it gathers.
    window_pass: ClassVar[Literal["own", "mismatched"] | None] = None

    @property
    def wants_reference(self) -> bool:
        """Whether this configuration needs reference log-probs; where False, `ref` may be left out."""
        return self.uses_reference

    def collect(self, policy: Any, ref: Any) -> Tensor:
        """[n]: what of each micro-batch of the `window_pass` goes into `Totals.collected`."""
        raise NotImplementedError(f"{type(self).__name__} declares a window_pass but no collect()")

    def __call__(self, *args: Any, **kwargs: Any) -> LossOutput:
        """One micro-batch's share of the step's loss; the arguments depend on `kind`."""
        raise NotImplementedError


LOSSES: dict[str, type[Loss]] = {}
"""Every registered loss by its method's name, as in `logratio train NAME`."""

L = TypeVar("L", bound=type[Loss])
F = TypeVar("F", bound=Callable[..., Any])


def register(name: str) -> Callable[[L], L]:
    """Class decorator: make a loss known to the command line, the oracle and the property tests."""

    def add(cls: L) -> L:
        if name in LOSSES:
            raise ValueError(f"a loss named {name!r} is registered already: {LOSSES[name]}")
        LOSSES[name] = cls
        return cls

    return add


def variant(table: dict[str, F], name: str | None = None) -> Callable[[F], F]:
    """Function decorator: enter a formula into a loss's table of `loss_type`s, under its own name by default."""

    def add(formula: F) -> F:
        key = name or formula.__name__
        if key in table:
            raise ValueError(f"a variant named {key!r} is registered already")
        table[key] = formula
        return formula

    return add


def check_choice(field: str, value: str, table: Mapping[str, Any]) -> None:
    """Raise ValueError naming the field, its value and what it may be."""
    if value not in table:
        raise ValueError(f"{field}={value!r} is unknown, expected one of: {', '.join(table)}")


def check_positive(field: str, value: float) -> None:
    """Raise ValueError unless `value` is a finite number above 0."""
    if not 0 < value < float("inf"):
        raise ValueError(f"{field}={value} must be positive and finite")


def divide(total: Tensor, by: float | Tensor) -> Tensor:
    """`total / by`, and 0 (with a graph) where a step has nothing to divide by."""
    return total / by if by > 0 else total * 0.0
