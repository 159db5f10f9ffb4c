"""What a model computes beside its weights: its configuration's numbers, and its adapters'."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from .policy import Policy

# Of a model's configuration: where it comes from and how it is held, which options say.
ASIDE = frozenset({"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "quantization_config"})
# Of PEFT's: what scales an adapter and says which of its parts there are; the weights say the rest.
SCALES = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "bias")


def configured(*policies: Policy | None) -> str:
    """SHA-256 of it: with the same weights another one is another model (a rotary embedding's base, an adapter's
    alpha), and so is another end of completions."""
    said = [settings_of(policy) for policy in policies if policy is not None]
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()


def settings_of(policy: Policy) -> dict[str, Any]:
    model = policy.causal_lm
    numbers = model.config.to_diff_dict()
    adapters = policy.model.peft_config if policy.has_adapters else {}
    return {
        "model": {name: value for name, value in numbers.items() if name not in ASIDE},
        "adapters": {name: [getattr(own, scale, None) for scale in SCALES] for name, own in adapters.items()},
        "ends": getattr(getattr(model, "generation_config", None), "eos_token_id", None),
    }
