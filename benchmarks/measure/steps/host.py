"""The suite `host`: what Python costs in a step, of a model so narrow that the arithmetic is the smaller part.

On a GPU it is what a step waits for where its kernels are short. A step is counted in units of the plain model's own
forward and backward pass on the same pairs, padded: what no trainer can do without. Times are those that the process
worked on one thread, so that a shared machine says the same.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from logratio.trainers.data.examples import Example
from logratio.trainers.policy.tiny import tiny_model

from ..clock import cpu_ms, interleaved, median_ratio, percentiles
from ..models import with_adapters
from .contestants import Contestant
from .step import CONTESTANTS, Figures, attempt, make, old_logps, step_of
from .step_cases import METHODS, StepCase
from .workloads import Lengths

LAYERS, WIDTH = 32, 64
PLAIN = "plain model"
PASSES = " forward and backward"


def cases() -> list[StepCase]:
    """Every method with LoRA, four short examples a step."""
    return [
        StepCase(
            method, "lora", f"{LAYERS}x{WIDTH}", "short", 4, 2048, "float32", num_generations=2, lengths=Lengths(4, 4)
        )
        for method in METHODS
    ]


def run(
    case: StepCase, device: torch.device, *, repeats: int, seed: int, only: Sequence[str] = CONTESTANTS
) -> dict[str, Figures]:
    """{contestant: status and figures}; units: of a step. passes_units: of its model's forward and backward alone."""
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)
        return measured(case, device, repeats, seed, only, stack)


def measured(
    case: StepCase, device: torch.device, repeats: int, seed: int, only: Sequence[str], stack: ExitStack
) -> dict[str, Figures]:
    """As `run`, of which the contestants last as long as `stack`."""
    plain = deep_model(seed)
    model = with_adapters(copy.deepcopy(plain), lora_r=case.lora_r)
    window = case.window(plain.config.vocab_size, seed)
    old = old_logps(case, model, [window], seed)
    rows: dict[str, Figures] = {}
    running: dict[str, Contestant] = {}
    for name in sorted(only, key=CONTESTANTS.index):
        attempt(name, rows, running, partial(make, name, case, model, device, stack, old))
    ids = padded(window)
    works: dict[str, Callable[[int], Any]] = {PLAIN: partial(passes, plain.train(), ids)}
    for name, contestant in running.items():
        works[name] = step_of(contestant, [contestant.prepare(window)])
        works[name + PASSES] = partial(passes, contestant.model, ids)
    times = interleaved(works, device, repeats=repeats, warmup=2, clock=cpu_ms)
    for name in running:
        rows[name] |= percentiles(times[name], "step_ms") | {
            "units": median_ratio(times[name], times[PLAIN]),
            "passes_units": median_ratio(times[name + PASSES], times[PLAIN]),
            "plain_ms_p50": statistics.median(times[PLAIN]),
            "times_ms": times[name],
        }
        if "logratio" in running:
            rows[name]["time_to_ours"] = median_ratio(times[name], times["logratio"])
    return rows


def deep_model(seed: int) -> Any:
    """A Llama of many layers that have next to nothing to compute."""
    sizes = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_attention_heads": 4, "num_key_value_heads": 4}
    return tiny_model(seed, num_hidden_layers=LAYERS, head_dim=WIDTH // 4, **sizes)


def padded(window: Sequence[Example]) -> Tensor:
    """The token ids of two sequences of each example, one a row; of a single completion the same twice."""
    rows = [torch.tensor(e.prompt_ids + c.ids) for e in window for c in (e.completions * 2)[:2]]
    return pad_sequence(rows, batch_first=True)


def passes(model: Any, ids: Tensor, round_: int) -> None:
    """Forward and backward of the model's own loss; its gradients are dropped."""
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    for parameter in model.parameters():
        parameter.grad = None
