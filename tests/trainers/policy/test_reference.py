"""Stored reference log-probs are the live ones, and are refused for anything else than what they were computed for."""

import copy
import json
import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError

from logratio.trainers.batches.packing import pack
from logratio.trainers.data.examples import Completion, Example
from logratio.trainers.errors import UserError
from logratio.trainers.options import parse_train
from logratio.trainers.policy import reference
from logratio.trainers.policy.policy import REFERENCE_ADAPTER, Policy
from logratio.trainers.policy.reference import (
    AdapterReference,
    ModelReference,
    StoredReference,
    fingerprint,
    inference,
    load_table,
    precompute,
    save_table,
    tokens_key,
)
from logratio.trainers.setup import build

CPU = torch.device("cpu")
# Three pairs, one with unscored tokens, and the first prompt again with its completions the other way around.
EXAMPLES = [
    Example([5, 6, 7], [Completion([8, 9]), Completion([10, 11, 12])], row=0),
    Example([5, 6], [Completion([7, 8, 9, 10], [False, True, False, True]), Completion([3])], row=1),
    Example([20], [Completion([21]), Completion([22, 23])], row=2),
    Example([5, 6, 7], [Completion([10, 11, 12]), Completion([8, 9])], row=0),
]


class Counted:
    """A reference that remembers its calls."""

    def __init__(self, live):
        self.live, self.calls = live, 0

    def __call__(self, batch):
        self.calls += 1
        return self.live(batch)


def with_lora(model, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LoraConfig(
            r=2, lora_dropout=0.5, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"
        )
        return get_peft_model(copy.deepcopy(model), config)


@pytest.fixture
def policy(random_model):
    return Policy(with_lora(random_model("llama")), shared=True).train()


def test_stored_log_probs_are_the_live_ones(policy, tmp_path):
    live = Counted(AdapterReference(policy))
    key = fingerprint(policy, EXAMPLES, 1.0)
    save_table(tmp_path / "table.safetensors", precompute(live, EXAMPLES, 12, CPU, shared=True), key)
    assert live.calls > 1
    live.calls = 0
    stored = StoredReference(load_table(tmp_path / "table.safetensors", key), live)
    for order, budget in ((EXAMPLES, 1000), (EXAMPLES[::-1], 14), (EXAMPLES[1:3], 1000)):
        for batch in pack(order, budget, shared=True):
            wanted = live.live(batch)
            torch.testing.assert_close(stored(batch), wanted, rtol=1e-6, atol=1e-6)
            assert (stored(batch)[~batch.scored] == 0).all()
    assert live.calls == 0


def test_what_is_not_stored_is_computed(policy, pack_one):
    """Mismatched completions and held-out rows go to the live reference, whatever their row's number is."""
    live = Counted(AdapterReference(policy))
    stored = StoredReference(precompute(live, EXAMPLES, 1000, CPU, shared=True), live)
    live.calls = 0
    batch = pack_one([EXAMPLES[2], Example([20], [Completion([22]), Completion([22, 23])], row=0)])
    assert torch.equal(stored(batch), live.live(batch)) and live.calls == 1


def test_examples_of_one_row_are_told_apart():
    """Pairs become two examples of one row in KTO; the same tokens, scored otherwise, are another example too."""
    chosen, rejected = (Example([5], [Completion([k])], label=k == 6, row=0) for k in (6, 7))
    masked = Example([5], [Completion([6, 7], [True, False])], row=0)
    unmasked = Example([5], [Completion([6, 7])], row=0)
    assert len({tokens_key(e) for e in (chosen, rejected, masked, unmasked)}) == 4
    assert tokens_key(Example([5], [Completion([6])], row=9)) == tokens_key(chosen)


def test_the_cache_is_refused_for_other_weights_tokens_or_temperature(policy, tmp_path):
    path = tmp_path / "ref_log_probs.safetensors"
    key = fingerprint(policy, EXAMPLES, 1.0)
    table = precompute(AdapterReference(policy), EXAMPLES, 1000, CPU, shared=True)
    save_table(path, table, key)
    assert load_table(path, key).keys() == table.keys()
    others = {
        "tokens": fingerprint(policy, EXAMPLES[:3], 1.0),
        "temperature": fingerprint(policy, EXAMPLES, 0.9),
        "tokens and temperature": fingerprint(policy, EXAMPLES[:3], 0.9),
    }
    with torch.no_grad():
        policy.causal_lm.get_input_embeddings().weight[0, 0] += 1e-3
    others["weights"] = fingerprint(policy, EXAMPLES, 1.0)
    for what, other in others.items():
        message = (
            f"{path} holds reference log-probs for other {what} than this run's; "
            "delete it or choose another --output_dir"
        )
        with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
            load_table(path, other)


def test_a_table_that_the_disk_does_not_take_is_told_and_not_left_half_written(policy, tmp_path, monkeypatch):
    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(reference, "save_file", full)
    with pytest.raises(UserError, match="table.safetensors could not be written: .*No space left .*; make room, or"):
        save_table(tmp_path / "table.safetensors", {}, {})
    assert not list(tmp_path.iterdir())


def test_trained_adapters_do_not_change_the_fingerprint_but_the_frozen_one_does(policy, tmp_path):
    def of_reference():
        return fingerprint(policy, EXAMPLES, 1.0)["weights"]

    def change(word):
        with torch.no_grad():
            for name, p in policy.named_parameters():
                if f".{word}." in name:
                    p.add_(0.1)

    alone = of_reference()
    change("default")
    assert of_reference() == alone
    policy.model.save_pretrained(tmp_path)
    policy.model.load_adapter(tmp_path, adapter_name=REFERENCE_ADAPTER, is_trainable=False)
    policy.model.set_adapter("default")
    with_copy = of_reference()
    assert with_copy != alone
    change("default")
    assert of_reference() == with_copy
    change(REFERENCE_ADAPTER)
    assert of_reference() != with_copy


def test_references_use_no_dropout_and_leave_the_policy_training(policy, random_model, pack_one):
    batch = pack_one(EXAMPLES)
    wanted = Policy(random_model("llama"), shared=True)(batch)[0].detach()
    before = {name: p.requires_grad for name, p in policy.named_parameters()}
    got = AdapterReference(policy)(batch)
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)
    assert not got.requires_grad and policy.training
    assert {name: p.requires_grad for name, p in policy.named_parameters()} == before
    assert not torch.equal(policy(batch).logps, policy(batch).logps), "dropout is on, so the test above means something"
    with inference(policy):
        assert torch.equal(policy(batch).logps, policy(batch).logps)


def test_another_model_is_frozen(random_model, pack_one):
    model = random_model("llama", seed=1)
    reference = ModelReference(Policy(model, shared=True))
    batch = pack_one(EXAMPLES)
    got = reference(batch)
    wanted = Policy(random_model("llama", seed=1), shared=True)(batch)[0].detach()
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)
    assert not got.requires_grad and not model.training and not any(p.requires_grad for p in model.parameters())


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"{i}+1=", "chosen": str(i + 1), "rejected": str(i + 20)} for i in range(4)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def run_of(method, pairs, tmp_path, *options):
    words = [method, "--dataset_name", str(pairs), "--output_dir", str(tmp_path / "run"), *options]
    return build(parse_train(words))


def test_full_fine_tuning_compares_with_the_starting_weights(pairs, tmp_path, pack_one):
    run = run_of("dpo", pairs, tmp_path)
    batch = pack_one(run.data.train)
    start = run.policy(batch).logps.detach()
    assert isinstance(run.step.reference, ModelReference)
    torch.testing.assert_close(run.step.reference(batch), start, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        for p in run.policy.parameters():
            p.mul_(0.5)
    torch.testing.assert_close(run.step.reference(batch), start, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(run.policy(batch).logps, start, atol=1e-2)


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_a_run_computes_the_table_once_and_reads_it_again(pairs, tmp_path, method):
    """KTO makes two examples of a pair's row; both are in the table."""
    options = ("--lora_r", "2", "--precompute_ref_log_probs", "--batch_size", "4")
    run = run_of(method, pairs, tmp_path, *options)
    path = tmp_path / "run" / "ref_log_probs.safetensors"
    count = 4 if method == "dpo" else 8
    assert f"reference log-probs of {count} examples written to {path}" in run.notes
    again = run_of(method, pairs, tmp_path, *options)
    assert f"reference log-probs read from {path}" in again.notes
    for batch in pack(again.data.train, 30, shared=True):
        live = AdapterReference(again.policy)(batch)
        torch.testing.assert_close(again.step.reference(batch), live, rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="holds reference log-probs for other tokens than this run's"):
        run_of(method, pairs, tmp_path, *options, "--max_length", "5")


def test_an_adapter_that_training_starts_from_is_its_reference(pairs, tmp_path, pack_one):
    """At the first step policy and reference are the same, so every reward is 0."""
    started = run_of("sft", write_texts(tmp_path), tmp_path, "--lora_r", "2")
    with torch.no_grad():
        for p in started.policy.parameters():
            if p.requires_grad:
                p.add_(0.05)
    started.policy.model.save_pretrained(tmp_path / "adapter")
    run = run_of("dpo", pairs, tmp_path, "--adapter_name_or_path", str(tmp_path / "adapter"))
    examples = run.data.train
    micros = run.step.micro_batches(examples)
    metrics = run.step(micros, run.step.totals(examples, micros)).reduced(run.accelerator)
    assert metrics["rewards/chosen"] == metrics["rewards/rejected"] == metrics["rewards/margins"] == 0
    batch = pack_one(examples)
    base = copy.deepcopy(run.policy)
    with base.model.disable_adapter():
        assert not torch.allclose(run.step.reference(batch), base(batch)[0], atol=1e-2)


def write_texts(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"text number {i}"}) for i in range(4)))
    return path


def test_a_filler_of_stored_examples_needs_no_pass_and_of_others_takes_part(policy):
    """As the processes whose micro-batches it stands beside: they read the table, or compute."""
    live = Counted(AdapterReference(policy))
    batch = pack(EXAMPLES, 1000)[0]
    table = {tokens_key(e): [torch.ones(sum(c.scored or [True] * len(c.ids))) for c in e.completions] for e in EXAMPLES}
    filler = batch.unscored()
    out = StoredReference(table, live)(filler)
    assert live.calls == 0 and out.shape == filler.scored.shape and not out.any()
    assert StoredReference({}, live)(filler).shape == filler.scored.shape and live.calls == 1


def test_a_reference_model_computes_in_mixed_precision_as_the_policy_does(random_model):
    """Else a run would not begin at log-ratios of 0."""
    policy = Policy(random_model("llama"), shared=True).eval()
    batch = pack(EXAMPLES, 1000)[0]
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        mine = policy(batch).logps
    assert torch.equal(ModelReference(policy, torch.bfloat16)(batch), mine)
    assert not torch.equal(ModelReference(policy)(batch), mine)


def test_a_data_set_is_packed_in_parts(monkeypatch, policy):
    live = AdapterReference(policy)
    whole = precompute(live, EXAMPLES, 1000, CPU, shared=True)
    monkeypatch.setattr(reference, "PACKED_TOGETHER", 1)
    parts = precompute(counted := Counted(live), EXAMPLES, 1000, CPU, shared=True)
    assert counted.calls == len(EXAMPLES) and parts.keys() == whole.keys()
    for key, values in whole.items():
        torch.testing.assert_close(parts[key], values)


def test_a_run_in_mixed_precision_begins_at_its_reference(pairs, tmp_path):
    """Whole fine-tuning, whose reference is another model: the margin of the first step is rounding alone."""
    run = run_of("dpo", pairs, tmp_path, "--mixed_precision", "bf16")
    examples = run.data.train[:2]
    micros = run.step.micro_batches(examples)
    metrics = run.step(micros, run.step.totals(examples, micros), backward=False).reduced(run.accelerator)
    assert metrics["rewards/margins"] == 0
