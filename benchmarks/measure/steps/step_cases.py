"""The cases of the suites `step`, `scale` and `quick`: one optimizer step, its model, adapters, method and lengths."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from logratio.losses import LOSSES, Kind, Loss
from logratio.trainers.data.examples import Example

from .workloads import WORKLOADS, Lengths, count_padded, examples

METHODS = ("sft", "dpo", "kto", "orpo", "grpo")


@dataclass(frozen=True)
class StepCase:
    """Everything that decides what a step computes. Both sides get the same of all of it.

    model: in `shapes.SHAPES`, or a folder. batch_size: examples of a step, as `--batch_size`. micro_batch_tokens: of
    our forward passes; TRL's micro-batches are as large as fit it, padded. axis, value: what the suite `scale` varies.
    """

    method: str
    adapter: str
    model: str
    workload: str
    batch_size: int
    micro_batch_tokens: int
    dtype: str = "bfloat16"
    gradient_checkpointing: bool = False
    num_generations: int = 8
    lora_r: int = 16
    lengths: Lengths | None = None
    vocab_size: int | None = None
    axis: str | None = None
    value: int | None = None

    @property
    def case(self) -> str:
        name = f"{self.method}-{self.adapter}-{self.model.rstrip('/').split('/')[-1]}-{self.workload}"
        return name if self.axis is None else f"{name}-{self.axis}={self.value}"

    @property
    def loss(self) -> Loss:
        return LOSSES[self.method]()

    @property
    def max_length(self) -> int:
        return self.of_lengths.max_length

    @property
    def of_lengths(self) -> Lengths:
        return self.lengths or WORKLOADS[self.workload]

    def fields(self) -> dict[str, Any]:
        """What a record says beside its figures."""
        names = ("method", "adapter", "model", "workload", "axis", "value")
        return {k: v for k in names if (v := getattr(self, k)) is not None}

    def settings(self) -> dict[str, Any]:
        """What a record's certificate says of it."""
        told = dataclasses.asdict(self)
        told["lengths"] = dataclasses.asdict(self.of_lengths)
        return {k: v for k, v in told.items() if k not in self.fields() and v is not None}

    def window(self, vocab_size: int, seed: int) -> list[Example]:
        """The examples of one step."""
        return examples(
            self.loss, self.of_lengths, self.batch_size, vocab_size=vocab_size, seed=seed, group=self.num_generations
        )

    def per_micro_batch(self, window: list[Example]) -> int:
        """TRL's per_device_train_batch_size: the largest divisor of the step whose padded tokens fit ours.

        Of GRPO it counts completions, as there; elsewhere rows or pairs.
        """
        grouped = self.loss.kind is Kind.GROUPED
        sequences = 1 if grouped else len(window[0].completions)
        longest = max(len(e.prompt_ids) + len(c.ids) for e in window for c in e.completions)
        units = len(window) * (len(window[0].completions) if grouped else 1)
        fitting = max(1, self.micro_batch_tokens // (sequences * longest))
        return max(d for d in range(1, units + 1) if units % d == 0 and d <= fitting)

    def padded_by_peer(self, window: list[Example]) -> int:
        """Tokens of TRL's forward pass over the step, padding included."""
        per = self.per_micro_batch(window)
        if self.loss.kind is Kind.GROUPED:  # prompts padded left, completions right
            prompts = [len(e.prompt_ids) for e in window for _ in e.completions]
            completions = [len(c.ids) for e in window for c in e.completions]
            return count_padded(prompts, per) + count_padded(completions, per)
        lengths = [len(e.prompt_ids) + len(c.ids) for e in window for c in e.completions]
        return count_padded(lengths, per * len(window[0].completions))


FULL_FITS = ("Qwen2.5-0.5B", "Qwen2.5-1.5B")
GPU_MODELS = {"Qwen2.5-0.5B": (32, 16384), "Qwen2.5-1.5B": (16, 16384), "Llama-3.1-8B": (8, 8192)}
"""model -> examples of a step, and tokens of a forward pass."""
FIRST = (
    "head-896x151936-8192-bfloat16-frozen",
    "dpo-lora-Qwen2.5-0.5B-ultrafeedback",
    "dpo-qlora-Llama-3.1-8B-ultrafeedback",
    "grpo-lora-Qwen2.5-0.5B",
    "head-2048x131072-4096-bfloat16-frozen",
    "head-4096x128256-8192-bfloat16-frozen",
    "dpo-lora-Qwen2.5-0.5B-fixed",
)
"""How the names of cases begin that are measured before the others, in this order."""


def gpu_cases() -> list[StepCase]:
    """Every method x adapter x model x workload, a model's beside one another, which is then built once; adapters in
    ragged lengths first, where time runs out."""
    cases = []
    for model, (batch_size, tokens) in GPU_MODELS.items():
        for adapter in ("lora", "qlora", "full") if model in FULL_FITS else ("lora", "qlora"):
            for method in METHODS:
                rollouts = method == "grpo"
                size = max(1, batch_size // 8) if rollouts else batch_size
                for workload in ("rollouts",) if rollouts else ("ultrafeedback", "fixed"):
                    large = model == "Llama-3.1-8B"
                    cases.append(StepCase(method, adapter, model, workload, size, tokens, gradient_checkpointing=large))
    return sorted(cases, key=lambda case: (case.workload == "fixed", case.adapter == "full"))


def cpu_cases() -> list[StepCase]:
    """Every method with LoRA in the shape of SmolLM2-135M, in GSM8K's lengths: minutes each on two cores."""
    return [
        StepCase(method, "lora", "SmolLM2-135M", "gsm8k", 1 if method == "grpo" else 8, 8192, dtype="float32")
        for method in METHODS
    ]


def quick_cases() -> list[StepCase]:
    """Every method with LoRA on the embedded shape, DPO also whole and with QLoRA, and one step of a real shape."""
    kinds = [*((method, "lora") for method in METHODS), ("dpo", "qlora"), ("dpo", "full")]
    tiny = [
        StepCase(method, adapter, "tiny", "gsm8k", 4, 2048, dtype="float32", num_generations=4)
        for method, adapter in kinds
    ]
    short = Lengths(16, 16, 0.24, 0.35, 0.5)
    real = StepCase("dpo", "lora", "SmolLM2-135M", "short", 2, 1024, dtype="float32", lengths=short)
    return [*tiny, real]


def published_cases() -> list[StepCase]:
    """Settings in which other projects publish figures of their own: prime-rl a row of 16,384 tokens with
    checkpointing (benchmarks/results), torchtune two of 2,048 under adapters of rank 8 (README)."""
    long, rows = Lengths(8, 16376, max_length=16384), Lengths(8, 2040, max_length=2048)
    eight = StepCase("sft", "lora", "Llama-3.1-8B", "2x2048", 2, 4096, lora_r=8, lengths=rows)
    kept = dataclasses.replace(eight, gradient_checkpointing=True, workload="2x2048-checkpointed")
    return [
        StepCase("sft", "lora", "Qwen3-0.6B", "16384", 1, 16384, gradient_checkpointing=True, lengths=long),
        dataclasses.replace(kept, adapter="qlora"),
        kept,
        eight,
    ]


def scale_cases(gpu: bool) -> list[StepCase]:
    """DPO and GRPO with LoRA, one thing growing at a time: on the 0.5B, or on a CPU on the embedded shape."""
    base = StepCase("dpo", "lora", "Qwen2.5-0.5B", "fixed", 8, 16384)
    if not gpu:
        base = dataclasses.replace(base, model="tiny", batch_size=4, micro_batch_tokens=4096, dtype="float32")
    grouped = dataclasses.replace(base, method="grpo", workload="rollouts", batch_size=2)
    cases = []
    for length in (256, 512, 1024, 2048, 4096) if gpu else (64, 128, 256, 512, 1024):
        lengths = Lengths(length / 2, length / 2, max_length=length)
        cases.append(dataclasses.replace(base, lengths=lengths, axis="sequence_length", value=length))
    for size in (2, 4, 8, 16, 32) if gpu else (1, 2, 4, 8):
        cases.append(dataclasses.replace(base, batch_size=size, axis="batch_size", value=size))
    for vocab in (16384, 32768, 65536, 131072, 262144) if gpu else (1024, 4096, 16384):
        cases.append(dataclasses.replace(base, vocab_size=vocab, axis="vocab_size", value=vocab))
    for group in (2, 4, 8, 16, 32) if gpu else (2, 4, 8):
        cases.append(dataclasses.replace(grouped, num_generations=group, axis="num_generations", value=group))
    return cases
