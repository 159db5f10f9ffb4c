"""Runs a case of one optimizer step: gradients compared first, then memory, then time, contestants interleaved."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch

from logratio.losses import Kind
from logratio.trainers.batches.packing import pack
from logratio.trainers.batches.values import per_example
from logratio.trainers.data.examples import Example
from logratio.trainers.errors import first_line
from logratio.trainers.ground.provenance import installed
from logratio.trainers.loop import count_tokens
from logratio.trainers.policy.policy import Policy
from logratio.trainers.policy.reference import inference, tokens_key

from ...memory.activations import Batch
from ...memory.peak import Setup, predict
from ...peers.truths import difference
from ..clock import allocated_mib, free_memory, gpu_of, interleaved, median_ratio, peak_mem, percentiles
from ..models import build
from ..saved import saved_mib
from .contestants import Contestant, OldLogps, Ours, kept_mib, share_frozen, trainable_copy
from .ledger import LARGEST_TRUTH, Gradient, Truth, gradient, ledger, truth
from .step_cases import StepCase
from .trl_contestant import Trl

CONTESTANTS = ("logratio", "trl", "trl+liger")
TRIAL = 4
"""Examples whose gradients are compared (of rollouts, one group)."""
WINDOWS = 3
"""Different steps that are timed in turn, so that lengths vary as they do in training."""
MAX_GRAD_REL_ERR = {"float32": 1e-4, "bfloat16": 0.3}
"""Beyond it the two sides do not compute the same, and nothing is timed. In bfloat16 rounding is some percent or more,
and so it is with QLoRA in any dtype, for which TRL makes the adapters bfloat16: there it keeps out what is grossly
different, and float32 decides whether both compute the same."""

Figures = dict[str, Any]


def run(
    case: StepCase,
    device: torch.device,
    *,
    repeats: int,
    seed: int,
    only: Sequence[str] = CONTESTANTS,
    with_truth: bool = True,
) -> dict[str, Figures]:
    """{contestant: status and figures}; a contestant that fails or runs out of memory does not end the others."""
    model = build_of(case, device, seed)
    vocab = model.get_output_embeddings().weight.shape[0]
    windows = [case.window(vocab, seed + i) for i in range(min(WINDOWS, repeats))]
    old = old_logps(case, model, windows, seed)
    rows: dict[str, Figures] = {}
    trial = on_trial(case, windows[0])
    # before there are contestants: accelerate's state, which this resets, and most of the memory are theirs afterwards
    exact, no_truth = best_truth(case, model, trial, old) if with_truth else (None, None)
    with ExitStack() as stack:
        running: dict[str, Contestant] = {}
        for name in sorted(only, key=CONTESTANTS.index):  # ours resets accelerate's state, too
            attempt(name, rows, running, partial(make, name, case, model, device, stack, old))
        compare(case, exact, trial, rows, running)
        del exact
        for row in rows.values() if no_truth else ():
            row["no_truth"] = no_truth
        for name in list(running):
            attempt(name, rows, running, partial(memory, case, running[name], windows[0], device))
        works: dict[str, Callable[[int], None]] = {}
        for name in list(running):  # the other windows once: longer ones need more memory, new shapes are compiled
            attempt(name, rows, running, partial(warmed, name, running[name], windows, works))
        times = interleaved(works, device, repeats=repeats, warmup=0) if works else {}
        for name, values in times.items():
            rows[name] |= rates(values, windows) | told(running[name], windows)
            if "logratio" in times:
                rows[name]["time_to_ours"] = median_ratio(values, times["logratio"])
        if isinstance(ours := running.get("logratio"), Ours):
            rows["logratio"] |= beside(partial(ours.timed_parts, windows[0]), "parts")
            if device.type == "cuda":
                rows["logratio"] |= beside(partial(predicted, case, ours, windows[0]), "predicted_peak_mem_mib")
    return rows


_BUILT: dict[Any, Any] = {}
"""The model of the case before, by what it was built of: the next case is often of the same."""


def build_of(case: StepCase, device: torch.device, seed: int) -> Any:
    """The case's model, which contestants copy; what does not train they share, and nobody changes."""
    key = (case.model, case.adapter, case.dtype, case.lora_r, case.vocab_size, device, seed)
    if key in _BUILT:
        return _BUILT[key]
    _BUILT.clear()
    free_memory()
    sizes: dict[str, Any] = {"lora_r": case.lora_r, "vocab_size": case.vocab_size}
    model = build(case.model, case.adapter, dtype=getattr(torch, case.dtype), device=device, seed=seed, **sizes)
    if case.adapter != "full":  # whose weights train
        _BUILT[key] = model
    return model


def beside(work: Callable[[], Any], name: str) -> Figures:
    """A figure beside those that the case is for: an error costs this figure, and is told under `no_<name>`."""
    try:
        return {name: work()}
    except Exception as error:
        free_memory()
        return {f"no_{name}": f"{type(error).__name__}: {first_line(error)}"}


def make(
    name: str, case: StepCase, model: Any, device: torch.device, stack: ExitStack, old: OldLogps | None
) -> Contestant:
    """A contestant on a copy of the model, which shares what is frozen; whole, the model itself is the reference."""
    mine, ref_model = trainable_copy(model, case.adapter), None
    if case.adapter == "full" and case.loss.wants_reference:
        ref_model = share_frozen(model.requires_grad_(False))
    if name == "logratio":
        return Ours(case, mine, ref_model, device, old)
    if reason := why_not(name, device):
        raise Refused(reason)
    return Trl(case, mine, ref_model, device, stack, liger=name == "trl+liger", old=old)


def why_not(name: str, device: torch.device) -> str | None:
    """Why a contestant cannot run here, or None."""
    if name == "trl+liger" and device.type != "cuda":
        return "Liger's layers need a GPU"
    if name == "trl+liger" and not installed("liger-kernel"):
        return "liger-kernel is not installed"
    return None


class Refused(Exception):
    """A contestant that cannot run a case here; says why."""


def attempt(name: str, rows: dict[str, Figures], running: dict[str, Contestant], work: Callable[[], Any]) -> None:
    """Do it, and keep what comes of it: a contestant, or figures; else take the contestant out and say why."""
    row = rows.setdefault(name, {"status": "ok"})
    try:
        result = work()
        if isinstance(result, dict):
            row |= result
        else:
            running[name] = result
        return
    except Refused as error:
        row |= {"status": "refused", "error": str(error)}
    except torch.OutOfMemoryError as error:
        others = " and ".join(other for other in running if other != name)
        beside = f"with the weights and optimizer of {others} beside it: " if others else ""
        row |= {"status": "oom", "error": beside + first_line(error)}
    except Exception as error:  # a peer's fault must not end the run; it is recorded
        row |= {"status": "failed", "error": f"{type(error).__name__}: {first_line(error)}"}
    running.pop(name, None)
    free_memory()


def old_logps(case: StepCase, model: Any, windows: Sequence[list[Example]], seed: int) -> OldLogps | None:
    """Of rollouts: log-probs of a policy some updates ago, today's with noise beyond the clip range."""
    if case.loss.kind is not Kind.GROUPED:
        return None
    policy = Policy(model)
    generator = torch.Generator().manual_seed(seed)
    table: OldLogps = {}
    for batch in pack([e for window in windows for e in window], case.micro_batch_tokens, shared=False):
        with inference(policy):
            logps = policy(batch.to(model.device)).logps
        for example, parts in per_example(batch, logps):
            table[tokens_key(example)] = [x + 0.1 * torch.randn(x.shape, generator=generator) for x in parts]
    return table


def on_trial(case: StepCase, window: list[Example]) -> list[Example]:
    """A few examples that both sides take in one micro-batch: TRL's result depends on the cut as well."""
    return window[:1] if case.loss.kind is Kind.GROUPED else window[:TRIAL]


def compare(
    case: StepCase, exact: Truth | None, trial: list[Example], rows: dict[str, Figures], running: dict[str, Contestant]
) -> None:
    """Every peer's gradient against ours, and the ledger of all; one that computes something else is out."""
    grads: dict[str, Gradient] = {}

    def of(name: str) -> Figures:
        grads[name] = gradient(running[name], trial)
        row: Figures = {"ledger": ledger(running[name], grads[name], exact, trial)}
        if "logratio" not in grads or name == "logratio":
            return row
        return row | agreeing(case, grads.pop(name), grads["logratio"])

    for name in list(running):
        attempt(name, rows, running, partial(of, name))


def agreeing(case: StepCase, theirs: Gradient, ours: Gradient) -> Figures:
    """ArithmeticError where the two differ by more than rounding."""
    error = difference(theirs, ours)
    limit = MAX_GRAD_REL_ERR["bfloat16" if case.adapter == "qlora" or case.dtype != "float32" else "float32"]
    if not error <= limit:  # nor NaN
        raise ArithmeticError(f"its gradient differs by {error:.1e}, where at most {limit:g} is rounding: not timed")
    return {"grad_rel_err": error}


def memory(case: StepCase, contestant: Contestant, window: list[Example], device: torch.device) -> Figures:
    """The peak of a whole step, without what the other contestants keep; compiles and makes the optimizer's state.

    On a CPU there is none, see `peak_mem`, but what autograd keeps.
    """
    work = step_of(contestant, [contestant.prepare(window)])
    if device.type != "cuda":
        kept = saved_mib(partial(work, 0), contestant.model, contestant.ref_model)
        return {"peak_mem_mib": None, "saved_mib": None if case.gradient_checkpointing else kept}
    work(0)
    free_memory()
    others = allocated_mib(device) - kept_mib(contestant)
    return {"peak_mem_mib": peak_mem(lambda: work(0), device, beyond=others)}


def warmed(
    name: str, contestant: Contestant, windows: Sequence[list[Example]], works: dict[str, Callable[[int], None]]
) -> Figures:
    """Take every step once, the first of which `memory` took, and only then be one of those that are timed."""
    step = step_of(contestant, [contestant.prepare(window) for window in windows])
    for round_ in range(1, len(windows)):
        step(round_)
    works[name] = step
    return {}


def best_truth(
    case: StepCase, model: Any, trial: list[Example], old: OldLogps | None
) -> tuple[Truth | None, str | None]:
    """It, or why there is none: the contestants are measured all the same."""
    size = sum(p.numel() for p in model.parameters())
    if size > LARGEST_TRUTH:
        return None, f"a model of {size / 1e9:.1f} billion parameters is too large for float64 beside it"
    try:
        return truth(case, model, trial, old), None
    except Exception as error:
        return None, f"{type(error).__name__}: {first_line(error)}"
    finally:
        free_memory()


def predicted(case: StepCase, ours: Ours, window: list[Example]) -> float | None:
    """What `logratio plan` would have said of the largest micro-batch's peak; None of a GPU that it does not know."""
    gpu = gpu_of(ours.device)
    if gpu is None:
        return None
    packed = [micro.batch for micro in ours.step.micro_batches(window)]
    setup = Setup(
        method=case.method,
        dtype=case.dtype,
        lora_r=0 if case.adapter == "full" else case.lora_r,
        load_in_4bit=case.adapter == "qlora",
        gradient_checkpointing=case.gradient_checkpointing,
        attn_implementation=ours.attention,
        accumulates=len(packed) > 1,
        gpu=gpu,
    )
    config = ours.policy.causal_lm.config
    return max(predict(config, setup, Batch.of(batch)).peak_mem_mib for batch in packed)


def step_of(contestant: Contestant, batches: list[Any]) -> Callable[[int], None]:
    def step(round_: int) -> None:
        batch, following = (batches[i % len(batches)] for i in (round_, round_ + 1))
        contestant.backward(batch, following)
        contestant.update()

    return step


def rates(times_ms: list[float], windows: Sequence[list[Example]]) -> Figures:
    """Percentiles of the step, and rates per second: medians over the rounds, whose steps differ in length."""
    tokens = [count_tokens(window) for window in windows]
    per_second = [tokens[i % len(tokens)] / t * 1e3 for i, t in enumerate(times_ms)]
    examples = [len(windows[i % len(windows)]) / t * 1e3 for i, t in enumerate(times_ms)]
    return percentiles(times_ms, "step_ms") | {
        "tokens_per_s": statistics.median(per_second),
        "examples_per_s": statistics.median(examples),
        "num_tokens": sum(tokens) // len(tokens),
        "times_ms": times_ms,
    }


def told(contestant: Contestant, windows: Sequence[list[Example]]) -> Figures:
    """The attention that it takes, what its forward pass computes in a step, and the share of it that is padding."""
    computed, real = map(sum, zip(*map(contestant.computed, windows), strict=True))
    tokens = {"num_padded_tokens": computed // len(windows), "padding": 1 - real / computed}
    return tokens | {"attention": contestant.attention}
