"""GRPO's data: completions sampled from the policy, scored by rewards, compared within their group."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from logratio.losses import Mean
from logratio.losses.advantages import AGGREGATIONS, advantages_of, sum_then_normalize

from ..config import RolloutConfig
from ..data.examples import Completion, Example, Prompt
from ..errors import UserError, counted
from ..ground.folder import staying
from ..policy.policy import Policy
from ..processes.dealing import gather_rows
from ..processes.once import raised_together
from .calling.asked import Asked, Reward, RewardLog, TrainerState
from .calling.calls import Calls
from .engines.background import Begun
from .engines.choosing import engine_of
from .engines.protocol import Background, Request, Said, Sample, Sampling
from .generation import Purpose, requests_of, stop_ids
from .kept import Keeper
from .metrics import completion_metrics, reward_metrics, tokens_of
from .own.function import Function, OwnRollouts
from .sets.flights import Flights
from .sets.rolled import Rolled, Scored
from .watch import Watch

MOVED = "a reward, or what samples, changed the working directory of the process: it was set back behind the call"


class Rollouts:
    """Prompts -> completions and their rewards -> advantages, and TRL's reward metrics.

    state: what rewards are told of the training. accelerator: of the processes that an error in a reward ends together;
    None: there is one process. seed, output_dir: the run's; the latter for engines beside this process.
    """

    def __init__(
        self,
        policy: Policy,
        tokenizer: Any,
        config: RolloutConfig,
        rewards: dict[str, Reward],
        max_completion_length: int,
        *,
        state: TrainerState | None = None,
        accelerator: Accelerator | None = None,
        seed: int = 0,
        output_dir: str = "",
        rollout_func: Function | None = None,
    ) -> None:
        self.policy, self.tokenizer, self.config, self.rewards = policy, tokenizer, config, rewards
        self.max_completion_length, self.seed = max_completion_length, seed
        self.state, self.accelerator = state or TrainerState(), accelerator
        self.weights = torch.tensor(config.reward_weights or [1.0] * len(rewards), dtype=torch.float64)
        self.watch = Watch(self.weights, list(self.rewards), -(-self.state.max_steps // config.steps_of_a_set))
        self.calls = Calls(
            timeout=config.reward_timeout,
            device=None if accelerator is None else accelerator.device,
            tell=lambda text: self.watch.note("draw", text),
        )
        self.timed = (0.0, 0)  # seconds and tokens of the last rollouts
        self.engine = engine_of(
            config, policy, tokenizer, tell=self.watch.note, accelerator=accelerator, output_dir=output_dir
        )
        self.keeper = Keeper(list(rewards), self.weights, self.engine.name, wanted=config.log_completions)
        self.flights = Flights(self.begin, config.max_staleness)
        self.own = None
        if rollout_func is not None:
            self.own = OwnRollouts(
                config.rollout_func or "",
                rollout_func,
                self.engine,
                policy=policy,
                tokenizer=tokenizer,
                rewards=rewards,
                state=self.state,
                accelerator=accelerator,
            )

    def at_most(self, prompts: int) -> str:
        """One line: the tokens that are sampled for a step of so many prompts."""
        of_each = self.config.num_generations + self.config.wants_greedy
        longest = self.max_completion_length
        steps = self.config.steps_per_generation
        prompts *= steps * self.config.dynamic_sampling
        made_of = f"{counted(prompts, 'prompt')} x {of_each} completions x --max_completion_length {longest}"
        made_of += ", what an environment writes among them" if self.own is not None else ""
        sampled = f"{prompts * of_each * longest:,} tokens: {made_of}"
        return f"a step samples up to {sampled}" if steps == 1 else f"up to {sampled} are sampled for {steps} steps"

    def __call__(self, prompts: Sequence[Prompt], purpose: Purpose = "train", said: Said | None = None) -> Rolled:
        """Sample `num_generations` completions of each prompt, in evaluations `num_generations_eval`, and score them;
        in training a greedy one too, where the advantages want it.

        prompts: this process's part of the step's `numbered` ones. said: what was sampled of them already.
        """
        with staying(lambda: self.watch.note("folder", MOVED)):
            group, greedy = self.group(purpose), self.greedy(purpose)
            if said is None:
                said = self.sample(self.requests(prompts, purpose, self.state.global_step), prompts)
            sampled = [sample for samples in said for sample in samples[:group]]
            repeated = [sample.told or prompts[i // group] for i, sample in enumerate(sampled)]
            scored = self.score(repeated, sampled)
            by_function = scored.rewards.reshape(len(prompts), group, len(self.rewards))
            baseline = None
            if greedy:
                best = [samples[-1] for samples in said]
                rewards = self.score([s.told or p for s, p in zip(best, prompts, strict=True)], best).rewards
                baseline = sum_then_normalize(rewards[:, None], self.weights)
            examples = [
                Example(
                    repeated[i * group].prompt_ids,
                    [self.completion(s) for s in sampled[i * group : (i + 1) * group]],
                    row=prompt.row,
                    occurrence=prompt.occurrence,
                )
                for i, prompt in enumerate(prompts)
            ]
            ended = torch.tensor([float(s.ended) for s in sampled]).reshape(len(prompts), group)
            texts = [prompt.prompt for prompt in repeated]
            return Rolled(
                examples, by_function, baseline, ended, scored.logged, texts, sampled, scored.texts, scored.extra
            )

    def group(self, purpose: Purpose) -> int:
        """Sampled completions of a prompt."""
        config = self.config
        return config.num_generations if purpose == "train" else config.num_generations_eval or config.num_generations

    def greedy(self, purpose: Purpose) -> bool:
        """Whether a greedy one comes behind them."""
        return purpose == "train" and self.config.wants_greedy

    def requests(self, prompts: Sequence[Prompt], purpose: Purpose, step: int) -> list[Request]:
        """What is asked of the engine for them; step: see `completion_seed`."""
        group, greedy = self.group(purpose), self.greedy(purpose)
        return requests_of(prompts, group, purpose=purpose, seed=self.seed, step=step, greedy=greedy)

    def sampling(self, prompts: Sequence[Prompt]) -> Sampling:
        """How completions of these prompts are drawn."""
        config = self.config
        return Sampling(
            max_new_tokens=self.max_completion_length,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            min_p=config.min_p or 0.0,
            repetition_penalty=config.repetition_penalty,
            stop_ids=stop_ids(self.policy.causal_lm, self.tokenizer, prompts),
            stop_strings=config.stop_strings,
            keep_support=config.keep_sampling_mask,
        )

    def sample(self, requests: Sequence[Request], prompts: Sequence[Prompt]) -> Said:
        """What the engine says to the requests, which are of these prompts."""
        started = time.perf_counter()
        self.engine.sync(self.state.global_step)
        if self.own is None:
            said = self.engine.sample(requests, self.sampling(prompts))
        else:
            said = self.own(prompts, [request.seeds for request in requests], self.sampling(prompts))
        self.timed = time.perf_counter() - started, tokens_of(said)
        return said

    def begin(self, prompts: Sequence[Prompt], first: int) -> Begun[Said]:
        """Let the engine sample in the background what is first learned from when so many steps are done."""
        assert isinstance(self.engine, Background)
        self.engine.sync(self.state.global_step)
        return self.engine.begin(self.requests(prompts, "train", first), self.sampling(prompts))

    def close(self) -> None:
        """Nothing is sampled any more."""
        self.calls.close()
        self.engine.close()

    def completion(self, sampled: Sample) -> Completion:
        cut = self.config.mask_truncated_completions and not sampled.ended
        scored = [False] * len(sampled.ids) if cut else sampled.written
        return Completion(sampled.ids, scored, behavior=sampled.logps, support=sampled.support)

    def score(self, prompts: Sequence[Prompt], sampled: Sequence[Sample]) -> Scored:
        """What the rewards say. Raises UserError on all processes where a reward fails on one of them."""
        log, texts = RewardLog(len(sampled)), []
        scores = torch.full((len(sampled), len(self.rewards)), torch.nan, dtype=torch.float64)
        alone = self.accelerator is None or self.accelerator.num_processes == 1
        with contextlib.nullcontext() if self.accelerator is None else raised_together(self.accelerator):
            if sampled:
                texts = self.tokenizer.batch_decode([s.ids for s in sampled], skip_special_tokens=True)
                asked = Asked(
                    prompts=[p.prompt for p in prompts],
                    completions=[
                        t if isinstance(p.prompt, str) else [{"role": "assistant", "content": t}]
                        for p, t in zip(prompts, texts, strict=True)
                    ],
                    completion_ids=[s.ids for s in sampled],
                    columns={key: [p.columns[key] for p in prompts] for key in prompts[0].columns},
                    rows=[p.row for p in prompts],
                )
                limit = self.max_completion_length
                by_reward = self.calls(self.rewards, asked, max_completion_length=limit, state=self.state, log=log)
                for column, values in enumerate(by_reward):
                    known = [torch.nan if value is None else value for value in values]
                    scores[:, column] = torch.tensor(known, dtype=torch.float64)
        said = list(log.metrics) if alone else gather_object(list(log.metrics))
        names = sorted(set(said))
        if not self.config.log_completions:
            self.watch.columns(log.columns)
        logged = {name: Mean.of(torch.tensor(log.metrics[name], dtype=torch.float64)) for name in names}
        return Scored(scores, texts, logged, log.columns)

    def advantages(
        self, rolled: Rolled, accelerator: Accelerator, kl: Tensor | None = None, taught: Tensor | None = None
    ) -> Tensor:
        """[prompts, G] float64 advantages of a process's rollouts, among all that were sampled with them; or
        [prompts, G, T], of tokens. Raises UserError, on all processes alike, where they cannot be formed.

        kl: [prompts, G], what `reward_kl_coef` weighs: the divergence of each completion from the reference. taught:
        [prompts, G, T], what `teacher_coef` weighs, of the process's own tokens; added when all else is done.
        """
        config, (prompts, group, functions) = self.config, rolled.by_function.shape
        others = [
            rolled.lengths,
            torch.zeros(prompts, group) if rolled.baseline is None else rolled.baseline.expand(-1, group),
            torch.zeros(prompts, group) if kl is None else kl,
        ]
        columns = torch.cat([rolled.by_function, torch.stack(others, -1)], -1)
        everyone, own = gather_rows(accelerator, columns)
        by_function, (lengths, baseline, kl) = everyone[..., :functions], everyone[..., functions:].unbind(-1)
        rewards = AGGREGATIONS[config.multi_objective_aggregation](by_function, self.weights)
        gdpo = config.multi_objective_aggregation == "normalize_then_sum"
        try:
            advantages = advantages_of(
                rewards - config.reward_kl_coef * kl,
                "reinforce_pp" if gdpo else config.advantages,
                weights=None if gdpo else config.advantage_weights,
                scale=config.scale_rewards,
                lengths=lengths,
                baseline=baseline[:, :1],
                normalize_advantages=config.normalize_advantages,
            )
        except ValueError as error:
            raise UserError(f"--advantage_type {' '.join(config.advantage_type)}: {error}") from error
        if advantages.ndim == 3 and advantages.shape[2] < lengths.max():
            raise UserError(
                f"--advantage_type {' '.join(config.advantage_type)} gave advantages of {advantages.shape[2]} tokens, "
                f"and a completion has {int(lengths.max())}"
            )
        self.watch.rollouts(self.state.global_step + 1, by_function, advantages, alone=taught is None)
        advantages = advantages[own]
        if taught is not None:
            of_rewards = advantages[..., : taught.shape[2]] if advantages.ndim == 3 else advantages[..., None]
            advantages = of_rewards + (config.teacher_coef or 0.0) * taught
        self.keeper.keep(self.state.global_step + 1, rolled, advantages, accelerator)
        return advantages

    def metrics(self, rolled: Rolled, accelerator: Accelerator) -> dict[str, Mean]:
        """TRL's, of what the reward functions said (a KL penalty is not in them), over all processes; and the share of
        this process in what the rewards logged."""
        lengths = rolled.lengths
        ended = torch.ones_like(lengths) if rolled.ended is None else rolled.ended
        everyone, _ = gather_rows(accelerator, torch.cat([rolled.by_function, torch.stack([lengths, ended], -1)], -1))
        by_function, (lengths, ended) = everyone[..., :-2], everyone[..., -2:].unbind(-1)
        self.watch.clipped(self.state.global_step + 1, ended, self.max_completion_length)
        return {
            **rolled.logged,
            **completion_metrics(lengths, ended),
            **reward_metrics(by_function, self.weights, list(self.rewards)),
        }

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint, in JSON's types; the number of steps done is told to `after`."""
        return {"generation_rows": self.engine.rows, "watch": self.watch.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.engine.rows = state["generation_rows"]
        self.watch.load_state_dict(state["watch"])

    def after(self, step: int) -> list[str]:
        """So many optimizer steps are done; returns what there is to tell of them."""
        self.state.global_step = step
        return self.watch.take()
