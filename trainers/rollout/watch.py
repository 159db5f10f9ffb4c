"""What a user should be told of the rewards, each thing once."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor

from logratio.losses.advantages import sum_then_normalize

FIRST = 5  # sets of rollouts without a difference, after which a line says so


CLIPPED = 0.9  # of completions that reach the length limit, from which on a line says so


class Watch:
    """Looks at the rewards of every optimizer step's rollouts, of all processes.

    weights, names: of the reward functions. sets: of rollouts that the run will have, one or more steps each; 0:
    unknown.
    """

    def __init__(self, weights: Tensor, names: Sequence[str], sets: int = 0) -> None:
        self.weights, self.names, self.first = weights, list(names), min(FIRST, sets or FIRST)
        self.constant: dict[str, list[float]] = {}  # reward -> [its only value so far, sets]; none: it had others
        self.alike = 0  # sets, from the first on, in which nothing could be told apart; -1: there was another
        self._notes: dict[str, str] = {}
        self._told: set[str] = set()

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint, in JSON's types: a run that goes on says nothing twice."""
        return {"alike": self.alike, "constant": self.constant, "told": sorted(self._told)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.alike, self.constant, self._told = state["alike"], dict(state["constant"]), set(state["told"])

    def take(self) -> list[str]:
        """What there is to tell since the last time."""
        notes, self._notes = self._notes, {}
        self._told |= notes.keys()
        return list(notes.values())

    def note(self, key: str, text: str) -> None:
        if key not in self._told:
            self._notes.setdefault(key, text)

    def columns(self, names: Collection[str]) -> None:
        """names: of columns that rewards gave to log_extra."""
        if names:
            self.note(
                "columns",
                "completions are not kept (--no_log_completions), nor what rewards give to log_extra: "
                + ", ".join(sorted(names)),
            )

    def rollouts(self, step: int, by_function: Tensor, advantages: Tensor, alone: bool = True) -> None:
        """by_function: [prompts, G, K], NaN where a reward function returned None. advantages: [prompts, G]. alone:
        nothing else teaches."""
        rewards = sum_then_normalize(by_function, self.weights)
        known = rewards[~rewards.isnan()]
        unscored = rewards.numel() - known.numel()
        if unscored:
            self.note(
                "unscored",
                f"step {step}: no reward function had an opinion on {unscored} of {rewards.numel()} completions, which "
                "count for nothing (completions/unscored_ratio in the log is their share of each step)",
            )
        self._constants(step, by_function)
        if not alone or (advantages.any() and known.min() < known.max()):
            self.alike = -1
        elif self.alike >= 0:
            self.alike += 1
        if self.alike == self.first:
            self.note(
                "alike",
                f"up to step {step} the rewards told no completion of a prompt from another, so that nothing could be "
                "learned from them: start from a model that is right now and then (SFT first), or take a reward that "
                "has degrees",
            )

    def _constants(self, step: int, by_function: Tensor) -> None:
        """Look for rewards that have said the same of every completion."""
        for name, values in zip(self.names, by_function.flatten(0, 1).unbind(-1), strict=True):
            known = values[~values.isnan()]
            if not len(known):
                continue
            value, sets = self.constant.setdefault(name, [float(known[0]), 0])
            alike = sets >= 0 and bool((known == value).all())
            self.constant[name] = [value, sets + 1 if alike else -1]
            if self.constant[name][1] == self.first and len(self.names) > 1:
                self.note(
                    f"constant {name}",
                    f"up to step {step} the reward {name!r} gave {value:.6g} to every completion, so that it taught "
                    "nothing: look at what it is given (of a conversation a list of messages, whose text is "
                    'completion[0]["content"])',
                )

    def clipped(self, step: int, ended: Tensor, limit: int) -> None:
        """ended: of each completion of all processes, whether it came to an end within the limit, in tokens."""
        share = 1 - float(ended.float().mean())
        if share > CLIPPED:
            self.note(
                "clipped",
                f"step {step}: {100 * share:.0f} % of the completions reached --max_completion_length {limit} without "
                "an end: allow longer ones, or start from a model that ends its answers",
            )
