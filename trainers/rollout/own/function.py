"""The function of `--rollout_func`: loaded, called, and its answer turned into what the loop learns from.

    function(prompts, turns) -> {"completion_ids": ..., "env_mask": ..., ...}

prompts: this process's, as the data set has them, each `num_generations` times in a row, as TRL's trainer gives them;
for the greedy answers that ReMax compares with, a call of its own has each once. turns: `Turns`, in the place of TRL's
trainer. The answer: `answer.py`.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from accelerate import Accelerator

from ...data.examples import Prompt
from ...errors import UserError, first_line
from ...ground.given import given
from ...ground.plugins import import_object
from ...policy.checks import learned_positions
from ...policy.policy import Policy
from ...processes.once import raised_together
from ..calling.asked import Reward, TrainerState, check_signature
from ..calling.said import raised_at
from ..engines.protocol import Engine, Sample, Sampling, Say
from .answer import read
from .turns import Turns

Function = Callable[[list[Any], Any], Any]
OPTION = "--rollout_func"


def load_function(name: str) -> Function:
    """`module:function`, or an object's name. Raises UserError where it is nothing to call with two arguments."""
    function = given(name) or import_object(name, OPTION)
    if inspect.isclass(function) or not callable(function):
        raise UserError(f"{OPTION} {name} must be a function of (prompts, trainer), but is {type(function).__name__}")
    with contextlib.suppress(ValueError):  # of what is not written in Python
        try:
            inspect.signature(function).bind([], None)
        except TypeError as error:
            raise UserError(f"{OPTION} {name} is called with (prompts, trainer): {error}") from error
    return function  # type: ignore[no-any-return]


class OwnRollouts:
    """name: as it was given. rewards: that may want fields of the answer."""

    def __init__(
        self,
        name: str,
        function: Function,
        engine: Engine,
        *,
        policy: Policy,
        tokenizer: Any,
        rewards: dict[str, Reward],
        state: TrainerState,
        accelerator: Accelerator | None,
    ) -> None:
        self.name, self.function, self.engine = name, function, engine
        self.tokenizer, self.rewards, self.state, self.accelerator = tokenizer, rewards, state, accelerator
        self.words = int(policy.causal_lm.get_input_embeddings().weight.shape[0])
        self.positions = learned_positions(policy.causal_lm)

    def __call__(
        self, prompts: Sequence[Prompt], seeds: Sequence[Sequence[int | None]], sampling: Sampling
    ) -> list[list[Sample]]:
        """Of each prompt, for each of its seeds: a completion. Called on all processes; what one raises, all raise."""
        said: list[list[Sample]] = [[] for _ in prompts]
        together = contextlib.nullcontext() if self.accelerator is None else raised_together(self.accelerator)
        with together, self.engine.rounds() as say:
            for greedy in (False, True):
                own = [[seed for seed in of_prompt if (seed is None) is greedy] for of_prompt in seeds]
                if not any(own):
                    continue
                samples = iter(self._call(prompts, own, say, sampling))
                for of_prompt, some in zip(said, own, strict=True):
                    of_prompt += [next(samples) for _ in some]
        return said

    def _call(
        self, each: Sequence[Prompt], seeds: Sequence[Sequence[int | None]], say: Say, sampling: Sampling
    ) -> list[Sample]:
        """One call of the function, for as many completions of each prompt as it has seeds, of which all have as
        many."""
        prompts = [prompt for prompt, own in zip(each, seeds, strict=True) for _ in own]
        turns = Turns(
            prompts,
            [seed for own in seeds for seed in own],
            say,
            sampling,
            processing_class=self.tokenizer,
            num_generations=len(seeds[0]),
            state=self.state,
            words=self.words,
        )
        try:
            answer = self.function(copy.deepcopy([p.prompt for p in prompts]), turns)
            samples = read(answer, turns, prompts, self.positions)
            for reward, function in self.rewards.items():
                check_signature(reward, function, samples[0].told.columns if samples[0].told else ())
        except UserError as error:
            raise UserError(f"{OPTION} {self.name}: {error}") from error
        except (Exception, SystemExit) as error:
            said = f"{type(error).__name__}: {first_line(error)}{raised_at(error, __file__)}"
            raise UserError(f"{OPTION} {self.name} raised {said}") from error
        return samples
