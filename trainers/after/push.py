"""`logratio push RUN NAME`: a run's model, tokenizer and card on the Hub; not its checkpoints, logs and caches."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from ..checkpoints.output_dir import model_files
from ..errors import UserError
from ..policy.checks import foreign

LEFT_OUT = [
    "checkpoint-*",
    ".*",
    "ref_log_probs.safetensors",
    "skipped_rows*",
    "completions*",
    "metrics*",
    "notes*",
    "tensorboard*",
]
"""What of a run is not for others: states, logs, reference log-probs, and rows of the data."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What goes where."""

    run: tyro.conf.Positional[Path]
    """A run's output_dir, or any folder with a model or an adapter."""
    repo_id: tyro.conf.Positional[str]
    """OWNER/NAME on the Hub; made if it is not there."""
    private: bool = False
    """Make it private."""
    commit_message: str = "Upload model"
    """Of the commit."""


def main(argv: list[str] | None = None) -> int:
    """Publish a run's model on the Hub, as the user that `hf auth login` has logged in."""
    options = tyro.cli(Options, args=argv, prog="logratio push", use_underscores=True)
    if not model_files(options.run):
        raise UserError(f"{options.run} holds no model and no adapter, so there is nothing to push")
    from huggingface_hub import HfApi

    api = HfApi()
    with foreign(f"{options.run} could not be pushed to {options.repo_id}"):
        api.create_repo(options.repo_id, private=options.private, exist_ok=True)
        url = api.upload_folder(
            folder_path=options.run,
            repo_id=options.repo_id,
            commit_message=options.commit_message,
            ignore_patterns=LEFT_OUT,
        )
    print(f"pushed to {url}")
    return 0
