"""Each judgement that depends on the value, the method or the other options, by what it makes of a file."""

import math

import pytest

from logratio.losses import LOSSES
from logratio.trainers.trl_names import Kind, is_ours

from ._judged import judge, options, verdict

PEFT = {"use_peft": True}
WHOLE = "without use_peft: true TRL trains the whole model, and so does this run; add it for adapters"


BECOMES = [
    # model
    ("sft", {"dtype": "bfloat16"}, {"dtype": "bfloat16"}),
    ("sft", {"torch_dtype": "torch.float16"}, {"dtype": "float16"}),
    ("sft", {"torch_dtype": "auto"}, {"dtype": "float32"}),  # of the embedded model
    ("sft", {"model_init_kwargs": {"dtype": "float16", "use_cache": False}}, {"dtype": "float16"}),
    ("sft", {"model_init_kwargs": {"attn_implementation": "sdpa"}}, {"attn_implementation": "sdpa"}),
    ("dpo", {"use_peft": True}, {"lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.05}),
    ("dpo", {"lora_r": 8, "use_peft": True}, {"lora_r": 8, "lora_alpha": 32, "lora_dropout": 0.05}),
    ("dpo", {"use_peft": False}, {}),
    ("dpo", {"lora_r": 8, "lora_alpha": 16, "lora_dropout": 0.1, "lora_target_modules": ["q_proj"]}, {}),
    ("dpo", {"use_peft": True, "adapter_name_or_path": "a"}, {"adapter_name_or_path": "a"}),
    (
        "dpo",
        {**PEFT, "lora_target_modules": "all-linear", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        {
            **{"lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.05},
            **{"lora_target_modules": ["all-linear"], "load_in_4bit": True},
        },
    ),
    ("dpo", {"bnb_4bit_quant_type": "fp4", "use_bnb_nested_quant": True}, {}),  # nothing is quantized
    ("sft", {"activation_checkpointing": True}, {"gradient_checkpointing": True}),
    ("sft", {"gradient_checkpointing_kwargs": {"use_reentrant": True}}, {}),
    ("sft", {"model_name_or_path": "m", "tokenizer_name_or_path": "m"}, {"model_name_or_path": "m"}),
    # data
    ("sft", {"max_seq_length": 512}, {"max_length": 512}),
    ("sft", {"max_length": None}, {"max_length": 2**31 - 1}),
    ("dpo", {"max_prompt_length": 512, "max_completion_length": 128}, {}),
    ("grpo", {"max_prompt_length": 512, "max_completion_length": 128}, {"max_completion_length": 128}),
    ("sft", {"dataset_streaming": True}, {"streaming": True}),
    ("sft", {"dataset_name": "x", "dataset_train_split": "y"}, {"dataset_name": "x", "dataset_train_split": "y"}),
    ("sft", {"datasets": [{"path": "p"}], "dataset_name": "x"}, {"datasets": [{"path": "p"}]}),
    ("sft", {"datasets": [], "dataset_name": "x"}, {"dataset_name": "x"}),
    ("sft", {"datasets": [{"path": "p"}], "test_split_size": 0.1}, {"datasets": [{"path": "p"}], "eval_size": 0.1}),
    ("sft", {"test_split_size": 0.1}, {}),
    ("kto", {"train_sampling_strategy": "sequential"}, {"shuffle": False}),
    ("kto", {"train_sampling_strategy": "random"}, {"shuffle": True}),
    ("sft", {"group_by_length": True}, {"shuffle": True}),
    ("sft", {"shuffle_dataset": False}, {}),
    ("grpo", {"shuffle_dataset": False}, {"shuffle": False}),
    ("grpo", {"shuffle_dataset": None}, {"shuffle": False}),
    # training
    ("sft", {"bf16": True}, {"mixed_precision": "bf16"}),
    ("sft", {"fp16": True, "bf16": False}, {"mixed_precision": "fp16"}),
    ("sft", {"fp16": True, "use_cpu": True}, {}),
    ("sft", {"optim": "adamw_torch_fused"}, {"optim": "adamw_torch"}),
    ("sft", {"optim": "adamw_bnb_8bit"}, {"optim": "adamw_8bit"}),
    ("sft", {"optim": "paged_adamw_8bit"}, {"optim": "paged_adamw_8bit"}),
    ("sft", {"max_steps": -1}, {}),
    ("sft", {"max_steps": 7}, {"max_steps": 7}),
    ("sft", {"warmup_ratio": 0.1}, {"warmup_steps": 0.1}),
    ("sft", {"warmup_ratio": "1e-1", "warmup_steps": 0}, {"warmup_steps": 0.1}),
    ("sft", {"warmup_ratio": 0.1, "warmup_steps": 5}, {"warmup_steps": 5}),
    ("sft", {"warmup_ratio": 0.1, "lr_scheduler_type": "constant"}, {"lr_scheduler_type": "constant"}),
    (
        "sft",
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-6}},
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-6}},
    ),
    ("sft", {"lr_scheduler_kwargs": {}}, {}),
    ("sft", {"adam_beta2": 0.95, "adam_epsilon": "1e-6"}, {"adam_beta2": 0.95, "adam_epsilon": "1e-6"}),
    ("sft", {"data_seed": 7, "seed": 7}, {"seed": 7}),
    # times
    ("sft", {"eval_strategy": "no", "eval_steps": 5, "dataset_test_split": "test"}, {}),
    ("sft", {"evaluation_strategy": False}, {}),  # YAML reads a bare no so
    ("sft", {"eval_steps": 5, "dataset_test_split": "test"}, {}),
    ("sft", {"eval_strategy": "steps", "eval_steps": 5}, {"eval_steps": 5, "dataset_test_split": "test"}),
    ("sft", {"eval_strategy": "steps", "eval_steps": 0.25}, {"eval_steps": 0.25, "dataset_test_split": "test"}),
    ("sft", {"eval_strategy": "steps", "logging_steps": 3}, {"eval_steps": 3, "dataset_test_split": "test"}),
    ("sft", {"eval_strategy": "steps", "dataset_test_split": "dev"}, {"eval_steps": 10, "dataset_test_split": "dev"}),
    ("sft", {"eval_strategy": "epoch"}, {"eval_steps": 1 / 3, "dataset_test_split": "test"}),
    (
        "sft",
        {"eval_strategy": "epoch", "num_train_epochs": 4, "eval_steps": 9},
        {"num_train_epochs": 4, "eval_steps": 0.25, "dataset_test_split": "test"},
    ),
    ("sft", {"eval_strategy": "epoch", "num_train_epochs": 1}, {"num_train_epochs": 1, "dataset_test_split": "test"}),
    (
        "sft",
        {"eval_strategy": "steps", "datasets": [{"path": "p"}], "test_split_size": 8, "dataset_test_split": "test"},
        {"eval_steps": 10, "datasets": [{"path": "p"}], "eval_size": 8},
    ),
    ("sft", {"eval_strategy": "epoch", "max_steps": 5}, {"max_steps": 5, "dataset_test_split": "test"}),
    ("sft", {"save_strategy": "epoch", "max_steps": 5, "save_total_limit": 1}, {"max_steps": 5}),
    ("sft", {"save_strategy": "no", "save_steps": 5, "save_total_limit": 2}, {}),
    ("sft", {"save_strategy": "steps"}, {"save_steps": 500}),
    ("sft", {"save_steps": 0.1, "save_total_limit": 2}, {"save_steps": 0.1, "save_total_limit": 2}),
    ("sft", {"save_total_limit": 2}, {"save_total_limit": 2, "save_steps": 500}),
    ("sft", {"save_strategy": "epoch", "num_train_epochs": 2}, {"save_steps": 0.5, "num_train_epochs": 2}),
    ("sft", {"save_strategy": "epoch", "num_train_epochs": 1, "save_total_limit": 1}, {"num_train_epochs": 1}),
    ("sft", {"metric_for_best_model": "loss", "greater_is_better": False}, {}),
    ("sft", {"resume_from_checkpoint": True}, {"resume_from_checkpoint": "latest"}),
    ("sft", {"resume_from_checkpoint": False}, {}),
    ("sft", {"resume_from_checkpoint": "out/checkpoint-5"}, {"resume_from_checkpoint": "out/checkpoint-5"}),
    # losses
    ("sft", {"loss_type": "chunked_nll"}, {"loss_type": "nll"}),
    ("dpo", {"loss_type": "aot_pair"}, {"loss_type": ["aot"]}),
    ("dpo", {"loss_type": ["sigmoid", "sft"]}, {"loss_type": ["sigmoid", "sft"]}),
    ("dpo", {"rpo_alpha": 0.5}, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}),
    ("dpo", {"rpo_alpha": 2, "loss_type": "ipo"}, {"loss_type": ["ipo", "sft"], "loss_weights": [1.0, 2]}),
    ("dpo", {"label_smoothing": 0.1}, {}),  # sigmoid does not read it
    ("dpo", {"label_smoothing": 0.1, "loss_type": "robust"}, {"label_smoothing": 0.1, "loss_type": "robust"}),
    ("dpo", {"discopop_tau": 0.1}, {}),
    ("dpo", {"ref_model_sync_steps": 5}, {}),
    (
        "dpo",
        {"ref_model_sync_steps": 5, "sync_ref_model": True},
        {"ref_model_sync_steps": 5, "sync_ref_model": True},
    ),
    ("cpo", {"loss_type": "alphapo", "cpo_alpha": 1.0}, {"loss_type": "alphapo"}),
    ("cpo", {"loss_type": "simpo", "cpo_alpha": 0.0}, {"loss_type": "simpo", "cpo_alpha": 0.0}),
    ("grpo", {"epsilon": 0.3}, {"epsilon": 0.3}),
    ("grpo", {"epsilon": 0.3, "loss_type": "cispo"}, {"epsilon_high": 0.3, "loss_type": "cispo"}),
    ("grpo", {"use_bias_correction_kl": False}, {}),  # there is no divergence
    (
        "grpo",
        {"loss_type": "luspo", "importance_sampling_level": "sequence"},
        {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    ),
    ("rloo", {}, {"loss_type": "rloo", "advantage_type": "rloo"}),
    ("rloo", {"beta": 0.05}, {"loss_type": "rloo", "advantage_type": "rloo", "reward_kl_coef": 0.05}),
]


@pytest.mark.parametrize(("method", "given", "expected"), BECOMES, ids=str)
def test_what_a_file_becomes(method, given, expected):
    assert options(method, **given) == expected


def test_what_has_no_effect_says_why():
    assert verdict("lora_r", lora_r=16).reason == WHOLE
    assert verdict("lora_r", lora_r=16).kind is Kind.NO_EFFECT
    assert (
        verdict("label_smoothing", label_smoothing=0.1).reason == "loss_type sigmoid does not read it, in TRL neither"
    )
    assert verdict("ref_model_sync_steps", ref_model_sync_steps=1).reason == "read only with sync_ref_model: true"
    assert verdict("use_bias_correction_kl", "grpo", use_bias_correction_kl=False).reason == (
        "read only where beta is not 0"
    )
    assert verdict("top_k", "grpo", top_k=-1).reason == "nothing is cut off or penalized by default"
    assert verdict("use_vllm", "grpo", use_vllm=False).reason == "as in any case"
    assert (
        verdict("vllm_server_timeout", "grpo", vllm_server_timeout=9).reason
        == "read only with use_vllm: true and vllm_mode: server"
    )
    assert verdict("vllm_mode", "grpo", use_vllm=True, vllm_mode="server").reason == "use_vllm has become what it says"
    assert verdict("max_seq_length", "sft", max_length=5, max_seq_length=5).reason == "another name of max_length"
    assert verdict("activation_checkpointing", activation_checkpointing=None, gradient_checkpointing=True).kind is (
        Kind.NO_EFFECT
    )


def test_with_max_steps_nobody_knows_when_an_epoch_ends():
    unknown = "with max_steps it is not known when an epoch ends: at the end of the run alone; {} says otherwise"
    evaluated = verdict("eval_strategy", "sft", eval_strategy="epoch", max_steps=5)
    assert evaluated.kind is Kind.TRANSLATED and evaluated.reason == unknown.format("eval_strategy: steps")
    saved = verdict("save_strategy", "sft", save_strategy="epoch", max_steps=5)
    assert saved.kind is Kind.NO_EFFECT and saved.reason == unknown.format("save_strategy: steps")


def test_float16_needs_a_gpu():
    assert judge("sft", {"fp16": True}).options == {"mixed_precision": "fp16"}
    without = judge("sft", {"fp16": True}, gpu=False)
    assert without.options == {}
    assert without.verdicts[0].reason == "autocast to float16 needs a GPU, and there is none: without autocast"


def test_members_of_transformers_enumerations_are_their_values():
    from transformers.trainer_utils import SchedulerType

    (value,) = options("sft", lr_scheduler_type=SchedulerType.COSINE).values()
    assert type(value) is str and value == "cosine"


def test_an_option_of_ours_alone_makes_the_file_ours():
    """And what both have is meant as here."""
    given = {"lora_r": 8, "eval_steps": 5, "dataset_test_split": "dev", "bf16": True}
    assert judge("sft", given).options == {"mixed_precision": "bf16"}
    assert judge("sft", {**given, "batch_size": 4}).options == {
        **{"lora_r": 8, "eval_steps": 5, "dataset_test_split": "dev"},
        **{"mixed_precision": "bf16", "batch_size": 4},
    }


def test_the_command_line_goes_before_the_file():
    """In what an option of the file depends on."""
    given = {"eval_strategy": "epoch", "num_train_epochs": 4, "lora_alpha": 8}
    assert judge("sft", given).options["eval_steps"] == 0.25
    judged = judge("sft", given, words={"num_train_epochs": "2", "lora_r": "4", "mixed_precision": "bf16"})
    assert judged.options["eval_steps"] == 0.5 and judged.options["lora_alpha"] == 8
    assert "bf16" not in [v.key for v in judged.absent]


def test_variables_and_the_cpu_are_set_in_the_environment():
    judged = judge("sft", {"env": {"A": 1}, "no_cuda": True})
    assert judged.options == {} and judged.env == {"A": "1", "ACCELERATE_USE_CPU": "true"}


def test_what_trl_would_have_done_by_default_is_said():
    def absent(method, **given):
        return {v.key: v.reason for v in judge(method, given).absent}

    assert absent("sft") == {
        "bf16": "TRL's default is true, here no autocast",
        "save_steps": "TRL's default is 500, here the trained model alone is saved",
    }
    assert absent("sft", fp16=True, save_strategy="no") == absent("kto", bf16=False, batch_size=4) == {}
    assert absent("kto", bf16=False, save_steps=5) == {
        "train_sampling_strategy": "TRL's default is sequential, here rows are shuffled"
    }
    assert absent("dpo", bf16=True, save_steps=5, use_peft=True, load_in_4bit=True) == {
        "lora_target_modules": "TRL's default is PEFT's choice for the architecture, here all-linear",
        "use_bnb_nested_quant": "TRL's default is false, here true",
    }
    assert absent("rloo", bf16=True, save_steps=5) == {
        "per_device_train_batch_size": (
            "TRL's default is 8, here a step of 8 prompts, where TRL's is of 8 completions"
        ),
        "disable_dropout": "TRL's default is false, here true: without the model's own dropout",
        "num_generations": "TRL's default is 2, here 8",
        "log_completions": "TRL's default is false, here true: they are kept in completions.parquet",
        "beta": "TRL's default is 0.05, here no divergence is taken off the reward",
    }
    rest = {"bf16": True, "save_steps": 5, "gradient_accumulation_steps": 8, "disable_dropout": True}
    rest["log_completions"] = True
    assert absent("grpo", **rest) == absent("grpo", **rest, loss_type="cispo", epsilon=0.3) == {}
    assert absent("grpo", **rest, loss_type="cispo") == {
        "epsilon_high": "TRL's default is epsilon's 0.2, as a cap, here 5"
    }


@pytest.mark.parametrize(
    ("given", "ours"),
    [
        ({"learning_rate": "fast", "lora_r": 8, "env": {"A": 1}}, True),
        ({"lora-r": 8}, True),
        ({"lora_r": 8, "max_steps": None}, True),
        ({"bf16": True}, False),
        ({"optim": "adamw_torch_fused"}, False),
        ({"dtype": "auto"}, False),
        ({"max_steps": -1}, False),
        ({"beta": 0.1}, False),
        ({"env": 3}, False),
    ],
    ids=str,
)
def test_a_file_of_our_own_is_known(given, ours):
    assert is_ours(given, LOSSES["sft"]) is ours


def test_rslora_is_what_its_refusal_says():
    """lora_alpha x sqrt(r), divided by r here, is PEFT's lora_alpha / sqrt(r)."""
    from peft import LoraConfig
    from peft.tuners.lora import Linear
    from torch import nn

    layer = Linear(nn.Linear(4, 4), "default", LoraConfig(r=16, lora_alpha=8, use_rslora=True), r=16, lora_alpha=8)
    assert layer.scaling["default"] == pytest.approx(8 * math.sqrt(16) / 16)
