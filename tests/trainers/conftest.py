"""Small random models of many architectures."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from logratio.trainers.batches import packing

VOCAB = 97
# What Llama and its like call the sizes; GPT-2 and its like, below, have other names.
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,  # far from uniform attention and predictions
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
OTHER_IDS = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0, "initializer_range": 0.2}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
FULL_HEADS = SIZES | {"num_key_value_heads": 4}
WINDOW = 7


def rope(kind: str, **options: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 10000.0, **options}


ARCHITECTURES: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaConfig(**SIZES),
    "llama-eager": lambda: hf.LlamaConfig(**SIZES, attn_implementation="eager"),
    "llama-dynamic-rope": lambda: hf.LlamaConfig(**SIZES, rope_parameters=rope("dynamic", factor=2.0)),
    "qwen2": lambda: hf.Qwen2Config(**SIZES),
    "qwen2-window": lambda: hf.Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
    ),
    "qwen3": lambda: hf.Qwen3Config(**SIZES, head_dim=8),
    "mistral": lambda: hf.MistralConfig(**SIZES, sliding_window=None),
    "mistral-window": lambda: hf.MistralConfig(**SIZES, sliding_window=WINDOW),
    "phi": lambda: hf.PhiConfig(**FULL_HEADS),
    "phi3-window": lambda: hf.Phi3Config(**SIZES, sliding_window=WINDOW),
    "gpt2": lambda: hf.GPT2Config(**OTHER_IDS, n_embd=32, n_layer=2, n_head=4, n_positions=24),
    "opt": lambda: hf.OPTConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=16,
        max_position_embeddings=64,
        init_std=0.2,
    ),
    "gemma": lambda: hf.GemmaConfig(**SIZES, head_dim=8),
    "gemma2": lambda: hf.Gemma2Config(**SIZES, head_dim=8, sliding_window=WINDOW, final_logit_softcapping=3.0),
    "gemma3": lambda: hf.Gemma3TextConfig(
        **SIZES, head_dim=8, sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"]
    ),
    "mixtral": lambda: hf.MixtralConfig(**SIZES, **EXPERTS),
    "qwen3-moe": lambda: hf.Qwen3MoeConfig(**SIZES, head_dim=8, num_experts=4, num_experts_per_tok=2),
    "gpt-oss": lambda: hf.GptOssConfig(**SIZES, **EXPERTS, head_dim=8, sliding_window=WINDOW),
    "phimoe": lambda: hf.PhimoeConfig(**SIZES, **EXPERTS),
    "llama4": lambda: hf.Llama4TextConfig(**SIZES, **EXPERTS, head_dim=8, attention_chunk_size=WINDOW),
    "granite": lambda: hf.GraniteConfig(**SIZES, logits_scaling=3.0),
    "cohere": lambda: hf.CohereConfig(**SIZES, logit_scale=0.3),
    "olmo2": lambda: hf.Olmo2Config(**SIZES),
    "gpt-neox": lambda: hf.GPTNeoXConfig(**{k: v for k, v in FULL_HEADS.items() if k != "num_key_value_heads"}),
    "falcon-alibi": lambda: hf.FalconConfig(
        **OTHER_IDS, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True
    ),
    "bloom": lambda: hf.BloomConfig(**OTHER_IDS, hidden_size=32, n_layer=2, n_head=4),
    "mpt": lambda: hf.MptConfig(**OTHER_IDS, d_model=32, n_layers=2, n_heads=4),
    "mamba": lambda: hf.MambaConfig(**OTHER_IDS, hidden_size=32, num_hidden_layers=2, state_size=4),
    "mamba2": lambda: hf.Mamba2Config(
        **OTHER_IDS, hidden_size=32, num_hidden_layers=2, num_heads=8, head_dim=8, n_groups=1
    ),
    "rwkv": lambda: hf.RwkvConfig(**OTHER_IDS, hidden_size=32, num_hidden_layers=2, context_length=64),
    "bert": lambda: hf.BertConfig(**{k: v for k, v in FULL_HEADS.items() if k != "num_key_value_heads"}),
}


@pytest.fixture(scope="session")
def random_model() -> Callable[..., Any]:
    """random_model("llama") -> a float32 model with random weights, always the same; in evaluation mode.

    changes: of the configuration.
    """

    def build(name: str, seed: int = 0, **changes: Any) -> Any:
        config = ARCHITECTURES[name]()
        for field, value in changes.items():
            setattr(config, field, value)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: Any = hf.AutoModelForCausalLM.from_config(config).float().eval()
            for parameter in model.parameters():  # biases and norms start at 0 and 1, where mistakes hide
                if parameter.ndim == 1:
                    parameter.data += 0.1 * torch.randn_like(parameter)
        return model

    return build


@pytest.fixture
def pack_one(monkeypatch: pytest.MonkeyPatch) -> Callable[..., packing.PackedBatch]:
    """pack_one(examples, ...) -> all of them in one micro-batch with shared prompts, however short its rows."""

    def build(examples: Any, **options: Any) -> packing.PackedBatch:
        with monkeypatch.context() as patch:
            patch.setattr(packing, "ROW_FILLS", (0.0,))
            (batch,) = packing.pack(examples, 10**6, **options)
        return batch

    return build


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """A folder of its own to work in, with the rewards `own:odd` and `own:now_and_then`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("own.py").write_text(
        "def odd(completions, **_):\n    return [sum(map(ord, c)) % 5 / 5 for c in completions]\n"
        "def now_and_then(prompts, completions, **_):\n"
        "    return [r * (int(p[0]) % 2) for p, r in zip(prompts, odd(completions))]\n"
    )
