"""linear_logps over the words that each token was sampled from: value, statistics and gradient, and what is refused."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from logratio.losses import Support, linear_logps
from logratio.losses.head import _tile
from logratio.losses.head._tile import CONSTANTS, STATS
from logratio.reference import oracle

from .._cases import pairwise
from ._heads import OPTIONS, head, near_certain

options = pytest.mark.parametrize("kwargs", OPTIONS.values(), ids=OPTIONS)
impls = pytest.mark.parametrize("impl", ["eager", "two_gemm"])
# of seven words and five targets; with None (all words) the products are of all words, else of six or three
LISTS = {
    "narrow": lambda y: [[y[t], (y[t] + 1) % 3, y[t]][: 1 + t % 3] for t in range(5)],
    "mixed": lambda y: [None, [y[1], 0], [y[2]], None, [6, 5, y[4], 1]],
    "wide": lambda y: [[v for v in range(7) if v == y[t] or v != t] for t in range(5)],
}
lists = pytest.mark.parametrize("make", LISTS.values(), ids=LISTS)


def support_of(words: list[list[int] | None], dtype: torch.dtype = torch.int32) -> Support:
    ends = [0]
    for own in words:
        ends.append(ends[-1] + len(own or ()))
    return Support(torch.tensor([v for own in words for v in own or ()], dtype=dtype), torch.tensor(ends))


def small_head() -> list[Tensor]:
    """Whose targets are among the first three words."""
    hidden, weight, bias, targets = head()
    return [hidden, weight, bias, targets % 3]


def run(tensors: list[Tensor], stats: tuple[str, ...] = STATS, trains: str = "hwb", **kwargs) -> dict[str, Tensor]:
    """Values, and gradients of a sum of all of them that tells rows and values apart."""
    leaves = [t.detach().clone().requires_grad_(n in trains) for n, t in zip("hwb", tensors, strict=False)]
    out = linear_logps(*leaves[:2], tensors[3], bias=leaves[2], stats=stats, **kwargs)
    values = {name: x for name, x in out._asdict().items() if x is not None}
    smooth = [x for name, x in values.items() if name not in CONSTANTS]
    torch.stack([(x * torch.linspace(1, 2 + i, len(x))).sum() for i, x in enumerate(smooth)]).sum().backward()
    return {k: x.detach() for k, x in values.items()} | {
        n: t.grad for n, t in zip("hwb", leaves, strict=True) if n in trains
    }


@options
@impls
@lists
def test_values_and_gradients_are_the_oracles(kwargs, impl, make):
    tensors = small_head()
    words = make(tensors[3].tolist())
    got = run(tensors, impl=impl, support=support_of(words), chunk_tokens=2, **kwargs)
    leaves = [t.clone().requires_grad_() for t in tensors[:3]]
    unique = [None if own is None else sorted(set(own)) for own in words]
    truth = oracle.token_logps(*leaves[:2], tensors[3], bias=leaves[2], support=unique, **kwargs)
    smooth = (truth.logps, truth.entropy, truth.log_z)
    torch.stack([(x * torch.linspace(1, 2 + i, 5)).sum() for i, x in enumerate(smooth)]).sum().backward()
    for name in ("logps", "entropy", "log_z", "log_sum_p2"):
        torch.testing.assert_close(got[name], getattr(truth, name).detach(), rtol=1e-12, atol=1e-13)
    for name, leaf in zip("hwb", leaves, strict=True):
        torch.testing.assert_close(got[name], leaf.grad, rtol=1e-11, atol=1e-13)


CHECKED = list(product(OPTIONS, LISTS, ("h", "hwb"), ((), ("entropy", "log_z"))))
MET = pairwise(OPTIONS, LISTS, ("h", "hwb"), ((), ("entropy", "log_z")))


@pytest.mark.parametrize(
    "options, words, trains, stats",
    [case if case in MET else pytest.param(*case, marks=pytest.mark.slow) for case in CHECKED],
)
def test_gradcheck(options, words, trains, stats):
    kwargs, make = OPTIONS[options], LISTS[words]
    hidden, weight, bias, targets = small_head()
    support = support_of(make(targets.tolist()))
    leaves = [t.requires_grad_(name in trains) for name, t in zip("hwb", (hidden, weight, bias), strict=True)]

    def call(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        out = linear_logps(
            hidden, weight, targets, bias=bias, support=support, stats=stats, impl="two_gemm", chunk_tokens=2, **kwargs
        )
        return tuple(x for x in out if x is not None)

    assert torch.autograd.gradcheck(call, leaves)


@impls
@lists
def test_words_outside_have_no_gradient_and_are_never_the_top(impl, make):
    hidden, weight, bias, targets = small_head()
    words = make(targets.tolist())
    hidden, weight = hidden.abs(), weight.clone()
    weight[3] = 50.0  # by far the most likely, but sampled by few
    got = run([hidden, weight, bias, targets], impl=impl, support=support_of(words))
    z = hidden @ weight.T + bias
    for t, own in enumerate(words):
        own = list(range(7)) if own is None else sorted(set(own))
        assert bool(got["is_top1"][t]) == (own[int(z[t, own].argmax())] == targets[t])
    everywhere = set(range(7)) if None in words else {v for own in words for v in own}
    for v in set(range(7)) - everywhere:
        assert not got["w"][v].any() and not got["b"][v]


@impls
def test_of_equal_logits_the_first_in_the_support_is_the_top(impl):
    """Words 1, 3 and 4 are equally likely; without word 1 it is word 3."""
    weight = torch.tensor([[1.0], [3.0], [2.0], [3.0], [3.0]])
    targets, words = torch.tensor([3, 4, 3, 1]), [[2, 4, 3], [0, 3, 4], None, [4, 1, 3]]
    got = linear_logps(torch.ones(4, 1), weight, targets, support=support_of(words), stats=("is_top1",), impl=impl)
    assert got.is_top1.tolist() == [True, False, False, True]


@pytest.mark.parametrize("trains", ["h", "hwb"])
@pytest.mark.parametrize("make", [head, near_certain])
@pytest.mark.parametrize("products", ["default", "half"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("narrow", [True, False])
def test_error_budget(trains, make, products, dtype, narrow, monkeypatch):
    """At most twice the error of masked full logits in the same dtype, both against float64."""
    if products == "half":
        monkeypatch.setattr(_tile, "product_dtype", lambda weight: weight.dtype)
    tensors = make(n=24, h=64, v=300, dtype=dtype)
    step = 40 if narrow else 3
    words = [sorted({y, *range(t % step, 300, step)}) for t, y in enumerate(tensors[3].tolist())]
    support = support_of(words if narrow else [None, *words[1:]])
    kwargs = {"support": support, "temperature": 1.8}  # at which p of few words is again below 1
    exact = [t.double() for t in tensors[:3]] + tensors[3:]
    ours, eager, truth = (
        run(inputs, ("entropy", "log_sum_p2"), trains, impl=impl, **kwargs)
        for inputs, impl in ((tensors, "two_gemm"), (tensors, "eager"), (exact, "eager"))
    )
    for name, true in truth.items():
        error, allowed = ((x[name].double() - true).norm().item() for x in (ours, eager))
        tiny = 4 * torch.finfo(torch.float32).eps * true.norm().item()
        assert error <= 2 * allowed + tiny, f"{name}: {error:.2e} against eager's {allowed:.2e}"


@st.composite
def cases(draw):
    """(head, words): up to five tokens of seven words, each with a support of its own or none."""
    n = draw(st.integers(1, 5))
    hidden, weight, bias, targets = head(n=n, seed=draw(st.integers(0, 99)))
    own = st.one_of(st.none(), st.sets(st.integers(0, 6), max_size=7))
    words = [draw(own) for _ in range(n)]
    return [3 * hidden, weight, bias, targets], [
        None if w is None else sorted(w | {y}) for w, y in zip(words, targets.tolist(), strict=True)
    ]


laws = settings(max_examples=40, deadline=None)


@laws
@given(cases())
def test_every_word_is_no_support(case):
    """Listed or not; not listed, to the last bit."""
    tensors, words = case
    none, empty = run(tensors), run(tensors, support=support_of([None] * len(words)))
    assert none.keys() == empty.keys() and all(torch.equal(none[k], empty[k]) for k in none)
    listed = run(tensors, support=support_of([list(range(7))] * len(words)))
    torch.testing.assert_close(listed, none, rtol=1e-12, atol=1e-13)


@laws
@given(cases(), st.data())
def test_fewer_words_make_the_target_likelier(case, data):
    tensors, words = case
    fewer = [
        sorted({y, *data.draw(st.sets(st.sampled_from(range(7) if w is None else w)))})
        for w, y in zip(words, tensors[3].tolist(), strict=True)
    ]
    more, less = (run(tensors, support=support_of(w))["logps"] for w in (words, fewer))
    assert (less >= more - 1e-12).all() and (less <= 1e-12).all()


@laws
@given(cases(), st.integers(1, 6), st.data())
def test_chunks_and_order_do_not_matter(case, chunk_tokens, data):
    (hidden, weight, bias, targets), words = case
    order = torch.tensor(data.draw(st.permutations(range(len(words)))))
    whole = run([hidden, weight, bias, targets], support=support_of(words))
    shuffled = [None if w is None else data.draw(st.permutations(w)) for w in words]
    support = support_of(shuffled, torch.int64).take(order)
    weights = torch.linspace(1, 2, len(words))
    leaves = [t.clone().requires_grad_() for t in (hidden[order], weight, bias)]
    out = linear_logps(
        *leaves[:2], targets[order], bias=leaves[2], support=support, stats=STATS, chunk_tokens=chunk_tokens
    )
    for name in ("logps", *STATS):
        torch.testing.assert_close(getattr(out, name).detach(), whole[name][order], rtol=1e-12, atol=1e-13)
    (out.logps * weights[order]).sum().backward()
    expected = run([hidden, weight, bias, targets], (), support=support_of(words))
    torch.testing.assert_close(leaves[0].grad, expected["h"][order], rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(leaves[1].grad, expected["w"], rtol=1e-11, atol=1e-12)


@laws
@given(cases())
def test_of_one_word_the_target_is_certain(case):
    tensors, _ = case
    got = run(tensors, support=support_of([[y] for y in tensors[3].tolist()]))
    for name in ("logps", "entropy", "log_sum_p2"):
        assert not got[name].any()
    assert got["is_top1"].all()
    alone = run(tensors, (), support=support_of([[y] for y in tensors[3].tolist()]))
    assert not any(alone[name].any() for name in "hwb")


@pytest.mark.parametrize("trains", ["h", "hw"])
def test_products_are_of_the_words_that_are_kept(trains):
    """The same two, or four, of three words in place of seven; of all where one token keeps all, or most are kept."""
    tensors = small_head()
    words = [[y, (y + 1) % 3] for y in tensors[3].tolist()]
    leaves = [t.requires_grad_(n in trains) for n, t in zip("hw", tensors, strict=False)]
    for own, of in ((words, 3), ([None, *words[1:]], 7), ([range(5), *words[1:]], 5), ([range(6), *words[1:]], 7)):
        with FlopCounterMode(display=False) as flops:
            linear_logps(*leaves[:2], tensors[3], support=support_of(own), impl="two_gemm").sum().backward()
        assert flops.get_total_flops() == (2 if trains == "h" else 4) * 2 * 5 * 3 * of


def test_no_tokens():
    got = run(head(n=0), support=support_of([]))
    assert got["logps"].shape == (0,) and not got["w"].any()


def test_what_a_sampler_has():
    """The mask of kept words, one step after the other; the supports of its tokens in another order."""
    kept = torch.tensor([[True, False, True], [True, True, True], [False, True, False], [False, True, True]])
    made = Support.of(kept)
    assert (made.ids.tolist(), made.offsets.tolist()) == ([0, 2, 1, 1, 2], [0, 2, 2, 3, 5])
    assert made.ids.dtype == torch.int32
    again = made.take(torch.tensor([3, 1, 0, 3]))
    assert (again.ids.tolist(), again.offsets.tolist()) == ([1, 2, 0, 2, 1, 2], [0, 2, 2, 4, 6])
    whole = Support.whole(2)
    assert (whole.ids.tolist(), whole.offsets.tolist()) == ([], [0, 0, 0])
    both = Support.cat([made.take(torch.tensor([2])), Support.whole(2), made.take(torch.tensor([0]))])
    assert (both.ids.tolist(), both.offsets.tolist()) == ([1, 0, 2], [0, 1, 1, 1, 3])


@pytest.mark.parametrize(
    ("ids", "offsets", "error", "message"),
    [
        ([0], [0, 1], ValueError, r"support must have ids \[M\] and offsets \[N \+ 1\] for targets \[2\], "
         r"got ids \[1\], offsets \[2\]"),
        ([[0]], [0, 1, 1], ValueError, r"got ids \[1, 1\], offsets \[3\]"),
        ([0.0], [0, 1, 1], TypeError, "torch.int32 or torch.int64 and offsets in torch.int64, got torch.float32 and"),
        ([0, 1], [1, 1, 2], ValueError, "the support's offsets must rise from 0 to 2, the number of its ids"),
        ([0, 1], [0, 1, 3], ValueError, "the support's offsets must rise from 0 to 2, the number of its ids"),
        ([0, 1], [0, 3, 2], ValueError, "the support's offsets must rise from 0 to 2, the number of its ids"),
        ([0, 7], [0, 1, 2], ValueError, r"the support's ids must be in \[0, 7\), got values from 0 to 7"),
        ([-1, 1], [0, 1, 2], ValueError, r"the support's ids must be in \[0, 7\), got values from -1 to 1"),
        ([0, 2, 3], [0, 1, 3], ValueError, "the target 1 of row 1 is not in its support of 2 words"),
    ],
)  # fmt: skip
def test_bad_supports(ids, offsets, error, message):
    hidden, weight, _, _ = head(n=2)
    with pytest.raises(error, match=message):
        linear_logps(hidden, weight, torch.tensor([0, 1]), support=Support(torch.tensor(ids), torch.tensor(offsets)))
