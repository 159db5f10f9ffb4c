"""A model that samples, and its tokenizer."""

import pytest

from logratio.trainers.policy.policy import Policy
from logratio.trainers.policy.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def policy():
    """A tiny model that says different things, and sometimes its EOS."""
    model = tiny_model(3, num_hidden_layers=1, hidden_size=32, intermediate_size=32, initializer_range=0.5)
    return Policy(model.eval())
