"""Memory is flat: what a step makes is gone when the next ones have been taken."""

import gc
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

from logratio.benchmarks.peers import randoms
from logratio.trainers import loop, setup
from logratio.trainers.options import parse_train

METHODS = ("sft", "dpo", "kto", "orpo", "cpo", "tpo", "grpo")
KEEPING = ("grpo",)  # of which most is kept from step to step: the default form
MARKED = [pytest.param(m, marks=() if m in KEEPING else pytest.mark.slow) for m in METHODS]
EVERY = 8


def run_of(method: str, folder: Path, steps: int, every: int = 1) -> setup.Run:
    """Tiny steps of everything that keeps something: a reference that follows, an evaluation, rollouts twice used; the
    first two every so many steps."""
    words = ["--batch_size", "2", "--lora_r", "2", "--max_steps", str(steps), "--output_dir", str(folder / "out")]
    words += ["--micro_batch_tokens", "64"]
    if method == "grpo":
        words += ["--num_generations", "2", "--max_completion_length", "3", "--num_iterations", "2", "--beta", "0.1"]
    else:
        path = folder / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in randoms.random_rows(method, 1, 12)))
        words += ["--dataset_name", str(path), "--eval_size", "2", "--eval_steps", str(6 * every)]
    if method in ("dpo", "kto", "grpo"):
        # the reference adapter's rank grows up to the eighth synchronization
        words += ["--sync_ref_model", "--ref_model_sync_steps", str(every), "--ref_model_mixup_alpha", "0.9"]
    return setup.build(parse_train([method, *words]))


def alive() -> Counter[str]:
    """Objects by type, and how many KiB of tensors there are."""
    gc.collect()
    objects = gc.get_objects()
    counts = Counter(type(x).__name__ for x in objects)
    # those that torch.compile traces with, which an earlier test of this process may have left, have no sizes
    tensors = [x for x in objects if isinstance(x, torch.Tensor) and not isinstance(x, FakeTensor)]
    counts["KiB of tensors"] = sum(t.numel() * t.element_size() for t in tensors) >> 10
    return counts


@pytest.mark.parametrize("method", MARKED)
def test_objects_do_not_pile_up(method: str, tmp_path: Path) -> None:
    """Nothing grows with the steps, in the second eight and again in the third."""
    seen: list[Counter[str]] = []

    def count(run: setup.Run, row: Mapping[str, float]) -> bool:
        if row["step"] % EVERY == 0:
            seen.append(alive())
        return False

    loop.train_run(run_of(method, tmp_path, 3 * EVERY + 1), until=count, quiet=True)
    first, second, third = seen
    grown = {name: n for name, n in ((second - first) & (third - second)).items() if n >= EVERY}
    assert not grown, f"{EVERY} steps leave behind {grown}"


def resident_mib() -> float:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from Linux's /proc")
@pytest.mark.parametrize("method", METHODS)
def test_resident_memory_is_flat_over_2000_steps(method: str, tmp_path: Path) -> None:
    """Its second half takes less than 16 MiB more, which 16 KiB a step would be."""
    seen: dict[int, float] = {}

    def measure(run: setup.Run, row: Mapping[str, float]) -> bool:
        if (step := int(row["step"])) in (1000, 1999):  # the last is not asked about
            seen[step] = resident_mib()
        return False

    loop.train_run(run_of(method, tmp_path, 2000, every=25), until=measure, quiet=True)
    print(method, seen)
    assert seen[1999] - seen[1000] < 16, seen
