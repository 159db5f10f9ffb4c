"""`logratio verify`: every loss against its truths, value and whole gradient, through the path that training takes.

Against TRL: the installed trainer's own loss and gradient on the same rows of text, in float32; so tokenization,
packing, shared prompts, reference and head are compared too. Against the oracle: plain unpadded forward passes and the
formulas from the papers, in float64. Models are a tiny random Llama and Qwen2 with LoRA; rows are ragged; ours is cut
into several micro-batches.
"""

from __future__ import annotations

import copy
import json
import random
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from logratio.losses import LOSSES, Kind, Loss
from logratio.reference import oracle, trl
from logratio.trainers.data import Completion, Example, prepare
from logratio.trainers.errors import UserError
from logratio.trainers.policy import Policy
from logratio.trainers.reference import AdapterReference, StoredReference, tokens_key
from logratio.trainers.rows import Rows
from logratio.trainers.setup import start_accelerator
from logratio.trainers.sharing import why_not_shared
from logratio.trainers.step import Step, mismatched
from logratio.trainers.tiny import tiny_tokenizer

BOUNDS = {"trl": 1e-5, "oracle": 1e-10}
MICRO_BATCH_TOKENS = 160
MAX_LENGTH = 1024

CASES: dict[str, list[dict[str, Any]]] = {
    "sft": [{"loss_type": "nll"}, {"loss_type": "dft"}],
    "dpo": [{"loss_type": name} for name in ("sigmoid", "hinge", "ipo")] + [{"loss_type": "sigmoid", "beta": 0.5}],
    "kto": [{"loss_type": "kto"}, {"loss_type": "kto", "desirable_weight": 1.5, "undesirable_weight": 0.5}],
    "orpo": [{}, {"beta": 1.0}],
    "grpo": [
        {"loss_type": name, "importance_sampling_level": level, "beta": beta}
        for name in ("grpo", "dapo", "dr_grpo", "bnpo")
        for level in ("token", "sequence")
        for beta in (0.0, 0.04)
    ]
    + [{"loss_type": "dapo", "beta": 0.04, "use_bias_correction_kl": False, "epsilon_high": 0.28}],
}
"""What is verified: method -> options of its loss."""


@dataclass(frozen=True)
class Gradient:
    """A loss, its scale (see `relative_errors`) and the gradient of every trainable parameter."""

    loss: float
    scale: float
    grads: dict[str, Tensor]


def main(argv: list[str] | None = None) -> int:
    """Compare every loss with TRL and with the float64 oracle; status 1 where one is out of bounds."""

    def options(method: str | None = None, seed: int = 0, json: Path | None = None) -> tuple[Any, ...]:
        """Compare losses with TRL and with the float64 oracle.

        Args:
            method: one of sft, dpo, kto, orpo, grpo (default: all).
            seed: of weights and rows.
            json: write the rows to this file too.
        """
        return method, seed, json

    method, seed, file = tyro.cli(options, args=argv, prog="logratio verify")
    if method is not None and method not in CASES:
        raise UserError(f"unknown method {method!r}, expected one of: {', '.join(CASES)}")
    rows = []
    table = Table("method", "variant", "against", "dtype", "loss err", "grad err", "ok", title="relative errors")
    table.columns[1].overflow = "fold"
    for row in verify([method] if method else list(CASES), seed):
        rows.append(row)
        errors = (f"{row[name]:.1e}" for name in ("loss_rel_err", "grad_rel_err"))
        table.add_row(
            row["method"], row["variant"], row["against"], row["dtype"], *errors, "yes" if row["ok"] else "NO"
        )
    Console().print(table)
    if file is not None:
        file.write_text(json.dumps(rows, indent=1) + "\n")
    bad = sum(not row["ok"] for row in rows)
    print(f"{len(rows) - bad} of {len(rows)} within bounds (TRL {BOUNDS['trl']:g}, oracle {BOUNDS['oracle']:g})")
    return 1 if bad else 0


def verify(methods: list[str], seed: int = 0) -> Iterator[dict[str, Any]]:
    """One row for each method, variant and truth: the larger error of the two models."""
    models = [random_model(kind, seed) for kind in (LlamaConfig, Qwen2Config)]
    for method in methods:
        for options in CASES[method]:
            for against, bound in BOUNDS.items():
                errors = [relative_errors(*TRUTHS[against](method, options, model, seed)) for model in models]
                loss_err, grad_err = (max(column) for column in zip(*errors, strict=True))
                yield {
                    "method": method,
                    "variant": variant_name(LOSSES[method], options),
                    "against": against,
                    "dtype": "float32" if against == "trl" else "float64",
                    "loss_rel_err": loss_err,
                    "grad_rel_err": grad_err,
                    "ok": loss_err <= bound and grad_err <= bound,
                }


def variant_name(cls: type[Loss], options: dict[str, Any]) -> str:
    """The loss type (or the method, where it has none) and what differs from the defaults."""
    loss, plain = cls(**options), cls()
    others = [f"{k}={v}" for k, v in options.items() if k != "loss_type" and v != getattr(plain, k)]
    return ",".join([getattr(loss, "loss_type", cls.__name__.removesuffix("Loss").lower()), *others])


def relative_errors(ours: Gradient, truth: Gradient) -> tuple[float, float]:
    """Of the loss, over max(|loss|, mean |per-example term|), since terms may cancel; of the gradient, in norm."""
    if set(ours.grads) != set(truth.grads):
        raise AssertionError("the two sides do not train the same parameters")
    names = sorted(ours.grads)
    mine, theirs = (torch.cat([g.grads[name].flatten().double() for name in names]) for g in (ours, truth))
    loss = abs(ours.loss - truth.loss) / max(abs(truth.loss), truth.scale)
    return loss, ((mine - theirs).norm() / theirs.norm()).item()


def random_model(config: Any, seed: int) -> Any:
    """A tiny random model with LoRA on all linear layers, B not zero, so that every gradient is something."""
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
        return get_peft_model(model.float(), lora)


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


def random_rows(method: str, seed: int, count: int = 5) -> list[dict[str, Any]]:
    """Ragged plain-text rows in TRL's format of the method."""
    rng = random.Random(seed)

    def text(low: int, high: int) -> str:
        return "".join(rng.choices(string.ascii_letters + string.digits + "éß", k=rng.randint(low, high)))

    rows = []
    for i in range(count):
        row: dict[str, Any] = {"prompt": text(3, 20) + ":"}
        if method in ("dpo", "orpo"):
            row |= {"chosen": " " + text(1, 24), "rejected": " " + text(1, 24)}
        else:
            row["completion"] = " " + text(1, 24)
        if method == "kto":
            row["label"] = i % 3 != 1
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


def examples_of(method: str, seed: int) -> list[Example]:
    """What `random_rows` and `random_groups` are after tokenization."""
    if method == "grpo":
        return random_groups(seed)
    rows = Rows("random", random_rows(method, seed))
    return prepare(rows, LOSSES[method].kind, tiny_tokenizer(), max_length=MAX_LENGTH)[0]


def ours(method: str, options: dict[str, Any], model: Any, seed: int) -> Gradient:
    """Our loss and gradient, on a copy of the model, as one step of the loop computes them."""
    policy = Policy(copy.deepcopy(model))
    policy.shared = not why_not_shared(policy)
    loss = LOSSES[method](**options)
    step = Step(
        start_accelerator("no"),
        policy,
        policy,
        loss,
        AdapterReference(policy, policy),
        micro_batch_tokens=MICRO_BATCH_TOKENS,
        max_length=MAX_LENGTH,
    )
    examples = examples_of(method, seed)
    micros = step.micro_batches(examples)
    if loss.kind is Kind.GROUPED:
        old = StoredReference(old_logps(model, examples, seed), step.reference)  # type: ignore[arg-type]
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


def against_trl(method: str, options: dict[str, Any], model: Any, seed: int) -> tuple[Gradient, Gradient]:
    """Ours and TRL's, float32."""
    rows = random_rows(method, seed)
    if method == "grpo":
        examples = random_groups(seed)
        old = old_logps(model, examples, seed)
        with model.disable_adapter(), torch.no_grad():
            ref = [
                [oracle.sequence_logps(model, e.prompt_ids, c.ids).completion for c in e.completions] for e in examples
            ]
        rows = [
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
    truth = trl.loss_and_grads(method, model, tiny_tokenizer(), rows, max_length=MAX_LENGTH, **options)
    return ours(method, options, model, seed), Gradient(truth.loss, truth.scale, truth.grads)


def against_oracle(method: str, options: dict[str, Any], model: Any, seed: int) -> tuple[Gradient, Gradient]:
    """Ours and the oracle's, float64."""
    model = exact(model)
    examples = examples_of(method, seed)

    def logps(items: list[Example], which: int) -> list[Tensor]:
        return [oracle.sequence_logps(model, e.prompt_ids, e.completions[which].ids).completion for e in items]

    def reference(compute: Callable[[], list[Tensor]]) -> list[Tensor]:
        with model.disable_adapter(), torch.no_grad():
            return compute()

    loss_options = {k: v for k, v in options.items()}
    if method == "sft":
        terms = logps(examples, 0)
        loss = oracle.sft(terms, **loss_options)
    elif method == "dpo":
        sides = [logps(examples, k) for k in (0, 1)]
        refs = [reference(lambda k=k: logps(examples, k)) for k in (0, 1)]  # type: ignore[misc]
        loss = oracle.dpo(*sides, *refs, **loss_options)
    elif method == "kto":
        others = mismatched(examples, MAX_LENGTH)
        labels = [bool(e.label) for e in examples]
        pairs = [(logps(items, 0), reference(lambda i=items: logps(i, 0))) for items in (examples, others)]  # type: ignore[misc]
        loss = oracle.kto(*pairs[0], labels, *pairs[1], **loss_options)
    elif method == "orpo":
        prompts = [oracle.sequence_logps(model, e.prompt_ids, e.completions[0].ids).prompt for e in examples]
        loss = oracle.orpo(prompts, logps(examples, 0), logps(examples, 1), **loss_options)
    else:
        flat = [(e, c) for e in examples for c in e.completions]
        policy = [oracle.sequence_logps(model, e.prompt_ids, c.ids).completion for e, c in flat]
        ref = reference(lambda: [oracle.sequence_logps(model, e.prompt_ids, c.ids).completion for e, c in flat])
        old = [x for parts in old_logps(model, examples, seed).values() for x in parts]
        advantages = [a for e in examples for a in e.advantages or ()]
        loss = oracle.grpo(policy, old, ref, advantages, **loss_options)
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    scale = 0.0
    if method == "grpo":
        alone = [
            oracle.grpo([p.detach()], [o], [r], [a], **loss_options)
            for p, o, r, a in zip(policy, old, ref, advantages, strict=True)
        ]
        scale = sum(abs(x.item()) for x in alone) / len(alone)
    return ours(method, options, model, seed), Gradient(loss.item(), scale, grads)


TRUTHS = {"trl": against_trl, "oracle": against_oracle}
