"""Laws that every registered loss keeps in every loss_type: a new variant is held to them without a new test."""

import dataclasses
import itertools
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from logratio.losses import (
    DPO_TYPES,
    GRPO_TYPES,
    KTO_TYPES,
    LOSSES,
    SFT_TYPES,
    CompletionLogps,
    Kind,
    Loss,
    PairLogps,
    Totals,
)
from logratio.reference.strategies import PARTS, Batch, batches, convert, pad, partitions, take

TYPES = {"sft": SFT_TYPES, "dpo": DPO_TYPES, "kto": KTO_TYPES, "grpo": GRPO_TYPES}
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "kto": [{}, {"desirable_weight": 0.3, "undesirable_weight": 1.7}],
    "grpo": [
        {},
        {"importance_sampling_level": "sequence"},
        {"beta": 0.1},
        {"beta": 0.1, "use_bias_correction_kl": False, "epsilon_high": 0.5},
    ],
}


def every_loss() -> list[Any]:
    """One pytest parameter for each registered loss, loss_type and set of options."""
    params = []
    for name, cls in LOSSES.items():
        loss_types = [{"loss_type": loss_type} for loss_type in TYPES.get(name, ())] or [{}]
        for loss_type, options in itertools.product(loss_types, OPTIONS.get(name, [{}])):
            label = "-".join([name, *loss_type.values(), *(f"{k}={v}" for k, v in options.items())])
            params.append(pytest.param(cls(**loss_type, **options), id=label))
    return params


every = pytest.mark.parametrize("loss", every_loss())
quick = settings(max_examples=20, deadline=None)


class Result(NamedTuple):
    """A loss, its gradient by policy part [C, T], and its metrics (total, count)."""

    loss: Tensor
    grads: dict[str, Tensor]
    metrics: dict[str, tuple[float, float]]


def logps_of(batch: Batch, role: str, part: str = "completion") -> CompletionLogps:
    entropy = batch.tokens["entropy"][part] if role == "policy" and batch.kind in ("sequence", "grouped") else None
    return CompletionLogps(batch.tokens[role][part], batch.masks[part], entropy)


def arguments(loss: Loss, batch: Batch) -> dict[str, Any]:
    """What a loss of the batch's kind is called with, `totals` (of this batch alone) included."""
    if loss.kind is Kind.PAIRED:
        roles = {
            role: PairLogps(
                logps_of(batch, role, "chosen"),
                logps_of(batch, role, "rejected"),
                logps_of(batch, role, "prompt") if loss.scores_prompt else None,
            )
            for role in ("policy", "ref")
        }
    else:
        roles = {role: logps_of(batch, role) for role in ("policy", "ref", "old")}
    kwargs: dict[str, Any] = {"policy": roles["policy"]}
    if loss.wants_reference:
        kwargs["ref"] = roles["ref"]
    if loss.kind is Kind.GROUPED:
        kwargs["old"] = roles["old"]
    collected = batch.collected if loss.window_pass else None
    return kwargs | batch.rows | {"totals": Totals.of(roles["policy"], collected)}


def run(loss: Loss, batch: Batch, totals: Totals | None = None) -> Result:
    leaves = {part: values.detach().clone().requires_grad_() for part, values in batch.tokens["policy"].items()}
    kwargs = arguments(loss, dataclasses.replace(batch, tokens=batch.tokens | {"policy": leaves}))
    out = loss(**(kwargs if totals is None else kwargs | {"totals": totals}))
    assert out.loss.shape == () and out.loss.requires_grad
    out.loss.backward()
    grads = {part: leaf.grad for part, leaf in leaves.items() if leaf.grad is not None}
    for mean in out.metrics.values():
        assert not mean.total.requires_grad and mean.total.shape == mean.count.shape == ()
    return Result(out.loss.detach(), grads, {k: (m.total.item(), m.count.item()) for k, m in out.metrics.items()})


def totals_of(loss: Loss, batch: Batch) -> Totals:
    return arguments(loss, batch)["totals"]


def assert_same(got: Result, expected: Result, scale: float = 0.0) -> None:
    """Equal but for float64's rounding of sums in another order; `scale`: of what cancels in the loss."""
    assert (got.loss - expected.loss).abs() <= 1e-11 * (expected.loss.abs() + scale), "loss"
    assert got.grads.keys() == expected.grads.keys()
    for part, grad in expected.grads.items():
        difference = (got.grads[part] - grad).abs().max()
        assert difference <= 1e-11 * grad.abs().max(), f"gradient of {part}: off by {difference}"
    assert got.metrics.keys() == expected.metrics.keys()
    for name, (total, count) in expected.metrics.items():
        if name != "kl" or count == got.metrics[name][1]:
            assert got.metrics[name][1] == count, name
        mean = total / max(count, 1)
        assert got.metrics[name][0] / max(got.metrics[name][1], 1) == pytest.approx(mean, rel=1e-9, abs=1e-9), name


def test_every_loss_type_is_here():
    """Whoever registers a loss with a table of variants enters the table above."""
    assert {name for name, cls in LOSSES.items() if "loss_type" in {f.name for f in dataclasses.fields(cls)}} == set(
        TYPES
    )


@every
@quick
@given(st.data())
def test_padding_does_not_matter(loss, data):
    batch = data.draw(batches(loss.kind))
    left, right = data.draw(st.integers(0, 2)), data.draw(st.integers(0, 2))
    padded = run(
        loss, pad(batch, left=left, right=right, fill=data.draw(st.sampled_from([torch.nan, torch.inf, -7.0])))
    )
    for part, grad in padded.grads.items():
        width = batch.masks[part].shape[1]
        assert (grad[:, :left] == 0).all() and (grad[:, left + width :] == 0).all()
    inner = {part: grad[:, left : left + batch.masks[part].shape[1]] for part, grad in padded.grads.items()}
    assert_same(padded._replace(grads=inner), run(loss, batch))
    assert all((grad[~batch.masks[part]] == 0).all() for part, grad in inner.items())


@every
@quick
@given(st.data())
def test_a_split_of_the_step_does_not_matter(loss, data):
    """Any deal of the examples to micro-batches sums to the whole: loss, gradient and metrics. Order included."""
    batch = data.draw(batches(loss.kind))
    totals = totals_of(loss, batch)
    whole = run(loss, batch, totals)
    grads = {part: torch.full_like(grad, torch.nan) for part, grad in whole.grads.items()}
    value, magnitude, metrics = 0.0, 0.0, {name: (0.0, 0.0) for name in whole.metrics}
    for rows in data.draw(partitions(len(batch))):
        part_of = run(loss, take(batch, rows), totals)
        value, magnitude = value + part_of.loss, magnitude + part_of.loss.abs().item()
        for part, grad in part_of.grads.items():
            grads[part][rows] = grad
        for name, (total, count) in part_of.metrics.items():
            metrics[name] = (metrics[name][0] + total, metrics[name][1] + count)
    magnitude += sum(run(loss, take(batch, [i]), totals).loss.abs().item() for i in range(len(batch)))
    assert_same(Result(value, grads, metrics), whole, scale=magnitude)


@every
@quick
@given(st.data())
def test_what_is_collected_does_not_depend_on_the_split(loss, data):
    if loss.window_pass is None:
        return
    batch = data.draw(batches(loss.kind))
    kwargs = arguments(loss, batch)
    whole = loss.collect(kwargs["policy"], kwargs["ref"])
    deal = data.draw(partitions(len(batch)))
    parts = [arguments(loss, take(batch, rows)) for rows in deal]
    cat = torch.cat([loss.collect(part["policy"], part["ref"]) for part in parts])
    torch.testing.assert_close(cat, whole[[i for rows in deal for i in rows]], rtol=1e-12, atol=0)
    assert not whole.requires_grad


@every
@quick
@given(st.data())
def test_nothing_scored_is_zero_with_a_graph(loss, data):
    batch = data.draw(batches(loss.kind, all_masked=True))
    for fill in (-1.0, torch.nan):
        result = run(loss, pad(batch, left=0, right=0, fill=fill))
        assert result.loss == 0
        assert all((grad == 0).all() for grad in result.grads.values())
        assert all(total == 0 and count == 0 for total, count in result.metrics.values())


@every
@quick
@given(st.data())
def test_extremes_are_finite_in_float32(loss, data):
    batch = convert(data.draw(batches(loss.kind)), lambda t: t.float())
    result = run(loss, batch)
    assert result.loss.isfinite(), result.loss
    assert all(grad.isfinite().all() for grad in result.grads.values()), result.grads
    assert all(abs(total) < torch.inf for total, _ in result.metrics.values()), result.metrics


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@settings(max_examples=10, deadline=None)
@given(st.data())
def test_low_precision_log_probs_are_computed_in_float32(loss, dtype, data):
    """The result is float32's on the same numbers, bit for bit; the gradient is float32's, rounded once."""
    low = convert(data.draw(batches(loss.kind)), lambda t: t.to(dtype))
    got, expected = run(loss, low), run(loss, convert(low, lambda t: t.float()))
    assert got.loss.dtype == torch.float32
    assert torch.equal(got.loss, expected.loss)
    for part, grad in expected.grads.items():
        assert torch.equal(got.grads[part], grad.to(dtype))


# dft's weight has no gradient on purpose: its derivative is not that of its value. See test_sft.
STOPS_GRADIENTS = {("sft", "dft")}


@every
@settings(max_examples=8, deadline=None)
@given(st.data())
def test_gradient_is_that_of_the_value(loss, data):
    if (next(n for n, c in LOSSES.items() if isinstance(loss, c)), getattr(loss, "loss_type", "")) in STOPS_GRADIENTS:
        return
    batch = data.draw(batches(loss.kind, max_rows=3, max_tokens=3, max_size=1.0))
    parts = list(batch.tokens["policy"])
    totals = totals_of(loss, batch)

    def value(*policy: Tensor) -> Tensor:
        moved = dataclasses.replace(batch, tokens=batch.tokens | {"policy": dict(zip(parts, policy, strict=True))})
        return loss(**(arguments(loss, moved) | {"totals": totals})).loss

    # away from kinks (a ratio at a clip bound, a hinge at 1) and from the edge at log-prob 0
    leaves = [(batch.tokens["policy"][part] - 0.01).requires_grad_() for part in parts]
    value(*leaves).backward()
    step = 1e-6
    for leaf in leaves:
        direction = torch.cos(torch.arange(leaf.numel(), dtype=leaf.dtype)).view_as(leaf)
        ends = [value(*(x + sign * step * direction if x is leaf else x for x in leaves)).item() for sign in (1, 0, -1)]
        left, right = (ends[1] - ends[2]) / step, (ends[0] - ends[1]) / step
        assume(abs(left - right) < 1e-3 * (1 + abs(left)))
        slope = 0.0 if leaf.grad is None else (leaf.grad * direction).sum().item()
        assert slope == pytest.approx((ends[0] - ends[2]) / (2 * step), rel=1e-5, abs=1e-7)


@every
@quick
@given(st.data())
def test_only_the_policy_gets_gradients_and_nothing_is_modified(loss, data):
    batch = data.draw(batches(loss.kind))
    copy = convert(batch, torch.clone)
    others = [t for role in ("ref", "old", "entropy") for t in batch.tokens[role].values()] + [batch.collected]
    for tensor in others:
        tensor.requires_grad_()
    run(loss, batch)
    assert all(tensor.grad is None for tensor in others)
    for role, parts in copy.tokens.items():
        assert all(torch.equal(values, batch.tokens[role][part]) for part, values in parts.items())
    assert all(torch.equal(values, batch.rows[name]) for name, values in copy.rows.items())
    assert torch.equal(copy.collected, batch.collected)


def plain(kind: str) -> Batch:
    """Three examples of two scored tokens."""
    tokens = {
        role: {part: torch.full((3, 2), -0.5) for part in PARTS[kind]} for role in ("policy", "ref", "old", "entropy")
    }
    rows = {"labeled": {"label": torch.tensor([True, False, True])}, "grouped": {"advantages": torch.ones(3)}}
    masks = {part: torch.ones(3, 2, dtype=torch.bool) for part in PARTS[kind]}
    return Batch(kind, masks, tokens, rows.get(kind, {}), torch.zeros(3))


@every
@pytest.mark.parametrize("name", ["ref", "old", "advantages", "label"])
def test_rows_that_would_broadcast_are_refused(loss, name):
    kwargs, one = (arguments(loss, batch) for batch in (plain(loss.kind), take(plain(loss.kind), [0])))
    if name in kwargs:
        with pytest.raises(ValueError, match=name):
            loss(**kwargs | {name: one[name]})


@every
def test_unknown_loss_types_and_bad_betas_are_refused(loss):
    fields = {field.name for field in dataclasses.fields(loss)}
    if "loss_type" in fields:
        with pytest.raises(ValueError, match="loss_type='typo' is unknown, expected one of: .*" + loss.loss_type):
            dataclasses.replace(loss, loss_type="typo")
    if "beta" in fields:
        with pytest.raises(ValueError, match="beta=-0.1 must"):
            dataclasses.replace(loss, beta=-0.1)


@every
def test_losses_are_frozen_and_know_their_defaults(loss):
    assert loss == dataclasses.replace(loss) and hash(loss) == hash(dataclasses.replace(loss))
    assert type(loss)() == type(loss)(**{f.name: f.default for f in dataclasses.fields(loss)})
    with pytest.raises(dataclasses.FrozenInstanceError):
        loss.beta = 1.0
