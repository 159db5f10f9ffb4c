"""Buffers and shapes as on a GPU, on a CPU."""

import pytest

from logratio.trainers.rollout.engines import captured as module
from logratio.trainers.rollout.engines import in_process
from logratio.trainers.rollout.engines.captured import Captured


@pytest.fixture
def small(monkeypatch):
    """Buffers on a CPU too, so small that rows and places pass through several shapes, and room is made twice."""
    monkeypatch.setattr(in_process, "CAPTURING", ("cpu",))
    monkeypatch.setattr(module, "LEAST_ROWS", 2)
    monkeypatch.setattr(module, "LEAST_SEEN", 8)


@pytest.fixture
def keys(monkeypatch):
    """Those of the steps that were taken."""
    seen, run = [], Captured.run
    monkeypatch.setattr(Captured, "run", lambda self, key, step: (seen.append(key), run(self, key, step))[1])
    return seen
