"""From configuration to run: batches, optimizer groups, held-out rows, quantization, and what is refused before it."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BloomConfig, BloomForCausalLM

from logratio.losses import LOSSES
from logratio.trainers.errors import UserError
from logratio.trainers.loop import train_run
from logratio.trainers.optimizer import make_optimizer
from logratio.trainers.options import parse_train
from logratio.trainers.setup import batches, build, count_steps, start_accelerator


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [
        {
            "prompt": f"{i}+1=",
            "completion": str(i + 1),
            "chosen": str(i + 1),
            "rejected": str(i + 30),
            "reference": str(i),
            "answer": str(i + 1),
        }
        for i in range(7)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def config_of(method, rows, *options):
    words = ["--dataset_name", str(rows), "--output_dir", str(rows.parent / "out"), "--overwrite_output_dir"]
    return parse_train([method, *words, *options])


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


@settings(max_examples=60, deadline=None)
@given(items=st.integers(1, 20), batch=st.integers(1, 8), seed=st.integers(0, 99), shuffle=st.booleans())
def test_batches_cover_every_item_once_an_epoch(items, batch, seed, shuffle):
    per_epoch = -(-items // batch)
    stream = batches(range(items), batch, shuffle=shuffle, seed=seed)
    for _ in range(3):
        epoch = [drawn for drawn, _ in take(stream, per_epoch)]
        assert all(len(drawn) == batch for drawn in epoch[:-1])
        assert sorted(i for drawn in epoch for i in drawn) == list(range(items))
        if not shuffle:
            assert [i for drawn in epoch for i in drawn] == list(range(items))


@settings(max_examples=60, deadline=None)
@given(items=st.integers(1, 20), batch=st.integers(1, 8), done=st.integers(1, 30), shuffle=st.booleans())
def test_batches_go_on_from_any_position(items, batch, done, shuffle):
    """Which is plain enough to be kept as JSON."""
    whole = take(batches(range(items), batch, shuffle=shuffle, seed=3), done + 5)
    position = json.loads(json.dumps(whole[done - 1][1]))
    assert take(batches(range(items), batch, shuffle=shuffle, seed=3, start=position), 5) == whole[done:]


def test_batches_depend_on_seed_and_epoch_alone():
    def order(seed):
        return [i for drawn, _ in take(batches(range(40), 8, shuffle=True, seed=seed), 10) for i in drawn]

    torch.manual_seed(1)
    first = order(5)
    torch.manual_seed(2)
    assert order(5) == first
    assert order(6) != first
    assert first[:40] != first[40:] and first[:40] != list(range(40))


@pytest.mark.parametrize(
    ("examples", "options", "steps"),
    [
        (16, ["--batch_size", "8", "--num_train_epochs", "1"], 2),
        (17, ["--batch_size", "8", "--num_train_epochs", "1"], 3),
        (17, ["--batch_size", "8", "--num_train_epochs", "2"], 6),
        (16, ["--batch_size", "8", "--num_train_epochs", "0.5"], 1),
        (16, ["--batch_size", "8", "--num_train_epochs", "0.01"], 1),
        (16, ["--batch_size", "8", "--max_steps", "50"], 50),
    ],
)
def test_steps_are_counted_from_epochs(rows, examples, options, steps):
    assert count_steps(examples, config_of("sft", rows, *options)) == steps


def test_every_iteration_on_a_set_of_rollouts_is_a_step(rows):
    config = config_of("grpo", rows, "--batch_size", "4", "--num_train_epochs", "1", "--num_iterations", "3")
    assert count_steps(8, config) == 6


@pytest.mark.parametrize(("examples", "batch"), [(7, 3), (5, 1), (1, 8)])
def test_kto_refuses_a_step_of_one_example(rows, examples, batch):
    message = f"^{examples} examples in steps of --batch_size {batch} make a step of 1, in which kto cannot"
    with pytest.raises(UserError, match=message):
        count_steps(examples, config_of("kto", rows, "--batch_size", str(batch)))
    assert count_steps(8, config_of("kto", rows, "--batch_size", "3", "--num_train_epochs", "1")) == 3
    assert count_steps(examples, config_of("dpo", rows, "--batch_size", str(batch)))


def test_rollouts_are_dealt_by_prompts(rows):
    config = config_of("grpo", rows, "--batch_size", "4", "--num_train_epochs", "1")
    assert count_steps(6, config, num_processes=2) == 2
    message = "^5 examples in steps of --batch_size 4 make a step of 1, which cannot be dealt to 2 processes; choose"
    with pytest.raises(UserError, match=message):
        count_steps(5, config, num_processes=2)


def test_weight_decay_is_for_matrices(rows):
    run = build(config_of("sft", rows, "--weight_decay", "0.1", "--learning_rate", "0.003", "--warmup_steps", "0"))
    decayed, plain = run.optimizer.param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert decayed["lr"] == plain["lr"] == 0.003
    assert all(p.ndim >= 2 for p in decayed["params"]) and all(p.ndim == 1 for p in plain["params"])
    everything = {id(p) for p in run.policy.parameters()}
    assert {id(p) for group in run.optimizer.param_groups for p in group["params"]} == everything
    assert plain["params"]


def test_only_what_trains_is_in_the_optimizer(rows):
    run = build(config_of("dpo", rows, "--lora_r", "2"))
    trained = {name for name, p in run.policy.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name and ".default." in name for name in trained)
    (group,) = run.optimizer.param_groups
    assert len(group["params"]) == len(trained)
    assert "lm_head" not in " ".join(trained)


@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"])
def test_optimizers_of_bitsandbytes_need_a_gpu(rows, optim):
    config = config_of("sft", rows, "--optim", optim, "--learning_rate", "1e-3")
    layer = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match=f"^--optim {optim} needs a GPU; use adamw_torch on cpu$"):
        make_optimizer(list(layer.parameters()), config.train, torch.device("cpu"))


def test_learning_rates_warm_up_and_fall(rows):
    run = build(config_of("sft", rows, "--learning_rate", "0.01", "--warmup_steps", "2", "--max_steps", "6"))
    rates = []
    for _ in range(6):
        rates.append(run.optimizer.param_groups[0]["lr"])
        run.optimizer.step()
        run.scheduler.step()
    assert rates == pytest.approx([0.0, 0.005, 0.01, 0.0075, 0.005, 0.0025])


def test_a_share_of_the_rows_is_held_out(rows):
    data = build(config_of("dpo", rows, "--eval_size", "0.3")).data  # of 7: 2.1, and 3 rounded up
    assert len(data.evaluation) == 3 and len(data.train) == 4


def test_held_out_rows_are_not_trained_on(rows):
    data = build(config_of("dpo", rows, "--eval_size", "3")).data
    held, kept = ({e.row for e in part} for part in (data.evaluation, data.train))
    assert len(held) == 3 and held | kept == set(range(7)) and not held & kept
    assert "3 examples held out for evaluation, 4 left to train on" in data.notes
    again = build(config_of("dpo", rows, "--eval_size", "3")).data
    assert {e.row for e in again.evaluation} == held
    with pytest.raises(UserError, match="^--eval_size 7 leaves nothing of 7 examples to train on$"):
        build(config_of("dpo", rows, "--eval_size", "7"))


def test_evaluation_is_logged_when_it_is_due_and_leaves_training_alone(rows, tmp_path):
    def log(*options):
        train_run(build(config_of("dpo", rows, "--max_steps", "4", "--batch_size", "2", *options)), quiet=True)
        return [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]

    path = tmp_path / "test.jsonl"
    (tmp_path / "data").mkdir()
    path = tmp_path / "data"
    for name in ("train", "test"):
        (path / f"{name}.jsonl").write_text(rows.read_text())
    plain = log("--dataset_name", str(path))
    evaluated = log("--dataset_name", str(path), "--dataset_test_split", "test", "--eval_steps", "3")
    assert [("eval_loss" in row, "eval_rewards/margins" in row) for row in evaluated] == [
        (False, False), (False, False), (True, True), (True, True)
    ]  # fmt: skip
    assert [row["loss"] for row in evaluated] == [row["loss"] for row in plain]


def test_the_same_seed_gives_the_same_run_and_another_another(rows, tmp_path):
    def losses(seed):
        options = (
            "--lora_r",
            "2",
            "--lora_dropout",
            "0.2",
            "--seed",
            seed,
            "--max_steps",
            "3",
            "--learning_rate",
            "1e-2",
        )
        train_run(build(config_of("sft", rows, *options)), quiet=True)
        return [json.loads(line)["loss"] for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]

    first = losses("1")
    assert losses("1") == first and losses("2") != first


def test_qlora_trains_float32_adapters_on_frozen_4_bit_weights(rows):
    """nf4 works on a CPU, in float32."""
    from bitsandbytes.nn import Linear4bit

    run = build(
        config_of("dpo", rows, "--load_in_4bit", "--lora_r", "8", "--max_steps", "2", "--batch_size", "3",
                  "--learning_rate", "1e-2")
    )  # fmt: skip
    layers = {name: m for name, m in run.policy.named_modules() if isinstance(m, Linear4bit)}
    assert len(layers) == 3 * 7
    assert all(m.weight.dtype == torch.uint8 and m.weight.quant_type == "nf4" for m in layers.values())
    before = {name: m.weight.data.clone() for name, m in layers.items()}
    adapters = {name: p for name, p in run.policy.named_parameters() if p.requires_grad}
    assert adapters and all(p.dtype == torch.float32 and "lora_" in name for name, p in adapters.items())
    start = {name: p.detach().clone() for name, p in adapters.items()}
    row = train_run(run, quiet=True)
    assert math.isfinite(row["loss"]) and row["step"] == 2
    assert all(torch.equal(m.weight.data, before[name]) for name, m in layers.items())
    assert any(not torch.equal(p, start[name]) for name, p in adapters.items())
    log = [json.loads(line) for line in (rows.parent / "out" / "metrics.jsonl").read_text().splitlines()]
    assert log[0]["loss"] == pytest.approx(math.log(2), rel=1e-6), "policy and reference start equal"


@pytest.mark.parametrize("method", LOSSES)
def test_a_run_says_what_became_of_its_data(rows, method):
    if method == "listwise":
        pairs = [json.loads(line) for line in rows.read_text().splitlines()]
        lists = [{"prompt": p["prompt"], "completions": [p["chosen"], p["rejected"]], "rewards": [1, 0]} for p in pairs]
        rows.write_text("\n".join(map(json.dumps, lists)))
    run = build(config_of(method, rows))
    assert run.notes[0].startswith(f"{rows}: {14 if method == 'kto' else 7} examples")
    assert run.step.loss == run.config.loss and run.config.train.batch_size == 8


def test_a_model_that_may_not_share_says_so(rows, tmp_path):
    from logratio.trainers.policy.tiny import tiny_model, tiny_tokenizer

    tiny_model(num_hidden_layers=1, attn_implementation="eager").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    options = ("--model_name_or_path", str(tmp_path / "model"), "--attn_implementation")
    run = build(config_of("orpo", rows, *options, "eager"))
    reason = "its attention implementation 'eager' does not take the mask that this needs"
    assert f"prompts are not shared between completions: {reason}" in run.notes and not run.policy.shared
    assert build(config_of("orpo", rows, *options, "sdpa")).policy.shared


def test_a_reference_model_that_may_not_share_rules_it_out_for_both(rows, tmp_path):
    """Both compute the same micro-batches, and the reference's log-probs would silently be wrong."""
    from logratio.trainers.policy.tiny import tiny_model, tiny_tokenizer

    tiny_model(num_hidden_layers=1).save_pretrained(tmp_path / "shares")
    tiny_tokenizer().save_pretrained(tmp_path / "shares")
    words = ("--model_name_or_path", str(tmp_path / "shares"), "--ref_model_name_or_path")
    bloom = BloomConfig(vocab_size=259, hidden_size=32, n_layer=1, n_head=4, initializer_range=0.2)
    BloomForCausalLM(bloom).save_pretrained(tmp_path / "bloom")
    run = build(config_of("dpo", rows, *words, str(tmp_path / "bloom")))
    assert not run.policy.shared and not run.step.packing["shared"]
    assert any("of the reference model, its attention implementation 'eager'" in note for note in run.notes)
    assert build(config_of("dpo", rows, *words, str(tmp_path / "shares"))).policy.shared


def test_kto_refuses_to_evaluate_on_one_example(rows):
    with pytest.raises(UserError, match="^kto cannot be evaluated on a single example, whose prompt needs another's"):
        build(config_of("kto", rows, "--eval_size", "1", "--batch_size", "13"))
    assert len(build(config_of("kto", rows, "--eval_size", "2", "--batch_size", "12")).data.evaluation) == 2


def test_processes_that_would_train_alone_are_refused(monkeypatch):
    """A launcher's environment that accelerate does not take up, as torchrun's on a CPU without ACCELERATE_USE_CPU."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    message = (
        "^the launcher started 2 processes but accelerate sees 1: each would train alone; "
        "on CPUs set ACCELERATE_USE_CPU=true and launch with torchrun$"
    )
    with pytest.raises(UserError, match=message):
        start_accelerator("no")
