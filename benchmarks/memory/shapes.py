"""The shapes of published models: time and memory do not depend on the weights' values.

The figures are those of the models' config.json on the hub: Qwen/Qwen2.5-0.5B, Qwen/Qwen2.5-1.5B,
Qwen/Qwen3-0.6B, meta-llama/Llama-3.1-8B, HuggingFaceTB/SmolLM2-135M.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

QWEN = {
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "tie_word_embeddings": True,
}
QWEN2 = QWEN | {"model_type": "qwen2", "num_key_value_heads": 2}
SHAPES: dict[str, dict[str, Any]] = {
    "Qwen2.5-0.5B": QWEN2
    | {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14},
    "Qwen2.5-1.5B": QWEN2
    | {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12},
    "Qwen3-0.6B": QWEN
    | {
        "model_type": "qwen3",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
    },
    "Llama-3.1-8B": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "tie_word_embeddings": False,
    },
    "SmolLM2-135M": {
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
    },
}
"""name -> what its config.json says, by the name that the hub knows it by without the owner."""


def shape(name: str, **sizes: int) -> PreTrainedConfig:
    """The configuration of a model in `SHAPES`. sizes: in the place of its own."""
    from transformers import AutoConfig  # takes longer to import than all that `SHAPES` alone is used for

    return AutoConfig.for_model(**copy.deepcopy(SHAPES[name]) | sizes)
