"""What of a TRL user's options is refused, in its own words."""

import pytest

from logratio.trainers.errors import UserError

from ._judged import judge

PEFT = {"use_peft": True}


class Lines:
    """An object that says more than a line, as transformers' configurations do."""

    def __str__(self):
        return "{\n}"


REFUSED = [
    ("sft", {"use_flash_attention_2": True}, "use_flash_attention_2: true: say attn_implementation: flash_attention_2"),
    (
        "orpo",
        {"dataset_mixer": {"a/b": 1.0}},
        "dataset_mixer: {a/b: 1.0}: list them as datasets, each with path, name and split, as TRL has it",
    ),
    (
        "dpo",
        {"dataset_splits": ["train_prefs"]},
        "dataset_splits: [train_prefs]: say dataset_train_split, and dataset_test_split with eval_strategy",
    ),
    (
        "sft",
        {"chat_template": "{% for m in messages %}\n{{ m }}\n{% endfor %}"},
        "chat_template: {% for m in messages %} ...: write it into a file and say chat_template_path: FILE.jinja; "
        "a trainer takes processing_class=",
    ),
    (
        "sft",
        {"model_init_kwargs": {"quantization_config": Lines()}},
        "model_init_kwargs.quantization_config: Lines: say load_in_4bit: true for nf4 with double quantization, or "
        "load_in_8bit: true; a trainer takes quantization_config=",
    ),
    ("sft", {"dtype": "int8"}, "dtype: int8: must be auto or one of float32, bfloat16, float16"),
    (
        "sft",
        {"dtype": "auto", "model_name_or_path": "no/where"},
        "dtype: auto: the model's configuration could not be read for it; name one of float32, bfloat16, float16",
    ),
    (
        "dpo",
        {"lora_target_modules": ".*_proj", "use_peft": True},
        "lora_target_modules: .*_proj: .*_proj is a pattern; name the modules, as [q_proj, v_proj], or all-linear",
    ),
    (
        "dpo",
        {"load_in_4bit": True},
        "load_in_4bit: true: quantized weights are frozen, so adapters must train: add use_peft: true",
    ),
    (
        "dpo",
        {"bnb_4bit_quant_type": "fp4", "load_in_4bit": True, "use_peft": True},
        "bnb_4bit_quant_type: fp4: 4-bit weights are nf4; leave it out",
    ),
    (
        "sft",
        {"gradient_checkpointing_kwargs": {"every_n_layers": 2}},
        "gradient_checkpointing_kwargs: {every_n_layers: 2}: every_n_layers: every layer is recomputed, without "
        "options; leave it out",
    ),
    (
        "sft",
        {"tokenizer": "other", "model_name_or_path": "m"},
        "tokenizer: other: the tokenizer is the model's own; put another into the model's folder",
    ),
    ("sft", {"bf16": True, "fp16": True}, "fp16: true: bf16 is asked for too; leave one of them out"),
    (
        "sft",
        {"optim": "adafactor"},
        "optim: adafactor: the optimizer is AdamW: adamw_torch, adamw_8bit, paged_adamw_32bit or paged_adamw_8bit",
    ),
    ("sft", {"data_seed": 7}, "data_seed: 7: the order of the data comes from seed too; leave it out, or set seed"),
    (
        "sft",
        {"save_strategy": "best"},
        "save_strategy: best: load_best_model_at_end: true keeps the checkpoint of the best evaluation",
    ),
    ("dpo", {"loss_type": "kto_pair"}, "loss_type: kto_pair: it left TRL long ago; train kto"),
    (
        "kto",
        {"loss_type": "sigmoid"},
        "loss_type: sigmoid: sigmoid is unknown; must be one of kto, apo_zero_unpaired, bco",
    ),
    ("rloo", {"loss_type": "dapo"}, "loss_type: dapo: RLOO has one loss; leave it out"),
    ("sft", {"beta": 0.1}, "beta: 0.1: an option of dpo, cpo, tpo, grpo, kto, listwise, orpo"),
    ("dpo", {"reward_funcs": ["accuracy_reward"]}, "reward_funcs: [accuracy_reward]: an option of grpo"),
    (
        "grpo",
        {"reward_funcs": ["get_soft_overlong_punishment"]},
        "reward_funcs: [get_soft_overlong_punishment]: take overlong, the same with a fifth of max_completion_length "
        "as its cache",
    ),
    (
        "grpo",
        {"reward_funcs": ["mine"]},
        "reward_funcs: [mine]: mine is unknown; name module:function, a reward model, or one of accuracy_reward, "
        "exact_answer, answer_format, overlong",
    ),
    (
        "grpo",
        {"steps_per_generation": 2, "generation_batch_size": 16},
        "steps_per_generation: 2: generation_batch_size says it too; leave one out, as TRL asks for",
    ),
    (
        "grpo",
        {"generation_batch_size": 20},
        "generation_batch_size: 20: must be a multiple of per_device_train_batch_size x processes, 8, in TRL too",
    ),
    (
        "grpo",
        {"steps_per_generation": 2, "gradient_accumulation_steps": 4, "num_iterations": 2},
        "steps_per_generation: 2: with num_iterations TRL learns twice from a part of a step; leave it out",
    ),
    (
        "grpo",
        {"steps_per_generation": 8, "gradient_accumulation_steps": 3},
        "steps_per_generation: 8: no whole number of steps; make it a multiple of gradient_accumulation_steps, 3",
    ),
    (
        "grpo",
        {"loss_type": "vespo", "importance_sampling_level": "sequence"},
        "importance_sampling_level: sequence: vespo's ratios are of tokens; leave it out",
    ),
    ("sft", {"learning_rate": "fast"}, "learning_rate: fast: must be a number"),
    ("sft", {"weight_decay": -1}, "weight_decay: -1: must not be negative"),
    ("sft", {"warmup_ratio": "much"}, "warmup_ratio: much: a value of that kind has no meaning here"),
    ("sft", {"model_init_kwargs": "x"}, "model_init_kwargs: x: must be a mapping of names to values"),
    (
        "sft",
        {"model_init_kwargs": {"liger_kernel_config": {"rope": False}}},
        "model_init_kwargs.liger_kernel_config: {rope: false}: use_liger_kernel patches RMSNorm, SwiGLU and RoPE; "
        "leave this out",
    ),
    (
        "sft",
        {"max_length": 10, "max_seq_length": 20},
        "max_seq_length: 20: another name of max_length, which is 10; leave one out",
    ),
    (
        "grpo",
        {"shuffle_dataset": True, "train_sampling_strategy": "sequential"},
        "train_sampling_strategy: sequential: would set shuffle to false, which another option sets to true",
    ),
    ("sft", {"learning_rat": 1}, "learning_rat: 1: no option here, nor of TRL; did you mean learning_rate?"),
    ("sft", {"qwertz": 1}, "qwertz: 1: no option here, nor of TRL"),
]


@pytest.mark.parametrize(("method", "given", "message"), REFUSED, ids=lambda one: None)
def test_what_is_refused_and_why(method, given, message):
    with pytest.raises(UserError) as error:
        judge(method, given, source="x.yaml")
    assert str(error.value) == f"x.yaml: {message}"


def test_all_that_is_refused_is_named_at_once():
    given = {"learning_rate": 1e-5, "optim": "sgd", "bf16": True, "debug": "underflow", "packing": True, "neftun": 5}
    with pytest.raises(UserError) as error:
        judge("grpo", given, source="--config x.yaml")
    assert str(error.value).splitlines() == [
        "--config x.yaml: 3 options refused, 3 accepted",
        "  optim: sgd: the optimizer is AdamW: adamw_torch, adamw_8bit, paged_adamw_32bit or paged_adamw_8bit",
        "  debug: underflow: leave it out; an error of one process ends all and is named",
        "  neftun: 5: no option here, nor of TRL",
    ]
