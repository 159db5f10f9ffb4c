"""What all tests share: no network, no threads that fight over cores, a cache that nobody else uses."""

import atexit
import gc
import os
import shutil
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers inherit it
    os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="datasets-")
    atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)

import pytest
import torch
from hypothesis import settings

# The same examples in every run of continuous integration; others each time at the desk.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")


def pytest_collection() -> None:
    """What is imported stays: to look through it for garbage, again and again, takes a quarter of the time."""
    gc.disable()


def pytest_collection_finish() -> None:
    """What the tests import lives as long as they do: no later collection need look through it again."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)
