"""A run's folder on the Hub: its model, tokenizer and card; not its checkpoints, logs and caches."""

from __future__ import annotations

from pathlib import Path

from ..config import SaveConfig
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
    "report.html",
    "tensorboard*",
    "wandb*",
]
"""What of a run is not for others: states, logs, reference log-probs, and rows of the data."""


def push(folder: Path, repo_id: str, *, private: bool | None = None, commit_message: str = "Upload model") -> str:
    """Publish what the folder has for others, as the user that is logged in; returns where to.

    repo_id: OWNER/NAME, or NAME for that user's; made if it is not there. private: None: as the owner has it by
    default. Raises UserError where the Hub does not take it.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with foreign(f"{folder} could not be pushed to {repo_id}"):
        made = api.create_repo(repo_id, private=private, exist_ok=True)
        return api.upload_folder(
            folder_path=folder, repo_id=made.repo_id, commit_message=commit_message, ignore_patterns=LEFT_OUT
        )


def check_push(options: SaveConfig) -> None:
    """Raise UserError where a push at the end is bound to fail, before anything is trained."""
    if not options.push_to_hub:
        return
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise UserError("--push_to_hub: HF_HUB_OFFLINE says that there is no Hub; unset it, or push afterwards")
    if get_token() is None:
        raise UserError("--push_to_hub: nobody is logged in; `hf auth login`, or set HF_TOKEN")


def push_run(options: SaveConfig, folder: Path) -> str | None:
    """Push the run that has just been saved, where that is asked for; returns what to tell."""
    if not options.push_to_hub:
        return None
    repo_id = options.hub_model_id or folder.resolve().name
    try:
        return f"pushed to {push(folder, repo_id, private=options.hub_private_repo)}"
    except UserError as error:
        private = " --private" if options.hub_private_repo else ""
        raise UserError(
            f"{error}; the model is saved, and `logratio push {folder} {repo_id}{private}` tries again"
        ) from error
