"""The Triton tile without a GPU and without an interpreter: what its kernels compile to, and when it is taken."""

import re
import sys
from types import SimpleNamespace

import pytest
import torch

from logratio.losses import linear_logps
from logratio.losses.head import logps
from logratio.losses.head._tile import TorchTile

from ._heads import head

triton = pytest.importorskip("triton")

from logratio.losses.head import _triton, _triton_once  # noqa: E402

LOW = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(("out", "once"), [("fp32", False), ("bf16", False), ("bf16", True)])
def test_compiles_without_a_gpu(arch, out, once, monkeypatch, tmp_path):
    """With all that can be asked for. Between a block's load and its store all warps meet; the logarithm is exact, as
    is 1 / total; where a row begins is computed in 64 bits."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = _triton_once.once_kernel if once else _triton._row_kernel
    constants = {"SOFTCAP": True, "SUPPORT": True, "BLOCK": (_triton_once if once else _triton).BLOCK}
    constants |= {} if once else {"OUT": triton.language.dtype(out)}
    types = {
        "targets": "*i64",
        "is_top1": "*i1",
        "bias": f"*{out}",
        "gradients": f"*{out}",
        "words": "i32",
        "stride": "i32",
    }
    types |= dict.fromkeys(("inner", "outer", "slope"), "fp32") | dict.fromkeys(constants, "constexpr")
    names = kernel.arg_names
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in ("tile", "words", "stride")}
    signature = {name: types.get(name, "*fp32") for name in names}
    source = triton.compiler.ASTSource(kernel, signature, constants, aligned)
    target = triton.backends.compiler.GPUTarget("cuda", arch, 32)
    asm = triton.compile(source, target, (_triton_once if once else _triton).LAUNCH).asm
    ptx = asm["ptx"]
    assert re.findall(r"arith\.muli %\S+, %\S+ : (i\d+)", asm["ttir"])[0] == "i64"
    assert "div.rn.f32" in ptx
    if once:  # between the stores of a block, in either pass, and that of y
        *_, of_y, _ = re.split(r"tt\.store [^\n]*ptr<bf16>", asm["ttir"])
        assert "barrier" in of_y
    else:
        *_, between = re.split(r"ld\.global\S*v4", ptx)
        between, *stores = re.split(r"st\.global\S*v4", between)
        assert stores and "bar.sync" in between
    assert "lg2.approx" not in ptx and "ld.global.nc" not in ptx


def test_auto_takes_triton_on_a_gpu_but_for_float64(monkeypatch):
    gpu, cpu = ({dtype: SimpleNamespace(is_cuda=on, dtype=dtype) for dtype in (torch.float64, *LOW)} for on in (1, 0))
    for dtype in LOW:
        assert logps._tile("auto", gpu[dtype]) is _triton.TritonTile
        assert logps._tile("auto", cpu[dtype]) is logps._tile("two_gemm", gpu[dtype]) is TorchTile
        assert logps._tile("triton", cpu[dtype]) is _triton.TritonTile
    assert logps._tile("auto", gpu[torch.float64]) is TorchTile
    logps._triton_tile.cache_clear()
    monkeypatch.setitem(sys.modules, _triton.__name__, None)  # as where triton is not installed
    assert logps._tile("auto", gpu[torch.float32]) is TorchTile
    with pytest.raises(ImportError):
        logps._tile("triton", gpu[torch.float32])


def test_what_triton_does_not_take():
    hidden, weight, _, targets = head()
    with pytest.raises(TypeError, match="impl='triton' computes in float32, for float64 use impl='two_gemm'"):
        linear_logps(hidden, weight, targets, impl="triton")
    with pytest.raises(ValueError, match="impl='triton' needs CUDA tensors, got cpu"):
        linear_logps(hidden.float(), weight.float(), targets, impl="triton")
