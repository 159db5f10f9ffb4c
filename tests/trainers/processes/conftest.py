"""A folder with a model, for the runs of one module, and what one process makes of them."""

import pytest

from ._compared import Truth
from ._jobs import make_model
from ._launch import HERE


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(HERE))  # for the reward
        folder = tmp_path_factory.mktemp("processes")
        make_model(folder / "model")
        yield folder


@pytest.fixture(scope="module")
def alone(folder):
    return Truth(folder)
