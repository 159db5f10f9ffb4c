"""The suite `learning`: how much GRPO learns of the embedded task, and how soon, beside TRL's trainer.

Both begin with the same model, which SFT has taught until about half of its answers were right. In each of the same
steps both take the same number of completions of as many questions, under the same optimizer, rate and seed; which
questions come when, and what is sampled, is their own. Every `CHECK_EVERY` steps greedy answers to validation questions
are graded, and training ends where `ENOUGH` of them are right; the time of the grading is not counted. What is reported
is the share of right answers to test questions that nothing was trained or chosen on.

Times are the process's own CPU time on one thread: tensors this small gain nothing from a second one, and what else the
machine does is not in it.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from logratio.losses import GRPOLoss, Kind
from logratio.trainers.config import RolloutConfig, RunConfig
from logratio.trainers.data.arithmetic import arithmetic_rows
from logratio.trainers.data.examples import Prompt, prepare_prompts
from logratio.trainers.data.rows import Rows
from logratio.trainers.data.tokenization import Text
from logratio.trainers.demo import (
    ANSWER_TOKENS,
    START,
    TARGET,
    Method,
    Score,
    addends,
    clustered,
    configuration,
    grade,
    split_validation,
    write,
)
from logratio.trainers.loop import train_run
from logratio.trainers.policy.policy import Policy
from logratio.trainers.policy.tiny import TINY
from logratio.trainers.rollout.generation import generate
from logratio.trainers.rollout.rewards import exact_answer
from logratio.trainers.setup import Run, build

from .step import Figures, attempt

CONTESTANTS = ("logratio", "trl")
ENOUGH = 0.97
"""Of the validation questions; test questions are as hard, and 95 % of them are the goal."""
GOAL = 0.95
CHECK_EVERY = 25
"""Steps."""
SEEDS = 3


@dataclass(frozen=True)
class LearningCase:
    """A step takes `prompts` questions x `group` completions. steps: at most. seed: of the start, and of training."""

    seed: int
    prompts: int = 32
    group: int = 8
    steps: int = 1200
    learning_rate: float = 1e-4
    start: float = TARGET
    """What SFT ends at."""

    @property
    def case(self) -> str:
        return f"learning-grpo-arithmetic-{self.prompts}x{self.group}-seed{self.seed}"

    def fields(self) -> dict[str, Any]:
        shape = {"prompts": self.prompts, "group": self.group, "max_steps": self.steps}
        return {"method": "grpo", "data": "arithmetic", **shape, "learning_rate": self.learning_rate}


def cases(seed: int) -> list[LearningCase]:
    """The same with several seeds."""
    return [LearningCase(seed + i) for i in range(SEEDS)]


@dataclass
class Curve:
    """What becomes of a model while it learns: after so many steps and seconds, how many answers are right."""

    points: list[tuple[int, float, float]] = field(default_factory=list)
    seconds: float = 0.0
    since: float = field(default_factory=time.process_time)

    def after(self, step: int, accuracy: Callable[[], Score]) -> bool:
        """The step is done; returns whether it was the last that is wanted."""
        self.seconds += time.process_time() - self.since
        if step % CHECK_EVERY == 0:
            self.points.append((step, self.seconds, accuracy().accuracy))
        self.since = time.process_time()
        return bool(self.points) and self.points[-1][2] >= ENOUGH

    def figures(self, steps: int, score: Score) -> Figures:
        reached = next(((s, t) for s, t, accuracy in self.points if accuracy >= GOAL), (None, None))
        return {
            "accuracy": score.accuracy,
            "accuracy_se": score.standard_error,
            "steps": steps,
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


def begun(case: LearningCase, folder: Path) -> Score:
    """Leave the questions and the start, in folders of their own, and return what the start knows."""
    _, training = questions()
    sft = [{"prompt": row["prompt"], "completion": row["answer"]} for row in training.rows]
    write(folder, {"prompts": training.rows, "sft": sft})
    run = build(seeded(configuration(START, TINY, folder), case.seed))
    validation, test = known(run.tokenizer)

    def skilled(run: Run, step: int) -> bool:
        return step % CHECK_EVERY == 0 and graded(run.policy, run.tokenizer, validation).accuracy >= case.start

    train_run(run, until=skilled, quiet=True)
    return graded(run.policy, run.tokenizer, test)


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
    run = build(seeded(configuration(method, str(folder / START.folder), folder), case.seed))
    validation, test = known(run.tokenizer)
    curve = Curve()
    row = train_run(
        run, until=lambda _, step: curve.after(step, lambda: graded(run.policy, run.tokenizer, validation)), quiet=True
    )
    return curve.figures(int(row["step"]), graded(run.policy, run.tokenizer, test))


def trls(case: LearningCase, folder: Path) -> Figures:
    """TRL's GRPOTrainer, all completions in one micro-batch, without a reference and without checkpointing, as ours."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    model = AutoModelForCausalLM.from_pretrained(folder / START.folder)
    tokenizer = AutoTokenizer.from_pretrained(folder / START.folder)
    validation, test = known(tokenizer)
    curve = Curve()

    def after(step: int) -> bool:
        training, policy = model.training, Policy(model.eval())
        ends = curve.after(step, lambda: graded(policy, tokenizer, validation))
        model.train(training)
        return ends

    args = GRPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=case.prompts * case.group,
        num_generations=case.group,
        max_completion_length=ANSWER_TOKENS,
        max_steps=case.steps,
        learning_rate=case.learning_rate,
        lr_scheduler_type="constant",
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
        reward_funcs=[right],
        train_dataset=Dataset.from_list(list(questions()[1].rows)),
        processing_class=tokenizer,
        callbacks=[Ending(after)],
    )
    trainer.train()
    return curve.figures(trainer.state.global_step, graded(Policy(model.eval()), tokenizer, test))


LEARNS: dict[str, Callable[[LearningCase, Path], Figures]] = {"logratio": ours, "trl": trls}


class Ending(TrainerCallback):  # type: ignore[misc]
    """Ends training behind the step of which `after` is true."""

    def __init__(self, after: Callable[[int], bool]) -> None:
        self.after = after

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop |= self.after(state.global_step)


def right(completions: list[Text], answer: list[str], **_: Any) -> list[float | None]:
    """The reward, as TRL calls it."""
    return exact_answer(completions, answer)


def questions() -> tuple[Rows, Rows]:
    """(validation, training)"""
    return split_validation(arithmetic_rows(Kind.GROUPED))


def known(tokenizer: Any) -> tuple[list[Prompt], list[Prompt]]:
    """(validation, test) questions as token ids."""
    rows = questions()[0], Rows("test questions", arithmetic_rows(Kind.GROUPED, "test"))
    validation, test = (list(prepare_prompts(some, tokenizer)[0]) for some in rows)
    return validation, test


def graded(policy: Policy, tokenizer: Any, prompts: Sequence[Prompt]) -> Score:
    """Of greedy answers, all graded by the same engine."""
    said = generate(policy, tokenizer, prompts, max_new_tokens=ANSWER_TOKENS, seeds=None)
    texts = tokenizer.batch_decode([s.ids for s in said], skip_special_tokens=True)
    return clustered(grade(prompts, texts), [addends(str(p.prompt)) for p in prompts])


def seeded(config: RunConfig, seed: int) -> RunConfig:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, seed=seed))
