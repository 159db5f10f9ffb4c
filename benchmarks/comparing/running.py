"""One contestant with one seed: trained from the common start for as long as all, and scored on the way."""

from __future__ import annotations

import dataclasses
import math
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from logratio.losses import Kind
from logratio.trainers.config import RunConfig
from logratio.trainers.data.examples import Example, prepare
from logratio.trainers.data.rows import Rows
from logratio.trainers.data.table.load import options_of
from logratio.trainers.errors import UserError, first_line
from logratio.trainers.loop import train_run
from logratio.trainers.policy.reference import inference
from logratio.trainers.setup import Run, build

from .rows import ROWS_OF_A_PAIR, Row, as_kind, ordered, write
from .scores import METRICS, Asked, Scorer, Scores

Unit = Literal["steps", "tokens", "seconds"]
ENDLESS = 1_000_000
"""Steps of a run whose end is not counted in steps."""


@dataclass(frozen=True)
class Budget:
    """As long as all contestants train: so many optimizer steps; tokens that are learned from (a prompt counts with
    each of its completions, sampled ones as well); or seconds in steps, sampling among them, evaluations not."""

    unit: Unit
    amount: float

    def spent(self, row: Mapping[str, float], seconds: float) -> float:
        return {"steps": row["step"], "tokens": row["num_tokens"], "seconds": seconds}[self.unit]

    def __str__(self) -> str:
        return f"{self.amount:,.10g} {self.unit}"


@dataclass(frozen=True)
class Job:
    """config: of the contestant, without data and folder. kept: whether the trained model stays on the disk."""

    contestant: str
    config: RunConfig
    seed: int
    budget: Budget
    checks: int
    asked: Asked
    train: Sequence[Row]
    held_out: Sequence[Row]
    folder: Path
    threads: int | None = None

    def resolved(self) -> RunConfig:
        """The configuration of its run. UserError where it does not fit the comparison."""
        config, kind = self.config, self.config.loss.kind
        steps = int(self.budget.amount) if self.budget.unit == "steps" else ENDLESS
        if self.budget.unit != "steps" and config.train.lr_scheduler_type not in ("constant", "constant_with_warmup"):
            raise UserError(
                f"contestant {self.contestant!r}: --lr_scheduler_type {config.train.lr_scheduler_type} needs to know "
                "the last step; take --max_steps as the budget, or constant"
            )
        resolved = config.train.resolved(config.method, 1, config.rollout.num_generations if config.rollout else 1)
        assert resolved.batch_size is not None
        data = dataclasses.replace(config.data, dataset_name=(str(self.data),), shuffle=False)
        train = dataclasses.replace(
            resolved,
            output_dir=str(self.folder / "runs" / f"{safe(self.contestant)}-seed{self.seed}"),
            overwrite_output_dir=True,
            max_steps=steps,
            seed=self.seed,
            batch_size=resolved.batch_size * ROWS_OF_A_PAIR.get(kind, 1),
        )
        rollout = config.rollout
        if rollout is not None:
            if not self.asked.rewards:
                raise UserError(
                    f"contestant {self.contestant!r} learns from rewards: name them with --reward_funcs, or add a "
                    "column 'answer' to the rows"
                )
            rollout = dataclasses.replace(rollout, reward_funcs=self.asked.rewards, log_completions=False)
        loss = config.loss
        if kind is Kind.GROUPED:
            loss = dataclasses.replace(loss, max_completion_length=self.asked.longest)
        return dataclasses.replace(config, loss=loss, data=data, train=train, rollout=rollout)

    @property
    def data(self) -> Path:
        """Its rows, as all have them whose losses read the same columns."""
        loss = self.config.loss
        name = f"{loss.kind.value}{'-margin' if loss.wants_margin else ''}.jsonl"
        return self.folder / "data" / f"seed{self.seed}" / name


def safe(name: str) -> str:
    """A contestant's name as that of a folder."""
    return "".join(c if c.isalnum() or c in "-._" else "_" for c in name)


def run_job(job: Job) -> dict[str, Any]:
    """What there is to write down: status, cost, the curve of means, the last scores row by row."""
    if job.threads:
        torch.set_num_threads(job.threads)
    try:
        return {"status": "ok", **trained(job)}
    except (UserError, torch.OutOfMemoryError) as error:
        return {"status": "failed", "error": first_line(error)}
    except Exception as error:  # of a loss or a reward of one's own: the others are not to pay for it
        traceback.print_exc()
        return {"status": "failed", "error": f"{type(error).__name__}: {first_line(error)}"}


def trained(job: Job) -> dict[str, Any]:
    """Train it and score it."""
    loss = job.config.loss
    write(job.data, as_kind(ordered(job.train, job.seed), loss.kind, margin=loss.wants_margin))
    run = build(job.resolved(), saves=False)
    scorer, own = Scorer(run, job.held_out, job.asked), own_examples(run, job.held_out)
    watch = Watch(job, scorer)
    started = time.process_time()
    try:
        watch.look({"step": 0, "num_tokens": 0})
        row = train_run(run, until=watch, quiet=True)
    finally:
        scorer.close()
    return {
        "steps": int(row["step"]),
        "num_tokens": int(row["num_tokens"]),
        "train_s": watch.seconds,
        "cpu_s": time.process_time() - started,
        "own_loss": None if own is None else own_loss(run, own),
        "curve": watch.curve,
        "rows": {name: [round(value, 6) for value in values] for name, values in watch.scores.items()},
    }


class Watch:
    """Looks at every step of a run: whether it is to be scored, and whether it is the last."""

    def __init__(self, job: Job, scorer: Callable[[], Scores]) -> None:
        self.job, self.scorer = job, scorer
        self.seconds, self.done = 0.0, 0  # of the checks
        self.curve: list[dict[str, float]] = []
        self.scores: Scores = {}

    def __call__(self, run: Run, row: Mapping[str, float]) -> bool:
        self.seconds += row["step_ms"] / 1e3
        share = self.job.budget.spent(row, self.seconds) / self.job.budget.amount
        ends = share >= 1
        if ends or math.floor(share * self.job.checks) > self.done:
            self.done = math.floor(share * self.job.checks)
            self.look(row)
        return ends

    def look(self, row: Mapping[str, float]) -> None:
        """Score the policy as it is."""
        self.scores = self.scorer()
        means = {name: sum(values) / len(values) for name, values in self.scores.items()}
        cost = {"steps": row["step"], "tokens": row["num_tokens"], "seconds": self.seconds}
        self.curve.append({**cost, **{name: means[name] for name in METRICS if name in means}})


def own_examples(run: Run, rows: Sequence[Row]) -> list[Example] | None:
    """The held-out rows as the contestant's own loss takes them; None where it learns from what it samples."""
    loss = run.config.loss
    if loss.kind is Kind.GROUPED:
        return None
    own = Rows("held-out rows", as_kind(rows, loss.kind, margin=loss.wants_margin))
    return prepare(own, loss.kind, run.tokenizer, **options_of(run.config))[0]


def own_loss(run: Run, examples: Sequence[Example]) -> float:
    """The contestant's own loss on held-out rows, as one step of them all; of other losses it is in other units."""
    with inference(run.policy):
        micros = run.step.micro_batches(examples)
        result = run.step(micros, run.step.totals(examples, micros), backward=False)
    return result.reduced(run.accelerator)["loss"]
