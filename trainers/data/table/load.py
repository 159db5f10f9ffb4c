"""From the options to the examples that a run trains on and is evaluated on, and what became of the rows."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from logratio.losses import Kind

from ...config import DataConfig, RunConfig
from ...config.numbers import number_of
from ...errors import UserError, counted
from ...ground.given import given
from ...processes.once import once, raised_together
from ..examples import Preparation
from ..rows import Rows, load_rows
from ..types import Prompt
from .cache import tokenizer_digest
from .making import make_table
from .mixture import DataSet, Mixture, data_sets
from .stored import Examples, Table
from .streaming import Stream

MEASURED = 1000
"""Examples by which the mean lengths of a data set are told."""


@dataclass
class Data:
    """train, evaluation: examples, or prompts where the loss learns from rollouts. notes: what to tell the user.

    skipped: the rows that were left out, as skipped_rows.jsonl lists them. fingerprint: SHA-256 of all examples, their
    order, and how they are drawn.
    """

    train: Sequence[Any]
    evaluation: Sequence[Any]
    notes: list[str]
    skipped: list[dict[str, Any]] = field(default_factory=list)
    fingerprint: str = ""
    reports: list[list[dict[str, Any]]] = field(default_factory=list)  # of each split's data sets, not streamed

    @property
    def epoch_size(self) -> int:
        """How many examples an epoch of training has."""
        return getattr(self.train, "epoch_size", len(self.train))

    def at_the_end(self) -> list[str]:
        """What to tell of rows that nobody knew before."""
        return [f"streamed {self.train.report}"] if isinstance(self.train, Stream) else []

    def card(self) -> dict[str, Any]:
        """What became of the rows, as data_card.json has it: of the splits to train and to evaluate on, how many
        examples there are and their mean lengths, with the counts of each data set that they come from. Of a stream,
        the counts of what was read since the run began, or last went on."""
        reports, stream = list(self.reports), isinstance(self.train, Stream)
        sets = [self.train.report.card(None)] if isinstance(self.train, Stream) else reports.pop(0)
        whole = {"examples": None if stream else len(self.train), "streamed": stream, "sets": sets}
        card: dict[str, Any] = {"train": {**whole, "epoch_size": self.epoch_size, **lengths(self.train)}}
        if len(self.evaluation):
            held_out = {"examples": len(self.evaluation), "sets": reports.pop(0) if reports else []}
            card["evaluation"] = {**held_out, **lengths(self.evaluation)}
        return card


@dataclass(frozen=True)
class Made:
    """What one process tells the others of a table that it has made or found."""

    path: Path
    name: str
    note: str
    skipped: list[dict[str, Any]]
    card: dict[str, Any]


def lengths(examples: Sequence[Any]) -> dict[str, float | None]:
    """Mean tokens of a prompt, and of a completion (None: prompts alone), of at most `MEASURED` evenly spaced ones."""
    some = [examples[i] for i in range(0, len(examples), -(-len(examples) // MEASURED) or 1)]
    completions = [len(c.ids) for one in some for c in getattr(one, "completions", ())]
    prompts = [len(one.prompt_ids) for one in some]
    return {
        "prompt_tokens": sum(prompts) / len(prompts),
        "completion_tokens": sum(completions) / len(completions) if completions else None,
    }


def load_data(config: RunConfig, tokenizer: Any, accelerator: Accelerator | None = None) -> Data:
    """Raises UserError for what in the data or the options does not fit, on all processes alike."""
    asked = data_sets(config.data)
    if not config.data.streaming and config.data.streaming_buffer != DataConfig.streaming_buffer:
        raise UserError("--streaming_buffer is of rows that are streamed: add --streaming, or leave it out")
    stream = open_stream(config, asked, tokenizer) if config.data.streaming else None
    wanted = [*([] if stream else [""]), *filter(None, [config.data.dataset_test_split])]  # empty: to train on

    splits = [[dataclasses.replace(one, split=split or one.split) for one in asked] for split in wanted]
    check_given(config, [one for split in splits for one in split if given(one.path) is not None], accelerator)

    def make() -> list[list[Made]]:
        rows = [[rows_of(config, one) for one in split] for split in splits]  # all are found before any is tokenized
        return [[made(config, tokenizer, one) for one in split] for split in rows]

    found = make() if accelerator is None else once(accelerator, make)
    examples = [Examples([Table(one.path) for one in split], [one.name for one in split]) for split in found]
    notes = [one.note for split in found for one in split]
    train: Any = stream or examples.pop(0)
    evaluation: Sequence[Any] = examples[0] if examples else []
    if config.data.eval_size:
        size = number_of(config.data.eval_size, len(train))
        train, evaluation = held_out(train, size or 0, config.train.seed)
        notes.append(f"{counted(len(evaluation), 'example')} held out for evaluation, {len(train)} left to train on")
    if config.loss.window_pass == "mismatched" and len(evaluation) == 1:
        raise UserError(
            f"{config.method} cannot be evaluated on a single example, whose prompt needs another's completion"
        )
    weights = [one.fraction for one in asked if one.fraction is not None]
    if stream:
        options = {**options_of(config), "tokenizer": tokenizer_digest(tokenizer)}
        said: list[Any] = [stream.fingerprint_with(options)]
    else:
        check_columns(train)
        said = [train.fingerprint]
    if weights:
        train = Mixture(train.tables, train.names, weights, train.chosen)
        notes.append(train.describe())
    said += [evaluation.fingerprint if isinstance(evaluation, Examples) else None, weights]
    fingerprint = hashlib.sha256(json.dumps(said).encode()).hexdigest()
    skipped = [entry for split in found for one in split for entry in one.skipped]
    return Data(train, evaluation, notes, skipped, fingerprint, [[one.card for one in split] for split in found])


def check_given(config: RunConfig, asked: Sequence[DataSet], accelerator: Accelerator | None) -> None:
    """Raise UserError, on all processes, where one was given other rows than the main one, which alone reads its own.
    asked: data sets that are objects of the program's own."""
    if accelerator is None or accelerator.num_processes == 1:
        return
    digests: list[str] = []
    with raised_together(accelerator):
        digests += [rows_of(config, one).digest() for one in asked]
    main, *others = gather_object([digests])
    apart = [str(rank) for rank, theirs in enumerate(others, start=1) if theirs != main]
    if apart:
        raise UserError(
            f"the rows that process {', '.join(apart)} was given are not those of process 0: give all processes the "
            "same data set, whole and in one order; a step's examples are dealt to them here"
        )


def open_stream(config: RunConfig, asked: Sequence[DataSet], tokenizer: Any) -> Stream:
    """The only data set, to be streamed. Raises UserError for options that need to know all rows beforehand."""
    data, train = config.data, config.train
    refused = {
        "--eval_size takes rows out of all; name a --dataset_test_split": data.eval_size,
        "--on_bad_row skip lists rows before training; mend or remove them": data.on_bad_row == "skip",
        "--dataset_weights and several data sets are drawn from by index; name one": len(asked) > 1
        or asked[0].fraction,
        "--precompute_ref_log_probs keeps something of each row; leave it out": config.model.precompute_ref_log_probs,
        "the end of an epoch is not known; say --max_steps": train.max_steps is None,
        "--dataset_num_proc deals them out; leave it at 1": data.dataset_num_proc > 1 and not data.dataset_test_split,
    }
    for why, asked_too in refused.items():
        if asked_too:
            raise UserError(f"--streaming does not know the rows before they come: {why}")
    assert train.max_steps and train.batch_size
    rows = rows_of(config, asked[0], streaming=True)

    prepare = partial(Preparation, kind=config.loss.kind, tokenizer=tokenizer, **options_of(config))
    return Stream(rows, prepare, buffer=data.streaming_buffer, epoch_size=train.max_steps * train.batch_size)


def check_columns(prompts: Examples) -> None:
    """Raise UserError where the prompts of several data sets bring other columns for rewards."""
    columns = [sorted(first.columns) if isinstance(first := table[0], Prompt) else [] for table in prompts.tables]
    for name, own in zip(prompts.names, columns, strict=True):
        if own != columns[0]:
            raise UserError(
                f"{name} has the columns {', '.join(own) or '(none)'} beside the prompt, {prompts.names[0]} has "
                f"{', '.join(columns[0]) or '(none)'}: rewards need the same of all data sets"
            )


def rows_of(config: RunConfig, asked: DataSet, *, streaming: bool = False) -> Rows:
    """The rows of one data set of the run; what in them cannot be read is raised when it is reached."""
    rows = load_rows(
        asked.path,
        config.loss.kind,
        split=asked.split,
        config=asked.name,
        revision=asked.revision,
        seed=config.train.seed,
        check=False,
        streaming=streaming,
    )
    return dataclasses.replace(rows, columns=asked.columns, text=config.data.dataset_text_field)


def made(config: RunConfig, tokenizer: Any, rows: Rows) -> Made:
    """The table of these rows."""
    num_proc = config.data.dataset_num_proc
    path, report = make_table(rows, config.loss.kind, tokenizer, num_proc=num_proc, **options_of(config))
    return Made(path, rows.name, str(report), report.skipped, report.card(len(rows)))


def options_of(config: RunConfig) -> dict[str, Any]:
    """What a `Preparation` is given beside rows, kind and tokenizer."""
    data = config.data
    options: dict[str, Any] = {"max_length": data.max_length, "on_bad_row": data.on_bad_row}
    if config.loss.kind is not Kind.GROUPED:
        options["completion_only_loss"] = data.completion_only_loss
        options["assistant_only_loss"] = data.assistant_only_loss
        options["gold"], options["margin"] = config.loss.scores_gold, config.loss.wants_margin
    return options


def held_out(examples: Examples, size: int, seed: int) -> tuple[Examples, Examples]:
    """(to train on, to evaluate on), each in the order of the rows."""
    if size >= len(examples):
        raise UserError(f"--eval_size {size} leaves nothing of {counted(len(examples), 'example')} to train on")
    order = list(range(len(examples)))
    random.Random(seed).shuffle(order)
    return examples.take(sorted(order[size:])), examples.take(sorted(order[:size]))
