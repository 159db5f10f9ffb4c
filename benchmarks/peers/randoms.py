"""Models, ragged rows and rollouts at random, and the log-probabilities of who else has seen them."""

from __future__ import annotations

import random
import string
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from logratio.losses import LOSSES, Kind, Support
from logratio.reference import oracle
from logratio.trainers.data.examples import Completion, Example
from logratio.trainers.policy.reference import tokens_key
from logratio.trainers.policy.tiny import tiny_tokenizer


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


def random_rows(
    method: str, seed: int, count: int = 5, weighted: bool = False, longest: int = 24, margin: bool = False
) -> list[dict[str, Any]]:
    """Ragged plain-text rows in TRL's format of the method; weighted: with a weight each, one of them 0. margin: pairs
    with one each."""
    rng = random.Random(seed)

    def text(low: int, high: int) -> str:
        return "".join(rng.choices(string.ascii_letters + string.digits + "éß", k=rng.randint(low, high)))

    rows = []
    for i in range(count):
        row: dict[str, Any] = {"prompt": text(3, 20) + ":"}
        if LOSSES[method].kind is Kind.PAIRED:
            row |= {"chosen": " " + text(1, longest), "rejected": " " + text(1, longest)}
        elif LOSSES[method].kind is Kind.LISTED:  # lists of two to four, the last two with equal rewards
            row["completions"] = [" " + text(1, longest) for _ in range(2 + i % 3)]
            rewards = [rng.randint(0, 24) / 8 for _ in row["completions"]]
            row["rewards"] = [*rewards[:-1], rewards[-2]] if i % 3 else rewards
        else:
            row["completion"] = " " + text(1, longest)
        if method == "tpo":
            row["reference"] = " " + text(1, longest)
        if method == "kto":
            row["label"] = i % 3 != 1
        if margin:
            row["margin"] = rng.randint(-8, 16) / 8
        if weighted:
            row["weight"] = 0.0 if i == 1 else rng.randint(1, 24) / 8
        rows.append(row)
    return rows


def random_groups(
    seed: int, groups: int = 2, size: int = 3, kept: int | None = None, by_token: bool = False
) -> list[Example]:
    """Rollouts of random tokens with advantages. kept, by_token: see `Case`."""
    rng = random.Random(seed)
    examples = []
    for row in range(groups):
        completions = [Completion([rng.randrange(256) for _ in range(rng.randint(1, 14))]) for _ in range(size)]
        prompt = [rng.randrange(256) for _ in range(rng.randint(3, 12))]
        examples.append(Example(prompt, completions, row=row, advantages=tuple(rng.gauss(0, 1) for _ in range(size))))
    if by_token:
        examples = [
            replace(e, advantages=tuple(tuple(rng.gauss(0, 1) for _ in c.ids) for c in e.completions)) for e in examples
        ]
    if kept is not None:
        for example in examples:
            example.completions[:] = [replace(c, support=random_support(c.ids, rng, kept)) for c in example.completions]
    return examples


def random_support(ids: Sequence[int], rng: random.Random, kept: int) -> Support:
    """Of each token so many words in any order, itself among them; of one in four all words."""

    def words(token: int) -> Support:
        own = [token, *rng.sample([word for word in range(256) if word != token], kept - 1)]
        return Support(torch.tensor(rng.sample(own, kept), dtype=torch.int32), torch.tensor([0, kept]))

    return Support.cat([Support.whole(1) if rng.random() < 1 / 4 else words(token) for token in ids])


def words_of(completion: Completion) -> list[list[int] | None] | None:
    """Its support as the oracle takes it."""
    if completion.support is None:
        return None
    parts = completion.support.split([1] * len(completion.ids))
    return [part.ids.tolist() or None for part in parts]


def plain_logps(model: Any, examples: Sequence[Example]) -> dict[str, list[Tensor]]:
    """Log-probs of each completion's tokens in plain passes of their own, by `tokens_key`."""
    with torch.no_grad():
        return {
            tokens_key(e): [
                oracle.sequence_logps(model, e.prompt_ids, c.ids, words_of(c)).completion for c in e.completions
            ]
            for e in examples
        }


def old_logps(model: Any, examples: Sequence[Example], seed: int) -> dict[str, list[Tensor]]:
    """Log-probs of a policy some updates ago: today's with noise that takes ratios beyond the clip range."""
    generator = torch.Generator().manual_seed(seed)
    return {
        key: [x + 0.3 * torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in values]
        for key, values in plain_logps(model, examples).items()
    }


def sampled_by_another(old: dict[str, list[Tensor]], seed: int) -> dict[str, list[Tensor]]:
    """Log-probs of a sampler that is not the old policy: noise of float32 that takes ratios out of a narrow range."""
    generator = torch.Generator().manual_seed(seed)
    return {
        key: [x + 0.3 * torch.randn(x.shape, generator=generator).to(x.dtype) for x in values]
        for key, values in old.items()
    }


def rollout_rows(
    examples: Sequence[Example],
    old: dict[str, list[Tensor]],
    ref: dict[str, list[Tensor]],
    behavior: dict[str, list[Tensor]] | None = None,
) -> list[dict[str, Any]]:
    """Rollouts as the driver of TRL takes them, a row for each completion. behavior: of what sampled them, where a
    correction is to know it."""
    return [
        {
            "prompt_ids": example.prompt_ids,
            "completion_ids": completion.ids,
            "advantage": (example.advantages or ())[k],
            "old_per_token_logps": old[tokens_key(example)][k],
            "ref_per_token_logps": ref[tokens_key(example)][k],
            "sampling_per_token_logps": None if behavior is None else behavior[tokens_key(example)][k],
        }
        for example in examples
        for k, completion in enumerate(example.completions)
    ]
