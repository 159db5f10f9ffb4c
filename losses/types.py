"""The vocabulary of every loss: what it is given, what it divides by, what it returns.

A loss is a frozen dataclass (its fields are its configuration and its command-line options) that is
called on log-probabilities. It sees no model, no tokenizer and no other process. Its value is a *sum
over the micro-batch divided by totals of the whole optimizer step* (`Totals`), so the sum over any
split of a step into micro-batches and processes is the same number with the same gradient.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from .metrics import Mean
from .options import Variants, check_options


class Kind(StrEnum):
    """What one example of a loss is; it decides how rows become tensors and what the loss is called with."""

    SEQUENCE = "sequence"  # a prompt and one completion:            loss(policy, totals=...)
    LABELED = "labeled"  # the same with a True/False label [C]:     loss(policy, ref, label, totals=...)
    PAIRED = "paired"  # a prompt, a chosen and a rejected one:      loss(policy, [ref,] totals=...)
    LISTED = "listed"  # a prompt, K completions, K rewards: loss(policy, [ref,] rewards, sizes, totals=...)
    GROUPED = "grouped"  # a prompt and its rollouts:       loss(policy, [ref,] advantages, old, [behavior,] totals=...)


IGNORED = -100
"""Hugging Face's label of a token that is not scored."""
OPTIONAL = ("entropy", "log_z", "log_sum_p2", "is_top1", "weights")
"""What `CompletionLogps` may hold beside log-probabilities."""


@dataclass(frozen=True)
class CompletionLogps:
    """Log-probabilities of C completions, padded to T tokens.

    per_token_logps: [C, T], nats, any floating dtype. Values where the mask is False are never read,
        whatever they are (NaN included).
    completion_mask: [C, T] bool, True where a token is scored. A row may be empty.
    entropy, log_z, log_sum_p2, is_top1: [C, T], the `stats` of `linear_logps`, each None where it was not asked for.
    weights: [C, T], at least 0, how much each token counts (SFT), or each row, the same at its tokens (KTO); None: 1.
    """

    per_token_logps: Tensor
    completion_mask: Tensor
    entropy: Tensor | None = None
    log_z: Tensor | None = None
    log_sum_p2: Tensor | None = None
    is_top1: Tensor | None = None
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
            "per_token_logps": lambda: log_p.gather(-1, labels[:, 1:][mask][:, None]).squeeze(-1),
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


@dataclass(frozen=True, kw_only=True)
class Totals:
    """What a loss knows of the whole optimizer step, all micro-batches and processes: what it divides by.

    num_sequences: examples of the kind: rows (SFT, KTO), pairs (DPO, CPO, ORPO), lists, completions (GRPO).
    num_prompts: prompts, each with all its completions (GRPO).
    num_tokens: scored completion tokens, of all completions of a pair together.
    num_chosen_tokens, num_gold_tokens: scored completion tokens of those completions (pairs).
    num_prompt_tokens: scored prompt tokens (losses with `scores_prompt`).
    num_positive_tokens: scored tokens of positive advantage (GRPO); None: nobody has counted them.
    sum_weights: sum of the weights of scored tokens; num_tokens where tokens have none (the default).
    collected: [n, ...], what `Loss.collect` returned, concatenated over the whole step (`window_pass`).
    own: [C] int64, which rows of `collected` this micro-batch's examples are, where `collect` gives one for each.
    state: named numbers from the steps before this one, see `Loss.advance`.
    """

    num_sequences: float
    num_tokens: float
    num_chosen_tokens: float = 0
    num_gold_tokens: float = 0
    num_prompt_tokens: float = 0
    num_prompts: float = 0
    num_positive_tokens: float | None = None
    sum_weights: float | None = None
    collected: Tensor | None = None
    own: Tensor | None = None
    state: Mapping[str, float] = field(default_factory=dict)

    @staticmethod
    def of(
        policy: CompletionLogps | PairLogps,
        collected: Tensor | None = None,
        sizes: Sequence[int] | None = None,
        advantages: Tensor | None = None,
    ) -> Totals:
        """The totals of a step that consists of this one batch, of as many prompts as it has rows.

        sizes: of lists, how many completions each has. advantages: [C] or [C, T], of rollouts.
        """
        if isinstance(policy, CompletionLogps):
            mask, weights = policy.completion_mask, policy.weights
            counts: dict[str, float] = {"num_tokens": int(mask.sum())}
            if weights is not None:
                counts["sum_weights"] = float(policy.masked(weights).sum())
            if advantages is not None:
                positive = (advantages if advantages.ndim == 2 else advantages[:, None]) > 0
                counts["num_positive_tokens"] = int((mask & positive).sum())
        else:
            mask = policy.chosen.completion_mask
            chosen, rejected = int(mask.sum()), int(policy.rejected.completion_mask.sum())
            counts = {"num_tokens": chosen + rejected, "num_chosen_tokens": chosen}
            for name, part in (("num_prompt_tokens", policy.prompt), ("num_gold_tokens", policy.gold)):
                counts[name] = 0 if part is None else int(part.completion_mask.sum())
            counts["num_tokens"] += counts["num_gold_tokens"]
        own = torch.arange(len(mask), device=mask.device)
        examples = len(mask) if sizes is None else len(sizes)
        counts["num_prompts"] = examples
        return Totals(num_sequences=examples, **counts, collected=collected, own=own)  # type: ignore[arg-type]


class LossOutput(NamedTuple):
    """loss: scalar with a graph, this micro-batch's share of the step's loss. metrics: TRL's names."""

    loss: Tensor
    metrics: dict[str, Mean]


@dataclass(frozen=True, kw_only=True)
class Loss:
    """What every loss declares beside its own fields; see `Kind` for what it is called with.

    A subclass sets what differs, as a class attribute or, where it depends on the options, as a property.
    """

    kind: ClassVar[Kind]
    option_tables: ClassVar[Mapping[str, Variants[Any]]] = {}
    """Options that name a variant, and the table of their variants; a loss of the user's own needs none."""
    option_switches: ClassVar[Mapping[str, str]] = {}
    """Options that are read only where another option, a number, is not 0: option -> that one."""

    def __post_init__(self) -> None:
        """ValueError for options out of range or not read, see `options.py`."""
        check_options(self)

    @property
    def wants_reference(self) -> bool:
        """It compares with a reference model: it is called with `ref`."""
        return False

    @property
    def wants_behavior(self) -> bool:
        """Rollouts: it is called with `behavior`, what the sampler said of its tokens, None where that is not known."""
        return False

    @property
    def wants_prompt_tokens(self) -> bool:
        """Rollouts: it is called with `prompt_tokens` [C], scored tokens of all completions of the same prompt."""
        return False

    @property
    def scores_prompt(self) -> bool:
        """The prompt's own tokens are scored along the chosen path (`PairLogps.prompt`)."""
        return False

    @property
    def wants_margin(self) -> bool:
        """Rows say by how much chosen is better (`PairLogps.margin`)."""
        return False

    @property
    def scores_gold(self) -> bool:
        """Rows have a third, gold completion (`PairLogps.gold`)."""
        return False

    @property
    def stats(self) -> tuple[str, ...]:
        """The `stats` of `linear_logps` that the loss uses."""
        return ()

    @property
    def ref_stats(self) -> tuple[str, ...]:
        """Those that it uses of the reference's tokens: `ref` holds them."""
        return ()

    @property
    def metric_stats(self) -> tuple[str, ...]:
        """Those that its metrics alone use; where they were not computed, it goes without these metrics."""
        return ()

    @property
    def window_pass(self) -> Literal["own", "mismatched"] | None:
        """A pass without gradient over the whole step before its losses, for `collect`.

        On the examples as they are ("own"), or on prompts each with another example's completion ("mismatched").
        """
        return None

    def collect(self, policy: Any, ref: Any = None) -> Tensor:
        """[n, ...]: what of each micro-batch of the `window_pass` goes into `Totals.collected`."""
        raise NotImplementedError(f"{type(self).__name__} declares a window_pass but no collect()")

    def advance(self, totals: Totals) -> Mapping[str, float]:
        """The running state for the next step, from this step's totals (`state` and `collected`)."""
        return totals.state

    def __call__(self, *args: Any, **kwargs: Any) -> LossOutput:
        """One micro-batch's share of the step's loss; the arguments depend on `kind`."""
        raise NotImplementedError


def divide(total: Tensor, by: float) -> Tensor:
    """`total / by`, and 0 (with a graph) where a step has nothing to divide by."""
    return total / by if by > 0 else total * 0.0


def choose(where: Tensor, yes: float, no: float, like: Tensor) -> Tensor:
    """`yes` or `no` elementwise, in the dtype of `like` (torch.where of two numbers would round them to float32)."""
    return torch.where(where, like.new_full((), yes), like.new_full((), no))
