"""The loop, held against TRL's trainers step by step, and against itself under another cut of the same work."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig

from logratio.benchmarks.peers import randoms
from logratio.losses import DPO_TYPES, LOSSES, DPOType, Kind
from logratio.reference import trl
from logratio.trainers import setup
from logratio.trainers.cli import main
from logratio.trainers.config import DataConfig, ModelConfig, RolloutConfig, RunConfig, TrainConfig
from logratio.trainers.errors import UserError
from logratio.trainers.loop import train_run
from logratio.trainers.policy.reference import StoredReference, tokens_key
from logratio.trainers.policy.tiny import tiny_tokenizer
from logratio.trainers.rollout.calling.asked import TrainerState
from logratio.trainers.rollout.sets.flights import Flights
from logratio.trainers.rollout.sets.rolled import Rolled
from logratio.trainers.step import Step

METHODS = ("sft", "dpo", "kto", "orpo", "cpo", "tpo", "grpo")
BATCH = 4


def rows_of(method: str, count: int) -> list[dict[str, Any]]:
    return randoms.random_rows(method, 7, count)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def our_run(method: str, model: Any, data: str, output: Path, steps: int, **train: Any) -> setup.Run:
    """The run that the command line would build, with the given model put in place of its own."""
    rollout = RolloutConfig(num_generations=2) if method == "grpo" else None
    config = RunConfig(
        method=method,
        loss=LOSSES[method](),
        model=ModelConfig(lora_r=4),
        data=DataConfig(dataset_name=data, shuffle=False),
        train=TrainConfig(
            output_dir=str(output),
            batch_size=BATCH,
            max_steps=steps,
            learning_rate=1e-3,
            warmup_steps=2,
            weight_decay=0.01,
            micro_batch_tokens=200,
            **train,
        ),
        rollout=rollout,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "load_model", lambda *a, **k: model)
        patch.setattr(setup, "add_adapters", lambda model, *a, **k: model)
        return setup.build(config)


def trajectory(method: str, steps: int, output: Path) -> tuple[dict[str, list[float]], dict[str, list[float]], float]:
    """(ours, TRL's) losses and gradient norms, and the largest difference between the final adapters."""
    model = randoms.random_model(LlamaConfig, 3)
    rows = rows_of(method, BATCH * steps)
    if method == "grpo":
        examples, rows, old = rollouts(model, steps)
        data = "arithmetic"
    else:
        data = write_rows(output / "rows.jsonl", rows)
    theirs = trl.train(
        method,
        model,
        tiny_tokenizer(),
        rows,
        max_steps=steps,
        batch_size=BATCH,
        learning_rate=1e-3,
        lr_scheduler_type="linear",
        warmup_steps=2,
        weight_decay=0.01,
        max_grad_norm=1.0,
    )
    run = our_run(method, copy.deepcopy(model), data, output, steps)
    if method == "grpo":
        use_fixed_rollouts(run, examples, old)
    train_run(run)
    log = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    ours = {name: [row[name] for row in log] for name in ("loss", "grad_norm")}
    mine = dict(run.policy.model.named_parameters())
    difference = max(
        (mine[name] - p).abs().max().item() for name, p in theirs.model.named_parameters() if "lora_" in name
    )
    moved = max((mine[name] - p).abs().max().item() for name, p in model.named_parameters() if "lora_" in name)
    assert moved > 1e-3, "nothing was trained, so nothing was compared"
    return ours, {"loss": theirs.losses, "grad_norm": theirs.grad_norms}, difference


def rollouts(model: Any, steps: int) -> tuple[list[Any], list[dict[str, Any]], dict[str, list[Tensor]]]:
    """Fixed off-policy rollouts, two completions a prompt, as examples and as TRL's rows."""
    examples = randoms.random_groups(5, groups=BATCH // 2 * steps, size=2)
    old = randoms.old_logps(model, examples, 5)
    rows = [
        {"prompt_ids": e.prompt_ids, "completion_ids": c.ids, "advantage": a, "old_per_token_logps": o}
        for e in examples
        for c, a, o in zip(e.completions, e.advantages or (), old[tokens_key(e)], strict=True)
    ]
    return examples, rows, old


class GivenRollouts:
    """Its prompts are examples that have completions and advantages already."""

    config = RolloutConfig(num_generations=2)
    timed = (0.0, 0)

    def __init__(self) -> None:
        self.state, self.flights = TrainerState(), Flights(self.begin, 0)

    def begin(self, prompts: Any, first: int) -> Any:
        raise AssertionError("nothing is sampled ahead")

    def close(self) -> None:
        pass

    def __call__(self, prompts: Any, said: None) -> Rolled:
        return Rolled(list(prompts), torch.zeros(len(prompts), 2, 1))

    def metrics(self, rolled: Rolled, accelerator: Any) -> dict[str, Any]:
        return {}

    def advantages(self, rolled: Rolled, accelerator: Any, kl: None, taught: None) -> Tensor:
        return torch.tensor([e.advantages for e in rolled.examples], dtype=torch.float64)

    def after(self, step: int) -> list[str]:
        self.state.global_step = step
        return []

    @property
    def keeper(self) -> Any:
        return SimpleNamespace(taken=lambda: [], learned=lambda micros: None)


def use_fixed_rollouts(run: setup.Run, examples: list[Any], old: dict[str, list[Tensor]]) -> None:
    """Examples in place of prompts, and their old log-probs in place of the policy's."""
    run.data.train = examples
    run.config = dataclasses.replace(run.config, train=dataclasses.replace(run.config.train, batch_size=BATCH // 2))
    run.rollouts = GivenRollouts()  # type: ignore[assignment]
    cut, table = run.step.micro_batches, StoredReference(old, run.step.reference)  # type: ignore[arg-type]

    def with_old(*args: Any, **kwargs: Any) -> Any:
        micros = cut(*args, **kwargs)
        for micro in micros:
            micro.old = table(micro.batch)
        return micros

    run.step.micro_batches = with_old  # type: ignore[method-assign]


def compare(method: str, steps: int, output: Path) -> None:
    ours, theirs, difference = trajectory(method, steps, output)
    for name in ("loss", "grad_norm"):
        assert len(ours[name]) == steps
        for step, (a, b) in enumerate(zip(ours[name], theirs[name], strict=True)):
            assert math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-7), f"{name} of step {step}: ours {a}, TRL's {b}"
    assert difference < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_trains_as_trl_does(method: str, tmp_path: Path) -> None:
    compare(method, 4, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_trains_as_trl_does_for_twenty_steps(method: str, tmp_path: Path) -> None:
    compare(method, 20, tmp_path)


# What a loss needs of the whole step in all its forms; `test_step.py` has every loss_type.
CUT = [
    ("dpo", "--loss_type sigmoid bco_pair sft --loss_weights 0.8 0.2 1 --use_weighting"),
    ("dpo", "--loss_type aot --label_smoothing 0.1"),
    ("dpo", "--loss_type beta_dpo"),
    ("kto", "--loss_type kto"),
    ("orpo", ""),
    ("grpo", "--loss_type grpo --top_entropy_quantile 0.5 --entropy_coef 0.01"),
]
CUT += [
    pytest.param(*case, marks=pytest.mark.slow)
    for case in [
        ("sft", "--loss_type nll --z_loss_coef 0.01"),
        ("dpo", "--loss_type sigmoid"),
        ("dpo", "--loss_type aot_unpaired"),
        ("kto", "--loss_type bco"),
        ("cpo", "--loss_type simpo"),
        ("tpo", "--loss_type tpo-l"),
        ("listwise", "--loss_type exo_rw"),
        ("grpo", "--loss_type dapo"),
        ("grpo", "--loss_type vespo"),
    ]
]


REWARD = """
def digits(completion_ids, **_):
    return [sum(48 <= token < 58 for token in ids) + len(ids) / 10 for ids in completion_ids]
"""


def train_with(
    settings: tuple[int, ...], method: str, loss_options: str, steps: int, tmp_path: Path, patch: pytest.MonkeyPatch
) -> None:
    """The command with each --micro_batch_tokens, of which the last cuts nothing: the adapters are the same."""
    options = ["--lora_r", "4", "--max_steps", str(steps), "--batch_size", "8", "--learning_rate", "1e-4"]
    options += loss_options.split()
    patch.chdir(tmp_path)
    if LOSSES[method].kind is Kind.GROUPED:
        (tmp_path / "some_rewards.py").write_text(REWARD)
        options += ["--num_generations", "4", "--max_completion_length", "12", "--num_iterations", "2"]
        options += ["--beta", "0.04", "--reward_funcs", "some_rewards:digits"]
    else:
        options += ["--dataset_name", write_rows(tmp_path / "rows.jsonl", rows_of(method, 24))]
    adapters, cuts = {}, {}
    call = Step.__call__
    for tokens in settings:
        counts: list[int] = []
        patch.setattr(
            Step,
            "__call__",
            lambda self, micros, *a, c=counts, **k: (c.append(len(micros)), call(self, micros, *a, **k))[1],
        )
        folder = tmp_path / str(tokens)
        assert main(["train", method, *options, "--micro_batch_tokens", str(tokens), "--output_dir", str(folder)]) == 0
        adapters[tokens], cuts[tokens] = load_file(folder / "adapter_model.safetensors"), sum(counts)
    first, *_, whole = settings
    assert cuts[first] > max(cuts[tokens] for tokens in settings[1:]), f"the work was not cut differently: {cuts}"
    moved = max(v.abs().max().item() for k, v in adapters[whole].items() if "lora_B" in k)
    assert moved > 1e-5, "nothing was trained, so nothing was compared"
    for tokens in settings[:-1]:
        for name, value in adapters[tokens].items():
            assert (value - adapters[whole][name]).abs().max() < 1e-6, (tokens, name)


@pytest.mark.parametrize(("method", "loss_options"), CUT)
def test_the_memory_setting_does_not_change_the_result(
    method: str, loss_options: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_with((256, 100000), method, loss_options, 3, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "loss_options"), CUT)
def test_the_memory_setting_does_not_change_a_longer_run(
    method: str, loss_options: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_with((256, 1024, 100000), method, loss_options, 8, tmp_path, monkeypatch)


def test_a_loss_that_is_not_finite_ends_the_run_and_saves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(DPO_TYPES, "broken", DPOType(lambda r, loss: r.chosen * float("nan"), False, False))
    folder = tmp_path / "out"
    command = ["train", "dpo", "--lora_r", "4", "--loss_type", "broken", "--batch_size", "2", "--no-shuffle"]
    assert main([*command, "--max_steps", "2", "--output_dir", str(folder)]) == 1
    message = capsys.readouterr().err.strip()
    assert message == "logratio: step 1: the loss is not finite; its micro-batch holds the rows 0, 1 of the data set"
    assert not list(folder.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("dtype", "remedy"),
    [("float32", "lower the learning rate"), ("bfloat16", "lower the learning rate or use float32")],
)
def test_a_gradient_that_is_not_finite_ends_the_run(
    dtype: str, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With what can be done about it: what is float32 already cannot become so."""
    # its value is 0 and its slope infinite where policy and reference agree
    steep = DPOType(lambda r, loss: (r.margin.abs() + 0 * r.chosen).sqrt(), False, False)
    monkeypatch.setitem(DPO_TYPES, "steep", steep)
    command = ["train", "dpo", "--lora_r", "4", "--loss_type", "steep", "--batch_size", "2", "--no-shuffle"]
    command += ["--dtype", dtype]
    assert main([*command, "--max_steps", "2", "--output_dir", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.strip() == (
        f"logratio: step 1: the gradient is not finite, though the loss is (rows 0, 1 of the data set); {remedy}"
    )


@pytest.mark.parametrize("fails", [False, True])
def test_the_next_step_is_packed_before_a_device_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """Each step once, in order, and none beyond the last; what packing raises ends the step that it is of."""
    happened: list[str] = []
    data = write_rows(tmp_path / "rows.jsonl", rows_of("sft", BATCH * 3))
    run = our_run("sft", randoms.random_model(LlamaConfig, 3), data, tmp_path, 3)
    cut, read = Step.micro_batches, Tensor.tolist
    windows = [list(range(start, start + BATCH)) for start in range(0, 3 * BATCH, BATCH)]

    def packed(self: Step, examples: Any, dealt: bool = False) -> Any:
        happened.append(f"pack {windows.index([e.row for e in examples])}")
        if fails and happened[-1] == "pack 2":
            raise UserError("cannot be packed")
        return cut(self, examples, dealt)

    def waited(values: Tensor) -> Any:
        if values.dtype == torch.bool:  # whether losses are finite
            happened.append("wait")
        return read(values)

    monkeypatch.setattr(Step, "micro_batches", packed)
    monkeypatch.setattr(Tensor, "tolist", waited)
    with (
        pytest.raises(UserError, match="^step 3: cannot be packed; step 2 is kept: ")
        if fails
        else contextlib.nullcontext()
    ):
        train_run(run, quiet=True)
    assert happened == ["pack 0", "pack 1", "wait", "pack 2", "wait", *(["wait"] if not fails else [])]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == (2 if fails else 3)
