"""The model as a function from a packed batch to log-probabilities, and the reference beside it.

`Policy.forward` is the whole trained computation (backbone, gather of the scored positions, LM head), because the
hooks that gather sharded weights, and autocast, hang on the forward of the module that accelerate prepares.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from logratio.losses import TokenLogps, linear_jsd, linear_logps

from ..attention.masks import attention_mask
from ..attention.stretches import STRETCHES, stretch_mask
from ..attention.varlen import varlen_mask
from ..batches.packing import PackedBatch
from ..batches.sequences import VARLEN
from ..layers.nf4 import refuse_repacked, repackable
from ..layers.switch import NO_ADAPTER, computing_with
from ..processes.sharding import whole

REFERENCE_ADAPTER = "reference"
MASKS: dict[str, Callable[..., Any]] = {VARLEN: varlen_mask, STRETCHES: stretch_mask}
"""Attention implementation -> who sees whom in the form that it takes; others take a dense mask."""


class Policy(nn.Module):
    """A causal language model, perhaps with adapters; `forward` gives log-probabilities of what a batch scores.

    temperature: divides the logits, as in sampling. stats: the row statistics that forward returns too.
    shared: whether a prompt and its completions are packed into one row (see `sharing.py`).
    """

    def __init__(
        self, model: Any, *, temperature: float = 1.0, stats: tuple[str, ...] = (), shared: bool = False
    ) -> None:
        super().__init__()
        self.model = model
        self.temperature = temperature
        self.stats = stats
        self.shared = shared
        self.windows = attention_windows(self.causal_lm.config)
        self.repackable = repackable(model)

    @property
    def causal_lm(self) -> Any:
        """The transformers model, with adapter layers in place, without PEFT's wrapper."""
        return self.model.get_base_model() if self.has_adapters else self.model

    @property
    def decoder(self) -> Any:
        """What computes the last hidden states."""
        found = self.causal_lm.get_decoder()
        # Llama 4's of text alone goes by a name that it has not, and is its own decoder then
        return self.causal_lm.model if found is self.causal_lm else found

    @property
    def _no_split_modules(self) -> list[str]:
        """What accelerate shards unit by unit: the classes that the model names and has."""
        own = {type(module).__name__ for module in self.model.modules()}
        return [name for name in getattr(self.causal_lm, "_no_split_modules", None) or () if name in own]

    @property
    def attention(self) -> str:
        """The name that transformers has for its implementation."""
        return str(self.causal_lm.config.get_text_config()._attn_implementation)

    @property
    def by_sequences(self) -> bool:
        """Whether its attention skips what nobody sees of long rows; other attention gets short ones."""
        return self.attention == VARLEN

    @property
    def packing(self) -> dict[str, Any]:
        """The arguments of `pack` that suit it. A GPU that waits for launches could compute a thousand tokens."""
        cost = 64 if self.causal_lm.device.type == "cpu" else 1024
        return {"shared": self.shared, "micro_batch_cost": cost, "sequences": self.by_sequences}

    @property
    def has_adapters(self) -> bool:
        return hasattr(self.model, "peft_config")

    def forward(
        self,
        batch: PackedBatch,
        taught: Mapping[str, Any] | None = None,
        *,
        alone: bool = False,
        states: bool = False,
    ) -> TokenLogps | Tensor:
        """Log-probabilities and `stats`, [paths, T] each as `batch.scored`, float32, 0 where not scored.

        taught: what `linear_jsd` is to compare the batch with, the head this one's where none is given; the divergence
        then comes beside them, of the words that both models have. alone: with a gradient, and they without.
        states: the hidden states instead, [N, H] where a token is scored: what a teacher is asked for.
        """
        if self.repackable and torch.is_grad_enabled() and batch.input_ids.device.type == "cpu":
            refuse_repacked(*(layer.weight for layer in self.repackable))
        hidden, head, options = self.scored_states(batch), self.causal_lm.get_output_embeddings(), self.head_options()
        if states:
            return hidden
        with torch.set_grad_enabled(torch.is_grad_enabled() and not alone):
            out = linear_logps(hidden, head.weight, batch.targets, support=batch.support, stats=self.stats, **options)
        if taught is not None:
            taught = self.teaching_head() | dict(taught)
            words = min(len(head.weight), len(taught["teacher_weight"]))
            options = cut(options | taught, words)
            out = out._replace(divergence=linear_jsd(hidden, head.weight[:words], **options))
        return TokenLogps(*(None if values is None else batch.unflatten(values) for values in out))  # type: ignore[arg-type]

    def scored_states(self, batch: PackedBatch, **options: Any) -> Tensor:
        """[N, H], those of `hidden_states` where a token is scored."""
        return self.hidden_states(batch, **options).flatten(0, 1).index_select(0, batch.hidden_index)

    def hidden_states(self, batch: PackedBatch, **options: Any) -> Tensor:
        """[R, L, H], the backbone's last hidden states. options: of the function in `MASKS`."""
        return self.decoder(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            attention_mask=None if batch.plain else self.mask(batch, **options),
            use_cache=False,
        ).last_hidden_state

    def mask(self, batch: PackedBatch, **options: Any) -> Any:
        """Who sees whom, in the form that the model's attention takes."""
        make: Callable[..., Any] = MASKS.get(self.attention, attention_mask)
        masks = [make(batch, window, **options) for window in self.windows]
        return dict(zip(("full_attention", "sliding_attention"), masks, strict=True)) if len(masks) > 1 else masks[0]

    def head_options(self) -> dict[str, Any]:
        """How this architecture turns the head's output into logits, by its configuration's own names."""
        config = self.causal_lm.config.get_text_config()
        scale = getattr(config, "logit_scale", None) or 1.0
        return {
            "bias": getattr(self.causal_lm.get_output_embeddings(), "bias", None),
            "temperature": self.temperature,
            "logit_scale": scale / (getattr(config, "logits_scaling", None) or 1.0),
            "softcap": getattr(config, "final_logit_softcapping", None),
        }

    def teaching_head(self) -> dict[str, Any]:
        """What `linear_jsd` takes of a teacher's head, if this is the teacher's: gathered on every process, where it is
        sharded."""
        head, options = self.causal_lm.get_output_embeddings(), self.head_options()
        return {
            "teacher_weight": whole(head.weight.detach()),
            "teacher_bias": None if options["bias"] is None else whole(options["bias"].detach()),
            "teacher_logit_scale": options["logit_scale"],
            "teacher_softcap": options["softcap"],
        }

    def as_reference(self) -> contextlib.AbstractContextManager[None]:
        """Inside, forward computes the reference: the frozen starting adapter if there is one, else no adapter."""
        frozen = REFERENCE_ADAPTER in self.model.peft_config
        return computing_with(self.model, REFERENCE_ADAPTER if frozen else NO_ADAPTER)


def cut(options: Mapping[str, Any], words: int) -> dict[str, Any]:
    """Of the first so many words, what is of each word."""
    of_words = ("bias", "teacher_weight", "teacher_bias")
    return {k: x[:words] if k in of_words and x is not None else x for k, x in options.items()}


def attention_windows(config: Any) -> tuple[int | None, ...]:
    """The sliding windows of the model's layers in tokens, None for full attention; of both, the window comes last."""
    config = config.get_text_config()
    window = getattr(config, "sliding_window", None)
    layers = getattr(config, "layer_types", None)
    in_use = "sliding_attention" in layers if layers else getattr(config, "use_sliding_window", True)
    if not window or not in_use:
        return (None,)
    return (None, window) if layers else (window,)
