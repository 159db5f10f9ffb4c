"""TRL's own correction for what was sampled: its trainer is told that vLLM drew the rollouts, and computes the ratios.

What vLLM would return stands in the rows. The trainer goes from there by itself, to what its loss takes and what it
logs; only sampling and the log-probabilities of the old policy, which the rows have too, are put in.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from ._trl_batches import Rows

SAMPLED = "sampling_per_token_logps"


def sampled(trainer: Any, rows: Rows, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch of `rollouts` with what TRL adds to it for rows that have the sampler's log-probs, else as it is."""
    if all(row.get(SAMPLED) is None for row in rows):
        return batch
    for i, row in enumerate(rows):
        if row.get(SAMPLED) is None or len(row[SAMPLED]) != len(row["completion_ids"]):
            raise ValueError(f"row {i}: {SAMPLED} must have one number a completion token, in every row or in none")
    lists = (
        [torch.as_tensor(row[name]).tolist() for row in rows] for name in ("prompt_ids", "completion_ids", SAMPLED)
    )
    prompts, completions, logps = lists
    drawn: tuple[Any, ...] = (prompts, completions, None, [""] * len(rows), logps, {}, None, None)
    put: dict[str, Any] = {"_generate": lambda *_: drawn, "beta": 0.0, "num_generations": len(rows)}
    if "old_per_token_logps" in batch:
        put["_get_per_token_logps_and_entropies"] = lambda *_, **__: (batch["old_per_token_logps"], None, None)
    trainer.use_vllm = True
    with ExitStack() as stack:
        for name, value in put.items():
            stack.enter_context(mock.patch.object(trainer, name, value))
        made = trainer._generate_and_score_completions([{"prompt": "."}] * len(rows))
    added = ("old_per_token_logps", "importance_sampling_ratio", SAMPLED)
    return batch | {name: made[name] for name in added if name in made}
