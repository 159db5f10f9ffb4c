"""Options as scripts set them: afterwards, by a parser of dataclasses, by the names that a class says it takes."""

import copy
import dataclasses
import inspect
import json
from pathlib import Path

import pytest
import trl
from transformers import HfArgumentParser

from logratio.trainers import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer, UserError
from logratio.trainers.classes.arguments import arguments_of
from logratio.trainers.classes.trainer import SHARED

from ._rows import PLAIN, rows

CPU = {"use_cpu": True, "bf16": False, "report_to": "none"}


def test_an_option_that_is_set_afterwards_is_one_that_was_given(here):
    """Before the trainer is made, and after, until its model is loaded."""
    args = DPOConfig("out", max_steps=9, **{k: v for k, v in PLAIN.items() if k != "max_steps"})
    args.loss_type, args.max_steps = ["hinge"], 1
    args.model_init_kwargs = {"dtype": "bfloat16", "revision": "main"}
    trainer = DPOTrainer("model", args=args, train_dataset=rows())
    args.beta = 0.7
    trainer.train()
    config = json.loads(Path("out/run_config.json").read_text())
    assert (config["loss"]["loss_type"], config["loss"]["beta"], config["train"]["max_steps"]) == (["hinge"], 0.7, 1)
    assert config["model"]["dtype"] == "bfloat16" and args.beta == 0.7
    other = SFTTrainer("model", args=SFTConfig("other", **PLAIN), train_dataset=rows("sft"))
    other.model  # noqa: B018  # loads it
    other.args.learning_rate = 1e-2
    with pytest.raises(UserError, match="an option of args was set when the model had been asked for already"):
        other.train()


def test_what_is_set_afterwards_is_judged_when_all_of_it_is_there(here):
    args = GRPOConfig("out")
    args.use_vllm = True  # refused but for a server, which is named in the next line
    args.vllm_mode = "server"
    assert args.judged.options["rollout_engine"] == "vllm"
    args.bata = 0.1
    with pytest.raises(UserError, match="GRPOConfig: bata: 0.1: no option here, nor of TRL; did you mean beta?"):
        GRPOTrainer("model", [len], args, train_dataset=rows("grpo"))


@pytest.mark.parametrize("name", ["SFT", "DPO", "KTO", "GRPO", "RLOO"])
def test_every_option_of_trls_has_its_default_where_it_is_read(name):
    """But those that mean nothing here have transformers' own, or none."""
    import logratio.trainers

    theirs = getattr(trl, f"{name}Config")("out", **CPU)
    ours = getattr(logratio.trainers, f"{name}Config")("out", **CPU)
    for field in ("learning_rate", "max_steps", "num_train_epochs", "seed", "eval_strategy", "gradient_checkpointing"):
        assert getattr(ours, field) == getattr(theirs, field), field
    for field in ("per_device_train_batch_size", "output_dir", "do_eval", "push_to_hub", "resume_from_checkpoint"):
        assert getattr(ours, field) == getattr(theirs, field), field
    for field in ("local_rank", "n_gpu", "world_size", "process_index", "device"):
        assert getattr(ours, field) == getattr(theirs, field), field
    assert ours.get_process_log_level() == theirs.get_process_log_level()
    assert json.loads(ours.to_json_string())["seed"] == 42 == copy.deepcopy(ours).seed
    with pytest.raises(AttributeError, match=f"{name}Config was given no 'nothing', and knows no option of that name"):
        ours.nothing  # noqa: B018


def test_a_signature_lists_what_is_taken():
    """Scripts leave out what a version does not take by it."""
    for which in (DPOConfig, DPOConfig.__init__):
        names = inspect.signature(which).parameters
        theirs = {field.name for field in dataclasses.fields(trl.DPOConfig) if field.init}
        assert theirs <= names.keys() and {"max_seq_length", "batch_size"} <= names.keys() and "bata" not in names
    of_trainer = list(inspect.signature(DPOTrainer.__init__).parameters)
    assert of_trainer[1:4] == ["model", "ref_model", "args"] and {*SHARED} <= {*of_trainer}
    assert "reward_funcs" in inspect.signature(GRPOTrainer).parameters and "reward_funcs" not in of_trainer


@dataclasses.dataclass
class Script(trl.SFTConfig):
    base: str = "none"


def test_trls_own_object_is_taken_with_what_is_not_its_default(here):
    """As parsers of dataclasses make them, of a class derived from it with fields of its own, and set afterwards."""
    words = "--base model --output_dir out --max_steps 2 --per_device_train_batch_size 2 --learning_rate 1e-3"
    words += " --use_cpu --bf16 False --gradient_checkpointing False --lr_scheduler_type constant --save_strategy no"
    (args,) = HfArgumentParser(Script).parse_args_into_dataclasses(words.split())
    args.max_length = 77
    trainer = SFTTrainer(args.base, args=args, train_dataset=rows("sft"))
    assert trainer.args is args and trainer.train().global_step == 2
    config = json.loads(Path("out/run_config.json").read_text())
    assert (config["data"]["max_length"], config["train"]["batch_size"]) == (77, 2)
    assert config["train"]["learning_rate"] == 1e-3 and not config["model"]["gradient_checkpointing"]
    assert config["train"]["lr_scheduler_type"] == "constant" and config["save"]["save_steps"] is None


def test_trls_own_object_means_what_ours_does():
    """Each option alone, given to theirs and to ours; where neither gives any, the same too."""
    some = {
        "dpo": {"beta": 0.3, "loss_type": ["hinge"], "max_length": None, "precompute_ref_log_probs": True},
        "grpo": {"num_generations": 4, "steps_per_generation": 2, "scale_rewards": False, "loss_type": "grpo"},
    }
    for method, options in some.items():
        theirs, ours = ((trl.DPOConfig, DPOConfig), (trl.GRPOConfig, GRPOConfig))[method == "grpo"]
        for one in ({}, *({name: value} for name, value in options.items())):
            taken = arguments_of(ours, theirs("out", **CPU, **one)).judged.options
            given = ours("out", **CPU, gradient_accumulation_steps=1, per_device_train_batch_size=8, **one)
            assert taken.items() >= given.judged.options.items(), one
            assert taken.keys() - given.judged.options.keys() <= {"num_generations"}, one
    few = trl.GRPOConfig("out", **CPU, per_device_train_batch_size=2, num_generations=2)  # in TRL a multiple of it
    assert arguments_of(GRPOConfig, few).num_generations == 2


def test_a_parser_and_a_class_of_fields_are_told_whose_to_take():
    with pytest.raises(AttributeError, match="^DPOConfig is no dataclass: give the parser TRL's DPOConfig, which the"):
        trl.TrlParser((trl.ScriptArguments, DPOConfig))
    with pytest.raises(
        UserError, match="^Mine: a config with fields of your own is one of TRL's: derive it from trl's"
    ):

        class Mine(SFTConfig):
            base: str = "none"

    assert not dataclasses.is_dataclass(SFTConfig) and not hasattr(SFTConfig, "nothing")
