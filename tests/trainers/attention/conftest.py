"""What the tests of attention have in common."""

import pytest
import torch

from logratio.trainers.attention import varlen

from . import _varlen


@pytest.fixture
def exact_float32(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(scope="module")
def varlen_on_cpu():
    """Its operators done in float64."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(varlen, "flash_forward", _varlen.flash_forward)
        patch.setattr(varlen, "flash_backward", _varlen.flash_backward)
        patch.setattr(varlen, "DEVICES", ("cpu",))
        patch.setattr(varlen, "DTYPES", (torch.float64, torch.float32, torch.bfloat16))
        yield
