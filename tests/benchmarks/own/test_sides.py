"""What is measured on each side: the run's own first steps, TRL asked for the same, budgets by trial."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from logratio.benchmarks.measure import profiled
from logratio.benchmarks.measure.steps.step import Refused
from logratio.benchmarks.memory.activations import Batch
from logratio.benchmarks.own import budgets, spent
from logratio.benchmarks.own.budgets import Budget, Found, close_in, ladder
from logratio.benchmarks.own.measuring import measure
from logratio.benchmarks.own.ours import TooLarge, Turns, settle
from logratio.benchmarks.own.spent import measured_parts, plan_of, reckoned, seen, trained_mib
from logratio.benchmarks.own.subject import EQUAL, build_subject
from logratio.benchmarks.own.theirs import case_of, loss_options, trl_options
from logratio.losses import CPOLoss, DPOLoss, GRPOLoss, KTOLoss, SFTLoss
from logratio.trainers import preflight
from logratio.trainers.data.examples import Completion, Example
from logratio.trainers.errors import UserError
from logratio.trainers.options import parse_train
from logratio.trainers.setup import batches

NAMED = {"beta", "loss_type", "loss_weights", "epsilon_high", "label_smoothing", "desirable_weight"}
ROLLOUTS = "--num_generations 4 --max_completion_length 6 --batch_size 2 --lora_r 2 --num_iterations 2 --beta 0.04"


def subject_of(words: str, folder: Path, count: int = 2):
    """As `build_subject`, of a few rows for any method."""
    rows = [
        {"prompt": f"{i}=", "chosen": f"{i}", "rejected": "9" * (1 + i % 5), "reference": f"{i}."} for i in range(12)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [{"prompt": row["prompt"], "completion": row["chosen"], "label": bool(i % 2)} for i, row in enumerate(rows)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    name = "texts" if words.startswith(("sft", "kto")) else "rows"
    data = [] if "dataset_name" in words or words.startswith("grpo") else ["--dataset_name", f"{folder / name}.jsonl"]
    asked = parse_train([*words.split(), *data])
    return asked, build_subject(asked, folder / "run", count)


def test_the_steps_are_the_runs_first_ones(tmp_path):
    asked, subject = subject_of("dpo --batch_size 3 --seed 7 --overwrite_output_dir", tmp_path)
    steps = batches(subject.run.data.train, 3, shuffle=True, seed=7)
    assert subject.windows == [items for items, _ in itertools.islice(steps, 2)]
    assert asked.train.output_dir == "runs/latest" and subject.run.config.train.output_dir == str(tmp_path / "run")


def test_a_step_of_another_size_is_not_measured(tmp_path):
    _, subject = subject_of("sft --batch_size 5", tmp_path, 4)
    assert [len(window) for window in subject.windows] == [5, 5, 5], "the epoch's last step has two"


def test_full_training_needs_no_room_and_has_the_memory_that_the_plan_reckons(tmp_path, monkeypatch):
    def full(*given):
        raise UserError("the disk is full")

    monkeypatch.setattr(preflight, "check_room", full)
    _, subject = subject_of("cpo --batch_size 4 --micro_batch_tokens 64", tmp_path)
    settle(subject)
    measured, plan = measured_parts(subject), reckoned(subject)
    assert "adapters" in measured and measured["adapters"] == 0
    for part, mib in plan.parts.items():
        assert measured[part] == pytest.approx(mib, rel=0.02, abs=1e-3), part


def test_a_teacher_is_a_part_of_its_own(tmp_path):
    words = "sft --loss_type gkd --teacher_model_name_or_path tiny --lora_r 2 --batch_size 4 --micro_batch_tokens 64"
    _, subject = subject_of(words, tmp_path, 1)
    settle(subject)
    measured, plan = measured_parts(subject), reckoned(subject)
    assert measured["teacher"] == pytest.approx(plan.parts["teacher"], rel=0.02) and measured["teacher"] > 1
    assert measured["teacher"] == pytest.approx(measured["weights"], rel=0.02)


def test_rollouts_are_sampled_once_and_cut_by_any_budget(tmp_path):
    _, subject = subject_of(f"grpo {ROLLOUTS}", tmp_path, 1)
    assert len(subject.rollout_ms) == 1 and [len(e.completions) for e in subject.windows[0]] == [4, 4]
    assert EQUAL in subject.notes and subject.windows[0][0].advantages == (1.0, -1.0, 1.0, -1.0)
    assert set(subject.known) == {"old"}, "the reference's pass belongs to each step"
    found = {}
    for tokens in (8, 4096):
        subject.run.step.micro_batch_tokens = tokens
        micros = subject.window(subject.windows[0]).micros
        found[tokens] = len(micros), sum(float(m.old.sum()) for m in micros)
        assert all(m.ref is None and m.batch.examples[0].advantages for m in micros)
    assert found[8][0] > found[4096][0] == 1
    assert found[8][1] == pytest.approx(found[4096][1], rel=1e-5)


def test_a_budget_that_does_not_fit_is_told(tmp_path, monkeypatch):
    _, subject = subject_of("sft --batch_size 4 --micro_batch_tokens 64 --lora_r 2", tmp_path)
    policy, limit = subject.run.policy, 12
    forward = policy.forward

    def small(batch):
        if batch.input_ids.numel() > limit:
            raise torch.OutOfMemoryError("no room")
        return forward(batch)

    monkeypatch.setattr(policy, "forward", small)
    with pytest.raises(TooLarge, match=r"^--micro_batch_tokens 4096 does not fit; \d+ does$"):
        Turns(subject, 4096)()
    subject.run.step.micro_batch_tokens = 64
    settle(subject)
    assert subject.run.step.micro_batch_tokens <= 16 and "--micro_batch_tokens 64 does not fit" in subject.notes[-1]


def test_what_trl_has_is_asked_of_it():
    assert loss_options("dpo", DPOLoss(), NAMED) == {}
    assert loss_options("dpo", DPOLoss(beta=0.3, loss_type=("sigmoid", "sft"), loss_weights=(1.0, 2.0)), NAMED) == {
        "beta": 0.3,
        "loss_type": ("sigmoid", "sft"),
        "loss_weights": (1.0, 2.0),
    }
    assert loss_options("grpo", GRPOLoss(loss_type="cispo"), NAMED) == {"loss_type": "cispo", "epsilon_high": 5.0}
    assert loss_options("kto", KTOLoss(desirable_weight=2.0), NAMED) == {"desirable_weight": 2.0}


@pytest.mark.parametrize(
    ("method", "loss", "why"),
    [
        ("dpo", DPOLoss(loss_type="cdpo", label_smoothing=0.1), "TRL has no loss_type cdpo"),
        ("dpo", DPOLoss(loss_type=("sigmoid", "dpop")), "TRL has no loss_type dpop"),
        ("cpo", CPOLoss(loss_type="simper"), "TRL has no loss_type simper"),
        ("grpo", GRPOLoss(loss_type="rloo"), "TRL has no loss_type rloo, but a trainer of its own for it"),
        ("sft", SFTLoss(z_loss_coef=0.1), "TRL's sft has no option z_loss_coef"),
    ],
)
def test_what_trl_has_not_is_named(method, loss, why):
    with pytest.raises(Refused, match=f"^{why}$"):
        loss_options(method, loss, NAMED)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("dpo --precompute_ref_log_probs --lora_r 2", "--precompute_ref_log_probs"),
        ("dpo --sync_ref_model --lora_r 2", "--sync_ref_model with adapters"),
        ("sft --mixed_precision fp16", "--mixed_precision fp16"),
        ("grpo --mask_truncated_completions", "--mask_truncated_completions"),
    ],
)
def test_what_is_not_set_up_on_its_side_is_named(words, named):
    config = parse_train(words.split()).resolved(1)
    with pytest.raises(Refused, match=f"^with {named} the comparison with TRL is not set up$"):
        trl_options(config)


def test_the_rest_goes_to_it_by_its_names():
    words = "dpo --learning_rate 2e-4 --weight_decay 0.1 --adam_beta2 0.9 --mixed_precision bf16 --beta 0.2"
    options = trl_options(parse_train(words.split()).resolved(1))
    wanted = {"learning_rate": 2e-4, "weight_decay": 0.1, "adam_beta2": 0.9, "bf16": True, "beta": 0.2}
    assert wanted.items() <= options.items() and options["disable_dropout"] is False
    assert "disable_dropout" not in trl_options(parse_train(["sft"]).resolved(1))


def test_its_micro_batches_are_those_that_the_options_say():
    asked = parse_train("dpo --per_device_train_batch_size 3 --gradient_accumulation_steps 2".split())
    case = case_of(asked, asked.resolved(1))
    assert case.batch_size == 6 and case.per_micro_batch([]) == 3
    window = [Example([1] * 4, [Completion([2] * 6)] * 2) for _ in range(6)]
    case = case_of(asked := parse_train("dpo --batch_size 6 --micro_batch_tokens 45".split()), asked.resolved(1))
    assert case.per_micro_batch(window) == 2, "two pairs of 2 x 10 tokens"


def budgets_of(sizes, monkeypatch, kind="cpu"):
    """A subject whose steps have one example of each size, cut one after the other."""
    window = [Example([1], [Completion([2] * (n - 1))]) for n in sizes]

    def cut(subject, tokens):
        found, room = [], 0
        for n in sizes:
            if n > room:
                found.append(0)
                room = max(tokens, n)
            found[-1] += n
            room -= n
        return tuple((1, n) for n in found)

    monkeypatch.setattr(budgets, "cut_by", cut)
    return SimpleNamespace(windows=[window], device=SimpleNamespace(type=kind))


def test_the_ladder_has_each_cut_once_and_the_asked_budget(monkeypatch):
    subject = budgets_of([8] * 8, monkeypatch)
    assert ladder(subject, 24) == [12, 24, 48, 96], "12 holds one, 24 three, 48 six, 96 all"
    assert ladder(subject, 4096) == [8, 16, 32, 4096], "what is between 64 and 4096 is one with the asked"
    assert ladder(budgets_of([5], monkeypatch), 7) == [7]


def test_the_border_of_memory_is_closed_in_on(monkeypatch):
    subject = budgets_of([256] * 64, monkeypatch, "cuda")
    tried = []

    def attempted(subject, tokens, found, running):
        tried.append(tokens)
        if tokens > 6000:
            return False
        running[tokens] = None
        return True

    monkeypatch.setattr(budgets, "attempted", attempted)
    running = {4096: None}
    close_in(subject, 8192, Found(4096), running)
    assert tried == [6144, 5120, 5632] and max(running) == 5632
    tried.clear()
    close_in(budgets_of([5], monkeypatch), 8192, Found(4096), running)
    assert tried == [], "a CPU's is not tried"


def test_a_cpus_memory_is_not_filled(monkeypatch):
    subject = budgets_of([8], monkeypatch)
    monkeypatch.setattr(budgets, "available_mib", lambda: 1000.0)
    found = Found(64, [Budget(64, 2, 64, memory_mib=200.0), Budget(128, 1, 128)])
    assert budgets.beyond_memory(subject, 128, found) == ""
    why = budgets.beyond_memory(subject, 256, found)
    assert why == "not tried: about 800 MiB for the backward pass, of 1,000 that are free"
    found.budgets[0].memory_mib = None
    assert budgets.beyond_memory(subject, 64, found) == ""
    assert budgets.beyond_memory(subject, 128, found) == "not tried: nobody sees what such a step keeps"


def test_a_reference_that_is_an_adapter_is_no_weight(tmp_path):
    _, subject = subject_of("dpo --lora_r 2 --sync_ref_model --batch_size 4 --gradient_checkpointing", tmp_path, 1)
    settle(subject)
    parts = measured_parts(subject)
    assert parts["reference"] == parts["adapters"] == trained_mib(subject)
    assert parts["weights"] == pytest.approx(4 * 673_024 / 2**20, rel=1e-3) and parts["all"] is None


def test_the_plan_is_of_the_step_as_it_was_packed():
    pair = Example([1] * 4, [Completion([2] * 3), Completion([2] * 5)])
    assert seen(pair) == 8 + (12 + 4) + (20 + 12)
    packed = [Batch(2, 12, 10), Batch(1, 6, 4)]
    plan = plan_of(packed, [pair], SimpleNamespace(long_rows=False))
    assert (plan.largest, plan.micro_batches, plan.tokens, plan.scored) == (packed[0], 2, 30, 14)
    assert plan.pairs == 2 * 144 + 36 and plan_of(packed, [pair], SimpleNamespace(long_rows=True)).pairs == seen(pair)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("sft --mixed_precision bf16", "the plan does not model autocast"),
        ("sft --lora_r 2 --lora_dropout 0.1", "the plan does not model dropout"),
        ("sft --lora_r 2 --lora_target_modules q_proj", "the plan is of adapters on all linear layers"),
        ("sft --lora_r 2 --use_dora", "the plan does not model DoRA"),
        ("sft --lora_r 2 --lora_modules_to_save lm_head", "the plan does not model modules that train whole"),
        ("sft --lora_r 2", ""),
    ],
)
def test_where_no_plan_stands_beside_it(words, why):
    config = parse_train(words.split()).resolved(1)
    subject = SimpleNamespace(run=SimpleNamespace(config=config), device=torch.device("cpu"))
    assert spent.unplanned(subject) == why


def test_the_hosts_own_time_is_outside_of_operators():
    def event(name, start, end):
        span = SimpleNamespace(start=start, end=end)
        return SimpleNamespace(name=name, time_range=span)

    events = [
        event("aten::linear", 0, 4000),
        event("aten::addmm", 1000, 3000),  # inside
        event("autograd::engine::evaluate_function: OwnBackward", 4000, 9000),  # Python, but for
        event("aten::mul", 5000, 6000),
        event("ProfilerStep", 0, 9000),
    ]
    assert profiled.operators_ms(events) == 5.0


METHODS = {
    "sft": "--loss_type dft --lora_r 2 --lora_dropout 0.2",
    "kto": "--lora_r 2 --undesirable_weight 0.5",
    "orpo": "--lora_r 2 --beta 0.3",
    "cpo": "--loss_type simpo",
    "tpo": "--tpo_alpha 0.5",
    "dpo": "--loss_type sigmoid sft --loss_weights 1 0.5 --precompute_ref_log_probs",
    "grpo": ROLLOUTS,
}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_measured_beside_trl(method, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = f"{method} --batch_size 4 --micro_batch_tokens 256 {METHODS[method]}"
    asked, subject = subject_of(words, tmp_path)
    found = measure(subject, case_of(asked, subject.run.config), repeats=2, trl=True, trial=False, say=print)
    theirs = found.rows["trl"]
    if method == "dpo":
        assert theirs["error"] == "with --precompute_ref_log_probs the comparison with TRL is not set up"
        assert found.rows["logratio"]["status"] == "ok" and not (tmp_path / "run").exists()
        return
    assert theirs["status"] == "ok", theirs["error"]
    assert 0 < theirs["grad_rel_err"] < 1e-4 and theirs["step_ms_p50"] > 0
    assert bool(found.rollout_ms) == (method == "grpo") and dataclasses.asdict(found.plan)["step_ms"] is None
