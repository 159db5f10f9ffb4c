"""The vocabulary of every loss: what it is given, what it divides by, what it returns.

A loss is a frozen dataclass (its fields are its configuration and its command-line options) that is
called on log-probabilities. It sees no model, no tokenizer and no other process. Its value is a *sum
over the micro-batch divided by totals of the whole optimizer step* (`Totals`), so the sum over any
split of a step into micro-batches and processes is the same number with the same gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from .completions import STATS, CompletionLogps, PairLogps
from .metrics import Mean
from .options import Variants, check_choice, check_options


class Kind(StrEnum):
    """What one example of a loss is; it decides how rows become tensors and what the loss is called with."""

    SEQUENCE = "sequence"  # a prompt and one completion:            loss(policy, totals=...)
    LABELED = "labeled"  # the same with a True/False label [C]:     loss(policy, ref, label, totals=...)
    PAIRED = "paired"  # a prompt, a chosen and a rejected one:      loss(policy, [ref,] totals=...)
    LISTED = "listed"  # a prompt, K completions, K rewards: loss(policy, [ref,] rewards, sizes, totals=...)
    GROUPED = "grouped"  # a prompt and its rollouts:       loss(policy, [ref,] advantages, old, [behavior,] totals=...)


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


class Divergence(NamedTuple):
    """Of the model's next word from another model's, at every token: `linear_jsd` at this beta and temperature.

    anchored: from the model that training starts from, else from a teacher. alone: the loss is a function of it alone,
    and its log-probs come without gradient.
    """

    beta: float
    temperature: float
    anchored: bool = False
    alone: bool = False

    @property
    def jsd(self) -> dict[str, Any]:
        """What `linear_jsd` takes of it."""
        return {"beta": self.beta, "temperature": self.temperature}


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
        """ValueError for options out of range or not read, and for what is declared otherwise than it can be."""
        check_options(self)
        check_declared(self)

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
    def divergence(self) -> Divergence | None:
        """Its divergence from another model, which the policy then says of every token, or None."""
        return None

    @property
    def wants_prompts(self) -> bool:
        """Rollouts: it is called with `prompts` [C] int64, from 0 to 2^43, a number for each prompt of the step."""
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

    def collect(self, *args: Any, **kwargs: Any) -> Tensor:
        """[n, ...]: what of each micro-batch of the `window_pass` goes into `Totals.collected`.

        It is given what the loss is called with, but the totals: rollouts have their `advantages` and `old` too.
        """
        raise NotImplementedError(f"{type(self).__name__} declares a window_pass but no collect()")

    def advance(self, totals: Totals) -> Mapping[str, float]:
        """The running state for the next step, from this step's totals (`state` and `collected`)."""
        return totals.state

    def __call__(self, *args: Any, **kwargs: Any) -> LossOutput:
        """One micro-batch's share of the step's loss; the arguments depend on `kind`."""
        raise NotImplementedError


def check_declared(loss: Loss) -> None:
    """Raise ValueError for what a class declares that would be read as something else, or by nobody."""
    name = type(loss).__name__
    if not isinstance(kind := getattr(loss, "kind", Kind.SEQUENCE), Kind):  # a base of others may leave it open
        raise ValueError(f"{name}.kind must be one of {', '.join(f'Kind.{k.name}' for k in Kind)}, not {kind!r}")
    for declared in ("stats", "ref_stats", "metric_stats"):
        if isinstance(names := getattr(loss, declared), str):
            raise ValueError(f"{name}.{declared} must be a tuple of names, such as ({names!r},), not {names!r}")
        for one in names:
            check_choice(f"{name}.{declared}", one, STATS)
    if loss.window_pass is not None:
        check_choice(f"{name}.window_pass", loss.window_pass, ("own", "mismatched"))
    for base in type(loss).__mro__:
        plain = issubclass(base, Loss) and "__dataclass_fields__" not in vars(base)
        for option, hint in vars(base).get("__annotations__", {}).items() if plain else ():
            if "ClassVar" not in str(hint):
                raise ValueError(f"{base.__name__}.{option} is no option without @dataclass(frozen=True, kw_only=True)")


def misfit(output: Any) -> str:
    """What of the output of a loss is not as it must be, in words; "" where nothing is."""
    if not isinstance(output, LossOutput):
        return f"it must return LossOutput(loss, metrics), not {type(output).__name__}"
    if not (isinstance(output.loss, Tensor) and output.loss.shape == ()):
        got = list(output.loss.shape) if isinstance(output.loss, Tensor) else type(output.loss).__name__
        return f"its loss must be one number, a tensor of the shape [], not {got}"
    for name, metric in output.metrics.items():
        if not isinstance(metric, Mean):
            return f"its metric {name} must be a Mean, such as Mean.of(values, where), not {type(metric).__name__}"
    return ""


def divide(total: Tensor, by: float) -> Tensor:
    """`total / by`, and 0 (with a graph) where a step has nothing to divide by."""
    return total / by if by > 0 else total * 0.0


def choose(where: Tensor, yes: float, no: float, like: Tensor) -> Tensor:
    """`yes` or `no` elementwise, in the dtype of `like` (torch.where of two numbers would round them to float32)."""
    return torch.where(where, like.new_full((), yes), like.new_full((), no))
