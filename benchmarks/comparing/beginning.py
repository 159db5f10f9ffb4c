"""What all contestants start from: a model of the user's, or the embedded one after some SFT."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from logratio.losses import SFTLoss
from logratio.trainers.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from logratio.trainers.loop import train_run
from logratio.trainers.policy.tiny import TINY
from logratio.trainers.setup import build

from .rows import Material, write

BATCH_SIZE, LEARNING_RATE, SEED = 64, 1e-3, 42


def begin(model: str, data: Material, steps: int, folder: Path, say: Callable[[str], None]) -> None:
    """Leave the embedded model in `start`, taught by so many steps of SFT, unless it lies there; another model is
    there already."""
    if model != TINY:
        return
    mark, wanted = folder / "start" / "taught.json", {"steps": steps, "data": data.digest()}
    if mark.exists() and json.loads(mark.read_text()) == wanted:
        return
    say(f"SFT of the embedded model, {steps} steps: what all start from")
    path = folder / "data" / "start.jsonl"
    write(path, data.demonstrations)
    config = RunConfig(
        method="sft",
        loss=SFTLoss(),
        model=ModelConfig(model_name_or_path=TINY),
        data=DataConfig(dataset_name=(str(path),)),
        train=TrainConfig(
            output_dir=str(folder / "start"),
            overwrite_output_dir=True,
            batch_size=BATCH_SIZE,
            max_steps=steps,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            seed=SEED,
        ),
    )
    train_run(build(config), quiet=True)
    mark.write_text(json.dumps(wanted))
