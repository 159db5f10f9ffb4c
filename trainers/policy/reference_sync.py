"""A reference that follows the policy: every so many optimizer steps ref := alpha * policy + (1 - alpha) * ref.

TR-DPO, "Learn Your Reference Model for Real Good Alignment" (arXiv 2404.09656), its soft update (alpha < 1) and its
hard one (alpha = 1), for every loss that has a reference. The options are TRL's: `sync_ref_model`,
`ref_model_mixup_alpha`, `ref_model_sync_steps`.

What is blended are the weights W that the model computes with. In full fine-tuning these are the parameters. With
LoRA, W = W_0 + s B A, and W_0 is common to both, so the products are blended:

    s B_ref A_ref := alpha * s B A + (1 - alpha) * s B_ref A_ref

Blended factors would have another product: alpha^2 B A + ... with B A_ref and B_ref A in it. The sum of two products is
one product of concatenated factors, [alpha B, (1 - alpha) B_ref] [A; A_ref], so the reference stays an adapter, of a
rank that grows by the policy's at each synchronisation, up to a bound (see `LoraBlend`).

Differs from TRL 1.16: LoRA (and QLoRA) is allowed, which TRL refuses; parameters are blended in float32 at least, in
TRL in their own dtype.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..config import RunConfig
from ..errors import UserError
from ..processes.sharding import is_sharded
from .policy import REFERENCE_ADAPTER, Policy
from .reference import ModelReference, Reference

SMALLEST = 1e-8  # past adapters with a smaller coefficient are dropped


def make_sync(
    config: RunConfig, policy: Policy, reference: Reference | None, accelerator: Accelerator, total_steps: int
) -> tuple[ReferenceSync | None, list[str]]:
    """What makes the reference follow the policy, where the options say so, and what to tell about it."""
    options = config.model
    if not options.sync_ref_model:
        return None, []
    if is_sharded(accelerator):
        raise UserError(
            "--sync_ref_model needs the whole weights on every process, and these are sharded; leave it out"
        )
    other = reference.policy if isinstance(reference, ModelReference) else None
    alpha, every = options.ref_model_mixup_alpha, options.ref_model_sync_steps
    assert alpha is not None and every is not None  # `RunConfig.resolved`
    sync = ReferenceSync(policy, other, alpha=alpha, every=every)
    if every > total_steps:
        return sync, [f"the reference stays as it is: --ref_model_sync_steps {every} of {total_steps} steps"]
    return sync, [f"every {every} steps the reference becomes {alpha:g} x the policy + {1 - alpha:g} x itself"]


class ReferenceSync:
    """Blends the policy into its reference; call `after` with the number of each optimizer step done.

    reference: the other model; None: the policy's own frozen adapter. Every process computes the same blend, from
    weights that are the same on all.
    """

    def __init__(self, policy: Policy, reference: Policy | None, *, alpha: float, every: int) -> None:
        self.alpha, self.every = alpha, every
        self.adapters = [LoraBlend(layer) for layer in plain_lora_layers(policy.model)] if reference is None else []
        self.parameters = [] if reference is None else paired(policy, reference)

    def after(self, step: int) -> None:
        """Synchronise where step `step`, counted from 1, is a multiple of `every`."""
        if step % self.every or self.alpha == 0:
            return
        with torch.no_grad():
            for ref, theta in self.parameters:
                wide = torch.promote_types(ref.dtype, torch.float32)
                ref.copy_(ref.to(wide).lerp(theta.to(ref.device, wide), self.alpha))
            for layer in self.adapters:
                layer.blend(self.alpha)

    def state(self) -> tuple[dict[str, Tensor], list[Any]]:
        """(the reference's weights as they are now, the terms of each layer's sum)."""
        tensors = {f"{i}/parameter": ref.detach().cpu() for i, (ref, _) in enumerate(self.parameters)}
        for i, layer in enumerate(self.adapters):
            for factor in ("lora_A", "lora_B"):
                tensors[f"{i}/{factor}"] = getattr(layer.layer, factor)[REFERENCE_ADAPTER].weight.detach().cpu()
        return tensors, [layer.terms for layer in self.adapters]

    def load_state(self, tensors: Mapping[str, Tensor], terms: Sequence[Any]) -> None:
        """The inverse."""
        with torch.no_grad():
            for i, (ref, _) in enumerate(self.parameters):
                ref.copy_(tensors[f"{i}/parameter"])
        for i, (layer, saved) in enumerate(zip(self.adapters, terms, strict=True)):
            layer.terms = None if saved is None else [(float(c), int(rank)) for c, rank in saved]
            layer.layer.r[REFERENCE_ADAPTER] = len(tensors[f"{i}/lora_A"])
            for factor in ("lora_A", "lora_B"):
                linear = getattr(layer.layer, factor)[REFERENCE_ADAPTER]
                replace_weight(linear, tensors[f"{i}/{factor}"].to(linear.weight.device, copy=True))


def paired(policy: Policy, reference: Policy) -> list[tuple[Tensor, Tensor]]:
    """(reference's, policy's) parameters of the same names."""
    theta = dict(policy.named_parameters())
    return [(p, theta[name]) for name, p in reference.named_parameters()]


@dataclass
class LoraBlend:
    """The reference adapter of one LoRA layer, [rank, in] and [out, rank], as a sum of past adapters.

    terms: (coefficient, rank) of each, in the order of the factors' rows and columns. The coefficient is in B already.
    At first the one term is what the reference starts from.

    Rank: the k-th last adapter has the coefficient alpha * (1 - alpha)^(k - 1), so of rank r each, about
    r * ln(1e-8) / ln(1 - alpha) stay above `SMALLEST` (21 r for alpha 0.6), and never more than the layer is wide.
    """

    layer: Any
    terms: list[tuple[float, int]] | None = None

    def blend(self, alpha: float) -> None:
        """B_ref A_ref := alpha B A + (1 - alpha) B_ref A_ref."""
        a, b, scaling = self.layer.lora_A, self.layer.lora_B, self.layer.scaling
        old_a, old_b = a[REFERENCE_ADAPTER].weight, b[REFERENCE_ADAPTER].weight
        own = scaling["default"] / scaling[REFERENCE_ADAPTER]  # each B is multiplied by its own
        terms = self.terms or [(1.0 if old_b.any() else 0.0, len(old_a))]
        ranks = [rank for _, rank in terms]
        kept = [i for i, (coefficient, _) in enumerate(terms) if coefficient * (1 - alpha) >= SMALLEST]
        parts_a, parts_b = old_a.split(ranks), old_b.split(ranks, dim=1)
        new_a = torch.cat([a["default"].weight, *(parts_a[i] for i in kept)])
        new_b = torch.cat([b["default"].weight * (alpha * own), *(parts_b[i] * (1 - alpha) for i in kept)], dim=1)
        terms = [(alpha, len(a["default"].weight)), *((terms[i][0] * (1 - alpha), ranks[i]) for i in kept)]
        if len(new_a) > min(new_a.shape[1], len(new_b)) and len(terms) > 1:
            new_a, new_b = narrow(new_a, new_b)
            terms = [(sum(coefficient for coefficient, _ in terms), len(new_a))]
        self.terms = terms
        self.layer.r[REFERENCE_ADAPTER] = len(new_a)
        replace_weight(a[REFERENCE_ADAPTER], new_a)
        replace_weight(b[REFERENCE_ADAPTER], new_b)


def narrow(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of b @ a of the rank min(in, out): the product itself, and the identity."""
    product = b @ a
    if len(b) <= a.shape[1]:
        return product, torch.eye(len(b), dtype=b.dtype, device=b.device)
    return torch.eye(a.shape[1], dtype=a.dtype, device=a.device), product


def replace_weight(linear: nn.Linear, weight: Tensor) -> None:
    """Give a frozen linear layer another weight, perhaps of another shape."""
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.out_features, linear.in_features = weight.shape


def plain_lora_layers(model: Any) -> list[Any]:
    """All LoRA layers of a PEFT model; UserError where anything else is trained than the two factors of such."""
    from peft.tuners.lora import LoraLayer

    layers = [m for m in model.modules() if isinstance(m, LoraLayer) and is_plain(m)]
    factors = {id(m.weight) for layer in layers for m in (layer.lora_A["default"], layer.lora_B["default"])}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in factors:
            raise UserError(
                "--sync_ref_model blends the products of plain LoRA layers or whole models, and cannot blend "
                f"{name}: train without it, or without --sync_ref_model"
            )
    return layers


def is_plain(layer: Any) -> bool:
    """Whether the layer adds scaling * B A x to what a linear layer gives, and no more (DoRA and others do)."""
    from peft.tuners.lora import Linear

    kind = getattr(layer, "peft_class", type(layer))  # of a layer that computes in its own way, see lora_layers.py
    known = kind is Linear or kind.__name__ in ("Linear4bit", "Linear8bitLt")
    adapters = {"default", REFERENCE_ADAPTER}
    return known and adapters <= layer.lora_A.keys() and not adapters & getattr(layer, "lora_variant", {}).keys()
