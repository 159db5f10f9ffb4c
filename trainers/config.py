"""The options of a run, by TRL's names where they mean what TRL's do; docstrings are the command line's help."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from logratio.losses import LOSSES, Kind
from logratio.losses.advantages import ADVANTAGES
from logratio.losses.options import Count, NotNegative, Positive, Range, Share, out_of_range

from .errors import UserError

# TRL's defaults; every method but SFT starts from a model that can already speak.
DEFAULT_LEARNING_RATE = {"sft": 2e-5}
OTHER_LEARNING_RATE = 1e-6
DEFAULT_BATCH_SIZE = 8
# Options that say nothing by themselves, with their defaults. In the dataclass they are None, which means "not given",
# so that what would not be read can be refused.
LORA: dict[str, Any] = {"lora_alpha": 32.0, "lora_dropout": 0.0, "lora_target_modules": ("all-linear",)}
SYNC: dict[str, Any] = {"ref_model_mixup_alpha": 0.6, "ref_model_sync_steps": 512}

# Options that say how a run is begun, not what it is.
ONCE = frozenset({"overwrite_output_dir", "resume_from_checkpoint"})

Seed = Annotated[int, Range(0, 2**32 - 1)]  # NumPy takes no other
NotNegativeCount = Annotated[int, Range(0)]


def check_numbers(config: Any) -> None:
    """Raise UserError for the first number that is not finite or outside the range in its annotation."""
    for name, value, must in out_of_range(config):
        raise UserError(f"--{name} {must}, got {value}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What is trained, and beside which reference."""

    model_name_or_path: str = "tiny"
    """Hub name, local folder, or "tiny": the embedded model with random weights."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the model's weights. Adapters are float32 in any case."""
    attn_implementation: str | None = None
    """Attention implementation of transformers (default: flex_attention on a GPU where it fits, else its choice)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    lora_r: NotNegativeCount = 0
    """Rank of the LoRA adapters; 0 trains the whole model."""
    lora_alpha: Positive | None = None
    """The adapters' output is scaled by lora_alpha / lora_r (default: 32)."""
    lora_dropout: Annotated[float, Range(0, 1, below=True)] | None = None
    """Dropout in front of the new adapters (default: 0), on in training whatever disable_dropout is."""
    lora_target_modules: tuple[str, ...] | None = None
    """Names of the modules that get adapters, or all-linear (the default)."""
    fused_lora: bool = True
    """Add the adapters' part into the layers' outputs instead of beside them: the same result with fewer passes."""
    fused_layers: bool = True
    """On a GPU: RMSNorm, SwiGLU and RoPE by a kernel each, which keep less for the backward pass."""
    use_liger_kernel: bool = False
    """In their place Liger-Kernel's RMSNorm, SwiGLU and RoPE, on a GPU; the losses stay ours."""
    load_in_4bit: bool = False
    """QLoRA: frozen weights in nf4 with double quantization. Needs adapters."""
    disable_dropout: bool | None = None
    """Train without the dropout that the model and a loaded adapter bring along (default: yes, but for SFT)."""
    adapter_name_or_path: str | None = None
    """Go on training this adapter; a frozen copy of it is the reference."""
    ref_model_name_or_path: str | None = None
    """Reference model, where it is neither the starting model nor the starting adapter."""
    precompute_ref_log_probs: bool = False
    """Compute the reference's log-probs once, before training, and keep them in output_dir."""
    sync_ref_model: bool = False
    """Let the reference follow the policy (TR-DPO), in full fine-tuning, LoRA and QLoRA."""
    ref_model_mixup_alpha: Share | None = None
    """Its weights become this x the policy's + (1 - this) x its own (default: 0.6)."""
    ref_model_sync_steps: Count | None = None
    """Every so many optimizer steps (default: 512)."""

    def __post_init__(self) -> None:
        check_numbers(self)
        adapters = self.lora_r > 0 or self.adapter_name_or_path
        if self.load_in_4bit and not adapters:
            raise UserError("--load_in_4bit freezes the model, so something else must train: add --lora_r 16")
        if self.adapter_name_or_path and self.lora_r:
            raise UserError(
                f"--lora_r {self.lora_r} asks for new adapters, --adapter_name_or_path {self.adapter_name_or_path} "
                "goes on with those of a run before; leave one of them out"
            )
        if not self.lora_r:
            theirs = "these describe new adapters, and --adapter_name_or_path brings its own; leave them out"
            ours = "without adapters nothing reads this; add --lora_r 16, or leave it out"
            self._refuse_given(LORA, theirs if adapters else ours)
        if not self.sync_ref_model:
            self._refuse_given(SYNC, "nothing reads this without --sync_ref_model; add it, or leave this out")
        if self.sync_ref_model and self.precompute_ref_log_probs:
            raise UserError("--sync_ref_model changes the reference, whose log-probs --precompute_ref_log_probs fixes")
        if self.sync_ref_model and self.ref_model_name_or_path:
            raise UserError(
                "--sync_ref_model blends the policy into the weights that it started from, which "
                f"--ref_model_name_or_path {self.ref_model_name_or_path} are not; leave one of them out"
            )

    def _refuse_given(self, options: Mapping[str, Any], why: str) -> None:
        given = [f"--{name}" for name in options if getattr(self, name) is not None]
        if given:
            raise UserError(f"{', '.join(given)}: {why}")

    def resolved(self, loss: Any = None) -> ModelConfig:
        """With the defaults of what is used filled in; disable_dropout's depends on the loss.

        TRL 1.16 disables dropout in DPO, KTO, ORPO and CPO too, but neither in GRPO nor in RLOO, whose ratios are
        then not 1 on policy.
        """
        used = {**(LORA if self.lora_r else {}), **(SYNC if self.sync_ref_model else {})}
        found = {name: value for name, value in used.items() if getattr(self, name) is None}
        if self.disable_dropout is None and loss is not None:
            found["disable_dropout"] = loss.kind is not Kind.SEQUENCE or loss.wants_reference
        return dataclasses.replace(self, **found)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What it is trained on."""

    dataset_name: str = "arithmetic"
    """Hub name, .jsonl, .json (or these gzipped) or .parquet file, folder, or "arithmetic": the embedded task."""
    dataset_config: str | None = None
    """Configuration of a hub data set."""
    dataset_train_split: str = "train"
    """Split to train on."""
    dataset_test_split: str | None = None
    """Split to evaluate on."""
    eval_size: NotNegativeCount = 0
    """Rows of the train split to hold out for evaluation instead."""
    max_length: int = 1024
    """Longest prompt with one completion, in tokens; what is longer is cut at the end, and counted."""
    completion_only_loss: bool | None = None
    """SFT: score the completion only (default: yes where rows have one)."""
    assistant_only_loss: bool = False
    """SFT: score the assistant's turns only."""
    on_bad_row: Literal["error", "skip"] = "error"
    """A row that cannot be used ends the run, or is left out, counted, and listed in output_dir/skipped_rows.jsonl."""
    shuffle: bool = True
    """Shuffle the rows in every epoch."""

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.max_length < 2:
            raise UserError(f"--max_length {self.max_length} leaves no room for a prompt and a completion")
        if self.eval_size and self.dataset_test_split:
            raise UserError("--eval_size and --dataset_test_split both say what to evaluate on; give one of them")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How it is trained."""

    output_dir: str = "runs/latest"
    """Folder for the log, the configuration and the trained model."""
    overwrite_output_dir: bool = False
    """Remove the model and checkpoints that another run left in output_dir; logs and reference log-probs stay."""
    batch_size: Count | None = None
    """Examples of an optimizer step over all processes (default 8): rows for SFT and KTO, pairs for DPO and ORPO,
    prompts for GRPO."""
    per_device_train_batch_size: Count | None = None
    """TRL's spelling: batch_size = this x gradient_accumulation_steps x processes."""
    gradient_accumulation_steps: Count | None = None
    """TRL's spelling, see per_device_train_batch_size."""
    micro_batch_tokens: Count = 8192
    """Tokens of one forward pass on one process, padding included: memory against speed, never the result."""
    max_steps: Count | None = None
    """Optimizer steps (default: as many as num_train_epochs takes)."""
    num_train_epochs: Positive = 3.0
    """Passes over the data."""
    learning_rate: NotNegative | None = None
    """Peak learning rate (default: 2e-5 for SFT, 1e-6 for the others)."""
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "linear"
    """Learning rate after the warm-up."""
    warmup_steps: NotNegativeCount = 0
    """Steps in which the learning rate grows from 0."""
    max_grad_norm: NotNegative = 1.0
    """Clip the gradient's norm to this; 0 does not clip."""
    weight_decay: NotNegative = 0.0
    """AdamW's weight decay, of matrices only."""
    optim: Literal["adamw_torch", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"] = "adamw_torch"
    """Optimizer; all but the first are bitsandbytes'."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Autocast of the forward pass."""
    eval_steps: Count | None = None
    """Evaluate every so many steps (default: at the end only)."""
    seed: Seed = 42
    """Of shuffling, adapters, dropout and rollouts."""

    def __post_init__(self) -> None:
        check_numbers(self)

    def resolved(self, method: str, num_processes: int) -> TrainConfig:
        """With every default that depends on the method or the number of processes filled in, and TRL's spelling of
        batch_size multiplied out."""
        per_device, accumulation = self.per_device_train_batch_size, self.gradient_accumulation_steps
        batch_size = self.batch_size
        if per_device is not None or accumulation is not None:
            product = (per_device or DEFAULT_BATCH_SIZE) * (accumulation or 1) * num_processes
            if batch_size not in (None, product):
                raise UserError(
                    f"--batch_size {batch_size} contradicts per_device_train_batch_size x "
                    f"gradient_accumulation_steps x processes = {product}; give one or the other"
                )
            batch_size = product
        rate = self.learning_rate
        if rate is None:
            rate = DEFAULT_LEARNING_RATE.get(method, OTHER_LEARNING_RATE)
        return dataclasses.replace(
            self,
            batch_size=batch_size or DEFAULT_BATCH_SIZE,
            per_device_train_batch_size=None,
            gradient_accumulation_steps=None,
            learning_rate=rate,
        )


@dataclass(frozen=True, kw_only=True)
class SaveConfig:
    """What is kept on the way, and how a run goes on from it."""

    save_steps: Count | None = None
    """Leave a checkpoint every so many steps, and at the end (default: none, the trained model alone)."""
    save_total_limit: Count | None = None
    """Keep so many checkpoints, the latest ones, the best among them (default: all)."""
    resume_from_checkpoint: str | None = None
    """Go on from a checkpoint as if the run had never stopped: its folder, or "latest": the last whole one in
    output_dir, or the beginning where there is none."""
    load_best_model_at_end: bool = False
    """Save in the end the weights of the best evaluation by metric_for_best_model; each that is the best so far leaves
    a checkpoint too."""
    metric_for_best_model: str | None = None
    """A metric of the evaluations, with or without eval_ (default: loss)."""
    greater_is_better: bool | None = None
    """Whether more of it is better (default: unless its name ends in loss)."""
    early_stopping_patience: Count | None = None
    """End after so many evaluations in turn without a better value of metric_for_best_model."""

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.save_total_limit and not self.save_steps and not self.load_best_model_at_end:
            raise UserError("--save_total_limit is about checkpoints, and there are none without --save_steps")
        for name in ("metric_for_best_model", "greater_is_better"):
            if getattr(self, name) is not None and not self.compares:
                raise UserError(f"--{name} is read only with --load_best_model_at_end or --early_stopping_patience")

    @property
    def compares(self) -> bool:
        """Whether evaluations are compared with each other."""
        return self.load_best_model_at_end or self.early_stopping_patience is not None

    @property
    def metric(self) -> str:
        """The metric that they are compared by, as the log has it."""
        return "eval_" + (self.metric_for_best_model or "loss").removeprefix("eval_")

    @property
    def greater(self) -> bool:
        if self.greater_is_better is None:
            return not self.metric.endswith("loss")
        return self.greater_is_better


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """GRPO: what is generated, and what it is worth."""

    num_generations: int = 8
    """Completions of each prompt."""
    temperature: Positive = 1.0
    """Of sampling, and of the log-probs that are trained."""
    top_p: Annotated[float, Range(0, 1, above=True)] = 1.0
    """Sample from the smallest set of tokens that holds this probability."""
    num_iterations: Count = 1
    """Optimizer steps on each set of rollouts; from the second on they are off policy."""
    reward_funcs: tuple[str, ...] = ("exact_answer",)
    """exact_answer, accuracy_reward, answer_format, overlong, or module:function with TRL's signature."""
    reward_weights: tuple[float, ...] | None = None
    """Weight of each reward (default: 1)."""
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize"
    """Sum the rewards and form advantages, or (GDPO) normalize each reward in its group, sum, and whiten over the
    step."""
    advantage_type: str = "group"
    """group (GRPO), rloo, reinforce_pp, reinforce_pp_baseline, remax or opo."""
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

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.advantage_type not in ADVANTAGES:
            raise UserError(
                f"--advantage_type {self.advantage_type} is unknown, expected one of: {', '.join(ADVANTAGES)}"
            )
        advantage = ADVANTAGES[self.advantage_type]
        if self.num_generations < advantage.smallest_group:
            needed = advantage.smallest_group
            raise UserError(f"--num_generations {self.num_generations}: a group needs at least {needed} to compare")
        if self.reward_weights is not None and len(self.reward_weights) != len(self.reward_funcs):
            raise UserError(
                f"--reward_weights has {len(self.reward_weights)} numbers for {len(self.reward_funcs)} --reward_funcs"
            )
        if self.reward_kl_estimator != "k1" and not self.reward_kl_coef:
            raise UserError(f"--reward_kl_estimator {self.reward_kl_estimator} is read only with --reward_kl_coef")
        if self.multi_objective_aggregation == "normalize_then_sum":
            own = ("advantage_type", "scale_rewards", "normalize_advantages", "reward_kl_coef")
            given = [f.name for f in dataclasses.fields(self) if f.name in own and getattr(self, f.name) != f.default]
            if given:
                raise UserError(
                    "--multi_objective_aggregation normalize_then_sum scales and whitens each reward in its own way; "
                    f"leave out --{' and --'.join(given)}"
                )
        if self.scale_rewards != "group" and self.advantage_type != "group":
            raise UserError(
                f"--scale_rewards {self.scale_rewards} is an option of --advantage_type group, "
                f"not of {self.advantage_type}"
            )
        if self.normalize_advantages and advantage.whitened:
            raise UserError(
                f"--normalize_advantages: the advantages of {self.advantage_type} are whitened already; leave it out"
            )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All of it. `rollout` is there for losses whose kind is GROUPED."""

    method: str
    loss: Any
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    save: SaveConfig = field(default_factory=SaveConfig)
    rollout: RolloutConfig | None = None

    def __post_init__(self) -> None:
        model, data, train, save = self.model, self.data, self.train, self.save
        if not self.wants_reference:
            for name in ("sync_ref_model", "precompute_ref_log_probs", "ref_model_name_or_path"):
                if value := getattr(model, name):
                    given = f"--{name}" if value is True else f"--{name} {value}"
                    raise UserError(f"{given} is about the reference, but this {self.method} has none; leave it out")
        if train.eval_steps and not data.eval_size and not data.dataset_test_split:
            raise UserError(
                f"--eval_steps {train.eval_steps} has nothing to evaluate on: add --eval_size or --dataset_test_split"
            )
        if save.compares and not train.eval_steps:
            option = "load_best_model_at_end" if save.load_best_model_at_end else "early_stopping_patience"
            raise UserError(f"--{option} compares evaluations: add --eval_steps")
        if train.overwrite_output_dir and save.resume_from_checkpoint:
            raise UserError(
                "--overwrite_output_dir removes what --resume_from_checkpoint goes on from; leave one of them out"
            )

    def resolved(self, num_processes: int) -> RunConfig:
        """With every default filled in that depends on other options, the method or the number of processes."""
        train = self.train.resolved(self.method, num_processes)
        return dataclasses.replace(self, model=self.model.resolved(self.loss), train=train)

    @property
    def wants_reference(self) -> bool:
        """Whether the loss or the rewards compare with a reference model."""
        return self.loss.wants_reference or (self.rollout is not None and self.rollout.reward_kl_coef > 0)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for run_config.json, which `--config` takes; without how it was begun (`ONCE`)."""
        parts = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        plain = {k: dataclasses.asdict(v) if dataclasses.is_dataclass(v) else v for k, v in parts.items()}  # type: ignore[arg-type]
        for options in (plain["train"], plain["save"]):
            for name in ONCE & options.keys():
                del options[name]
        return {"method": plain.pop("method"), "loss_class": self.loss_class, **plain}

    @property
    def loss_class(self) -> str:
        """The loss as `--loss` takes it: its registered name, or module:Class."""
        kind = type(self.loss)
        own = f"{kind.__module__}:{kind.__qualname__}"
        return next((name for name, known in LOSSES.items() if known is kind), own)
