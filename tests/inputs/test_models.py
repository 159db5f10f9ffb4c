"""Models and adapters as people hand them over: of another kind, cut, of another base, too small for the tokenizer."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from logratio.trainers.policy.tiny import tiny_model, tiny_tokenizer

TRAIN = "train sft --dataset_name rows.jsonl --max_steps 1 --batch_size 2 --output_dir out"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    tiny_model(0).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    get_peft_model(tiny_model(0), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(
        folder
    )
    return folder


def edited(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def with_weights(change):
    def apply(folder):
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    return apply


def first_nan(weights):
    weights["model.norm.weight"][0] = float("nan")


def first_infinite(weights):
    weights["model.norm.weight"][0] = float("inf")


def another_shape(weights):
    weights["model.norm.weight"] = torch.ones(3)


def replaced_by(model):
    def apply(folder):
        shutil.rmtree(folder)
        model().save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)

    return apply


SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 300}
BAD_MODELS = {
    "cut weights": (lambda f: cut(f / "model.safetensors"), "model"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model"),
    "empty weights": (lambda f: (f / "model.safetensors").write_bytes(b""), "model"),
    "weights of text": (lambda f: (f / "model.safetensors").write_text("hello"), "model"),
    "no config": (lambda f: (f / "config.json").unlink(), "model"),
    "cut config": (lambda f: cut(f / "config.json"), "model"),
    "config of a list": (lambda f: (f / "config.json").write_text("[]"), "model"),
    "unknown kind": (lambda f: edited(f / "config.json", model_type="nonsense"), "model"),
    "another width": (lambda f: edited(f / "config.json", hidden_size=64, num_attention_heads=4, head_dim=16), "model"),
    "another number of heads": (lambda f: edited(f / "config.json", num_attention_heads=0), "model"),
    "a layer more": (lambda f: edited(f / "config.json", num_hidden_layers=9), "model"),
    "a weight of another shape": (with_weights(another_shape), "model.norm.weight"),
    "NaN": (with_weights(first_nan), "model.norm.weight"),
    "infinity": (with_weights(first_infinite), "model.norm.weight"),
    "cut tokenizer": (lambda f: cut(f / "tokenizer.json"), "tokenizer"),
    "an encoder-decoder": (
        replaced_by(
            lambda: T5ForConditionalGeneration(
                T5Config(vocab_size=300, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
            )
        ),
        "encoder-decoder",
    ),
    "a masked model": (replaced_by(lambda: BertForMaskedLM(BertConfig(**SMALL))), "model"),
    "a vocabulary smaller than the tokenizer's": (
        replaced_by(lambda: GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2))),
        "embedding",
    ),
    "positions fewer than the rows": (
        replaced_by(lambda: GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=2, n_embd=8, n_layer=1, n_head=2))),
        "position",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", BAD_MODELS)
def test_a_model_that_cannot_be_trained(refused, whole, tmp_path, name):
    change, names = BAD_MODELS[name]
    shutil.copytree(whole, tmp_path / "model")
    change(tmp_path / "model")
    refused(f"{TRAIN} --model_name_or_path ./model", names)


def without_a_key(folder):
    weights = load_file(folder / "adapter_model.safetensors")
    weights.pop(sorted(weights)[0])
    save_file(weights, folder / "adapter_model.safetensors", {"format": "pt"})


def with_a_key(folder):
    weights = load_file(folder / "adapter_model.safetensors")
    weights["base_model.model.model.layers.77.self_attn.q_proj.lora_A.weight"] = torch.ones(2, 2)
    save_file(weights, folder / "adapter_model.safetensors", {"format": "pt"})


BAD_ADAPTERS = {
    "cut": lambda f: cut(f / "adapter_model.safetensors"),
    "no weights": lambda f: (f / "adapter_model.safetensors").unlink(),
    "no config": lambda f: (f / "adapter_config.json").unlink(),
    "cut config": lambda f: cut(f / "adapter_config.json"),
    "unknown type": lambda f: edited(f / "adapter_config.json", peft_type="NONSENSE"),
    "another rank": lambda f: edited(f / "adapter_config.json", r=5),
    "targets that are not there": lambda f: edited(f / "adapter_config.json", target_modules=["nowhere"]),
    "a missing key": without_a_key,
    "a key too many": with_a_key,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", BAD_ADAPTERS)
def test_an_adapter_that_does_not_fit(refused, adapter, tmp_path, name):
    shutil.copytree(adapter, tmp_path / "adapter")
    BAD_ADAPTERS[name](tmp_path / "adapter")
    refused(f"{TRAIN} --adapter_name_or_path ./adapter", "adapter")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("words", "names"),
    [
        ("--model_name_or_path ./adapter", "--adapter_name_or_path"),
        ("--model_name_or_path ./nowhere", "./nowhere"),
        ("--model_name_or_path rows.jsonl", "rows.jsonl"),
        ("--model_name_or_path nobody/has-this", "nobody/has-this"),
        ("--adapter_name_or_path ./nowhere", "./nowhere"),
        ("--adapter_name_or_path rows.jsonl", "rows.jsonl"),
        ("--lora_r 2 --lora_target_modules nowhere", "nowhere"),
        ("--lora_r 2 --lora_target_modules q_proj nowhere", "nowhere"),
        ("--lora_r 2 --lora_target_modules lm_head", "LM head"),
        ("--attn_implementation nonsense", "nonsense"),
    ],
)
def test_names_that_lead_nowhere(refused, adapter, tmp_path, words, names):
    shutil.copytree(adapter, tmp_path / "adapter")
    refused(f"{TRAIN} {words}", names)
