"""`logratio compare CONTESTANT CONTESTANT ...`: which of several losses is better, answered with an interval.

Contestants are what would follow `logratio train`, in quotes, with a name if you like (NAME=METHOD ...):

    logratio compare sft "dpo --beta 0.5" dpo:ipo "mine=my_loss:SquaredHinge --beta 0.2"
    logratio compare contest.yaml

All start from the same model and learn from the same pairs in the same order, seed by seed, for as many steps, tokens
or seconds; what they have learned is compared on held-out rows, in pairs. Options that are none of these are those of
`logratio train`, and common to all contestants. Without contestants five compare themselves on the embedded task
`shopping`, in some minutes. A run that has its line already is not run again. Status 1 where one failed.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console
from transformers.utils import logging

from logratio.trainers.config.words import hints_of, refuse_misfits
from logratio.trainers.data.rows import EMBEDDED
from logratio.trainers.errors import UserError, counted
from logratio.trainers.policy.tiny import TINY

from ..pages.page import check_target, made
from ..progress import say
from ..reporting.files import write as write_page
from ..reporting.records import Records, certificate, device_name, identity
from . import told
from .beginning import begin
from .contestants import FILES, Contestant, check_contestants, check_options, contestant, read_file
from .outcome import Outcome, as_lines, outcome
from .page import MAKER, rendered
from .rows import Material, material
from .running import Budget, Job, run_job
from .scores import Asked

PAGE, LINES, VERDICTS = "compare.html", "compare.jsonl", "comparisons.jsonl"
CONTEST = (
    "sft=sft --learning_rate 3e-4 --batch_size 32",
    "dpo=dpo --beta 0.5 --learning_rate 1e-4 --batch_size 32",
    "ipo=dpo:ipo --beta 0.5 --learning_rate 1e-4 --batch_size 32",
    "orpo=orpo --beta 1 --learning_rate 3e-4 --batch_size 32",
    "grpo=grpo --learning_rate 3e-4 --batch_size 16",
)
"""Of the embedded task. Its answers are five tokens long and have small log-ratios, so betas and rates are far above
the defaults made for long texts."""
REWARD = {"shopping": "logratio.trainers.data.tasks.shopping:cheap_basket", "arithmetic": "exact_answer"}
TOKENS = 40_000
"""The budget of the embedded tasks, where none is given."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What they are compared on, and for how long."""

    dataset_name: str = "shopping"
    """Pairs with prompt, chosen and rejected, as `logratio train dpo` takes them; an embedded task: "shopping" or
    "arithmetic"."""
    dataset_train_split: str = "train"
    """Split to train on."""
    dataset_test_split: str | None = None
    """Split of the held-out rows (default: rows of the train split are held out, by lot)."""
    eval_rows: int = 200
    """Held-out rows that all are scored on."""
    model_name_or_path: str = TINY
    """What all start from. "tiny", the embedded model: first taught by SFT, see start_steps."""
    start_steps: int = 150
    """Steps of SFT that the embedded model begins with, on the task's demonstrations, or the rows' chosen answers."""
    seeds: int = 3
    """Seeds of each contestant, from 0 on: of the order of the data, and of all that is random in a run."""
    max_steps: int | None = None
    """Train each for so many optimizer steps."""
    max_tokens: int | None = None
    """Or until it has learned from so many tokens, a prompt counted with each of its completions, sampled ones too
    (embedded tasks: 40,000)."""
    max_seconds: float | None = None
    """Or for so many seconds in steps, sampling among them, evaluations not."""
    reward_funcs: tuple[str, ...] = ()
    """What completions are worth, for GRPO and for all that is scored, as `logratio train grpo` takes it (default: the
    task's; exact_answer where rows have an answer)."""
    samples: int = 4
    """Completions that are sampled of each held-out row."""
    max_completion_length: int | None = None
    """Longest completion, in tokens, of GRPO and of what is sampled to be scored (default: 256; embedded tasks: 6)."""
    checks: int = 4
    """Times that each run is scored, evenly over its budget, besides the start."""
    metric: Literal["reward", "greedy", "exact", "accuracy", "nll", "kl", "length"] | None = None
    """The one that decides (default: reward; accuracy where there are no rewards)."""
    baseline: str | None = None
    """Compare all with this one only: fewer questions, narrower intervals (default: each with each)."""
    output_dir: Path = Path("compare")
    """Folder of compare.html, of compare.jsonl with a line for each run, and of the runs."""
    isolate: Annotated[int, tyro.conf.arg(metavar="INT")] = 0
    """Give each run a process of its own, so many at a time (default: all here, one after the other)."""
    threads: int | None = None
    """Of torch on a CPU, in each process (default: 1 for the embedded model, else torch's own choice)."""
    fresh: bool = False
    """Run all again, whatever has its line."""

    def __post_init__(self) -> None:
        for name, least in {
            "eval_rows": 2,
            "seeds": 2,
            "samples": 1,
            "checks": 1,
            "start_steps": 1,
            "isolate": 0,
            "threads": 1,
            "max_completion_length": 1,
        }.items():
            if (value := getattr(self, name)) is not None and value < least:
                why = ": one says nothing of others" if name == "seeds" else ""
                raise UserError(f"--{name} must be at least {least}, got {value}{why}")

    @property
    def budget(self) -> Budget:
        """UserError where it is not said, or more than once."""
        given = {name: getattr(self, f"max_{name}") for name in ("steps", "tokens", "seconds")}
        said = {name: value for name, value in given.items() if value is not None}
        if len(said) > 1:
            raise UserError(f"{' and '.join(f'--max_{name}' for name in said)} are two budgets; give one of them")
        if not said and self.dataset_name not in EMBEDDED:
            raise UserError("how long is each to train? Give --max_steps, --max_tokens or --max_seconds")
        (unit, amount) = next(iter(said.items()), ("tokens", TOKENS))
        if not amount > 0:
            raise UserError(f"--max_{unit} must be positive, got {amount}")
        return Budget(unit, amount)  # type: ignore[arg-type]


def main(argv: Sequence[str] | None = None) -> int:
    """Compare losses from one start on the same data over seeds, with intervals of the differences."""
    those, options, common = parsed(list(sys.argv[1:] if argv is None else argv))
    check_contestants(those)
    if options.baseline is not None and options.baseline not in [one.name for one in those]:
        raise UserError(
            f"--baseline {options.baseline}: no contestant is called so ({', '.join(c.name for c in those)})"
        )
    logging.disable_progress_bar()
    console = Console(soft_wrap=True)
    with made(options.output_dir, "--output_dir"):
        found = compared(those, options, common, console)
    told.show(found, console)
    where = f"{options.output_dir / PAGE}, and a line for each run in {options.output_dir / LINES}"
    say(console, where)
    return 1 if found.failed else 0


def compared(those: Sequence[Contestant], options: Options, common: Sequence[str], console: Console) -> Outcome:
    """Run what has not run, and write what is left of it."""
    folder = options.output_dir
    check_target(folder / PAGE, MAKER, "--output_dir")
    if options.threads or options.model_name_or_path == TINY:
        torch.set_num_threads(options.threads or 1)
    data = material(options.dataset_name, options.dataset_train_split, options.dataset_test_split, options.eval_rows)
    jobs, settings = jobs_of(those, options, common, data)
    begin(options.model_name_or_path, data, options.start_steps, folder, partial(say, console))
    lines = measured(jobs, settings, options, console)
    found = outcome(lines, [one.name for one in those], options.metric, options.baseline)
    if options.metric and found.names and options.metric not in found.start:
        raise UserError(f"--metric {options.metric} was not measured here, only {', '.join(found.start)}")
    written(found, those, options, jobs[0].budget, lines)
    return found


def parsed(argv: list[str]) -> tuple[list[Contestant], Options, list[str]]:
    """(contestants, options, what is common to the runs)."""
    first = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    leading, rest = argv[:first], argv[first:]
    those: list[Contestant] = []
    for word in leading:
        of_file, words = read_file(Path(word)) if word.endswith(FILES) else ([contestant(word)], [])
        those, rest = [*those, *of_file], [*words, *rest]
    refuse_misfits(rest, hints_of([Options]))
    options, common = tyro.cli(
        Options, args=rest, prog="logratio compare", description=__doc__, return_unknown_args=True, use_underscores=True
    )
    if not those and options.dataset_name == Options.dataset_name:
        those = [contestant(spec) for spec in CONTEST]
    check_options("common to all", common)
    return those, options, list(common)


def jobs_of(
    those: Sequence[Contestant], options: Options, common: Sequence[str], data: Material
) -> tuple[list[Job], dict[str, Any]]:
    """Every run, seed after seed, and what decides its numbers beside its own options."""
    task = options.dataset_name
    default = (REWARD[task],) if task in REWARD else ("exact_answer",) if "answer" in data.columns else ()
    longest = options.max_completion_length or (6 if task in EMBEDDED else 256)
    asked = Asked(options.reward_funcs or default, options.samples, longest)
    start = options.model_name_or_path if options.model_name_or_path != TINY else str(options.output_dir / "start")
    words = ["--lr_scheduler_type", "constant", *common, "--model_name_or_path", start]
    threads = options.threads or (1 if options.model_name_or_path == TINY else None)
    configs = {one.name: one.config(words) for one in those}
    shared: dict[str, Any] = {"budget": options.budget, "checks": options.checks, "asked": asked, "threads": threads}
    shared |= {"train": data.train, "held_out": data.held_out, "folder": options.output_dir}
    jobs = [Job(name, config, seed, **shared) for seed in range(options.seeds) for name, config in configs.items()]
    for job in jobs[: len(configs)]:
        job.resolved()  # refused here, if at all
    settings = {"budget": str(options.budget), "checks": options.checks, **dataclasses.asdict(asked)}
    settings |= {"data": data.digest(), "model": options.model_name_or_path, "start_steps": options.start_steps}
    return jobs, settings


def stub_of(job: Job, settings: dict[str, Any], device: torch.device, born: dict[str, Any]) -> dict[str, Any]:
    """What a line begins with, and is found again by. born: the certificate that all share."""
    config = job.resolved().as_dict()
    for part, name in (("train", "output_dir"), ("data", "dataset_name"), ("model", "model_name_or_path")):
        del config[part][name]  # folders of the comparison
    return {
        "suite": "compare",
        "case": f"seed{job.seed}",
        "contestant": job.contestant,
        "seed": job.seed,
        "gpu": device_name(device),
        "certificate": {**born, "settings": {**settings, **config}},
    }


def measured(jobs: Sequence[Job], settings: dict[str, Any], options: Options, console: Console) -> list[dict[str, Any]]:
    """The lines of all jobs, those that were there already among them."""
    records = Records(options.output_dir / LINES, fresh=options.fresh)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    born = certificate(device, {})
    stubs = [json.loads(json.dumps(stub_of(job, settings, device, born))) for job in jobs]
    left = [(job, stub) for job, stub in zip(jobs, stubs, strict=True) if not records.has(stub)]
    if len(left) < len(jobs):
        say(console, f"{counted(len(jobs) - len(left), 'run')} of {len(jobs)} have their line already")
    lines = [records.done[identity(stub)] for stub in stubs if records.has(stub)]
    for (job, stub), result in ended(left, options.isolate):
        row = {**stub, **result}
        records.add(row)
        lines.append(row)
        say(console, f"  {told.progress(job, result)}")
    return lines


def ended(
    left: Sequence[tuple[Job, dict[str, Any]]], isolate: int
) -> Iterator[tuple[tuple[Job, dict[str, Any]], dict[str, Any]]]:
    """Each with what came of it, as it ends: here, or in a process of its own."""
    if not isolate:
        yield from ((one, run_job(one[0])) for one in left)
        return
    context, quiet = get_context("spawn"), logging.disable_progress_bar
    with ProcessPoolExecutor(isolate, context, initializer=quiet, max_tasks_per_child=1) as pool:
        try:
            futures = {pool.submit(run_job, one[0]): one for one in left}
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenExecutor as error:
            raise UserError(
                "the process of a run was ended from outside, as where memory runs out: fewer at a time (--isolate) "
                "take less, and the same command goes on with the runs that have no line yet"
            ) from error
        except BaseException:  # an interrupt, where the pool would wait for all that run to end
            pool.shutdown(wait=False, cancel_futures=True)
            for child in active_children():
                child.terminate()
            raise


def written(
    found: Outcome, those: Sequence[Contestant], options: Options, budget: Budget, lines: Sequence[dict[str, Any]]
) -> None:
    """The page, and a line for each comparison."""
    folder = options.output_dir
    said = "".join(json.dumps(line) + "\n" for line in as_lines(found))
    write_page(folder / VERDICTS, said.encode(), "--output_dir")
    text = rendered(found, {one.name: one.spec for one in those}, options.dataset_name, budget, lines)
    write_page(folder / PAGE, text.encode("utf-8", "replace"), "--output_dir")
