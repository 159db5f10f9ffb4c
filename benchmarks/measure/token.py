"""What a sampled token takes, beside the least that it can take."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import torch

from ..memory.gpus import GPUS
from .clock import gpu_of
from .rollout_case import RolloutCase
from .steps.step import Figures


def figures_of_a_token(case: RolloutCase, model: Any, device: torch.device, found: Figures) -> Figures:
    """By token of one completion, where all have the same number of them."""
    if case.ends:
        return {}
    limit = bandwidth_limit_ms(case, model, device)
    token: Figures = {"token_ms_p50": found["rollout_ms_p50"] / case.tokens}
    return token if limit is None else token | {"bandwidth_limit_ms": limit}


def bandwidth_limit_ms(case: RolloutCase, model: Any, device: torch.device) -> float | None:
    """Milliseconds in which a known GPU reads all weights once, but for an embedding that is no head, and the keys and
    values of the prompts and of half of the completions' tokens; None of another device."""
    known = gpu_of(device)
    return None if known is None else token_bytes(case, model) / GPUS[known].tb_per_s / 1e9


def token_bytes(case: RolloutCase, model: Any) -> float:
    """What a token of all completions has to read."""
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    embedding, head = base.get_input_embeddings().weight, base.get_output_embeddings().weight
    weights = sum(p.nbytes for p in model.parameters() if p is not embedding or p is head)
    config = base.config.get_text_config()
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kept = 2 * config.num_hidden_layers * config.num_key_value_heads * size * embedding.element_size()
    length = statistics.mean(map(len, case.texts())) + case.tokens / 2
    return weights + case.prompts * case.group * length * kept


def launched(turn: Callable[[], Any]) -> Figures:
    """Of the CUDA graphs that a turn launches, on the GPU's clock; {} where it launches none."""
    events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
    replay = torch.cuda.CUDAGraph.replay

    def timed(graph: Any) -> None:
        pair = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        pair[0].record()
        replay(graph)
        pair[1].record()
        events.append(pair)

    with patch.object(torch.cuda.CUDAGraph, "replay", timed):
        turn()
    torch.cuda.synchronize()
    if len(events) < 2:
        return {}
    waits = [before[1].elapsed_time(after[0]) for before, after in pairwise(events)]
    graphs = [begun.elapsed_time(ended) for begun, ended in events]
    return {"graph_ms_p50": statistics.median(graphs), "host_ms_per_token": statistics.median(waits)}
