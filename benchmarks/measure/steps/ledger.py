"""What a step's precision is worth: how exact its log-probs and gradient are, and how much of the update arrives.

    logps_err      |log p - exact| / |exact| over the completions' tokens, exact in float64
    grad_cosine    of the whole gradient with the one that float32 gives
    share_changed  of the entries that train, those that one update of AdamW changes: the rest is rounded away

The exact model has the same weights (nf4 ones as what they stand for) on our plain path, without a shared prompt.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from logratio.trainers.data.examples import Example
from logratio.trainers.policy.policy import Policy

from ...peers.truths import exact
from .contestants import Contestant, OldLogps, Ours, policy_logps
from .step_cases import StepCase

LARGEST_TRUTH = 2e9
"""Parameters beyond which there is none: a float64 copy takes the memory and the minute that the contestants need."""

Gradient = dict[str, Tensor]


class Truth(NamedTuple):
    """logps: of all completions' tokens in order, flat. grads: float32."""

    logps: Tensor
    grads: Gradient


def truth(case: StepCase, model: Any, trial: Sequence[Example], old: OldLogps | None) -> Truth:
    """What the step computes on these examples, if precision cost nothing."""
    logps = policy_logps(Policy(plain(model, torch.float64)), trial)
    whole = case.adapter == "full"
    twin = plain(model, torch.float32)
    reference = copy.deepcopy(twin).requires_grad_(False) if whole else None
    if whole:
        twin.requires_grad_(True)
    device = next(model.parameters()).device
    ours = Ours(dataclasses.replace(case, dtype="float32"), twin, reference, device, old, shared=False)
    grads = gradient(ours, trial)
    return Truth(logps, {name: g.cpu() for name, g in grads.items()})  # the contestants need the memory


def plain(model: Any, dtype: torch.dtype) -> Any:
    """A copy in `dtype`, computed in it throughout, nf4 layers as plain ones."""
    twin = copy.deepcopy(model)
    for parent in list(twin.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, torch.nn.Linear) and type(layer) is not torch.nn.Linear:  # PEFT's layers are none
                setattr(parent, name, dequantized(layer, dtype))
    return exact(twin) if dtype == torch.float64 else twin.to(dtype)


def dequantized(layer: Any, dtype: torch.dtype) -> torch.nn.Linear:
    """The plain layer that an nf4 one stands for."""
    from bitsandbytes.functional import dequantize_4bit

    weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(dtype)
    with torch.device("meta"):
        out = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
    out.weight = torch.nn.Parameter(weight, requires_grad=False)
    if layer.bias is not None:
        out.bias = torch.nn.Parameter(layer.bias.to(dtype), requires_grad=False)
    return out


def backward(contestant: Contestant, examples: Sequence[Example]) -> None:
    """Over these examples in one micro-batch, of TRL too, which counts completions where they are rollouts."""
    units = len(examples) * (len(examples[0].completions) if examples[0].advantages is not None else 1)
    contestant.backward(contestant.prepare(examples, units))


def gradient(contestant: Contestant, examples: Sequence[Example]) -> Gradient:
    """Of every parameter that trains, over these examples in one piece."""
    backward(contestant, examples)
    found = {name: p.grad for name, p in contestant.model.named_parameters() if p.requires_grad}
    contestant.model.zero_grad()
    return {name: g for name, g in found.items() if g is not None}


def cosine(a: Gradient, b: Gradient) -> float:
    """Of whole gradients."""
    dot = sum((a[k].double() * b[k].to(a[k].device).double()).sum().item() for k in b)
    norms = [sum(g.double().square().sum().item() for g in x.values()) ** 0.5 for x in (a, b)]
    return dot / (norms[0] * norms[1])


def share_changed(contestant: Contestant, examples: Sequence[Example]) -> float:
    """Takes one step; of the entries that train, the share whose value is another afterwards."""
    trained = [p for p in contestant.model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    backward(contestant, examples)
    contestant.update()
    changed = sum(int((p != q).sum()) for p, q in zip(trained, before, strict=True))
    return changed / sum(p.numel() for p in trained)


def ledger(
    contestant: Contestant, grads: Gradient, exact: Truth | None, examples: Sequence[Example]
) -> dict[str, float]:
    """The figures of a contestant that has taken no step yet, one without `exact`; it has taken one afterwards."""
    if exact is None:
        return {"share_changed": share_changed(contestant, examples)}
    logps = contestant.logps(examples).double()
    error = (logps - exact.logps.double()).norm() / exact.logps.double().norm()
    return {
        "logps_err": error.item(),
        "grad_cosine": cosine(grads, exact.grads),
        "share_changed": share_changed(contestant, examples),
    }
