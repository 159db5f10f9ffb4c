"""Fused RMSNorms and MLPs: which models get them, and that they compute what the model's own do."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from logratio.trainers.config import ModelConfig
from logratio.trainers.layers import fused
from logratio.trainers.layers.fused import FusedMLP, FusedNorm, FusedRotation, fuse_layers
from logratio.trainers.layers.lora_layers import fuse_lora
from logratio.trainers.policy.load import load_model

IDS = torch.arange(26).view(2, 13) * 7 % 97
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def on_a_cpu_too(monkeypatch):
    monkeypatch.setattr(fused, "DEVICES", ("cuda", "cpu"))


def both(model):
    ours = copy.deepcopy(model)
    fuse_layers(ours)
    return ours, model


def results(model):
    model.zero_grad()
    logits = model(input_ids=IDS.to(model.device), use_cache=False).logits
    logits.float().log_softmax(-1)[..., 5].square().sum().backward()
    return {"logits": logits.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def error(found, truth):
    above = sum((found[k].double() - truth[k].double()).square().sum().item() for k in truth)
    return (above / sum(t.double().square().sum().item() for t in truth.values())) ** 0.5


@pytest.mark.parametrize(
    ("name", "norms", "mlps", "rotations"),
    [
        ("llama", 5, 2, 2),
        ("qwen2", 5, 2, 2),
        ("qwen3", 9, 2, 2),
        ("mistral", 5, 2, 2),
        ("granite", 5, 2, 2),
        ("olmo2", 9, 2, 2),
        ("gemma3", 0, 0, 2),  # 1 + weight, GELU
        ("cohere", 0, 2, 0),  # pairs of neighbours are turned
        ("gpt2", 0, 0, 0),
        ("phi", 0, 0, 2),  # of half a head: its own function, as long as it is not whole
    ],
)
def test_what_computes_the_same_is_fused_and_nothing_else(random_model, name, norms, mlps, rotations):
    ours, own = both(random_model(name))
    found = [sum(isinstance(m, kind) for m in ours.modules()) for kind in (FusedNorm, FusedMLP, FusedRotation)]
    assert found == [norms, mlps, rotations]
    mine, theirs = results(ours.double()), results(copy.deepcopy(own).double())
    assert mine.keys() == theirs.keys() and error(mine, theirs) < 2e-6  # theirs computes norms in float32 at most
    assert fuse_layers(ours) == 0, "once is enough"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_in_half_precision_they_err_no_more_than_the_models_own(random_model, name, device):
    exact = copy.deepcopy(random_model(name)).bfloat16().double().to(device)
    truth = results(exact)
    ours, own = both(copy.deepcopy(random_model(name)).bfloat16().to(device))
    assert any(isinstance(m, FusedNorm) for m in ours.modules())
    assert error(results(ours), truth) <= 2 * error(results(own), truth)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_with_adapters_gradients_are_the_same_and_no_product_is_kept(random_model, device, checkpointing):
    def adapted(fuse):
        torch.manual_seed(0)
        model = copy.deepcopy(random_model("llama")).to(device)
        if fuse:
            assert fuse_layers(model) == 9
        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
        fuse_lora(model)
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return model.train()

    ours, own = adapted(True), adapted(False)
    assert error(results(ours), results(own)) < 1e-6
    kept = []
    for model in (ours, own):
        sizes = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.setdefault(t.data_ptr(), t), lambda t: t):
            out = model(input_ids=IDS.to(device), use_cache=False).logits  # holds what is kept
        kept.append(sum(t.shape[-1] == 48 and t.dim() == 3 for t in sizes.values()))
        del out
    if not checkpointing:
        assert kept == [2 * 2, 4 * 2], "gate and up; beside them silu(gate) and the product"


class Norm(torch.nn.Module):
    """As transformers' RMSNorms, but for what a subclass computes."""

    def __init__(self, width):
        super().__init__()
        self.weight, self.variance_epsilon = torch.nn.Parameter(torch.ones(width)), 1e-6

    def forward(self, x):
        x32 = x.float()
        return self.weight * (x32 * (x32.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()).to(x.dtype)


class Centred(Norm):
    def forward(self, x):
        return super().forward(x - x.float().mean(-1, keepdim=True).to(x.dtype))


class Gated(Norm):
    def forward(self, x, gate=None):
        return super().forward(x if gate is None else x * torch.nn.functional.silu(gate))


class MLP(torch.nn.Module):
    def __init__(self, width, limit):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (torch.nn.Linear(width, width, bias=False) for _ in range(3))
        self.act_fn, self.limit = torch.nn.SiLU(), limit

    def forward(self, x):
        gate, up = self.gate_proj(x).clamp(max=self.limit), self.up_proj(x).clamp(-self.limit, self.limit)
        return self.down_proj(self.act_fn(gate) * up)


class Dropping(MLP):
    def forward(self, x):
        return torch.nn.functional.dropout(super().forward(x), 0.1, self.training)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("module", "fuses"),
    [
        (lambda: Norm(8192), True),
        (lambda: Centred(8192), False),  # of random rows the mean is 1 % (Cohere's Command R)
        (lambda: Gated(64), False),  # Mamba's, which calls it with two
        (lambda: MLP(64, torch.inf), True),
        (lambda: MLP(64, 10.0), False),  # of rows that are not large it clamps nothing
        (lambda: Dropping(64, torch.inf).eval(), False),  # Seed-OSS's, in training
    ],
    ids=["norm", "centred", "gated", "mlp", "clamped", "dropping"],
)
def test_a_layer_that_computes_more_than_the_fused_one_keeps_its_own(module, fuses, dtype):
    torch.manual_seed(0)
    layer = module().to(dtype)
    own = type(layer)
    assert fuse_layers(torch.nn.ModuleList([layer])) == fuses == (type(layer) is not own)


def test_large_rows_that_overflow_in_float16_say_nothing():
    torch.manual_seed(0)
    layer = MLP(64, torch.inf).half()
    layer.gate_proj.weight.data *= 50
    layer.up_proj.weight.data *= 50
    assert not layer(torch.full((1, 64), 64.0).half()).isfinite().all()
    assert fuse_layers(torch.nn.ModuleList([layer])) == 1


def test_a_model_is_loaded_fused_unless_it_is_asked_not_to(random_model, tmp_path):
    random_model("llama").save_pretrained(tmp_path)
    for on, count in ((True, 7), (False, 0)):
        config = ModelConfig(model_name_or_path=str(tmp_path), fused_layers=on)
        model = load_model(config, torch.device("cpu"))
        assert sum(isinstance(m, (FusedNorm, FusedMLP)) for m in model.modules()) == count
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").exists()


def test_on_a_cpu_nothing_is(monkeypatch, random_model):
    monkeypatch.undo()
    assert fuse_layers(copy.deepcopy(random_model("llama"))) == 0


def test_mixed_dtypes_are_left_to_the_model(random_model):
    ours, own = both(random_model("llama"))
    x = torch.randn(3, 32).bfloat16()
    norms = [m.model.norm for m in (ours, own)]
    mine, theirs = (norm(x) for norm in norms)
    assert mine.dtype == theirs.dtype == torch.float32 and torch.equal(mine, theirs)


def test_what_raises_on_trial_is_left_as_it_is(random_model, monkeypatch):
    monkeypatch.setattr(fused, "rms_norm", lambda *args: 1 / 0)
    ours, own = both(random_model("llama"))
    assert not any(isinstance(m, FusedNorm) for m in ours.modules())
    assert any(isinstance(m, FusedMLP) for m in ours.modules())


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_rollouts_with_a_cache_are_the_models_own(random_model, name):
    """Queries and keys are one token then, at the positions behind the cache."""
    ours, own = both(random_model(name))
    assert any(isinstance(m, FusedRotation) for m in ours.modules())
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    mine, theirs = (model.generate(IDS, **options) for model in (ours, own))
    assert torch.equal(mine, theirs) and mine.shape[1] > IDS.shape[1] + 1
