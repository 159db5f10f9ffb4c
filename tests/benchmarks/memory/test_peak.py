"""What `logratio plan` predicts, against bytes and FLOPs that are counted in small models, and against real packing."""

import itertools
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from logratio.benchmarks.memory.activations import Batch, activations
from logratio.benchmarks.memory.geometry import Geometry, find
from logratio.benchmarks.memory.gpus import GPUS, known_as
from logratio.benchmarks.memory.peak import (
    Setup,
    head_tile,
    optimizer_bytes,
    predict,
    weight_bytes,
)
from logratio.benchmarks.memory.roofline import (
    EFFICIENCY,
    Plan,
    Workload,
    plan,
    step_seconds,
)
from logratio.losses.head import logps
from logratio.trainers.batches.packing import pack, split_groups
from logratio.trainers.batches.sequences import VARLEN
from logratio.trainers.config import ModelConfig
from logratio.trainers.data.examples import Completion, Example
from logratio.trainers.optimizer import adamw
from logratio.trainers.policy.adapters import add_adapters
from logratio.trainers.policy.policy import Policy

from ..._cases import pairwise
from ._alive import Alive
from .test_memory import KINDS, on_cpu, run_backbone, tiny


def size_of(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


# ---- the peak


# Of two values each, of which every two meet; the rest takes half a minute.
WAYS = list(
    itertools.product(("full", "fused"), ("float32", "bfloat16"), (False, True), (False, True), (False, True), (2, 40))
)
MEETING = pairwise(*(dict.fromkeys(values) for values in zip(*WAYS, strict=True)))


@pytest.mark.parametrize(
    ("trained", "dtype", "tied", "accumulates", "recompute", "scored"),
    [way if way in MEETING else pytest.param(*way, marks=pytest.mark.slow) for way in WAYS],
)
def test_a_micro_batch_peaks_with_weights_and_gradients_where_it_is_predicted(
    trained, dtype, tied, accumulates, recompute, scored
):
    setup = on_cpu(trained, dtype=dtype, gradient_checkpointing=recompute, accumulates=accumulates, method="sft")
    model = tiny("qwen2", setup, vocab_size=2000, tie_word_embeddings=tied)
    (packed,) = pack([Example([1] * 40, [Completion([2] * scored)])] * 8, 1000)
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad and (accumulates or trained == "fused") else None
    own = size_of(t for p in model.parameters() for t in (p, p.grad) if t is not None)
    policy = Policy(model, stats=("entropy",))
    with Alive(model) as alive:
        policy(packed).logps.sum().backward()
    moments = [m for m in predict(model.config, setup, Batch.of(packed)).moments if m.name != "optimizer"]
    predicted = max(m.total - m.parts["optimizer"] for m in moments)
    assert own + alive.peak == pytest.approx(predicted, rel=0.015)


def test_a_matrix_beside_its_gradient_counts_beside_a_tied_heads_that_waits():
    """A narrow vocabulary under wide layers, where one more of their matrices decides the peak."""
    setup = on_cpu("full", dtype="float32", accumulates=True, method="sft", gradient_checkpointing=True)
    model = tiny("qwen2", setup, vocab_size=64, intermediate_size=4096, tie_word_embeddings=True)
    (packed,) = pack([Example([1] * 4, [Completion([2] * 4)])], 1000)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    with Alive(model) as alive:
        Policy(model)(packed).logps.sum().backward()
    prediction = predict(model.config, setup, Batch.of(packed))
    moment = next(m for m in prediction.moments if m.name == "backbone backward")
    grads = size_of(model.parameters())
    beside = moment.total - moment.parts["weights"] - moment.parts["optimizer"] - grads
    assert alive.peak == pytest.approx(beside, rel=0.1)


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("sizes", [{}, {"hidden_size": 384, "intermediate_size": 1536}])
def test_a_quantized_model_takes_its_bytes_and_one_weight_at_a_time(tmp_path, sizes, recompute):
    AutoModelForCausalLM.from_config(KINDS["llama"](**sizes)).to(torch.bfloat16).save_pretrained(tmp_path)
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, device_map={"": "cpu"}, quantization_config=nf4, attn_implementation="sdpa"
    )
    states = [p.quant_state for p in model.parameters() if hasattr(p, "quant_state")]
    assert len(states) == 7 * 3
    constants = [t for s in states for t in (s.absmax, s.code, s.offset, s.state2.absmax, s.state2.code)]
    setup = on_cpu("fused", dtype="bfloat16", load_in_4bit=True, gradient_checkpointing=recompute)
    size = Geometry.of(model.config)
    assert weight_bytes(size, setup) == size_of([*model.parameters(), *constants])
    model = add_adapters(model, ModelConfig(lora_r=4, gradient_checkpointing=recompute), frozen_copy=False).train()
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    forward = run_backbone(model, 2, 80, False)
    with Alive(model) as alive:
        hidden = forward()
        gradient = torch.zeros_like(hidden)
        beside = 2 * hidden.untyped_storage().nbytes()
        hidden.backward(gradient)
    batch = Batch(2, 80, 160, plain=True)
    moment = next(m for m in predict(size, setup, batch).moments if m.name == "backbone backward")
    predicted = moment.parts["activations"] + moment.parts["temporary"]
    assert alive.peak - beside <= predicted <= 1.1 * (alive.peak - beside)
    assert moment.parts["activations"] >= activations(size, setup, batch).saved


@pytest.mark.parametrize("trained", ["full", "fused"])
def test_the_update_takes_gradients_and_states_and_nothing_beside_them(trained):
    setup = on_cpu(trained, dtype="bfloat16")
    model = tiny("qwen2", setup, vocab_size=500)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer = adamw(parameters, 1e-3)
    optimizer.step()
    with Alive(model) as alive:
        optimizer.step()
    assert alive.peak == 0
    on_gpu = Setup(lora_r=setup.lora_r, dtype="bfloat16")
    moment = next(m for m in predict(model.config, on_gpu, Batch(2, 128, 100)).moments if m.name == "optimizer")
    states = size_of(t for s in optimizer.state.values() for name, t in s.items() if name != "step")
    told = [moment.parts[name] for name in ("weights", "adapters", "gradients", "optimizer", "temporary")]
    adapters = size_of(parameters) if setup.lora_r else 0
    weights = size_of(model.parameters()) - adapters
    assert told == [weights, adapters, size_of(p.grad for p in parameters), states, 0]
    assert moment.parts["activations"] == moment.parts["head"] == 0


def test_eight_bit_states_are_those_that_bitsandbytes_makes():
    from bitsandbytes.optim import AdamW8bit

    sizes = [100, 4095, 4096, 4097, 39_999, 100_000]
    optimizer = AdamW8bit([torch.nn.Parameter(torch.zeros(n)) for n in sizes])
    optimizer.check_overrides()
    made = 0
    for g, group in enumerate(optimizer.param_groups):
        for k, p in enumerate(group["params"]):
            p.grad = torch.zeros_like(p)
            optimizer.init_state(group, p, g, k)
            made += size_of(t for name, t in optimizer.state[p].items() if torch.is_tensor(t) and "qmap" not in name)
    assert optimizer_bytes(sizes, Setup(optim="adamw_8bit")) == made


@pytest.mark.parametrize("gpu", ["H100", "L4"])
@pytest.mark.parametrize("name", ["Qwen2.5-0.5B", "Llama-3.1-8B"])
@pytest.mark.parametrize("lora_r", [0, 16])
def test_a_tile_has_the_rows_that_the_head_takes_by_default(monkeypatch, lora_r, gpu, name):
    size = find(name)
    monkeypatch.setattr(logps, "_device_memory", lambda device: GPUS[gpu].memory)
    hidden, weight = (torch.empty(n, size.hidden, dtype=torch.bfloat16, device="meta") for n in (1, size.vocab))
    rows = logps.default_chunk_tokens(hidden, weight.requires_grad_(not lora_r))
    per_row = 4 * (size.vocab + size.hidden)  # logits, and their product with the weight
    per_row += 2 * size.vocab if lora_r else 0  # and their gradient, in one pass
    assert size.vocab % 16 == 0
    for scored in (rows - 1, rows, 3 * rows):
        assert (
            head_tile(size, Setup(gpu=gpu, lora_r=lora_r), Batch(1, 2 * scored, scored)) == min(scored, rows) * per_row
        )


def test_a_qlora_step_by_hand():
    """Qwen2.5-0.5B, rank 16: 24 layers of 14.9 M, 151936 x 896 of the embedding; 8.8 M of adapters."""
    size, batch = find("Qwen2.5-0.5B"), Batch(8, 1024, 1000)
    prediction = predict(size, Setup(lora_r=16, load_in_4bit=True), batch)
    moments = {m.name: m.parts for m in prediction.moments}
    parts = moments["head forward"]
    linears = 24 * (2 * 896 * 896 + 2 * 896 * 128 + 3 * 896 * 4864)
    others = 151936 * 896 + 24 * (2 * 896 + 896 + 2 * 128) + 896
    assert parts["weights"] == pytest.approx(linears * (1 / 2 + 1 / 64 + 4 / 64 / 256) + 2 * others, rel=1e-3)
    assert (parts["adapters"], parts["gradients"], parts["optimizer"]) == (4 * 8798208, 4 * 8798208, 8 * 8798208)
    assert parts["workspace"] == 64 * 2**20 and parts["reference"] == 0
    tile = 1000 * (4 * (151936 + 896) + 2 * 151936)
    assert parts["head"] == tile + 2 * 1000 * 896 * 2  # h and its gradient
    # that, scaled in float32, and rounded; and h, which the entropy keeps
    assert moments["head backward"]["head"] == 1000 * 896 * (2 + 4 + 2 + 2)
    assert moments["backbone backward"]["temporary"] == 896 * 4864 * 2
    stays = parts["weights"] + parts["reference"]
    assert prediction.needed == int(1.05 * prediction.peak.total - 0.05 * stays) + 600 * 2**20


def test_without_a_word_a_gpu_attends_without_a_dense_mask():
    size, batch = find("Qwen2.5-0.5B"), Batch(8, 1024, 1000)
    default, named, dense = (
        predict(size, Setup(attn_implementation=name), batch).peak.parts["activations"]
        for name in (None, VARLEN, "sdpa")
    )
    # the mask of a layer, and keys and values repeated for 14 heads of 64, not 2
    assert default == named == dense - 24 * (8 * 1024 * 1024 * 2 + 8 * 1024 * 2 * 12 * 64 * 2)
    assert [Setup(dtype="float32", attn_implementation=name).long_rows for name in (None, VARLEN)] == [False, True]
    assert not Setup(gpu=None).long_rows


# Of 2^30 bytes: what torch tells in messages of missing memory ("has a total capacity of 79.11 GiB").
SEEN = {"H100": 79.1, "A100-40GB": 39.5, "L40S": 44.4, "L4": 22.0, "RTX4090": 23.6, "T4": 14.7}


@pytest.mark.parametrize("name", SEEN)
def test_memory_is_what_programs_see(name):
    assert GPUS[name].memory / 2**30 == pytest.approx(SEEN[name], rel=0.02)


NAMES = {
    "NVIDIA H100 80GB HBM3": "H100",
    "NVIDIA H200": "H200",
    "NVIDIA A100-SXM4-80GB": "A100-80GB",
    "NVIDIA A100-SXM4-40GB": "A100-40GB",
    "NVIDIA A10": "A10",
    "NVIDIA L40S": "L40S",
    "NVIDIA L4": "L4",
    "NVIDIA GeForce RTX 4090": "RTX4090",
    "Tesla T4": "T4",
    "NVIDIA A10G": None,
    "AMD Instinct MI300X": None,
}


@pytest.mark.parametrize("name", NAMES)
def test_a_gpu_is_known_by_its_drivers_name(name):
    total = int({"NVIDIA A100-SXM4-80GB": 79.1, "NVIDIA A100-SXM4-40GB": 39.5}.get(name, 1) * 2**30)
    assert known_as(name, total) == NAMES[name]


# ---- the plan


# A row of one completion alone needs no mask, and is not padded; of real lengths few are.
CUT = [(method, False) for method in ("sft", "dpo", "kto", "orpo", "tpo", "grpo")]
CUT += [(method, True) for method in ("dpo", "orpo", "tpo")]


@pytest.mark.parametrize("method, sequences", CUT)
@pytest.mark.parametrize(
    "work", [Workload(100, 50, 10), Workload(200, 300, 8, 4), Workload(9, 700, 3, 2), Workload(10, 20, 40)]
)
def test_examples_of_one_length_are_cut_as_they_are_packed(work, method, sequences):
    setup = Setup(method=method, attn_implementation=None if sequences else "sdpa")
    completions = [Completion([2] * work.completion_tokens)] * work.completions(setup)
    examples = [Example([1] * work.prompt_tokens, completions, advantages=(1.0,) * len(completions))] * work.batch_size
    for budget in (1000, 2500, 8192):
        cut = split_groups(examples, budget, True) if method == "grpo" else examples
        batches = pack(cut, budget, scores_prompt=setup.the_loss.scores_prompt, sequences=sequences)
        told = plan(setup, work, budget)
        assert told.micro_batches == len(batches)
        assert told.scored == sum(len(b.targets) for b in batches)
        assert told.tokens == sum(b.input_ids.numel() for b in batches)
        largest = max(map(Batch.of, batches), key=lambda b: b.tokens)
        assert (told.largest.rows, told.largest.row_length) == (largest.rows, largest.row_length)
        assert (told.largest.scored_tokens, told.largest.num_paths) == (largest.scored_tokens, largest.num_paths)


@pytest.mark.parametrize("budget", [600, 2048, 8192])
@pytest.mark.parametrize("work", [Workload(200, 300, 8, 8), Workload(9, 700, 3, 4), Workload(500, 1000, 8, 8)])
def test_a_group_that_does_not_fit_leaves_as_much_as_fits_in_one_micro_batch(work, budget):
    completions = [Completion([2] * work.completion_tokens)] * work.num_generations
    examples = [Example([1] * work.prompt_tokens, completions)] * work.batch_size
    batches = [Batch.of(b) for b in pack(split_groups(examples, budget), budget, shared=True)]
    told, largest = plan(Setup(method="grpo", attn_implementation="sdpa"), work, budget), max(b.tokens for b in batches)
    assert told.largest.tokens == largest
    assert told.largest.scored_tokens == max(b.scored_tokens for b in batches)
    assert told.scored == pytest.approx(sum(b.scored_tokens for b in batches), rel=0.15)
    assert told.tokens == pytest.approx(sum(b.tokens for b in batches), rel=0.15)


# ---- FLOPs


def products(counter):
    """FLOPs without attention's, which torch counts on a CPU from 2.15 on."""
    counts = counter.get_flop_counts()["Global"]
    return sum(flops for op, flops in counts.items() if "attention" not in str(op))


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("trained", ["full", "lora"])
def test_matrix_products_are_those_that_torch_counts(trained, recompute):
    setup = on_cpu(trained, dtype="float32", gradient_checkpointing=recompute)
    model = tiny("qwen2", setup, vocab_size=1000, tie_word_embeddings=True)
    forward, rows, length = run_backbone(model, 3, 80, True), 3, 80
    scored = torch.arange(rows * length)
    with FlopCounterMode(display=False) as counter:
        hidden = forward().flatten(0, 1)
    alone = products(counter)
    with FlopCounterMode(display=False) as counter:
        hidden = forward().flatten(0, 1)
        head = model.get_output_embeddings().weight
        logps.linear_logps(hidden, head, scored, impl="two_gemm").sum().backward()
    tokens = rows * length
    step = Plan(Batch(rows, length, tokens), 1, tokens, tokens, 0)  # no attention
    size, gpu = Geometry.of(model.config), GPUS["H100"]
    times = step_seconds(size, setup, step, gpu)
    per_second = gpu.float32_tflops * 1e12 * EFFICIENCY
    adapters = 2 * sum(size.adapters(setup.lora_r)) * tokens
    assert times["forward"] * per_second + adapters == pytest.approx(alone, rel=0.01)
    on_logits = 16 * tokens * size.vocab / (gpu.tb_per_s * 1e12)
    parts = times["forward"] + times["backward"] + times.get("recomputation", 0) + times.get("adapters", 0)
    # a checkpoint stops before the whole model's last product of a layer, which nothing behind it needs
    close = 0.06 if recompute and trained == "full" else 0.02
    assert (parts + times["head"] - on_logits) * per_second == pytest.approx(products(counter), rel=close)


def test_bandwidth_by_hand():
    """Bytes that move in a step of Qwen2.5-0.5B: 494 M parameters of 2 bytes, or 8.8 M of 4 over weights in nf4."""
    size, work = find("Qwen2.5-0.5B"), Workload(100, 50, 10)

    def moved(**options):
        setup = Setup(**options)
        step = plan(setup, work, 1000)
        assert step.micro_batches == 3
        return {k: v * 3.35e12 for k, v in step_seconds(size, setup, step, GPUS["H100"]).items()}

    whole = sum(size.parameters())
    sft, dpo = moved(method="orpo"), moved(method="dpo")
    assert sft["weights (bandwidth)"] == 3 * 2 * 2 * whole  # of each micro-batch, forward and backward
    assert dpo["weights (bandwidth)"] == pytest.approx(3 * 3 * 2 * whole)
    # a layer's activations: written and read in forward and backward, and once each where no gradient is asked for
    name = "activations (bandwidth)"
    assert dpo[name] == pytest.approx(sft[name] * 6 / 4)
    again = moved(method="orpo", gradient_checkpointing=True)
    assert again[name] == pytest.approx(sft[name] * 6 / 4)
    assert again["weights (bandwidth)"] == pytest.approx(3 * 3 * 2 * whole)
    qlora = moved(method="orpo", lora_r=16, load_in_4bit=True)
    linears = 24 * (2 * 896 * 896 + 2 * 896 * 128 + 3 * 896 * 4864)
    nf4 = weight_bytes(size, Setup(lora_r=16, load_in_4bit=True))
    assert qlora["weights (bandwidth)"] == pytest.approx(3 * 2 * (nf4 + 4 * linears))
    assert qlora["optimizer (bandwidth)"] == pytest.approx(8798208 * (7 * 4 + 2 * 8))
    assert sft["optimizer (bandwidth)"] == pytest.approx(whole * (7 * 2 + 2 * 4))
    assert math.isclose(again["recomputation"], again["forward"])
