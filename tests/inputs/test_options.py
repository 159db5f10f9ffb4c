"""Options that cannot be meant: each is refused by name, before a model is loaded."""

import pytest

from logratio.trainers import loop
from logratio.trainers.options import parse_train

NAN_AND_INFINITY = {
    "sft": ("learning_rate", "weight_decay", "num_train_epochs", "max_grad_norm", "z_loss_coef"),
    "dpo": ("beta", "label_smoothing --loss_type cdpo", "ld_alpha", "ref_model_mixup_alpha"),
    "kto": ("beta", "desirable_weight", "undesirable_weight"),
    "orpo": ("beta",),
    "cpo": ("beta", "cpo_alpha", "simpo_gamma --loss_type simpo"),
    "grpo": ("beta", "temperature", "top_p", "epsilon", "epsilon_high", "delta", "reward_kl_coef"),
}
FLOATS = [
    (method, option, value)
    for method, options in NAN_AND_INFINITY.items()
    for option in options
    for value in ("nan", "inf")
]
RANGES = {
    "train sft --batch_size 0": "--batch_size must be positive",
    "train sft --batch_size -3": "--batch_size must be positive",
    "train sft --micro_batch_tokens 0": "--micro_batch_tokens must be positive",
    "train sft --max_steps 0": "--max_steps must be positive",
    "train sft --num_train_epochs 0": "--num_train_epochs must be positive",
    "train sft --learning_rate -1": "--learning_rate",
    "train sft --weight_decay -0.1": "--weight_decay",
    "train sft --warmup_steps -1": "--warmup_steps",
    "train sft --max_grad_norm -1": "--max_grad_norm",
    "train sft --eval_steps 0": "--eval_steps must be positive",
    "train sft --save_steps 0": "--save_steps must be positive",
    "train sft --max_length 1": "--max_length 1",
    "train sft --eval_size -1": "--eval_size",
    "train sft --seed -1": "--seed",
    "train sft --seed 4294967296": "--seed",
    "train sft --lora_r -1": "--lora_r",
    "train sft --lora_r 4 --lora_alpha nan": "--lora_alpha",
    "train sft --lora_r 4 --lora_alpha 0": "--lora_alpha",
    "train sft --lora_r 4 --lora_dropout 1": "--lora_dropout",
    "train sft --lora_r 4 --lora_dropout nan": "--lora_dropout",
    "train dpo --beta 0": "beta",
    "train dpo --beta -1": "beta",
    "train dpo --ld_alpha -0.1": "ld_alpha",
    "train dpo --ld_alpha 1.1": "ld_alpha",
    "train dpo --loss_type dpop --dpop_lambda -1": "dpop_lambda",
    "train dpo --loss_type robust --label_smoothing 0.5": "label_smoothing",
    "train dpo --loss_type cdpo --label_smoothing 1.5": "label_smoothing",
    "train dpo --ref_model_sync_steps 0 --sync_ref_model": "--ref_model_sync_steps",
    "train dpo --sync_ref_model --ref_model_mixup_alpha 1.5": "--ref_model_mixup_alpha",
    "train kto --desirable_weight -1": "desirable_weight",
    "train kto --undesirable_weight -1": "undesirable_weight",
    "train grpo --num_generations 1": "--num_generations 1",
    "train grpo --num_generations 0": "--num_generations 0",
    "train grpo --temperature 0": "--temperature",
    "train grpo --top_p 0": "--top_p",
    "train grpo --top_p 1.5": "--top_p",
    "train grpo --num_iterations 0": "--num_iterations",
    "train grpo --epsilon 1": "epsilon",
    "train grpo --epsilon -0.1": "epsilon",
    "train grpo --max_completion_length 0": "max_completion_length",
    "train grpo --reward_weights 1 2": "--reward_weights has 2 numbers for 1 --reward_funcs",
    "train grpo --reward_weights nan": "--reward_weights",
    "train grpo --reward_funcs": "--reward_funcs",
    "train grpo --advantage_type nope": "--advantage_type nope",
}
TOGETHER = {
    "train dpo --label_smoothing 0.1": "label_smoothing",
    "train dpo --loss_type hinge --label_smoothing 0.1": "label_smoothing",
    "train cpo --simpo_gamma 1": "simpo_gamma",
    "train cpo --loss_type simper --beta 0.5": "beta",
    "train grpo --loss_type sapo --epsilon 0.3": "epsilon",
    "train grpo --loss_type gmpo --importance_sampling_level sequence": "importance_sampling_level",
    "train grpo --loss_type vespo --importance_sampling_level sequence": "importance_sampling_level",
    "train grpo --loss_type rloo --importance_sampling_level sequence": "importance_sampling_level",
    "train dpo --loss_type nope": "loss_type='nope' is unknown",
    "train dpo --loss_type sigmoid ipo --loss_weights 1": "loss_weights",
    "train dpo --lora_alpha 8": "--lora_alpha",
    "train dpo --lora_target_modules q_proj": "--lora_target_modules",
    "train dpo --lora_dropout 0.1": "--lora_dropout",
    "train dpo --load_in_4bit": "--load_in_4bit",
    "train dpo --adapter_name_or_path a --lora_r 4": "--lora_r",
    "train sft --ref_model_name_or_path tiny": "--ref_model_name_or_path",
    "train orpo --ref_model_name_or_path tiny": "--ref_model_name_or_path",
    "train sft --precompute_ref_log_probs": "--precompute_ref_log_probs",
    "train sft --sync_ref_model": "--sync_ref_model",
    "train dpo --sync_ref_model --precompute_ref_log_probs": "--sync_ref_model",
    "train dpo --eval_steps 2 --dataset_name rows.jsonl": "--eval_steps",
    "train sft --max_steps 2 --warmup_steps 5 --dataset_name rows.jsonl": "--warmup_steps",
    "train sft --eval_size 2 --dataset_test_split test": "--eval_size and --dataset_test_split",
    "train sft --dataset_name rows.jsonl --eval_size 4": "--eval_size 4 leaves nothing",
    "train sft --per_device_train_batch_size 2 --gradient_accumulation_steps 2 --batch_size 3": "--batch_size 3",
    "train sft --resume_from_checkpoint runs/x": "--resume_from_checkpoint",
    "train sft --optim adamw_8bit --dataset_name rows.jsonl": "--optim adamw_8bit",
    "train grpo --scale_rewards batch --advantage_type rloo": "--scale_rewards",
    "train grpo --beta 0.1 --precompute_ref_log_probs --dataset_name rows.jsonl": "--precompute_ref_log_probs",
    "train kto --batch_size 1 --dataset_name rows.jsonl": "--batch_size 1",
}
MISFITS = {
    "train dpo --learning_rate 1e-5x": "--learning_rate takes a number, not '1e-5x'",
    "train dpo --lora_r x": "--lora_r takes a whole number, not 'x'",
    "train dpo --lora_r x --max_steps 2.5": "--lora_r takes a whole number, not 'x'; --max_steps takes a "
    "whole number, not '2.5'",
    "train dpo --max_steps": "--max_steps needs a value",
    "train dpo --max_steps --beta 1": "--max_steps needs a value",
    "train dpo --max-steps=three": "--max_steps takes a whole number, not 'three'",
    "train dpo --loss_weights 1 a": "--loss_weights takes a number, not 'a'",
    "train dpo --micro_batch_tokens aut": "--micro_batch_tokens takes a whole number or auto, not 'aut'; did "
    "you mean auto?",
    "train dpo --dtype float8": "--dtype takes one of float32, bfloat16, float16, not 'float8'; did you mean float32?",
    "train dpo --shuffle maybe": "--shuffle takes no value: --shuffle or --no_shuffle, not --shuffle maybe",
    "train dpo --no-shuffle=1": "--shuffle takes no value: --shuffle or --no_shuffle, not --no_shuffle 1",
    "train dpo --disable_dropout true": "--disable_dropout takes one of True, False, not 'true'; did you mean True?",
    "train dpo --beta= --beta 1": "--beta takes a number, not ''",
    "train dpo --beta 0.1 -0.2 --output_dir a b": "--beta takes one value, not 0.1 -0.2; --output_dir takes one value, "
    "not a b",
    "train dpo --humanline_clip 0.5": "--humanline_clip takes 2 values, not 0.5",
    "plan dpo --completion_tokens many": "--completion_tokens takes a whole number, not 'many'",
    "compare --metric rewrd --seeds 2": "--metric takes one of reward, greedy, exact, accuracy, nll, kl, length, not "
    "'rewrd'; did you mean reward?",
    "bench dpo --threads 1 2 --beta x": "--threads takes one value, not 1 2",
}
"""What a type cannot hold, and what is said of it; to the word."""
FIT = (
    "--max_steps None --learning_rate 1",
    "--loss_weights 1 0.5 --loss_type sft dpop",
    "--micro_batch_tokens auto",
    "--humanline_clip -0.5 1e-1 --disable_dropout None --seed 1 --seed 2",
    "--humanline_clip None --dataset_config= --no-shuffle",
)
STATUS_2 = {
    "train dpo --bta 1": "--bta",
    "train sft --beta 1": "--beta",
    "train sft --num_generations 4": "--num_generations",
}


@pytest.fixture(autouse=True)
def nothing_trains(monkeypatch):
    def trained(*_, **__):
        raise AssertionError("a step was taken")

    monkeypatch.setattr(loop, "train_run", trained)


@pytest.mark.parametrize(("method", "option", "value"), FLOATS)
def test_no_number_is_not_a_number(refused, method, option, value):
    name, _, more = option.partition(" ")
    refused(f"train {method} --{name} {value} {more}", name)


@pytest.mark.parametrize("words", RANGES | TOGETHER)
def test_out_of_range_or_contradictory(refused, words):
    refused(words, (RANGES | TOGETHER)[words])


@pytest.mark.parametrize("words", MISFITS)
def test_a_value_that_does_not_fit_is_one_sentence(run, words):
    said = run(words)
    assert said.status == 1 and said.errors == [f"logratio: {MISFITS[words]}"]


@pytest.mark.parametrize("words", FIT)
def test_values_that_fit_parse(words):
    assert parse_train(["dpo", *words.split()])


@pytest.mark.parametrize("words", STATUS_2)
def test_what_does_not_parse(run, words):
    said = run(words)
    assert said.status == 2 and STATUS_2[words] in " ".join(said.errors)
