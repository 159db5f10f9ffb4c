"""Where reference log-probabilities come from: adapters switched off, a frozen adapter, another model, or a file."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from logratio.losses import Kind, TokenLogps

from ..batches.packing import PackedBatch, example_tokens, pack
from ..batches.values import laid_out, per_example
from ..config import RunConfig
from ..data.examples import Example
from ..errors import UserError, counted, first_line
from ..layers.switch import set_training
from ..memory import Memory
from ..processes.dealing import any_process
from ..processes.sharding import shard_frozen, whole
from .checks import foreign
from .configured import configured
from .load import load_model
from .policy import REFERENCE_ADAPTER, Policy
from .sharing import choose_attention

PACKED_TOGETHER = 512
"""Examples of a data set, of about one length, that are packed at a time: packing takes the square of their number."""


class Reference(Protocol):
    """Log-probabilities under the reference, [paths, T] as `batch.scored`, without gradient; `with_stats` of them."""

    def __call__(self, batch: PackedBatch) -> Tensor: ...


@contextlib.contextmanager
def inference(module: nn.Module) -> Iterator[None]:
    """No gradient, no dropout."""
    was_training = module.training
    set_training(module, False)
    try:
        with torch.no_grad():
            yield
    finally:
        set_training(module, was_training)


def with_stats(out: TokenLogps, stats: Sequence[str]) -> Tensor:
    """The log-probs [paths, T]; where there are stats, they and these, [paths, T, 1 + S]."""
    return torch.stack([out.logps, *(getattr(out, name) for name in stats)], -1) if stats else out.logps


class AdapterReference:
    """The policy itself with its adapters off, or with the frozen copy of the adapter that it started from.

    stats: of `Loss.ref_stats`; the policy computes them.
    """

    def __init__(self, policy: Policy, stats: Sequence[str] = ()) -> None:
        self.policy, self.stats = policy, stats

    def __call__(self, batch: PackedBatch) -> Tensor:
        return with_stats(self.compute(batch), self.stats)

    def compute(self, batch: PackedBatch, **asked: Any) -> Any:
        """What the policy's forward gives there. asked: as it takes it."""
        with inference(self.policy), self.policy.as_reference():
            return self.policy(batch, **asked)


class ModelReference:
    """Another model: the starting weights in full fine-tuning, or one given by name. Its stats are `Loss.ref_stats`.

    autocast: the dtype of the policy's mixed precision, so that a run begins at log-ratios of 0.
    """

    def __init__(self, policy: Policy, autocast: torch.dtype | None = None) -> None:
        self.policy, self.autocast = policy.requires_grad_(False).eval(), autocast

    def __call__(self, batch: PackedBatch) -> Tensor:
        return with_stats(self.compute(batch), self.policy.stats)

    def compute(self, batch: PackedBatch, **asked: Any) -> Any:
        """What the model's forward gives. asked: as it takes it."""
        device = batch.input_ids.device.type
        with inference(self.policy), torch.autocast(device, self.autocast, enabled=self.autocast is not None):
            return self.policy(batch, **asked)


class StoredReference:
    """Log-probabilities computed beforehand, by the tokens of an example; batches with others go to `live`.

    table: `tokens_key` -> the scored log-probs of each completion, on the CPU: a GPU would wait for each of them. What
    is scored is asked of the examples for the same reason: of the batch, on the GPU, the host would wait.
    accelerator: of the processes that go to `live` together, which they share.
    """

    def __init__(self, table: dict[str, list[Tensor]], live: Reference, accelerator: Accelerator | None = None) -> None:
        self.table, self.live, self.accelerator = table, live, accelerator

    def __call__(self, batch: PackedBatch) -> Tensor:
        keys = [tokens_key(example) for example in batch.examples]
        if any_process(self.accelerator, any(key not in self.table for key in keys)):
            return self.live(batch)
        return laid_out(batch, [values for key in keys for values in self.table[key]])


def reference_model(reference: Reference | None) -> Policy | None:
    """The model that the reference is, where it is another than the policy."""
    live = reference.live if isinstance(reference, StoredReference) else reference
    return live.policy if isinstance(live, ModelReference) else None


def tokens_key(example: Example) -> str:
    """What its log-probabilities depend on. A row's number would not do: pairs become two examples in KTO, and the
    rows of an evaluation split have the same numbers again."""
    completions = [(c.ids, c.scored) for c in example.completions]
    return hashlib.sha256(json.dumps([list(example.prompt_ids), completions]).encode()).hexdigest()


def precompute(
    live: Reference,
    examples: Sequence[Example],
    micro_batch_tokens: int,
    device: torch.device,
    *,
    fitting: Callable[[PackedBatch], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    **packing: Any,
) -> dict[str, list[Tensor]]:
    """The table of a `StoredReference`, on the CPU in float32. fitting: stands around every pass."""
    table = {}
    ordered = sorted(range(len(examples)), key=lambda i: example_tokens(examples[i]))
    for start in range(0, len(ordered), PACKED_TOGETHER):
        together = [examples[i] for i in ordered[start : start + PACKED_TOGETHER]]
        for batch in pack(together, micro_batch_tokens, **packing):
            with fitting(batch):
                for example, logps in per_example(batch, live(batch.to(device))):
                    table[tokens_key(example)] = logps
    return table


def fingerprint(policy: Policy, examples: Sequence[Example], temperature: float) -> dict[str, str]:
    """What stored log-probabilities depend on: the reference's weights, what it computes with them, and the token ids
    that they are of.

    Token ids cover the data, its order, the tokenizer, the chat template and the truncation.
    """
    weights = hashlib.sha256()
    frozen = policy.has_adapters and REFERENCE_ADAPTER in policy.model.peft_config
    for name, value in sorted(policy.causal_lm.state_dict().items()):
        if "lora_" in name and not (frozen and f".{REFERENCE_ADAPTER}." in name):
            continue  # adapters that the reference does not use
        weights.update(name.encode())
        value = whole(value.detach())
        weights.update(value.cpu().contiguous().view(torch.uint8).numpy().tobytes() if value.ndim else b"")
    key = {"weights": weights.hexdigest(), "configuration": configured(policy)}
    return key | {"tokens": tokens_of(examples), "temperature": repr(temperature)}


def tokens_of(examples: Sequence[Example]) -> str:
    """The fingerprint that stored examples have; of others, a hash of all `tokens_key`."""
    known = getattr(examples, "fingerprint", None)
    return known or hashlib.sha256("".join(map(tokens_key, examples)).encode()).hexdigest()


def save_table(path: Path, table: dict[str, list[Tensor]], key: dict[str, str]) -> None:
    """Write the table whole or not at all. UserError where the disk does not take it."""
    tensors = {f"{example}.{i}": t for example, parts in table.items() for i, t in enumerate(parts)}
    temporary = path.with_suffix(".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, temporary, metadata=key)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        reason = (error.strerror if isinstance(error, OSError) else None) or first_line(error)
        raise UserError(
            f"{path} could not be written: {reason}; make room, or leave out --precompute_ref_log_probs"
        ) from error


def load_table(path: Path, key: dict[str, str]) -> dict[str, list[Tensor]]:
    """Read a table; UserError where it was computed for other weights, tokens or temperature."""
    with foreign(f"{path} cannot be read; delete it"), safe_open(path, framework="pt") as file:
        stored = file.metadata() or {}
        different = [name for name, value in key.items() if stored.get(name, "") != value]
        if different:
            raise UserError(
                f"{path} holds reference log-probs for other {' and '.join(different)} than this run's; "
                "delete it or choose another --output_dir"
            )
        table: dict[str, list[Tensor]] = {}
        for example, i in sorted((name.split(".") for name in file.keys()), key=lambda name: (name[0], int(name[1]))):
            table.setdefault(example, []).append(file.get_tensor(f"{example}.{i}"))
    return table


def make_reference(
    config: RunConfig, policy: Policy, examples: Sequence[Any], accelerator: Accelerator
) -> tuple[Reference | None, list[str]]:
    """The source of reference log-probs that the loss and the options ask for, and what to tell about it."""
    if not config.wants_reference:
        return None, []
    named = config.model.ref_model_name_or_path
    notes: list[str] = []
    reference: Reference
    stats = config.loss.ref_stats
    if policy.has_adapters and named is None:
        reference = AdapterReference(policy, stats)
    else:
        reference, notes = other_model(config, policy, accelerator, named, "the reference model", stats=stats)
    if not config.model.precompute_ref_log_probs:
        return reference, notes
    if config.loss.kind is Kind.GROUPED:
        raise UserError("--precompute_ref_log_probs needs completions beforehand, and rollouts are not known yet")
    assert examples and isinstance(examples[0], Example)
    path = Path(config.train.output_dir) / "ref_log_probs.safetensors"
    source = policy if isinstance(reference, AdapterReference) else reference.policy  # type: ignore[union-attr]
    key = fingerprint(source, examples, policy.temperature) | {"stats": " ".join(stats)}
    found = path.exists()
    accelerator.wait_for_everyone()  # or one process would find what another has just written
    if found:
        table = load_table(path, key)
        return StoredReference(table, reference, accelerator), [*notes, f"reference log-probs read from {path}"]
    memory = Memory(accelerator, (), config.loss, config.train.first_micro_batch_tokens)
    packing = {**policy.packing, "fitting": memory.fitting}

    def passes() -> dict[str, list[Tensor]]:
        return precompute(reference, examples, memory.micro_batch_tokens, accelerator.device, **packing)

    table = memory.again(lambda: memory.together(passes))
    if accelerator.is_main_process:
        save_table(path, table, key)
    accelerator.wait_for_everyone()
    notes += [*memory.take(), f"reference log-probs of {counted(len(examples), 'example')} written to {path}"]
    return StoredReference(table, reference, accelerator), notes


def other_model(
    config: RunConfig,
    policy: Policy,
    accelerator: Accelerator,
    named: str | None,
    what: str,
    stats: tuple[str, ...] = (),
) -> tuple[ModelReference, list[str]]:
    """Another model for the policy's micro-batches, and what to tell. named: None, the weights that it started from."""
    model = load_model(config.model, accelerator.device, seed=config.train.seed, name=named)
    other = Policy(model, temperature=policy.temperature, shared=policy.shared)
    obstacle, said = choose_attention(other, config.model.attn_implementation, autocast_of(config))
    notes = said if named else []  # else the policy's own, said already
    if obstacle and policy.shared:  # both compute the same micro-batches
        policy.shared = other.shared = False
        notes = [f"prompts are not shared between completions: of {what}, {obstacle}"]
    elif policy.by_sequences != other.by_sequences:  # rows of the one are too long for the other
        for either in (policy, other):
            if either.by_sequences:
                either.causal_lm.set_attn_implementation("sdpa")
    other = Policy(model, temperature=other.temperature, stats=stats, shared=other.shared)
    return ModelReference(shard_frozen(other, accelerator), autocast_of(config)), notes


def autocast_of(config: RunConfig) -> torch.dtype | None:
    """In which the policy computes where its weights' dtype is another."""
    return {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[config.train.mixed_precision]
