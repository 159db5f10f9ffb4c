"""The suite `learning`: how much GRPO learns of the embedded task, and how soon, beside TRL's trainer.

Both begin with the same model, which SFT teaches until, looked at every `CHECK_EVERY` steps, `TARGET` of its answers
are right. In each of the same steps both take the same number of completions of as many questions, under the same
optimizer, rate and seed; which questions come when, and what is sampled, is their own. Every `CHECK_EVERY` steps greedy
answers to validation questions are graded, whose time is not counted. What is reported is the share of right answers,
at the end, to test questions that nothing was trained or chosen on.

Times are the process's own CPU time on one thread: tensors this small gain nothing from a second one, and what else the
machine does is not in it.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from logratio.losses import GRPOLoss, Kind
from logratio.trainers.config import RolloutConfig, RunConfig
from logratio.trainers.data.examples import Prompt
from logratio.trainers.data.rows import Rows
from logratio.trainers.data.tasks.arithmetic import arithmetic_rows
from logratio.trainers.demo import (
    ANSWER_TOKENS,
    START,
    TARGET,
    Method,
    Score,
    Speaker,
    configuration,
    prepared,
    score,
    split_validation,
    write,
)
from logratio.trainers.loop import train_run
from logratio.trainers.policy.policy import Policy
from logratio.trainers.policy.tiny import TINY
from logratio.trainers.rollout.rewards import exact_answer
from logratio.trainers.setup import Run, build

from .steps.step import Figures, attempt

CONTESTANTS = ("logratio", "trl")
GOAL = 0.95
"""Of the questions, after which `cpu_s_to_goal` asks."""
CHECK_EVERY = 50
"""Steps."""
SEEDS = 3


@dataclass(frozen=True)
class LearningCase:
    """A step takes `prompts` questions x `group` completions. learning_rate: of the first step, from which it falls to
    0 in a line. seed: of the start, and of training."""

    seed: int
    prompts: int = 32
    group: int = 8
    steps: int = 800
    learning_rate: float = 3e-4
    start: float = TARGET
    """Of the validation questions, which SFT ends at."""

    @property
    def case(self) -> str:
        return f"learning-grpo-arithmetic-{self.prompts}x{self.group}-seed{self.seed}"

    def fields(self) -> dict[str, Any]:
        shape = {"prompts": self.prompts, "group": self.group, "steps": self.steps}
        return {"method": "grpo", "data": "arithmetic", "seed": self.seed, **shape, "learning_rate": self.learning_rate}


def cases(seed: int) -> list[LearningCase]:
    """The same with several seeds."""
    return [LearningCase(seed + i) for i in range(SEEDS)]


@dataclass
class Curve:
    """What becomes of a model while it learns: after so many steps and seconds, how many answers are right."""

    points: list[tuple[int, float, float]] = field(default_factory=list)
    seconds: float = 0.0
    since: float = field(default_factory=lambda: time.process_time())

    def after(self, step: int, accuracy: Callable[[], Score]) -> None:
        """The step is done."""
        self.seconds += time.process_time() - self.since
        if step % CHECK_EVERY == 0:
            self.points.append((step, self.seconds, accuracy().accuracy))
        self.since = time.process_time()

    def figures(self, score: Score) -> Figures:
        reached = next(((s, t) for s, t, accuracy in self.points if accuracy >= GOAL), (None, None))
        return {
            "accuracy": score.accuracy,
            "accuracy_se": score.standard_error,
            "cpu_s": self.seconds,
            "steps_to_goal": reached[0],
            "cpu_s_to_goal": reached[1],
            "curve": self.points,
        }


def run(case: LearningCase, *, only: Sequence[str] = CONTESTANTS) -> dict[str, Figures]:
    """{contestant: status and figures}, one after the other, since each is at it for minutes."""
    rows: dict[str, Figures] = {}
    with tempfile.TemporaryDirectory() as name:
        before = begun(case, Path(name))
        for contestant in only:
            attempt(contestant, rows, {}, partial(LEARNS[contestant], case, Path(name)))
            rows[contestant]["accuracy_before"] = before.accuracy
    return rows


@dataclass
class Learner:
    """TRL's model, as a `Speaker`."""

    policy: Policy
    tokenizer: Any


def begun(case: LearningCase, folder: Path) -> Score:
    """Leave the questions and the start, in folders of their own, and return what the start knows."""
    _, training = questions()
    sft = [{"prompt": row["prompt"], "completion": row["answer"]} for row in training.rows]
    write(folder, {"prompts": training.rows, "sft": sft})
    run = build(with_options(configuration(START, TINY, folder), seed=case.seed))
    validation, test = known(run)

    def skilled(run: Run, row: Mapping[str, float]) -> bool:
        return row["step"] % CHECK_EVERY == 0 and score(run, validation).accuracy >= case.start

    train_run(run, until=skilled, quiet=True)
    return score(run, test)


def ours(case: LearningCase, folder: Path) -> Figures:
    """`logratio train grpo`."""
    method = Method(
        name="grpo",
        loss=GRPOLoss(max_completion_length=ANSWER_TOKENS),
        data="prompts",
        steps=case.steps,
        learning_rate=case.learning_rate,
        batch_size=case.prompts,
        rollout=RolloutConfig(num_generations=case.group, log_completions=False),
    )
    config = configuration(method, str(folder / START.folder), folder)
    run = build(with_options(config, seed=case.seed, lr_scheduler_type="linear"))
    validation, test = known(run)
    curve = Curve()
    train_run(run, told=lambda row, _: curve.after(int(row["step"]), lambda: score(run, validation)), quiet=True)
    return curve.figures(score(run, test))


def trls(case: LearningCase, folder: Path) -> Figures:
    """TRL's GRPOTrainer, all completions in one micro-batch, without a reference and without checkpointing, as ours."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    model = AutoModelForCausalLM.from_pretrained(folder / START.folder)
    learner = Learner(Policy(model), AutoTokenizer.from_pretrained(folder / START.folder))
    validation, test = known(learner)
    curve = Curve()
    args = GRPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=case.prompts * case.group,
        num_generations=case.group,
        max_completion_length=ANSWER_TOKENS,
        max_steps=case.steps,
        learning_rate=case.learning_rate,
        lr_scheduler_type="linear",
        beta=0.0,
        seed=case.seed,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = GRPOTrainer(
        model=model,
        args=args,
        reward_funcs=[exact_answer],
        train_dataset=Dataset.from_list(list(questions()[1].rows)),
        processing_class=learner.tokenizer,
        callbacks=[Watching(lambda step: curve.after(step, lambda: score(learner, validation)))],
    )
    trainer.train()
    return curve.figures(score(learner, test))


LEARNS: dict[str, Callable[[LearningCase, Path], Figures]] = {"logratio": ours, "trl": trls}


class Watching(TrainerCallback):  # type: ignore[misc]
    """Calls `after` with the number of every step."""

    def __init__(self, after: Callable[[int], Any]) -> None:
        self.after = after

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.after(state.global_step)


def questions() -> tuple[Rows, Rows]:
    """(validation, training)"""
    return split_validation(arithmetic_rows(Kind.GROUPED))


def known(speaker: Speaker) -> tuple[list[Prompt], list[Prompt]]:
    """(validation, test) questions as token ids."""
    test = Rows("test questions", arithmetic_rows(Kind.GROUPED, "test"))
    return prepared(questions()[0], speaker), prepared(test, speaker)


def with_options(config: RunConfig, **options: Any) -> RunConfig:
    """With these options of training."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **options))
