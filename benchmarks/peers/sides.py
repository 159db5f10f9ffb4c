"""The sides of a comparison: our loss as a training step computes it, TRL's, and the oracle's.

Ours is cut into several micro-batches; the oracle has plain unpadded passes and the formulas from the papers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from logratio.losses import Kind
from logratio.reference import oracle, trl
from logratio.trainers.data.examples import Example
from logratio.trainers.policy.mismatch import mismatched
from logratio.trainers.policy.reference import StoredReference
from logratio.trainers.policy.tiny import tiny_tokenizer
from logratio.trainers.setup import start_accelerator
from logratio.trainers.step import Step
from logratio.trainers.window import MicroBatch

from .case import Case
from .randoms import random_rows
from .truths import LONGEST, MAX_LENGTH, Gradient, Subject

MICRO_BATCH_TOKENS = 40

Table = dict[str, list[Tensor]]
"""`tokens_key` of an example -> log-probs of its completions."""


def ours(case: Case, subject: Subject, dtype: torch.dtype) -> Gradient:
    """Our loss and gradient as one step of the loop computes them."""
    loss, policy = case.loss, subject.policy(dtype)
    policy.stats = (*loss.stats, *loss.ref_stats)
    reference = subject.reference(policy, dtype, loss.ref_stats)
    divergence = loss.divergence
    teacher = None if divergence is None else subject.teacher(policy, dtype, divergence.anchored)
    step = Step(
        start_accelerator("no"),
        policy,
        loss,
        reference if loss.wants_reference else None,
        micro_batch_tokens=MICRO_BATCH_TOKENS,
        max_length=MAX_LENGTH,
        teacher=teacher,
    )
    step.state = case.state
    examples = subject.examples(case)
    micros = step.micro_batches(examples)
    if loss.kind is Kind.GROUPED:
        behavior = subject.behavior(dtype, case.kept) if case.sampled else None
        fill_old(micros, reference, subject.old(dtype, case.kept), behavior)
    return Gradient.of(policy.model, step(micros, step.totals(examples, micros)).loss.item())


def fill_old(micros: Sequence[MicroBatch], live: Any, old: Table, behavior: Table | None) -> None:
    """Give rollouts the log-probs of the old policy, and of what sampled them, where a correction is to know it."""
    for micro in micros:
        micro.old = StoredReference(old, live)(micro.batch)
        micro.behavior = None if behavior is None else StoredReference(behavior, live)(micro.batch)


def trls(case: Case, subject: Subject) -> Gradient:
    """TRL's, in float32, without a scale."""
    assert case.trl is not None
    if case.method == "grpo":
        rows = subject.rollout_rows(case.sampled)
    else:
        rows = random_rows(case.method, subject.seed, longest=LONGEST)
    truth = trl.loss_and_grads(
        case.trl,
        subject.models[torch.float32],
        tiny_tokenizer(),
        rows,
        max_length=MAX_LENGTH,
        scaled=False,
        **case.trl_options,
    )
    return Gradient(truth.loss, 0.0, truth.grads)


def oracles(case: Case, subject: Subject) -> Gradient:
    """The oracle's, in float64."""
    loss, scale = ORACLES[case.method](case, subject, subject.examples(case))
    return Gradient(loss.item(), scale, subject.gradient(loss))


def oracle_sft(case: Case, subject: Subject, examples: list[Example]) -> tuple[Tensor, float]:
    out = subject.policy_passes(examples, 0)
    completions = [e.completions[0] for e in examples]
    weights = [torch.tensor(c.weights or [1.0] * len(c.ids), dtype=torch.float64) for c in completions]
    extra: dict[str, Any] = {"weights": weights} if case.weighted else {}
    stats: dict[str, Any] = {"log_z": [x.log_z for x in out], "entropy": [x.entropy for x in out]}
    options = {k: v for k, v in case.options.items() if not k.startswith("gkd_")}  # they are in the divergences
    asked = case.options.get("gkd_beta", 0.5), case.options.get("gkd_temperature", 1.0)
    numbers = {"gkd": asked, "asft": (0.0, 1.0)}.get(case.options.get("loss_type", "nll"))  # of asft KL(p_0 || p)
    if numbers is not None:
        stats["divergence"] = [subject.divergences(e, *numbers) for e in examples]
    return oracle.sft([x.completion for x in out], **stats, **extra, **options), 0.0


def oracle_dpo(case: Case, subject: Subject, examples: list[Example]) -> tuple[Tensor, float]:
    chosen, rejected = (subject.policy_passes(examples, k) for k in (0, 1))
    loss = oracle.dpo(
        [x.completion for x in chosen],
        [x.completion for x in rejected],
        *(subject.reference_passes(examples, k) for k in (0, 1)),
        chosen_log_sum_p2=[x.log_sum_p2 for x in chosen],
        rejected_log_sum_p2=[x.log_sum_p2 for x in rejected],
        ref_entropies=[subject.reference_entropies(examples, k) for k in (0, 1)],
        margins=[e.margin or 0.0 for e in examples] if case.loss.wants_margin else None,
        beta_dpo_mean=case.state.get("margin", 0.0),
        **case.options,
    )
    return loss, 0.0


def oracle_kto(case: Case, subject: Subject, examples: list[Example]) -> tuple[Tensor, float]:
    labels, others = [bool(e.label) for e in examples], mismatched(examples, MAX_LENGTH)
    policy, kl_policy = ([x.completion for x in subject.policy_passes(items, 0)] for items in (examples, others))
    ref, kl_ref = (subject.reference_passes(items, 0) for items in (examples, others))
    count = int(case.state.get("num_examples", 0))
    state = (case.state.get("reward_sum", 0.0) / max(count, 1), count)
    weights = [(e.completions[0].weights or [1.0])[0] for e in examples]
    return oracle.kto(policy, ref, labels, kl_policy, kl_ref, weights=weights, bco_state=state, **case.options), 0.0


def oracle_listwise(case: Case, subject: Subject, examples: list[Example]) -> tuple[Tensor, float]:
    places = [range(len(e.completions)) for e in examples]
    policy = [[subject.policy_passes([e], k)[0].completion for k in ks] for e, ks in zip(examples, places, strict=True)]
    ref = [[subject.reference_passes([e], k)[0] for k in ks] for e, ks in zip(examples, places, strict=True)]
    return oracle.listwise(policy, ref, [list(e.rewards or ()) for e in examples], **case.options), 0.0


def oracle_pairs(case: Case, subject: Subject, examples: list[Example]) -> tuple[Tensor, float]:
    """CPO, TPO and ORPO: no reference."""
    parts = [subject.policy_passes(examples, k) for k in range(len(examples[0].completions))]
    completions = [[x.completion for x in part] for part in parts]
    if case.method == "orpo":
        return oracle.orpo([x.prompt for x in parts[0]], *completions, **case.options), 0.0
    if case.method == "tpo" and len(completions) == 2:
        completions.append([])
    return getattr(oracle, case.method)(*completions, **case.options), 0.0


def oracle_grpo(case: Case, subject: Subject, examples: list[Example]) -> tuple[Tensor, float]:
    size = len(examples[0].completions)
    out = [x for e in examples for k in range(size) for x in subject.policy_passes([e], k)]
    ref = [x for e in examples for k in range(size) for x in subject.reference_passes([e], k)]
    old, behavior = (
        [x for parts in table(torch.float64, case.kept).values() for x in parts]
        for table in (subject.old, subject.behavior)
    )
    advantages = [a for e in examples for a in e.advantages or ()]

    def of(which: Sequence[int]) -> Tensor:
        return oracle.grpo(
            [out[i].completion for i in which],
            [old[i] for i in which],
            [ref[i] for i in which],
            [advantages[i] for i in which],
            prompts=[i // size for i in which],
            entropy=[out[i].entropy for i in which],
            behavior_logps=[behavior[i] for i in which] if case.sampled else None,
            log_sum_p2=[out[i].log_sum_p2 for i in which],
            **case.options,
        )

    every = range(len(out))
    loss = of(every)
    with torch.no_grad():
        return loss, sum(abs(of([i]).item()) for i in every) / len(every)


ORACLES = {
    "sft": oracle_sft,
    "dpo": oracle_dpo,
    "kto": oracle_kto,
    "listwise": oracle_listwise,
    "cpo": oracle_pairs,
    "tpo": oracle_pairs,
    "orpo": oracle_pairs,
    "grpo": oracle_grpo,
}
