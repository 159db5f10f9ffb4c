"""Losses from outside and from Python: what cannot be meant is refused where it is written."""

import itertools
import sys

import pytest

from logratio.losses import DPOLoss, GRPOLoss, KTOLoss, SFTLoss

NAMES = (f"losses_of_a_test_{i}" for i in itertools.count())
HEAD = """from dataclasses import dataclass
from typing import ClassVar
import torch
from logratio.losses import Kind, Loss, LossOutput
"""
CLASS = """
@dataclass(frozen=True, kw_only=True)
class L(Loss):
    kind: ClassVar[Kind] = Kind.PAIRED
    def __call__(self, policy, *, totals):
        {body}
"""
BAD = {
    "is a function": "def L(policy): ...",
    "is no dataclass": "class L: pass",
    "has no kind": "@dataclass(frozen=True)\nclass L(Loss): pass",
    "is NaN": CLASS.format(body="return LossOutput(policy.chosen.sums.sum() * float('nan'), {})"),
    "is infinite": CLASS.format(body="return LossOutput(policy.chosen.sums.sum() * float('inf'), {})"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_loss_that_cannot_be_trained_with(refused, tmp_path, monkeypatch, name):
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    module = next(NAMES)
    (tmp_path / f"{module}.py").write_text(HEAD + BAD[name] + "\n")
    words = f"train --loss {module}:L --dataset_name rows.jsonl --max_steps 1 --batch_size 2 --output_dir out"
    refused(words, "not finite" if name.startswith("is NaN") or name == "is infinite" else module)


@pytest.mark.parametrize(
    ("loss", "options", "names"),
    [
        (DPOLoss, {"beta": float("nan")}, "beta"),
        (DPOLoss, {"beta": float("inf")}, "beta"),
        (DPOLoss, {"loss_type": "nope"}, "loss_type"),
        (DPOLoss, {"loss_type": "sigmoid", "label_smoothing": 0.1}, "label_smoothing"),
        (DPOLoss, {"loss_type": ()}, "loss_type"),
        (KTOLoss, {"desirable_weight": -1.0}, "desirable_weight"),
        (KTOLoss, {"loss_type": "nope"}, "loss_type"),
        (GRPOLoss, {"epsilon": 1.0}, "epsilon"),
        (GRPOLoss, {"delta": float("nan")}, "delta"),
        (SFTLoss, {"z_loss_coef": float("inf")}, "z_loss_coef"),
        (SFTLoss, {"z_loss_coef": -1.0}, "z_loss_coef"),
    ],
)
def test_a_value_that_no_formula_takes(loss, options, names):
    with pytest.raises(ValueError, match=names):
        loss(**options)
