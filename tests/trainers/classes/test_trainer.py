"""TRL's classes train what the command line trains, with objects in the place of names."""

import inspect
import json
import math
from pathlib import Path

import datasets
import pytest
import torch
import trl
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaForSequenceClassification,
    TrainingArguments,
)
from transformers.utils import logging

import logratio.trainers
from logratio.trainers import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOTrainer,
    ListwiseConfig,
    ListwiseTrainer,
    ORPOTrainer,
    SFTConfig,
    SFTTrainer,
    UserError,
    cli,
)
from logratio.trainers.policy.tiny import tiny_config, tiny_model, tiny_tokenizer

from ._rows import PLAIN, assert_same, rows, trained

ADAPTERS = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"}


def test_names_are_imported_when_they_are_asked_for():
    assert "DPOTrainer" in dir(logratio.trainers) and "train" in dir(logratio.trainers)
    assert all(inspect.getdoc(getattr(logratio.trainers, name)) for name in dir(logratio.trainers))
    with pytest.raises(ImportError, match="has no RewardTrainer; it has CPOConfig, CPOTrainer, .* train. What else a"):
        from logratio.trainers import RewardTrainer  # noqa: F401
    with pytest.raises(ImportError, match="has no get_peft_config; .* script takes from trl goes on to come from"):
        from logratio.trainers import get_peft_config  # noqa: F401
    with pytest.raises(AttributeError, match="has no nothing; it has CPOConfig"):
        logratio.trainers.nothing  # noqa: B018


@pytest.mark.parametrize("adapters", [True, False])
@pytest.mark.parametrize("given", ["name", "model"])
def test_a_trainer_trains_what_the_command_line_does(given, adapters, here):
    """To the bit, with a reference that is where it started; a model that was given is the one that is trained."""
    data = datasets.Dataset.from_list(rows())
    data.to_json("rows.jsonl")
    words = "train dpo --model_name_or_path model --dataset_name rows.jsonl --output_dir cli --max_steps 3".split()
    words += ["--batch_size", "4", "--learning_rate", "1e-3"]
    words += ["--lora_r", "4", "--lora_alpha", "8", "--lora_target_modules", "q_proj"] if adapters else []
    assert cli.main(words) == 0
    model = "model" if given == "name" else AutoModelForCausalLM.from_pretrained("model", dtype=torch.float32)
    peft = LoraConfig(target_modules=["q_proj"], **ADAPTERS) if adapters else None
    trainer = DPOTrainer(model, None, DPOConfig("class", **PLAIN), train_dataset=data, peft_config=peft)
    result = trainer.train()
    assert_same(trained("cli"), trained("class"))
    log = trainer.state.log_history
    assert result.global_step == len(log) == 3 and log[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert result.training_loss == pytest.approx(sum(row["loss"] for row in log) / 3)
    assert [row["epoch"] for row in log] == pytest.approx([1 / 3, 2 / 3, 1])
    if given == "model":
        assert trainer.model is model if not adapters else trainer.model.get_base_model() is model
    with pytest.raises(UserError, match="this trainer has trained"):
        trainer.train()


def test_lists_have_a_trainer_too(here):
    """To the bit what the command line does. TRL has none: the defaults are those of its others."""
    data = datasets.Dataset.from_list(rows("listwise"))
    data.to_json("rows.jsonl")
    words = "train listwise --model_name_or_path model --dataset_name rows.jsonl --output_dir cli --max_steps 3".split()
    words += "--batch_size 4 --learning_rate 1e-3 --loss_type nca --temperature_alpha 0.5 --lora_r 4".split()
    assert cli.main(words) == 0
    args = ListwiseConfig("class", loss_type="nca", temperature_alpha=0.5, lora_r=4, **PLAIN)
    trainer = ListwiseTrainer("model", None, args, train_dataset=data)
    assert trainer.train().global_step == 3
    assert_same(trained("cli"), trained("class"))
    assert not hasattr(trl, "ListwiseTrainer") and ListwiseConfig().output_dir == trl.DPOConfig(use_cpu=True).output_dir
    assert ListwiseConfig().defaults() == DPOConfig().defaults() and args.per_device_train_batch_size == 8
    with pytest.raises(UserError, match="^ListwiseConfig: label_smoothing: 0.1: an option of dpo, cpo, tpo$"):
        ListwiseConfig(label_smoothing=0.1)


def test_a_model_that_was_given_keeps_its_type_and_anchors_itself(here):
    model = AutoModelForCausalLM.from_pretrained("model", dtype=torch.bfloat16)
    args = SFTConfig("out", loss_type="asft", asft_alpha=0.1, **PLAIN)
    trainer = SFTTrainer(model, args, train_dataset=rows("sft"), processing_class=tiny_tokenizer())
    trainer.train()
    assert trainer.state.log_history[0]["kl"] == 0 < trainer.state.log_history[-1]["kl"]
    assert trainer.config.model.dtype == "bfloat16" and next(model.parameters()).dtype == torch.bfloat16


def test_a_tokenizer_goes_with_a_name(here):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}!{% endfor %}"
    data = [{"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]}] * 4
    SFTTrainer("model", SFTConfig("out", **PLAIN), train_dataset=data, processing_class=tokenizer).train()
    assert Path("out/chat_template.jinja").read_text() == tokenizer.chat_template


def test_lora_r_asks_for_adapters_as_on_the_command_line():
    """TRL's configs have none, so it cannot be an option of theirs that does nothing without use_peft."""
    assert DPOConfig("out", lora_r=4, lora_alpha=8).judged.options.items() >= {"lora_r": 4, "lora_alpha": 8}.items()
    whole = DPOConfig("out", lora_r=4, use_peft=False)
    assert "lora_r" not in whole.judged.options and "lora_r" not in trl.DPOConfig.__dataclass_fields__


def test_adapters_of_peft_as_they_are(here):
    """DoRA, rsLoRA, a pattern of names, a module that is trained whole."""
    peft = LoraConfig(use_dora=True, use_rslora=True, target_modules=r".*\.[qv]_proj", **ADAPTERS)
    SFTTrainer("model", SFTConfig("out", **PLAIN), train_dataset=rows("sft"), peft_config=peft).train()
    config = json.loads(Path("out/adapter_config.json").read_text())
    assert config["use_dora"] and config["use_rslora"] and config["target_modules"] == r".*\.[qv]_proj"
    assert any("lora_magnitude_vector" in name for name in trained("out"))


def test_quantized_adapters(here):
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    shared = {"train_dataset": rows("kto"), "peft_config": LoraConfig(**ADAPTERS)}
    trainer = KTOTrainer(
        model="model", quantization_config=nf4, args=logratio.trainers.KTOConfig("out", **PLAIN), **shared
    )
    trainer.train()
    assert trainer.model.get_base_model().is_loaded_in_4bit
    with pytest.raises(UserError, match="bnb_4bit_quant_type='fp4'; the trainer quantizes with 'nf4'"):
        KTOTrainer(model="model", quantization_config=BitsAndBytesConfig(load_in_4bit=True), **shared)


def test_rewards_are_functions(here):
    def longer(completions, **_):
        return [float(len(text)) for text in completions]

    args = GRPOConfig("out", **PLAIN | {"batch_size": 2, "num_generations": 4, "max_completion_length": 6})
    trainer = GRPOTrainer("model", longer, args, train_dataset=rows("grpo"), peft_config=LoraConfig(**ADAPTERS))
    trainer.train()
    assert "rewards/longer/mean" in trainer.state.log_history[0]


def test_rewards_are_models_too(here):
    """With a tokenizer of the program's own, or that of their files; what is none does not read it."""
    torch.manual_seed(0)
    judge = LlamaForSequenceClassification(tiny_config(num_labels=1, num_hidden_layers=1)).train()
    judge.save_pretrained("judge")
    tiny_tokenizer().save_pretrained("judge")
    before = {name: weight.clone() for name, weight in judge.state_dict().items()}
    args = GRPOConfig("out", **PLAIN | {"batch_size": 2, "num_generations": 4, "max_completion_length": 6})
    given = {"train_dataset": rows("grpo"), "peft_config": LoraConfig(**ADAPTERS)}
    trainer = GRPOTrainer(
        "model",
        ["judge", judge, "overlong"],
        args,
        reward_processing_classes=[None, tiny_tokenizer(), tiny_tokenizer()],
        **given,
    )
    trainer.train()
    for row in trainer.state.log_history:
        assert row["rewards/judge/mean"] == row["rewards/LlamaForSequenceClassification/mean"] != 0
    assert_same(judge.state_dict(), before)


@pytest.mark.parametrize("name", ["SFT", "DPO", "KTO", "GRPO", "RLOO"])
def test_what_trl_takes_without_a_name_comes_in_its_order(name):
    """And whatever else its trainers take by name is taken or refused with a reason here."""
    theirs = list(inspect.signature(getattr(trl, f"{name}Trainer").__init__).parameters)[1:]
    ours = getattr(logratio.trainers, f"{name}Trainer")
    assert tuple(theirs[: len(ours.order)]) == ours.order
    from logratio.trainers.classes.objects import NOT_TAKEN
    from logratio.trainers.classes.trainer import SHARED

    assert set(theirs) - {"optimizers"} <= {*SHARED, *ours.more, *NOT_TAKEN, "ref_model"}


REFUSED = {
    "no model": (lambda: SFTTrainer(train_dataset=[]), UserError, "model= is missing: a name, a folder"),
    "transformers' arguments": (
        lambda: SFTTrainer("model", TrainingArguments("out", use_cpu=True)),
        UserError,
        "args must be a logratio.trainers.SFTConfig, or TRL's, got transformers.training_args.TrainingArguments: give "
        "its options to SFTConfig",
    ),
    "another's arguments": (
        lambda: SFTTrainer("model", trl.DPOConfig("out", use_cpu=True, bf16=False)),
        UserError,
        "got trl.trainer.dpo_config.DPOConfig: give its options to SFTConfig",
    ),
    "an option of its arguments": (
        lambda: SFTTrainer("model", max_seq_length=512),
        TypeError,
        "SFTTrainer takes no max_seq_length: it is an option of SFTConfig",
    ),
    "an optimizer": (
        lambda: SFTTrainer("model", optimizers=(len, None)),
        UserError,
        "optimizers= is not taken: the optimizer is AdamW, by the option optim, and the schedule lr_scheduler_type; a",
    ),
    "an option": (lambda: SFTConfig(bata=0.1), UserError, "SFTConfig: bata: 0.1: "),
    "two options": (lambda: SFTConfig(neftune_noise_alpha=5, bata=1), UserError, "SFTConfig: 2 options refused"),
    "a type": (lambda: SFTTrainer("model", SFTConfig(learning_rate="quick")), UserError, "learning_rate"),
    "a keyword": (lambda: SFTTrainer("model", traindata=[]), TypeError, "SFTTrainer takes no traindata"),
    "a collator": (lambda: SFTTrainer("model", data_collator=len), UserError, "data_collator= is not taken: micro-"),
    "what is set on it": (
        lambda: setattr(GRPOTrainer("model", len), "epsilon_high", 0.3),
        UserError,
        "GRPOTrainer: epsilon_high is set on the trainer, where nothing reads it: it is args.epsilon_high, an option",
    ),
    "a method that is set": (
        lambda: setattr(SFTTrainer("model", train_dataset=[]), "compute_loss", len),
        UserError,
        "compute_loss is set on the trainer, where nothing reads it: a loss of your own is a class",
    ),
    "data that are set": (
        lambda: setattr(SFTTrainer("model", train_dataset=[]), "train_dataset", []),
        UserError,
        "train_dataset is set on the trainer, where nothing reads it: it is given when the trainer is made",
    ),
    "a reference": (lambda: ORPOTrainer("model", ref_model="m"), TypeError, "ORPOTrainer takes no ref_model"),
    "several sets": (lambda: SFTTrainer("model", train_dataset={"a": []}), UserError, "must be one data set, got 1"),
    "a stream": (
        lambda: SFTTrainer("model", train_dataset=(x for x in ())),
        UserError,
        "must have a length, which generator has not; to stream, give the name of the data",
    ),
    "prompt learning": (lambda: SFTTrainer("model", peft_config={}), UserError, "must be a LoraConfig, got dict"),
    "callback": (lambda: SFTTrainer("model", callbacks=[len]), UserError, "must be TrainerCallbacks of transformers"),
    "tokenizers": (
        lambda: GRPOTrainer("model", ["overlong", "judge"], reward_processing_classes=[None]),
        UserError,
        "reward_processing_classes= has 1 tokenizers for 2 reward_funcs=: one each, None for what is a function",
    ),
    "a tokenizer's name": (
        lambda: SFTTrainer("model", processing_class="model"),
        UserError,
        "processing_class= must be a tokenizer of transformers, got str",
    ),
    "too many": (lambda: SFTTrainer("model", SFTConfig(), []), TypeError, "takes model, args without a name"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_is_refused_before_anything_is_loaded(what, here):
    make, kind, message = REFUSED[what]
    with pytest.raises(kind) as told:
        make()
    assert message in str(told.value), str(told.value)
    assert [path.name for path in here.iterdir()] == ["model"]


def test_a_tokenizer_that_ends_nothing_is_told_by_how_it_was_given(here):
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    said = r"^the tokenizer that was given \(processing_class=\) has no EOS token, .*: set its eos_token"
    with pytest.raises(UserError, match=said):
        SFTTrainer(
            tiny_model(0), SFTConfig("out", **PLAIN), train_dataset=rows("sft"), processing_class=tokenizer
        ).train()


def test_an_object_that_has_gone_is_named(here, capsys):
    SFTTrainer("model", SFTConfig("out", **PLAIN), train_dataset=rows("sft")).train()
    words = ["train", "--config", "out/run_config.json", "--output_dir", "again"]
    assert cli.main(words) == 1
    assert "object:dataset was an object of the program that trained with it" in capsys.readouterr().err
    assert cli.main([*words, "--dataset_name", "arithmetic"]) == 0


def test_weights_are_read_and_written_without_bars(here, capfd, monkeypatch):
    """As by the command line; what a script reads itself has its bars as before."""
    monkeypatch.setattr(logging, "_tqdm_active", True)  # which a command before may have turned off
    args = SFTConfig("out", **{**PLAIN, "max_steps": 1})
    trainer = SFTTrainer(model="model", args=args, train_dataset=rows("sft"))
    trainer.train()
    trainer.save_model("saved")
    told = capfd.readouterr().err
    assert "Loading weights" not in told and "Writing model" not in told
    AutoModelForCausalLM.from_pretrained("model")
    assert "Loading weights" in capfd.readouterr().err
