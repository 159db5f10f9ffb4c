"""`logratio push RUN NAME`: a run's model, tokenizer and card on the Hub; not its checkpoints, logs and caches."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from ..checkpoints.hub import push
from ..checkpoints.output_dir import model_files
from ..errors import UserError


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
    url = push(options.run, options.repo_id, private=options.private, commit_message=options.commit_message)
    print(f"pushed to {url}")
    return 0
