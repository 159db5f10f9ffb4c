"""Which layers compute by the fused product, and when siblings share it."""

import copy
import gc
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from logratio.trainers.layers import lora_layers
from logratio.trainers.layers.lora_layers import fuse_lora


class Attention(nn.Module):
    """Calls its layers as `steps` says: (name, index into the two tensors that it is given), or a function."""

    steps = (("q_proj", 0), ("k_proj", 0), ("v_proj", 0))

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(8, n, bias=False) for n in (6, 4, 4))

    def forward(self, *xs):
        out = []
        for step in self.steps:
            if callable(step):
                step(self, xs)
            else:
                out.append(self.get_submodule(step[0])(xs[step[1]]))
        return out


@pytest.fixture
def calls(monkeypatch):
    """How many layers each fused product had."""
    sizes, product = [], lora_layers.lora_linear

    def spy(x, parts):
        sizes.append(len(parts))
        return product(x, parts)

    monkeypatch.setattr(lora_layers, "lora_linear", spy)
    return sizes


def lora(model, seed=0, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(model, LoraConfig(**{"r": 2, "init_lora_weights": False} | options))


def attention(**options):
    torch.manual_seed(0)
    options = {"target_modules": ["q_proj", "k_proj", "v_proj"]} | options
    model = lora(nn.Sequential(Attention()), **options)
    # of another rank, but of the same scaling
    model.add_adapter("other", LoraConfig(**{"r": 3, "lora_alpha": 12, "init_lora_weights": False} | options))
    model.set_adapter("default")
    return model.double()


def two_inputs():
    return [torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in (1, 2)]


def run(model, steps=Attention.steps, xs=None):
    """Outputs and gradients of one forward of the attention module, with x that has a history."""
    parent = model.base_model.model[0]
    parent.steps = steps
    leaves = [x.requires_grad_() for x in xs or two_inputs()]
    outputs = parent(*(2 * x for x in leaves))
    model.zero_grad()
    sum(y.square().sum() for y in outputs if y.requires_grad).backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return [y.detach() for y in outputs], [x.grad for x in leaves if x.grad is not None], grads


def assert_equal_to_peft(model, steps=Attention.steps):
    fused = copy.deepcopy(model)
    fuse_lora(fused)
    for ours, theirs in zip(run(fused, steps), run(model, steps), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert not any("siblings" in m.__dict__ for m in fused.modules())


# --- which layers


def test_plain_adapters_are_fused_once_and_the_rest_of_peft_stays(calls):
    model = attention()
    names, keys = [n for n, _ in model.named_modules()], list(model.state_dict())
    assert fuse_lora(model) == fuse_lora(model) == 3
    parent = model.base_model.model[0]
    assert len(parent._forward_hooks) == len(parent._forward_pre_hooks) == 1
    assert [n for n, _ in model.named_modules()] == names and list(model.state_dict()) == keys
    assert_equal_to_peft(attention())
    assert calls == [3]
    unloaded = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(unloaded(two_inputs()[0]), model(two_inputs()[0]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [{"lora_dropout": 0.5}, {"use_dora": True}, {"lora_bias": True}])
@pytest.mark.filterwarnings("ignore:.*lora_bias")
def test_other_adapters_are_left_to_peft(options):
    assert fuse_lora(attention(**options)) == 0


@pytest.mark.parametrize("layer", [nn.Conv2d(2, 2, 1), nn.Embedding(3, 2)])
def test_other_layers_are_left_to_peft(layer):
    assert fuse_lora(lora(nn.Sequential(layer), target_modules=["0"])) == 0


def hook(module):
    module.register_forward_hook(lambda m, args, output: output + 1)


CHANGES = {
    "merged": lambda m, q: q.merge(),
    "disabled": lambda m, q: q.enable_adapters(False),
    "two active": lambda m, q: q.set_adapter(["default", "other"]),
    "none active": lambda m, q: setattr(q, "_active_adapter", "unknown"),
    "base trains": lambda m, q: q.base_layer.weight.requires_grad_(),
    "hook on A": lambda m, q: hook(q.lora_A["default"]),
    "hook on B": lambda m, q: hook(q.lora_B["default"]),
    "hook on base": lambda m, q: hook(q.base_layer),
    "own forward": lambda m, q: setattr(q.base_layer, "forward", lambda x: x[..., :6].clone()),
    "dropout later": lambda m, q: q.lora_dropout.update({"default": nn.Dropout(1.0)}),
    "DoRA later": lambda m, q: q.lora_variant.update({"default": OnlyBase()}),
    "A of another kind": lambda m, q: q.lora_A.update({"default": nn.Sequential(q.lora_A["default"])}),
}


class OnlyBase:
    def forward(self, layer, *, result, **kwargs):
        return result


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_not_plain_at_the_time_of_a_call_is_left_to_peft(change, calls):
    model = attention()
    fused = copy.deepcopy(model)
    fuse_lora(fused)
    if change == "A of another kind":  # as wrappers are, which have the weight inside
        nn.Sequential.weight = property(lambda self: self[0].weight)
    try:
        for m in (model, fused):
            CHANGES[change](m, m.base_model.model[0].q_proj)
        for ours, theirs in zip(run(fused), run(model), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    finally:
        if change == "A of another kind":
            del nn.Sequential.weight
    assert calls == [2]  # k and v still go together


def test_weights_that_are_plain_attributes_for_a_while_are_found(calls):
    """As FSDP puts them in a layer's place of its parameters while it computes."""
    model = attention()
    fused = copy.deepcopy(model)
    fuse_lora(fused)
    theirs = run(model)
    for name in ("q_proj", "k_proj", "v_proj"):
        layer = fused.base_model.model[0].get_submodule(name)
        for module in (layer.base_layer, layer.lora_A["default"], layer.lora_B["default"]):
            weight = module._parameters.pop("weight")
            module.weight = weight.detach().requires_grad_(weight.requires_grad)  # a tensor, in __dict__
    ours = run(fused)
    for mine, wanted in zip(ours[:2], theirs[:2], strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-12, atol=1e-12)
    assert calls == [3]


def test_arguments_and_dtypes_that_do_not_fit_are_left_to_peft(calls):
    model = attention()
    fuse_lora(model)
    with pytest.raises(RuntimeError, match="dtype"):
        model(two_inputs()[0].float())
    q = model.base_model.model[0].q_proj
    q(two_inputs()[0], adapter_names=["other", "default", "other"])
    assert calls == []


# --- siblings


def set_other(name):
    return lambda parent, xs: parent.get_submodule(name).set_adapter("other")


def change_x(parent, xs):
    xs[0].mul_(1.5)


def scale_k(parent, xs):
    parent.k_proj.scaling["default"] *= 2


def off(name):
    return lambda parent, xs: parent.get_submodule(name).enable_adapters(False)


def recurse(parent, xs):
    steps, parent.steps = parent.steps, Attention.steps
    parent(*xs)
    parent.steps = steps


def without_grad(parent, xs):
    with torch.no_grad():
        assert not parent.k_proj(xs[0]).requires_grad


Q, K, V = Attention.steps
ORDERS = {
    "the usual": ((Q, K, V), [3]),
    "another": ((V, K, Q), [3]),
    "twice": ((Q, K, V, Q, K, V), [3, 3]),
    "one again": ((Q, Q, K, V), [3, 1]),
    "one not": ((Q, V), [3]),
    "cross-attention": ((Q, ("k_proj", 1), ("v_proj", 1)), [3, 1, 1]),
    "there and back": ((Q, ("k_proj", 1), K, V), [3, 1]),
    "another adapter of k": ((Q, set_other("k_proj"), K, V), [3, 1]),
    "another scaling of k": ((Q, scale_k, K, V), [3, 1]),
    "k switched off between": ((Q, off("k_proj"), K, V), [3]),
    "k switched off before": ((off("k_proj"), Q, K, V), [2]),
    "q switched off before": ((off("q_proj"), Q, K, V), [2]),
    "nested": ((Q, recurse, K, V), [3, 3, 1, 1]),
    "without gradient between": ((Q, without_grad, K, V), [3, 1]),
}


@pytest.mark.parametrize("order", ORDERS)
def test_whatever_the_order_the_outputs_are_pefts(order, calls):
    steps, sizes = ORDERS[order]
    assert_equal_to_peft(attention(), steps)
    assert calls == sizes


def test_an_x_that_was_changed_in_place_is_another_x(calls):
    model = attention()
    fused = copy.deepcopy(model)
    fuse_lora(fused)
    for m in (model, fused):
        m.base_model.model[0].steps = (Q, change_x, K, V)
    with torch.no_grad():
        theirs, ours = (m.base_model.model[0](two_inputs()[0]) for m in (model, fused))
    assert calls == [3, 1, 1] and all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(ours, theirs, strict=True))


def test_in_inference_mode_layers_compute_alone(calls):
    """Tensors made in it have no version, so a change of x would not be seen."""
    model = attention()
    fused = copy.deepcopy(model)
    fuse_lora(fused)
    parents = [m.base_model.model[0] for m in (model, fused)]
    with torch.inference_mode():
        theirs, ours = ([y for y in p(*(2 * x for x in two_inputs()))] for p in parents)
    assert calls == [1, 1, 1] and all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(ours, theirs, strict=True))


def test_outside_their_parent_layers_compute_alone(calls):
    model = attention()
    fuse_lora(model)
    x, parent = two_inputs()[0], model.base_model.model[0]
    for layer in (parent.q_proj, parent.k_proj, parent.v_proj):
        layer(x)
    assert calls == [1, 1, 1]


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("steps", [(Q,), (Q, K, V), (Q, "raise"), ("raise",)])
def test_nothing_is_kept_behind_a_forward_that_ends_or_raises(steps, grad, monkeypatch):
    model = attention()
    fuse_lora(model)
    made, product = [], lora_layers.lora_linear

    def spy(x, parts):
        outputs = product(x, parts)
        made.extend(weakref.ref(t) for t in (x, *outputs))
        return outputs

    def fail(parent, xs):
        raise KeyError("between")

    monkeypatch.setattr(lora_layers, "lora_linear", spy)
    parent = model.base_model.model[0]
    parent.steps = [fail if s == "raise" else s for s in steps]
    gc.disable()  # what only the collector could find would stay for long
    try:
        with torch.set_grad_enabled(grad):
            try:
                parent(2 * two_inputs()[0])
            except KeyError as error:
                error.__traceback__ = error.__context__ = None
        assert len(made) == (0 if steps == ("raise",) else 4)
        assert not any(ref() is not None for ref in made)
        assert not any("siblings" in m.__dict__ for m in model.modules())
    finally:
        gc.enable()


def test_an_output_is_no_longer_held_once_it_is_taken():
    model = attention()
    fuse_lora(model)
    seen = []

    def look(parent, xs):
        siblings = parent.q_proj.siblings
        seen.append((len(siblings.made), siblings.x is xs[0]))

    parent = model.base_model.model[0]
    parent.steps = [look, Q, look, K, look, V, look]
    parent(two_inputs()[0])
    assert seen == [(0, False), (2, True), (1, True), (0, False)]
