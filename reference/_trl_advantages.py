"""TRL's own way from rewards to advantages, run on rewards that are given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ._trl_drive import constructed


def advantages(
    method: str,
    model: Any,
    tokenizer: Any,
    rewards: Sequence[Sequence[float | None]],
    *,
    num_generations: int,
    kl: Sequence[float] | None = None,
    **options: Any,
) -> list[float]:
    """The advantages that TRL's grpo, gmpo or rloo trainer computes from rewards, one a completion.

    rewards: a row for each completion, groups one after another, with one number a reward function (None: the
    function does not score it). kl: rloo's estimate of the divergence of each completion, which beta weighs.
    options: of TRL's configuration, such as scale_rewards, reward_weights, multi_objective_aggregation, or rloo's
    normalize_advantages, beta and reward_clip_range. Only the sampling is replaced (and, for kl, the two forwards).
    """
    count = len(rewards)

    def scorer(column: int) -> Any:
        def score(completions: list[str], **_: Any) -> list[float | None]:
            return [row[column] for row in rewards]

        score.__name__ = f"reward_{column}"
        return score

    prompts = [{"prompt": f"{i // num_generations}"} for i in range(count)]
    arguments: dict[str, Any] = {"reward_funcs": [scorer(k) for k in range(len(rewards[0]))]}
    beta = options.pop("beta", 0.0)
    options |= {"num_generations": num_generations, "per_device_train_batch_size": count, "beta": 0.0}
    with constructed(method, model, tokenizer, prompts, options, **arguments) as trainer:
        trainer.model.train()
        trainer.beta = beta
        ids = [[tokenizer.pad_token_id] for _ in range(count)]
        texts = ["."] * count
        trainer._generate = lambda prompts: (
            (ids, ids, texts) if method == "rloo" else (ids, ids, None, texts, None, {}, None, [])
        )
        # rloo scores the completions with its policy first and then with the reference: their difference is the KL
        logps = iter([torch.tensor(kl or [0.0] * count)[:, None], torch.zeros(count, 1)])
        trainer._get_per_token_logps_and_entropies = lambda *_, **__: (next(logps), None, None)
        trainer.ref_model = trainer.ref_model or trainer.model
        return trainer._generate_and_score_completions(prompts)["advantages"].tolist()
