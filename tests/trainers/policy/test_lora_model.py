"""A model with fused LoRA layers, or Liger-Kernel's, is the model without."""

import copy
import re

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from logratio.benchmarks.measure.steps.ledger import plain
from logratio.benchmarks.peers.truths import exact
from logratio.trainers.config import ModelConfig
from logratio.trainers.errors import UserError
from logratio.trainers.layers import liger, lora_layers
from logratio.trainers.layers.lora_layers import FusedLora
from logratio.trainers.policy.adapters import add_adapters
from logratio.trainers.policy.load import load_model
from logratio.trainers.policy.policy import REFERENCE_ADAPTER, Policy
from logratio.trainers.policy.reference_sync import ReferenceSync

IDS = torch.arange(26).view(2, 13) * 7 % 97


def fused_and_not(base, **options):
    made = []
    for on in (True, False):
        torch.manual_seed(0)
        config = ModelConfig(lora_r=2, lora_alpha=6, fused_lora=on, **options)
        model = add_adapters(copy.deepcopy(base), config, frozen_copy=True)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    p.normal_()
        assert sum(isinstance(m, FusedLora) for m in model.modules()) == (14 if on else 0)
        made.append(model.to(next(base.parameters()).dtype).train())
    return made


def logits_and_gradients(model):
    logits = model(input_ids=IDS.to(model.device), use_cache=False).logits
    model.zero_grad()
    logits.log_softmax(-1)[..., 5].square().sum().backward()
    return {"logits": logits.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same(ours, theirs, bound=1e-11):
    assert ours.keys() == theirs.keys() and len(ours) == 29
    for name, wanted in theirs.items():
        assert (ours[name] - wanted).norm() <= bound * wanted.norm(), name


def sizes_of_products(monkeypatch):
    sizes, product = [], lora_layers.lora_linear

    def spy(x, parts, *made_of):
        sizes.append(len(parts))
        return product(x, parts, *made_of)

    monkeypatch.setattr(lora_layers, "lora_linear", spy)
    return sizes


@pytest.mark.parametrize("checkpointing", [True, False])
def test_a_model_is_the_same_with_it(random_model, checkpointing, monkeypatch):
    calls = sizes_of_products(monkeypatch)
    fused, plain = fused_and_not(exact(random_model("llama")), gradient_checkpointing=checkpointing)
    assert_same(logits_and_gradients(fused), logits_and_gradients(plain))
    assert calls[:8] == [3, 1, 2, 1] * 2 and (len(calls) > 8) == checkpointing
    assert not any("siblings" in m.__dict__ for m in fused.modules())


def test_a_float32_model_is_the_same_with_it(random_model):
    assert_same(*map(logits_and_gradients, fused_and_not(random_model("llama"))), bound=1e-4)


def test_references_are_the_same_with_it(random_model):
    """No adapter, the frozen one, and after synchronisation one of another rank; then again the policy."""
    models = fused_and_not(exact(random_model("llama")), sync_ref_model=True)
    policies = [Policy(m) for m in models]
    syncs = [ReferenceSync(p, None, alpha=0.6, every=1) for p in policies]
    start = logits_and_gradients(models[1])
    for step in (0, 1, 2):
        found = []
        for policy, sync in zip(policies, syncs, strict=True):
            if step:
                sync.after(step)
            with torch.no_grad():
                with policy.as_reference():
                    found.append(policy.model(input_ids=IDS, use_cache=False).logits)
                with policy.model.disable_adapter():
                    found.append(policy.model(input_ids=IDS, use_cache=False).logits)
        torch.testing.assert_close(found[0], found[2], rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(found[1], found[3], rtol=1e-11, atol=1e-11)
        for model in models:
            assert_same(logits_and_gradients(model), start)
    assert REFERENCE_ADAPTER in models[0].peft_config
    assert (found[0] - found[1]).abs().max() > 1e-2


def test_what_is_saved_is_loaded_by_plain_peft_and_goes_on_fused(random_model, tmp_path):
    base = exact(random_model("llama"))
    fused, _ = fused_and_not(base)
    fused.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).double()
    assert not any(isinstance(m, FusedLora) for m in loaded.modules())
    config = ModelConfig(adapter_name_or_path=str(tmp_path))
    again = add_adapters(copy.deepcopy(base), config, frozen_copy=True).double()
    assert sum(isinstance(m, FusedLora) for m in again.modules()) == 14
    with torch.no_grad():
        wanted, *others = (m(input_ids=IDS).logits for m in (loaded, fused, again))
        with Policy(again).as_reference():
            others.append(again(input_ids=IDS).logits)
    assert all(torch.allclose(other, wanted, rtol=1e-11, atol=1e-11) for other in others)


def test_generation_is_the_same_with_it(random_model):
    fused, plain = (m.eval() for m in fused_and_not(exact(random_model("llama"))))
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    mask = torch.ones_like(IDS)
    ours, theirs = (m.generate(input_ids=IDS, attention_mask=mask, **options) for m in (fused, plain))
    assert ours.shape == (2, 21) and torch.equal(ours, theirs)


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("checkpointing", [True, False])
def test_a_model_that_was_loaded_in_4_bits_is_fused(random_model, monkeypatch, tmp_path, device, checkpointing):
    """Loading hangs no hooks on its layers, and no layer is left to PEFT. Truth: the same nf4 weights in float32."""
    random_model("llama", hidden_size=128, intermediate_size=192, head_dim=32).save_pretrained(tmp_path)
    calls, found = sizes_of_products(monkeypatch), []
    for fused in (True, False):
        config = ModelConfig(
            model_name_or_path=str(tmp_path),
            load_in_4bit=True,
            dtype="bfloat16",
            lora_r=4,
            fused_lora=fused,
            gradient_checkpointing=checkpointing,
        )
        torch.manual_seed(0)
        model = add_adapters(load_model(config, torch.device(device), seed=0), config, frozen_copy=False).train()
        draw = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    p.copy_(0.1 * torch.randn(p.shape, generator=draw))
        found.append(logits_and_gradients(model))
        assert calls[:8] == [3, 1, 2, 1] * 2 and (len(calls) > 8) == checkpointing
    ours, pefts, truth = *found, logits_and_gradients(plain(model, torch.float32))
    assert ours.keys() == pefts.keys() == truth.keys() and len(ours) == 29
    for name, wanted in truth.items():
        errors = [(found[name].float() - wanted).norm() / wanted.norm() for found in (ours, pefts)]
        assert errors[0] <= 2 * errors[1] + 1e-3, name


# --- Liger-Kernel


def test_liger_needs_its_package_a_gpu_and_a_known_architecture(monkeypatch, random_model):
    config = ModelConfig(use_liger_kernel=True)
    monkeypatch.setattr(liger, "is_liger_kernel_available", lambda: False)
    with pytest.raises(UserError, match=r'pip install -e "\.\[liger\]" in the checkout'):
        load_model(config, torch.device("cpu"))
    monkeypatch.setattr(liger, "is_liger_kernel_available", lambda: True)
    with pytest.raises(UserError, match="--use_liger_kernel needs a GPU"):
        load_model(config, torch.device("cpu"))
    pytest.importorskip("liger_kernel")
    with pytest.raises(UserError, match="liger-kernel has no kernels for gpt2"):
        liger.use_liger(random_model("gpt2"))


def test_liger_replaces_norms_and_mlps_but_no_forward_of_the_model(monkeypatch, random_model):
    pytest.importorskip("liger_kernel")
    from transformers.models.llama import modeling_llama

    for name in ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP"):  # which liger replaces for good
        monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))
    model = random_model("llama")
    liger.use_liger(model)
    layer = model.model.layers[0]
    for module in (model.model.norm, layer.input_layernorm, layer.post_attention_layernorm, layer.mlp):
        assert "Liger" in module.forward.__func__.__qualname__
    assert "forward" not in model.__dict__ and type(model).forward is modeling_llama.LlamaForCausalLM.forward
    assert "liger" in modeling_llama.apply_rotary_pos_emb.__name__


@pytest.mark.parametrize("names", [["q_proj", "lm_head"], ["lm_head"]])
def test_a_saved_adapter_on_the_head_is_refused(tmp_path, random_model, names):
    """The head's product with the hidden states is ours, and would leave the adapter's part out."""
    get_peft_model(random_model("llama"), LoraConfig(r=2, target_modules=names)).save_pretrained(tmp_path)
    message = f"the adapter in {str(tmp_path)!r} is on the LM head too, which is not supported; choose another"
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        add_adapters(random_model("llama"), ModelConfig(adapter_name_or_path=str(tmp_path)), frozen_copy=False)
