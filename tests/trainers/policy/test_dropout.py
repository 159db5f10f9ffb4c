"""Dropout off in training: every model computes as in evaluation, what is saved keeps its rates, runs say it."""

import json
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from logratio.losses import LOSSES, Kind
from logratio.trainers.config import ModelConfig
from logratio.trainers.layers.lora_layers import FusedLora
from logratio.trainers.loop import train_run
from logratio.trainers.options import parse_train
from logratio.trainers.policy.adapters import add_adapters
from logratio.trainers.policy.dropout import as_configured, rates, switch_off
from logratio.trainers.policy.tiny import tiny_model, tiny_tokenizer
from logratio.trainers.setup import build

IDS = torch.arange(24).view(2, 12) * 7 % 97
# Modules, plain numbers in modules, and numbers that forward reads from the configuration.
FIELDS = {
    "llama": ("attention_dropout",),
    "gpt2": ("resid_pdrop", "embd_pdrop", "attn_pdrop"),
    "opt": ("dropout", "attention_dropout"),
    "phi": ("attention_dropout", "resid_pdrop", "embd_pdrop"),
    "gpt-neox": ("attention_dropout", "hidden_dropout"),
    "falcon-alibi": ("attention_dropout", "hidden_dropout"),
    "bloom": ("attention_dropout", "hidden_dropout"),
    "mixtral": ("router_jitter_noise",),  # with which experts are chosen
}


def with_dropout(name, random_model, rate=0.3):
    model = random_model(name)
    config = model.config
    for field in FIELDS[name]:
        setattr(config, field, rate)
    again = type(model)(config)  # whose modules take the rates
    again.load_state_dict(model.state_dict())
    return again


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("name", FIELDS)
def test_a_model_in_training_is_the_model_in_evaluation(name, random_model):
    model = with_dropout(name, random_model)
    wanted = logits(model.eval())
    model.train()
    assert not torch.allclose(logits(model), wanted, atol=1e-2), "it has dropout"
    assert switch_off(model)
    torch.testing.assert_close(logits(model), wanted, rtol=1e-5, atol=1e-5)
    assert rates(model) == {}


def test_what_is_saved_keeps_its_rates(random_model, tmp_path):
    model = with_dropout("gpt2", random_model)
    switch_off(model)
    assert model.config.resid_pdrop == 0
    with as_configured(model):
        model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert [saved[field] for field in FIELDS["gpt2"]] == [0.3] * 3
    assert model.config.resid_pdrop == 0


def saved_adapter(random_model, folder):
    lora = LoraConfig(r=2, lora_dropout=0.5, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(random_model("llama"), lora).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("off", [True, False])
def test_a_loaded_adapter_goes_without_its_dropout_and_is_fused_then(random_model, tmp_path, off):
    options = {"adapter_name_or_path": saved_adapter(random_model, tmp_path), "disable_dropout": off}
    model = add_adapters(random_model("llama"), ModelConfig(**options), frozen_copy=True)
    assert any(isinstance(m, FusedLora) for m in model.modules()) is off
    assert any(isinstance(m, nn.Dropout) and m.p for m in model.modules()) is not off
    assert torch.equal(logits(model.train()), logits(model.eval())) is off
    model.save_pretrained(tmp_path / "again", selected_adapters=["default"])
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())["lora_dropout"] == 0.5


def test_new_adapters_have_the_dropout_that_is_asked_for(random_model):
    config = ModelConfig(lora_r=2, lora_dropout=0.4, disable_dropout=True)
    model = add_adapters(random_model("llama"), config, frozen_copy=False)
    assert rates(model) == {"lora_dropout": 0.4}


@pytest.mark.parametrize("method", LOSSES)
def test_it_is_off_by_default_but_for_sft(method):
    loss = LOSSES[method]()
    assert ModelConfig().resolved(loss).disable_dropout is (loss.kind is not Kind.SEQUENCE)
    for asked in (True, False):
        assert ModelConfig(disable_dropout=asked).resolved(loss).disable_dropout is asked


@pytest.fixture
def run_of(tmp_path):
    tiny_model(attention_dropout=0.1, num_hidden_layers=1).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"{i}+1=", "completion": "1", "chosen": str(i + 1), "rejected": str(i + 20)} for i in range(2)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def run_of(method, *options):
        words = ["--model_name_or_path", str(tmp_path / "model"), "--dataset_name", str(tmp_path / "rows.jsonl")]
        words += ["--output_dir", str(tmp_path / "out"), "--max_steps", "2", "--learning_rate", "0", *options]
        return build(parse_train([method, *words]))

    return run_of


OFF = "dropout is off in training (attention_dropout 0.1); --disable_dropout False keeps it"
ON = "dropout is on in training ({}) but not in what the policy is compared with"


def test_a_run_at_learning_rate_0_loses_ln_2(run_of):
    run = run_of("dpo")
    assert OFF in run.notes
    row = train_run(run, quiet=True)
    assert row["loss"] == pytest.approx(math.log(2), abs=1e-6) and row["rewards/margins"] == 0


def test_dropout_that_is_kept_or_asked_for_is_said(run_of):
    kept = run_of("dpo", "--disable_dropout", "False")
    assert ON.format("attention_dropout 0.1") in kept.notes and OFF not in kept.notes
    assert abs(train_run(kept, quiet=True)["loss"] - math.log(2)) > 1e-5
    asked = run_of("dpo", "--lora_r", "2", "--lora_dropout", "0.2", "--overwrite_output_dir")
    assert {OFF, ON.format("lora_dropout 0.2")} <= set(asked.notes)
    assert not any(note.startswith("dropout") for note in run_of("sft", "--overwrite_output_dir").notes)
