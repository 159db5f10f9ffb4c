"""The engine in this process: our own loop where the model's layers allow it, else transformers' `generate`."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch.distributed.fsdp import FSDPModule

from ...errors import UserError, first_line
from ...layers.packed_lora import packed_layers
from ...memory import KEEPERS, REMEDIES, free
from ...policy.checks import foreign
from ...policy.policy import Policy
from ...policy.reference import inference
from ...policy.sharing import MASKED_ATTENTION, configured_obstacle
from ...processes.sharding import gathered
from .captured import LEAST_ROWS, Captured, NotCaptured
from .decoding import Decoder
from .generating import generated
from .protocol import Engine, Request, Sample, Sampling, Say

ROWS = 256
"""Completions said at a time at first."""
CAPTURING = ("cuda",)
"""Devices on which a token is one launch."""
WORTH_PACKING = 8
"""Tokens of a completion from which on reordered weights are worth their making."""
MASKED = ("eager", *MASKED_ATTENTION)
"""Attention implementations that take the masks of `Decoder`."""
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
"""Of a log-probability on trial; eager attention has its softmax in float32 in any case."""
ROUNDED = 0.1
"""The same in low precision, of the spread of logits, as root mean square: a plain forward pass itself says 2 % of it
else in other company (SmolLM2-135M in bfloat16, 0.04 nat, at most 0.11), and a wrong mask or position far more."""
LEFT_OUT = -1e6
"""A log-probability below is of a word that the model leaves out, and no part of that spread."""
TRIAL = ([3, 5, 7, 11, 13], [17, 19, 23])
TRIAL_TOKENS = 4


class InProcess(Engine):
    """rows: completions said at a time, memory and speed, not what is said; halved where they do not fit.

    tell(key, text): what to tell the user, each thing once. accelerator: of the run, where there is one.
    """

    def __init__(
        self,
        policy: Policy,
        tokenizer: Any,
        *,
        rows: int = ROWS,
        tell: Callable[[str, str], None] | None = None,
        accelerator: Accelerator | None = None,
    ) -> None:
        self.policy, self.tokenizer, self.rows, self.version = policy, tokenizer, rows, 0
        self.accelerator = accelerator
        self.tell = tell or (lambda key, text: None)
        self.obstacle: str | None = None  # to the own loop, "": there is none; None: not tried yet
        self.singly: bool | None = None  # whether `generate` is given one prompt at a time; None: not tried yet
        self.uncaptured: str | None = None  # to one launch a token, as `obstacle`
        self.captured: Captured | None = None
        KEEPERS.add(self)

    @property
    def name(self) -> str:
        return "transformers" if self.obstacle else "logratio"

    def sync(self, version: int) -> None:
        self.version = version

    def close(self) -> None:
        self.let_go()

    def let_go(self) -> None:
        """The memory of graphs and of what they work on, which the next call would make again."""
        if self.captured is not None:
            self.captured.release()
        self.captured = None

    @contextlib.contextmanager
    def rounds(self) -> Iterator[Say]:
        """Inside, whole weights are at hand, and as many requests are under way as fit into memory. Raises UserError
        where one alone does not."""
        with gathered(self.policy, self.accelerator):
            yield self.say

    @torch.no_grad()
    def say(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Sample]]:
        done: dict[tuple[int, int], Sample] = {}
        wanted = [(i, k) for i, request in enumerate(requests) for k in range(len(request.seeds))]
        while len(done) < len(wanted):
            rows = min(self.rows, len(wanted))
            mixed = contextlib.nullcontext() if self.accelerator is None else self.accelerator.autocast()
            try:
                with mixed, inference(self.policy):
                    self._run(requests, sampling, done, rows)
                continue
            except torch.OutOfMemoryError:
                self.rows = rows // 2
            free()
            if not self.rows:
                raise UserError(
                    f"generating one completion of up to {sampling.max_new_tokens} tokens does not fit into "
                    f"memory: lower --max_completion_length, {REMEDIES}"
                )
            self.tell(
                f"rows {self.rows}",
                f"out of memory with {rows} completions generated at a time; {self.rows} from here on",
            )
        return [[done[i, k] for k in range(len(request.seeds))] for i, request in enumerate(requests)]

    def _run(
        self, requests: Sequence[Request], sampling: Sampling, done: dict[tuple[int, int], Sample], rows: int
    ) -> None:
        """Say what is not done."""
        if self.obstacle is None:
            self.obstacle = why_not(self.policy, self.tokenizer)
            if self.obstacle:
                self.tell("engine", f"completions are generated by transformers' generate: {self.obstacle}")
        longest = max(request.limit(sampling) for request in requests)  # in turns far less than a completion may have
        sampling = dataclasses.replace(sampling, max_new_tokens=longest)
        if not self.obstacle:
            few = rows if sampling.max_new_tokens >= WORTH_PACKING else 0
            with packed_layers(self.policy, few), self._capturing(rows) as captured:
                decoder = Decoder(
                    self.policy, self.tokenizer, sampling, rows=rows, version=self.version, captured=captured
                )
                decoder.run(requests, done)
            return
        if self.singly is None:
            self.singly = not agrees(self.policy, self.tokenizer)
            if self.singly:
                self.tell(
                    "singly", "one at a time, which is slow: of several it says other log-probabilities than the model"
                )
        places = [(i, k) for i, r in enumerate(requests) for k in range(len(r.seeds)) if (i, k) not in done]
        many = 1 if self.singly else rows
        for start in range(0, len(places), many):
            here = places[start : start + many]
            asked = [(requests[i].prompt_ids, requests[i].seeds[k]) for i, k in here]
            said = generated(self.policy.causal_lm, self.tokenizer, asked, sampling, self.version)
            cut = [s.first(requests[i].limit(sampling)) for (i, _), s in zip(here, said, strict=True)]
            done.update(zip(here, cut, strict=True))

    @contextlib.contextmanager
    def _capturing(self, rows: int) -> Iterator[Captured | None]:
        """What a call of so many rows works on, kept for the next one where it is small and nothing went wrong; None
        where tokens are computed kernel by kernel."""
        model = self.policy.causal_lm
        if self.uncaptured is None:
            self.uncaptured = "" if model.device.type in CAPTURING else f"on a {model.device.type}"
            if not self.uncaptured:
                self._uncapturable(moved(self.policy) or why_not(self.policy, self.tokenizer, capturing=True))
        captured, self.captured = self.captured, None
        if self.uncaptured:
            yield None
            return
        if captured is None or not captured.fits(self.policy, rows):
            if captured is not None:
                captured.release()
            captured = Captured(self.policy, rows, model.device)
        kept = False
        try:
            yield captured
            kept = captured.kept
        except NotCaptured as error:  # a shape that the trial had not; who has not ended is said again
            self._uncapturable(str(error))
        finally:
            if kept:
                self.captured = captured
            else:
                captured.release()

    def _uncapturable(self, reason: str) -> None:
        """Tokens are computed kernel by kernel from here on, if there is a reason."""
        self.uncaptured = reason
        if reason:
            self.tell("captured", f"completions are sampled without CUDA graphs, which is slower: {reason}")


def moved(policy: Policy) -> str:
    """Why weights are not where they are for as long as a graph is kept, or ""."""
    if any(isinstance(module, FSDPModule) for module in policy.modules()):
        return "the weights are sharded"
    if any("_hf_hook" in module.__dict__ for module in policy.modules()):
        return "the weights are moved while the model computes"
    return ""


@torch.no_grad()
def why_not(policy: Policy, tokenizer: Any, *, capturing: bool = False) -> str:
    """Why the own loop does not work for this model, or "": what its configuration says, then a trial, in which the
    log-probabilities of what it says are compared with those of a plain forward pass. capturing: as one launch a
    token, with rows that are not in use, one that enters later, and sampled completions beside greedy ones."""
    model = policy.causal_lm
    obstacle = configured_obstacle(model.config, MASKED)
    if obstacle:
        return obstacle
    requests = trial_of(model, [None, 1] if capturing else [None])
    done: dict[tuple[int, int], Sample] = {}
    try:
        captured = Captured(policy, LEAST_ROWS, model.device, trial=True) if capturing else None
        sampling = Sampling(max_new_tokens=TRIAL_TOKENS)
        Decoder(policy, tokenizer, sampling, rows=2, version=0, captured=captured).run(requests, done)
    except torch.OutOfMemoryError:  # which says nothing of the loop
        raise
    except Exception as error:
        return f"in the own loop it raises {type(error).__name__}: {first_line(error)}"
    change = changes(model, [([*requests[i].prompt_ids, *said.ids], said.logps) for (i, _), said in done.items()])
    return change and f"in the own loop its log-probabilities change by {change}"


def agrees(policy: Policy, tokenizer: Any) -> bool:
    """Whether the log-probabilities of what `generate` says of several prompts are the model's own: some models have no
    mask of padding (RWKV), or keep one state for all rows. UserError where it fails, or where one alone is wrong."""
    model, wrong = policy.causal_lm, "no completions can be sampled from the model by transformers' generate"
    requests = trial_of(model, [None])

    def change(some: list[Request]) -> str:
        asked = [(request.prompt_ids, None) for request in some]
        with foreign(wrong):
            said = generated(model, tokenizer, asked, Sampling(max_new_tokens=TRIAL_TOKENS), 0)
        return changes(model, [([*r.prompt_ids, *s.ids], s.logps) for r, s in zip(some, said, strict=True)])

    if not change(requests):
        return True
    if found := change(requests[:1]):
        raise UserError(f"{wrong}: its log-probabilities differ by {found} from the model's own")
    return False


def trial_of(model: Any, seeds: list[int | None]) -> list[Request]:
    rows = model.get_input_embeddings().weight.shape[0]
    return [Request([i % rows for i in ids], seeds) for ids in TRIAL]


@torch.no_grad()
def changes(model: Any, said: Sequence[tuple[list[int], Sequence[float]]]) -> str:
    """By how much log-probabilities of a sequence's last tokens differ from those of a plain forward pass; "" where
    that is rounding."""
    off, spread = [], []
    for sequence, logps in said:
        ids, count = torch.tensor([sequence], device=model.device), len(logps)
        logits = model(input_ids=ids, use_cache=False).logits[0, -count - 1 : -1]
        truth = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        ours = torch.tensor(logps, dtype=truth.dtype, device=model.device)
        off.append(truth.gather(-1, ids[0, -count:, None])[:, 0] - ours)
        spread += [row[row > LEFT_OUT].std() for row in truth]
    kind = model.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else model.dtype
    worst, rounded = float(torch.cat(off).abs().max()), float(torch.cat(off).norm() / torch.stack(spread).norm())
    if worst <= TOLERANCE[dtype] if dtype in TOLERANCE else rounded <= ROUNDED:  # nor NaN
        return ""
    return f"{worst:.0e}"
