"""What is kept of it."""

from __future__ import annotations

from dataclasses import dataclass

from logratio.losses.options import Count

from ..errors import UserError
from .numbers import Steps, check_numbers, check_whole


@dataclass(frozen=True, kw_only=True)
class SaveConfig:
    """What is kept on the way, and how a run goes on from it."""

    save_steps: Steps | None = None
    """Leave a checkpoint every so many steps, below 1: every such share of all, and at the end (default: none, the
    trained model alone)."""
    save_total_limit: Count | None = None
    """Keep so many checkpoints, the latest ones, the best among them (default: all)."""
    resume_from_checkpoint: str | None = None
    """Go on from a checkpoint as if the run had never stopped: its folder, or "latest": the last whole one in
    output_dir, or the beginning where there is none."""
    load_best_model_at_end: bool = False
    """Save in the end the weights of the best evaluation by metric_for_best_model; each that is the best so far leaves
    a checkpoint too."""
    metric_for_best_model: str | None = None
    """A metric of the evaluations, with or without eval_ (default: loss)."""
    greater_is_better: bool | None = None
    """Whether more of it is better (default: unless its name ends in loss)."""
    early_stopping_patience: Count | None = None
    """End after so many evaluations in turn without a better value of metric_for_best_model."""
    push_to_hub: bool = False
    """Publish the trained model on the Hub in the end, as the user that `hf auth login` has logged in."""
    hub_model_id: str | None = None
    """Where to: OWNER/NAME, or NAME for the user's own (default: the name of output_dir)."""
    hub_private_repo: bool | None = None
    """Whether it is private, where it is made (default: as the owner's are)."""

    def __post_init__(self) -> None:
        check_numbers(self)
        check_whole(self, "save_steps")
        if self.save_total_limit and not self.save_steps and not self.load_best_model_at_end:
            raise UserError("--save_total_limit is about checkpoints, and there are none without --save_steps")
        for name in ("metric_for_best_model", "greater_is_better"):
            if getattr(self, name) is not None and not self.compares:
                raise UserError(f"--{name} is read only with --load_best_model_at_end or --early_stopping_patience")

        for name in ("hub_model_id", "hub_private_repo"):
            if getattr(self, name) is not None and not self.push_to_hub:
                raise UserError(f"--{name} is read only with --push_to_hub; add it, or leave this out")

    @property
    def compares(self) -> bool:
        """Whether evaluations are compared with each other."""
        return self.load_best_model_at_end or self.early_stopping_patience is not None

    @property
    def metric(self) -> str:
        """The metric that they are compared by, as the log has it."""
        return "eval_" + (self.metric_for_best_model or "loss").removeprefix("eval_")

    @property
    def greater(self) -> bool:
        if self.greater_is_better is None:
            return not self.metric.endswith("loss")
        return self.greater_is_better
