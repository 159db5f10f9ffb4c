"""What TRL's GRPO does around its loss, run and counted: the adapters' dtype, merges, the last prompts."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import torch
from transformers import LlamaConfig

from logratio.benchmarks.peers.randoms import random_model
from logratio.reference._trl_drive import constructed
from logratio.trainers.policy.tiny import tiny_tokenizer

LEARNING_RATE = 1e-6
"""TRL's default for GRPO."""
SYNCS = 100


def trained(rows: list[dict[str, Any]], seen: set[str], **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The adapters before and after TRL's GRPO on random rewards. seen: gets the prompts that were rewarded."""

    def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        seen.update(prompts)
        return [float(i % 2) for i in range(len(completions))]

    said: dict[str, Any] = {"num_generations": 2, "per_device_train_batch_size": 4, "max_completion_length": 4}
    said |= {"beta": 0.0, "seed": 0, "lr_scheduler_type": "constant", "learning_rate": LEARNING_RATE, **options}
    model = random_model(LlamaConfig, 3, 0.5)
    with constructed("grpo", model, tiny_tokenizer(), rows, said, reward_funcs=[reward]) as t:
        adapters = {name: p for name, p in t.model.named_parameters() if p.requires_grad}
        before = {name: p.detach().clone() for name, p in adapters.items()}
        t.train()
        return before, {name: p.detach() for name, p in t.model.named_parameters() if p.requires_grad}


def cast() -> dict[str, Any]:
    """Continuous batching under bf16=True, TRL's default, casts the model that is trained."""
    rows, out = [{"prompt": "12"}] * 8, {}
    for name, continuous in (("without", False), ("with", True)):
        more = {"bf16": True, "use_transformers_continuous_batching": continuous, "max_steps": 3}
        before, after = trained(rows, set(), **more)
        moved = sum(int((after[k] != x.to(after[k].dtype)).sum()) for k, x in before.items())
        dtype = str(next(iter(after.values())).dtype).removeprefix("torch.")
        out[name] = {"dtype": dtype, "moved": moved, "weights": sum(x.numel() for x in before.values())}
    return out


def merged() -> dict[str, Any]:
    """Its sync with vLLM merges the adapters into the base and takes them out again, in the base's dtype."""
    from trl.generation.vllm_generation import VLLMGeneration

    out = {}
    for dtype in (torch.bfloat16, torch.float32):
        model = random_model(LlamaConfig, 3, 0.5)
        for name, p in model.named_parameters():
            p.data = p.data if "lora_" in name else p.data.to(dtype)
        base = {name: p.detach().clone() for name, p in model.named_parameters() if "base_layer" in name}
        layers = [module for module in model.modules() if hasattr(module, "get_delta_weight")]
        added = [(x.get_delta_weight("default").norm() / x.weight.norm()).item() for x in layers]
        sync: Any = object.__new__(VLLMGeneration)
        dist = SimpleNamespace(is_fsdp=False, gather_params=lambda parameters: contextlib.nullcontext())
        sync.__dict__.update(model=model, _dist=dist)
        for _ in range(SYNCS):
            for _pushed in sync._iter_named_params():
                pass
        now = dict(model.named_parameters())
        apart = [((now[name].double() - x.double()).norm() / x.double().norm()).item() for name, x in base.items()]
        changed = sum(int((now[name] != x).sum()) for name, x in base.items())
        weights = sum(x.numel() for x in base.values())
        named = str(dtype).removeprefix("torch.")
        out[named] = {"changed": changed, "weights": weights, "drift": max(apart), "adapters": max(added)}
    return out


def last_prompts() -> dict[str, Any]:
    """Two prompts a step: of five, how many one epoch sees."""
    rows, seen = [{"prompt": str(i)} for i in range(1, 6)], set[str]()
    trained(rows, seen, num_train_epochs=1, max_steps=-1, shuffle_dataset=False)
    return {"prompts": len(rows), "seen": len(seen)}


def measure_runs() -> dict[str, Any]:
    """All of them, ready for JSON."""
    return {"cast": cast(), "merged": merged(), "last_prompts": last_prompts()}
