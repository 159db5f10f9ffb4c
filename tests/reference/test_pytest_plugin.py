"""The fixture `laws`, in a test run of its own."""

import sys
import tomllib
from importlib.metadata import distributions
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]
PLUGIN = "logratio.reference.pytest_plugin"
TESTS = """
import torch
from logratio.losses import DPOLoss, linear_logps
from logratio.losses.advantages import advantages_of
from logratio.reference.laws import Trained

def trainer(rows, *, batch_size, steps):
    start = {"w": torch.zeros(1)}
    return Trained([0.0] * steps, start, {"w": start["w"] + 1})

def test_right(laws, record_property):
    record_property("of another plugin", "kept to itself")
    laws.check_loss(DPOLoss, max_examples=1)
    laws.check_loss(DPOLoss(beta=0.2), max_examples=1, laws=["split"])
    laws.check_advantage(advantages_of, shift=None)
    assert "budget" in laws.check_kernel(linear_logps, laws=["budget"]).held
    assert "order" in laws.check_trainer(trainer).held

def test_wrong(laws):
    laws.check_advantage(lambda rewards: rewards)
"""


def test_the_fixture(pytester):
    pytester.makepyfile(TESTS)
    before = {name: module for name, module in sys.modules.items() if name.startswith("logratio")}
    points = (point for found in distributions() for point in found.entry_points)  # as pytest looks for plugins
    named = () if any(point.name == "logratio_laws" for point in points) else ("-p", PLUGIN)
    result = pytester.runpytest_inprocess(*named, "-p", "no:cacheprovider")
    sys.modules.update(before)
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(
        [
            "*test_wrong*",
            "LawViolation: equal_rewards: Where all rewards of a step are equal *",
            "  rewards [[]*[]] gives *",
            "*laws not asked*",
            "test_the_fixture.py::test_right: shift_invariant: no shift invariance is claimed",
            "test_the_fixture.py::test_right: split: fn takes no micro_batch_size",
        ]
    )
    result.stdout.no_fnmatch_line("*kept to itself*")
    result.stdout.no_fnmatch_line("*During handling of*")
    assert "Traceback" not in result.stdout.str() and "function_laws/" not in result.stdout.str()


def test_it_is_an_entry_point_and_imports_nothing_early():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["pytest11"] == {"logratio_laws": PLUGIN}
    plugin = pytest.importorskip(PLUGIN)
    assert not {"torch", "hypothesis"} & vars(plugin).keys()
