"""The suite `head`: LM head and log-probabilities, forward and backward, ours beside everybody's.

A case is (hidden size H, vocabulary V, N tokens, dtype, head frozen or trainable, perhaps the divergence from a teacher
of the same shape, `divergence.py`). Work is counted as what a frozen head needs at least, 2 products of 2 N H V
operations (one more with a trainable head, and for a teacher), whatever a contestant really computes, and its rate is
held against the rate that the plain product of the same shapes reaches here: `share_of_gemm`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from logratio.losses import linear_logps
from logratio.trainers.ground.provenance import installed

from .clock import allocated_mib, free_memory, interleaved, peak_mem, percentiles, time_ms
from .steps.step import Figures, Refused, attempt


@dataclass(frozen=True)
class HeadCase:
    """One shape. name: of the model that it is taken from. beta: of the divergence in place of log-probabilities."""

    name: str
    hidden_size: int
    vocab_size: int
    num_tokens: int
    dtype: str
    trainable: bool
    beta: float | None = None

    @property
    def products(self) -> int:
        """That are needed at least."""
        return 2 + self.trainable + (self.beta is not None)

    @property
    def head(self) -> str:
        return "trainable" if self.trainable else "frozen"

    @property
    def case(self) -> str:
        what = "head" if self.beta is None else f"jsd{self.beta:g}"
        return f"{what}-{self.hidden_size}x{self.vocab_size}-{self.num_tokens}-{self.dtype}-{self.head}"

    def fields(self) -> dict[str, Any]:
        return {
            "model": self.name,
            "hidden_size": self.hidden_size,
            "vocab_size": self.vocab_size,
            "num_tokens": self.num_tokens,
            "dtype": self.dtype,
            "head": self.head if self.beta is None else f"{self.head}, JSD({self.beta:g})",
        }


class Inputs(NamedTuple):
    """hidden [N, H] and weight [V, H], leaves; targets [N]; coefficients [N] float32: the loss is -sum(c log p), or
    sum(c D) of divergences. teacher: hidden and weight of one that is not trained."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    coefficients: Tensor
    teacher: tuple[Tensor, Tensor] | None = None

    def cleared(self) -> Inputs:
        self.hidden.grad = self.weight.grad = None
        return self


def inputs(case: HeadCase, device: torch.device, seed: int) -> Inputs:
    """Random, with logits that spread over about ten nats, as a language model's do."""
    generator = torch.Generator(device=device).manual_seed(seed)
    dtype = getattr(torch, case.dtype)
    n, h, v = case.num_tokens, case.hidden_size, case.vocab_size

    def model() -> tuple[Tensor, Tensor]:
        hidden = torch.randn(n, h, generator=generator, device=device, dtype=torch.float32)
        weight = torch.randn(v, h, generator=generator, device=device, dtype=torch.float32)
        return hidden.to(dtype), weight.mul_(2.5 / h**0.5).to(dtype)

    hidden, weight = model()
    targets = torch.randint(v, (n,), generator=generator, device=device)
    c = torch.rand(n, generator=generator, device=device, dtype=torch.float32).add_(0.5).div_(n)
    teacher = None if case.beta is None else model()
    return Inputs(hidden.requires_grad_(), weight.requires_grad_(case.trainable), targets, c, teacher).cleared()


class Contestant(NamedTuple):
    """loss: what is run, forward and (by the caller) backward. mean: its coefficients are all 1 / N. values: [N], of
    what returns them."""

    loss: Callable[[Inputs], Tensor]
    mean: bool = False
    gpu_only: bool = False
    package: str | None = None
    values: Callable[[Inputs], Tensor] | None = None


def weighed(values: Callable[[Inputs], Tensor], sign: int, **more: Any) -> Contestant:
    """One that returns values, whose loss is their sum with the coefficients."""
    return Contestant(lambda x: sign * (x.coefficients * values(x)).sum(), values=values, **more)


def ours(impl: str, **more: Any) -> Contestant:
    return weighed(lambda x: linear_logps(x.hidden, x.weight, x.targets, impl=impl), -1, **more)


def trl(x: Inputs) -> Tensor:
    """TRL's fused head, asked for log-probabilities alone."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as chunk

    args = (x.hidden, x.weight, None, x.targets, 1.0, chunk, None, 1.0, ("log_probs",))
    return -(x.coefficients * ChunkedLogProbFunction.apply(*args)[0]).sum()


def liger_cross_entropy(x: Inputs) -> Tensor:
    """Liger's fused cross-entropy, which knows the gradient of its own mean only."""
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss(reduction="mean")(x.weight, x.hidden, x.targets)


def liger_grpo(x: Inputs) -> Tensor:
    """Liger's GRPO loss of one sequence, whose coefficients are advantages: at old = policy -A log p in gradient."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    rows = 8
    hidden = x.hidden.view(rows, -1, x.hidden.shape[1])
    targets, mask = x.targets.view(rows, -1), torch.ones_like(x.targets).view(rows, -1)
    advantages = torch.ones(rows, device=x.hidden.device)
    loss = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, compiled=x.hidden.is_cuda)
    return loss(hidden, x.weight, targets, mask, advantages)[0]


def torch_cross_entropy(x: Inputs) -> Tensor:
    """torch's own chunked cross-entropy, of a mean as well."""
    from torch.nn import LinearCrossEntropyOptions
    from torch.nn.functional import linear_cross_entropy

    return linear_cross_entropy(x.hidden, x.weight, x.targets, options=LinearCrossEntropyOptions())


CONTESTANTS = {
    "logratio (two_gemm)": ours("two_gemm"),
    "logratio (triton)": ours("triton", gpu_only=True, package="triton"),
    "eager": ours("eager"),
    "trl": Contestant(trl, package="trl"),
    "liger (cross entropy)": Contestant(liger_cross_entropy, mean=True, gpu_only=True, package="liger-kernel"),
    "torch": Contestant(torch_cross_entropy, mean=True),
    "liger (grpo)": Contestant(liger_grpo, mean=True, package="liger-kernel"),  # last: compiles for half a minute
}


def why_not(contestant: Contestant, device: torch.device) -> str | None:
    """Why a contestant cannot run here, or None."""
    if contestant.gpu_only and device.type != "cuda":
        return "needs a GPU"
    if contestant.package and not installed(contestant.package):
        return f"{contestant.package} is not installed"
    if contestant.loss is torch_cross_entropy and not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return f"torch {torch.__version__} has no chunked linear_cross_entropy"
    return None


def gradients(contestant: Contestant, x: Inputs) -> tuple[Tensor, Tensor | None]:
    """d loss / d hidden and d loss / d weight, of a run of its own."""
    contestant.loss(x.cleared()).backward()
    assert x.hidden.grad is not None
    return x.hidden.grad, x.weight.grad


def truth(x: Inputs, mean: bool, values: Contestant) -> tuple[Tensor, Tensor, Tensor | None]:
    """Values, and the gradients of hidden and weight, in float64. values: of a contestant that goes in chunks."""
    c = torch.full_like(x.coefficients, 1 / len(x.coefficients)) if mean else x.coefficients
    teacher = x.teacher and (x.teacher[0].double(), x.teacher[1].double())
    hidden, weight = (t.detach().double().requires_grad_(t.requires_grad) for t in (x.hidden, x.weight))
    exact = Inputs(hidden, weight, x.targets, c.double(), teacher)
    assert values.values is not None
    found = values.values(exact)
    of_hidden, of_weight = gradients(values, exact)
    return found.detach(), of_hidden, of_weight


def relative(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|, in float64."""
    return ((a.double() - b).norm() / b.norm()).item()


def errors(contestants: Mapping[str, Contestant], x: Inputs, exact: Contestant) -> dict[str, dict[str, float | None]]:
    """Errors against float64 of values (ours and eager's alone return them) and gradients, relative."""
    found: dict[str, dict[str, float | None]] = {}
    for mean in (False, True):
        mine = {name: contestant for name, contestant in contestants.items() if contestant.mean is mean}
        if not mine:
            continue
        values, of_hidden, of_weight = truth(x, mean, exact)
        for name, contestant in mine.items():
            grad, weight_grad = gradients(contestant, x)
            row: dict[str, float | None] = {"logps_err": None, "grad_hidden_err": relative(grad, of_hidden)}
            row["grad_weight_err"] = None if weight_grad is None else relative(weight_grad, of_weight)  # type: ignore[arg-type]
            if contestant.values is not None:
                with torch.no_grad():
                    row["logps_err"] = relative(contestant.values(x), values)
            found[name] = row
            x.cleared()
    return found


def gemm_tflops(case: HeadCase, x: Inputs) -> float:
    """The rate of the plain product hidden @ weight^T, the best of some rounds, over the rows that fit one chunk."""
    rows = min(len(x.hidden), 2048)
    hidden, weight = x.hidden.detach()[:rows], x.weight.detach().t()
    best = min(time_ms(lambda: hidden @ weight, hidden.device) for _ in range(7))
    return 2 * rows * case.hidden_size * case.vocab_size / best / 1e9


def run(
    case: HeadCase,
    device: torch.device,
    contestants: Mapping[str, Contestant] = CONTESTANTS,
    *,
    exact: Contestant = CONTESTANTS["logratio (two_gemm)"],
    repeats: int,
    seed: int,
) -> dict[str, Figures]:
    """{contestant: status and figures} of one case. One that runs out of memory, or fails, does not end the others.

    exact: what errors are against, computed in float64.
    """
    x = inputs(case, device, seed)
    rows: dict[str, Figures] = {}
    able: dict[str, Contestant] = {}
    for name, contestant in contestants.items():
        attempt(name, rows, {}, partial(trial, contestant, x, device))
        x.cleared()
        if rows[name]["status"] == "ok":
            able[name] = contestant
    for name, found in errors(able, x, exact).items():
        rows[name] |= found
    works = {name: lambda _, c=c: c.loss(x.cleared()).backward() for name, c in able.items()}  # type: ignore[misc]
    ceiling = gemm_tflops(case, x)
    work = 2 * case.products * case.num_tokens * case.hidden_size * case.vocab_size
    for name, times in interleaved(works, device, repeats=repeats).items():
        figures = percentiles(times, "time_ms")
        tflops = work / figures["time_ms_p50"] / 1e9
        rows[name] |= figures | {"tflops": tflops, "share_of_gemm": tflops / ceiling, "gemm_tflops": ceiling}
        rows[name]["times_ms"] = times
    return rows


def trial(contestant: Contestant, x: Inputs, device: torch.device) -> Figures:
    """Run it once, for its peak memory beyond the inputs."""
    if reason := why_not(contestant, device):
        raise Refused(reason)
    contestant.loss(x.cleared()).backward()  # compiles
    x.cleared()
    free_memory()
    base = allocated_mib(device)
    return {"peak_mem_mib": peak_mem(lambda: contestant.loss(x.cleared()).backward(), device, beyond=base)}
