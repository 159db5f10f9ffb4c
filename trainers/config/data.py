"""What it is trained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from logratio.losses.options import Count

from ..errors import UserError
from .numbers import NotNegativeSteps, check_numbers, check_whole
from .objects import json_object, keep_as_text


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What it is trained on."""

    dataset_name: tuple[str, ...] = ("arithmetic",)
    """Hub name, .jsonl, .json (or these gzipped) or .parquet file, folder, or an embedded task: "arithmetic" or
    "shopping". Several are trained on together."""
    dataset_weights: tuple[float, ...] | None = None
    """In which proportions an epoch draws rows of several data sets, none of them twice (default: all of each)."""
    datasets: tuple[str, ...] | None = None
    """In a YAML file, TRL's form of several data sets: a list of mappings with path, name (a configuration),
    revision, split, columns and fraction (a weight)."""
    dataset_config: str | None = None
    """Configuration of a hub data set."""
    dataset_revision: str | None = None
    """Branch, tag or commit of a hub data set (default: main)."""
    dataset_train_split: str = "train"
    """Split to train on."""
    dataset_test_split: str | None = None
    """Split to evaluate on."""
    eval_size: NotNegativeSteps = 0
    """Rows of the train split to hold out for evaluation instead; below 1: that share of them."""
    max_length: int = 1024
    """Longest prompt with one completion, in tokens; what is longer is cut at the end, and counted."""
    dataset_text_field: str = "text"
    """SFT: column of texts to learn whole, where rows are not to be read as prompts and completions or messages."""
    completion_only_loss: bool | None = None
    """SFT: score the completion only (default: yes where rows have one)."""
    assistant_only_loss: bool = False
    """SFT: score the assistant's turns only."""
    chat_template_path: str | None = None
    """Chat template in place of the tokenizer's, saved with the model: a .jinja file, or a tokenizer's hub name or
    folder, whose tokens the model has."""
    chat_template_kwargs: str | None = None
    """Values of the chat template's variables, as a JSON object ({"enable_thinking": false}); in YAML a mapping. The
    saved template's defaults; a row's own chat_template_kwargs go before."""
    on_bad_row: Literal["error", "skip"] = "error"
    """A row that cannot be used ends the run, or is left out, counted, and listed in output_dir/skipped_rows.jsonl."""
    shuffle: bool = True
    """Shuffle the rows in every epoch."""
    streaming: bool = False
    """Read the rows as they are needed, in every epoch anew, and keep none of them; needs --max_steps."""
    streaming_buffer: Count = 10_000
    """Rows among which streamed ones are shuffled."""
    dataset_num_proc: Count = 1
    """Processes that tokenize; the result is kept, and found again by the same rows, tokenizer and options."""

    @property
    def template_values(self) -> dict[str, Any]:
        """What `chat_template_kwargs` says."""
        return json_object(self, "chat_template_kwargs")

    @property
    def evaluates(self) -> bool:
        """Whether there is something to evaluate on."""
        return bool(self.eval_size or self.dataset_test_split)

    def __post_init__(self) -> None:
        check_numbers(self)
        check_whole(self, "eval_size")
        keep_as_text(self, "chat_template_kwargs")
        if isinstance(self.dataset_name, str):
            object.__setattr__(self, "dataset_name", (self.dataset_name,))
        if self.max_length < 2:
            raise UserError(f"--max_length {self.max_length} leaves no room for a prompt and a completion")
        if self.eval_size and self.dataset_test_split:
            raise UserError("--eval_size and --dataset_test_split both say what to evaluate on; give one of them")
