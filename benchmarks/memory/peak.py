"""Predicted peak memory of a training step on one GPU, by part, from a model's configuration alone.

The figure meant is `torch.cuda.max_memory_allocated`. The peak is the largest of a step's moments, each the sum of what
is alive in it: the head's forward, the head's backward, the backbone's backward as it begins and, where gradients come
as it goes, in its first layer, the optimizer. Outside of it are the CUDA context (`CONTEXT`), which torch does not
count, and what the allocator loses to fragments (`MARGIN`).

Not modelled: autocast, several processes, rollouts (their cache is gone before the update), attention dropout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

from logratio.losses import LOSSES, Loss
from logratio.trainers.batches.sequences import VARLEN
from logratio.trainers.errors import UserError

from .activations import Batch, activations
from .geometry import Geometry, nf4_bytes
from .gpus import GPUS, Gpu

MIB = 2**20
# Beyond the peak, of what is not weights: blocks of the caching allocator that are too small for the next tensor.
MARGIN = 0.05
# What CUDA, cuBLAS and the kernels' code take of a GPU before the first tensor; about the same on recent ones.
CONTEXT = 600 * MIB
ELEMENT = {"float32": 4, "bfloat16": 2, "float16": 2}
OPTIMIZERS = ("adamw_torch", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit")
# bitsandbytes: smaller tensors have 32-bit states, and states that are not paged.
SMALLEST_8BIT, SMALLEST_PAGED, ABSMAX_BLOCK = 4096, 100_000, 256
TILE_ALIGNMENT = 16  # words, of a row of the Triton head's tile
EMPTY_ADAPTER = 1e-8  # coefficient from which a past adapter is left out of a reference that follows (reference_sync)


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What decides a step's memory beside model and micro-batch, under the names of `logratio train`."""

    method: str = "dpo"
    loss: Loss | None = None
    """None: the method's, with its defaults."""
    dtype: str = "bfloat16"
    """Of the model's weights."""
    lora_r: int = 0
    """Rank of adapters on all linear layers; 0 trains the whole model."""
    fused_lora: bool = True
    fused_layers: bool = True
    use_liger_kernel: bool = False
    load_in_4bit: bool = False
    """QLoRA: frozen weights in nf4."""
    gradient_checkpointing: bool = False
    attn_implementation: str | None = None
    """"sdpa" has a dense mask in every layer, as float32 has by default; None is, as in training, on a GPU `VARLEN` in
    half precision, which skips what nobody sees."""
    optim: str = "adamw_torch"
    """One of `OPTIMIZERS`."""
    ref_model_name_or_path: str | None = None
    """A reference model of its own, counted as large as the policy."""
    precompute_ref_log_probs: bool = False
    sync_ref_model: bool = False
    ref_model_mixup_alpha: float = 0.6
    """How fast the reference follows; with adapters it decides how far its rank grows."""
    reward_kl_coef: float = 0.0
    """GRPO: above 0 a reference is there for the rewards too."""
    teacher: Geometry | None = None
    accumulates: bool = True
    """A step has several micro-batches, so that gradients are there while the next is computed."""
    gpu: str | None = "H100"
    """One of `GPUS`; None: a CPU."""

    def __post_init__(self) -> None:
        tables: dict[str, Collection[str]] = {"dtype": ELEMENT, "optim": OPTIMIZERS}
        tables |= {} if self.loss is not None else {"method": LOSSES}
        for name, table in tables.items():
            if getattr(self, name) not in table:
                raise UserError(f"--{name} {getattr(self, name)!r} is unknown, expected one of: {', '.join(table)}")
        if self.gpu is not None and self.gpu not in GPUS:
            raise UserError(f"--gpu {self.gpu!r} is unknown, expected one of: {', '.join(GPUS)}")
        if self.lora_r < 0:
            raise UserError(f"--lora_r must not be negative, got {self.lora_r}")
        if self.load_in_4bit and not self.lora_r:
            raise UserError("--load_in_4bit freezes the model, so something else must train: add --lora_r 16")

    @property
    def the_loss(self) -> Loss:
        return self.loss or LOSSES[self.method]()

    @property
    def element(self) -> int:
        return ELEMENT[self.dtype]

    @property
    def on_gpu(self) -> bool:
        return self.gpu is not None

    @property
    def long_rows(self) -> bool:
        """Whether what nobody sees is skipped, without a dense mask."""
        taken = self.attn_implementation == VARLEN or (self.attn_implementation is None and self.element == 2)
        return self.on_gpu and taken

    @property
    def fuses(self) -> bool:
        """Whether RMSNorm and SwiGLU are ours."""
        return self.on_gpu and self.fused_layers and not self.use_liger_kernel

    @property
    def device(self) -> Gpu | None:
        return None if self.gpu is None else GPUS[self.gpu]

    @property
    def with_reference(self) -> bool:
        return self.the_loss.wants_reference or self.anchored or self.reward_kl_coef > 0

    @property
    def anchored(self) -> bool:
        """Whether the reference's whole distributions are read, beside the policy's log-probs."""
        return self.the_loss.divergence is not None and self.the_loss.divergence.anchored


class Moment(NamedTuple):
    """Bytes alive at some moment of a step, by part."""

    name: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Prediction:
    """moments: every moment that may be the peak. trained, parameters: how many of the model's there are."""

    moments: tuple[Moment, ...]
    parameters: int
    trained: int

    @property
    def peak(self) -> Moment:
        return max(self.moments, key=lambda moment: moment.total)

    @property
    def peak_mem_mib(self) -> float:
        return self.peak.total / MIB

    @property
    def needed(self) -> int:
        """Bytes of a GPU's memory that should be there: the peak, fragments and the CUDA context."""
        parts = self.peak.parts
        stays = parts["weights"] + parts["reference"] + parts["teacher"]
        return int(self.peak.total + MARGIN * (self.peak.total - stays)) + CONTEXT

    def fits(self, gpu: Gpu) -> bool:
        return self.needed <= gpu.memory


def predict(config: Any, setup: Setup, batch: Batch) -> Prediction:
    """Of the largest micro-batch. config: a transformers configuration, or a `Geometry`."""
    size = config if isinstance(config, Geometry) else Geometry.of(config)
    trained = trained_sizes(size, setup)
    always = resident(size, setup, trained)
    kept = activations(size, setup, batch)
    gradients = trained_bytes(trained, setup)
    accumulated = gradients if setup.accumulates or setup.lora_r else 0
    e, scored = setup.element, batch.scored_tokens * size.hidden * setup.element
    trains_head = not setup.lora_r
    head_gradient = size.vocab * size.hidden * e if trains_head else 0

    def moment(name: str, gradients: int, activations: int, head: int, temporary: int) -> Moment:
        now = {"gradients": gradients, "activations": activations, "head": head, "temporary": temporary}
        return Moment(name, always | now)

    tile = head_tile(size, setup, batch)
    # a head that is the embedding has its gradient waiting for the embedding's
    waits = head_gradient if size.tied or not setup.accumulates else 0
    # and one more matrix is on the way into a gradient that is there already
    matrix = max(linear.numel for linear in size.linears()) * e
    added = matrix if trains_head and setup.accumulates else 0
    dequantized = matrix if setup.load_in_4bit else 0
    moments = [
        moment("head forward", accumulated, kept.saved, tile + scored + (0 if trains_head else scored), 0),
        moment("backbone backward", accumulated + waits, kept.saved + kept.backward, 0, added + dequantized),
        moment("optimizer", gradients, 0, 0, 0),
    ]
    if trains_head:
        summed = size.vocab * size.hidden * (4 + (e if e == 2 else 0))  # in float32, and the product or the result
        moments.append(moment("head backward", accumulated, kept.saved, tile + 2 * scored + summed, 0))
        if not setup.accumulates:  # gradients come as what was kept goes: all layers' but the first's
            behind = size.layers - 1
            come, gone = sum(linear.numel for linear in size.linears()) * e * behind, kept.each * behind
            left = kept.saved - gone + kept.backward
            moments.append(moment("first layer's backward", waits + come, left, 0, matrix))
    else:
        scaled = batch.scored_tokens * size.hidden * 4 + (scored if e == 2 else 0)
        loss = setup.the_loss  # statistics that a gradient could come through keep the hidden states
        again = scored if {"entropy", "log_z"} & {*loss.stats, *loss.metric_stats} else 0
        moments.append(moment("head backward", accumulated, kept.saved, scored + scaled + again, 0))
    return Prediction(tuple(moments), sum(size.parameters()), sum(trained))


def trained_sizes(size: Geometry, setup: Setup) -> list[int]:
    """Sizes of the tensors that are trained."""
    return size.adapters(setup.lora_r) if setup.lora_r else size.parameters()


def trained_bytes(trained: list[int], setup: Setup) -> int:
    """Of those tensors, or of their gradients. Adapters are float32 over any weights."""
    return sum(trained) * (4 if setup.lora_r else setup.element)


def resident(size: Geometry, setup: Setup, trained: list[int]) -> dict[str, int]:
    """Parts that are there at any time of a step after the first."""
    return {
        "weights": weight_bytes(size, setup),
        "adapters": trained_bytes(trained, setup) if setup.lora_r else 0,
        "optimizer": optimizer_bytes(trained, setup),
        "reference": reference_bytes(size, setup),
        "teacher": 0 if setup.teacher is None else weight_bytes(setup.teacher, setup),
        "workspace": 0 if setup.device is None else setup.device.workspace,
    }


def weight_bytes(size: Geometry, setup: Setup) -> int:
    """Of the model, without adapters; in nf4 all linear layers but the head."""
    if not setup.load_in_4bit:
        return sum(size.parameters()) * setup.element
    linears = sum(nf4_bytes(linear.numel) for linear in size.linears()) * size.layers
    return linears + sum(size.others()) * setup.element


def reference_bytes(size: Geometry, setup: Setup) -> int:
    """Another model, or the adapter that follows the policy, grown to its full rank; switched-off adapters are free.

    Stored log-probabilities do not spare the other model: it computes what the table has not.
    """
    if not setup.with_reference:
        return 0
    if setup.ref_model_name_or_path or not setup.lora_r:
        return weight_bytes(size, setup)
    if not setup.sync_ref_model:
        return 0
    left = 1 - setup.ref_model_mixup_alpha
    terms = 1 if left <= 0 else 1 + math.floor(math.log(EMPTY_ADAPTER) / math.log(left)) if left < 1 else 1
    return 4 * sum(size.adapters(terms * setup.lora_r, up_to_width=True))


def optimizer_bytes(trained: list[int], setup: Setup) -> int:
    """Of AdamW's two states; paged ones are not in torch's memory."""
    if setup.optim == "adamw_torch":
        return 2 * trained_bytes(trained, setup)
    total = 0
    for numel in trained:
        eight = setup.optim.endswith("8bit") and numel >= SMALLEST_8BIT
        if not (setup.optim.startswith("paged") and numel >= SMALLEST_PAGED):
            total += 2 * numel * (1 if eight else 4)
        if eight:
            total += 2 * 4 * math.ceil(numel / ABSMAX_BLOCK)
    return total


def head_tile(size: Geometry, setup: Setup, batch: Batch) -> int:
    """The logits that are alive at a time, and their product with the head's weight, both in float32; on a GPU their
    gradient in bfloat16 besides, if the head is frozen."""
    import torch

    from logratio.losses.head._tile import SCRATCH
    from logratio.losses.head.logps import default_chunk_tokens, tile_bytes

    # a GPU's rule without its memory, which stands in the table
    with torch.device("meta" if setup.on_gpu else "cpu"):
        weight = torch.empty(size.vocab, 0, dtype=getattr(torch, setup.dtype), requires_grad=not setup.lora_r)
        memory = None if setup.device is None else setup.device.memory
        chunk = default_chunk_tokens(torch.empty(0, size.hidden), weight, memory)
    rows = min(chunk, batch.scored_tokens)
    if setup.the_loss.divergence is not None:  # two tiles of half the rows, the teacher's no narrower
        rows = min(max(128, chunk // 2), batch.scored_tokens) * 2
    if setup.on_gpu:
        across = -(-size.vocab // TILE_ALIGNMENT) * TILE_ALIGNMENT
        per_logit = 4 if setup.the_loss.divergence is not None else tile_bytes(weight)
        return rows * (per_logit * across + 4 * size.hidden)
    copied = 4 * size.vocab * size.hidden if setup.element == 2 else 0  # a CPU multiplies in float32
    scratch = min(rows, max(1, SCRATCH["cpu"] // size.vocab)) * 4 * size.vocab
    return rows * 4 * (size.vocab + size.hidden) + scratch + copied


def largest_fitting(fits: Callable[[int], bool], low: int, high: int) -> int | None:
    """The largest number from `low` to `high` that fits, where a number that does not is not below one that does."""
    if not fits(low):
        return None
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
