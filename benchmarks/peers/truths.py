"""What verification compares on: a tiny model and ragged rows, both random, and what they are under the truths.

Models are a tiny random Llama and Qwen2 with LoRA. `sides.py` computes a loss on them: ours, TRL's and the oracle's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from logratio.losses import Kind
from logratio.reference import oracle
from logratio.reference.oracle import SequenceLogps
from logratio.trainers.batches.packing import PackedBatch
from logratio.trainers.data.examples import Example, prepare
from logratio.trainers.data.rows import Rows
from logratio.trainers.policy.policy import Policy
from logratio.trainers.policy.reference import AdapterReference, ModelReference, Reference, tokens_key
from logratio.trainers.policy.sharing import why_not_shared
from logratio.trainers.policy.teacher import Teacher
from logratio.trainers.policy.tiny import tiny_tokenizer

from .case import Case
from .randoms import old_logps, random_groups, random_model, random_rows, rollout_rows, sampled_by_another, words_of

Kept = TypeVar("Kept")
MAX_LENGTH = 1024
LONGEST = 12
"""Characters of a verified completion: exp(r) is as wrong as its sum of float32 log-probs, in TRL too."""


@dataclass(frozen=True)
class Gradient:
    """A loss, its scale (see `relative_errors`) and the gradient of every trainable parameter."""

    loss: float
    scale: float
    grads: dict[str, Tensor]

    @classmethod
    def of(cls, model: Any, loss: float, scale: float = 0.0) -> Gradient:
        """Of a loss that has gone backward through the model."""
        grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        return cls(loss, scale, {name: g for name, g in grads.items() if g is not None})


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """|a - b| / |b| of whole gradients. Raises ValueError where they are not of the same parameters."""
    if a.keys() != b.keys():
        raise ValueError(f"gradients of different parameters: {sorted(a.keys() ^ b.keys())[:4]}")
    above = sum((a[k].double() - b[k].double()).square().sum().item() for k in b)
    return (above / sum(b[k].double().square().sum().item() for k in b)) ** 0.5


def exact(model: Any) -> Any:
    """A float64 copy that computes in float64: transformers' RMSNorms go through float32 whatever the dtype."""
    model = copy.deepcopy(model).double()
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child).__name__.endswith("RMSNorm"):
                norm = torch.nn.RMSNorm(child.weight.shape, eps=child.variance_epsilon, dtype=torch.float64)
                norm.weight = child.weight
                setattr(module, name, norm)
    return model


class Subject:
    """One random model in both precisions, with the rows that cases share; what is asked twice is computed once.

    A case changes neither the model nor what is kept.
    """

    def __init__(self, config: Any, seed: int) -> None:
        self.seed = seed
        self.models = {torch.float32: random_model(config, seed, adapters=0.2)}
        self.models[torch.float64] = exact(self.models[torch.float32])
        self.kept: dict[Any, Any] = {}
        self.noise: torch.Generator | None = None
        self.graphs: list[tuple[Tensor, Tensor]] = []  # a leaf that losses are given, and what it was computed as

    def once(self, key: tuple[Any, ...], compute: Callable[[], Kept]) -> Kept:
        """`compute()`, of the first call with this key."""
        if key not in self.kept:
            self.kept[key] = compute()
        kept: Kept = self.kept[key]
        return kept

    def policy(self, dtype: torch.dtype) -> Policy:
        """A copy of the model as a policy, without a gradient."""

        def make() -> Policy:
            policy = Policy(copy.deepcopy(self.models[dtype]))
            policy.shared = not why_not_shared(policy)
            return policy

        policy = self.once(("policy", dtype), make)
        policy.zero_grad(set_to_none=True)
        return policy

    def reference(self, policy: Policy, dtype: torch.dtype, stats: Sequence[str] = ()) -> Reference:
        """The policy's own without its adapters; a micro-batch that comes again gets what it got."""
        live = AdapterReference(policy, stats)

        def remembered(batch: PackedBatch) -> Tensor:
            kept = any(c.support is not None for c in batch.completions)
            key = ("reference", dtype, kept, *stats, batch.targets.shape, *(tokens_key(e) for e in batch.examples))
            return self.once(key, lambda: live(batch))

        return remembered

    def examples(self, case: Case) -> list[Example]:
        """What `random_rows` and `random_groups` are after tokenization."""
        loss = case.loss
        if loss.kind is Kind.GROUPED:
            return random_groups(self.seed, kept=case.kept, by_token=case.by_token)
        texts = random_rows(case.method, self.seed, weighted=case.weighted, longest=LONGEST, margin=loss.wants_margin)
        return prepare(
            Rows("random", texts),
            loss.kind,
            tiny_tokenizer(),
            max_length=MAX_LENGTH,
            gold=loss.scores_gold,
            margin=loss.wants_margin,
        )[0]

    def old(self, dtype: torch.dtype, kept: int | None = None) -> dict[str, list[Tensor]]:
        """`old_logps` of `random_groups`: numbers of float32, so that both precisions are given the same."""

        def make() -> dict[str, list[Tensor]]:
            table = old_logps(self.models[torch.float64], random_groups(self.seed, kept=kept), self.seed)
            return {key: [x.float().to(dtype) for x in values] for key, values in table.items()}

        return self.once(("old", dtype, kept), make)

    def behavior(self, dtype: torch.dtype, kept: int | None = None) -> dict[str, list[Tensor]]:
        """The same of what drew the rollouts where that was not the old policy."""
        return self.once(("behavior", dtype, kept), lambda: sampled_by_another(self.old(dtype, kept), self.seed + 1))

    def rollout_rows(self, sampled: bool = False) -> list[dict[str, Any]]:
        """`random_groups` as the driver of TRL takes them, with a reference in float32, as its trainer computes it.

        sampled: with `behavior`.
        """
        float32 = torch.float32
        ref = {
            tokens_key(e): [self.passed(e, k, float32, reference=True).completion for k in range(len(e.completions))]
            for e in random_groups(self.seed)
        }
        behavior = self.behavior(float32) if sampled else None
        return rollout_rows(random_groups(self.seed), self.old(float32), ref, behavior)

    def passed(
        self, example: Example, which: int, dtype: torch.dtype = torch.float64, *, reference: bool = False
    ) -> SequenceLogps:
        """A plain unpadded forward pass of a prompt with its completion number `which`, apart from its graph.

        reference: of the model without its adapters, and without a gradient.
        """
        completion, model = example.completions[which], self.models[dtype]
        ids, words = completion.ids, words_of(completion)

        def compute() -> SequenceLogps:
            trained = dtype == torch.float64 and not reference
            with model.disable_adapter() if reference else nullcontext(), torch.set_grad_enabled(trained):
                out = oracle.sequence_logps(model, example.prompt_ids, ids, words)
            if not trained:
                return out
            leaves = SequenceLogps(*(x.detach().requires_grad_() for x in out))
            self.graphs += zip(leaves, out, strict=True)
            return leaves

        return self.once(("passed", tuple(example.prompt_ids), tuple(ids), str(words), dtype, reference), compute)

    def teacher(self, policy: Policy, dtype: torch.dtype, anchored: bool) -> Teacher:
        """The model without its adapters: the policy's own weights, or others."""
        return (
            AdapterReference(policy) if anchored else ModelReference(Policy(copy.deepcopy(self.models[dtype]).unload()))
        )

    def divergences(self, example: Example, beta: float, temperature: float) -> Tensor:
        """Of its first completion's tokens from the teacher, in float64, off as `_in_float64` is."""
        ids, first = [*example.prompt_ids, *example.completions[0].ids], len(example.prompt_ids) - 1

        def of(dtype: torch.dtype) -> Tensor:
            model, row = self.models[dtype], torch.tensor([ids])
            with torch.no_grad(), model.disable_adapter():
                teacher = model(row).logits[0, first:-1]
            with torch.set_grad_enabled(dtype == torch.float64):
                logits = model(row).logits[0, first:-1]
                return oracle.generalized_jsd(teacher, logits, beta=beta, temperature=temperature)

        def compute() -> tuple[Tensor, Tensor]:
            values = of(torch.float64)
            leaf = values.detach().requires_grad_()
            self.graphs.append((leaf, values))
            return leaf, (of(torch.float32) - leaf.detach()).abs() + torch.finfo(torch.float32).eps * leaf.detach()

        exact, off = self.once(("divergences", tuple(ids), first, beta, temperature), compute)
        if self.noise is None:
            return exact
        return exact + (2 * torch.randint(2, (), generator=self.noise) - 1) * off

    def policy_passes(self, examples: Sequence[Example], which: int) -> list[SequenceLogps]:
        """In float64, of every example's completion number `which`."""
        return [self._in_float64(example, which, False) for example in examples]

    def reference_passes(self, examples: Sequence[Example], which: int) -> list[Tensor]:
        """The completions' log-probs under the model without its adapters, in float64."""
        return [self._in_float64(example, which, True).completion for example in examples]

    def reference_entropies(self, examples: Sequence[Example], which: int) -> list[Tensor]:
        """Of the same tokens' distributions, in nats."""
        return [self._in_float64(example, which, True).entropy for example in examples]

    def _in_float64(self, example: Example, which: int, reference: bool) -> SequenceLogps:
        """A pass; inside `rounded` as far off as the same in float32 is, and as sums of it are, all to one side."""
        exact = self.passed(example, which, reference=reference)
        if self.noise is None:
            return exact
        single = self.passed(example, which, torch.float32, reference=reference)
        side = 2 * torch.randint(2, (), generator=self.noise) - 1
        eps = torch.finfo(torch.float32).eps  # of a sum of log-probs, which are of one sign, when it is added up
        off = [(y - x.detach()).abs() + eps * x.detach().abs() for x, y in zip(exact, single, strict=True)]
        return SequenceLogps(*(x + side * o for x, o in zip(exact, off, strict=True)))

    @contextmanager
    def rounded(self, draw: int) -> Iterator[None]:
        """Inside, passes in float64 are off by the rounding of float32; in another `draw` to other sides."""
        self.noise = torch.Generator().manual_seed(draw)
        try:
            yield
        finally:
            self.noise = None

    def gradient(self, loss: Tensor) -> dict[str, Tensor]:
        """Of a loss of `policy_passes`, for every trained parameter, in float64.

        By the chain rule: what the passes give has few numbers, whose derivatives all losses share.
        """
        trained = {name: p for name, p in self.models[torch.float64].named_parameters() if p.requires_grad}
        total = torch.zeros(sum(p.numel() for p in trained.values()), dtype=torch.float64)
        slopes = torch.autograd.grad(loss, [leaf for leaf, _ in self.graphs], allow_unused=True)
        for slope, (leaf, values) in zip(slopes, self.graphs, strict=True):
            if slope is not None:
                total += slope @ self.once(("jacobian", id(leaf)), partial(jacobian, values, list(trained.values())))
        parts = total.split([p.numel() for p in trained.values()])
        return {name: part.view_as(p) for (name, p), part in zip(trained.items(), parts, strict=True)}


subject_of = cache(Subject)
"""The one of a configuration and a seed."""


def jacobian(values: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """[N, P]: the derivatives of N values by all numbers of the parameters."""
    rows = [torch.autograd.grad(value, parameters, retain_graph=True) for value in values]
    return torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
