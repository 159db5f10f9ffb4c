"""Folders of runs as `logratio train` leaves them, with numbers that a test knows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from logratio.losses import DPOLoss, GRPOLoss, SFTLoss
from logratio.trainers.config import DataConfig, ModelConfig, RolloutConfig, RunConfig, TrainConfig

LOSSES = {"sft": SFTLoss, "dpo": DPOLoss, "grpo": GRPOLoss}


def options(method: str = "dpo", **train: Any) -> dict[str, Any]:
    """run_config.json of a run with adapters."""
    config = RunConfig(
        method=method,
        loss=LOSSES[method](),
        model=ModelConfig(model_name_or_path="Qwen/Qwen2.5-0.5B", lora_r=16, dtype="bfloat16"),
        data=DataConfig(dataset_name=("trl-lib/ultrafeedback_binarized",)),
        train=TrainConfig(output_dir="runs/one", **{"max_steps": 40, **train}),
        rollout=RolloutConfig() if method == "grpo" else None,
    )
    about = {"commit": "abc123def456", "versions": {"python": "3.11.9", "torch": "2.13.0"}, "num_processes": 1}
    where = {"device": "cpu", "device_mem_mib": None, "data": "d" * 64, "frozen": "f" * 64}
    return {**config.resolved(1).as_dict(), "about": {**about, **where}}


def line(step: int, **more: Any) -> dict[str, Any]:
    """Of a log: what every method has."""
    row = {"step": step, "loss": 1 / step, "grad_norm": 2.0, "learning_rate": 1e-5, **more}
    row |= {"num_tokens": 500 * step, "tokens_per_s": 5000.0, "step_ms": 100.0 + step, "peak_mem_mib": 700.0}
    return {**row, "hash": "0" * 32}


def preference(step: int) -> dict[str, Any]:
    more = {"rewards/accuracies": 0.75, "rewards/margins": step / 10, "rewards/chosen": 0.1, "rewards/rejected": -0.2}
    return line(step, **more, **({"eval_loss": 0.5} if step % 10 == 0 else {}))


def sampled(step: int) -> dict[str, Any]:
    more = {"reward": 0.5, "reward_std": 0.25, "rewards/right/mean": 0.5, "rewards/right/std": 0.1, "kl": 0.01}
    lengths = {"min": 3.0, "mean": 7.0, "max": 19.0}
    return line(step, **more, **{f"completions/{name}_length": value for name, value in lengths.items()})


def folder(path: Path, rows: list[dict[str, Any]], config: dict[str, Any] | None = None, **files: Any) -> Path:
    """files: by name without suffix; a dictionary is written as JSON, a list as JSON lines."""
    path.mkdir(parents=True)
    files = {"metrics": rows, "run_config": options() if config is None else config, **files}
    for name, content in files.items():
        if isinstance(content, list):
            (path / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in content))
        else:
            (path / f"{name}.json").write_text(json.dumps(content))
    return path


def completions(path: Path, rows: list[dict[str, Any]]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path / "completions.parquet")


def completion(step: int, text: str, reward: float, prompt: Any = "1+1=", **more: Any) -> dict[str, Any]:
    figures = {"rewards/right": reward, "reward": reward, "advantage": 0.0, "completion_length": len(text)}
    return {"step": step, "prompt": prompt, "completion": text, **figures, "finish_reason": "stop", **more}
