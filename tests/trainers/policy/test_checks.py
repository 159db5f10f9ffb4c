"""Model files that are cut, corrupt, incomplete or of another kind end in one sentence, before or while they load."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from logratio.trainers.config import ModelConfig
from logratio.trainers.errors import UserError
from logratio.trainers.policy import checks
from logratio.trainers.policy.load import load_model, load_tokenizer, pad_within
from logratio.trainers.policy.policy import Policy
from logratio.trainers.policy.sharing import choose_attention
from logratio.trainers.policy.tiny import tiny_model, tiny_tokenizer
from logratio.trainers.preflight import skeleton_of

SMALL = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32}
NORM = "model.layers.0.input_layernorm.weight"


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "model"
    tiny_model(**SMALL).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def load(folder):
    """All that a run does with a model's folder."""
    skeleton_of(str(folder))
    load_tokenizer(str(folder))
    return load_model(ModelConfig(model_name_or_path=str(folder)), torch.device("cpu"))


def changed(name, change):
    def apply(folder):
        path = folder / name
        path.write_bytes(change(path.read_bytes()))

    return apply


def weights(change):
    def apply(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


def configured(**fields):
    return changed("config.json", lambda text: json.dumps(json.loads(text) | fields).encode())


def unlink(name):
    return lambda folder: (folder / name).unlink()


CUT = "the weights file .*model.safetensors is cut or corrupt and cannot be read; copy it again: SafetensorError: "
BROKEN = {
    "weights cut": (changed("model.safetensors", lambda b: b[: len(b) // 2]), CUT),
    "weights cut in the header": (changed("model.safetensors", lambda b: b[:50]), CUT),
    "weights empty": (changed("model.safetensors", lambda b: b""), CUT),
    "weights replaced by text": (changed("model.safetensors", lambda b: b"version https://git-lfs\n" * 9), CUT),
    "weights missing": (unlink("model.safetensors"), "the model '.*' could not be loaded: .*no file named"),
    "configuration not JSON": (changed("config.json", lambda b: b[:-30]), "no model configuration could be loaded"),
    "configuration a list": (changed("config.json", lambda b: b"[1]"), "no model configuration could be loaded"),
    "configuration missing": (
        unlink("config.json"),
        "--model_name_or_path .* holds no model: the folder has no config",
    ),
    "configuration without a type": (
        changed("config.json", lambda b: b"{}"),
        "no model configuration could be loaded from '.*': .*",
    ),
    "configuration of a strange value": (
        configured(num_attention_heads="four"),
        "(no model configuration could be loaded|the configuration) .*",
    ),
    "another size": (
        configured(intermediate_size=48),
        r"the model '.*' could not be loaded: model.layers.0.mlp.down_proj.weight is \(32, 32\) in its files and "
        r"\(32, 48\) by its config.json",
    ),
    "a layer less in the files": (
        configured(num_hidden_layers=2),
        "the model '.*' could not be loaded: its files lack 9 weights, the first model.layers.1.input_layernorm.weight",
    ),
    "a weight less": (
        weights(lambda t: t.pop(NORM)),
        f"the model '.*' could not be loaded: its files lack 1 weight, the first {NORM}; they would be random",
    ),
    "a NaN": (
        weights(lambda t: t[NORM].__setitem__(3, float("nan"))),
        f"the weights of '.*' are broken: 1 of the 32 numbers of {NORM} are NaN; use another checkpoint",
    ),
    "infinity": (
        weights(lambda t: t[NORM].fill_(float("-inf"))),
        f"the weights of '.*' are broken: 32 of the 32 numbers of {NORM} are infinite; use another checkpoint",
    ),
    "tokenizer cut": (changed("tokenizer.json", lambda b: b[:1000]), "no tokenizer could be loaded from '.*': "),
    "tokenizer a list": (changed("tokenizer.json", lambda b: b"[]"), "no tokenizer could be loaded from '.*': "),
    "tokenizer not text": (changed("tokenizer.json", lambda b: b"\xff" * 40), "no tokenizer could be loaded"),
    "tokenizer's configuration cut": (
        changed("tokenizer_config.json", lambda b: b[:40]),
        "no tokenizer could be loaded from '.*': ",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_model_is_one_sentence(kind, folder):
    breaks, message = BROKEN[kind]
    breaks(folder)
    with pytest.raises(UserError, match=f"^{message}") as raised:
        load(folder)
    assert "\n" not in str(raised.value)


def test_weights_that_the_model_does_not_use_are_said(folder):
    weights(lambda t: t.update(value_head=torch.ones(2)))(folder)
    notes = []
    load_model(ModelConfig(model_name_or_path=str(folder)), torch.device("cpu"), notes=notes)
    assert notes == [f"the model does not use 1 weight in the files of {folder}, the first value_head"]


def test_a_file_or_an_adapter_given_as_the_model(folder):
    with pytest.raises(UserError, match="config.json is a file; give the folder that it lies in$"):
        checks.check_folder(str(folder / "config.json"))
    shutil.move(folder / "config.json", folder / "adapter_config.json")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
    message = (
        f"--model_name_or_path {folder} holds an adapter, not a model: give some/base as --model_name_or_path and this "
        "folder as --adapter_name_or_path"
    )
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        load(folder)


def test_weights_that_are_large_but_finite_are_none_that_are_broken():
    layer = torch.nn.Linear(40, 2)
    torch.nn.init.constant_(layer.weight, 3e38)
    checks.check_finite(layer, "'x'")


def test_activations_that_overflow_are_named(random_model):
    """Finite weights, infinite hidden states: not a model that looks ahead."""
    model = random_model("llama")
    model.model.norm.weight.data.fill_(3e38)
    with pytest.raises(UserError, match="^LlamaForCausalLM computes hidden states that are not finite in torch"):
        choose_attention(Policy(model))


def test_padding_gets_a_token_of_the_model():
    tokenizer = tiny_tokenizer()
    assert pad_within(tokenizer, 259, "m") == [] and tokenizer.pad_token_id == 256
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == 259
    assert pad_within(tokenizer, 259, "m") == [
        "the padding token [PAD] (259) has no row in the model's embeddings, which end at 258: <|im_end|> (258) is "
        "used instead, in the saved tokenizer too"
    ]
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 258
    with pytest.raises(UserError, match=r"EOS token '<\|im_end\|>' \(258\) has no row in the embeddings of 'm', which"):
        pad_within(tokenizer, 258, "m")


def test_weights_that_a_step_cannot_move():
    """bfloat16 at 1 has steps of 2^-7 above, so adding 2^-9 rounds back and 2^-7 does not; at 2^-8 both arrive."""
    layer = torch.nn.Linear(64, 1, bias=False, dtype=torch.bfloat16)
    with torch.no_grad():
        layer.weight.fill_(1.0)
        layer.weight[0, :16] = 2.0**-8
    assert checks.stuck(layer, 2.0**-9) == pytest.approx(0.75)
    assert checks.stuck(layer, 2.0**-7) == 0
    assert checks.stuck(layer.float(), 2.0**-20) == 0
    assert checks.stuck(layer.to(torch.float16).requires_grad_(False), 2.0**-20) == 0


@pytest.mark.parametrize(("name", "positions"), [("gpt2", 24), ("opt", 64), ("llama", None), ("bloom", None)])
def test_learned_positions_are_found(name, positions, random_model):
    assert checks.learned_positions(random_model(name)) == positions
