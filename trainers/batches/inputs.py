"""From examples and packed batches to what a loss is called with: its totals, and its arguments by its kind."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from logratio.losses import CompletionLogps, Kind, Loss, LossOutput, PairLogps, TokenLogps, Totals
from logratio.losses.types import misfit

from ..data.examples import Example
from ..errors import UserError
from .packing import PackedBatch


def count_totals(examples: Sequence[Example], loss: Loss) -> Totals:
    """What a loss divides by, counted from the examples of a step."""
    per_completion = loss.kind is Kind.GROUPED
    rewarded = per_completion and all(e.advantages is not None for e in examples)
    return Totals(
        num_sequences=sum(len(e.completions) for e in examples) if per_completion else len(examples),
        num_prompts=len(examples),
        num_tokens=sum(c.num_scored for e in examples for c in e.completions),
        num_chosen_tokens=sum(e.completions[0].num_scored for e in examples),
        num_gold_tokens=sum(e.completions[2].num_scored for e in examples) if loss.scores_gold else 0,
        num_prompt_tokens=sum(_prompt_tokens(e) for e in examples) if loss.scores_prompt else 0,
        num_positive_tokens=sum(_positive_tokens(e) for e in examples) if rewarded else None,
        sum_weights=sum(
            weight
            for e in examples
            for c in e.completions
            for weight, scored in zip(c.weights or [1.0] * len(c.ids), c.mask, strict=True)
            if scored
        ),
    )


def output_of(loss: Loss, inputs: dict[str, Any], totals: Totals) -> LossOutput:
    """The loss called. Raises UserError where it returns something else than a loss must."""
    output = loss(**inputs, totals=totals)
    wrong = misfit(output)
    if not wrong and torch.is_grad_enabled() and not output.loss.requires_grad:
        wrong = "its loss has no graph: it is detached from the policy's log-probs"
    if wrong:
        raise UserError(f"the loss {type(loss).__name__}: {wrong}")
    return output


def state_after(loss: Loss, totals: Totals) -> Mapping[str, float]:
    """What the loss carries to the next step. Raises UserError for what no checkpoint could keep."""
    state = loss.advance(totals)
    for name, value in state.items():
        if not isinstance(value, int | float):
            raise UserError(
                f"the loss {type(loss).__name__}: its advance() must give numbers, and gives {name} as "
                f"{type(value).__name__}: make it float({name})"
            )
    return state


def _prompt_tokens(example: Example) -> int:
    chosen = example.completions[0]
    return len(example.prompt_ids) - 1 + len(chosen.ids) - chosen.num_scored


def _positive_tokens(rollouts: Example) -> int:
    """Scored tokens whose own, or whose completion's, advantage is above 0."""
    given = zip(rollouts.completions, rollouts.advantages or (), strict=True)
    return sum(sum(x > 0 for x in a) if isinstance(a, tuple) else (a > 0) * c.num_scored for c, a in given)


def loss_inputs(
    loss: Loss,
    batch: PackedBatch,
    out: TokenLogps,
    ref: Tensor | None = None,
    old: Tensor | None = None,
    behavior: Tensor | None = None,
) -> dict[str, Any]:
    """The arguments, beside `totals`, that a loss of this kind is called with. All but the loss: [paths, T] each; ref
    as a `Reference` gives it."""
    mask = batch.scored
    stats = out._asdict()
    policy = CompletionLogps(stats.pop("logps"), mask, **stats, weights=batch.weights)
    logps = {"policy": policy}
    if loss.wants_reference and ref is not None:
        logps["ref"] = _reference(loss, ref, mask)
    if loss.kind is Kind.PAIRED:
        return {name: _pairs(batch, values, loss, name == "policy") for name, values in logps.items()}

    def there(values: Sequence[Any] | Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """On the device, without a wait for all that a GPU still has to do."""
        return torch.as_tensor(values, dtype=dtype).to(mask.device, non_blocking=True)

    inputs: dict[str, Any] = dict(logps)
    if loss.kind is Kind.LABELED:
        inputs["label"] = there([bool(e.label) for e in batch.examples])
    if loss.kind is Kind.LISTED:
        inputs["rewards"] = there([reward for e in batch.examples for reward in e.rewards or ()], out.logps.dtype)
        inputs["sizes"] = [len(e.completions) for e in batch.examples]
    if loss.kind is Kind.GROUPED:
        inputs["advantages"] = there(_advantages(batch, out.logps.dtype))
        of_paths = [e for e in batch.examples for _ in e.completions]
        if loss.wants_prompt_tokens:
            inputs["prompt_tokens"] = there([e.prompt_tokens for e in of_paths])
        if loss.wants_prompts:
            inputs["prompts"] = there([e.row + (e.occurrence << 32) for e in of_paths])
        inputs["old"] = None if old is None else CompletionLogps(old, mask)
        if loss.wants_behavior:
            inputs["behavior"] = None if behavior is None else CompletionLogps(behavior, mask)
    return inputs


def _reference(loss: Loss, values: Tensor, mask: Tensor) -> CompletionLogps:
    """values: [paths, T], or [paths, T, 1 + S] with the `ref_stats` behind the log-probs."""
    if not loss.ref_stats:
        return CompletionLogps(values, mask)
    logps, *stats = values.unbind(-1)
    return CompletionLogps(logps, mask, **dict(zip(loss.ref_stats, stats, strict=True)))


def _advantages(batch: PackedBatch, dtype: torch.dtype) -> Tensor:
    """[C], or where completions have one a scored token [C, T] as `scored`; on the CPU, and from what lies there:
    `scored` itself is where the host would have to wait for it."""
    given = [a for e in batch.examples for a in e.advantages or ()]
    if not any(isinstance(a, tuple) for a in given):
        return torch.tensor(given, dtype=dtype)
    out = torch.zeros(batch.scored.shape, dtype=dtype)
    if not batch.is_filler:
        for row, completion, a in zip(out, batch.completions, given, strict=True):
            places = [place for place, scored in enumerate(completion.mask) if scored]
            row[places] = torch.as_tensor(a, dtype=dtype)
    return out


def _pairs(batch: PackedBatch, paths: CompletionLogps, loss: Loss, more: bool) -> PairLogps:
    """Paths by their place in an example; more: with the prompt or the gold completion where the loss scores it."""
    n, k = len(batch.completions), 3 if loss.scores_gold else 2
    return PairLogps(
        paths.rows(slice(0, n, k)),
        paths.rows(slice(1, n, k)),
        paths.rows(slice(n, None)) if more and loss.scores_prompt else None,
        paths.rows(slice(2, n, k)) if more and loss.scores_gold else None,
        _margins(batch, paths) if more and loss.wants_margin else None,
    )


def _margins(batch: PackedBatch, paths: CompletionLogps) -> Tensor:
    """[P], NaN where an example has none."""
    margins = [math.nan if e.margin is None else e.margin for e in batch.examples]
    dtype = torch.promote_types(paths.per_token_logps.dtype, torch.float32)
    return torch.tensor(margins, dtype=dtype).to(paths.completion_mask.device, non_blocking=True)
