"""A reference that follows the policy, held against models whose dense weights were blended."""

import copy
import json
import math

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

from logratio.benchmarks.peers.truths import exact
from logratio.trainers.batches.packing import pack
from logratio.trainers.config import ModelConfig
from logratio.trainers.data.examples import Completion, Example
from logratio.trainers.errors import UserError
from logratio.trainers.loop import train_run
from logratio.trainers.options import parse_train
from logratio.trainers.policy.adapters import add_adapters
from logratio.trainers.policy.policy import REFERENCE_ADAPTER, Policy
from logratio.trainers.policy.reference import AdapterReference, ModelReference
from logratio.trainers.policy.reference_sync import SMALLEST, ReferenceSync
from logratio.trainers.policy.tiny import tiny_model
from logratio.trainers.setup import build

EXAMPLES = [
    Example([5, 6, 7], [Completion([8, 9]), Completion([10, 11, 12])], row=0),
    Example([20, 3, 4], [Completion([21]), Completion([22, 23, 24])], row=1),
]
(BATCH,) = pack(EXAMPLES, 1000, shared=True)
LN_2 = math.log(2)


def logps(model):
    with torch.no_grad():
        return Policy(model).eval()(BATCH)[0]


def lora_policy(base, start, folder, r=2):
    """A float64 policy with what `add_adapters` gives it: a fresh adapter, or one from a file; never the same again."""
    options = {"lora_r": r, "lora_alpha": 6, "sync_ref_model": True}
    if start == "file":
        config = LoraConfig(r=r, lora_alpha=6, use_rslora=True, target_modules="all-linear", init_lora_weights=False)
        get_peft_model(copy.deepcopy(base), config).save_pretrained(folder)
        options = {"adapter_name_or_path": str(folder), "sync_ref_model": True}
    return Policy(add_adapters(copy.deepcopy(base), ModelConfig(**options), frozen_copy=True).double())


def layers_of(policy):
    return {name: m for name, m in policy.model.named_modules() if isinstance(m, LoraLayer)}


def deltas(policy, adapter):
    """What an adapter adds to each dense weight, by PEFT's own account."""
    with torch.no_grad():
        return {name: layer.get_delta_weight(adapter).clone() for name, layer in layers_of(policy).items()}


def dense(policy, added):
    """The policy's base model with `added` in its weights, without adapters."""
    merged = copy.deepcopy(policy.model)
    for name, layer in layers_of(Policy(merged)).items():
        layer.get_base_layer().weight.data += added[name]
    return merged.unload()


def change(policy, generator):
    """As an optimizer step would."""
    with torch.no_grad():
        for p in policy.parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype)


@pytest.mark.parametrize("alpha", [0.6, 0.25])
@pytest.mark.parametrize("start", ["fresh", "file"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_with_lora_the_reference_is_a_blend_of_dense_weights(name, start, alpha, random_model, tmp_path):
    """Twelve times in a row, with ranks that would grow beyond the layers' width."""
    policy = lora_policy(exact(random_model(name)), start, tmp_path)
    reference = AdapterReference(policy)
    sync, generator = ReferenceSync(policy, None, alpha=alpha, every=1), torch.Generator().manual_seed(0)
    expected = deltas(policy, REFERENCE_ADAPTER)
    assert any(d.any() for d in expected.values()) == (start == "file")
    for step in range(1, 13):
        change(policy, generator)
        theta = deltas(policy, "default")
        expected = {n: alpha * theta[n] + (1 - alpha) * expected[n] for n in expected}
        sync.after(step)
        if step in (1, 2, 12):
            got, wanted = reference(BATCH), logps(dense(policy, expected))
            assert got.dtype == torch.float64
            torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)
            assert (got - logps(dense(policy, theta))).abs().max() > 1e-3
    for layer in layers_of(policy).values():
        a, b = layer.lora_A[REFERENCE_ADAPTER], layer.lora_B[REFERENCE_ADAPTER]
        assert a.out_features == len(a.weight) == b.weight.shape[1] <= min(a.in_features, b.out_features)
        assert not a.weight.requires_grad and not b.weight.requires_grad


def test_with_whole_models_the_reference_is_a_blend_of_weights(random_model):
    policy = Policy(exact(random_model("llama")))
    other = ModelReference(Policy(exact(random_model("llama", seed=1))))
    sync, generator = ReferenceSync(policy, other.policy, alpha=0.6, every=1), torch.Generator().manual_seed(0)
    blended = copy.deepcopy(other.policy.model)
    for step in range(1, 4):
        change(policy, generator)
        weights = {n: 0.6 * p + 0.4 * blended.state_dict()[n] for n, p in policy.model.state_dict().items()}
        blended.load_state_dict(weights)
        sync.after(step)
        torch.testing.assert_close(other(BATCH), logps(blended), rtol=1e-10, atol=1e-10)
    assert not any(p.requires_grad for p in other.policy.parameters())


def test_whole_models_are_blended_in_float32_whatever_they_are_stored_in(random_model):
    policy, other = (Policy(random_model("llama", seed).bfloat16()) for seed in (0, 1))
    old = [p.detach().float().clone() for p in other.parameters()]
    ReferenceSync(policy, other, alpha=0.3, every=1).after(1)
    for was, theta, ref in zip(old, policy.parameters(), other.parameters(), strict=True):
        assert ref.dtype == torch.bfloat16
        torch.testing.assert_close(ref, (0.7 * was + 0.3 * theta.float()).bfloat16(), rtol=8e-3, atol=1e-7)


@pytest.mark.parametrize("whole", [True, False])
def test_alpha_0_keeps_the_reference_and_alpha_1_makes_it_the_policy(whole, random_model, tmp_path):
    if whole:
        policy = Policy(random_model("llama"))
        other = Policy(random_model("llama", seed=1))
        reference = ModelReference(other)
    else:
        policy, other = lora_policy(random_model("llama"), "file", tmp_path).float(), None
        reference = AdapterReference(policy)
    start = reference(BATCH)
    change(policy, torch.Generator().manual_seed(0))
    ReferenceSync(policy, other, alpha=0.0, every=1).after(1)
    assert torch.equal(reference(BATCH), start)
    sync = ReferenceSync(policy, other, alpha=1.0, every=3)
    for step in (1, 2, 4, 5):
        sync.after(step)
        assert torch.equal(reference(BATCH), start), "only every third step"
    sync.after(6)
    with torch.no_grad():
        torch.testing.assert_close(reference(BATCH), policy(BATCH)[0], rtol=1e-5, atol=1e-5)
        assert not torch.allclose(reference(BATCH), start, atol=1e-2)


def test_past_adapters_are_dropped_when_their_coefficient_is_small(random_model, tmp_path):
    alpha, policy = 0.95, lora_policy(exact(random_model("llama")), "file", tmp_path, r=1)
    sync, generator = ReferenceSync(policy, None, alpha=alpha, every=1), torch.Generator().manual_seed(0)
    bound = math.ceil(math.log(SMALLEST) / math.log(1 - alpha))
    expected = deltas(policy, REFERENCE_ADAPTER)
    for step in range(1, 2 * bound + 1):
        change(policy, generator)
        theta = deltas(policy, "default")
        expected = {n: alpha * theta[n] + (1 - alpha) * expected[n] for n in expected}
        sync.after(step)
        for blend in sync.adapters:
            assert len(blend.terms) == blend.layer.r[REFERENCE_ADAPTER] == min(step + 1, bound)
            assert [c for c, _ in blend.terms[:step]] == pytest.approx(
                [alpha * (1 - alpha) ** k for k in range(len(blend.terms[:step]))]
            )
            assert all(c >= SMALLEST for c, _ in blend.terms)
    got = deltas(policy, REFERENCE_ADAPTER)
    largest = max(d.abs().max().item() for d in theta.values())
    difference = max((got[n] - expected[n]).abs().max().item() for n in got)
    assert 0 < difference < 2 * SMALLEST * largest


def test_adapters_of_another_scaling_are_blended_as_they_act(random_model, tmp_path):
    policy = lora_policy(exact(random_model("llama")), "file", tmp_path)
    for layer in layers_of(policy).values():
        layer.scaling["default"] *= 3
    change(policy, torch.Generator().manual_seed(0))
    theta, ref = deltas(policy, "default"), deltas(policy, REFERENCE_ADAPTER)
    ReferenceSync(policy, None, alpha=0.6, every=1).after(1)
    for name, got in deltas(policy, REFERENCE_ADAPTER).items():
        torch.testing.assert_close(got, 0.6 * theta[name] + 0.4 * ref[name])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"use_dora": True}, "lora_A"),
        ({"lora_bias": True}, "lora_B.default.bias"),
        ({"modules_to_save": ["norm"]}, "norm.modules_to_save"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "lora_embedding_A"),
    ],
)
def test_what_is_no_plain_lora_is_refused_by_name(options, named, random_model):
    config = LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **options})
    model = get_peft_model(random_model("llama"), config)
    model.add_adapter(REFERENCE_ADAPTER, copy.deepcopy(config))
    model.set_adapter("default")
    with pytest.raises(UserError, match=f"--sync_ref_model blends the products of plain LoRA .*{named}"):
        ReferenceSync(Policy(model), None, alpha=0.6, every=1)


# --- runs


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [{"prompt": f"{i}+1=", "chosen": str(i + 1), "rejected": str(i + 30)} for i in range(7)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def run_of(rows, *options, method="dpo", out="out"):
    words = [method, "--output_dir", str(rows.parent / out), "--batch_size", "3", "--max_steps", "6"]
    data = [] if method == "grpo" else ["--dataset_name", str(rows)]
    return build(parse_train([*words, *data, "--learning_rate", "1e-2", *options]))


def log_of(run):
    train_run(run, quiet=True)
    path = f"{run.config.train.output_dir}/metrics.jsonl"
    with open(path) as file:
        return [json.loads(line) for line in file]


SYNC = ("--sync_ref_model", "--ref_model_sync_steps", "2", "--ref_model_mixup_alpha")
KINDS = {"whole": (), "lora": ("--lora_r", "2"), "qlora": ("--lora_r", "2", "--load_in_4bit")}


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_behind_a_hard_update_loses_ln_2(kind, rows):
    run = run_of(rows, *KINDS[kind], *SYNC, "1")
    assert "every 2 steps the reference becomes 1 x the policy + 0 x itself" in run.notes
    losses = [row["loss"] for row in log_of(run)]
    assert [losses[i] for i in (0, 2, 4)] == pytest.approx([LN_2] * 3, abs=1e-6)
    assert all(abs(losses[i] - LN_2) > 1e-3 for i in (1, 3, 5))


def test_rollouts_are_compared_with_the_reference_of_their_time(rows, monkeypatch):
    options = ("--lora_r", "2", "--num_generations", "2", "--max_completion_length", "4", "--beta", "0.1")
    (rows.parent / "varied_rewards.py").write_text(
        "def varied(completion_ids, **_): return [sum(c) for c in completion_ids]"
    )
    monkeypatch.chdir(rows.parent)
    log = log_of(run_of(rows, *options, "--reward_funcs", "varied_rewards:varied", *SYNC, "1", method="grpo"))
    assert [log[i]["kl"] for i in (0, 2, 4)] == pytest.approx([0, 0, 0], abs=1e-9)
    assert all(log[i]["kl"] > 1e-6 for i in (1, 3, 5))


def test_alpha_0_trains_as_without_and_saves_the_same(rows):
    """With dropout, whose draws come after the reference adapter's."""
    options = ("--lora_r", "2", "--lora_dropout", "0.2")
    with_sync = log_of(run_of(rows, *options, *SYNC, "0", out="with"))
    without = log_of(run_of(rows, *options, out="without"))
    losses = [[row["loss"] for row in log] for log in (with_sync, without)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    saved = [load_file(rows.parent / name / "adapter_model.safetensors") for name in ("with", "without")]
    torch.testing.assert_close(saved[0], saved[1], rtol=1e-4, atol=1e-6)


def test_only_the_trained_adapter_is_saved(rows):
    run = run_of(rows, *KINDS["lora"], *SYNC, "0.5")
    log_of(run)
    folder = rows.parent / "out"
    assert not list(folder.rglob(f"*{REFERENCE_ADAPTER}*")) and len(list(folder.glob("*.safetensors"))) == 1
    loaded = PeftModel.from_pretrained(tiny_model(run.config.train.seed), folder)
    assert list(loaded.peft_config) == ["default"] and loaded.peft_config["default"].r == 2
    with torch.no_grad():
        wanted = run.policy.eval()(BATCH)[0]
    torch.testing.assert_close(logps(loaded), wanted, rtol=1e-5, atol=1e-5)  # by PEFT's kernels, not by ours
    assert not torch.allclose(run.step.reference(BATCH), wanted, atol=1e-4)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("dpo", ("--precompute_ref_log_probs",), "changes the reference, whose log-probs --precompute_ref_log_probs"),
        ("dpo", ("--ref_model_name_or_path", "tiny"), "which --ref_model_name_or_path tiny are not; leave one of them"),
        ("dpo", ("--ref_model_mixup_alpha", "1.1"), "--ref_model_mixup_alpha must be in .0, 1."),
        ("dpo", ("--ref_model_mixup_alpha", "nan"), "--ref_model_mixup_alpha must be finite"),
        ("dpo", ("--ref_model_sync_steps", "0"), "--ref_model_sync_steps must be positive"),
        ("orpo", (), "--sync_ref_model is about the reference, but this orpo has none; leave it out"),
    ],
)
def test_what_does_not_go_together_is_refused(method, options, message, rows):
    with pytest.raises(UserError, match=message):
        run_of(rows, "--sync_ref_model", *options, method=method)


def test_a_run_that_never_synchronises_says_so(rows):
    notes = run_of(rows, "--sync_ref_model").notes
    assert "the reference stays as it is: --ref_model_sync_steps 512 of 6 steps" in notes
