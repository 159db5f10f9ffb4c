"""nf4 weights keep the layout that has a gradient where bitsandbytes would repack them: a CPU with AVX512-BF16.

Its answer to what the CPU has is forced, and nothing else. Repacking is written in torch and is real; the product for
inference that follows it is torch's own form of it and takes the weight for unpacked, so values are not looked at then.
"""

import bitsandbytes
import pytest
import torch
from bitsandbytes.nn import Linear4bit

from logratio.benchmarks.measure.models import build
from logratio.benchmarks.measure.steps.ledger import plain
from logratio.trainers.batches.packing import pack
from logratio.trainers.config import ModelConfig
from logratio.trainers.data.examples import Completion, Example
from logratio.trainers.errors import UserError
from logratio.trainers.layers.lora_layers import fuse_lora
from logratio.trainers.layers.nf4 import is_repacked
from logratio.trainers.policy.adapters import add_adapters
from logratio.trainers.policy.load import load_model
from logratio.trainers.policy.policy import Policy
from logratio.trainers.policy.reference import AdapterReference, inference

CPU = torch.device("cpu")
EXAMPLES = [Example(list(b"12+5="), [Completion(list(b"17")), Completion(list(b"125"))])]
REFUSED = r"bitsandbytes has repacked nf4 weights .* call `logratio\.trainers\.layers\.nf4\.keep_layout\(model\)`"


@pytest.fixture(autouse=True)
def a_cpu_that_repacks(monkeypatch):
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: True)


def loaded(fused=True):
    config = ModelConfig(load_in_4bit=True, lora_r=4, fused_lora=fused)
    model = add_adapters(load_model(config, CPU), config, frozen_copy=False)
    return with_outputs(model)


def measured():
    return with_outputs(build("tiny", "qlora", dtype=torch.float32, device=CPU))


def with_outputs(model):
    """Adapters that add something, so that A has a gradient too, and a policy of it."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(0.1 * torch.randn(p.shape, generator=draw))
    return Policy(model.train())


def repacking(policy):
    """As bitsandbytes makes its layers on such a CPU."""
    for layer in policy.modules():
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = True
    return policy


def batch():
    (packed,) = pack(EXAMPLES, 1000, shared=False)
    return packed


def gradient(policy):
    policy.zero_grad()
    policy(batch()).logps.square().sum().backward()
    return torch.cat([p.grad.double().flatten() for p in policy.parameters() if p.requires_grad])


def weights_of(policy):
    return [layer.weight for layer in policy.modules() if isinstance(layer, Linear4bit)]


@pytest.mark.parametrize("make", [loaded, lambda: loaded(fused=False), measured], ids=["fused", "peft", "measured"])
def test_a_reference_pass_leaves_the_gradient_as_it_was(make):
    """By the error budget, against float64 on the weights that nf4 stands for."""
    policy = make()
    exact = gradient(Policy(plain(policy.model, torch.float64)))
    before = gradient(policy)
    AdapterReference(policy)(batch())
    after = gradient(policy)
    assert len(weights_of(policy)) == 21 and not any(map(is_repacked, weights_of(policy)))
    assert (after - exact).norm() <= 2 * (before - exact).norm() + 1e-7 * exact.norm()
    assert (before - exact).norm() <= 1e-4 * exact.norm()


def test_a_folder_that_holds_nf4_weights_keeps_their_layout(tmp_path):
    load_model(ModelConfig(load_in_4bit=True, lora_r=4), CPU).save_pretrained(tmp_path)
    policy = Policy(load_model(ModelConfig(model_name_or_path=str(tmp_path)), CPU))
    with inference(policy):
        policy(batch())
    assert len(weights_of(policy)) == 21 and not any(map(is_repacked, weights_of(policy)))


@pytest.mark.parametrize("fused", [True, False])
def test_repacked_weights_are_refused_where_a_gradient_is_wanted(fused):
    policy = repacking(loaded(fused))
    AdapterReference(policy)(batch())  # without a gradient they compute what bitsandbytes has for them
    assert all(map(is_repacked, weights_of(policy)))
    with pytest.raises(UserError, match=REFUSED):
        policy(batch())


def test_repacked_weights_are_refused_outside_of_a_policy_too():
    model = build("tiny", "qlora", dtype=torch.float32, device=CPU)
    fuse_lora(model)
    policy = repacking(Policy(model))
    AdapterReference(policy)(batch())
    with pytest.raises(UserError, match=REFUSED):
        model(input_ids=batch().input_ids)


def test_weights_that_are_repacked_before_the_backward_pass_are_refused():
    policy = repacking(loaded())
    loss = policy(batch()).logps.sum()
    AdapterReference(policy)(batch())
    with pytest.raises(UserError, match=REFUSED):
        loss.backward()
