"""Our trainer keeps the laws of trainers in every method, on one process and on two; what the others break is known."""

import math

import pytest

from logratio.benchmarks.peers.trainers.ours import our_trainer
from logratio.benchmarks.peers.trainers.rows import OPTIONS, TRAINERS
from logratio.benchmarks.peers.trainers.theirs import KINDS, text_rows, transformers_trainer, trl_trainer
from logratio.losses import LOSSES
from logratio.reference.laws import LawViolation, check_trainer


def checked(method, fn, **more):
    return check_trainer(fn, KINDS.get(method, "paired"), **{**OPTIONS.get(method, {}), **more})


def test_ours_is_cut_as_it_may_be():
    """One law of one method; the slow test below has all."""
    assert checked("sft", our_trainer("sft"), laws=["uneven"]).held == ["uneven"]


def test_ours_stops_where_it_is_told_and_goes_on():
    """Else `resume` would compare a whole run with itself; `do` looks at how far the first one came."""
    rows = [{"prompt": [1], "completion": [row]} for row in (2, 3)]
    sizes = {"batch_size": 1, "steps": 2, "micro_batch_size": 1, "processes": 1}
    assert len(our_trainer("sft")(rows, **sizes, seed=0, stop_after=1).losses) == 2


def test_lists_are_asked_with_lists_and_of_ours_alone():
    assert "ours listwise" in TRAINERS and "TRL listwise" not in TRAINERS
    row = {"row": 0, "prompt": [1], "completions": [[2, 3], [4]], "rewards": [1.0, 0.0]}
    assert text_rows([row]) == [{"prompt": "1", "completions": ["23", "4"], "rewards": [1.0, 0.0]}]
    fn = our_trainer("listwise")
    assert checked("listwise", fn, laws=["start"], loss_at_start=math.log(2)).held == ["start"]


@pytest.mark.slow
@pytest.mark.parametrize("method", LOSSES)
def test_ours_keeps_them_all(method):
    report = checked(method, our_trainer(method))
    left_out = {"start"} - ({"start"} if method == "dpo" else set()) | ({"gradient"} if method == "grpo" else set())
    assert set(report.not_asked) == left_out and "world_size" in report.held


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sft", "dpo", "grpo"])
def test_trls_keeps_those_that_it_can_be_asked(method):
    skip = ["gradient", "last_window"] if method == "grpo" else []
    fn = trl_trainer(method, adapters=0.0)
    report = checked(method, fn, skip=skip)
    assert {"frozen", "split", "uneven", "padding", "update"} <= set(report.held)
    assert report.not_asked["world_size"] == "fn takes no processes"


@pytest.mark.slow
def test_transformers_keeps_those_that_it_can_be_asked():
    assert {"split", "uneven", "padding", "last_window"} <= set(check_trainer(transformers_trainer).held)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "law"), [("cpo", "uneven"), ("tpo", "uneven"), ("orpo", "padding"), ("kto", "split")]
)
def test_trls_that_break_one(method, law):
    """The NLL of CPO, TPO and ORPO (of prompt and completion) is the micro-batch's mean, KTO's KL the micro-batch's."""
    with pytest.raises(LawViolation, match=rf"^{law}: .*\n  micro_batch_size=\d against \d: the gradient differs by"):
        checked(method, trl_trainer(method), laws=[law])
