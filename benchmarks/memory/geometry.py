"""What a model's configuration says about its size: linear layers and parameters, counted without building it.

Decoders of Llama's build only (see `ARCHITECTURES`); a test counts each against the model itself on the meta device.
Imports neither torch nor transformers, so that `logratio plan` answers at once.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from logratio.trainers.errors import UserError, shown

from .shapes import SHAPES


class Linear(NamedTuple):
    """A linear layer without a bias counted in: weight [outputs, inputs], and whether it has a bias [outputs]."""

    name: str
    inputs: int
    outputs: int
    bias: bool

    @property
    def numel(self) -> int:
        return self.inputs * self.outputs


@dataclass(frozen=True)
class Build:
    """How an architecture differs from Llama's. None for a bias: the configuration's attention_bias or mlp_bias."""

    qkv_bias: bool | None = None
    out_bias: bool | None = None
    mlp_bias: bool | None = None
    qk_norm: bool = False  # a norm of each head's queries and of its keys
    wide_norm: bool = False  # the norm multiplies with its weight in float32, before it casts
    tied: bool = False  # where the configuration does not say


ARCHITECTURES = {
    "llama": Build(),
    "mistral": Build(qkv_bias=False, out_bias=False, mlp_bias=False),
    "qwen2": Build(qkv_bias=True, out_bias=False, mlp_bias=False),
    "qwen3": Build(mlp_bias=False, qk_norm=True),
    "gemma": Build(mlp_bias=False, wide_norm=True, tied=True),
}


@dataclass(frozen=True)
class Geometry:
    """Sizes of a decoder. vocab V, hidden H, intermediate I, queries heads * head_dim, keys kv_heads * head_dim."""

    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    wide_norm: bool
    tied: bool

    @classmethod
    def of(cls, config: Any) -> Geometry:
        """From a transformers configuration, or anything with its fields. UserError for another architecture."""
        build = ARCHITECTURES.get(config.model_type)
        if build is None:
            raise UserError(
                f"no memory model is known of {config.model_type!r}, only of: {', '.join(ARCHITECTURES)}; measure it: "
                "every step of `logratio train` logs peak_mem_mib"
            )

        def field(name: str, default: Any) -> Any:
            value = getattr(config, name, None)
            return default if value is None else value

        attention = field("attention_bias", False)
        heads = config.num_attention_heads
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        for name in (*sizes, "num_key_value_heads", "head_dim"):
            value = field(name, 0 if name in sizes else 1)
            if not isinstance(value, int) or value < 1:
                raise UserError(f"{name} of the model's configuration must be a positive integer, got {shown(value)}")
        return cls(
            vocab=config.vocab_size,
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            layers=config.num_hidden_layers,
            heads=heads,
            kv_heads=field("num_key_value_heads", heads),
            head_dim=field("head_dim", config.hidden_size // heads),
            qkv_bias=attention if build.qkv_bias is None else build.qkv_bias,
            out_bias=attention if build.out_bias is None else build.out_bias,
            mlp_bias=field("mlp_bias", False) if build.mlp_bias is None else build.mlp_bias,
            qk_norm=build.qk_norm,
            wide_norm=build.wide_norm,
            tied=field("tie_word_embeddings", build.tied),
        )

    @property
    def queries(self) -> int:
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        return self.kv_heads * self.head_dim

    def linears(self) -> list[Linear]:
        """Those of one layer, the ones that LoRA's all-linear and nf4 take."""
        return [
            Linear("q_proj", self.hidden, self.queries, self.qkv_bias),
            Linear("k_proj", self.hidden, self.keys, self.qkv_bias),
            Linear("v_proj", self.hidden, self.keys, self.qkv_bias),
            Linear("o_proj", self.queries, self.hidden, self.out_bias),
            Linear("gate_proj", self.hidden, self.intermediate, self.mlp_bias),
            Linear("up_proj", self.hidden, self.intermediate, self.mlp_bias),
            Linear("down_proj", self.intermediate, self.hidden, self.mlp_bias),
        ]

    def others(self) -> list[int]:
        """Sizes of all tensors but the linear layers' weights: biases and norms, the embedding, the untied head."""
        layer = [linear.outputs for linear in self.linears() if linear.bias] + [self.hidden] * 2
        layer += [self.head_dim] * 2 if self.qk_norm else []
        ends = [self.vocab * self.hidden] * (1 if self.tied else 2)
        return layer * self.layers + [self.hidden] + ends

    def parameters(self) -> list[int]:
        """Sizes of all parameters."""
        return [linear.numel for linear in self.linears()] * self.layers + self.others()

    @property
    def in_linears(self) -> int:
        """Parameters that a token is multiplied with, the head's aside."""
        return self.layers * sum(linear.numel for linear in self.linears())

    def adapters(self, rank: int, up_to_width: bool = False) -> list[int]:
        """Sizes of LoRA's A and B on all linear layers. up_to_width: no rank above what the layer is wide."""
        sizes = []
        for linear in self.linears():
            r = min(rank, linear.inputs, linear.outputs) if up_to_width else rank
            sizes += [r * linear.inputs, r * linear.outputs]
        return sizes * self.layers


NF4_BLOCK, ABSMAX_BLOCK = 64, 256
# Beside a layer's blocks: the code of 16 floats, the absmax's code of 256 floats, and their offset.
NF4_CONSTANT = 4 * (16 + 256 + 1)


def nf4_bytes(numel: int) -> int:
    """Of a doubly quantized matrix in bitsandbytes: half a byte, a byte a block, a float a block of these."""
    blocks = math.ceil(numel / NF4_BLOCK)
    return math.ceil(numel / 2) + blocks + 4 * math.ceil(blocks / ABSMAX_BLOCK) + NF4_CONSTANT


def find(name: str) -> Geometry:
    """Of a published shape, with or without its owner, of the embedded model, of a folder with config.json, or of a
    model in the hub's cache.

    UserError where there is none, or where its architecture is unknown.
    """
    short = name.rstrip("/").split("/")[-1]
    if short in SHAPES and not Path(name).is_dir():
        return Geometry.of(SimpleNamespace(**SHAPES[short]))
    if name == "tiny":
        from logratio.trainers.policy.tiny import tiny_config

        return Geometry.of(tiny_config())
    path = Path(name) / "config.json"
    if not Path(name).is_dir():
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            cached = try_to_load_from_cache(name, "config.json")
        except HFValidationError:
            cached = None
        if not isinstance(cached, str):
            raise UserError(
                f"nothing is known of the model {name!r}: it is neither a folder with a config.json nor in the hub's "
                f"cache (`hf download {name} config.json` puts it there), nor one of: {', '.join(SHAPES)}"
            )
        path = Path(cached)
    try:
        fields = json.loads(path.read_text())
        return Geometry.of(SimpleNamespace(**{"model_type": None, **fields}))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    except AttributeError as error:
        raise UserError(f"{path} does not describe a decoder: {error.name!r} is missing") from error
