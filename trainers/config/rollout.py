"""What GRPO samples, and what that is worth."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Literal

from logratio.losses.advantages import Advantage
from logratio.losses.options import Count, NotNegative, Positive, Range

from ..errors import UserError
from .advantages import advantage_called
from .numbers import NotNegativeCount, NotNegativeSteps, check_numbers, check_whole

NEEDS_ADAPTERS = (
    "--rollout_engine vllm gives the servers adapters, and here the whole model is trained: add --lora_r 16, or leave "
    "the engine out"
)


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """GRPO: what is generated, and what it is worth."""

    num_generations: int = 8
    """Completions of each prompt."""
    num_generations_eval: Count | None = None
    """Completions of each prompt in evaluations (default: num_generations)."""
    temperature: Positive = 1.0
    """Of sampling, and of the log-probs that are trained."""
    top_p: Annotated[float, Range(0, 1, above=True)] = 1.0
    """Sample from the smallest set of tokens that holds this probability."""
    top_k: NotNegativeCount = 0
    """Sample from so many of the likeliest tokens; 0: from all."""
    min_p: Annotated[float, Range(0, 1)] | None = None
    """Sample from the tokens of at least this share of the likeliest one's probability."""
    keep_sampling_mask: bool = False
    """Train the log-probs of the distribution that top_p, top_k and min_p leave (Keep Sampling Mask, DeepSeek-V3.2,
    arXiv 2512.02556), not those of the whole vocabulary as TRL does; those of a reference too."""
    repetition_penalty: Positive = 1.0
    """Divide the positive logits of tokens that prompt and completion hold already by this, multiply the negative."""
    stop_strings: tuple[str, ...] = ()
    """End a completion with the token that completes one of these, too."""
    rollout_engine: Literal["in_process", "vllm"] = "in_process"
    """What samples: this process, or vLLM servers beside it, which are given the adapter before they sample."""
    vllm_server_base_url: str | None = None
    """Where they are, as http://localhost:8000; commas between several."""
    vllm_server_timeout: Positive = 240.0
    """Seconds that a server may be silent before the run ends."""
    max_staleness: NotNegativeCount = 0
    """Let the servers sample while the policy learns: what a step first learns from was sampled by the policy of so
    many optimizer steps before; 0: by the policy as it is."""
    rollout_func: str | None = None
    """module:function that makes the completions, in turns with tools or an environment, as TRL's rollout_func."""
    steps_per_generation: Count = 1
    """Optimizer steps that a set of rollouts is sampled for at once and dealt to; from the second on they are off
    policy. Beside gradient_accumulation_steps it counts micro-steps, as in TRL, which must fill whole steps."""
    num_iterations: Count = 1
    """Passes over each set of rollouts, a step each (times steps_per_generation); from the second on they are off
    policy."""
    dynamic_sampling: Count = 1
    """Rounds of sampling for a step, at most: where all rewards of a prompt's completions are equal, which teaches
    nothing, the next prompt takes its place (DAPO; verl's max_num_gen_batches). 1: whatever comes is learned from."""
    reward_funcs: tuple[str, ...] = ("exact_answer",)
    """exact_answer, accuracy_reward, answer_format, overlong, module:function with TRL's signature, or a reward model:
    its folder, or its name on the Hub."""
    reward_weights: tuple[float, ...] | None = None
    """Weight of each reward (default: 1)."""
    reward_timeout: Positive | None = None
    """Seconds after which a reward that has not answered ends the run. Each reward is then called in a thread of its
    own, beside the others."""
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize"
    """Sum the rewards and form advantages, or (GDPO) normalize each reward in its group, sum, and whiten over the
    step."""
    advantage_type: tuple[str, ...] = ("group",)
    """One, or several that are added: group (GRPO), rloo, rloo_std, maxrl, passk, gpg, reinforce_pp_tokens,
    reinforce_pp, reinforce_pp_baseline, remax, opo, or module:function of (rewards, context)."""
    advantage_weights: tuple[float, ...] | None = None
    """Weight of each advantage_type (default: 1)."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Divide the advantages of type group by the standard deviation of their group, of the step's rewards, or not."""
    normalize_advantages: bool = False
    """Whiten the advantages over the step."""
    mask_truncated_completions: bool = False
    """Learn nothing from completions that reached the length limit; they are rewarded and counted as others are."""
    reward_kl_coef: NotNegative = 0.0
    """Take this times the divergence from the reference, summed over the completion, off its reward (RLOO,
    REINFORCE++)."""
    reward_kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Of that divergence: k1 d, k2 d^2 / 2, k3 exp(-d) + d - 1, with d the log-ratio of policy and reference."""
    teacher_coef: NotNegative | None = None
    """Add this times log p_teacher - log p to the advantage of each token (default: 1)."""
    log_completions: bool = True
    """Keep every completion in completions.parquet: prompt, text, each reward, advantage, length, why it ended, and
    what rewards give to log_extra."""
    log_completions_steps: NotNegativeSteps = 0.1
    """Show the best and the worst of a prompt's completions every so many steps, below 1: every such share of all;
    0: never."""

    def __post_init__(self) -> None:
        check_numbers(self)
        check_whole(self, "log_completions_steps")
        self._check_engine()
        if isinstance(self.advantage_type, str):
            object.__setattr__(self, "advantage_type", (self.advantage_type,))
        self._check_advantages()
        if self.keep_sampling_mask and not (self.top_p < 1 or self.top_k or self.min_p):
            raise UserError("--keep_sampling_mask is read only with --top_p below 1, --top_k or --min_p")
        if self.reward_weights is not None and len(self.reward_weights) != len(self.reward_funcs):
            raise UserError(
                f"--reward_weights has {len(self.reward_weights)} numbers for {len(self.reward_funcs)} --reward_funcs"
            )
        if self.reward_kl_estimator != "k1" and not self.reward_kl_coef:
            raise UserError(f"--reward_kl_estimator {self.reward_kl_estimator} is read only with --reward_kl_coef")
        if self.multi_objective_aggregation == "normalize_then_sum":
            own = ("advantage_type", "advantage_weights", "scale_rewards", "normalize_advantages", "reward_kl_coef")
            given = [f.name for f in dataclasses.fields(self) if f.name in own and getattr(self, f.name) != f.default]
            if given:
                raise UserError(
                    "--multi_objective_aggregation normalize_then_sum scales and whitens each reward in its own way; "
                    f"leave out --{' and --'.join(given)}"
                )

    @property
    def advantages(self) -> list[Advantage]:
        """Those of the advantage_type."""
        return [advantage_called(name) for name in self.advantage_type]

    @property
    def wants_greedy(self) -> bool:
        """One of them compares with a greedy completion of each prompt."""
        return any(one.wants_greedy for one in self.advantages)

    def _check_advantages(self) -> None:
        """UserError for advantages that there are not, and for options that they do not take."""
        names, several = ", ".join(self.advantage_type), self.advantages
        if not several:
            raise UserError("--advantage_type names none; leave it out for group")
        if self.advantage_weights is not None and len(self.advantage_weights) != len(several):
            raise UserError(
                f"--advantage_weights has {len(self.advantage_weights)} numbers for {len(several)} --advantage_type"
            )
        needed = max(one.smallest_group for one in several)
        if self.num_generations < needed:
            raise UserError(f"--num_generations {self.num_generations}: a group needs at least {needed} to compare")
        alone = [name for name, one in zip(self.advantage_type, several, strict=True) if one.smallest_group == 1]
        if self.dynamic_sampling > 1 and alone:
            raise UserError(
                f"--dynamic_sampling {self.dynamic_sampling}: with --advantage_type {alone[0]} completions "
                "of equal reward teach too; leave it out"
            )
        if self.scale_rewards != "group" and "group" not in self.advantage_type:
            raise UserError(
                f"--scale_rewards {self.scale_rewards} is an option of --advantage_type group, not of {names}"
            )
        if self.normalize_advantages and all(one.whitened for one in several):
            raise UserError(f"--normalize_advantages: the advantages of {names} are whitened already; leave it out")

    def _check_engine(self) -> None:
        """UserError where there are servers that nobody asks, or nobody to ask."""
        if self.rollout_engine == "vllm" and not self.servers:
            raise UserError("--rollout_engine vllm needs --vllm_server_base_url, as http://localhost:8000")
        if self.rollout_engine != "vllm" and self.vllm_server_base_url:
            raise UserError(
                f"--vllm_server_base_url {self.vllm_server_base_url} is read only with --rollout_engine vllm; add it, "
                "or leave this out"
            )
        if self.rollout_engine == "vllm" and self.keep_sampling_mask:
            raise UserError(
                "--keep_sampling_mask needs to know which tokens could have been drawn, which vLLM does not say: leave "
                "it out, and correct with --sampling_correction"
            )
        if self.rollout_engine != "vllm" and self.max_staleness:
            raise UserError(
                f"--max_staleness {self.max_staleness} lets servers sample while this process trains: add "
                "--rollout_engine vllm, or leave it out"
            )
        for name, why in (
            ("rollout_func", "it is called when its completions are learned from"),
            ("dynamic_sampling", "which prompts come next is known when the rewards are"),
        ):
            if self.max_staleness and (value := getattr(self, name)) not in (None, 1):
                raise UserError(
                    f"--max_staleness {self.max_staleness} does not go with --{name} {value}: {why}; leave one of them "
                    "out"
                )

    def resolved(self, accumulation: int | None) -> RolloutConfig:
        """With steps_per_generation in optimizer steps. accumulation: gradient_accumulation_steps, where given."""
        micro_steps, of_step = self.steps_per_generation, accumulation or 1
        if micro_steps % of_step and of_step % micro_steps:
            raise UserError(
                f"--steps_per_generation {micro_steps} is no multiple of --gradient_accumulation_steps {of_step}: "
                "rollouts are sampled for whole steps"
            )
        if 1 < micro_steps < of_step and self.num_iterations > 1:
            raise UserError(
                f"--steps_per_generation {micro_steps} is less than a step (--gradient_accumulation_steps {of_step}), "
                "which --num_iterations learns from as a whole: leave it out"
            )
        return dataclasses.replace(self, steps_per_generation=max(1, micro_steps // of_step))

    @property
    def steps_of_a_set(self) -> int:
        """Optimizer steps that learn from a set of rollouts."""
        return self.steps_per_generation * self.num_iterations

    @property
    def servers(self) -> list[str]:
        """The addresses in `vllm_server_base_url`, each once."""
        given = (url.strip().rstrip("/") for url in (self.vllm_server_base_url or "").split(","))
        return list(dict.fromkeys(url for url in given if url))
