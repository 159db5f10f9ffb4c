"""Small random models of many families train: however they are cut, with all-linear adapters, and on policy.

What is said of a family here holds for its code in the installed transformers, whatever its weights: SFT does not
depend on micro-batches, and GRPO's sampled log-probs are those that are trained.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from logratio.trainers import cli
from logratio.trainers.policy.tiny import tiny_tokenizer

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "head_dim": 16,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "head_dim": 8,
    "num_key_value_heads": 4,
}
LINEAR = {
    "num_hidden_layers": 4,  # of which the last has attention
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
SHARED = {"shared_expert_intermediate_size": 32}
DENSE = (
    "apertus arcee bitnet bloom cohere2 diffllama doge exaone4 gemma3_text glm glm4 gpt2 gpt_neox helium "
    "hunyuan_v1_dense lfm2 ministral mistral mpt nemotron olmo3 opt persimmon phi phi3 seed_oss smollm3 stablelm "
    "starcoder2 vaultgemma xglm"
)
OTHERS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "deepseek_v3": ROUTED | LATENT,
    "dots1": ROUTED,
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32},
    "flex_olmo": EXPERTS,
    "glm4_moe": ROUTED,
    "gpt_oss": LOCAL,
    "gptj": {"rotary_dim": 8},
    "granitemoe": LOCAL,
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2},
    "jamba": {"attn_layer_offset": 0, "attn_layer_period": 2, "num_experts": 2},
    "jetmoe": {"num_local_experts": 4},
    "llama4_text": {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 64},
    "mamba": {},
    "minimax": LOCAL,
    "mixtral": LOCAL,
    "olmo_hybrid": {},
    "olmoe": EXPERTS,
    "qwen2_moe": EXPERTS | SHARED,
    "qwen3_5_text": LINEAR,
    "qwen3_moe": EXPERTS,
    "qwen3_next": EXPERTS | SHARED | LINEAR,
    "rwkv": {},
}
FAMILIES = {**dict.fromkeys(DENSE.split(), {}), **OTHERS}


@pytest.fixture
def family(request, tmp_path, monkeypatch) -> None:
    """A folder `model`, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    tokenizer = tiny_tokenizer()
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    options = {**SIZES, "vocab_size": len(tokenizer), **ids, **FAMILIES[request.param]}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(request.param, **options)).save_pretrained("model")
    tokenizer.save_pretrained("model")


def last_line(method: str, *words: str) -> dict[str, float]:
    """Of the log of two steps, from which nothing is dropped."""
    more = ["--lora_r", "4", "--learning_rate", "1e-4", "--disable_dropout", "True", "--output_dir", "out"]
    asked = [method, "--model_name_or_path", "model", "--max_steps", "2", "--overwrite_output_dir", *more, *words]
    assert cli.main(["train", *asked]) == 0
    return json.loads(Path("out/metrics.jsonl").read_text().splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES, indirect=True)
def test_a_family_trains(family):
    whole, cut = (last_line("sft", "--batch_size", "5", "--micro_batch_tokens", budget) for budget in ("8192", "40"))
    assert cut["loss"] == pytest.approx(whole["loss"], rel=2e-6)
    assert cut["grad_norm"] == pytest.approx(whole["grad_norm"], rel=2e-5)
    sampled = last_line("grpo", "--batch_size", "2", "--num_generations", "4", "--max_completion_length", "8")
    assert sampled["sampling/logp_diff_max"] < 1e-5
