"""What a loss asks of the reference beside log-probs (`Loss.ref_stats`) comes with them, live or stored."""

import json

import pytest
import torch

from logratio.losses import DPOLoss
from logratio.trainers.batches.inputs import loss_inputs
from logratio.trainers.batches.packing import pack
from logratio.trainers.batches.values import repacked
from logratio.trainers.data.examples import Completion, Example
from logratio.trainers.errors import UserError
from logratio.trainers.options import parse_train
from logratio.trainers.policy.policy import Policy
from logratio.trainers.policy.reference import AdapterReference, ModelReference, load_table, save_table
from logratio.trainers.setup import Run, build

EXAMPLES = [
    Example([5, 6, 7], [Completion([8, 9]), Completion([10, 11, 12])], row=0),
    Example([5, 6], [Completion([7, 8, 9, 10], [False, True, False, True]), Completion([3])], row=1),
]
LOSS = DPOLoss(loss_type="mallows")


@pytest.fixture
def run_of(tmp_path):
    rows = [{"prompt": f"{i}+1=", "chosen": str(i + 1), "rejected": str(i + 20)} for i in range(3)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))

    def make(loss_type: str, *options: str) -> Run:
        words = ["dpo", "--dataset_name", str(path), "--output_dir", str(tmp_path / "run"), "--loss_type", loss_type]
        return build(parse_train([*words, *options]))

    return make


def step_of(run: Run, tokens: int) -> float:
    run.step.micro_batch_tokens = tokens
    micros = run.step.micro_batches(run.data.train)
    result = run.step(micros, run.step.totals(run.data.train, micros), backward=False)
    return result.reduced(run.accelerator)["loss"]


def test_a_run_gives_its_loss_the_entropy_of_its_reference(run_of):
    """Of adapters that are off, and of a model apart; the policy moved, so that its own would be another."""
    for options, kind in ((("--lora_r", "2"), AdapterReference), ((), ModelReference)):
        run = run_of("mallows", *options)
        batch = pack(run.data.train, 1000, shared=run.policy.shared)[0]
        assert isinstance(run.step.reference, kind)
        start = run.policy(batch)  # LoRA begins at its reference too
        with torch.no_grad():
            for p in run.policy.parameters():
                if p.requires_grad:
                    p.add_(0.05)
        out = run.policy(batch)
        given = loss_inputs(run.config.loss, batch, out, run.step.reference(batch))["ref"]
        for side, rows in ((given.chosen, slice(0, None, 2)), (given.rejected, slice(1, None, 2))):
            torch.testing.assert_close(side.entropy, start.entropy[rows].detach(), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(side.per_token_logps, start.logps[rows].detach(), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(out.entropy, start.entropy, atol=1e-2)


def test_it_is_stored_with_the_log_probs_and_changes_no_loss(run_of):
    options = ("--lora_r", "2", "--precompute_ref_log_probs", "--mallows_max_entropy", "4")
    live = run_of("mallows", *options[:2], *options[3:])
    stored, again = run_of("mallows", *options), run_of("mallows", *options)
    assert any("read from" in note for note in again.notes)
    losses = [step_of(run, tokens) for run in (live, stored, again) for tokens in (1000, 20)]
    assert losses == pytest.approx([losses[0]] * 6, rel=1e-5)
    with pytest.raises(UserError, match="holds reference log-probs for other stats than this run's; delete it"):
        run_of("sigmoid", *options[:3])


def test_it_is_kept_where_micro_batches_are_packed_anew(random_model):
    """A filler, whose completions are not in the table, is as wide."""
    policy = Policy(random_model("llama"), stats=LOSS.ref_stats)
    reference = ModelReference(policy)
    whole = pack(EXAMPLES, 1000)
    parts = pack(EXAMPLES, 1)
    assert len(whole) < len(parts) == 2
    filler = pack([Example([5], [Completion([6]), Completion([7])])], 1000)[0].unscored()
    *got, empty = repacked([(batch, reference(batch)) for batch in whole], [*parts, filler])
    for batch, values in zip(parts, got, strict=True):
        torch.testing.assert_close(values, reference(batch), rtol=1e-5, atol=1e-6)
    assert empty.shape == (*filler.scored.shape, 2) and not empty.any()


def test_a_table_that_does_not_speak_of_stats_has_none(tmp_path):
    path, table = tmp_path / "table.safetensors", {"example": [torch.ones(2)]}
    save_table(path, table, {"weights": "w"})
    assert load_table(path, {"weights": "w", "stats": ""}).keys() == table.keys()
    with pytest.raises(UserError, match="for other stats than"):
        load_table(path, {"weights": "w", "stats": "entropy"})
