"""Adapters and training mode are switched without walks, and what is computed is what PEFT's own switches give."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from logratio.losses import LOSSES, Kind
from logratio.trainers.config import ModelConfig
from logratio.trainers.data.examples import Completion, Example
from logratio.trainers.layers import switch
from logratio.trainers.layers.lora_layers import fuse_lora
from logratio.trainers.layers.switch import NO_ADAPTER, computing_with, set_training, switch_of
from logratio.trainers.policy.adapters import add_adapters
from logratio.trainers.policy.load import load_model
from logratio.trainers.policy.policy import REFERENCE_ADAPTER, Policy
from logratio.trainers.policy.reference import AdapterReference, inference
from logratio.trainers.policy.reference_sync import ReferenceSync
from logratio.trainers.setup import start_accelerator
from logratio.trainers.step import Step

CPU = torch.device("cpu")
MAX_LENGTH = 20
STARTS = ("base", "adapter", "synchronised")


def randomize(model, word="lora_B", scale=0.2):
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if word in name:
                p.copy_(scale * torch.randn(p.shape, generator=draw))
    return model


def adapted(start="base", four=False, folder=None, **options):
    """The embedded model with adapters that are not 0; start: of the reference. folder: for a starting adapter."""
    config = ModelConfig(lora_r=2, load_in_4bit=four, sync_ref_model=start == "synchronised", **options)
    if start == "adapter":
        torch.manual_seed(1)
        model = randomize(add_adapters(load_model(config, CPU, seed=0), config, frozen_copy=False), "lora_B", 0.1)
        model.save_pretrained(folder)
        config = ModelConfig(adapter_name_or_path=str(folder), load_in_4bit=four, **options)
    torch.manual_seed(0)
    model = add_adapters(load_model(config, CPU, seed=0), config, frozen_copy=True)
    assert (REFERENCE_ADAPTER in model.peft_config) == (start != "base")
    return randomize(model, "lora_B.default").train()


def examples_for(kind, gold=False):
    sizes = {Kind.PAIRED: 3 if gold else 2, Kind.GROUPED: 3, Kind.LISTED: 3}
    return [
        Example(
            [5 + row, 6, 7],
            [Completion([8 + row + k] * (2 + k + row % 2)) for k in range(sizes.get(kind, 1))],
            row % 2 == 0 if kind is Kind.LABELED else None,
            row,
            (1.0, -0.5, -0.25) if kind is Kind.GROUPED else None,
            rewards=(1.0, -0.5, -0.25) if kind is Kind.LISTED else None,
        )
        for row in range(5)
    ]


def gradient_of(model, method):
    """The second of two steps, with an update of the adapters between them, and of the reference where it follows."""
    loss = LOSSES[method](beta=0.1) if method == "grpo" else LOSSES[method]()
    policy = Policy(model, shared=True, stats=loss.stats).train()
    reference = AdapterReference(policy) if loss.wants_reference else None
    step = Step(start_accelerator("no"), policy, loss, reference, micro_batch_tokens=20, max_length=MAX_LENGTH)
    trained = [p for p in policy.parameters() if p.requires_grad]
    follows = model.peft_config.keys() > {"default"} and reference is not None
    for _ in range(2):
        policy.zero_grad()
        examples = examples_for(loss.kind, loss.scores_gold)
        micros = step.micro_batches(examples)
        assert len(micros) > 1
        if loss.kind is Kind.GROUPED:
            step.fill_old(micros)
        step(micros, step.totals(examples, micros))
        with torch.no_grad():
            for p in trained:
                p -= 0.01 * p.grad.sign()
        if follows:
            ReferenceSync(policy, None, alpha=0.6, every=1).after(1)
    assert policy.training and all(m.training for m in policy.modules())
    return torch.cat([p.grad.flatten() for p in trained])


@pytest.fixture
def by_peft(monkeypatch):
    """Inside what it returns, PEFT switches and nn.Module sets the mode, as without any of this."""

    def enter():
        monkeypatch.setattr(switch, "reaches_all", lambda switch, model: False)
        monkeypatch.setattr("logratio.trainers.policy.reference.set_training", lambda m, mode: m.train(mode))

    yield enter
    monkeypatch.undo()


# (method, start, four, checkpointing): DPO from the base in all combinations, and from the other starts, and GRPO in
# the plainest; the rest takes a minute.
ALL = [
    (method, start, four, checkpointing)
    for method, start in [(m, "base") for m in LOSSES] + [(m, s) for m in ("dpo", "kto") for s in STARTS[1:]]
    for four in (False, True)
    for checkpointing in (False, True)
]
OFTEN = [case for case in ALL if case[:2] == ("dpo", "base") or case[0] in ("dpo", "grpo") and not any(case[2:])]


@pytest.mark.parametrize(
    ("method", "start", "four", "checkpointing"),
    [case if case in OFTEN else pytest.param(*case, marks=pytest.mark.slow) for case in ALL],
)
def test_gradients_are_those_of_pefts_own_switches(method, start, four, checkpointing, by_peft, tmp_path):
    model = adapted(start, four, tmp_path, gradient_checkpointing=checkpointing)
    other = copy.deepcopy(model)
    ours = gradient_of(model, method)
    by_peft()
    theirs = gradient_of(other, method)
    assert theirs.norm() > 1e-4 and (ours - theirs).norm() <= 1e-6 * theirs.norm()


@pytest.mark.parametrize("start", STARTS)
def test_dropout_that_is_kept_is_left_to_peft_and_is_off_in_the_reference(start, tmp_path):
    """Of the model and of adapters. The reference is then that of a model without any."""
    model = adapted(start, folder=tmp_path, lora_dropout=0.5 if start != "adapter" else None)
    if start == "adapter":
        for layer in model.modules():
            if isinstance(layer, BaseTunerLayer):
                layer.lora_dropout.update({name: nn.Dropout(0.5) for name in layer.lora_dropout})
    policy = Policy(model, shared=True).train()
    (micro,) = Step(
        start_accelerator("no"), policy, LOSSES["dpo"](), None, micro_batch_tokens=1000, max_length=MAX_LENGTH
    ).micro_batches(examples_for(Kind.PAIRED))
    assert not torch.equal(policy(micro.batch).logps, policy(micro.batch).logps)
    once, again = (AdapterReference(policy)(micro.batch) for _ in range(2))
    assert torch.equal(once, again)
    plain = copy.deepcopy(policy).eval()
    for name in {REFERENCE_ADAPTER} & model.peft_config.keys():
        plain.model.set_adapter(name)
    with torch.no_grad():
        if start == "base":
            with plain.model.disable_adapter():
                torch.testing.assert_close(once, plain(micro.batch).logps)
        else:
            torch.testing.assert_close(once, plain(micro.batch).logps)


@pytest.mark.parametrize("start", STARTS)
def test_a_reference_between_forward_and_backward_does_not_reach_what_is_recomputed(start, tmp_path):
    model = adapted(start, folder=tmp_path, gradient_checkpointing=True)
    policy = Policy(model, shared=True).train()
    (micro,) = Step(
        start_accelerator("no"), policy, LOSSES["dpo"](), None, micro_batch_tokens=1000, max_length=MAX_LENGTH
    ).micro_batches(examples_for(Kind.PAIRED))
    grads = []
    for between in (False, True):
        policy.zero_grad()
        value = policy(micro.batch).logps.square().sum()
        if between:
            AdapterReference(policy)(micro.batch)
        value.backward()
        grads.append(torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None]))
    assert torch.equal(*grads) and grads[0].norm() > 0


# --- the switch


@pytest.fixture
def no_walks(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("PEFT walks")

    for name in ("disable_adapter", "set_adapter"):
        monkeypatch.setattr(PeftModel, name, refuse)


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(12).view(1, -1), use_cache=False).logits


@pytest.mark.parametrize("start", STARTS)
def test_fused_layers_are_switched_by_none_of_pefts_walks(start, tmp_path, request):
    model = adapted(start, folder=tmp_path).eval()
    policy, own = Policy(model), logits(model)
    other = copy.deepcopy(model)
    if start == "base":
        with other.disable_adapter():
            wanted = logits(other)
    else:
        other.set_adapter(REFERENCE_ADAPTER)
        wanted = logits(other)
    request.getfixturevalue("no_walks")
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with policy.as_reference():
        assert torch.equal(logits(model), wanted) and not torch.allclose(wanted, own, atol=1e-3)
        with switch_of(model).turned_to("default"):
            assert torch.equal(logits(model), own)
        assert torch.equal(logits(model), wanted)
        assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert torch.equal(logits(model), own)
    with pytest.raises(RuntimeError, match="inside"), policy.as_reference():
        raise RuntimeError("inside")
    assert torch.equal(logits(model), own)


def test_a_copy_has_a_switch_of_its_own(no_walks):
    model = adapted()
    other = copy.deepcopy(model)
    own = logits(model)
    with Policy(other).as_reference():
        assert torch.equal(logits(model), own) and not torch.equal(logits(other), own)
    assert torch.equal(logits(other), own)


@pytest.mark.parametrize("merged", [False, True])
def test_layers_that_are_not_fused_are_switched_as_well(merged):
    """An adapter that comes later, on a layer that was not there; modules that are trained whole; merged weights."""
    model = adapted().eval()
    with Policy(model).as_reference():
        wanted = logits(model)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["embed_tokens"], modules_to_save=["norm"]))
    randomize(model, "other")
    model.base_model.set_adapter(["default", "other"])
    if merged:
        model.merge_adapter()
    own = logits(model)
    for _ in range(2):
        with Policy(model).as_reference():
            torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(own, wanted, atol=1e-3)


def test_an_adapter_that_comes_later_on_fused_layers_is_found(no_walks, monkeypatch):
    model = adapted().eval()
    own = logits(model)
    with Policy(model).as_reference():
        wanted = logits(model)
    monkeypatch.undo()
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    monkeypatch.setattr(PeftModel, "disable_adapter", None)
    with computing_with(model, "other"):
        assert torch.equal(logits(model), wanted), "its B is 0"
    with computing_with(model, NO_ADAPTER):
        assert torch.equal(logits(model), wanted)
    assert torch.equal(logits(model), own)


def test_a_base_model_that_was_fused_alone_is_left_to_peft():
    model = adapted(fused_lora=False).eval()
    own = logits(model)
    assert fuse_lora(model.get_base_model()) == 21
    with Policy(model).as_reference():
        assert not torch.allclose(logits(model), own, atol=1e-3)
    torch.testing.assert_close(logits(model), own, rtol=1e-4, atol=1e-5)


# --- training mode


def test_a_model_of_transformers_is_set_without_recursion_unless_it_has_kernels_to_put_in(monkeypatch):
    model, recursions, kernels = adapted(), [], []
    causal_lm = model.get_base_model()
    train = nn.Module.train
    monkeypatch.setattr(nn.Module, "train", lambda self, mode=True: recursions.append(self) or train(self, mode))
    monkeypatch.setattr(type(causal_lm), "set_use_kernels", lambda self, on: kernels.append(self))
    set_training(model, False)
    assert not any(m.training for m in model.modules()) and not recursions and not kernels
    causal_lm._use_kernels = True
    set_training(model, True)
    assert all(m.training for m in model.modules()) and recursions and kernels == [causal_lm]


class Own(nn.Module):
    """A module that does something of its own when the mode changes."""

    def __init__(self):
        super().__init__()
        self.inner, self.modes = nn.Dropout(0.5), []

    def train(self, mode=True):
        self.modes.append(mode)
        return super().train(mode)


def test_every_module_is_set_to_the_mode_as_its_own_method_would():
    model = nn.Sequential(nn.Dropout(0.5), nn.Sequential(Own(), nn.Linear(2, 2)))
    model.register_module("none", None)
    model[1].eval()
    with inference(model):
        assert not any(m.training for m in model.modules()) and not torch.is_grad_enabled()
    assert all(m.training for m in model.modules()) and torch.is_grad_enabled()
    assert model[1][0].modes == [False, False, True]
    set_training(model, False)
    with inference(model):
        pass
    assert not any(m.training for m in model.modules())
    with pytest.raises(RuntimeError, match="inside"), inference(model.train()):
        raise RuntimeError("inside")
    assert all(m.training for m in model.modules())
