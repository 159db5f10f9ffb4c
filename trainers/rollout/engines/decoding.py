"""The engine in the process: prompts once, then one forward pass a token for all rows that still speak.

A prompt is computed once for all its completions. A row that has ended gives its place to the next completion that
waits, so that `rows` bounds the memory and nothing else. The policy's own modules run, with adapters as they are
trained, so that no weight is touched or copied, and what is sampled from is what is trained, up to the rounding.
"""

from __future__ import annotations

import inspect
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.cache_utils import DynamicCache

from logratio.losses import Support, Transform

from ...attention.decoding import DECODING, bias_of, decoding
from ...policy.policy import Policy
from ..ends import holds_string
from .captured import Captured
from .drawing import Drawing, check_finite, support_of_each, uniforms
from .protocol import Request, Sample, Sampling
from .slots import SlotCache

PREFILL_TOKENS = 8192
"""Of prompts computed together, with their padding."""


@dataclass
class Row:
    """A completion that is being said. place: (request, number) in the answer. numbers: of as many tokens as it may
    have."""

    place: tuple[int, int]
    prompt_ids: Sequence[int]
    numbers: Sequence[float]
    ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    supports: list[Support] = field(default_factory=list)

    def sample(self, stopped: bool, version: int) -> Sample:
        support = Support.cat(self.supports) if self.supports else None
        return Sample(self.ids, "stop" if stopped else "length", self.logps, version, support)


class Decoder:
    """One call of `sample`: what waits, what is prefilled, and what is being said."""

    def __init__(
        self,
        policy: Policy,
        tokenizer: Any,
        sampling: Sampling,
        *,
        rows: int,
        version: int,
        captured: Captured | None = None,
    ) -> None:
        self.policy, self.tokenizer, self.sampling, self.version = policy, tokenizer, sampling, version
        self.decoder = policy.decoder
        # transformers 5.24 has another name for what it keeps
        self.keeps = "cache" if "cache" in inspect.signature(self.decoder.forward).parameters else "past_key_values"
        self.draw = Drawing(sampling)
        self.device = policy.causal_lm.device
        self.windows = policy.windows
        options = policy.head_options()
        self.transform = Transform(1.0, options["logit_scale"], options["softcap"])
        self.rows, self.captured = rows, captured
        self.cache = SlotCache(rows, self.device) if captured is None else captured.cache
        self.tokens = captured.tokens if captured else torch.zeros(rows, dtype=torch.long, device=self.device)
        self.live: list[Row] = []

    def run(self, requests: Sequence[Request], done: dict[tuple[int, int], Sample]) -> None:
        """Say what is not done yet, and enter it there, by (request, number).

        Long prompts first: those computed together are of about one length, and memory shows its peak early.
        """
        self.done = done
        self.some_greedy = any(seed is None for request in requests for seed in request.seeds)
        if self.captured is not None:
            self.captured.begin(max(len(r.prompt_ids) + r.limit(self.sampling) for r in requests))
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i].prompt_ids))
        every = [(i, k) for i in order for k in range(len(requests[i].seeds))]
        waiting = deque(place for place in every if place not in done)
        prefilled: Prefilled | None = None
        while waiting or self.live:
            while waiting and len(self.live) < self.rows:
                free = self.rows - len(self.live)
                if prefilled is None or waiting[0][0] not in prefilled.at:
                    prefilled = self.prefill(requests, waiting, free)
                entering: list[tuple[int, int]] = []
                while waiting and waiting[0][0] in prefilled.at and len(entering) < free:
                    entering.append(waiting.popleft())
                self.enter(requests, prefilled, entering)
            if self.live:
                self.advance()

    def prefill(self, requests: Sequence[Request], waiting: deque[tuple[int, int]], free: int) -> Prefilled:
        """Compute the next prompts that there is room for, padded on the right, where nobody sees padding."""
        chosen: dict[int, int] = {}
        for places, (i, _) in enumerate(waiting):
            if i not in chosen and chosen:
                first = next(iter(chosen))
                full = (len(chosen) + 1) * len(requests[first].prompt_ids) > PREFILL_TOKENS
                if full or places >= free:
                    break
            chosen.setdefault(i, len(chosen))
        prompts = [requests[i].prompt_ids for i in chosen]
        lengths = torch.tensor([len(p) for p in prompts])
        ids = pad_sequence([torch.tensor(p) for p in prompts], batch_first=True)
        cache = DynamicCache()  # of whole rows in every layer, whatever its window
        out = self.decoder(input_ids=ids.to(self.device), use_cache=True, **{self.keeps: cache})
        lengths = lengths.to(self.device)
        last = out.last_hidden_state[torch.arange(len(prompts), device=self.device), lengths - 1]
        return Prefilled(cache, lengths, self.logits(last), chosen)

    def enter(self, requests: Sequence[Request], prefilled: Prefilled, entering: list[tuple[int, int]]) -> None:
        """Draw the first token of these completions, and let them take rows."""
        new = []
        for i, k in entering:
            seed, limit = requests[i].seeds[k], requests[i].limit(self.sampling)
            numbers = [math.nan] * limit if seed is None else uniforms(seed, limit).tolist()
            new.append(Row((i, k), requests[i].prompt_ids, numbers))
        which = torch.tensor([prefilled.at[i] for i, _ in entering], device=self.device)
        self.cache.enter(prefilled.cache, which, prefilled.lengths[which])
        self.live += new
        self.say(new, prefilled.logits[which], len(self.live) - len(new))

    def advance(self) -> None:
        """One token more for every row."""
        captured, rows, seen = self.captured, len(self.live), self.cache.longest + 1
        self.cache.make_room(seen)
        logits = self.forward(rows, seen) if captured is None else self.launch(captured, rows, seen)
        self.cache.longest = seen
        if logits is not None:
            self.say(self.live, logits[:rows], 0)
        elif captured is not None:  # tokens are drawn already
            self.hear(self.live, captured.said[:rows].cpu(), [None] * rows, 0)

    def launch(self, captured: Captured, live: int, longest: int) -> Tensor | None:
        """`forward` in one launch, for some more rows and places; None where it draws the tokens too."""
        rows, seen = captured.spans(live, longest)
        drawn = self.draw.plain
        if drawn:
            captured.draw_by([row.numbers[len(row.ids)] for row in self.live])

        def step() -> Tensor | None:
            with decoding(self.policy.causal_lm):
                logits = self.forward(rows, seen)
            if not drawn:
                return logits
            tokens, logps, _ = self.draw(logits, captured.numbers[:rows], some_greedy=self.some_greedy)
            self.tokens[:rows] = tokens
            captured.said[:rows] = torch.stack((tokens.double(), logps), 1)
            return None

        return captured.run((rows, seen, drawn and (self.sampling.temperature, self.some_greedy)), step)

    def forward(self, rows: int, seen: int) -> Tensor:
        """[rows, V], the logits behind the last token of each row, of which `seen` places are looked at."""
        place = self.cache.begin(rows, seen)
        out = self.decoder(
            input_ids=self.tokens[:rows, None],
            position_ids=place[:, None],
            attention_mask=self.mask(place),
            use_cache=True,
            **{self.keeps: self.cache},
        )
        self.cache.end()
        return self.logits(out.last_hidden_state[:, -1])

    def mask(self, lengths: Tensor) -> Any:
        """Who sees whom, in the form that `Policy.mask` has: a token its row up to itself, within the window."""
        place = torch.arange(self.cache.seen, device=self.device)
        seen = place <= lengths[:, None]
        masks = []
        for window in self.windows:
            near = seen if window is None else seen & (place > lengths[:, None] - window)
            masks.append(self.as_taken(near[:, None, None]))
        return dict(zip(("full_attention", "sliding_attention"), masks, strict=True)) if len(masks) > 1 else masks[0]

    def as_taken(self, seen: Tensor) -> Tensor:
        """A boolean mask as the attention takes it: "eager" adds it to the scores, and so does `decoding`."""
        dtype, kind = self.policy.causal_lm.dtype, self.device.type
        if self.policy.attention == DECODING:
            return bias_of(seen, torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else dtype)
        if self.policy.attention != "eager":
            return seen
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, V] in at least float32, as the policy has them, before the temperature."""
        raw = self.policy.causal_lm.get_output_embeddings()(hidden)
        return self.transform(raw.to(torch.promote_types(raw.dtype, torch.float32)))

    def say(self, rows: Sequence[Row], logits: Tensor, start: int) -> None:
        """Draw the next token of each of these rows, the last of the live ones from `start` on."""
        numbers = torch.tensor([row.numbers[len(row.ids)] for row in rows], dtype=torch.float64)
        history = self.history(rows) if self.draw.penalty is not None else None
        tokens, logps, kept = self.draw(logits, numbers.to(self.device), history, some_greedy=self.some_greedy)
        self.tokens[start : start + len(rows)] = tokens
        supports = [None] * len(rows) if kept is None else support_of_each(kept)
        self.hear(rows, torch.stack((tokens.double(), logps), 1).cpu(), supports, start)

    def hear(self, rows: Sequence[Row], said: Tensor, supports: Sequence[Support | None], start: int) -> None:
        """Enter what was drawn for these rows, [R, 2], tokens and logps, on the CPU; drop who has ended."""
        check_finite(said[:, 1])
        ended, ends, strings = [], self.sampling.stop_ids, self.sampling.stop_strings
        drawn = zip(rows, said[:, 0].long().tolist(), said[:, 1].tolist(), supports, strict=True)
        for at, (row, token, logp, support) in enumerate(drawn, start):
            row.ids.append(token)
            row.logps.append(logp)
            if support is not None:
                row.supports.append(support)
            stopped = token in ends or (strings != () and holds_string(self.tokenizer, row.ids, strings))
            if stopped or len(row.ids) == len(row.numbers):
                self.done[row.place] = row.sample(stopped, self.version)
                ended.append(at)
        if ended:
            order = self.cache.leave(ended)
            self.tokens[: len(order)] = self.tokens[order]
            self.live = [self.live[i] for i in order]

    def history(self, rows: Sequence[Row]) -> Tensor:
        """[R, L] ids of prompts and completions; shorter rows repeat their last."""
        held = [[*row.prompt_ids, *row.ids] for row in rows]
        width = max(map(len, held))
        return torch.tensor([ids + ids[-1:] * (width - len(ids)) for ids in held], device=self.device)


@dataclass
class Prefilled:
    """Prompts that are computed. at: request -> row in cache, lengths and logits (of the first token)."""

    cache: DynamicCache
    lengths: Tensor
    logits: Tensor
    at: dict[int, int]
