"""Training jobs of a few ragged examples, whose last step of an epoch is smaller than the others."""

import json
from pathlib import Path
from typing import Any

from logratio.trainers.policy.tiny import tiny_model, tiny_tokenizer

STEPS = 4
METHODS = ("sft", "dpo", "kto", "orpo", "cpo", "tpo", "grpo")
# Examples, in steps of three: KTO, which refuses a step of one, ends an epoch with two; the rollouts of a step of one
# could not be dealt.
ROWS = {"kto": 8, "grpo": 6}
WAYS: dict[str, list[str]] = {
    "lora": ["--lora_r", "2"],
    "full": [],
    "qlora": ["--lora_r", "2", "--load_in_4bit"],
}


def make_model(folder: Path, **changes: Any) -> None:
    """A folder with a Llama of two layers."""
    small = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 64, **changes}
    tiny_model(3, **small).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def words_for(method: str, way: str, folder: Path, output: Path, *more: str) -> list[str]:
    """Of `logratio train`; a micro-batch takes one or two examples. Of the two rows to evaluate one is trained on."""
    rows: list[dict[str, Any]] = []
    for i in range(ROWS.get(method, 7) + 1):
        right, wrong = str(i + 1) * (1 + 7 * (i % 3 == 0)), str(i + 30)
        columns = {
            "sft": {"completion": right},
            "kto": {"completion": right, "label": i % 2 == 0},
            "tpo": {"chosen": right, "rejected": wrong, "reference": str(i)},
            "grpo": {"answer": str(i + 1)},
        }
        rows.append({"prompt": f"{i}+1=", **columns.get(method, {"chosen": right, "rejected": wrong})})
    data = folder / "data" / method
    data.mkdir(parents=True, exist_ok=True)
    (data / "train.jsonl").write_text("\n".join(map(json.dumps, rows[:-1])))
    (data / "test.jsonl").write_text("\n".join(map(json.dumps, [rows[0], rows[-1]])))
    words = [method, "--model_name_or_path", str(folder / "model"), "--dataset_name", str(data), *WAYS[way]]
    words += ["--output_dir", str(output), "--batch_size", "3", "--micro_batch_tokens", "24"]
    words += ["--learning_rate", "1e-4", "--max_steps", str(STEPS), "--ddp_timeout", "180"]
    if method == "grpo":
        words += ["--num_generations", "3", "--max_completion_length", "4", "--reward_funcs", "_worker:longer"]
    return [*words, *more]
