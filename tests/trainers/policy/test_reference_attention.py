"""A policy and its reference compute the same rows, whichever attention either has taken."""

from types import SimpleNamespace

import pytest

from logratio.trainers.attention.varlen import VARLEN
from logratio.trainers.policy import reference
from logratio.trainers.policy.policy import Policy


@pytest.mark.parametrize(
    ("mine", "theirs", "left"),
    [
        (VARLEN, VARLEN, (VARLEN, VARLEN)),
        (VARLEN, "eager", ("sdpa", "eager")),
        ("sdpa", VARLEN, ("sdpa", "sdpa")),
    ],
)
def test_models_whose_rows_differ_meet_under_a_dense_mask(monkeypatch, random_model, mine, theirs, left):
    """Rows for the one are too long for the other."""
    policy, model = Policy(random_model("llama"), shared=True), random_model("llama")
    policy.causal_lm.set_attn_implementation(mine)
    model.set_attn_implementation(theirs)
    monkeypatch.setattr(reference, "load_model", lambda *arguments, **options: model)
    monkeypatch.setattr(reference, "choose_attention", lambda *arguments: ("", []))
    monkeypatch.setattr(reference, "shard_frozen", lambda other, accelerator: other)
    options = SimpleNamespace(attn_implementation=None, seed=0, mixed_precision="no")
    config = SimpleNamespace(model=options, train=options)
    other, notes = reference.other_model(config, policy, SimpleNamespace(device="cpu"), None, "the reference model")
    assert (policy.attention, other.policy.attention) == left and notes == []
