"""Laws of an LM head: `check_kernel(fn)` holds one to them.

fn(hidden [N, H], weight [V, H], targets [N] int64) -> log p(target) [N], nats, with gradients to hidden and weight.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear, normalize

from .._verdicts import Broken, NotAsked, Report
from ..oracle.head import token_logps
from ._holding import hold, taken

RTOL = 1e-10
LOW = (torch.float32, torch.bfloat16, torch.float16)
Head = tuple[Tensor, Tensor, Tensor]
Fn = Callable[..., Tensor]


@dataclass(frozen=True)
class Asking:
    """A head, and what it can."""

    fn: Fn
    dtypes: Sequence[torch.dtype]
    trains_weight: bool
    ignore_index: int | None
    device: str

    def exact(self) -> torch.dtype:
        """What it computes in where rounding is not asked for; raises NotAsked without float64."""
        if torch.float64 not in self.dtypes:
            raise NotAsked("float64 is not among its dtypes")
        return torch.float64


def check_kernel(
    fn: Fn,
    *,
    dtypes: Sequence[torch.dtype] = (torch.float64, *LOW),
    trains_weight: bool = True,
    ignore_index: int | None = None,
    device: str = "cpu",
    laws: Collection[str] | None = None,
    skip: Collection[str] = (),
) -> Report:
    """Hold an LM head to its laws; raise LawViolation for the first that it breaks.

    dtypes: that it takes. trains_weight: whether it has a gradient to the weight. ignore_index: the target of rows that
    are not scored. Where `fn` takes `chunk_tokens`, it is called with several. laws, skip: see `check_loss`.
    """
    return hold(LAWS, Asking(fn, dtypes, trains_weight, ignore_index, device), laws, skip)


def make_head(n: int = 6, h: int = 5, v: int = 11, certain: bool = False) -> Head:
    """Random, float64. certain: targets of p about 0.999, where 1 - p is a small difference."""
    generator = torch.Generator().manual_seed(n)
    hidden, weight = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((n, h), (v, h)))
    targets = torch.randint(v, (n,), generator=generator)
    if certain:
        weight = normalize(weight, dim=1)
        hidden = 14.6 * weight[targets] + 0.02 * hidden
    return hidden, weight, targets


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Full logits, in the dtype of the inputs; their log-softmax in float32 at least."""
    logits = linear(hidden, weight)
    logps = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    return logps.gather(-1, targets[:, None])[:, 0]


def results(ask: Asking, fn: Fn, head: Head, dtype: torch.dtype, **options: int) -> dict[str, Tensor]:
    """The values, and the gradients of a sum that weighs the rows differently, on the CPU."""
    hidden, weight = (x.to(ask.device, dtype).requires_grad_() for x in (x.detach().clone() for x in head[:2]))
    weight.requires_grad_(ask.trains_weight)
    logps = fn(hidden, weight, head[2].to(ask.device), **options)
    if logps.shape != head[2].shape:
        raise Broken(f"log-probs {list(logps.shape)} for targets {list(head[2].shape)}")
    coefficients = torch.linspace(-1, 1.3, len(logps), dtype=torch.float64, device=ask.device)
    (logps * coefficients.to(logps.dtype)).sum().backward()
    found = {"log-probs": logps.detach(), "gradient of hidden": hidden.grad, "gradient of weight": weight.grad}
    if hidden.grad is None or (weight.grad is None) == ask.trains_weight:
        raise Broken("there is no gradient of what trains, or one of what does not")
    return {name: x.double().cpu() for name, x in found.items() if x is not None}


def definition(ask: Asking) -> None:
    """In float64, value and gradient are those of h . w_y - log sum_v exp(h . w_v)."""
    exact = ask.exact()
    for head in (make_head(1, 1, 2), make_head(), make_head(certain=True)):
        ours = results(ask, ask.fn, head, exact)
        cpu = Asking(ask.fn, ask.dtypes, ask.trains_weight, None, "cpu")
        _same(ours, results(cpu, lambda h, w, y: token_logps(h, w, y).logps, head, exact), _sizes(head))


def chunks(ask: Asking) -> None:
    """The size of chunks changes nothing."""
    if "chunk_tokens" not in taken(ask.fn, ("chunk_tokens",)):
        raise NotAsked("fn takes no chunk_tokens")
    head = make_head()
    whole = results(ask, ask.fn, head, ask.exact(), chunk_tokens=100)
    for rows in (1, 2, 4, 5, 6):
        _same(results(ask, ask.fn, head, torch.float64, chunk_tokens=rows), whole, f"chunk_tokens={rows} against 100")


def no_rows(ask: Asking) -> None:
    """Without a row there is no value, and the gradients are 0."""
    hidden, weight, targets = make_head()
    out = results(ask, ask.fn, (hidden[:0], weight, targets[:0]), ask.dtypes[0])
    if any(x.any() for x in out.values()):
        raise Broken("a gradient of no rows is not 0")


def rows_alone(ask: Asking) -> None:
    """A row's value, and the gradient of its hidden state, depend on no other row, be it NaN."""
    hidden, weight, targets = make_head()
    frozen = Asking(ask.fn, ask.dtypes, False, None, ask.device)
    whole = results(frozen, ask.fn, (hidden, weight, targets), ask.dtypes[0])
    spoiled = hidden.clone()
    spoiled[2] = torch.nan
    got = results(frozen, ask.fn, (spoiled, weight, targets), ask.dtypes[0])
    others = [i for i in range(len(hidden)) if i != 2]
    _same({k: x[others] for k, x in got.items()}, {k: x[others] for k, x in whole.items()}, "a row is NaN")


def large_logits(ask: Asking) -> None:
    """Logits of 1e4 overflow nothing: value and gradient are finite, the value at most 0."""
    for dtype in (dtype for dtype in ask.dtypes if dtype != torch.float16):
        hidden, weight, targets = make_head()
        out = results(ask, ask.fn, (1e2 * hidden, 1e2 * weight, targets), dtype)
        for name, x in out.items():
            if not x.isfinite().all():
                raise Broken(f"{dtype}: {name} is not finite")
        if (out["log-probs"] > 0).any():
            raise Broken(f"{dtype}: a probability is {out['log-probs'].max().exp():.6g}")


def ignored(ask: Asking) -> None:
    """Rows of the target `ignore_index` give exactly 0 to every gradient, be they NaN, and the others are as they are
    without them."""
    if ask.ignore_index is None:
        raise NotAsked("it has no ignore_index")
    hidden, weight, targets = make_head()
    out = [2, 5]
    kept = [i for i in range(len(targets)) if i not in out]
    spoiled, marked = hidden.clone(), targets.clone()
    spoiled[out], marked[out] = torch.nan, ask.ignore_index
    got = results(ask, ask.fn, (spoiled, weight, marked), ask.dtypes[0])
    if got["gradient of hidden"][out].any() or got["gradient of hidden"][out].isnan().any():
        raise Broken("the gradient of an ignored row is not 0")

    def weighed(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return plain(h.nan_to_num(), w, y) * torch.tensor([float(i in kept) for i in range(len(y))]).to(h)

    expected = results(ask, weighed, (spoiled, weight, targets), ask.dtypes[0])
    for x in (got, expected):
        x["log-probs"] = x["log-probs"][kept]
    _same(got, expected, "with rows that are ignored", RTOL if ask.dtypes[0] == torch.float64 else 1e-4)


def budget(ask: Asking) -> None:
    """In low precision, the error against float64 is at most twice that of full logits in the same dtype, value and
    gradient."""
    low = [dtype for dtype in ask.dtypes if dtype != torch.float64]
    if not low:
        raise NotAsked("float64 is all that it takes")
    for dtype in low:
        for certain in (False, True):
            head = make_head(24, 64, 300, certain)
            rounded = (head[0].to(dtype).double(), head[1].to(dtype).double(), head[2])
            exact = results(ask, plain, rounded, torch.float64)
            eager, ours = (results(ask, fn, head, dtype) for fn in (plain, ask.fn))
            for name, truth in exact.items():
                error, allowed = ((x[name] - truth).norm().item() for x in (ours, eager))
                tiny = 4 * torch.finfo(torch.float32).eps * truth.norm().item()
                if not error <= 2 * allowed + tiny:
                    about = ", where p is about 0.999" if certain else ""
                    raise Broken(f"{dtype}, {name}: error {error:.2e} against {allowed:.2e}{about}")


LAWS: dict[str, Callable[[Asking], None]] = {
    law.__name__: law for law in (definition, chunks, no_rows, rows_alone, large_logits, ignored, budget)
}
"""In the order in which they are tried."""


def _sizes(head: Head) -> str:
    return f"{len(head[0])} rows, width {head[0].shape[1]}, {len(head[1])} words"


def _same(got: dict[str, Tensor], expected: dict[str, Tensor], words: str, rtol: float = RTOL) -> None:
    for name, x in expected.items():
        apart = (got[name] - x).abs().max().item()
        if not apart <= rtol * max(x.abs().max().item(), 1.0):
            raise Broken(f"{words}: {name} is off by {apart:.3g}")
