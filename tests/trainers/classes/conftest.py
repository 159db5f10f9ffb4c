"""A folder with a model."""

import pytest

from logratio.trainers.policy.tiny import tiny_model, tiny_tokenizer


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_model(3).save_pretrained("model")
    tiny_tokenizer().save_pretrained("model")
    return tmp_path
