"""What verification compares: our loss as a training step computes it, TRL's, and the oracle's, on one tiny model.

Models are a tiny random Llama and Qwen2 with LoRA; rows are ragged; ours is cut into several micro-batches.
"""

from __future__ import annotations

import copy
import random
import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from logratio.losses import LOSSES, Kind
from logratio.reference import oracle, trl
from logratio.reference.oracle import SequenceLogps
from logratio.trainers.data.examples import Completion, Example, prepare
from logratio.trainers.data.rows import Rows
from logratio.trainers.policy.mismatch import mismatched
from logratio.trainers.policy.policy import Policy
from logratio.trainers.policy.reference import AdapterReference, StoredReference, tokens_key
from logratio.trainers.policy.sharing import why_not_shared
from logratio.trainers.policy.tiny import tiny_tokenizer
from logratio.trainers.setup import start_accelerator
from logratio.trainers.step import Step

from .cases import Case

MICRO_BATCH_TOKENS = 40
MAX_LENGTH = 1024
LONGEST = 12
"""Characters of a verified completion: exp(r) is as wrong as its sum of float32 log-probs, in TRL too."""


@dataclass(frozen=True)
class Gradient:
    """A loss, its scale (see `relative_errors`) and the gradient of every trainable parameter."""

    loss: float
    scale: float
    grads: dict[str, Tensor]


def random_model(config: Any, seed: int, adapters: float = 0.5) -> Any:
    """A tiny random model with LoRA on all linear layers, B not zero, so that every gradient is something.

    adapters: the scale of B; at 0.2 log-ratios of `LONGEST` characters are about a nat, at 0.5 a few.
    """
    tokenizer = tiny_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(
            config(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                initializer_range=0.2,  # far from uniform predictions
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
                bos_token_id=None,
            )
        )
        lora = LoraConfig(
            r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"
        )
        model = get_peft_model(model.float(), lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(adapters)
    return model


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


def random_rows(
    method: str, seed: int, count: int = 5, weighted: bool = False, longest: int = 24
) -> list[dict[str, Any]]:
    """Ragged plain-text rows in TRL's format of the method; weighted: with a weight each, one of them 0."""
    rng = random.Random(seed)

    def text(low: int, high: int) -> str:
        return "".join(rng.choices(string.ascii_letters + string.digits + "éß", k=rng.randint(low, high)))

    rows = []
    for i in range(count):
        row: dict[str, Any] = {"prompt": text(3, 20) + ":"}
        if LOSSES[method].kind is Kind.PAIRED:
            row |= {"chosen": " " + text(1, longest), "rejected": " " + text(1, longest)}
        else:
            row["completion"] = " " + text(1, longest)
        if method == "tpo":
            row["reference"] = " " + text(1, longest)
        if method == "kto":
            row["label"] = i % 3 != 1
        if weighted:
            row["weight"] = 0.0 if i == 1 else rng.randint(1, 24) / 8
        rows.append(row)
    return rows


def random_groups(seed: int, groups: int = 2, size: int = 3) -> list[Example]:
    """Rollouts of random tokens with advantages."""
    rng = random.Random(seed)
    examples = []
    for row in range(groups):
        completions = [Completion([rng.randrange(256) for _ in range(rng.randint(1, 14))]) for _ in range(size)]
        prompt = [rng.randrange(256) for _ in range(rng.randint(3, 12))]
        examples.append(Example(prompt, completions, row=row, advantages=tuple(rng.gauss(0, 1) for _ in range(size))))
    return examples


def examples_of(case: Case, seed: int) -> list[Example]:
    """What `random_rows` and `random_groups` are after tokenization."""
    loss = case.loss
    if loss.kind is Kind.GROUPED:
        return random_groups(seed)
    rows = Rows("random", random_rows(case.method, seed, weighted=case.weighted, longest=LONGEST))
    return prepare(rows, loss.kind, tiny_tokenizer(), max_length=MAX_LENGTH, gold=loss.scores_gold)[0]


def ours(case: Case, model: Any, seed: int) -> Gradient:
    """Our loss and gradient, on a copy of the model, as one step of the loop computes them."""
    loss = case.loss
    policy = Policy(copy.deepcopy(model), stats=loss.stats)
    policy.shared = not why_not_shared(policy)
    step = Step(
        start_accelerator("no"),
        policy,
        policy,
        loss,
        AdapterReference(policy, policy) if loss.wants_reference else None,
        micro_batch_tokens=MICRO_BATCH_TOKENS,
        max_length=MAX_LENGTH,
    )
    step.state = case.state
    examples = examples_of(case, seed)
    micros = step.micro_batches(examples)
    if loss.kind is Kind.GROUPED:
        old = StoredReference(old_logps(model, examples, seed), AdapterReference(policy, policy))
        for micro in micros:
            micro.old = old(micro.batch)
    result = step(micros, step.totals(examples, micros))
    grads = {name: p.grad for name, p in policy.model.named_parameters() if p.requires_grad}
    return Gradient(result.loss.item(), 0.0, {name: g for name, g in grads.items() if g is not None})


def old_logps(model: Any, examples: list[Example], seed: int) -> dict[str, list[Tensor]]:
    """Log-probs of a policy some updates ago: today's with noise that takes ratios beyond the clip range."""
    generator = torch.Generator().manual_seed(seed)
    table: dict[str, list[Tensor]] = {}
    with torch.no_grad():
        for example in examples:
            logps = [oracle.sequence_logps(model, example.prompt_ids, c.ids).completion for c in example.completions]
            table[tokens_key(example)] = [
                x + 0.3 * torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in logps
            ]
    return table


def against_trl(case: Case, model: Any, seed: int) -> tuple[Gradient, Gradient]:
    """Ours and TRL's, float32."""
    assert case.trl is not None
    rows = rollout_rows(model, seed) if case.method == "grpo" else random_rows(case.method, seed, longest=LONGEST)
    truth = trl.loss_and_grads(case.trl, model, tiny_tokenizer(), rows, max_length=MAX_LENGTH, **case.trl_options)
    return ours(case, model, seed), Gradient(truth.loss, truth.scale, truth.grads)


def rollout_rows(model: Any, seed: int) -> list[dict[str, Any]]:
    """`random_groups` as the driver of TRL takes them."""
    examples = random_groups(seed)
    old = old_logps(model, examples, seed)
    with model.disable_adapter(), torch.no_grad():
        ref = [[oracle.sequence_logps(model, e.prompt_ids, c.ids).completion for c in e.completions] for e in examples]
    return [
        {
            "prompt_ids": e.prompt_ids,
            "completion_ids": c.ids,
            "advantage": a,
            "old_per_token_logps": old[tokens_key(e)][k],
            "ref_per_token_logps": ref[e.row][k],
        }
        for e in examples
        for k, (c, a) in enumerate(zip(e.completions, e.advantages or (), strict=True))
    ]


def against_oracle(case: Case, model: Any, seed: int) -> tuple[Gradient, Gradient]:
    """Ours and the oracle's, float64."""
    model = exact(model)
    loss, scale = ORACLES[case.method](case, model, examples_of(case, seed), seed)
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    return ours(case, model, seed), Gradient(loss.item(), scale, grads)


def plain_passes(model: Any, examples: list[Example], which: int) -> list[SequenceLogps]:
    """One unpadded forward pass for each example's prompt with its completion number `which`."""
    return [oracle.sequence_logps(model, e.prompt_ids, e.completions[which].ids) for e in examples]


def of_reference(model: Any, compute: Callable[[], list[SequenceLogps]]) -> list[Tensor]:
    """The completions' log-probs under the model without its adapters."""
    with model.disable_adapter(), torch.no_grad():
        return [out.completion for out in compute()]


def oracle_sft(case: Case, model: Any, examples: list[Example], seed: int) -> tuple[Tensor, float]:
    out = plain_passes(model, examples, 0)
    completions = [e.completions[0] for e in examples]
    weights = [torch.tensor(c.weights or [1.0] * len(c.ids), dtype=torch.float64) for c in completions]
    extra: dict[str, Any] = {"weights": weights} if case.weighted else {}
    return oracle.sft([x.completion for x in out], log_z=[x.log_z for x in out], **extra, **case.options), 0.0


def oracle_dpo(case: Case, model: Any, examples: list[Example], seed: int) -> tuple[Tensor, float]:
    chosen, rejected = (plain_passes(model, examples, k) for k in (0, 1))
    refs = [of_reference(model, lambda k=k: plain_passes(model, examples, k)) for k in (0, 1)]  # type: ignore[misc]
    loss = oracle.dpo(
        [x.completion for x in chosen],
        [x.completion for x in rejected],
        *refs,
        chosen_log_sum_p2=[x.log_sum_p2 for x in chosen],
        rejected_log_sum_p2=[x.log_sum_p2 for x in rejected],
        beta_dpo_mean=case.state.get("margin", 0.0),
        **case.options,
    )
    return loss, 0.0


def oracle_kto(case: Case, model: Any, examples: list[Example], seed: int) -> tuple[Tensor, float]:
    labels, others = [bool(e.label) for e in examples], mismatched(examples, MAX_LENGTH)
    policy, kl_policy = ([x.completion for x in plain_passes(model, items, 0)] for items in (examples, others))
    ref = of_reference(model, lambda: plain_passes(model, examples, 0))
    kl_ref = of_reference(model, lambda: plain_passes(model, others, 0))
    count = int(case.state.get("num_examples", 0))
    state = (case.state.get("reward_sum", 0.0) / max(count, 1), count)
    return oracle.kto(policy, ref, labels, kl_policy, kl_ref, bco_state=state, **case.options), 0.0


def oracle_pairs(case: Case, model: Any, examples: list[Example], seed: int) -> tuple[Tensor, float]:
    """CPO, TPO and ORPO: no reference."""
    parts = [plain_passes(model, examples, k) for k in range(len(examples[0].completions))]
    completions = [[x.completion for x in part] for part in parts]
    if case.method == "orpo":
        return oracle.orpo([x.prompt for x in parts[0]], *completions, **case.options), 0.0
    if case.method == "tpo" and len(completions) == 2:
        completions.append([])
    return getattr(oracle, case.method)(*completions, **case.options), 0.0


def oracle_grpo(case: Case, model: Any, examples: list[Example], seed: int) -> tuple[Tensor, float]:
    def passes() -> list[SequenceLogps]:
        return [oracle.sequence_logps(model, e.prompt_ids, c.ids) for e in examples for c in e.completions]

    out, ref = passes(), of_reference(model, passes)
    policy, entropy = [x.completion for x in out], [x.entropy for x in out]
    old = [x for parts in old_logps(model, examples, seed).values() for x in parts]
    advantages = [a for e in examples for a in e.advantages or ()]
    loss = oracle.grpo(policy, old, ref, advantages, entropy=entropy, **case.options)
    with torch.no_grad():
        alone = [
            oracle.grpo([p], [o], [r], [a], entropy=[h], **case.options)
            for p, o, r, a, h in zip(policy, old, ref, advantages, entropy, strict=True)
        ]
    return loss, sum(abs(x.item()) for x in alone) / len(alone)


ORACLES = {
    "sft": oracle_sft,
    "dpo": oracle_dpo,
    "kto": oracle_kto,
    "cpo": oracle_pairs,
    "tpo": oracle_pairs,
    "orpo": oracle_pairs,
    "grpo": oracle_grpo,
}
TRUTHS = {"trl": against_trl, "oracle": against_oracle}
