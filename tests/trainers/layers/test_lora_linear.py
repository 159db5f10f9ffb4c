"""The fused LoRA product against PEFT's forward: values, all gradients, what is computed, and what is kept."""

import copy
from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from logratio.trainers.layers.lora_layers import FusedLora, fuse_lora
from logratio.trainers.layers.lora_linear import dtypes_of

H, N_Q, N_KV, RANKS = 24, 20, 12, {"q_proj": 3, "k_proj": 2, "v_proj": 4, "o_proj": 3}


class Attention(nn.Module):
    """Three layers on one x and one behind them, without what is between in a model."""

    def __init__(self, bias=False, make=nn.Linear):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (make(H, n, bias=bias) for n in (N_Q, N_KV, N_KV))
        self.o_proj = make(N_Q, H, bias=bias)

    def forward(self, x):
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return self.o_proj(q), k, v


def with_lora(module, seed=0, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        options = {"r": 2, "lora_alpha": 3, "target_modules": list(RANKS), "rank_pattern": RANKS, **options}
        return get_peft_model(module, LoraConfig(init_lora_weights=False, **options))


def peft_and_fused(dtype=torch.float64, adapters=None, bias=False, **options):
    """The same adapters on the same frozen layers: computed by PEFT, and fused."""
    torch.manual_seed(1)
    model = with_lora(nn.Sequential(Attention(bias)).to(dtype), **options)
    for name, p in model.named_parameters():
        p.data = p.data.to(adapters or dtype) if "lora_" in name else p.data
    fused = copy.deepcopy(model)
    assert fuse_lora(fused) == 4
    return model, fused


def make_x(dtype=torch.float64, shape=(2, 5, H)):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).to(dtype)


def results(model, x, x_grad=True, context=None):
    """Outputs, and the gradients of x and of every factor, for a scalar in which each output counts in its own way."""
    x = x.detach().requires_grad_(x_grad)
    model.zero_grad()
    with context or nullcontext():
        outputs = model(x)
    sum((y.double() * torch.cos(torch.arange(y.numel())).view(y.shape)).sum() for y in outputs).backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert len(grads) == 8 and all(g is not None for g in grads.values())
    named = {f"y{i}": y for i, y in enumerate(outputs)} | grads | ({"x": x.grad} if x_grad else {})
    assert x_grad or x.grad is None
    return {n: t.detach() for n, t in named.items()}


def assert_close(ours, theirs, bound):
    for name, wanted in theirs.items():
        got = ours[name]
        assert got.dtype == wanted.dtype and got.shape == wanted.shape and wanted.any(), name
        assert (got.double() - wanted.double()).norm() <= bound * wanted.double().norm(), name


def assert_within_budget(ours, theirs, exact, dtype):
    for name, truth in exact.items():
        error, budget = ((r[name].double() - truth).norm() for r in (ours, theirs))
        assert ours[name].dtype == theirs[name].dtype, name
        assert error <= 2 * budget + torch.finfo(dtype).eps / 8 * truth.norm(), name


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, H), (2, 5, H), (H,), (2, 0, H)])
def test_value_and_gradients_are_pefts(dtype, bound, bias, shape):
    if 0 in shape:
        assert peft_and_fused(dtype, bias=bias)[1](make_x(dtype, shape))[0].shape == (2, 0, H)
        return
    model, fused = peft_and_fused(dtype, bias=bias, use_rslora=bias)
    x = make_x(dtype, shape)
    assert_close(results(fused, x), results(model, x), bound)
    assert_close(results(fused, x, x_grad=False), results(model, x, x_grad=False), bound)


@pytest.mark.parametrize("index", [lambda x: x.transpose(0, 1), lambda x: x[..., ::2], lambda x: x[:1].expand(3, 5, H)])
def test_x_may_be_laid_out_anyhow(index):
    model, fused = peft_and_fused()
    x = index(make_x(shape=(4, 5, 2 * H)) if index(make_x()).shape[-1] < H else make_x(shape=(4, 5, H)))
    assert not x.is_contiguous()
    assert_close(results(fused, x), results(model, x), 1e-12)


def test_gradients_may_be_laid_out_anyhow_and_outputs_changed_in_place():
    """As attention does with heads, and SwiGLU kernels with what they are given."""
    grads = []
    for model in peft_and_fused():
        x = make_x().requires_grad_()
        _, k, v = model(x)
        k = k.view(2, 5, 3, 4).transpose(1, 2).mul_(2)
        v.mul_(3)
        (k.cos().sum() + v[:, :1].expand(2, 5, N_KV).sin().sum()).backward()
        grads.append({"x": x.grad} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) == 5  # q has no part in it
    assert_close(grads[1], grads[0], 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_errs_no_more_than_peft_in_the_same_dtype(dtype):
    model, fused = peft_and_fused(dtype, bias=True)
    x = make_x(dtype, (4, 64, H))
    exact = results(copy.deepcopy(model).double(), x.double())
    assert_within_budget(results(fused, x), results(model, x), exact, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_adapters_of_a_half_precision_model_are_computed_in_its_dtype(dtype):
    """Outputs as good as PEFT's, which computes them in float32; gradients as good as the dtype's, but float32."""
    model, fused = peft_and_fused(dtype, adapters=torch.float32)
    x = make_x(dtype, (4, 64, H))
    exact = results(copy.deepcopy(model).double(), x.double())
    ours, theirs = results(fused, x), results(model, x)
    rounded = results(copy.deepcopy(model).to(dtype), x)
    assert_within_budget({n: ours[n] for n in ("y1", "y2")}, theirs, {n: exact[n] for n in ("y1", "y2")}, dtype)
    for name, truth in exact.items():
        assert ours[name].dtype == theirs[name].dtype, name
        assert (ours[name].double() - truth).norm() <= 2 * (rounded[name].double() - truth).norm(), name


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inputs", [torch.float32, torch.bfloat16])
def test_autocast_chooses_the_dtype(weights, inputs):
    model, fused = peft_and_fused(weights, adapters=torch.float32, bias=True)
    x = make_x(inputs, (4, 64, H))
    exact = results(copy.deepcopy(model).double(), x.double())
    ours, theirs = (results(m, x, context=torch.autocast("cpu", torch.bfloat16)) for m in (fused, model))
    assert ours["y0"].dtype == torch.bfloat16
    assert_within_budget(ours, theirs, exact, torch.bfloat16)


def test_autocast_leaves_float64_as_it_is():
    model, fused = peft_and_fused()
    ours, theirs = (results(m, make_x(), context=torch.autocast("cpu", torch.bfloat16)) for m in (fused, model))
    assert_close(ours, theirs, 1e-12)


def test_backward_inside_autocast_is_the_same():
    _, fused = peft_and_fused(torch.float32)
    wanted = results(fused, make_x(torch.float32))
    x = make_x(torch.float32).requires_grad_()
    outputs = fused(x)
    with torch.autocast("cpu", torch.bfloat16):
        sum((y.double() * torch.cos(torch.arange(y.numel())).view(y.shape)).sum() for y in outputs).backward()
    assert torch.equal(x.grad, wanted["x"])


# --- nf4


def quantized(compute, bias=False, dense_k=False):
    from bitsandbytes.nn import Linear4bit

    def make(inputs, outputs, bias):
        return Linear4bit(inputs, outputs, bias=bias, compute_dtype=compute, quant_type="nf4")

    torch.manual_seed(1)
    base = nn.Sequential(Attention(bias, make)).to("cpu")
    base.is_loaded_in_4bit = True
    if dense_k:
        base[0].k_proj = nn.Linear(H, N_KV, bias=bias)
    model = with_lora(base)
    fused = copy.deepcopy(model)
    assert fuse_lora(fused) == 4
    model(make_x(torch.float32)), fused(make_x(torch.float32))  # bitsandbytes settles dtypes in its first call
    return model, fused


def dense_twin(model):
    """The same in float64, with the weights that nf4 stands for."""
    from bitsandbytes.functional import dequantize_4bit

    inner = model.base_model.model[0]
    twin = with_lora(nn.Sequential(Attention(inner.q_proj.base_layer.bias is not None)))
    weights = {k: v for k, v in model.state_dict().items() if "lora_" in k or k.endswith("bias")}
    for name, layer in inner.named_children():
        weight = layer.base_layer.weight
        weights[f"base_model.model.0.{name}.base_layer.weight"] = dequantize_4bit(weight.data, weight.quant_state)
    twin.load_state_dict(weights)
    return twin.double()


@pytest.mark.parametrize("bias", [True, False])
def test_nf4_in_float32_is_pefts(bias):
    model, fused = quantized(torch.float32, bias)
    x = make_x(torch.float32)
    assert_close(results(fused, x), results(model, x), 1e-5)
    assert_close(results(fused, x, x_grad=False), results(model, x, x_grad=False), 1e-5)


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inputs", [torch.float32, torch.bfloat16])
def test_nf4_errs_no_more_than_peft_in_the_coarsest_dtype(inputs, compute, autocast):
    model, fused = quantized(compute, bias=True)
    x = make_x(inputs, (4, 64, H))
    exact = results(dense_twin(model), x.double())
    context = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()
    ours = results(fused, x, context=context)
    assert ours["y0"].dtype == inputs
    theirs = results(model, x, context=torch.autocast("cpu", torch.bfloat16) if inputs != compute else context)
    assert_within_budget(ours, theirs, exact, torch.bfloat16)


def test_nf4_and_dense_siblings_compute_apart():
    model, fused = quantized(torch.float32, dense_k=True)
    x = make_x(torch.float32)
    assert_close(results(fused, x), results(model, x), 1e-5)


def test_nf4_siblings_of_two_dtypes_compute_apart():
    model, fused = quantized(torch.float32)
    for m in (model, fused):
        m.base_model.model[0].k_proj.base_layer.compute_dtype = torch.bfloat16
    x = make_x(torch.float32)
    ours, theirs = (results(m, x, context=torch.autocast("cpu", torch.bfloat16)) for m in (fused, model))
    assert_within_budget(ours, theirs, results(dense_twin(model), x.double()), torch.bfloat16)


def test_nf4_outputs_may_be_changed_in_place():
    _, fused = quantized(torch.float32)
    q, k, v = (layer(make_x(torch.float32)) for layer in list(fused.base_model.model[0].children())[:3])
    (q.mul_(2).sum() + k.add_(1).sum() + v.mul_(2).sum()).backward()


@pytest.mark.parametrize(("name", "value"), [("packing_format_for_cpu", True), ("shape", (H, N_Q))])
def test_nf4_weights_in_another_layout_are_left_to_peft(name, value):
    """Repacked for inference on a CPU, or transposed."""
    _, fused = quantized(torch.float32)
    base, x = fused.base_model.model[0].q_proj.base_layer, make_x(torch.float32)
    assert dtypes_of(base, x) == (torch.float32,) * 3
    setattr(base.weight.quant_state, name, value)
    with torch.no_grad():
        assert dtypes_of(base, x) is None


def test_a_second_derivative_is_refused():
    _, fused = peft_and_fused()
    x = make_x().requires_grad_()
    (dx,) = torch.autograd.grad(fused(x)[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


# --- what is computed, and what is kept


class Products(TorchDispatchMode):
    """Shapes of all matrix products, sorted: (rows, columns) of the left and columns of the right."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_", "bmm", "matmul"):
            left, right = args[-2:]
            self.shapes.append((*left.shape, right.shape[1]))
        return func(*args, **(kwargs or {}))


def test_siblings_take_one_product_for_u_and_one_for_their_gradients():
    _, fused = peft_and_fused(alpha_pattern={name: 2 * r for name, r in RANKS.items()})  # of one scaling
    x, rank = make_x().requires_grad_(), 3 + 2 + 4
    with Products() as forward:
        outputs = fused(x)
    base = [(10, H, N_Q), (10, H, N_KV), (10, H, N_KV), (10, N_Q, H)]
    adapters = [(10, H, rank), (10, 3, N_Q), (10, 2, N_KV), (10, 4, N_KV), (10, N_Q, 3), (10, 3, H)]
    assert sorted(forward.shapes) == sorted(base + adapters)
    with Products() as backward:
        sum(y.sum() for y in outputs).backward()
    dx = [(10, N_Q, H), (10, N_KV, H), (10, N_KV, H), (10, rank, H), (10, H, N_Q), (10, 3, N_Q)]
    da = [(rank, 10, H), (3, 10, N_Q)]
    db = [(N_Q, 10, 3), (N_KV, 10, 2), (N_KV, 10, 4), (H, 10, 3)]
    du = [(10, N_Q, 3), (10, N_KV, 2), (10, N_KV, 4), (10, H, 3)]
    assert sorted(backward.shapes) == sorted(dx + da + db + du)


def test_without_a_gradient_of_x_its_products_are_left_out():
    _, fused = peft_and_fused()
    y = fused.base_model.model[0].q_proj(make_x())
    with Products() as backward:
        y.sum().backward()
    assert sorted(backward.shapes) == sorted([(3, 10, H), (N_Q, 10, 3), (10, N_Q, 3)])


@pytest.mark.parametrize("make", [peft_and_fused, lambda: quantized(torch.float32)])
def test_only_x_and_u_are_kept_beside_the_weights_themselves(make):
    _, fused = make()
    layers = fused.base_model.model[0]
    x = make_x(layers.q_proj.lora_A["default"].weight.dtype).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        outputs = fused(x)
    weights = {p.data_ptr() for p in fused.parameters()}
    kept = [t for t in saved if t.data_ptr() not in weights]
    assert sorted(t.shape[-1] for t in kept) == [3, 9, N_Q, H]  # two u, x of o_proj, and x
    assert sum(t.data_ptr() == x.data_ptr() for t in saved) == 1
    assert not any(t.data_ptr() == y.data_ptr() for t in kept for y in outputs)


@pytest.mark.parametrize(
    ("make", "inputs", "autocast"),
    [
        (lambda: peft_and_fused(torch.float32), torch.float32, True),
        (lambda: quantized(torch.bfloat16), torch.float32, True),
        (lambda: quantized(torch.float32), torch.bfloat16, False),
    ],
)
def test_x_is_kept_once_in_half_precision_and_no_copy_of_a_weight(make, inputs, autocast):
    """Under autocast in its dtype; nf4 layers in x's, whatever bitsandbytes computes in."""
    _, fused = make()
    saved, x = [], make_x(inputs).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            fused(x)
    weights = {p.data_ptr() for p in fused.parameters()}
    kept = [t for t in saved if t.data_ptr() not in weights]
    assert sorted(t.shape[-1] for t in kept) == [3, 9, N_Q, H] and {t.dtype for t in kept} == {torch.bfloat16}


def test_without_a_gradient_of_x_the_frozen_weight_is_not_kept():
    _, fused = peft_and_fused()
    saved, q_proj = [], fused.base_model.model[0].q_proj
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        q_proj(make_x())
    assert len(saved) == 4 and not any(t.data_ptr() == q_proj.base_layer.weight.data_ptr() for t in saved)


def test_without_gradient_nothing_is_kept():
    _, fused = peft_and_fused()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), torch.autograd.graph.saved_tensors_hooks(lambda t: pytest.fail("saved"), lambda t: t):
            assert not any(y.requires_grad for y in fused(make_x()))
    assert all(m.siblings is None for m in fused.modules() if isinstance(m, FusedLora))
