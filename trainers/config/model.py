"""What is trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from logratio.losses import Kind
from logratio.losses.options import Count, Positive, Range, Share

from ..errors import UserError
from .numbers import NotNegativeCount, check_numbers

# Options that say nothing by themselves, with their defaults. In the dataclass they are None, which means "not given",
# so that what would not be read can be refused.
LORA: dict[str, Any] = {"lora_alpha": 32.0, "lora_dropout": 0.0, "lora_target_modules": ("all-linear",)}
NEW = (*LORA, "lora_modules_to_save", "use_dora", "use_rslora")
"""Options that describe new adapters."""
SYNC: dict[str, Any] = {"ref_model_mixup_alpha": 0.6, "ref_model_sync_steps": 512}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What is trained, and beside which reference."""

    model_name_or_path: str = "tiny"
    """Hub name, local folder, or "tiny": the embedded model with random weights."""
    model_revision: str | None = None
    """Branch, tag or commit of a hub name (default: main). A run keeps to the commit that this was at its start."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the model's weights. Adapters are float32 in any case."""
    attn_implementation: str | None = None
    """Attention implementation of transformers (default on a GPU: FlashAttention for packed rows, which needs half
    precision, where it fits; else its choice)."""
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
    lora_modules_to_save: tuple[str, ...] | None = None
    """Names of modules that train whole, beside the adapters, in the model's dtype, and are saved with them; not the
    LM head."""
    use_dora: bool = False
    """DoRA: adapters that turn the weights, and a trained length beside them, by PEFT's own forward."""
    use_rslora: bool = False
    """rsLoRA: the adapters' output is scaled by lora_alpha / sqrt(lora_r)."""
    fused_lora: bool = True
    """Add the adapters' part into the layers' outputs instead of beside them: the same result with fewer passes."""
    fused_layers: bool = True
    """On a GPU: RMSNorm, SwiGLU and RoPE by a kernel each, which keep less for the backward pass."""
    use_liger_kernel: bool = False
    """In their place Liger-Kernel's RMSNorm, SwiGLU and RoPE, on a GPU; the losses stay ours."""
    load_in_4bit: bool = False
    """QLoRA: frozen weights in nf4 with double quantization. Needs adapters."""
    load_in_8bit: bool = False
    """Frozen weights in 8 bits (LLM.int8()), under adapters by PEFT's own forward."""
    disable_dropout: bool | None = None
    """Train without the dropout that the model and a loaded adapter bring along (default: yes, but for SFT)."""
    adapter_name_or_path: str | None = None
    """Go on training this adapter; a frozen copy of it is the reference."""
    ref_model_name_or_path: str | None = None
    """Reference model, where it is neither the starting model nor the starting adapter."""
    teacher_model_name_or_path: str | None = None
    """Teacher to distill from, of the same tokenizer; its weights are held as the model's. GRPO: its log-probs of what
    was sampled become advantages; SFT: with loss_type gkd."""
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
        if self.load_in_4bit and self.load_in_8bit:
            raise UserError("--load_in_4bit and --load_in_8bit both say in how many bits; leave one of them out")
        if (self.load_in_4bit or self.load_in_8bit) and not adapters:
            option = "load_in_4bit" if self.load_in_4bit else "load_in_8bit"
            raise UserError(f"--{option} freezes the model, so something else must train: add --lora_r 16")
        if self.load_in_8bit and self.use_dora:
            raise UserError("--use_dora over --load_in_8bit: PEFT has no length of such weights; take --load_in_4bit")
        if self.adapter_name_or_path and self.lora_r:
            raise UserError(
                f"--lora_r {self.lora_r} asks for new adapters, --adapter_name_or_path {self.adapter_name_or_path} "
                "goes on with those of a run before; leave one of them out"
            )
        if not self.lora_r:
            theirs = "these describe new adapters, and --adapter_name_or_path brings its own; leave them out"
            ours = "without adapters nothing reads this; add --lora_r 16, or leave it out"
            self._refuse_given(NEW, theirs if adapters else ours)
        if not self.sync_ref_model:
            self._refuse_given(SYNC, "nothing reads this without --sync_ref_model; add it, or leave this out")
        if self.sync_ref_model and self.precompute_ref_log_probs:
            raise UserError("--sync_ref_model changes the reference, whose log-probs --precompute_ref_log_probs fixes")
        if self.sync_ref_model and self.ref_model_name_or_path:
            raise UserError(
                "--sync_ref_model blends the policy into the weights that it started from, which "
                f"--ref_model_name_or_path {self.ref_model_name_or_path} are not; leave one of them out"
            )

    def _refuse_given(self, options: Iterable[str], why: str) -> None:
        given = [f"--{name}" for name in options if (said := getattr(self, name)) is not None and said is not False]
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
            compares = loss.wants_reference or loss.divergence is not None
            found["disable_dropout"] = loss.kind is not Kind.SEQUENCE or compares
        return dataclasses.replace(self, **found)
