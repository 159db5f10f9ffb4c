"""linear_logps: how many products it takes, and how many tiles it makes."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from logratio.losses import linear_logps
from logratio.losses.head import _tile
from logratio.losses.head._tile import STATS
from logratio.losses.head._two_gemm import _in_parts, _parts

from ._heads import head


class Products:
    """Counts matrix products in units of 2 N H V operations."""

    def __init__(self, tensors: list[Tensor]):
        (n, h), v = tensors[0].shape, len(tensors[1])
        self.unit, self.mode = 2 * n * h * v, FlopCounterMode(display=False)

    def __enter__(self) -> "Products":
        self.mode.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self.mode.__exit__(*exc)
        self.count = self.mode.get_total_flops() / self.unit


@pytest.mark.parametrize("with_stats", [False, True])
@pytest.mark.parametrize(
    ("trains", "expected"),
    [("h", 2), ("hw", 4), ("hwb", 4), ("w", 3)],
)
def test_products_of_a_training_step(trains, expected, with_stats):
    tensors = head()
    leaves = [t.requires_grad_(name in trains) for t, name in zip(tensors, "hwb", strict=False)]
    with Products(tensors) as products:
        stats = STATS if with_stats else None
        out = linear_logps(leaves[0], leaves[1], tensors[3], bias=leaves[2], stats=stats, chunk_tokens=2)
        (out.logps if with_stats else out).sum().backward()  # as metrics they cost no product
    assert products.count == expected


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_without_gradient_one_product(context, requires_grad):
    tensors = head()
    tensors[0].requires_grad_(requires_grad)
    with context(), Products(tensors) as products:
        logps = linear_logps(tensors[0], tensors[1], tensors[3], chunk_tokens=2)
    assert products.count == 1
    assert not logps.requires_grad


class Allocations(TorchDispatchMode):
    """Numbers of elements of every storage that operations made, beside those of the inputs."""

    def __init__(self, *inputs: Tensor) -> None:
        super().__init__()
        self.inputs = {t.untyped_storage().data_ptr() for t in inputs}
        self.storages: dict[int, tuple[Tensor, int]] = {}  # kept alive, so that no address comes twice

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, Tensor):
                storage = t.untyped_storage()
                if storage.data_ptr() not in self.inputs:
                    self.storages.setdefault(storage.data_ptr(), (t, storage.nbytes() // t.element_size()))
        return out

    def numels(self) -> Iterator[int]:
        return (numel for _, numel in self.storages.values())


@pytest.fixture
def one_row_of_scratch(monkeypatch):
    monkeypatch.setitem(_tile.SCRATCH, "cpu", 1)


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"temperature": 0.7, "logit_scale": 3.0},
        {"softcap": 2.0},
        {"stats": STATS},
        {"stats": STATS, "softcap": 2.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("with_bias", [False, True])
def test_frozen_head_makes_one_tile_for_all_chunks(kwargs, with_bias, one_row_of_scratch):
    """No tensor of N V elements, and however many chunks, whatever is asked for, one [chunk, V] tile."""
    n, v, chunk = 12, 1000, 3
    hidden, weight, bias, targets = head(n, 4, v, dtype=torch.float32)
    with Allocations(hidden, weight, bias, targets) as made:
        kwargs = kwargs | {"bias": bias if with_bias else None}
        out = linear_logps(hidden.requires_grad_(), weight, targets, chunk_tokens=chunk, **kwargs)
        (out[0] if "stats" in kwargs else out).sum().backward()
    assert sum(numel >= chunk * v for numel in made.numels()) == 1
    assert max(made.numels()) == chunk * v


def test_a_tile_has_no_more_rows_than_there_are_tokens():
    n, v = 3, 1000
    hidden, weight, _, targets = head(n, 4, v, dtype=torch.float32)
    with Allocations(hidden, weight, targets) as made:
        linear_logps(hidden.requires_grad_(), weight.requires_grad_(), targets, chunk_tokens=64).sum().backward()
    assert max(made.numels()) == v * 4 == weight.numel()


def test_frozen_head_keeps_one_tensor_for_the_backward_pass():
    hidden, weight, bias, targets = head(dtype=torch.float32)
    logps = linear_logps(hidden.requires_grad_(), weight, targets, bias=bias)
    assert [t.shape for t in logps.grad_fn.saved_tensors if t is not None] == [hidden.shape]


@pytest.mark.parametrize("entropy", [False, True])
def test_trainable_head_makes_no_logits(entropy, one_row_of_scratch):
    n, v, chunk = 24, 1000, 3
    hidden, weight, bias, targets = head(n, 4, v, dtype=torch.float32)
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    with Allocations(hidden, weight, bias, targets) as made:
        out = linear_logps(*leaves[:2], targets, bias=bias, chunk_tokens=chunk, stats=("entropy",) if entropy else None)
        (out.logps + out.entropy if entropy else out).sum().backward()
    tile_sized = [numel for numel in made.numels() if numel >= chunk * v]
    # forward and backward one tile each; [V, H] the gradient's sum, and autograd's copy of it
    assert sum(numel == chunk * v for numel in tile_sized) == 2
    assert max(tile_sized) == v * 4 < n * v
    assert sum(numel == v * 4 for numel in tile_sized) == 1  # the sum of all chunks alone


@pytest.mark.parametrize(
    ("rows", "words", "width", "processors", "parts"),
    [
        (4096, 151_936, 896, 132, 1),  # 32 x 4 blocks of an H200's processors
        (2048, 151_936, 896, 132, 2),
        (1024, 151_936, 896, 132, 4),
        (1024, 128_256, 4096, 132, 1),
        (128, 32_768, 64, 132, 8),
        (128, 50_257, 64, 132, 1),  # an odd number of words
        (128, 50_258, 64, 132, 1),  # whose half is odd
        (128, 50_256, 64, 132, 2),
        (129, 32_768, 257, 9, 2),  # 2 x 2 blocks
        (129, 32_768, 257, 8, 2),
        (129, 32_768, 257, 7, 1),
    ],
)
def test_parts_of_a_sum_over_the_words_fill_a_gpu_and_leave_nothing_out(rows, words, width, processors, parts):
    assert _parts(rows, words, width, processors) == parts


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_product_in_parts_is_the_product(count):
    """Of the front of wider rows, as a tile may have them; and without parts there is no sum of them."""
    g = torch.Generator().manual_seed(0)
    a = torch.randn(3, 16, generator=g, dtype=torch.float64)[:, :8]
    b = torch.randn(8, 5, generator=g, dtype=torch.float64)
    calls = []

    class Sums(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    with Sums():
        got = _in_parts(a, b, count)
    torch.testing.assert_close(got, a @ b, rtol=1e-12, atol=1e-12)
    assert ("sum" in calls) == (count > 1) and ("bmm" in calls) == (count > 1)
