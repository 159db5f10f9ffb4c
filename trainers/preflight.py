"""What can be known before a model is loaded, from its configuration, the data and the options; and refused in time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import torch

from .checkpoints.output_dir import check_room
from .config import RunConfig
from .config.numbers import number_of
from .data.table.extremes import Extremes, extremes_of
from .data.table.streaming import Stream
from .errors import UserError
from .policy.adapters import check_adapter, check_targets
from .policy.checks import learned_positions, skeleton, stuck
from .policy.load import check_architecture, load_tokenizer, pad_within
from .policy.teacher import check_teacher
from .policy.template import with_template
from .policy.tiny import TINY, tiny_config

# Part of the weights that cannot move from which on one is told.
STUCK = 0.1


@dataclass(frozen=True)
class Shape:
    """Of a model called `name`: rows of its embeddings, positions that it learned (None: it computes them), those that
    it was made for, its parameters."""

    name: str
    rows: int
    learned: int | None
    made_for: int | None
    parameters: int


def read_model(config: RunConfig) -> tuple[Any, list[Shape], list[str]]:
    """The tokenizer, the shapes of the model, of a reference of its own and of a teacher, and what to tell about them.

    Raises UserError where a folder, a configuration, an adapter's or `lora_target_modules` rules the run out.
    """
    options = config.model
    name = options.model_name_or_path
    bare = skeleton_of(name, revision=options.model_revision)
    tokenizer = load_tokenizer(name, options.model_revision)
    tokenizer, notes = with_template(tokenizer, config.data.chat_template_path, config.data.template_values)
    shapes = [shape_of(bare, name)]
    if options.lora_target_modules:
        check_targets(bare, list(options.lora_target_modules))
    if options.adapter_name_or_path:
        check_adapter(options.adapter_name_or_path)
    if other := options.ref_model_name_or_path:
        shapes.append(shape_of(skeleton_of(other, "--ref_model_name_or_path"), other))
    if teacher := options.teacher_model_name_or_path:
        shapes.append(shape_of(skeleton_of(teacher, "--teacher_model_name_or_path"), teacher))
        check_teacher(tokenizer, load_tokenizer(teacher), teacher)
    return tokenizer, shapes, [*notes, *pad_within(tokenizer, min(s.rows for s in shapes), name)]


def skeleton_of(name: str, option: str = "--model_name_or_path", revision: str | None = None) -> Any:
    """The model without weights."""
    return skeleton(tiny_config() if name == TINY else check_architecture(name, option, revision), name)


def shape_of(model: Any, name: str) -> Shape:
    text = model.config.get_text_config()
    return Shape(
        name=name,
        rows=model.get_input_embeddings().weight.shape[0],
        learned=learned_positions(model),
        made_for=getattr(text, "max_position_embeddings", None) if getattr(text, "rope_parameters", None) else None,
        parameters=sum(p.numel() for p in model.parameters()),
    )


def check_before(
    config: RunConfig, parts: Sequence[Sequence[Any]], shapes: Sequence[Shape], total_steps: int, *, saves: bool = True
) -> list[str]:
    """Raise UserError where a token or a position is beyond a model's tables, the warm-up beyond the last step, or the
    saved models, where there are to be any, beyond the disk. parts: examples, or prompts, of training and of
    evaluation. Returns what to tell."""
    warmup = config.train.warmup_steps
    if warmup >= max(1, total_steps):
        raise UserError(
            f"--warmup_steps {warmup} of {total_steps} steps: the learning rate would never reach its peak; "
            "choose fewer"
        )
    if saves and not config.model.lora_r and not config.model.adapter_name_or_path:
        weights = shapes[0].parameters * getattr(torch, config.model.dtype).itemsize
        check_room(config.train.output_dir, weights, copies_of_weights(config, total_steps))
    for part in parts:
        if isinstance(part, Stream):  # what was not seen yet is checked when it comes
            part.check = partial(check_found, config, shapes=shapes)
    return check_found(config, reduce(Extremes.__or__, map(extremes_of, parts), Extremes()), shapes)


def check_found(config: RunConfig, found: Extremes, shapes: Sequence[Shape]) -> list[str]:
    """Raise UserError where a token or a position is beyond a model's tables; returns what to tell."""
    option = "--max_length or --max_completion_length" if config.rollout else "--max_length"
    return check_tables(found, longest_sequence(config, found), shapes, option)


def check_tables(found: Extremes, sequence: tuple[int, int], shapes: Sequence[Shape], option: str) -> list[str]:
    """As `check_found`. sequence: of `longest_sequence`. option: with which it is made shorter."""
    for shape in shapes:
        check_ids(found, shape)
    row, longest = sequence
    notes = []
    for shape in shapes:
        said = f"row {row} of the data set makes a sequence of {longest} tokens, more than the {{}} positions {{}}"
        if shape.learned is not None and longest > shape.learned:
            raise UserError(f"{said.format(shape.learned, f'that {shape.name!r} has learned')}; lower {option}")
        if shape.made_for is not None and longest > shape.made_for:
            notes.append(f"{said.format(shape.made_for, f'that {shape.name!r} was made for')}, where it may do badly")
    return notes


def copies_of_weights(config: RunConfig, total_steps: int) -> int:
    """How many times a fully trained model's bytes the run writes: in the end once, in a checkpoint three times, with
    AdamW's moments; one more checkpoint than the limit is there for a moment."""
    save = config.save
    if not save.save_steps:
        return 1
    kept = -(-total_steps // (number_of(save.save_steps, total_steps) or 1))
    if save.resume_from_checkpoint:  # what there is has its room
        kept = 1
    return 1 + 3 * min(kept, (save.save_total_limit or kept) + 1)


def check_ids(found: Extremes, shape: Shape) -> None:
    """Raise UserError for a token id without a row in the embeddings."""
    token, row = found.token
    if token >= shape.rows:
        raise UserError(
            f"row {row} of the data set holds token {token}, which has no row in the embeddings of "
            f"{shape.name!r}, that end at {shape.rows - 1}; use the tokenizer that belongs to the model"
        )


def longest_sequence(config: RunConfig, found: Extremes) -> tuple[int, int]:
    """(its row, tokens of a prompt with a completion) of the longest that may come, by this data."""
    (prompt, row), (longest, longest_row) = found.prompt, found.sequence
    if not prompt:
        return 0, 0
    if config.rollout:
        return row, prompt + config.loss.max_completion_length
    if config.loss.window_pass != "mismatched":
        return longest_row, longest
    # a prompt may get another's completion
    return row, max(longest, min(prompt + found.completion, config.data.max_length))


def describe_stuck(model: Any, config: RunConfig) -> list[str]:
    """What to tell where weights in 16 bits are too coarse for the learning rate."""
    rate = config.train.learning_rate
    assert rate is not None
    part = stuck(model, rate) if rate else 0.0
    if part < STUCK:
        return []
    return [
        f"{100 * part:.0f} % of the {config.model.dtype} weights cannot be moved by a step of the learning rate "
        f"{rate:g}, which is below their rounding: use --dtype float32 --mixed_precision bf16, or a larger rate"
    ]
