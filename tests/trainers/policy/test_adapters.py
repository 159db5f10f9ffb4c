"""Adapters from folders: what does not fit the model, or is not there, is refused; the rest computes as PEFT says."""

import copy
import json
import re

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file

from logratio.trainers.config import ModelConfig
from logratio.trainers.errors import UserError
from logratio.trainers.policy.adapters import add_adapters, check_targets, describe, not_adaptable
from logratio.trainers.policy.policy import Policy

IDS = torch.arange(26).view(2, 13) * 7 % 97


def saved(base, folder, **options):
    lora = LoraConfig(**{"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False} | options)
    model = get_peft_model(base, lora)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1)
    model.save_pretrained(folder)
    return folder


def load(base, folder, **options):
    config = ModelConfig(model_name_or_path="some/base", adapter_name_or_path=str(folder), **options)
    return add_adapters(base, config, frozen_copy=True)


def weights(change):
    def apply(folder):
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")

    return apply


def configured(**fields):
    def apply(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return apply


def bytes_of(name, change):
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
LOADED = "no adapter could be loaded from '{}': "
FITS = "the adapter in '{}' does not fit the model 'some/base' (it was made for 'other/base'): "
BROKEN = {
    "not there": (lambda f: (f / "adapter_config.json").unlink(), LOADED + "the folder has no adapter_config.json"),
    "no weights": (
        lambda f: (f / "adapter_model.safetensors").unlink(),
        LOADED + "the folder has no adapter_model.safetensors",
    ),
    "weights cut": (bytes_of("adapter_model.safetensors", lambda b: b[:-100]), LOADED + "SafetensorError: "),
    "configuration cut": (bytes_of("adapter_config.json", lambda b: b[:50]), LOADED),
    "an unknown type": (configured(peft_type="TELEPATHY"), LOADED),
    "no type": (configured(peft_type=None), LOADED),
    "another task": (configured(task_type="SEQ_CLS"), "the adapter in '{}' is for SEQ_CLS, not for a causal language"),
    "another size": (
        weights(lambda t: t.update({FIRST: torch.ones(2, 40)})),
        FITS + "size mismatch for base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight: ([2, 40]) in "
        "the file, ([2, 32]) in the model",
    ),
    "a weight less": (weights(lambda t: t.pop(FIRST)), FITS + "it lacks 1 weight, the first "),
    "a weight more": (
        weights(lambda t: t.update(extra=torch.ones(1))),
        FITS + "it holds 1 foreign weights, the first ",
    ),
    "modules of another architecture": (configured(target_modules=["c_attn"]), FITS),
    "a NaN": (
        weights(lambda t: t[FIRST][0].fill_(float("nan"))),
        "the weights of the adapter in '{}' are broken: 32 of the 64 numbers of ",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_adapter_is_one_sentence(kind, random_model, tmp_path):
    breaks, message = BROKEN[kind]
    configured(base_model_name_or_path="other/base")(saved(random_model("llama"), tmp_path))
    breaks(tmp_path)
    with pytest.raises(UserError, match="^" + re.escape(message.format(tmp_path))) as raised:
        load(random_model("llama"), tmp_path)
    assert "\n" not in str(raised.value)


def test_adapters_that_write_into_the_prompt_are_refused(random_model, tmp_path):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    get_peft_model(random_model("llama"), config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is of type PROMPT_TUNING, which adds to the prompt"):
        load(random_model("llama"), tmp_path)


def test_what_is_saved_names_the_model_that_it_was_trained_on(random_model, tmp_path):
    configured(base_model_name_or_path="other/base")(saved(random_model("llama"), tmp_path))
    model = load(random_model("llama"), tmp_path)
    assert model.peft_config["default"].base_model_name_or_path == "some/base"


def test_modules_saved_whole_are_loaded_trained_and_those_of_the_reference(random_model, tmp_path):
    base = random_model("llama", tie_word_embeddings=False)
    saved(copy.deepcopy(base), tmp_path, modules_to_save=["embed_tokens", "lm_head"])
    policy = Policy(load(copy.deepcopy(base), tmp_path))
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    with torch.no_grad():
        wanted = theirs(input_ids=IDS).logits
        torch.testing.assert_close(policy.model(input_ids=IDS).logits, wanted, rtol=1e-5, atol=1e-5)
        trained = {n for n, p in policy.named_parameters() if p.requires_grad}
        assert sum("modules_to_save.default" in n for n in trained) == 2
        for p in policy.parameters():
            if p.requires_grad:
                p.add_(0.1)
        with policy.as_reference():
            torch.testing.assert_close(policy.model(input_ids=IDS).logits, wanted, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(policy.model(input_ids=IDS).logits, wanted, atol=1e-2)


def test_every_target_must_match(random_model):
    model = random_model("llama")
    check_targets(model, ["q_proj", "mlp.up_proj"])
    check_targets(model, ["all-linear"])
    message = (
        "--lora_target_modules q_proj c_attn: no module of the model is called c_attn; it has down_proj, embed_tokens, "
    )
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        check_targets(model, ["q_proj", "c_attn"])
    with pytest.raises(UserError, match="no module of the model is called proj;"):
        check_targets(model, ["proj"])


@pytest.mark.parametrize("name", ["phimoe", "llama4"])
def test_routers_that_choose_experts_get_no_adapters(random_model, name):
    """They are linear layers by their class, and return whom they have chosen: PEFT's forward fails on them."""
    config = ModelConfig(lora_r=2)
    model = add_adapters(random_model(name), config, frozen_copy=False)
    adapted = {n.split(".lora_A")[0].split(".")[-1] for n, _ in model.named_parameters() if "lora_A" in n}
    assert {"q_proj", "k_proj", "v_proj", "o_proj"} <= adapted and "router" not in adapted
    assert describe(model) == ["left without adapters: router"]
    assert torch.equal(model(input_ids=IDS).logits, random_model(name)(input_ids=IDS).logits)  # B is 0
    with pytest.raises(UserError) as told:
        add_adapters(random_model(name), ModelConfig(lora_r=2, lora_target_modules=("router",)), frozen_copy=False)
    assert str(told.value) == (
        "--lora_target_modules router: no adapter could be added to what router returns; leave it out"
    )


def test_what_does_not_take_rows_at_all_gets_no_adapter(random_model):
    """As products of several blocks, which want a dimension for them."""

    class Grouped(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x.unflatten(0, (3, -1)))

    model = random_model("llama")
    model.model.layers[0].mlp.up_proj.__class__ = Grouped
    assert not_adaptable(model) == ["up_proj"]


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_a_mambas_output_gets_no_adapter(random_model, name):
    """PEFT refuses the one module, and all-linear with it."""
    model = add_adapters(random_model(name), ModelConfig(lora_r=2), frozen_copy=False)
    adapted = {n.split(".lora_A")[0].split(".")[-1] for n, _ in model.named_parameters() if "lora_A" in n}
    assert "in_proj" in adapted and "out_proj" not in adapted
    assert describe(model) == ["left without adapters: out_proj"]


def test_other_classes_of_linear_layers_are_adapted_as_ever(random_model):
    """Falcon has one of its own, which computes what a linear layer does."""
    falcon = add_adapters(random_model("falcon-alibi"), ModelConfig(lora_r=2), frozen_copy=False)
    assert any("query_key_value.lora_A" in name for name, _ in falcon.named_parameters())
    assert falcon.peft_config["default"].exclude_modules is None and describe(falcon) == []
