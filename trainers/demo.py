"""`make demo`: all five methods on the embedded model and tasks, from random weights, in two minutes on one core.

Arithmetic, where a question has one right answer:

1. SFT from random weights, until about half of the answers are right.
2. That model answers its training questions, by sampling. Its mistakes against the right answers are the pairs of
   DPO and ORPO, and one by one, marked right or wrong, the rows of KTO. (Greedy mistakes will not do: a model that
   only hears of questions which it gets wrong learns to change all of its answers.)
3. Every method goes on from that model, and so does SFT on the pairs' right answers: the control for what these
   alone would have taught. That is most here, where a question has one right answer and it is known.
4. Accuracy of greedy answers on test questions that nothing was trained or chosen on.

Then shopping (`data/tasks/shopping.py`), where answers are right and dear, or right and cheap: SFT on what people do,
and from there DPO on pairs of which one is cheaper, GRPO on the bill, and SFT on the chosen answers again, which here
teaches little: what is preferred is not what is imitated. Scored is what sampled answers to test lists are worth.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import tyro
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from logratio.losses import DPOLoss, GRPOLoss, Kind, KTOLoss, Loss, ORPOLoss, SFTLoss

from .config import DataConfig, ModelConfig, RolloutConfig, RunConfig, TrainConfig
from .data.examples import Prompt, prepare_prompts
from .data.rows import Rows
from .data.tasks.arithmetic import arithmetic_rows
from .data.tasks.shopping import cheap_basket, shopping_rows
from .demo_parts import Score, addends, clustered, grade, preferences, split_validation, write
from .errors import UserError
from .logs.runlog import reset_peak_mem
from .loop import train_run
from .policy.policy import Policy
from .policy.tiny import TINY
from .rollout.generation import completion_seed, generate
from .setup import Run, build

TARGET = 0.45  # SFT ends at this accuracy of the validation questions
CHECK_EVERY = 10  # steps
ANSWER_TOKENS = 5  # three digits, EOS, and one to spare


@dataclass(frozen=True, kw_only=True)
class Method:
    """One phase. data: the name of its file. steps: at most, for SFT from random weights. control: only reported."""

    name: str
    loss: Loss
    data: str
    steps: int
    learning_rate: float
    batch_size: int = 32
    rollout: RolloutConfig | None = None
    control: bool = False

    @property
    def folder(self) -> str:
        return "control" if self.control else self.name

    @property
    def title(self) -> str:
        return f"{self.name} (control)" if self.control else self.name


START = Method(name="sft", loss=SFTLoss(), data="sft", steps=1000, learning_rate=1e-3, batch_size=64)
# Answers of three or four tokens have small log-ratios, so beta is far above the defaults made for long texts.
METHODS = (
    Method(name="dpo", loss=DPOLoss(beta=2.0), data="pairs", steps=75, learning_rate=5e-5),
    Method(name="kto", loss=KTOLoss(beta=3.0), data="labeled", steps=75, learning_rate=3e-5),
    Method(name="orpo", loss=ORPOLoss(), data="pairs", steps=150, learning_rate=3e-4),
    Method(
        name="grpo",
        loss=GRPOLoss(max_completion_length=ANSWER_TOKENS),
        data="prompts",
        steps=100,
        learning_rate=1e-4,
        batch_size=16,
        rollout=RolloutConfig(num_generations=8),
    ),
    Method(name="sft", loss=SFTLoss(), data="chosen", steps=150, learning_rate=3e-4, control=True),
)

SHOPPING_TOKENS = 6  # four shops, EOS, and one to spare
SHOPPING_LISTS = 500  # of the test split
SHOPPING_START = Method(name="sft", loss=SFTLoss(), data="demonstrations", steps=150, learning_rate=1e-3, batch_size=64)
SHOPPING = (
    Method(name="dpo", loss=DPOLoss(beta=0.5), data="pairs", steps=60, learning_rate=1e-4),
    Method(
        name="grpo",
        loss=GRPOLoss(max_completion_length=SHOPPING_TOKENS),
        data="prompts",
        steps=40,
        learning_rate=3e-4,
        batch_size=16,
        rollout=RolloutConfig(reward_funcs=(f"{cheap_basket.__module__}:{cheap_basket.__name__}",)),
    ),
    Method(name="sft", loss=SFTLoss(), data="chosen", steps=60, learning_rate=3e-4, control=True),
)


@dataclass(frozen=True)
class Result:
    """A phase's score on the test questions, and what it took."""

    method: Method
    score: Score
    steps: int
    seconds: float
    peak_mem_mib: float

    def __str__(self) -> str:
        return f"{self.method.title}: {self.score} on the test questions after {self.steps} steps, {self.seconds:.0f} s"


class Speaker(Protocol):
    """A run, or whatever else has a model and its tokenizer."""

    policy: Policy
    tokenizer: Any


def answers(
    speaker: Speaker, prompts: Sequence[Prompt], *, seed: int | None = None, tokens: int = ANSWER_TOKENS
) -> list[str]:
    """One answer of the model to each, as text. seed: of sampled ones; None: greedy ones."""
    seeds = None if seed is None else [completion_seed("train", seed, 0, p.row, 0) for p in prompts]
    said = generate(speaker.policy, speaker.tokenizer, prompts, max_new_tokens=tokens, seeds=seeds)
    return speaker.tokenizer.batch_decode([s.ids for s in said], skip_special_tokens=True)


def score(speaker: Speaker, prompts: Sequence[Prompt]) -> Score:
    """Accuracy of the model's greedy answers."""
    return clustered(grade(prompts, answers(speaker, prompts)), [addends(str(p.prompt)) for p in prompts])


def thrift(speaker: Speaker, prompts: Sequence[Prompt]) -> Score:
    """What the model's sampled answers to shopping lists are worth."""
    texts = answers(speaker, prompts, seed=0, tokens=SHOPPING_TOKENS)
    worth = cheap_basket([str(p.prompt) for p in prompts], texts)
    return clustered([float(x or 0) for x in worth], range(len(prompts)))


def prepared(rows: Rows, speaker: Speaker) -> list[Prompt]:
    """Questions as token ids."""
    return list(prepare_prompts(rows, speaker.tokenizer)[0])


def configuration(method: Method, model: str, folder: Path) -> RunConfig:
    """What `logratio train` would make of the same options."""
    return RunConfig(
        method=method.name,
        loss=method.loss,
        model=ModelConfig(model_name_or_path=model),
        data=DataConfig(dataset_name=(str(folder / f"{method.data}.jsonl"),)),
        train=TrainConfig(
            output_dir=str(folder / method.folder),
            overwrite_output_dir=True,
            batch_size=method.batch_size,
            max_steps=method.steps,
            learning_rate=method.learning_rate,
            lr_scheduler_type="constant",
        ),
        rollout=method.rollout,
    )


def phase(
    method: Method,
    model: str,
    folder: Path,
    test: Rows,
    until: Callable[[Run, Mapping[str, float]], bool] | None = None,
    by: Callable[[Run, Sequence[Prompt]], Score] = score,
) -> tuple[Run, Result]:
    """Train one method from `model` and score it on the test questions; the time is that of training alone."""
    run = build(configuration(method, model, folder))
    reset_peak_mem(run.accelerator.device)
    started = time.perf_counter()
    row = train_run(run, until=until, quiet=True)
    seconds = time.perf_counter() - started
    return run, Result(method, by(run, prepared(test, run)), int(row["step"]), seconds, row["peak_mem_mib"])


def train_all(folder: Path, say: Callable[[str], None]) -> list[Result]:
    """Every phase in turn; the first result is that of SFT from random weights, which all others start from."""
    test = Rows("test questions", arithmetic_rows(Kind.GROUPED, "test"))
    validation, training = split_validation(arithmetic_rows(Kind.GROUPED))
    sft = [{"prompt": row["prompt"], "completion": row["answer"]} for row in training.rows]
    write(folder, {"prompts": training.rows, "sft": sft})

    def skilled(run: Run, row: Mapping[str, float]) -> bool:
        """Skill comes all at once, at a step that nobody can foresee: so it is measured."""
        return row["step"] % CHECK_EVERY == 0 and score(run, prepared(validation, run)).accuracy >= TARGET

    say(f"SFT from random weights, until {TARGET:.0%} of {len(validation)} validation questions are answered right")
    run, result = phase(START, TINY, folder, test, until=skilled)
    say(str(result))
    if result.steps == START.steps:
        raise UserError(f"SFT did not reach an accuracy of {TARGET} within {START.steps} steps; see {folder}")
    results = [result]

    prompts = prepared(training, run)
    files = preferences(prompts, answers(run, prompts, seed=run.config.train.seed))
    write(folder, files)
    say(f"of its sampled answers to {len(prompts)} training questions {len(files['pairs'])} are wrong and make pairs")
    for method in METHODS:
        _, result = phase(method, str(folder / START.folder), folder, test)
        say(str(result))
        results.append(result)
    return results


def shop(folder: Path, say: Callable[[str], None]) -> list[Result]:
    """The same of shopping; the first result is again that of SFT from random weights."""
    test = Rows("test lists", shopping_rows(Kind.GROUPED, "test")[:SHOPPING_LISTS])
    pairs = shopping_rows(Kind.PAIRED)
    chosen = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs]
    files = {"pairs": pairs, "chosen": chosen, "demonstrations": shopping_rows(Kind.SEQUENCE)}
    write(folder, {**files, "prompts": shopping_rows(Kind.GROUPED)})
    say("shopping, where what is imitated is not what is preferred: SFT on demonstrations")
    results: list[Result] = []
    for method in (SHOPPING_START, *SHOPPING):
        model = str(folder / SHOPPING_START.folder) if results else TINY
        _, result = phase(method, model, folder, test, by=thrift)
        say(str(result))
        results.append(result)
    return results


def table(results: Sequence[Result], title: str = "accuracy ± standard error") -> Table:
    """Score before and after each method, and what it took."""
    start = results[0].score
    columns = "method", "before", "after", "gain\n(s.e.)", "steps", "time\n(s)", "peak\nMiB"
    shown = Table(*columns, box=SIMPLE, title=title)
    for column in shown.columns[1:]:
        column.justify = "right"
    for i, r in enumerate(results):
        before, gain = (str(start), f"{r.score.beyond(start):+.1f}") if i else ("", "")
        shown.add_row(
            r.method.title, before, str(r.score), gain, str(r.steps), f"{r.seconds:.0f}", f"{r.peak_mem_mib:.0f}"
        )
    return shown


def demo(output_dir: str = "runs/demo") -> int:
    """SFT, DPO, KTO, ORPO and GRPO on a tiny model, from random weights. Status 1 where a method does not help, or one
    that is told what is preferred does not go beyond SFT on what was chosen.

    Args:
        output_dir: Folder for the data, logs and models.
    """
    disable_progress_bar()  # of loading and saving
    console, started, cpu_started = Console(soft_wrap=True), time.perf_counter(), time.process_time()
    say = lambda text: console.print(text, highlight=False, markup=False)  # noqa: E731
    results = train_all(Path(output_dir), say)
    console.print(table(results))
    shopped = shop(Path(output_dir) / "shopping", say)
    console.print(table(shopped, "what a basket is worth (1: the cheapest) ± standard error"))
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu_started
    console.print(f"{seconds:.0f} s in all ({cpu:.0f} s of CPU time); data, logs and models are in {output_dir}")
    start = results[0].score
    failed = [r for r in results[1:] if not r.method.control and r.score.beyond(start) <= 2]
    for r in failed:
        console.print(f"{r.method.title}: {r.score} is not two standard errors above SFT's {start}")
    control = next(r for r in shopped if r.method.control)
    behind = [r for r in shopped[1:] if r is not control and r.score.beyond(control.score) <= 2]
    for r in behind:
        console.print(f"{r.method.title}: {r.score} is not two standard errors above the control's {control.score}")
    return 1 if failed or behind else 0


def main() -> int:
    torch.set_num_threads(1)  # with two, a busy machine took over three times the CPU time for tensors this small
    try:
        return tyro.cli(demo)
    except UserError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
