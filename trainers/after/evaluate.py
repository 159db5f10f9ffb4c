"""`logratio eval MODEL_OR_RUN [--dataset_name FILE]`: what a model makes of rows, without training on them.

Rows of text, messages, or prompt and completion: nats a scored token and the perplexity, exp of it. Rows with chosen
and rejected: how often the chosen one is more likely, by the sum over its tokens and by their mean. Prompts with
rewards (--reward_funcs): mean rewards of sampled completions with a 95 % interval; of a reward that is 0 or 1, pass@k.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table

from logratio.losses import CPOLoss, Kind, Loss, Mean, SFTLoss
from logratio.losses.options import Count, Positive

from ..batches.inputs import loss_inputs
from ..batches.packing import pack
from ..config import RolloutConfig
from ..data.examples import prepare, prepare_prompts
from ..data.files import file_type
from ..data.rows import EMBEDDED, Rows, load_rows
from ..data.table.extremes import Extremes, extremes_of
from ..errors import UserError, first_line
from ..policy.policy import Policy
from ..policy.reference import inference
from ..policy.sharing import share_prompts
from ..preflight import check_tables, shape_of
from ..rollout.evaluation import figures
from ..rollout.generation import numbered
from ..rollout.rewards import load_rewards
from ..rollout.rollouts import Rollouts
from ..window import StepResult
from .trained import Dtype, device_of, load_trained


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is evaluated, and on what."""

    model: tyro.conf.Positional[str]
    """Hub name, folder of a model, or output_dir of a run."""
    dataset_name: str | None = None
    """As `logratio train` takes it (default: what the run was trained on, the split that it was evaluated on)."""
    dataset_test_split: str | None = None
    """Its split (default: test; of a single file "train", its only one)."""
    dataset_config: str | None = None
    """Configuration of a hub data set."""
    reward_funcs: tuple[str, ...] = ()
    """Sample completions and reward them: as `logratio train grpo` takes it."""
    num_generations: Count = 4
    """Completions of each prompt."""
    temperature: Positive = 1.0
    """Of sampling."""
    max_completion_length: Count = 256
    """Longest completion, in tokens."""
    max_length: Count = 1024
    """Longest prompt with one completion, in tokens."""
    max_rows: Count | None = None
    """The first so many rows (default: all)."""
    micro_batch_tokens: Count = 8192
    """Tokens of one forward pass."""
    dtype: Dtype = "float32"
    """Of the model's weights."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """cuda where there is one."""
    seed: int = 42
    """Of sampling."""
    json: bool = False
    """Print one JSON object instead of a table."""


def main(argv: list[str] | None = None) -> int:
    """Evaluate a model or a run: perplexity, preference accuracy, or rewards of what it samples."""
    options = tyro.cli(Options, args=argv, prog="logratio eval", use_underscores=True)
    answer = evaluated(options)
    if options.json:
        print(json.dumps(answer))
        return 0
    title = f"{options.model} on {answer.pop('data')}"
    table = Table("metric", "value")
    for name, value in answer.items():
        table.add_row(name, f"{value:.6g}" if isinstance(value, float) else str(value))
    console = Console()
    console.print(title, soft_wrap=True, highlight=False, markup=False)  # a title of the table's would be as narrow
    console.print(table)
    return 0


def evaluated(options: Options) -> dict[str, Any]:
    """All that is printed. Raises UserError for rows or a model that do not fit."""
    rows = rows_of(options, Kind.GROUPED if options.reward_funcs else Kind.SEQUENCE)
    model, tokenizer = load_trained(options.model, options.dtype, device_of(options.device))
    policy = Policy(model, temperature=options.temperature if options.reward_funcs else 1.0)
    share_prompts(policy)
    by = sampled if options.reward_funcs else scored
    return by(options, rows, policy, tokenizer)


def rows_of(options: Options, kind: Kind) -> Rows:
    """The rows, the first of them where so many are asked for."""
    name, usual = options.dataset_name, "test"
    own: dict[str, Any] = {}
    if name is None:
        name, usual, own = of_the_run(options.model, options.dataset_test_split)
    elif file_type(name):
        usual = "train"
    split = options.dataset_test_split or usual
    config, revision = options.dataset_config or own.get("dataset_config"), own.get("dataset_revision")
    rows = load_rows(name, kind, split=split, config=config, revision=revision, seed=options.seed)
    if kind is Kind.SEQUENCE:
        rows = dataclasses.replace(rows, text=own.get("dataset_text_field", "text"))
    if options.max_rows is None:
        return rows
    return dataclasses.replace(rows, rows=[row for _, row in rows.between(0, options.max_rows)])


def of_the_run(folder: str, split: str | None) -> tuple[str, str, dict[str, Any]]:
    """The data set that the run was trained on, the split to evaluate on, unless one is given, and the run's options of
    its data.

    Raises UserError where the folder is not a run's, or the run knows of no such split."""
    settings = Path(folder) / "run_config.json"
    if not settings.is_file():
        raise UserError(f"{folder} is not a run, whose data would be known: name what to evaluate on (--dataset_name)")
    try:
        data = json.loads(settings.read_text())["data"]
        name, *more = data["dataset_name"]
        own_split = data["dataset_test_split"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{settings} names no data set ({first_line(error)}): name one (--dataset_name)") from error
    if more or data.get("datasets"):
        raise UserError(f"{folder} was trained on several data sets: name one to evaluate on (--dataset_name)")
    split = split or own_split or ("test" if name in EMBEDDED else None)
    if split is None:
        raise UserError(
            f"{folder} was trained on {name} and has no split of it to evaluate on: name rows (--dataset_name), or a "
            "split (--dataset_test_split)"
        )
    return name, split, data


def scored(options: Options, rows: Rows, policy: Policy, tokenizer: Any) -> dict[str, Any]:
    """Of completions that the rows have."""
    first = next(iter(rows))
    pairs = isinstance(first, dict) and {"chosen", "rejected"} <= first.keys()
    loss: Loss = CPOLoss() if pairs else SFTLoss()
    examples, report = prepare(rows, loss.kind, tokenizer, max_length=options.max_length)
    extremes = extremes_of(examples)
    fits(options, policy, extremes, extremes.sequence, "--max_length")
    device = policy.causal_lm.device
    nothing = torch.zeros((), dtype=torch.float64, device=device)
    result = StepResult(nothing)
    with inference(policy):
        for batch in pack(examples, options.micro_batch_tokens, **policy.packing):
            moved = batch.to(device)
            found = (preferred if pairs else likely)(loss_inputs(loss, moved, policy(moved))["policy"])
            result.add(nothing, {name: Mean(mean.total.double(), mean.count) for name, mean in found.items()})
    answer: dict[str, Any] = {
        "data": str(report),
        "rows": len(examples),
        **{name: mean.value for name, mean in result.metrics.items()},
    }
    if "nll" in answer:
        answer |= {"perplexity": math.exp(min(answer["nll"], 700.0)), "scored_tokens": int(result.metrics["nll"].count)}
    return answer


def fits(options: Options, policy: Policy, found: Extremes, longest: tuple[int, int], option: str) -> None:
    """As training is held to them: UserError where a token or a position is beyond the model's tables. longest: tokens
    of a prompt with a completion, and its row. option: with which it is made shorter."""
    shape = shape_of(policy.causal_lm, options.model)
    for note in check_tables(found, longest[::-1], [shape], option):
        print(note, file=sys.stderr)


def likely(policy: Any) -> dict[str, Mean]:
    """Nats a token."""
    return {"nll": Mean.of(-policy.logps, policy.completion_mask)}


def preferred(policy: Any) -> dict[str, Mean]:
    """How often the chosen completion is the more likely one."""
    chosen, rejected = policy.chosen, policy.rejected
    return {
        "logps/chosen": Mean.of(chosen.sums),
        "logps/rejected": Mean.of(rejected.sums),
        "accuracy_of_sums": Mean.of((chosen.sums > rejected.sums).double()),
        "accuracy_of_means": Mean.of((chosen.averages > rejected.averages).double()),
    }


def sampled(options: Options, rows: Rows, policy: Policy, tokenizer: Any) -> dict[str, Any]:
    """Of completions that the model samples."""
    prompts, report = prepare_prompts(rows, tokenizer, max_length=options.max_length)
    extremes = extremes_of(prompts)
    longest = extremes.prompt[0] + options.max_completion_length, extremes.prompt[1]
    fits(options, policy, extremes, longest, "--max_length or --max_completion_length")
    kept = {"device": policy.causal_lm.device, "dtype": options.dtype}
    rewards = load_rewards(options.reward_funcs, prompts[0].columns, **kept)
    if options.num_generations < 2:
        raise UserError("--num_generations: sample 2 at least, whose mean is closer to pass@1 than one sample is")
    config = RolloutConfig(
        num_generations=options.num_generations, temperature=options.temperature, reward_funcs=options.reward_funcs
    )
    rollouts = Rollouts(policy, tokenizer, config, rewards, options.max_completion_length, seed=options.seed)
    rolled = rollouts(numbered(prompts), "evaluation")
    answer: dict[str, Any] = {"data": str(report), "prompts": len(prompts), "completions": rolled.lengths.numel()}
    for column, name in enumerate(rewards):
        values = rolled.by_function[..., column]
        answer[f"rewards/{name}/mean"] = float(values.nanmean())
        answer[f"rewards/{name}/best_of_{options.num_generations}"] = best(values)
        answer |= {f"rewards/{name}/{figure}": value for figure, value in figures(values).items()}
    ended = torch.ones(1) if rolled.ended is None else rolled.ended
    return {
        **answer,
        "completions/mean_length": float(rolled.lengths.double().mean()),
        "completions/clipped_ratio": 1 - float(ended.mean()),
    }


def best(values: torch.Tensor) -> float:
    """The mean over prompts of the best completion's reward, of those of which any was rewarded."""
    known = values[~values.isnan().all(1)]
    return float(known.nan_to_num(-torch.inf).amax(1).mean())
