"""The Triton tile: on a GPU (`pytest -m gpu`), and everywhere else in Triton's interpreter, on CPU tensors.

Triton decides at its first import whether to interpret, so a process of its own runs this file and `test_triton_jsd.py`
under the interpreter (`test_under_the_interpreter`); there the tests marked `gpu` in both run, small ones that is,
without the mark.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from logratio.losses import Support, linear_logps
from logratio.losses.head._tile import STATS, Coefficients, TorchTile, Transform

from .._cases import pairwise
from ._heads import OPTIONS, head, near_certain

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from logratio.losses.head import _triton, _triton_once  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
LOW = (torch.float32, torch.bfloat16, torch.float16)
options = pytest.mark.parametrize("kwargs", [OPTIONS[k] for k in ("plain", "softcap", "all")], ids=str)
dtypes = pytest.mark.parametrize("dtype", LOW, ids=str)
kernels = pytest.mark.parametrize(
    ("dtype", "learns"),
    [(torch.float32, True), (torch.bfloat16, True), (torch.bfloat16, False)],
    ids=["two passes", "one pass", "no gradient"],
)
# The interpreter takes its time: there every two of them meet, on a GPU all.
meeting = pairwise if INTERPRETED else lambda *axes: list(product(*axes))
budgets = pytest.mark.parametrize("name, dtype, make", meeting(("plain", "softcap", "all"), LOW, (head, near_certain)))


@triton.jit
def _count(out, n):
    for i in range(n):
        tl.store(out + i, i)


def skip_without_an_interpreter() -> None:
    """Skip this file where Triton's interpreter cannot even count, as 3.6's cannot with numpy 2.4 or later."""
    try:
        _count[(1,)](torch.zeros(2), 2)
    except triton.runtime.errors.InterpreterError as error:
        found = f"triton {triton.__version__} with numpy {version('numpy')}"
        pytest.skip(f"the interpreter of {found} does not work: {error}", allow_module_level=True)


if INTERPRETED:
    skip_without_an_interpreter()


def on_device(test: Callable) -> Callable:
    return test if INTERPRETED else pytest.mark.gpu(test)


@pytest.fixture(autouse=True)
def round_to_nearest(monkeypatch):
    """Triton's interpreter cuts float32 off to bfloat16, with twice the error of a GPU, which rounds to nearest."""
    if not INTERPRETED:
        return
    from triton.runtime import interpreter

    cut_off = interpreter._convert_float

    def convert(x, dtype, to, mode):
        if (dtype, to) == (triton.language.float32, triton.language.bfloat16):
            bits = x.view("uint32")
            x = (bits + 0x7FFF + (bits >> 16 & 1)).view("float32")
        return cut_off(x, dtype, to, mode)

    monkeypatch.setattr(interpreter, "_convert_float", convert)


@pytest.fixture
def several_blocks(monkeypatch):
    """Two a row of 300 words, the last of 44; rows of 304 words of memory."""
    set_blocks(monkeypatch, 256)


def set_blocks(monkeypatch: pytest.MonkeyPatch, words: int) -> None:
    for kernels in (_triton, _triton_once):
        monkeypatch.setattr(kernels, "BLOCK", words)


def rising(rises: float, n: int, h: int, v: int, dtype: torch.dtype) -> list[Tensor]:
    """Logits that rise from the first word to the last; targets at both ends and between."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(n, h, generator=g) / h**0.5, torch.randn(v, h, generator=g)
    hidden[:, 0], weight[:, 0] = 1.0, rises * torch.arange(v) / v
    targets = torch.tensor([0, 1, 40, 150, 298, 299]).repeat(n // 6)
    return [hidden.to(dtype), weight.to(dtype), torch.zeros(v, dtype=dtype), targets]


def run(
    tensors: list[Tensor], stats: tuple[str, ...], coefficients: Tensor, trains: str, **kwargs
) -> dict[str, Tensor]:
    """Values, and the gradients of their sum weighted by coefficients [1 + stats, N], of fresh leaves on DEVICE."""
    moved = [t.detach().to(DEVICE).requires_grad_(n in trains) for n, t in zip("hwb", tensors, strict=False)]
    out = linear_logps(*moved[:2], tensors[3].to(DEVICE), bias=moved[2], stats=stats, **kwargs)
    values = {name: value for name, value in out._asdict().items() if value is not None}
    weighted = [(v * c.to(v)).sum() for v, c in zip(values.values(), coefficients, strict=False) if v.requires_grad]
    torch.stack(weighted).sum().backward()
    grads = {n: t.grad for n, t in zip("hwb", moved, strict=True) if t.grad is not None}
    return {name: t.detach() for name, t in (values | grads).items()}


def within_budget(
    make: Callable, dtype: torch.dtype, stats: tuple[str, ...], trains: str, n: int = 24, **kwargs
) -> None:
    """At most twice the error of full logits in the same dtype, both against float64."""
    tensors = make(n=n, h=64, v=300, dtype=dtype)
    coefficients = torch.randn(4, n, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    exact = [t.double() for t in tensors[:3]] + tensors[3:]
    ours, eager, truth = (
        run(inputs, stats, coefficients, trains, impl=impl, **kwargs)
        for inputs, impl in ((tensors, "triton"), (tensors, "eager"), (exact, "eager"))
    )
    assert ours.keys() == truth.keys() == {"logps", *stats, *trains}
    for name, true in truth.items():
        assert ours[name].dtype == eager[name].dtype
        error, allowed = ((x[name].double() - true.double()).norm().item() for x in (ours, eager))
        tiny = 4 * torch.finfo(torch.float32).eps * true.double().norm().item()
        assert error <= 2 * allowed + tiny, f"{name}: {error:.2e} against eager's {allowed:.2e}"


@on_device
@budgets
def test_frozen_head_is_within_the_error_budget(name, dtype, make, several_blocks):
    within_budget(make, dtype, (), "h", n=6 if INTERPRETED else 24, **OPTIONS[name])


@on_device
@budgets
def test_everything_trained_is_within_the_error_budget(name, dtype, make, several_blocks):
    """Values and gradients of log-probs, entropy and log Z, to hidden, weight and bias, in chunks that leave a rest."""
    within_budget(make, dtype, STATS, "hwb", n=6 if INTERPRETED else 24, chunk_tokens=4, **OPTIONS[name])


@on_device
@dtypes
@pytest.mark.parametrize(
    ("make", "trains", "first"), [(head, "h", None), (near_certain, "hwb", None), (head, "hwb", "narrow")]
)
def test_over_a_support_it_is_within_the_error_budget(dtype, make, trains, first, several_blocks):
    """Each token's own words, of both blocks or of one, but for the first token's, which are all; or of few words."""
    n = 6 if INTERPRETED else 24
    step = 40 if first else 3
    kept = torch.zeros(n, 300, dtype=torch.bool)
    for t, y in enumerate(make(n=n, h=64, v=300)[3].tolist()):
        kept[t, t % 2 * 256 + t :: step] = True
        kept[t, y] = True
    kept[0] |= first is None
    support = Support.of(kept)
    assert (support.offsets[1] == 0) == (first is None)
    stats = STATS if trains != "h" else ("is_top1",)
    within_budget(make, dtype, stats, trains, n, support=support, softcap=15.0, temperature=1.8)


@on_device
@pytest.mark.parametrize("kwargs", [{}, {"softcap": 60.0}], ids=str)
@pytest.mark.parametrize(("rises", "stats"), [(40.0, ("log_sum_p2", "is_top1")), (120.0, ("is_top1",)), (120.0, STATS)])
def test_targets_far_below_the_largest_are_within_the_error_budget(rises, stats, kwargs, monkeypatch):
    """Logits that rise over ten blocks, by e^40 and e^120: the one pass goes over rows again."""
    set_blocks(monkeypatch, 32)

    within_budget(partial(rising, rises), torch.bfloat16, stats, "h", n=6, **kwargs)


@on_device
@pytest.mark.parametrize("rises", [0.0, 10.0, 40.0])
@torch.no_grad()
def test_statistics_without_a_gradient_are_within_the_error_budget(rises, several_blocks):
    tensors = [t.to(DEVICE) for t in rising(rises, 24, 64, 300, torch.float32)]
    exact = [t.double() for t in tensors[:2]] + tensors[3:]
    ours, eager, truth = (
        linear_logps(*inputs, stats=STATS, impl=impl)
        for inputs, impl in (
            ([*tensors[:2], tensors[3]], "triton"),
            ([*tensors[:2], tensors[3]], "eager"),
            (exact, "eager"),
        )
    )
    assert torch.equal(ours.is_top1, truth.is_top1)
    for name in ("logps", "entropy", "log_z", "log_sum_p2"):
        error, allowed = ((getattr(x, name).double() - getattr(truth, name)).norm() for x in (ours, eager))
        tiny = 4 * torch.finfo(torch.float32).eps * getattr(truth, name).norm()
        assert error <= 2 * allowed + tiny, name


@on_device
@pytest.mark.parametrize("stats", [("entropy",), ("log_z",), ("log_sum_p2",), ("is_top1",)])
def test_a_statistic_alone(stats):
    """With the default block, and no bias to be trained."""
    within_budget(head, torch.float32, stats, "h", n=6 if INTERPRETED else 24, temperature=0.7)


@on_device
@pytest.mark.parametrize("chunk_tokens", [1, 2, 100])
@pytest.mark.parametrize("trains", ["h", "hwb"])
def test_chunks_strides_and_blocks_do_not_matter(chunk_tokens, trains, monkeypatch):
    set_blocks(monkeypatch, 4)
    tensors, ones = head(dtype=torch.float32), torch.ones(1, 5)
    expected = run(tensors, (), ones, trains, impl="eager")
    strided = [torch.stack([t, t + 1], -1)[..., 0] for t in tensors]
    strided[1] = torch.stack([tensors[1].t(), tensors[1].t()], -1)[..., 0].t()
    got = run(strided, (), ones, trains, impl="triton", chunk_tokens=chunk_tokens)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@on_device
@options
@dtypes
def test_gradient_in_place(kwargs, dtype, several_blocks):
    """In the front of its row's float32 memory, whatever was beyond the row's words, and right to a rounding."""
    hidden, weight, bias, targets = (t.to(DEVICE) for t in head(n=3, h=8, v=300, dtype=dtype))
    transform = Transform(**({"temperature": 1.0, "logit_scale": 1.0, "softcap": None} | kwargs))
    args = {"transform": transform, "rows": 4}
    ours = _triton.TritonTile(weight, bias, **args)
    theirs = TorchTile(weight.float(), bias.float(), **args)  # on a GPU its half-precision logits would be rounded
    ours._logits.fill_(float("nan"))
    coefficients = torch.randn(4, 3, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    entropy = theirs.rows(hidden.float(), targets, None, ("entropy",), None).stats["entropy"]
    coefficients = Coefficients(*coefficients)._replace(entropy=entropy)
    got = ours.rows(hidden.to(ours.weight.dtype), targets, None, (), coefficients)
    expected = theirs.rows(hidden.float(), targets, None, (), coefficients)
    assert got.gradient.dtype == dtype and got.gradient.data_ptr() == ours._logits.data_ptr()
    assert got.gradient.stride() == (304 * 4 // weight.element_size(), 1)
    eps = torch.finfo(dtype).eps if dtype != torch.float32 or INTERPRETED else 4 * torch.finfo(dtype).eps
    atol = 1e-6 if INTERPRETED else 5e-6  # products in float32 are added up in another order
    torch.testing.assert_close(got.gradient.float(), expected.gradient, rtol=eps, atol=atol)
    torch.testing.assert_close(got.logps, expected.logps, rtol=1e-5, atol=1e-4)


@on_device
@dtypes
@pytest.mark.parametrize("trains", ["h", "hw"])
@pytest.mark.parametrize("block", [2, 4096])
def test_extreme_logits_are_finite(dtype, trains, block, monkeypatch):
    """Logits of +-1e4, targets on top and at the bottom: log-probs of 0 and -2e4, entropy 0."""
    set_blocks(monkeypatch, block)
    hidden = torch.tensor([[100.0], [-100.0], [100.0]], dtype=dtype, device=DEVICE)
    weight = torch.tensor([[100.0], [-100.0], [0.0]], dtype=dtype, device=DEVICE)
    leaves = [hidden.requires_grad_(), weight.requires_grad_("w" in trains)]
    out = linear_logps(*leaves, torch.tensor([0, 0, 2], device=DEVICE), stats=STATS, impl="triton")
    assert out.logps.tolist() == pytest.approx([0.0, -2e4, -1e4], rel=1e-2, abs=0)
    assert out.entropy.tolist() == out.log_sum_p2.tolist() == [0.0, 0.0, 0.0]
    (out.logps + out.entropy).sum().backward()
    assert all(t.grad.isfinite().all() for t in leaves if t.requires_grad)
    torch.testing.assert_close(hidden.grad.flatten().tolist(), [0.0, 200.0, -100.0])


@on_device
@dtypes
def test_no_tokens(dtype):
    got = run(head(n=0, dtype=dtype), STATS, torch.ones(4, 0), "hwb", impl="triton")
    assert got["logps"].shape == got["entropy"].shape == (0,)
    assert got["w"].shape == (7, 3) and not got["w"].any() and not got["b"].any()


@on_device
@kernels
@pytest.mark.parametrize("kwargs", [{}, {"softcap": 2.0}])
def test_nan_is_not_hidden(kwargs, dtype, learns):
    hidden, weight, _, targets = (t.to(DEVICE) for t in head(dtype=dtype))
    hidden[1, 0] = float("nan")
    out = linear_logps(hidden.requires_grad_(learns), weight, targets, impl="triton", **kwargs)
    assert out.isnan().tolist() == [False, True, False, False, False]


@on_device
@kernels
@pytest.mark.parametrize("block", [2, 4096])
def test_of_equal_logits_the_first_is_the_top(dtype, learns, block, monkeypatch):
    """In its block or over several, and in a support the first of those that are in it."""
    set_blocks(monkeypatch, block)
    weight = torch.tensor([[1.0], [3.0], [2.0], [3.0], [3.0]], device=DEVICE).to(dtype)
    hidden = torch.tensor([[1.0]] * 5 + [[-1.0], [-1.0], [0.0], [0.0]], device=DEVICE).to(dtype)
    hidden.requires_grad_(learns)
    targets = torch.tensor([0, 1, 2, 3, 4, 0, 1, 0, 1], device=DEVICE)
    call = {"impl": "triton", "stats": ("is_top1",), "chunk_tokens": 4}
    got = linear_logps(hidden, weight, targets, **call).is_top1
    assert got.tolist() == [False, True, False, False, False, True, False, True, False]
    kept = torch.ones(9, 5, dtype=torch.bool)
    kept[3:5, 1] = False  # then words 3 and 4 are the largest
    kept[8, 0] = False
    got = linear_logps(hidden, weight, targets, support=Support.of(kept), **call).is_top1
    assert got.tolist() == [False, True, False, True, False, True, False, True, True]


@on_device
@pytest.mark.parametrize("coefficient", [1e4, -1e7])
def test_a_large_weight_of_the_entropy_meets_no_word_outside(coefficient):
    """-1e30 times it, times p = 0."""
    hidden, weight, _, targets = (t.to(DEVICE) for t in head(dtype=torch.float32))
    kept = torch.nn.functional.one_hot(targets, 7).bool() | (torch.arange(7, device=DEVICE) % 3 == 0)
    kept[0] = True
    out = linear_logps(
        hidden.requires_grad_(), weight, targets, support=Support.of(kept), stats=("entropy",), impl="triton"
    )
    (coefficient * out.entropy.sum()).backward()
    assert out.entropy.isfinite().all() and hidden.grad.isfinite().all() and hidden.grad.any()


@on_device
def test_tanh_is_as_good_as_float32s():
    x = torch.cat([torch.linspace(-30, 30, 41), torch.logspace(-6, 0.5, 41)])[:, None].to(DEVICE)
    head = torch.ones(1, 1, device=DEVICE), torch.zeros(len(x), dtype=torch.int64, device=DEVICE)
    got = linear_logps(x, *head, softcap=1.0, stats=("log_z",), impl="triton").log_z  # of one word: its logit
    torch.testing.assert_close(got.double(), x[:, 0].double().tanh(), rtol=4e-7, atol=0)


@on_device
def test_the_slope_of_a_saturated_soft_cap():
    """Where tanh is 1 - 1e-3 to 1 - 1e-10: 1 - tanh^2 would be noise, and then 0."""
    x, weight = torch.linspace(4, 12, 9)[:, None], torch.tensor([[1.0], [0.0]])
    tensors = [x, weight, torch.zeros(2), torch.zeros(9, dtype=torch.int64)]
    exact = [t.double() for t in tensors[:3]] + tensors[3:]
    got, expected = (
        run(inputs, (), torch.ones(1, 9), "h", impl=impl, softcap=1.0)["h"]
        for inputs, impl in ((tensors, "triton"), (exact, "eager"))
    )
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=0)


@on_device
@pytest.mark.parametrize(("trains", "products"), [("", 1), ("h", 2), ("hw", 4)])
def test_products(trains, products):
    tensors = [t.to(DEVICE) for t in head(dtype=torch.float32)]
    leaves = [t.requires_grad_(n in trains) for n, t in zip("hw", tensors, strict=False)]
    with FlopCounterMode(display=False) as flops:
        out = linear_logps(*leaves, tensors[3], impl="triton", chunk_tokens=2)
        if trains:
            out.sum().backward()
    assert flops.get_total_flops() == products * 2 * 5 * 3 * 7


FIRST = "not everything_trained and not over_a_support and not (test_triton_jsd and (hwb or however_far))"
"""What the default form runs there; the rest of both kinds takes longer than all of it."""


@pytest.mark.skipif(INTERPRETED, reason="runs these files")
@pytest.mark.parametrize("chosen", [FIRST + " or near_certain and hwb", pytest.param("", marks=pytest.mark.slow)])
def test_under_the_interpreter(chosen):
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    env = env | {"TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-W",
        "ignore::RuntimeWarning",
        "-p",
        "no:cacheprovider",
        "-k",
        chosen,
        __file__,
        str(Path(__file__).with_name("test_triton_jsd.py")),
    ]
    out = subprocess.run(command, env=env, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    if out.returncode == pytest.ExitCode.NO_TESTS_COLLECTED:
        pytest.skip(out.stdout[out.stdout.index("the interpreter of triton") :].splitlines()[0])
    assert out.returncode == 0, out.stdout[-5000:] + out.stderr[-2000:]
