"""SwiGLU against autograd, and its kernels within the error budget of what they replace."""

import pytest
import torch
from torch.nn.functional import silu

from logratio.trainers.layers.swiglu import product, swiglu

HALF = (torch.bfloat16, torch.float16)


def tensors(*shape, dtype=torch.float64, device="cpu"):
    draw = torch.Generator().manual_seed(0)
    return [3 * torch.randn(shape, generator=draw, dtype=torch.float64).to(device, dtype) for _ in range(3)]


def results(function, gate, up, dy):
    gate, up = gate.clone().requires_grad_(), up.clone().requires_grad_()
    y = function(gate, up)
    return (y.detach(), *torch.autograd.grad(y, (gate, up), dy))


def test_value_and_gradients_are_autograds():
    for ours, theirs in zip(*(results(f, *tensors(5, 7)) for f in (swiglu, lambda g, u: silu(g) * u)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=1e-14)


def test_gate_and_up_are_all_that_is_kept():
    gate, up, _ = tensors(4, 6)
    gate.requires_grad_(), up.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        swiglu(gate, up)
    assert [t.data_ptr() for t in kept] == [gate.data_ptr(), up.data_ptr()]


def test_no_second_derivative_counts_silently_as_none():
    gate, up, dy = tensors(2, 3)
    gate.requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivative of fused layers"):
        torch.autograd.grad(swiglu(gate, up), gate, dy, create_graph=True)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(3, 1000), (1, 1), (129, 4864), (0, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_kernels_err_no_more_than_what_they_replace(shape, dtype):
    truth = results(lambda g, u: silu(g) * u, *(x.double() for x in tensors(*shape, dtype=dtype, device="cuda")))
    ours, own = (results(f, *tensors(*shape, dtype=dtype, device="cuda")) for f in (swiglu, lambda g, u: silu(g) * u))
    for mine, theirs, true in zip(ours, own, truth, strict=True):
        assert mine.dtype == dtype and mine.shape == shape
        assert (mine - true).norm() <= 2 * (theirs - true).norm() + 1e-7 * true.norm()


@pytest.mark.gpu
def test_kernels_take_what_is_not_contiguous():
    gate, up, dy = tensors(6, 8, dtype=torch.float32, device="cuda")
    for ours, theirs in zip(results(swiglu, gate.t(), up.t(), dy.t()), results(swiglu, gate, up, dy), strict=True):
        torch.testing.assert_close(ours, theirs.t())


@pytest.mark.gpu
def test_kernels_beyond_two_to_the_31_elements():
    gate = torch.full((2**31 + 5,), 0.5, device="cuda", dtype=torch.bfloat16)
    out = product(gate, gate)
    assert (out == out[0]).all() and abs(out[0].item() - 0.25 * torch.tensor(0.5).sigmoid().item()) < 1e-3


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_kernels_compile_without_a_gpu(arch, dtype, monkeypatch, tmp_path):
    triton = pytest.importorskip("triton")
    from logratio.trainers.layers import _triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for kernel in (_triton._swiglu_kernel, _triton._swiglu_gradients_kernel):
        if not hasattr(kernel, "arg_names") or "Interpreted" in type(kernel).__name__:
            pytest.skip("in Triton's interpreter nothing is compiled")
        *pointers, count, block = kernel.arg_names
        signature = {name: f"*{dtype}" for name in pointers} | {count: "i32", block: "constexpr"}
        aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(pointers) + 1)}
        source = triton.compiler.ASTSource(kernel, signature, {block: _triton.BLOCK}, aligned)
        asm = triton.compile(source, triton.backends.compiler.GPUTarget("cuda", arch, 32), _triton.LAUNCH).asm
        assert "ld.global.v4.b32" in asm["ptx"] and "st.global.v4.b32" in asm["ptx"], "vectors of 16 bytes"
