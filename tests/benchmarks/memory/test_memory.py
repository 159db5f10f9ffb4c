import dataclasses
import json
import math
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from logratio.benchmarks.memory.activations import Batch, activations
from logratio.benchmarks.memory.geometry import Geometry, find, nf4_bytes
from logratio.benchmarks.memory.gpus import GPUS
from logratio.benchmarks.memory.peak import (
    EMPTY_ADAPTER,
    Setup,
    largest_fitting,
    optimizer_bytes,
    predict,
    trained_bytes,
    trained_sizes,
    weight_bytes,
)
from logratio.benchmarks.memory.roofline import Workload, plan, step_seconds
from logratio.benchmarks.memory.shapes import SHAPES, shape
from logratio.trainers.batches.packing import pack
from logratio.trainers.config import ModelConfig
from logratio.trainers.data.examples import Completion, Example
from logratio.trainers.errors import UserError
from logratio.trainers.policy.adapters import add_adapters
from logratio.trainers.policy.policy import Policy

from ._alive import Alive, saved_bytes

SMALL = dict(
    vocab_size=64,
    hidden_size=96,
    intermediate_size=360,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=512,
)
KINDS = {
    "llama": lambda **more: LlamaConfig(**SMALL | more),
    "mistral": lambda **more: MistralConfig(**SMALL | {"sliding_window": None} | more),
    "qwen2": lambda **more: Qwen2Config(**SMALL | more),
    "qwen3": lambda **more: Qwen3Config(**SMALL | {"head_dim": 24} | more),
    "gemma": lambda **more: GemmaConfig(**SMALL | {"head_dim": 24} | more),
}
# (rank, fused): the whole model, PEFT's adapters, ours
TRAINED = {"full": (0, False), "lora": (4, False), "fused": (4, True)}
DTYPES = ("float32", "bfloat16")
LESS_OFTEN = pytest.param({"intermediate_size": 256}, marks=pytest.mark.slow)


def tiny(kind: str, setup: Setup, **more):
    model = AutoModelForCausalLM.from_config(KINDS[kind](attn_implementation="sdpa", **more))
    model = model.to(getattr(torch, setup.dtype))
    options = ModelConfig(
        lora_r=setup.lora_r, fused_lora=setup.fused_lora, gradient_checkpointing=setup.gradient_checkpointing
    )
    return add_adapters(model, options, frozen_copy=False).train()


def on_cpu(trained: str = "fused", **options) -> Setup:
    rank, fused = TRAINED[trained]
    return Setup(lora_r=rank, fused_lora=fused, gpu=None, attn_implementation="sdpa", **options)


def run_backbone(model, rows: int, length: int, masked: bool):
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    ids, positions = torch.zeros(rows, length, dtype=torch.int64), torch.arange(length).repeat(rows, 1)
    mask = torch.ones(length, length, dtype=torch.bool).tril().repeat(rows, 1, 1, 1) if masked else None
    backbone = base.get_decoder()
    return lambda: (
        (backbone(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False)).last_hidden_state
    )


# ---- parameters


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}])
def test_parameters_are_those_of_the_model(kind, options):
    config = KINDS[kind](**options)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sorted(Geometry.of(config).parameters()) == sorted(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_of_the_published_shapes_and_of_their_adapters(name):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape(name))
        assert sum(find(name).parameters()) == sum(p.numel() for p in model.parameters())
        adapted = add_adapters(model, ModelConfig(lora_r=16), frozen_copy=False)
    counted = sorted(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert sorted(find(f"owner/{name}").adapters(16)) == counted


def test_a_folder_is_read_as_transformers_reads_it(tmp_path):
    for kind, make in KINDS.items():
        make(tie_word_embeddings=False).save_pretrained(tmp_path / kind)
        assert find(str(tmp_path / kind)) == Geometry.of(AutoConfig.from_pretrained(tmp_path / kind))
        fields = json.loads((tmp_path / kind / "config.json").read_text())
        del fields["tie_word_embeddings"]
        (tmp_path / kind / "config.json").write_text(json.dumps(fields))
        assert find(str(tmp_path / kind)) == Geometry.of(AutoConfig.from_pretrained(tmp_path / kind))


@pytest.mark.parametrize("text", ['{"model_type": "bert"}', "{}", "no json", "[1]", '{"model_type": "llama"}'])
def test_a_folder_that_describes_no_decoder_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError):
        find(str(tmp_path))


@pytest.mark.parametrize("said", [{"num_attention_heads": 0}, {"hidden_size": -4}, {"intermediate_size": None}])
def test_a_size_that_none_can_have_is_named(tmp_path, said):
    fields = json.loads(KINDS["llama"]().to_json_string()) | said
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match=f"{next(iter(said))} of the model's configuration must be a positive integer"):
        find(str(tmp_path))


def test_a_name_that_nobody_knows_is_refused():
    for name in ("nobody/nothing", "a/b/c", "no such folder"):
        with pytest.raises(UserError, match="neither a folder"):
            find(name)


@pytest.mark.parametrize("rows, columns", [(64, 96), (1000, 70), (300, 4864)])
def test_nf4_is_as_large_as_bitsandbytes_makes_it(rows, columns):
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(torch.randn(rows, columns), compress_statistics=True, quant_type="nf4")
    parts = [packed, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    assert nf4_bytes(rows * columns) == sum(t.numel() * t.element_size() for t in parts)


# ---- activations


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_saved_bytes_are_what_autograd_keeps(kind, dtype, trained, masked):
    setup, batch = on_cpu(trained, dtype=dtype), Batch(3, 20, 60, plain=not masked)
    model = tiny(kind, setup)
    counted = saved_bytes(model, run_backbone(model, 3, 20, masked))
    # Gemma's 1 + weight, [H], is kept too, and not counted
    tolerance = 5e-3 if kind == "gemma" else 0
    assert activations(Geometry.of(model.config), setup, batch).saved == pytest.approx(counted, rel=tolerance)


@pytest.mark.parametrize("sizes", [{"hidden_size": 48, "intermediate_size": 400}, {"num_key_value_heads": 6}])
@pytest.mark.parametrize("rows, length", [(1, 70), (5, 9)])
def test_saved_bytes_in_other_shapes(sizes, rows, length):
    setup = on_cpu("fused", dtype="bfloat16")
    model = tiny("llama", setup, **sizes)
    counted = saved_bytes(model, run_backbone(model, rows, length, True))
    assert activations(Geometry.of(model.config), setup, Batch(rows, length, 1)).saved == counted


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [{"hidden_size": 48, "intermediate_size": 480}, LESS_OFTEN])
def test_the_backbone_peaks_where_it_is_predicted(sizes, dtype, trained, masked, recompute):
    setup, batch = on_cpu(trained, dtype=dtype, gradient_checkpointing=recompute), Batch(2, 80, 160, plain=not masked)
    model = tiny("llama", setup, **sizes)
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    with Alive(model) as alive:
        forward = run_backbone(model, 2, 80, masked)
        hidden = forward().flatten(0, 1).index_select(0, torch.arange(160))
        gradient = torch.zeros_like(hidden)
        beside = hidden.untyped_storage().nbytes() + gradient.untyped_storage().nbytes() + 3 * 160 * 8
        kept, alive.peak = alive.now - beside, 0
        hidden.backward(gradient)
    predicted = activations(Geometry.of(model.config), setup, batch)
    ids = 160 * 8  # the embedding's, counted among what is beside
    mask = 2 * 80 * 80 * (masked and not recompute)  # kept here by the closure
    assert kept == pytest.approx(predicted.saved + mask, rel=0.02, abs=2 * ids)
    assert alive.peak - beside == pytest.approx(predicted.saved + predicted.backward + mask, rel=0.02)


@pytest.mark.parametrize("trained", ["full", "fused"])
def test_a_micro_batch_through_the_policy_peaks_where_it_is_predicted(trained):
    setup = on_cpu(trained, dtype="float32")
    model = tiny("qwen2", setup, vocab_size=2000, tie_word_embeddings=True)
    examples = [Example([1] * 30, [Completion([2] * 20), Completion([3] * 15)]) for _ in range(8)]
    (packed,) = pack(examples, 1000)
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    policy = Policy(model, stats=("entropy",))
    with Alive(model) as alive:
        policy(packed).logps.sum().backward()
    predicted = predict(model.config, setup, Batch.of(packed))
    resident = ("weights", "adapters", "optimizer", "reference", "gradients", "workspace")
    passing = [
        moment.total - sum(moment.parts[name] for name in resident)
        for moment in predicted.moments
        if moment.name != "optimizer"
    ]
    assert alive.peak == pytest.approx(max(passing), rel=0.03)


# ---- optimizer, gradients, reference


@pytest.mark.parametrize("trained", ["full", "fused"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_and_optimizer_are_those_of_a_trained_model(dtype, trained):
    setup = on_cpu(trained, dtype=dtype)
    model = tiny("qwen2", setup, tie_word_embeddings=True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters)
    model(input_ids=torch.zeros(1, 8, dtype=torch.int64)).logits.float().sum().backward()
    optimizer.step()
    states = [t for state in optimizer.state.values() for name, t in state.items() if name != "step"]
    sizes = trained_sizes(Geometry.of(model.config), setup)
    assert trained_bytes(sizes, setup) == sum(p.grad.numel() * p.grad.element_size() for p in parameters)
    assert optimizer_bytes(sizes, setup) == sum(t.numel() * t.element_size() for t in states)


def test_optimizers_of_bitsandbytes():
    sizes = [1000, 50_000, 1_000_000]
    blocks = 2 * 4 * (math.ceil(50_000 / 256) + math.ceil(1_000_000 / 256))
    for optim, expected in {
        "adamw_8bit": 8 * 1000 + 2 * 1_050_000 + blocks,
        "paged_adamw_8bit": 8 * 1000 + 2 * 50_000 + blocks,
        "paged_adamw_32bit": 8 * 51_000,
    }.items():
        assert optimizer_bytes(sizes, Setup(optim=optim)) == expected


def test_what_the_reference_takes():
    from logratio.trainers.policy.reference_sync import SMALLEST

    size, batch = find("Qwen2.5-0.5B"), Batch(8, 1024, 4096)

    def reference(**options):
        return predict(size, Setup(**options), batch).peak.parts["reference"]

    assert reference(method="dpo") == weight_bytes(size, Setup())
    assert reference(method="dpo", lora_r=16) == reference(method="sft") == reference(method="grpo") == 0
    assert reference(method="dpo", lora_r=16, ref_model_name_or_path="x") == weight_bytes(size, Setup())
    assert EMPTY_ADAPTER == SMALLEST
    full = 4 * sum(size.adapters(16 * 21, up_to_width=True))
    assert reference(method="kto", lora_r=16, sync_ref_model=True) == full
    once = reference(method="kto", lora_r=16, sync_ref_model=True, ref_model_mixup_alpha=1.0)
    assert once == 4 * sum(size.adapters(16))


# ---- predictions


def test_more_tokens_take_more_and_the_largest_that_fits_is_found_at_the_boundary():
    size, setup, work = find("Llama-3.1-8B"), Setup(lora_r=16, gpu="L40S"), Workload(batch_size=64)

    def at(tokens):
        return predict(size, setup, plan(setup, work, tokens).largest)

    totals = [at(tokens).peak.total for tokens in range(256, 60_000, 500)]
    assert totals == sorted(totals) and totals[-1] > 2 * totals[0]
    gpu = GPUS["L40S"]
    largest = largest_fitting(lambda tokens: at(tokens).fits(gpu), 1, 60_000)
    assert at(largest).fits(gpu) and not at(largest + 1).fits(gpu)
    assert largest_fitting(lambda n: n <= 0, 1, 50) is None
    assert [largest_fitting(lambda n, k=k: n <= k, 1, 50) for k in (1, 17, 50, 99)] == [1, 17, 50, 50]


@pytest.mark.parametrize("method", ["sft", "dpo", "kto", "orpo", "grpo"])
@pytest.mark.parametrize("load_in_4bit", [False, True], ids=["lora", "qlora"])
@pytest.mark.parametrize("name", ["Qwen2.5-0.5B", "Qwen2.5-1.5B", "Llama-3.1-8B"])
def test_models_methods_and_adapters_make_sense(name, load_in_4bit, method):
    size, work = find(name), Workload(batch_size=32)
    setup = Setup(method=method, lora_r=16, load_in_4bit=load_in_4bit)
    step = plan(setup, work, 8192)
    base = predict(size, setup, step.largest)
    parts = base.peak.parts
    assert all(value >= 0 for value in parts.values())
    bytes_per_parameter = parts["weights"] / base.parameters
    assert 0.5 < bytes_per_parameter < 1.3 if load_in_4bit else bytes_per_parameter == 2
    assert step.largest.tokens <= 8192 and step.tokens >= step.largest.tokens
    assert step.largest.scored_tokens < step.largest.tokens
    assert base.needed < 100 * 2**30
    assert base.peak_mem_mib * 2**20 == base.peak.total

    def peak(**options):
        return predict(size, dataclasses.replace(setup, **options), step.largest).peak.total

    assert peak(gradient_checkpointing=True) < base.peak.total < peak(fused_lora=False)
    assert base.peak.total < peak(use_liger_kernel=True) < peak(fused_layers=False)
    assert base.peak.total < peak(attn_implementation="sdpa")
    seconds = step_seconds(size, setup, step, GPUS["H100"])
    assert 0.01 < sum(seconds.values()) < 60 and min(seconds.values()) > 0
    assert sum(step_seconds(size, setup, step, GPUS["L4"]).values()) > 3 * sum(seconds.values())


def test_time_by_hand():
    size, setup = find("Qwen2.5-0.5B"), Setup(method="dpo")
    step = plan(setup, Workload(100, 50, batch_size=10), 1000)
    assert (step.largest.rows, step.largest.row_length, step.micro_batches, step.tokens) == (1, 800, 3, 2000)
    assert (step.scored, step.largest.scored_tokens, step.largest.num_paths) == (1000, 400, 8)
    assert step.pairs == 10 * (5000 + 2 * (5000 + 1250))
    linears = 2 * 896 * 896 + 2 * 896 * 128 + 3 * 896 * 4864
    flops = 24 * (2 * linears * 2000 + 4 * step.pairs * 896)
    times = step_seconds(size, setup, step, GPUS["H100"])
    assert times["forward"] == pytest.approx(flops / (989.5e12 * 0.6))
    assert times["backward"] == pytest.approx(24 * (4 * linears * 2000 + 10 * step.pairs * 896) / (989.5e12 * 0.6))
    assert "adapters" not in times and "recomputation" not in times

    def reference(**options):
        return step_seconds(size, Setup(**options), step, GPUS["H100"]).get("reference", 0.0)

    assert reference(method="kto") == pytest.approx(2 * times["reference"])
    assert reference(method="kto", precompute_ref_log_probs=True) == pytest.approx(times["reference"])
    assert reference(method="dpo", precompute_ref_log_probs=True) == reference(method="orpo") == 0


def test_rollouts_are_divided_and_prompts_are_scored_where_the_loss_says():
    work = Workload(100, 100, batch_size=2, num_generations=8)
    divided = plan(Setup(method="grpo", attn_implementation="sdpa"), work, 500)
    assert (divided.largest.row_length, divided.micro_batches, divided.scored) == (500, 4, 1600)
    whole = plan(Setup(method="grpo", attn_implementation="sdpa"), work, 1800)
    assert (whole.largest.rows, whole.largest.row_length) == (2, 900)
    assert plan(Setup(method="orpo"), work, 1000).scored == 2 * (200 + 99)
    assert plan(Setup(method="tpo"), work, 1000).scored == 2 * 300


@pytest.mark.parametrize(
    "options", [{"method": "x"}, {"dtype": "int8"}, {"optim": "sgd"}, {"gpu": "G"}, {"lora_r": -1}, {"load_in_4bit": 1}]
)
def test_setups_that_cannot_be(options):
    with pytest.raises(UserError):
        Setup(**options)


def test_an_architecture_that_is_not_modelled_is_refused_by_name():
    with pytest.raises(UserError, match="'mixtral'.*llama"):
        Geometry.of(SimpleNamespace(**json.loads('{"model_type": "mixtral"}')))
