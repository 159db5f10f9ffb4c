"""A trainer in plain torch that keeps every law, with one switch for each of the mistakes that trainers make.

Two matrices, LoRA on the second; a token sees the mean of those up to it. In float64 a step takes a millisecond.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding, logsigmoid

from logratio.reference.trainer_laws import IDS, Trained, adamw, sgd

WIDTH, RANK, BETA = 6, 2, 0.5


@dataclass(frozen=True)
class Plain:
    """paired: DPO, else SFT. optimizer: sgd or adamw. The others are mistakes."""

    paired: bool = False
    optimizer: str = "sgd"

    keeps: str = "all"  # gradients of micro-batches: "last", "ends" (first and last), else all
    mean_of_means: bool = False
    divides_twice: bool = False  # the gradient, by a number that the loss is not divided by
    full_count: bool = False  # a last window, by the number of micro-batches of the others
    scores_padding: bool = False
    sees_padding: bool = False  # padded on the left, without an attention mask
    averages_processes: bool = False  # what is divided by totals of all of them already
    own_totals: bool = False  # each process divides by its own
    first_row_twice: bool = False
    merges_in_bfloat16: bool = False
    forgets_b: bool = False  # one parameter is not the optimizer's
    trains_base: bool = False
    dropout: float = 0.0
    reads_global_state: bool = False
    decays_anyway: bool = False  # weight decay, whatever the learning rate
    shifted_reference: bool = False
    keeps_gradients: bool = False  # no zero_grad
    forgets_optimizer: bool = False  # in the checkpoint
    forgets_step: bool = False
    clips_silently: bool = False
    momentum: float = 0.0

    def __call__(
        self,
        rows: list[dict[str, Any]],
        *,
        batch_size: int,
        steps: int,
        micro_batch_size: int,
        processes: int,
        seed: int,
        learning_rate: float = 0.1,
        stop_after: int | None = None,
    ) -> Trained:
        torch_state = torch.Generator().manual_seed(seed)
        self_state: dict[str, Any] = {"dropout": torch_state, "learning_rate": learning_rate}
        weights = make_weights()
        start = copied(weights)
        trained = [n for n in ("lora.A", "lora.B") if not (self.forgets_b and n == "lora.B")]
        optimizer = self.make_optimizer([weights[n] for n in trained], learning_rate)
        windows = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
        losses, first = [], {}
        for step in range(steps):
            if step == stop_after:
                weights, optimizer, shift = self.gone_on(weights, optimizer, trained, learning_rate)
                windows = windows[shift:] + windows[:shift]
            window = windows[step % len(windows)]
            losses.append(self.learn(window, weights, batch_size, micro_batch_size, processes, self_state))
            gradients = {n: weights[n].grad.clone() for n in ("lora.A", "lora.B")}
            first = first or gradients
            if self.clips_silently:
                torch.nn.utils.clip_grad_norm_([weights[n] for n in trained], 1e-2)
            optimizer.step()
            if not self.keeps_gradients:
                optimizer.zero_grad()
            with torch.no_grad():
                self.wrong_weights(weights, learning_rate)
        formula = sgd(learning_rate) if self.optimizer == "sgd" else adamw(learning_rate)
        return Trained(losses, start, copied(weights), {"lora.A", "lora.B"}, first, formula)

    def learn(
        self,
        window: list[dict[str, Any]],
        weights: dict[str, Tensor],
        batch_size: int,
        size: int,
        world: int,
        state: Any,
    ) -> float:
        """Put the window's gradient where the optimizer finds it."""
        total, reported = self.count(window), 0.0
        summed = {n: torch.zeros_like(w) for n, w in weights.items()}
        for process in range(world):
            mine = window[process::world]
            micros = [mine[i : i + size] for i in range(0, len(mine), size)]
            for number, micro in enumerate(micros):
                divisor = total
                if self.mean_of_means:
                    divisor = self.count(micro) * len(micros) * world
                if self.own_totals:
                    divisor = self.count(mine) * world
                if self.full_count:
                    divisor = total * (batch_size / world / size) / len(micros)
                loss = self.loss(micro, weights, state) / divisor
                reported += loss.item()
                if self.first_row_twice and number == 0:
                    loss = loss + self.loss(micro[:1], weights, state) / divisor
                parts = torch.autograd.grad(loss, list(weights.values()))
                kept = {"last": number == len(micros) - 1, "ends": number in (0, len(micros) - 1)}.get(self.keeps, True)
                for name, part in zip(weights, parts, strict=True):
                    summed[name] += part * kept
        for name, w in weights.items():
            value = summed[name] / (2 if self.divides_twice else 1) / (world if self.averages_processes else 1)
            w.grad = value if w.grad is None else w.grad + value
        return reported

    def count(self, rows: list[dict[str, Any]]) -> int:
        return len(rows) if self.paired else sum(len(row["completion"]) for row in rows)

    def loss(self, rows: list[dict[str, Any]], weights: dict[str, Tensor], state: Any) -> Tensor:
        """The sum, over tokens or pairs."""
        if not self.paired:
            return -self.logps(rows, "completion", weights, state).sum()
        base = {"embed": weights["embed"], "head": weights["head"]}
        if self.shifted_reference:
            base["head"] = base["head"] * 1.01
        chosen, rejected = (
            self.logps(rows, part, weights, state) - self.logps(rows, part, base, state).detach()
            for part in ("chosen", "rejected")
        )
        return -logsigmoid(BETA * (chosen - rejected)).sum()

    def logps(self, rows: list[dict[str, Any]], part: str, weights: dict[str, Tensor], state: Any) -> Tensor:
        """[rows], each the sum over its completion."""
        lengths = [len(row["prompt"]) + len(row[part]) for row in rows]
        width = max(lengths)
        ids, seen, scored = (torch.zeros(len(rows), width, dtype=torch.int64) for _ in range(3))
        for i, row in enumerate(rows):
            first = width - lengths[i] if self.sees_padding else 0
            line, behind = [*row["prompt"], *row[part]], first + len(row["prompt"])
            ids[i, first : first + len(line)] = torch.tensor(line)
            seen[i, first : first + len(line)] = 1
            scored[i, behind : width if self.scores_padding else behind + len(row[part])] = 1
        if self.sees_padding:
            seen[:] = 1
        hidden = embedding(ids, weights["embed"]) * seen[..., None]
        hidden = hidden.cumsum(1) / seen.cumsum(1).clamp(min=1)[..., None]
        if self.dropout:
            generator = None if self.reads_global_state else state["dropout"]
            hidden = hidden * (torch.rand(hidden.shape, generator=generator) > self.dropout)
        head = weights["head"] + (weights["lora.B"] @ weights["lora.A"] if "lora.A" in weights else 0.0)
        logps = (hidden[:, :-1] @ head.T).log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        return (logps * scored[:, 1:]).sum(1)

    def make_optimizer(self, parameters: list[Tensor], learning_rate: float) -> torch.optim.Optimizer:
        if self.optimizer == "sgd":
            return torch.optim.SGD(parameters, learning_rate, momentum=self.momentum)
        return torch.optim.AdamW(parameters, learning_rate)

    def gone_on(
        self, weights: dict[str, Tensor], optimizer: torch.optim.Optimizer, trained: list[str], learning_rate: float
    ) -> tuple[dict[str, Tensor], torch.optim.Optimizer, int]:
        """What a new process makes of a checkpoint, and by how many windows it begins too early."""
        state = copy.deepcopy(optimizer.state_dict())
        weights = {name: w.detach().clone().requires_grad_() for name, w in weights.items()}
        again = self.make_optimizer([weights[n] for n in trained], learning_rate)
        if not self.forgets_optimizer:
            again.load_state_dict(state)
        return weights, again, 1 if self.forgets_step else 0

    def wrong_weights(self, weights: dict[str, Tensor], learning_rate: float) -> None:
        """What a trainer does to weights behind its optimizer's back."""
        if self.merges_in_bfloat16:
            merged = weights["head"].bfloat16() + (weights["lora.B"] @ weights["lora.A"]).bfloat16()
            weights["head"].copy_(merged - (weights["lora.B"] @ weights["lora.A"]).bfloat16())
        if self.trains_base:
            weights["embed"] -= learning_rate * 1e-3 * weights["embed"]
        if self.decays_anyway:
            weights["lora.A"] *= 0.999


def make_weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"embed": (IDS, WIDTH), "head": (IDS, WIDTH), "lora.A": (RANK, WIDTH), "lora.B": (IDS, RANK)}
    weights = {n: torch.randn(shape, generator=generator, dtype=torch.float64) for n, shape in shapes.items()}
    weights["lora.B"].zero_()
    return {name: w.requires_grad_() for name, w in weights.items()}


def copied(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: w.detach().clone() for name, w in weights.items()}
