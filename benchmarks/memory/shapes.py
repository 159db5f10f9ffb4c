"""The shapes of published models: time and memory do not depend on the weights' values.

The figures are those of the models' config.json on the hub: Qwen/Qwen2.5-0.5B, Qwen/Qwen2.5-1.5B,
Qwen/Qwen3-0.6B, meta-llama/Llama-3.1-8B, HuggingFaceTB/SmolLM2-135M.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def qwen2(hidden_size: int, intermediate_size: int, layers: int, heads: int) -> dict[str, Any]:
    """A Qwen2.5 of the small sizes, whose head is the embedding."""
    return {
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "tie_word_embeddings": True,
    }


def qwen3_0_6b() -> dict[str, Any]:
    return {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "tie_word_embeddings": True,
    }


def llama_3_1_8b() -> dict[str, Any]:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    return {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": rope,
        "tie_word_embeddings": False,
    }


def smollm2_135m() -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
        "tie_word_embeddings": True,
    }


SHAPES: dict[str, Callable[[], dict[str, Any]]] = {
    "Qwen2.5-0.5B": lambda: qwen2(896, 4864, 24, 14),
    "Qwen2.5-1.5B": lambda: qwen2(1536, 8960, 28, 12),
    "Qwen3-0.6B": qwen3_0_6b,
    "Llama-3.1-8B": llama_3_1_8b,
    "SmolLM2-135M": smollm2_135m,
}
"""name -> what its config.json says, by the name that the hub knows it by without the owner."""


def shape(name: str) -> PreTrainedConfig:
    """The configuration of a model in `SHAPES`. Raises ValueError for any other."""
    from transformers import AutoConfig  # takes longer to import than all that `SHAPES` alone is used for

    if name not in SHAPES:
        raise ValueError(f"no shape is known of model {name!r}, expected one of: {', '.join(SHAPES)}")
    return AutoConfig.for_model(**SHAPES[name]())
