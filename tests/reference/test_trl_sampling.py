"""TRL's correction for what vLLM sampled, run by its own trainer: its metrics are ours, and where it differs."""

from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig

from logratio.benchmarks.peers.case import trl_correction
from logratio.benchmarks.peers.truths import Subject, subject_of
from logratio.losses import CompletionLogps, GRPOLoss, LossOutput, Totals
from logratio.losses.grpo_sampling import correct
from logratio.reference import oracle, trl
from logratio.trainers.policy.tiny import tiny_tokenizer

MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


@pytest.fixture(scope="module")
def subject() -> Subject:
    return subject_of(LlamaConfig, 0)


def theirs(subject: Subject, rows: list[dict[str, Any]], **options: Any) -> trl.Result:
    return trl.loss_and_grads("grpo", subject.models[torch.float32], tiny_tokenizer(), rows, scaled=False, **options)


def ours(subject: Subject, rows: list[dict[str, Any]], loss: GRPOLoss) -> tuple[LossOutput, torch.Tensor | None]:
    """And the weights."""
    model = subject.models[torch.float32]
    with torch.no_grad():
        policy = [oracle.sequence_logps(model, row["prompt_ids"], row["completion_ids"]).completion for row in rows]
    mask = pad_sequence([torch.ones(len(x), dtype=torch.bool) for x in policy], True)
    old, behavior = (
        [torch.as_tensor(row[name]) for row in rows] for name in ("old_per_token_logps", "sampling_per_token_logps")
    )
    parts = [CompletionLogps(pad_sequence(x, True), mask) for x in (policy, old, behavior)]
    advantages = torch.tensor([row["advantage"] for row in rows])
    out = loss(parts[0], advantages=advantages, old=parts[1], behavior=parts[2], totals=Totals.of(parts[0]))
    weight = correct(loss, *parts, advantages[:, None])[0]
    return out, weight if weight is None or weight.shape != mask.shape else weight[mask]


@pytest.mark.parametrize("mode", MODES)
def test_what_it_logs_is_what_we_log(subject, mode):
    """Its ratios are behind the bounds, which some of them are outside of: our weights."""
    rows = subject.rollout_rows(sampled=True)
    bounds = {"sampling_clip_min": 0.8, "sampling_clip_max": 1.2}
    result = theirs(subject, rows, **trl_correction(mode, **bounds))
    out, weights = ours(subject, rows, GRPOLoss(sampling_correction=mode, **bounds))
    assert weights is not None
    for name, mine in (
        ("sampling_logp_difference/mean", out.metrics["sampling/logp_diff_mean"].value),
        ("sampling_logp_difference/max", out.metrics["sampling/logp_diff_max"].value),
        ("importance_sampling_ratio/mean", weights.mean().item()),
        ("importance_sampling_ratio/min", weights.min().item()),
        ("importance_sampling_ratio/max", weights.max().item()),
    ):
        assert result.metrics[f"sampling/{name}"] == pytest.approx(mine, rel=1e-5), name
    shares = [m.value for name, m in out.metrics.items() if name in ("sampling/masked_mean", "sampling/truncated_mean")]
    assert len(shares) == 1 and 0 < shares[0] < 1
    assert result.loss == pytest.approx(out.loss.item(), rel=1e-4)


def test_its_default_is_a_mask_of_sequences_at_3(subject):
    rows = subject.rollout_rows(sampled=True)
    for row in rows[::2]:  # far from what was trained
        row["sampling_per_token_logps"] = row["sampling_per_token_logps"] - 1.2
    loss = theirs(subject, rows).loss
    assert loss == pytest.approx(theirs(subject, rows, **trl_correction("sequence_mask")).loss, rel=1e-6)
    mine = ours(subject, rows, GRPOLoss(sampling_correction="sequence_mask"))[0]
    assert loss == pytest.approx(mine.loss.item(), rel=1e-4)
    assert abs(loss - theirs(subject, rows, **trl_correction()).loss) > 1e-3
    assert "sampling/sampling_logp_difference/mean" not in theirs(subject, subject.rollout_rows()).metrics


def test_it_takes_an_unknown_log_prob_for_the_policys(subject):
    """Where ours is not a number: difference (8) of losses/grpo.py."""
    rows = subject.rollout_rows(sampled=True)
    unknown = rows[0]["sampling_per_token_logps"].clone()
    known = unknown.clone()
    unknown[0], known[0] = torch.nan, rows[0]["old_per_token_logps"][0]
    with_nan, without = ([dict(rows[0], sampling_per_token_logps=x), *rows[1:]] for x in (unknown, known))
    options = trl_correction("token_truncate")
    assert theirs(subject, with_nan, **options).loss == theirs(subject, without, **options).loss
    assert ours(subject, with_nan, GRPOLoss(sampling_correction="token_truncate"))[0].loss.isnan()


def test_in_micro_batches_it_corrects_each_alike(subject):
    rows = subject.rollout_rows(sampled=True)
    options = trl_correction("token_mask", sampling_clip_max=1.2)
    whole = theirs(subject, rows, **options)
    loss, grads = trl.micro_batched(
        "grpo", subject.models[torch.float32], tiny_tokenizer(), rows, 2, **options | {"loss_type": "dapo"}
    )
    assert loss == pytest.approx(whole.loss, rel=1e-5)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, whole.grads[name], rtol=1e-3, atol=1e-6)


def test_rows_that_do_not_fit_are_refused(subject):
    message = "must have one number a completion token, in every row or in none$"
    rows = subject.rollout_rows(sampled=True)
    short = [rows[0], dict(rows[1], sampling_per_token_logps=rows[1]["sampling_per_token_logps"][:-1]), *rows[2:]]
    none = [*rows[:2], dict(rows[2], sampling_per_token_logps=None), *rows[3:]]
    for given, row in ((short, 1), (none, 2)):
        with pytest.raises(ValueError, match=f"^row {row}: sampling_per_token_logps {message}"):
            theirs(subject, given)
