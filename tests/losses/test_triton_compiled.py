"""The Triton tile without a GPU and without an interpreter: what its kernels compile to, and when it is taken."""

import re
import sys
from itertools import pairwise, product
from types import SimpleNamespace

import pytest
import torch

from logratio.losses import linear_logps
from logratio.losses.head import jsd, logps
from logratio.losses.head._jsd_tile import JsdTile
from logratio.losses.head._tile import TorchTile

from ._heads import head

triton = pytest.importorskip("triton")

from logratio.losses.head import _triton, _triton_jsd, _triton_once  # noqa: E402

LOW = (torch.float32, torch.bfloat16, torch.float16)


def compiled(kernel, constants, types, launch, arch):
    """The assembly, of arguments that are float32 unless `types` has them."""
    integers = dict.fromkeys(("words", "stride"), "i32")
    types = integers | types | dict.fromkeys(constants, "constexpr")
    names = kernel.arg_names
    begins = [name for name in ("tile", "of_teacher", "words", "stride") if name in names]
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in begins}
    signature = {name: types.get(name, "*fp32") for name in names}
    source = triton.compiler.ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, triton.backends.compiler.GPUTarget("cuda", arch, 32), launch).asm


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(("out", "once"), [("fp32", False), ("bf16", False), ("bf16", True)])
def test_compiles_without_a_gpu(arch, out, once, monkeypatch, tmp_path):
    """With all that can be asked for. Between a block's load and its store all warps meet; the logarithm is exact, as
    is 1 / total; where a row begins is computed in 64 bits."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = _triton_once.once_kernel if once else _triton._row_kernel
    constants = {"SOFTCAP": True, "SUPPORT": True, "BLOCK": (_triton_once if once else _triton).BLOCK}
    constants |= {} if once else {"OUT": triton.language.dtype(out)}
    types = {"targets": "*i64", "is_top1": "*i1", "bias": f"*{out}", "gradients": f"*{out}"}
    types |= dict.fromkeys(("inner", "outer", "slope"), "fp32")
    asm = compiled(kernel, constants, types, (_triton_once if once else _triton).LAUNCH, arch)
    ptx = asm["ptx"]
    assert re.findall(r"arith\.muli %\S+, %\S+ : (i\d+)", asm["ttir"])[0] == "i64"
    assert "div.rn.f32" in ptx
    if once:  # between the stores of a block, in either pass, and that of y
        *_, of_y, _ = re.split(r"tt\.store [^\n]*ptr<bf16>", asm["ttir"])
        assert "barrier" in of_y
    else:
        check_block(ptx)
    assert "lg2.approx" not in ptx and "ld.global.nc" not in ptx


@pytest.mark.parametrize(("arch", "out", "kind"), [(80, "fp32", "BETWEEN"), (90, "bf16", "FORWARD")])
def test_a_divergence_compiles_without_a_gpu(arch, out, kind, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = {"SOFTCAP": True, "TEACHER_SOFTCAP": True, "KIND": getattr(_triton_jsd, kind)}
    constants |= {"OUT": triton.language.dtype(out), "BLOCK": _triton_jsd.BLOCK}
    types = {"bias": f"*{out}", "teacher_bias": "*fp32"}
    types |= dict.fromkeys(("inner", "outer", "slope", "teacher_inner", "teacher_outer", "beta"), "fp32")
    asm = compiled(_triton_jsd.jsd_kernel, constants, types, _triton_jsd.LAUNCH, arch)
    assert re.findall(r"arith\.muli %\S+, %\S+ : (i\d+)", asm["ttir"])[0] == "i64"
    check_block(asm["ptx"])
    assert "lg2.approx" not in asm["ptx"] and "ld.global.nc" not in asm["ptx"]


def check_block(ptx):
    """All warps meet between the loads of a block and its stores, whatever the order in which they are written down."""
    done = re.findall(r"ld\.global|st\.global\S*\.v\d|bar\.sync", ptx)
    before = [last for last, op in pairwise(done) if op.startswith("st") and not last.startswith("st")]
    assert set(before) == {"bar.sync"}


def test_auto_takes_triton_on_a_gpu_but_for_float64(monkeypatch):
    gpu, cpu = ({dtype: SimpleNamespace(is_cuda=on, dtype=dtype) for dtype in (torch.float64, *LOW)} for on in (1, 0))
    for dtype in LOW:
        assert logps._tile("auto", gpu[dtype]) is _triton.TritonTile
        assert logps._tile("auto", cpu[dtype]) is logps._tile("two_gemm", gpu[dtype]) is TorchTile
        assert logps._tile("triton", cpu[dtype]) is _triton.TritonTile
    assert logps._tile("auto", gpu[torch.float64]) is TorchTile
    for pair in product(LOW, LOW):
        on, off = ([device[dtype] for dtype in pair] for device in (gpu, cpu))
        assert jsd._tile("auto", *on) is _triton_jsd.TritonJsdTile
        assert jsd._tile("auto", *off) is jsd._tile("two_gemm", *on) is JsdTile
    for pair in ((torch.float64, torch.float32), (torch.bfloat16, torch.float64)):
        assert jsd._tile("auto", *(gpu[dtype] for dtype in pair)) is JsdTile
    logps._triton_tile.cache_clear()
    for module in (_triton, _triton_jsd):
        monkeypatch.setitem(sys.modules, module.__name__, None)  # as where triton is not installed
    assert logps._tile("auto", gpu[torch.float32]) is TorchTile
    assert jsd._tile("auto", gpu[torch.float32], gpu[torch.float32]) is JsdTile
    with pytest.raises(ImportError):
        logps._tile("triton", gpu[torch.float32])


def test_what_triton_does_not_take():
    hidden, weight, _, targets = head()
    with pytest.raises(TypeError, match="impl='triton' computes in float32, for float64 use impl='two_gemm'"):
        linear_logps(hidden, weight, targets, impl="triton")
    with pytest.raises(ValueError, match="impl='triton' needs CUDA tensors, got cpu"):
        linear_logps(hidden.float(), weight.float(), targets, impl="triton")
