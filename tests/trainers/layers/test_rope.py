"""RoPE against its definition and transformers' own, values and gradients, in every layout."""

import math

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from logratio.trainers.layers import rope
from logratio.trainers.layers.rope import fits, own_function, rotate, rotating, with_rotation

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def tensors(rows=2, heads=6, keys=2, length=5, size=8, dtype=torch.float64, device="cpu", angles_of=None):
    draw = torch.Generator().manual_seed(0)

    def heads_of(n):
        x = torch.randn(rows, length, n, size, generator=draw, dtype=torch.float64)
        return x.to(device, dtype).transpose(1, 2)

    angles = torch.randn(angles_of or rows, length, size, generator=draw, dtype=torch.float64)
    return heads_of(heads), heads_of(keys), angles.cos().to(device, dtype), angles.sin().to(device, dtype)


def results(function, query, key, cos, sin):
    """Values and gradients of two sums that weigh every element."""
    query, key = query.detach().requires_grad_(), key.detach().requires_grad_()
    outs = function(query, key, cos, sin)
    weigh = [torch.cos(torch.arange(x.numel(), device=x.device)).view(x.shape).to(x.dtype) for x in outs]
    return (*(x.detach() for x in outs), *torch.autograd.grad(outs, (query, key), weigh))


def test_a_pair_is_turned_by_its_angle():
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 1, 4)
    angle = torch.tensor([0.3, 1.1, 0.3, 1.1]).view(1, 1, 4)
    turned, _ = rotate(x, x, angle.cos(), angle.sin())
    for i, a in ((0, 0.3), (1, 1.1)):
        first, second = x[0, 0, 0, i].item(), x[0, 0, 0, i + 2].item()
        assert turned[0, 0, 0, i].item() == pytest.approx(first * math.cos(a) - second * math.sin(a))
        assert turned[0, 0, 0, i + 2].item() == pytest.approx(second * math.cos(a) + first * math.sin(a))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "options", [{}, {"angles_of": 1}, {"heads": 14, "keys": 2, "size": 64, "length": 300}], ids=str
)
def test_values_and_gradients_are_transformers_own(options, device):
    """With angles whose halves differ, as no model has them: sin of the other half would not be noticed else."""
    exact = results(apply_rotary_pos_emb, *tensors(**options))
    dtype, bound = (torch.float64, 1e-14) if device == "cpu" else (torch.float32, 1e-6)
    for mine, true in zip(results(rotate, *tensors(**options, dtype=dtype, device=device)), exact, strict=True):
        assert mine.shape == true.shape and (mine.cpu() - true).norm() <= bound * true.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_kernel_errs_no_more_than_what_it_replaces(dtype):
    low = tensors(length=257, size=64, dtype=dtype, device="cuda")
    exact = results(apply_rotary_pos_emb, *(x.double() for x in low))
    for mine, theirs, true in zip(results(rotate, *low), results(apply_rotary_pos_emb, *low), exact, strict=True):
        assert mine.dtype == dtype and (mine - true).norm() <= 2 * (theirs - true).norm()


@pytest.mark.gpu
def test_the_kernel_takes_any_layout_and_gives_the_projections():
    query, key, cos, sin = tensors(dtype=torch.float32, device="cuda")
    for layout in (lambda x: x, torch.Tensor.contiguous, lambda x: x.transpose(2, 3).contiguous().transpose(2, 3)):
        outs = rotate(layout(query), layout(key), cos, sin)
        for mine, theirs in zip(outs, apply_rotary_pos_emb(query, key, cos, sin), strict=True):
            torch.testing.assert_close(mine, theirs)
            assert mine.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("arch", [80, 90])
def test_the_kernel_compiles_without_a_gpu(arch, monkeypatch, tmp_path):
    triton = pytest.importorskip("triton")
    from logratio.trainers.layers import _triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    if "Interpreted" in type(_triton._rotate_kernel).__name__:
        pytest.skip("in Triton's interpreter nothing is compiled")
    names = _triton._rotate_kernel.arg_names
    constants = {"D": 64, "Q_HEADS": 16, "K_HEADS": 2, "BACK": True}
    signature = {n: "*bf16" if i < 6 else "i32" for i, n in enumerate(names)} | dict.fromkeys(constants, "constexpr")
    source = triton.compiler.ASTSource(_triton._rotate_kernel, signature, constants)
    asm = triton.compile(source, triton.backends.compiler.GPUTarget("cuda", arch, 32), {"num_warps": 4}).asm
    assert "st.global" in asm["ptx"]


def test_what_it_is_not_written_for_goes_to_the_models_own(monkeypatch):
    asked = []
    function = rotating(lambda *args, **named: asked.append((len(args), named)) or args[:2])
    query, key, cos, sin = tensors()
    function(query, key, cos, sin)
    assert not asked
    function(query, key, cos, sin, unsqueeze_dim=2)
    function(query, key, cos[..., :4], sin[..., :4])  # of half a head
    function(query, key, cos.float(), sin.float())
    function(*tensors(size=12))
    assert asked == [(4, {"unsqueeze_dim": 2}), (4, {}), (4, {}), (4, {})]
    assert fits(query, key, cos, sin) and not fits(query, key, cos[0], sin[0])


def test_only_the_copy_of_a_forward_gets_another_function():
    from transformers.models.llama.modeling_llama import LlamaAttention

    assert own_function(LlamaAttention.forward) is apply_rotary_pos_emb
    copy = with_rotation(LlamaAttention.forward, rotate)
    assert own_function(copy) is rotate and own_function(LlamaAttention.forward) is apply_rotary_pos_emb
    assert own_function(torch.nn.Linear.forward) is None


def test_no_second_derivative_counts_silently_as_none():
    query, key, cos, sin = tensors()
    query.requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivative of fused layers"):
        torch.autograd.grad(rotate(query, key, cos, sin)[0].sum(), query, create_graph=True)


def test_a_wrong_sign_would_be_seen(monkeypatch):
    rotated = rope._rotated
    monkeypatch.setattr(rope, "_rotated", lambda q, k, c, s, back: rotated(q, k, c, -s if back else s, back=back))
    exact, mine = (results(f, *tensors()) for f in (apply_rotary_pos_emb, rotate))
    assert (mine[2] - exact[2]).norm() > 0.1 * exact[2].norm()
