"""The two examples are short, use the library alone, and compute what `logratio train` computes.

Both sides run the same operations on tensors of the same shapes in one process, one after the other, so that their
losses and their weights are the same numbers, to the bit.
"""

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from logratio.trainers import loop, setup
from logratio.trainers.options import parse_train

from .test_imports import imports

EXAMPLES = Path(__file__).parents[1] / "examples"
STEPS = 3
NAMES = ("dpo", "grpo")


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def options(module: ModuleType) -> list[str]:
    """What its docstring says to tell the trainer."""
    words = (module.__doc__ or "").replace("\\\n", " ").split()
    start = words.index("logratio")
    end = words.index("--max_steps") + 2
    return words[start + 1 : end]


@pytest.mark.parametrize("name", NAMES)
def test_an_example_computes_what_the_trainer_does(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))  # whose reward the trainer takes too
    module = example(name)
    policy, losses = module.train(STEPS)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[1:]] == [f"step {i}" for i in range(1, STEPS + 1)]

    words = options(module)
    assert words[:2] == ["train", name] and words[-1] == str(module.STEPS)
    run = setup.build(parse_train([*words[1:-1], str(STEPS), "--output_dir", str(tmp_path)]))
    before = {key: p.detach().clone() for key, p in run.policy.named_parameters()}
    loop.train_run(run, quiet=True)
    log = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert losses == [row["loss"] for row in log]
    trained = dict(run.policy.named_parameters())
    assert any((p - before[key]).abs().max() > 1e-4 for key, p in trained.items()), "nothing was trained"
    assert trained.keys() == dict(policy.named_parameters()).keys()
    assert all(torch.equal(p, trained[key]) for key, p in policy.named_parameters())


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_short_and_calls_the_library_alone(name: str) -> None:
    path = EXAMPLES / f"{name}.py"
    assert len(path.read_text().splitlines()) <= 120
    used = {module for _, module in imports(path) if module.startswith("logratio.")}
    below_the_loop = ("data", "batches", "attention", "layers", "policy", "rollout")
    rooms = ("logratio.losses", *(f"logratio.trainers.{room}." for room in below_the_loop))
    assert used and all(module.startswith(rooms) for module in used), used
    assert not any(".config" in module or module.endswith(".Rollouts") for module in used)


def test_the_examples_reward_counts_digits() -> None:
    digits: Any = example("grpo").digits
    assert digits(["12a4", "", "x", "7"]) == [0.75, 0.0, 0.0, 1.0]
