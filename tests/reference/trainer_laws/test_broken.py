"""Every mistake that a trainer makes is found, by the law that is its own; the trainer without one keeps them all."""

import math

import pytest
import torch

from logratio.reference.trainer_laws import LAWS, LawViolation, Trained, check_trainer, verdicts

from ._plain import Plain

BROKEN = {
    "the last micro-batch's gradient alone": ({"keeps": "last"}, "split"),
    "the first and the last alone, as under CPU offload": ({"keeps": "ends"}, "split"),
    "a mean of means": ({"mean_of_means": True}, "uneven"),
    "the gradient divided once more": ({"divides_twice": True}, "gradient"),
    "a row's gradient twice": ({"first_row_twice": True}, "gradient"),
    "a last window divided by the full count": ({"full_count": True}, "last_window"),
    "padding that is scored": ({"scores_padding": True}, "padding"),
    "padding that is seen": ({"sees_padding": True}, "padding"),
    "an average over processes of what is divided already": ({"averages_processes": True}, "world_size"),
    "each process's own totals": ({"own_totals": True}, "world_size"),
    "a merge in bfloat16 that touches the base": ({"merges_in_bfloat16": True}, "frozen"),
    "a base that trains": ({"trains_base": True}, "frozen"),
    "a parameter that the optimizer has not": ({"forgets_b": True}, "moves"),
    "dropout left on": ({"dropout": 0.1}, "no_noise"),
    "dropout without a seed": ({"dropout": 0.1, "reads_global_state": True}, "deterministic"),
    "weight decay at learning rate 0": ({"decays_anyway": True}, "learning_rate_0"),
    "a reference that is not the policy": ({"paired": True, "shifted_reference": True}, "start"),
    "gradients of the step before": ({"keeps_gradients": True}, "resume"),
    "a checkpoint without the optimizer": ({"optimizer": "adamw", "forgets_optimizer": True}, "resume"),
    "a checkpoint that begins its data again": ({"forgets_step": True}, "resume"),
    "an update of what is not the gradient": ({"clips_silently": True}, "update"),
}


ALONE = {"micro_batch_size": 8, "processes": 1, "seed": 0}


def checked(trainer: Plain, **options):
    kind = "paired" if trainer.paired else "sequence"
    return check_trainer(trainer, kind, loss_at_start=math.log(2) if trainer.paired else None, **options)


@pytest.mark.parametrize("trainer", [Plain(), Plain(paired=True), Plain(optimizer="adamw"), Plain(momentum=0.9)])
def test_a_right_trainer_keeps_them(trainer):
    report = checked(trainer)
    assert [*report.held, *report.not_asked] == [name for name in LAWS if name in report.held] + list(report.not_asked)
    assert report.not_asked == ({} if trainer.paired else {"start": "loss_at_start is not given"})


@pytest.mark.parametrize(("mistake", "law"), BROKEN.values(), ids=BROKEN)
def test_a_mistake_breaks_its_law(mistake, law):
    with pytest.raises(LawViolation) as violation:
        checked(Plain(**mistake))
    assert violation.value.law == law
    assert str(violation.value).startswith(f"{law}: {LAWS[law].statement}\n  ")


def test_every_law_has_a_mistake_that_breaks_it():
    assert {law for _, law in BROKEN.values()} | {"order"} == set(LAWS)


def test_the_order_within_a_window():
    def sorts(rows, **settings):
        """Learns from a window's first row only, whichever that is."""
        return Plain()(rows[:1] * len(rows), **settings)

    def fn(rows, *, batch_size, steps):
        return sorts(rows, batch_size=batch_size, steps=steps, micro_batch_size=batch_size, processes=1, seed=0)

    with pytest.raises(LawViolation, match="^order: .*\n  rows backwards against forwards: the gradient "):
        check_trainer(fn)


def test_the_message_shows_the_smallest_rows_and_by_how_much():
    with pytest.raises(LawViolation) as violation:
        checked(Plain(keeps="ends"))
    lines = str(violation.value).splitlines()
    assert lines[0].startswith("split: The size of micro-batches changes nothing: ")
    assert lines[1].startswith("  micro_batch_size=1 against 3: the gradient differs by ")
    assert lines[2] == "  3 rows, batch_size=3, steps=2:", "two micro-batches have no intermediate one"
    assert len(lines) == 6 and all("prompt=[" in line and "completion=[" in line for line in lines[3:])
    with pytest.raises(LawViolation, match="the gradient is 0.5 times as large, most in lora.[AB]\n  2 rows") as found:
        checked(Plain(averages_processes=True))
    lengths = [line.count(" ") for line in str(found.value).splitlines()[-2:]]
    assert lengths == [6, 6], "fewer rows first, then shorter ones: of one token and two, and of two and one"
    with pytest.raises(LawViolation, match="micro_batch_size=2 against 8: .*\n  8 rows, batch_size=8"):
        checked(Plain(keeps="last"), micro_batch_size=2, shrink_runs=0)
    with pytest.raises(LawViolation, match="the loss falls 2 times as fast as .*\n  1 row, batch"):
        checked(Plain(divides_twice=True))


def test_the_search_for_the_smallest_ends():
    runs = []

    def counted(*args, **settings):
        runs.append(settings)
        return Plain(keeps="last")(*args, **settings)

    def fn(rows, *, batch_size, steps, micro_batch_size):
        return counted(rows, batch_size=batch_size, steps=steps, micro_batch_size=micro_batch_size, processes=1, seed=0)

    with pytest.raises(LawViolation, match="4 rows"):
        check_trainer(fn, laws=["split"], shrink_runs=0)
    assert len(runs) == 2


def test_what_cannot_be_asked_is_said_and_not_passed():
    def fn(rows, *, batch_size, steps):
        trained = Plain()(rows, batch_size=batch_size, steps=steps, micro_batch_size=batch_size, processes=1, seed=0)
        return Trained(trained.losses, trained.start, trained.end)

    with pytest.raises(LawViolation, match="^moves: .*\n  unmoved: embed, head"):
        check_trainer(fn)
    report = check_trainer(fn, skip=["moves"])
    assert report.held == ["deterministic", "order"]
    assert report.not_asked["world_size"] == "fn takes no processes"
    assert report.not_asked["split"] == report.not_asked["last_window"] == "fn takes no micro_batch_size"
    assert report.not_asked["frozen"] == "every tensor is trained" and report.not_asked["moves"] == "skipped"
    assert report.not_asked["update"] == "the run does not tell its gradient and update"
    assert set(report.held) | set(report.not_asked) == set(LAWS)
    assert str(report).startswith(f"held: deterministic, order ({report.runs} runs)\nnot asked: frozen: every tensor")
    with pytest.raises(ValueError, match="world_size cannot be asked: fn takes no processes"):
        check_trainer(fn, laws=["world_size"])


def test_a_gradient_of_steps_that_are_too_large_is_not_judged():
    def fn(rows, *, batch_size, steps, learning_rate=1000.0):
        return Plain()(rows, batch_size=batch_size, steps=steps, learning_rate=learning_rate, **ALONE)

    assert "too large to tell a slope" in check_trainer(fn, skip=["update"]).not_asked["gradient"]
    right, small = Plain(), 1e-7
    report = check_trainer(
        lambda rows, *, batch_size, steps, learning_rate=small: right(
            rows, batch_size=batch_size, steps=steps, learning_rate=learning_rate, **ALONE
        )
    )
    assert "too little to tell a slope" in report.not_asked["gradient"]


def test_adamw_hides_a_factor_unless_the_gradient_is_told():
    def silent(rows, *, batch_size, steps, micro_batch_size, processes, seed):
        settings = {"batch_size": batch_size, "steps": steps, "micro_batch_size": micro_batch_size, "seed": seed}
        told = Plain(optimizer="adamw", averages_processes=True)(rows, processes=processes, **settings)
        return Trained(told.losses, told.start, told.end, told.trained)

    assert "world_size" not in check_trainer(silent, rtol=1e-4).not_asked
    with pytest.raises(LawViolation, match="^world_size: "):
        checked(Plain(optimizer="adamw", averages_processes=True))


def test_all_verdicts_can_be_had():
    found = dict(verdicts(Plain(keeps="last", decays_anyway=True)))
    assert list(found) == list(LAWS)
    broken = {name for name, verdict in found.items() if isinstance(verdict, LawViolation)}
    assert broken >= {"learning_rate_0", "split", "uneven", "padding", "last_window"}
    assert found["deterministic"] is None and found["start"] == "loss_at_start is not given"


def test_what_is_no_trainer_is_refused():
    with pytest.raises(TypeError, match="this one takes no batch_size, steps"):
        check_trainer(lambda rows: None)
    with pytest.raises(TypeError, match="returned NoneType"):
        check_trainer(lambda rows, **_: None)
    one = {"w": torch.zeros(1)}
    with pytest.raises(ValueError, match="2 steps were asked for, and 0 losses came"):
        check_trainer(lambda rows, **_: Trained([], one, one))
    with pytest.raises(ValueError, match="names what is not in the model: v"):
        check_trainer(lambda rows, *, steps, **_: Trained([0.0] * steps, one, one, trained=["v"]))
    with pytest.raises(ValueError, match=r"start and end differ in \['v'\]"):
        check_trainer(lambda rows, *, steps, **_: Trained([0.0] * steps, one, {**one, "v": one["w"]}))
    with pytest.raises(ValueError, match="typo: the laws are deterministic, "):
        check_trainer(Plain(), laws=["typo"])
    with pytest.raises(ValueError, match="kind must be one of sequence, .*'pairs'"):
        check_trainer(Plain(), "pairs")
