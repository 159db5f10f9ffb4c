"""Laws of families of losses over pairs and labelled examples: equations that some losses keep and others must not.

Each is a plain function of a loss (or of two) and a batch of `strategies`, and raises AssertionError with its name and
the numbers that differ. `for_every_batch` looks for the smallest batch that breaks one:

    for_every_batch("paired", lambda batch: constant_at_reference(DPOLoss(), batch, math.log(2)))

r_w, r_l: log-ratios to the reference, summed over tokens; Delta = r_w - r_l; D the same with averages for sums.
Those of losses over groups are in `family_laws_grpo.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from logratio.losses.types import Loss

from ._law_book import expect, named
from ._law_runs import numbers, run, same_gradient
from .strategies import LOGPS, Batch, take

Transform = Callable[[Batch], Batch]


def same(batch: Batch) -> Batch:
    """The batch itself."""
    return batch


def scored(batch: Batch) -> Batch:
    """No row is empty: the first token of each is scored."""
    return replace(batch, masks={part: x | (torch.arange(x.shape[1]) == 0) for part, x in batch.masks.items()})


def equal_lengths(batch: Batch) -> Batch:
    """All tokens are scored, and every part has the width of the narrowest."""
    width = min(x.shape[1] for x in batch.masks.values())
    tokens = {role: {part: x[:, :width] for part, x in parts.items()} for role, parts in batch.tokens.items()}
    return replace(batch, masks={p: torch.ones_like(x[:, :width]) for p, x in batch.masks.items()}, tokens=tokens)


def put(batch: Batch, **sources: str) -> Batch:
    """These parts become copies of others: put(batch, rejected="chosen")."""
    masks = batch.masks | {part: batch.masks[source] for part, source in sources.items()}
    tokens = {
        role: parts | {part: parts[source] for part, source in sources.items()} for role, parts in batch.tokens.items()
    }
    return replace(batch, masks=masks, tokens=tokens)


def swapped(batch: Batch) -> Batch:
    """Chosen for rejected and the reverse."""
    return put(batch, chosen="rejected", rejected="chosen")


def put_role(batch: Batch, **sources: str) -> Batch:
    """These log-probs become others: put_role(batch, policy="ref")."""
    return replace(batch, tokens=batch.tokens | {role: batch.tokens[source] for role, source in sources.items()})


def moved(batch: Batch, by: dict[str, Tensor], roles: Sequence[str] = LOGPS) -> Batch:
    """part -> [C] is added to the first token of each row, in these roles: to the sum, where that token is scored."""
    tokens = {role: dict(parts) for role, parts in batch.tokens.items()}
    for role in roles:
        for part, values in by.items():
            first = torch.arange(tokens[role][part].shape[1]) == 0
            tokens[role][part] = tokens[role][part] + values[:, None] * first
    return replace(batch, tokens=tokens)


def unpaired(batch: Batch) -> Batch:
    """The chosen completions labelled True, and then the rejected ones False."""
    width = max(batch.masks[part].shape[1] for part in ("chosen", "rejected"))

    def joined(parts: dict[str, Tensor]) -> dict[str, Tensor]:
        both = [torch.nn.functional.pad(parts[p], (0, width - parts[p].shape[1])) for p in ("chosen", "rejected")]
        return {"completion": torch.cat(both)}

    label = torch.arange(2 * len(batch)) < len(batch)
    tokens = {role: joined(parts) for role, parts in batch.tokens.items()}
    return Batch("labeled", joined(batch.masks), tokens, {"label": label}, torch.zeros(1, dtype=torch.float64))


def ratios(batch: Batch, *, averages: bool = False, reference: bool = True) -> tuple[Tensor, Tensor]:
    """r_w and r_l, [P] each; averages: over tokens; not reference: the policy's log-probs alone."""
    both = []
    for part in ("chosen", "rejected"):
        mask, policy, ref = batch.masks[part], batch.tokens["policy"][part], batch.tokens["ref"][part]
        r = torch.where(mask, policy - ref if reference else policy, torch.zeros_like(policy)).sum(-1)
        both.append(r / mask.sum(-1).clamp(min=1) if averages else r)
    return both[0], both[1]


def has_tokens(batch: Batch) -> Tensor:
    """[C] bool, examples with something scored in their completions."""
    parts = [part for part in batch.masks if part in ("chosen", "rejected", "completion")]
    return torch.stack([batch.masks[part].any(-1) for part in parts]).any(0)


def value(loss: Loss, batch: Batch) -> float:
    """L of a step that is this batch."""
    return run(loss, batch).loss.item()


def slopes(loss: Loss, batch: Batch) -> dict[str, Tensor]:
    """part -> [C], C dL/d(sum of its log-probs): the gradient at the first token; use on `scored` batches."""
    return {part: len(batch) * grad[:, 0] for part, grad in run(loss, batch).grads.items()}


def close(got: float, expected: float, terms: float = 0.0, rtol: float = 1e-9) -> None:
    """Raise AssertionError unless they agree to `rtol` of the larger of `expected` and `terms`."""
    bound = rtol * max(abs(expected), abs(terms)) + 1e-12
    expect(abs(got - expected) <= bound, f"{got:.12g}, expected {expected:.12g}")


@named
def constant_at_reference(loss: Loss, batch: Batch, constant: float | Tensor) -> None:
    """L(policy = reference) = c of each example with something scored, over all examples; c may be [C]."""
    there = replace(put_role(batch, policy="ref"), collected=0 * batch.collected, earlier=0)
    expected = (has_tokens(there) * torch.as_tensor(constant, dtype=torch.float64)).sum().item() / len(batch)
    close(value(loss, there), expected)


@named
def slopes_at_reference(loss: Loss, batch: Batch, chosen: float, rejected: float) -> None:
    """Where policy = reference, -dL/dr_w = chosen and dL/dr_l = rejected, of every pair."""
    there = put_role(scored(batch), policy="ref")
    got = slopes(loss, replace(there, earlier=0))
    for part, slope in (("chosen", -chosen), ("rejected", rejected)):
        for one in got[part].tolist():
            close(one, slope)


@named
def combination(loss: Loss, batch: Batch, *terms: tuple[float, Loss] | tuple[float, Loss, Transform]) -> None:
    """L(batch) = sum of c_i L_i(t_i(batch)) over the terms (c, L) and (c, L, t)."""
    of = [(c, value(other, (more or (same,))[0](batch))) for c, other, *more in terms]  # type: ignore[operator]
    close(value(loss, batch), sum(c * x for c, x in of), max(abs(c * x) for c, x in of))


@named
def neutral_option(loss: Loss, plain: Loss, batch: Batch) -> None:
    """Two losses are the same: L_a = L_b and G_a = G_b."""
    got, expected = run(loss, batch), run(plain, batch)
    close(got.loss.item(), expected.loss.item())
    same_gradient(got.grads, expected.grads)


@named
def limit(loss: Loss, limiting: Loss, batch: Batch, rtol: float = 1e-4) -> None:
    """L_a is L_b to `rtol`: a parameter is close to where it has no effect."""
    close(value(loss, batch), value(limiting, batch), rtol=rtol)


@named
def at_least(loss: Loss, other: Loss, batch: Batch, transform: Transform = same) -> None:
    """L_a(batch) >= L_b(t(batch))."""
    got, bound = value(loss, batch), value(other, transform(batch))
    expect(got >= bound - 1e-9 * abs(bound) - 1e-12, f"{got:.12g}, expected at least {bound:.12g}")


@named
def label_flip(loss: Loss, batch: Batch, factor: float, *, averages: bool = False, reference: bool = True) -> None:
    """L(chosen, rejected) - L(rejected, chosen) = -factor times the mean of Delta (averages: of D)."""
    chosen, rejected = ratios(batch, averages=averages, reference=reference)
    one, other = value(loss, batch), value(loss, swapped(batch))
    expected = -factor * ((chosen - rejected) * has_tokens(batch)).sum().item() / len(batch)
    close(one - other, expected, max(abs(one), abs(other)))


@named
def limits_in_beta(make: Callable[[float], Loss], batch: Batch, **of: Any) -> None:
    """(L - ln 2) / beta -> -mean Delta / 2 as beta -> 0, and L / beta -> mean of relu(-Delta) as beta -> inf."""
    chosen, rejected = ratios(batch, **of)
    margins, share = (chosen - rejected) * has_tokens(batch), has_tokens(batch).double().mean().item()
    small, large = 1e-7, 1e7
    slope = (value(make(small), batch) - math.log(2) * share) / small
    close(slope, -margins.mean().item() / 2, terms=margins.abs().max().item() + 1, rtol=1e-4)
    close(value(make(large), batch) / large, (-margins).relu().mean().item(), terms=1, rtol=1e-6)


@named
def reference_shift(loss: Loss, batch: Batch, by: float) -> None:
    """L(log p + c_i, log ref + c_i) = L for any constant c_i of each completion."""
    constants = {
        part: by * (1 + torch.arange(len(batch), dtype=torch.float64)) * (i + 1) for i, part in enumerate(batch.masks)
    }
    plain = scored(batch)
    shifted = moved(plain, constants)
    close(value(loss, shifted), value(loss, plain), rtol=1e-7)


@named
def common_shift(loss: Loss, batch: Batch, by: float) -> None:
    """L(r_w + c, r_l + c) = L: only the margin matters. Of losses of averages: on `equal_lengths`."""
    constant = torch.full((len(batch),), by, dtype=torch.float64)
    plain = scored(batch)
    shifted = moved(plain, {"chosen": constant, "rejected": constant}, ["policy"])
    close(value(loss, shifted), value(loss, plain), rtol=1e-7)


@named
def monotone(loss: Loss, batch: Batch) -> None:
    """dL/d(chosen) <= 0 <= dL/d(rejected), everywhere; of labelled examples by their label."""
    for part, grad in run(loss, batch).grads.items():
        sign = torch.tensor([1.0 if part == "rejected" else -1.0]).expand(len(batch))
        if part == "completion" and "label" in batch.rows:
            sign = torch.where(batch.rows["label"], -1.0, 1.0)
        expect((grad * sign[:, None] >= 0).all(), f"the gradient of {part} is {numbers(grad)}")


@named
def bounded_slope(loss: Loss, batch: Batch, bound: float) -> None:
    """|dL/dr| <= bound, of every example."""
    largest = max(grad.abs().max().item() for grad in slopes(loss, scored(batch)).values())
    expect(largest <= bound * (1 + 1e-9), f"{largest:.12g}, expected at most {bound:.12g}")


@named
def least_at(loss: Loss, batch: Batch, chosen: float, rejected: float, least: float, averages: bool = False) -> None:
    """Where all pairs have these r_w and r_l (averages: averages) is the minimum: L = least, G = 0; else L >= least."""
    batch = scored(batch)
    expect(value(loss, batch) >= least - 1e-9, f"{value(loss, batch):.12g} is less than {least:.12g}")
    lengths = [batch.masks[part].sum(-1) if averages else 1.0 for part in ("chosen", "rejected")]
    r_w, r_l = ratios(batch)
    by = {"chosen": chosen * lengths[0] - r_w, "rejected": rejected * lengths[1] - r_l}
    there = run(loss, moved(batch, by, ["policy"]))
    close(there.loss.item(), least, terms=1)
    for part, grad in there.grads.items():
        expect(grad.abs().max() < 1e-8, f"the gradient of {part} there is {numbers(grad)}")


@named
def best_pairing(sorting: Loss, pairing: Loss, batch: Batch, order: Sequence[int]) -> None:
    """Optimal transport: L_aot(batch) <= L(the reference's margins dealt to the pairs in any order), = for one pair."""
    batch = scored(batch)
    sums = {
        part: torch.where(batch.masks[part], x, torch.zeros_like(x)).sum(-1)[list(order)]
        for part, x in batch.tokens["ref"].items()
    }
    none = {part: torch.zeros_like(x) for part, x in batch.tokens["ref"].items()}
    dealt = moved(replace(batch, tokens=batch.tokens | {"ref": none}), sums, ["ref"])
    at_least(pairing, sorting, dealt)
    close(value(sorting, dealt), value(sorting, batch), terms=1)
    one = take(batch, [0])
    close(value(sorting, one), value(pairing, one))


@named
def independent_order(loss: Loss, batch: Batch, order: Sequence[int]) -> None:
    """L does not change where the rejected completions are dealt to the chosen ones in another order."""
    batch, other = scored(batch), scored(take(batch, order))
    masks = batch.masks | {"rejected": other.masks["rejected"]}
    tokens = {role: x | {"rejected": other.tokens[role]["rejected"]} for role, x in batch.tokens.items()}
    close(value(loss, replace(batch, masks=masks, tokens=tokens)), value(loss, batch))


@named
def affine_rewards(make: Callable[[float], Loss], batch: Batch, at: float) -> None:
    """r(a) = r(0) + a (r(1) - r(0)) of both completions, read off the metrics `rewards/...`."""
    none, some, all_of = (run(make(a), batch).metrics for a in (0.0, at, 1.0))
    for name in ("rewards/chosen", "rewards/rejected"):
        low, got, high = (metrics[name].total.item() for metrics in (none, some, all_of))
        close(got, low + at * (high - low), max(abs(low), abs(high)))


@named
def odds_ratio(loss: Loss, batch: Batch, weight: float) -> None:
    """L = NLL + weight * mean of log(1 + odds_l / odds_w), odds = P / (1 - P) of P = exp(average log-prob); ORPO."""
    batch = replace(batch, tokens=batch.tokens | {"policy": {k: x - 0.1 for k, x in batch.tokens["policy"].items()}})
    batch = scored(batch)
    chosen, rejected = ratios(batch, averages=True, reference=False)
    odds = [a.exp() / -torch.expm1(a) for a in (chosen, rejected)]
    policy, mask = ({p: x[p] for p in ("chosen", "prompt")} for x in (batch.tokens["policy"], batch.masks))
    nll = -sum(policy[p][mask[p]].sum() for p in policy) / sum(mask[p].sum() for p in policy)  # type: ignore[operator]
    close(value(loss, batch), (nll + weight * torch.log1p(odds[1] / odds[0]).mean()).item())


@named
def complementary_labels(loss: Loss, batch: Batch, weight: float) -> None:
    """L(labels) + L(the opposite labels) = weight, of each example with something scored: KTO's value function."""
    opposite = replace(batch, rows={"label": ~batch.rows["label"]})
    expected = weight * has_tokens(batch).double().mean().item()
    close(value(loss, batch) + value(loss, opposite), expected)


@named
def weight_scale(loss: Loss, batch: Batch, factor: float) -> None:
    """L, G(weights * c) = L, G(weights), for any c > 0."""
    weights = batch.tokens.get("weights", {part: torch.ones_like(x) for part, x in batch.tokens["policy"].items()})
    scaled = replace(batch, tokens=batch.tokens | {"weights": {part: factor * x for part, x in weights.items()}})
    got, expected = run(loss, scaled), run(loss, replace(batch, tokens=batch.tokens | {"weights": weights}))
    close(got.loss.item(), expected.loss.item())
    same_gradient(got.grads, expected.grads)
