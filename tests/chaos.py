"""Kill training at random moments, go on, and compare with a run that was never killed: not one bit may differ.

    python tests/chaos.py [--kills 200] [--seed N] [--steps 7] [--only NAME ...]

Every run is a fork of this process, which has imported what it needs; SIGKILL ends it in a step, in a rollout or in a
save, after a random time in there or before a random one of its file operations. A run goes on with
`--resume_from_checkpoint latest` until it is done, and is compared then: the trained weights, and the hash of the last
line of metrics.jsonl, which covers all lines, and completions.parquet.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# what training imports on its way, once for all forks
import datasets  # noqa: F401
import peft  # noqa: F401
import pyarrow.parquet as pq
import rich.progress  # noqa: F401
import torch
import tyro  # noqa: F401
from peft import mapping_func, peft_model  # noqa: F401
from safetensors.torch import load_file

from logratio.trainers import cli, loop, resume
from logratio.trainers.logs.journal import read_chain
from logratio.trainers.rollout.rollouts import Rollouts

LORA = ["--lora_r", "2", "--lora_dropout", "0.2"]  # dropout draws random numbers in every step
SYNC = ["--sync_ref_model", "--ref_model_sync_steps", "2"]
ROLL = ["--num_generations", "2", "--max_completion_length", "6", "--num_iterations", "2", "--batch_size", "3"]
EVALUATE = ["--eval_size", "3", "--eval_steps", "2", "--load_best_model_at_end", "--save_total_limit", "2"]
CASES: dict[str, list[str]] = {
    "sft": ["sft", *EVALUATE],
    "dpo": ["dpo", *LORA, *SYNC],
    "dpo-precomputed": ["dpo", *LORA, "--precompute_ref_log_probs", "--loss_type", "beta_dpo"],
    "kto": ["kto", *LORA, "--loss_type", "bco"],
    "kto-window": ["kto", *LORA, "--batch_size", "5"],
    "orpo": ["orpo", *LORA],
    "cpo": ["cpo", *LORA, *EVALUATE],
    "tpo": ["tpo", *LORA],
    "grpo": ["grpo", *LORA, *SYNC, *ROLL, "--beta", "0.1"],
    "grpo-full": ["grpo", *ROLL, *SYNC, "--beta", "0.1", "--advantage_type", "remax"],
}
PHASES = {"step": 1, "rollout": 3, "save": 1}
"""Where runs are killed, and how often in comparison."""


@dataclass
class Kill:
    """Where: in the `count`-th time that the run enters `phase`, `after` seconds, or before the file operation `at`."""

    phase: str
    count: int
    after: float | None = None
    at: int | None = None


def rows(count: int) -> list[dict[str, Any]]:
    """For every method; as the embedded task has them, and few."""
    sums = [(i % 7 + 2, i % 5 + 3) for i in range(count)]
    return [
        {
            "prompt": f"{a}+{b}=",
            "completion": str(a + b),
            "chosen": str(a + b),
            "rejected": str(a + b + 1),
            "reference": str(a + b),
            "label": bool(a % 2),
            "answer": a + b,
        }
        for a, b in sums
    ]


COLUMNS = {
    "sft": ("prompt", "completion"),
    "kto": ("prompt", "completion", "label"),
    "grpo": ("prompt", "answer"),
    "tpo": ("prompt", "chosen", "rejected", "reference"),
}


def words(case: str, data: Path, output: Path, steps: int) -> list[str]:
    method, *more = CASES[case]
    return [
        *("train", method, "--dataset_name", str(data), "--max_steps", str(steps), "--save_steps", "1"),
        *("--batch_size", "4", "--micro_batch_tokens", "64", "--learning_rate", "1e-3", "--weight_decay", "0.1"),
        *("--resume_from_checkpoint", "latest", "--output_dir", str(output), *more),
        *(["--reward_funcs", f"{__name__}:reward"] if method == "grpo" else []),
    ]


def reward(completions: list[str], **columns: Any) -> list[float]:
    """Never the same for all, so that random weights learn."""
    return [float(sum(map(ord, text)) % 7) for text in completions]


class Armed:
    """In the run's process: enters phases, and kills it where `kill` says. times: seconds spent in each phase."""

    def __init__(self, kill: Kill | None, told: Path) -> None:
        self.kill, self.told = kill, told
        self.entered: collections.Counter[str] = collections.Counter()
        self.times: dict[str, list[float]] = {phase: [] for phase in PHASES}
        self.operations = -1  # of files, in the phase that is to be killed
        sys.addaudithook(self.audit)
        resume.write_whole = self.around("save", resume.write_whole)
        loop.take = self.around("step", loop.take)
        Rollouts.__call__ = self.around("rollout", Rollouts.__call__)  # type: ignore[method-assign]

    def around(self, phase: str, function: Any) -> Any:
        def inside(*arguments: Any, **options: Any) -> Any:
            self.entered[phase] += 1
            kill, started = self.kill, time.perf_counter()
            due = kill is not None and kill.phase == phase and kill.count == self.entered[phase]
            if due and kill is not None and kill.after is not None:
                threading.Thread(target=self.later, args=(phase, kill.after), daemon=True).start()
            elif due:
                self.operations = 0
            try:
                return function(*arguments, **options)
            finally:
                self.operations = -1
                self.times[phase].append(time.perf_counter() - started)

        return inside

    def audit(self, event: str, arguments: Any) -> None:
        if self.operations < 0 or self.kill is None or self.kill.at is None:
            return
        if event == "open" or event.startswith(("os.", "shutil.")):
            self.operations += 1
            if self.operations > self.kill.at:
                self.now(self.kill.phase)

    def later(self, phase: str, seconds: float) -> None:
        time.sleep(seconds)
        self.now(phase)

    def now(self, phase: str) -> None:
        self.operations = -1
        os.write(os.open(self.told, os.O_WRONLY | os.O_CREAT), phase.encode())
        os.kill(os.getpid(), signal.SIGKILL)


def run(case: str, argv: list[str], kill: Kill | None, told: Path) -> tuple[int, dict[str, list[float]]]:
    """(the exit status, below 0 for a signal; seconds in each phase, of a run that came to its end)."""
    told.unlink(missing_ok=True)
    log, times = told.with_suffix(".log"), told.with_suffix(".times")
    child = os.fork()
    if child == 0:
        status = 1
        try:
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            armed = Armed(kill, told)
            status = cli.main(argv)
            times.write_text(json.dumps(armed.times))
        except BaseException as error:  # a traceback of the fork must not go on as a second parent
            os.write(2, repr(error).encode())
        finally:
            os._exit(status)
    _, ended = os.waitpid(child, 0)
    status = os.waitstatus_to_exitcode(ended)
    if status not in (0, -signal.SIGKILL):
        raise SystemExit(f"{case}: status {status}\n{log.read_text()[-3000:]}")
    return status, json.loads(times.read_text()) if status == 0 else {}


def result(output: Path, count: int) -> tuple[dict[str, torch.Tensor], str, Any]:
    """(the trained weights, the last line's hash, all that was sampled); every step has its line, once."""
    lines = [row for row, _ in read_chain(output / "metrics.jsonl")]
    steps = [json.loads(line)["step"] for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert steps == [row["step"] for row in lines] == list(range(1, count + 1)), steps
    name = "adapter_model.safetensors" if (output / "adapter_config.json").exists() else "model.safetensors"
    sampled = output / "completions.parquet"
    table = pq.read_table(sampled).to_pylist() if sampled.exists() else None
    return load_file(output / name), lines[-1]["hash"], table


def differing_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> int:
    assert one.keys() == other.keys()
    return sum(int((one[k].view(torch.int32) ^ other[k].view(torch.int32)).count_nonzero()) for k in one)


def draw(generator: random.Random, times: dict[str, list[float]], phase: str) -> Kill:
    """A moment of the phase, in one of the next few times that it is entered."""
    count = generator.randint(1, 2)
    if phase == "save" and generator.random() < 0.5:
        return Kill(phase, count, at=generator.randrange(60))
    return Kill(phase, count, after=generator.uniform(0, max(times[phase])))


def torment(case: str, folder: Path, kills: int, steps: int, generator: random.Random) -> collections.Counter[str]:
    """Kill runs of so many steps so often, and compare each that came to its end; returns how often in which phase.

    Raises AssertionError where a bit differs.
    """
    method = CASES[case][0]
    names = COLUMNS.get(method, ("prompt", "chosen", "rejected"))
    data = folder / f"{case}.jsonl"
    data.write_text("".join(json.dumps({name: row[name] for name in names}) + "\n" for row in rows(14)))
    told = folder / f"{case}.killed"
    _, times = run(case, words(case, data, folder / f"{case}-whole", steps), None, told)
    weights, line, sampled = result(folder / f"{case}-whole", steps)
    phases = [phase for phase in PHASES if times[phase]]
    done: collections.Counter[str] = collections.Counter()
    number = 0
    while done.total() < kills:
        output, number = folder / f"{case}-{number}", number + 1
        while True:
            phase = min(phases, key=lambda p: (done[p] / PHASES[p], generator.random()))
            kill = draw(generator, times, phase) if done.total() < kills else None
            status, _ = run(case, words(case, data, output, steps), kill, told)
            if status == 0:
                break
            done[told.read_text()] += 1
        found, last, table = result(output, steps)
        assert differing_bits(weights, found) == 0, f"{case}: weights differ in {output}"
        assert last == line, f"{case}: the logs differ in {output}"
        assert table == sampled, f"{case}: the completions differ in {output}"
        shutil.rmtree(output)
    return done


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--only", nargs="*", default=list(CASES))
    options = parser.parse_args(argv)
    print(f"seed {options.seed}", flush=True)
    total: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        weights = [3 if case.startswith("grpo") else 1 for case in options.only]  # which alone have rollouts
        for i, case in enumerate(options.only):
            share = options.kills * sum(weights[: i + 1]) // sum(weights) - total.total()
            done = torment(case, Path(folder), max(share, 0), options.steps, random.Random(f"{options.seed} {case}"))
            total += done
            print(f"{case}: {dict(done)}, 0 bits differ", flush=True)
    print(f"{total.total()} kills ({', '.join(f'{total[p]} in a {p}' for p in PHASES)}): 0 bits differ")
    return 0


if __name__ == "__main__":
    sys.exit(main())
