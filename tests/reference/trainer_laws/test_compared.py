"""Two runs compared: what counts as one, and the words for how they differ."""

import itertools
from dataclasses import replace

import pytest
import torch

from logratio.reference._verdicts import Broken
from logratio.reference.trainer_laws import LawViolation, Trained, adamw, check_trainer, sgd
from logratio.reference.trainer_laws.compared import equal, same_run

NAN = float("nan")


def run_of(start, end, loss=1.0, dtype=torch.float64, **more):
    before, after = ({"w": torch.tensor(w, dtype=dtype)} for w in (start, end))
    return Trained([loss], before, after, **more)


def broken(got, expected, words):
    with pytest.raises(Broken) as found:
        same_run(got, expected, "one against the other", None)
    assert str(found.value) == f"one against the other: {words}"


WHOLE = run_of([1.0, 2.0], [2.0, 2.0])


@pytest.mark.parametrize(
    ("got", "words"),
    [
        (run_of([1.5, 2.0], [2.5, 2.0]), "they start from other weights, in w"),
        (run_of([1.0, 2.0], [3.0, 2.0]), "the update is 2 times as large"),
        (run_of([1.0, 2.0], [2.0, 2.5]), "the update differs by 50 % (norm 1.12 against 1)"),
        (run_of([1.0, 2.0], [NAN, 2.0]), "the update is not finite"),
        (run_of([1.0, 2.0], [2.0, 2.0], loss=1.5), "the loss of step 1 is 1.5 against 1"),
        (run_of([1.0, 2.0], [2.0, 2.0], loss=NAN), "the loss of step 1 is nan against 1"),
        (replace(WHOLE, start=WHOLE.start | {"v": WHOLE.start["w"]}), "other tensors, ['v']"),
    ],
)
def test_how_they_differ(got, words):
    same_run(WHOLE, WHOLE, "", None)
    broken(got, WHOLE, words)


def test_a_gradient_is_compared_where_both_tell_it():
    told, other = ({name: torch.ones(2)} for name in ("w", "v"))
    same_run(replace(WHOLE, gradient=told), WHOLE, "", None)
    one = replace(WHOLE, gradient=told)
    broken(replace(WHOLE, gradient=other), one, "the gradient is of other tensors, ['v', 'w']")
    broken(one, replace(WHOLE, gradient={"w": torch.zeros(2)}), "the gradient is not 0 (norm 1.41)")


def test_an_update_is_only_as_exact_as_its_weights():
    """float32 holds 1000 to 6e-5: half an update of 0.01 is a fault, a last digit of the weight is none."""
    whole = run_of([1000.0], [1000.01], dtype=torch.float32)
    ulp = torch.nextafter(whole.end["w"], torch.tensor(2000.0))
    same_run(replace(whole, end={"w": ulp}), whole, "", None)
    with pytest.raises(Broken, match="the update is 0.5"):
        same_run(run_of([1000.0], [1000.005], dtype=torch.float32), whole, "", None)


def test_an_optimizers_first_step_by_hand():
    w, g = torch.tensor(2.0), torch.tensor(-1.0)
    assert sgd(0.1, weight_decay=0.5)(w, g).item() == pytest.approx(2 - 0.1 * (-1 + 1))
    assert adamw(0.1, eps=1.0, weight_decay=0.5)(w, g).item() == pytest.approx(0.95 * 2 + 0.1 / 2)


def test_bit_for_bit():
    a = torch.tensor([1.0, NAN])
    assert equal(a, a.clone()) and not equal(a, torch.tensor([NAN, 1.0])) and not equal(a, torch.tensor([2.0, NAN]))
    assert not equal(a, a.double()) and not equal(a, a[:1])


@pytest.mark.parametrize(
    ("moved", "words"),
    [
        ({"loss": 1.5}, r"losses \[1.5, 1.5\] against \[1.0, 1.0\]"),
        ({"end": [2.5]}, "other weights in w"),
        ({"start": [0.5]}, "they start from other weights, in w"),
    ],
)
def test_what_changes_from_run_to_run(moved, words):
    count = itertools.count()

    def fn(rows, *, batch_size, steps):
        now = {"start": [1.0], "end": [2.0], "loss": 1.0} | (moved if next(count) else {})
        return replace(run_of(now["start"], now["end"]), losses=[now["loss"]] * steps)

    with pytest.raises(LawViolation, match=f"^deterministic: .*\n  the second of two equal runs: {words}"):
        check_trainer(fn, laws=["deterministic"], shrink_runs=0)
