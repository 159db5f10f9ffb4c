"""Attention of one token a row against transformers' own, in every grouping; what it leaves to that."""

import types

import pytest
import torch
from transformers import AttentionInterface

from logratio.trainers.attention.decoding import DECODING, attend_last, bias_of, decoding


def tensors(heads, keys, length=1):
    draw = torch.Generator().manual_seed(0)
    shapes = ((3, heads, length, 8), (3, keys, 9, 8), (3, keys, 9, 6))
    seen = torch.arange(9) <= torch.tensor([[0], [4], [8]])
    return *(torch.randn(*s, generator=draw, dtype=torch.float64) for s in shapes), seen[:, None, None]


@pytest.mark.parametrize(("heads", "keys"), [(6, 2), (4, 4), (7, 1)])
def test_grouped_queries_see_what_they_see_alone(heads, keys):
    query, key, value, seen = tensors(heads, keys)
    module = types.SimpleNamespace(num_key_value_groups=heads // keys, is_causal=True)
    theirs, _ = AttentionInterface()["sdpa"](module, query, key, value, seen, scaling=0.3)
    ours, _ = attend_last(module, query, key, value, bias_of(seen, torch.float64), scaling=0.3)
    assert ours.shape == (3, 1, heads, 6) and torch.allclose(ours, theirs, atol=1e-12)
    assert torch.allclose(ours[0], value[0, :, :1].repeat_interleave(heads // keys, 0).transpose(0, 1))


def test_more_queries_and_other_options_are_left_to_sdpa(monkeypatch):
    query, key, value, seen = tensors(4, 4, length=2)
    module = types.SimpleNamespace(num_key_value_groups=1, is_causal=True)
    asked = []
    monkeypatch.setitem(
        AttentionInterface._global_mapping, "sdpa", lambda *given, **options: asked.append((given[4], options))
    )
    attend_last(module, query, key, value, seen)
    attend_last(module, query[:, :, :1], key, value, None, dropout=0.1)
    attend_last(module, query[:, :, :1], key, value, seen, softcap=3.0, scaling=0.5)
    assert [mask is None for mask, _ in asked] == [False, True, False]
    assert asked[2][1] == {"dropout": 0.0, "scaling": 0.5, "softcap": 3.0}


def test_a_model_attends_so_inside_alone(random_model):
    for name, inside in (("llama", DECODING), ("llama-eager", "eager")):
        model = random_model(name)
        before = model.config._attn_implementation
        with decoding(model):
            assert model.model.layers[0].self_attn.config._attn_implementation == inside
        assert model.config._attn_implementation == before
