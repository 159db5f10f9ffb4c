"""What is saved loads back with the libraries' own from_pretrained, and an existing file is never half replaced."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from logratio.trainers.checkpoints.model import save
from logratio.trainers.errors import UserError
from logratio.trainers.policy.policy import REFERENCE_ADAPTER, Policy
from logratio.trainers.policy.tiny import tiny_model, tiny_tokenizer

SMALL = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32}
IDS = torch.tensor([[65, 66, 67, 68]])


@pytest.fixture
def model():
    return tiny_model(1, **SMALL).eval()


def with_lora(model, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        return get_peft_model(copy.deepcopy(model), config).eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def assert_same(one, other):
    torch.testing.assert_close(logits(one), logits(other), rtol=1e-5, atol=1e-5)


def test_a_full_model_loads_back(model, tmp_path):
    save(Policy(model), tiny_tokenizer(), tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert_same(loaded, model)
    assert not (tmp_path / "out" / ".partial").exists()


def test_an_adapter_loads_back_on_its_base_without_the_references_copy(model, tmp_path):
    start = with_lora(model, seed=1)
    start.save_pretrained(tmp_path / "start")
    trained = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "start", is_trainable=True)
    trained.load_adapter(tmp_path / "start", adapter_name=REFERENCE_ADAPTER, is_trainable=False)
    trained.set_adapter("default")
    with torch.no_grad():
        for p in trained.parameters():
            if p.requires_grad:
                p.add_(0.1)
    save(Policy(trained.eval()), tiny_tokenizer(), tmp_path / "out")
    loaded = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "out").eval()
    assert_same(loaded, trained)
    assert not torch.allclose(logits(loaded), logits(start), atol=1e-2)
    assert not list((tmp_path / "out").rglob(f"*{REFERENCE_ADAPTER}*"))
    assert sorted(loaded.peft_config) == ["default"]
    assert len(list((tmp_path / "out").rglob("*.safetensors"))) == 1


def test_the_tokenizer_loads_back(model, tmp_path):
    tokenizer = tiny_tokenizer()
    save(Policy(with_lora(model)), tokenizer, tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": "Grüße 12"}, {"role": "assistant", "content": "ok"}]
    assert loaded.apply_chat_template(messages, tokenize=False) == tokenizer.apply_chat_template(
        messages, tokenize=False
    )
    assert loaded("Grüße <|im_end|>")["input_ids"] == tokenizer("Grüße <|im_end|>")["input_ids"]
    assert (loaded.pad_token_id, loaded.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)


def test_saving_again_replaces_whole_files_and_leaves_others(model, tmp_path):
    (tmp_path / "metrics.jsonl").write_text("kept")
    save(Policy(with_lora(model, 1)), tiny_tokenizer(), tmp_path)
    names = {p.name for p in tmp_path.iterdir()}
    second = with_lora(model, 2)
    save(Policy(second), tiny_tokenizer(), tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == names
    assert (tmp_path / "metrics.jsonl").read_text() == "kept"
    loaded = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
    assert_same(loaded, second)


@pytest.mark.parametrize("full", [True, False])
def test_a_crash_while_writing_leaves_the_earlier_files(model, tmp_path, monkeypatch, full):
    """The weights are half written when the disk is full; what was there before still loads, and so does the next."""
    first = Policy(model if full else with_lora(model, 1))
    save(first, tiny_tokenizer(), tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    second = Policy(tiny_model(2, **SMALL) if full else with_lora(model, 2))
    kept = type(second.model).save_pretrained

    def breaks(self, folder, **options):
        kept(self, folder, **options)
        for weights in folder.glob("*.safetensors"):
            weights.write_bytes(weights.read_bytes()[:100])
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(type(second.model), "save_pretrained", breaks)
        with pytest.raises(UserError, match=f"^the model could not be saved in {tmp_path}: no space left on device$"):
            save(second, tiny_tokenizer(), tmp_path)
    assert not (tmp_path / ".partial").exists()
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == before
    save(second, tiny_tokenizer(), tmp_path)
    assert not (tmp_path / ".partial").exists()
    weights = "model.safetensors" if full else "adapter_model.safetensors"
    assert (tmp_path / weights).read_bytes() != before[weights]


def test_the_adapters_configuration_names_no_temporary_folder(model, tmp_path):
    save(Policy(with_lora(model)), tiny_tokenizer(), tmp_path)
    assert ".partial" not in json.dumps(json.loads((tmp_path / "adapter_config.json").read_text()))


def test_a_generation_configuration_that_contradicts_itself_does_not_cost_the_weights(tmp_path, monkeypatch):
    """Versions of transformers load it and refuse to save it; it is saved as it was."""
    kept = GenerationConfig.save_pretrained

    def strict(self, *args, **kwargs):
        self.validate(strict=True)
        return kept(self, *args, **kwargs)

    monkeypatch.setattr(GenerationConfig, "save_pretrained", strict)
    tiny = tiny_model(1, **SMALL)
    tiny.save_pretrained(tmp_path / "start")
    own = {"do_sample": False, "temperature": 0.9, "eos_token_id": 258}
    (tmp_path / "start" / "generation_config.json").write_text(json.dumps(own))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "start").eval()
    with pytest.raises(ValueError, match="temperature"):
        loaded.save_pretrained(tmp_path / "refused")
    save(Policy(loaded), tiny_tokenizer(), tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert {name: saved[name] for name in own} == own
    assert loaded.generation_config.temperature == 0.9
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()), logits(loaded))
