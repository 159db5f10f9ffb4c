"""A checkpoint that a run goes on from: found, checked, and told apart from another run's before anything is loaded.

adapter or model, tokenizer   as `from_pretrained` loads them
trainer_state.json            step, position in the data, loss, schedule, log, options, versions, fingerprints
optimizer.safetensors         moments, by parameter
rng_state.json                of each process
reference.safetensors         a reference that follows the policy
rollouts.json, .safetensors   rollouts that steps to come learn from
ahead.json                    completions that were sampled for the steps behind these
manifest.json                 the size and SHA-256 of each of them
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor

from ..config import RunConfig
from ..errors import UserError
from ..ground.provenance import versions
from ..processes.once import on_main
from .agreement import check_fingerprints, check_options
from .folder import find, remove_unfinished

STATE, RANDOM, OPTIMIZER = "trainer_state.json", "rng_state.json", "optimizer.safetensors"
REFERENCE, ROLLOUTS, ROLLOUT_LOGPS = "reference.safetensors", "rollouts.json", "rollouts.safetensors"
AHEAD = "ahead.json"
FORMAT = 3


@dataclass(frozen=True)
class Checkpoint:
    """folder: verified. state: what `STATE` says."""

    folder: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.state["step"])

    def json(self, name: str) -> Any:
        """A file of it; None where it has none such."""
        path = self.folder / name
        return json.loads(path.read_text()) if path.exists() else None

    def tensors(self, name: str) -> dict[str, Tensor]:
        """A file of it, on the CPU; empty where it has none such."""
        path = self.folder / name
        return load_file(path) if path.exists() else {}

    def check_same(self, **now: str) -> None:
        """Raise UserError unless data, frozen weights and configurations are those that it was trained on. now: by
        the names of `FINGERPRINTS`."""
        check_fingerprints(self.folder, self.state["about"], now)


def open_checkpoint(config: RunConfig, accelerator: Accelerator) -> tuple[Checkpoint | None, list[str]]:
    """The one that the options ask to go on from, and what to tell about it.

    Raises UserError where it is damaged, or one of a run with other options.
    """
    asked = config.save.resume_from_checkpoint
    if asked is None:
        return None, []
    output_dir = Path(config.train.output_dir)

    def found() -> tuple[Path | None, list[str]]:
        remove_unfinished(output_dir)
        return find(asked, output_dir)

    folder, notes = on_main(accelerator, found)
    if folder is None:
        return None, notes
    if not (folder / STATE).exists():  # whole, but another thing that was saved whole
        raise UserError(f"--resume_from_checkpoint {asked} is no checkpoint: it has no {STATE}; give a checkpoint-N")
    state = json.loads((folder / STATE).read_text())
    if state["format"] != FORMAT:
        raise UserError(f"{folder} has the format {state['format']}, this version reads {FORMAT}: use the one it is of")
    check_options(folder, state["config"], config.as_dict(), compared=state["best"]["value"] is not None)
    return Checkpoint(folder, state), [*notes, *changed_versions(folder, state["about"]["versions"])]


def changed_versions(folder: Path, was: dict[str, str]) -> list[str]:
    """What to tell where packages are others than those that the checkpoint was made with."""
    now = versions()
    changed = [f"{name} {now.get(name)} (was {was.get(name)})" for name in was | now if now.get(name) != was.get(name)]
    if not changed:
        return []
    return [f"other versions than when {folder} was written, so that bits may differ: {', '.join(changed)}"]
