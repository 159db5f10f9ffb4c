"""Casts of adapters that are made once in a step: the same numbers, fewer of them, none that outlives the step."""

import threading

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from logratio.trainers.layers.casts import casts_kept, stacked
from logratio.trainers.layers.lora_layers import fuse_lora

from .test_lora_linear import Attention, make_x, results, with_lora


class Casts(TorchDispatchMode):
    """Counts casts of adapters, which are the only float32 tensors of two dimensions, and their stacks."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default:
            self.count += args[0].dtype is torch.float32 and args[0].dim() == 2
        self.count += func is torch.ops.aten.cat.default
        return func(*args, **(kwargs or {}))


def half_precision():
    """bfloat16 layers under float32 adapters of one scaling."""
    torch.manual_seed(0)
    model = with_lora(nn.Sequential(Attention()).to(torch.bfloat16))
    for name, p in model.named_parameters():
        p.data = p.data.float() if "lora_" in name else p.data
    assert fuse_lora(model) == 4
    return model


def passes(model, count):
    x = make_x(torch.bfloat16)
    return [results(model, x) for _ in range(count)]


def test_a_step_casts_each_adapter_once_and_computes_the_same():
    model = half_precision()
    with Casts() as apart:
        wanted = passes(model, 3)
    with casts_kept(), Casts() as together:
        got = passes(model, 3)
    for one, other in zip(got, wanted, strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    # u of q, k and v from one A apiece (their scalings differ), all three side by side backward; four B, and o's A
    assert together.count == 3 + 2 + 4 + 1
    assert apart.count > 3 * together.count / 2


def test_weights_that_change_between_steps_are_cast_anew():
    model, x = half_precision(), make_x(torch.bfloat16)
    with casts_kept():
        before = results(model, x)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.mul_(2)
    with casts_kept():
        after = results(model, x)
    assert not torch.equal(before["y0"], after["y0"])
    assert torch.equal(after["y0"], results(model, x)["y0"])


def test_another_thread_finds_what_was_made():
    weight = torch.randn(3, 4)
    with casts_kept():
        mine, theirs = stacked([weight], torch.bfloat16), []
        thread = threading.Thread(target=lambda: theirs.append(stacked([weight], torch.bfloat16)))
        thread.start()
        thread.join()
    assert theirs[0] is mine and stacked([weight], torch.bfloat16) is not mine


def test_what_was_freed_is_not_mistaken_for_what_comes_after():
    with casts_kept():
        for i in range(50):
            assert stacked([torch.full((2, 2), float(i))], torch.bfloat16)[0, 0] == i


def test_an_error_ends_it_as_well():
    weight = torch.randn(3, 4)
    with pytest.raises(KeyError), casts_kept():
        mine = stacked([weight], torch.bfloat16)
        raise KeyError
    assert stacked([weight], torch.bfloat16) is not mine
