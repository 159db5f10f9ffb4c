"""DoRA, rsLoRA, modules that train whole, 8-bit weights: what is saved is PEFT's, computes what the papers say, goes on
to the bit, and merges."""

import json
import logging
import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from logratio.trainers import SFTConfig, SFTTrainer, UserError, cli
from logratio.trainers.after.trained import load_trained, was_quantized
from logratio.trainers.config import ModelConfig
from logratio.trainers.layers.int8 import keep_product
from logratio.trainers.policy.adapters import add_adapters, describe
from logratio.trainers.policy.tiny import tiny_model

from .._runs import ROWS, log, notes, train

pytestmark = pytest.mark.usefixtures("workspace")
LORA = ["--lora_r", "4", "--lora_alpha", "16", "--max_steps", "4", "--save_steps", "2"]
CASES = {
    "dora": ["--use_dora"],
    "rslora": ["--use_rslora"],
    "whole": ["--use_dora", "--lora_modules_to_save", "norm"],
    "nf4": ["--load_in_4bit", "--use_dora", "--lora_modules_to_save", "input_layernorm"],
    "int8": ["--load_in_8bit", "--use_rslora"],
}
SAID = {
    "dora": ["adapters (DoRA) compute by PEFT's own forward, which is slower than the fused one"],
    "rslora": [],
    "int8": ["adapters (over 8-bit weights) compute by PEFT's own forward, which is slower than the fused one"],
}
IDS = torch.tensor([[5, 17, 40, 41, 7, 9, 100, 3]])


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


QUICK = ("whole",)


@pytest.mark.parametrize(
    "case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_it_is_saved_as_pefts_and_goes_on_to_the_bit_and_merges(case, capsys):
    words = [*LORA, *CASES[case]]
    train("dpo", *words)
    said = [text for step, text in notes("out", "note") if text.startswith(("adapters", "trained whole"))]
    assert said == SAID.get(case, said)
    assert any(text.startswith("trained whole, beside the adapters: ") for text in said) == (case in ("whole", "nf4"))
    assert "MatMul8bitLt" not in capsys.readouterr().err
    train("dpo", *words, "--resume_from_checkpoint", "out/checkpoint-2", output="again")
    assert log("again")[-1]["hash"] == log("out")[-1]["hash"]
    saved = json.loads(Path("out/adapter_config.json").read_text())
    assert (saved["use_dora"], saved["use_rslora"]) == ("--use_dora" in words, "--use_rslora" in words)

    quantized = {"nf4": {"load_in_4bit": True}, "int8": {"load_in_8bit": True}}.get(case, {})
    assert was_quantized("out") == quantized
    options = {"quantization_config": BitsAndBytesConfig(**quantized)} if case == "int8" else {}
    if case != "nf4":  # whose double quantization is not transformers' default
        base = AutoModelForCausalLM.from_pretrained("out/base_model", **options)
        keep_product(base)
        theirs = logits(PeftModel.from_pretrained(base, "out"))
        torch.testing.assert_close(theirs, logits(load_trained("out", "float32", torch.device("cpu"))[0]))
    assert cli.main(["merge", "out", "--output_dir", "merged"]) == 0
    told = json.loads(Path("merged/merge.json").read_text())
    assert told["largest_difference"] < 1e-4 < told["mean_effect"]


def test_eight_bit_weights_compute_the_same_in_training_and_out_of_it():
    """So that a policy that has learned nothing is its reference, and what is sampled is what is trained."""
    train("dpo", *LORA, "--load_in_8bit", "--gradient_checkpointing")
    first = log("out")[0]
    assert first["rewards/chosen"] == first["rewards/rejected"] == 0 and first["loss"] == pytest.approx(math.log(2))
    model = load_trained("out", "float32", torch.device("cpu"))[0]
    evaluated = logits(model)
    torch.testing.assert_close(model.train()(input_ids=IDS).logits, evaluated, rtol=0, atol=0)


def by_hand(adapted, name, weight, saved):
    """The layer's weight in float64, by the papers: DoRA (arXiv 2402.09353, Eq. 5), rsLoRA (arXiv 2312.03732)."""
    prefix = f"base_model.model.{name}"
    a, b = (saved[f"{prefix}.lora_{factor}.weight"].double() for factor in "AB")
    scale = 16 / math.sqrt(4) if adapted["use_rslora"] else 16 / 4
    moved = weight.double() + scale * b @ a
    if not adapted["use_dora"]:
        return moved
    length = saved[f"{prefix}.lora_magnitude_vector"].double()
    return length[:, None] * moved / moved.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("case", ["dora", "rslora"])
def test_it_is_what_the_paper_says(case):
    from safetensors.torch import load_file

    train("sft", *LORA, *CASES[case])
    saved, adapted = load_file("out/adapter_model.safetensors"), json.loads(Path("out/adapter_config.json").read_text())
    base = AutoModelForCausalLM.from_pretrained("out/base_model").double()
    for name, module in base.named_modules():
        if f"base_model.model.{name}.lora_A.weight" in saved:
            module.weight.data = by_hand(adapted, name, module.weight.data, saved)
    model = load_trained("out", "float32", torch.device("cpu"))[0]
    torch.testing.assert_close(logits(model).double(), logits(base), rtol=1e-4, atol=1e-4)
    plain = logits(AutoModelForCausalLM.from_pretrained("out/base_model"))
    assert (logits(model) - plain).abs().max() > 1e-2


def test_rslora_is_fused_and_dora_is_not():
    def fused(**options):
        model = add_adapters(tiny_model(0), ModelConfig(lora_r=4, **options), frozen_copy=False)
        return {type(m).__name__ for m in model.modules() if hasattr(m, "lora_A")}, describe(model)

    assert fused(use_rslora=True) == ({"FusedLinear"}, [])
    assert fused(use_dora=True) == ({"Linear"}, SAID["dora"])


@pytest.mark.slow
def test_a_copy_of_such_an_adapter_is_the_reference_and_stays():
    """The first step's loss is ln 2, and what the policy is compared with does not follow it."""
    train("sft", *LORA, *CASES["whole"], output="first")
    words = ["--model_name_or_path", "first/base_model", "--adapter_name_or_path", "first", "--max_steps", "4"]
    train("dpo", *words, "--precompute_ref_log_probs", output="stored")
    train("dpo", *words)
    rows = log("out")
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6) and rows[-1]["loss"] < 0.69
    assert [row["loss"] for row in log("stored")] == pytest.approx([row["loss"] for row in rows], abs=1e-5)


@pytest.mark.parametrize(
    "words, said",
    [
        (["--use_dora"], "--use_dora: without adapters nothing reads this; add --lora_r 16, or leave it out"),
        (["--lora_modules_to_save", "norm"], "--lora_modules_to_save: without adapters nothing reads this"),
        (["--load_in_8bit"], "--load_in_8bit freezes the model, so something else must train: add --lora_r 16"),
        (["--lora_r", "2", "--load_in_8bit", "--load_in_4bit"], "both say in how many bits; leave one of them out"),
        (["--lora_r", "2", "--load_in_8bit", "--use_dora"], "PEFT has no length of such weights; take --load_in_4bit"),
        (["--lora_r", "2", "--lora_modules_to_save", "lm_head"], "names the LM head, which is not trained beside"),
        (["--lora_r", "2", "--lora_modules_to_save", "embed_tokens"], "whose weight is the LM head's too"),
        (["--lora_r", "2", "--lora_target_modules", "lm_head"], "--lora_target_modules names the LM head"),
        (["--lora_r", "2", "--lora_modules_to_save", "nope"], "--lora_modules_to_save nope: no module of the model is"),
        (["--lora_r", "2", "--use_dora", "--sync_ref_model"], "--sync_ref_model blends the products of plain LoRA"),
    ],
)
def test_what_cannot_be_is_one_sentence(words, said, capsys, recwarn):
    train("dpo", *words, status=1)
    told = capsys.readouterr().err
    assert said in told and told.count("\n") == 1 and not Path("out/metrics.jsonl").exists()
    assert not [w for w in recwarn if "tie_word_embeddings" in str(w.message)]


def test_trls_classes_say_it_too():
    rows = [{"prompt": row["prompt"], "completion": row["completion"]} for row in ROWS]
    small = {"max_steps": 1, "batch_size": 2, "save_strategy": "no", "gradient_checkpointing": False}
    peft = LoraConfig(r=2, use_dora=True, modules_to_save=["norm"], target_modules=["q_proj"], task_type="CAUSAL_LM")
    SFTTrainer(model="tiny", args=SFTConfig("out", **small), train_dataset=rows, peft_config=peft).train()
    model = json.loads(Path("out/run_config.json").read_text())["model"]
    assert model["use_dora"] and model["lora_modules_to_save"] == ["norm"] and not model["use_rslora"]
    eight = {"quantization_config": BitsAndBytesConfig(load_in_8bit=True), "train_dataset": rows}
    plain = LoraConfig(r=2, task_type="CAUSAL_LM")
    trainer = SFTTrainer(model="tiny", args=SFTConfig("eight", **small), peft_config=plain, **eight)
    assert trainer.config.model.load_in_8bit
    odd = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=3.0)
    with pytest.raises(UserError, match="has llm_int8_threshold=3.0; the trainer quantizes with 6.0"):
        SFTTrainer(model="tiny", args=SFTConfig("odd"), peft_config=plain, quantization_config=odd, train_dataset=rows)


def test_what_bitsandbytes_says_in_every_layer_is_said_once(caplog):
    logger = logging.getLogger("bitsandbytes.autograd._functions")
    logger.warning("MatMul8bitLt: inputs will be cast from %s to float16 during quantization", torch.float32)
    logger.warning("another warning")
    assert [record.getMessage() for record in caplog.records] == ["another warning"]
