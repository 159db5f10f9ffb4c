"""Rewards of the user's own that go wrong: the function, the row and the completion are named."""

import itertools
import json
import sys

import pytest

HEAD = "import math, sys\n"
TRAIN = (
    "train grpo --dataset_name rows.jsonl --max_steps 1 --batch_size 2 --num_generations 2 --max_completion_length 3 "
    "--output_dir out --reward_funcs"
)
NAMES = (f"rewards_of_a_test_{i}" for i in itertools.count())
BAD = {
    "raises": "def f(completions, **_):\n    raise KeyError('x')",
    "returns nothing": "def f(completions, **_):\n    return None",
    "too few": "def f(completions, **_):\n    return [1.0]",
    "too many": "def f(completions, **_):\n    return [1.0] * (len(completions) + 1)",
    "NaN": "def f(completions, **_):\n    return [math.nan] * len(completions)",
    "infinity": "def f(completions, **_):\n    return [math.inf] * len(completions)",
    "beyond float": "def f(completions, **_):\n    return [10**400] * len(completions)",
    "text": "def f(completions, **_):\n    return ['1'] * len(completions)",
    "lists": "def f(completions, **_):\n    return [[1.0]] * len(completions)",
    "a number": "def f(completions, **_):\n    return 1.0",
    "leaves": "def f(completions, **_):\n    sys.exit(0)",
    "async raises": "async def f(completions, **_):\n    raise ValueError('x')",
    "async too few": "async def f(completions, **_):\n    return [1.0]",
    "wants a column that is not there": "def f(completions, nowhere):\n    return [1.0] * len(completions)",
    "is no function": "f = 7",
}
GOOD = {
    "some None": "def f(completions, **_):\n    return [None, 1.0] * (len(completions) // 2)",
    "async": "async def f(completions, **_):\n    return [1.0] * len(completions)",
    "callable": "class F:\n    def __call__(self, completions, **_):\n        return [1.0] * len(completions)\nf = F()",
    "integers": "def f(completions, **_):\n    return [1] * len(completions)",
    "booleans": "def f(completions, **_):\n    return [True] * len(completions)",
    "numpy": "import numpy\ndef f(completions, **_):\n    return numpy.ones(len(completions))",
    "torch": "import torch\ndef f(completions, **_):\n    return torch.ones(len(completions))",
    "all None": "def f(completions, **_):\n    return [None] * len(completions)",
    "state": "def f(completions, trainer_state, **_):\n    return [1.0] * len(completions)",
    "logs": (
        "def f(completions, log_metric, log_extra, **_):\n"
        "    log_metric('seen', 2.0)\n    return [1.0] * len(completions)"
    ),
}


@pytest.fixture
def module(tmp_path, monkeypatch):
    """module(source) -> the name of a module of it, found in the working directory."""
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])

    def write(source):
        name = next(NAMES)
        (tmp_path / f"{name}.py").write_text(HEAD + source + "\n")
        return name

    return write


@pytest.mark.parametrize("name", BAD)
def test_a_reward_that_goes_wrong(refused, module, name):
    spec = f"{module(BAD[name])}:f"
    refused(f"{TRAIN} {spec}", spec if name == "is no function" else "the reward 'f'")


@pytest.mark.parametrize("name", GOOD)
def test_a_reward_that_trl_takes(run, module, tmp_path, name):
    said = run(f"{TRAIN} {module(GOOD[name])}:f")
    assert said.status == 0, said
    row = json.loads((tmp_path / "out" / "metrics.jsonl").read_text())
    assert row["step"] == 1 and (name != "logs" or row["seen"] == 2.0)


@pytest.mark.parametrize(
    ("spec", "names"),
    [
        ("nope", "nope"),
        ("no_such_module_here:f", "no_such_module_here"),
        ("math:nope", "nope"),
        (":f", ":f"),
        ("math:", "math:"),
    ],
)
def test_a_name_that_leads_nowhere(refused, spec, names):
    refused(f"{TRAIN} {spec}", names)
