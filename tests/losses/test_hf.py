"""Losses from logits and Hugging Face's labels, in its own Trainer too, which cuts a step as it likes."""

import math

import datasets
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainingArguments

from logratio.losses import CompletionLogps, DPOLoss, Mean, SFTLoss, hf_compute_loss, linear_logps
from logratio.trainers.policy.tiny import tiny_model

STATS = ("entropy", "log_z", "log_sum_p2", "is_top1")


def batch(dtype=torch.float64):
    """Three rows of 5 tokens of 7, the second with two of them scored, the third with none; where nothing is scored the
    logits are not even numbers."""
    g = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(3, 5, 4, generator=g, dtype=dtype), torch.randn(7, 4, generator=g, dtype=dtype)
    labels = torch.randint(7, (3, 5), generator=g)
    labels[1, [0, 1, 3]], labels[2] = -100, -100
    return hidden, weight, labels


def test_logits_and_hidden_states_say_the_same():
    hidden, weight, labels = batch()
    logits = hidden @ weight.T
    mask = labels[:, 1:] != -100
    unread = torch.ones(3, 5, dtype=torch.bool)
    unread[:, :-1] = ~mask
    logits = logits.masked_fill(unread[..., None], torch.nan).requires_grad_()
    got = CompletionLogps.from_logits(logits, labels, stats=STATS)
    want = linear_logps(hidden[:, :-1][mask], weight, labels[:, 1:][mask], stats=STATS)
    assert torch.equal(got.completion_mask, mask) and mask.sum() == 6
    for name, values in zip(("per_token_logps", *STATS), want[:5], strict=True):
        torch.testing.assert_close(getattr(got, name)[mask], values)
        assert not getattr(got, name)[~mask].any()
    assert not got.log_sum_p2.requires_grad and not got.is_top1.requires_grad
    (got.logps.sum() + got.entropy.sum() + got.log_z.sum()).backward()
    assert logits.grad.isfinite().all() and not logits.grad[unread].any() and logits.grad[~unread].any(-1).all()


def test_narrow_logits_are_widened_and_shapes_checked():
    logits = torch.randn(1, 3, 9).bfloat16()
    got = CompletionLogps.from_logits(logits, torch.tensor([[1, 2, 3]]))
    assert got.per_token_logps.dtype == torch.float32 and got.entropy is None
    with pytest.raises(ValueError, match=r"\[C, L, V\] and labels \[C, L\], got \[1, 3, 9\] and \[1, 2\]"):
        CompletionLogps.from_logits(logits, torch.tensor([[1, 2]]))


def test_the_value_of_a_mean():
    assert Mean.of(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([True, False, True])).value == 3.5
    assert math.isnan(Mean.of(torch.zeros(0)).value)


def test_a_batch_by_itself_is_cross_entropy():
    hidden, weight, labels = batch()
    logits = hidden @ weight.T
    got = hf_compute_loss(SFTLoss())({"logits": logits}, labels)
    want = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(hf_compute_loss(SFTLoss())({"logits": logits}, labels, torch.tensor(12)), want * 6 / 12)


def test_losses_that_need_more_are_refused():
    for loss in (DPOLoss(), SFTLoss(loss_type="gkd"), SFTLoss(loss_type="asft")):
        with pytest.raises(ValueError, match=f"^{type(loss).__name__} needs more than logits and labels; hf_compute_"):
            hf_compute_loss(loss)


@pytest.mark.parametrize("loss", [SFTLoss(), SFTLoss(loss_type="dft", z_loss_coef=1e-3)], ids=["nll", "dft"])
def test_their_trainer_comes_to_the_same_however_it_cuts_a_step(loss, tmp_path):
    """Rows of 3 to 12 tokens: a mean within each micro-batch would not."""
    lengths = [3, 12, 4, 11, 5, 9, 3, 12]
    rows = [{"input_ids": list(range(2, n + 2)), "labels": [-100, *range(3, n + 2)]} for n in lengths]

    def collate(rows):
        longest = max(len(row["input_ids"]) for row in rows)
        pad = {"input_ids": 0, "labels": -100}
        padded = {k: [row[k] + [v] * (longest - len(row[k])) for row in rows] for k, v in pad.items()}
        return {name: torch.tensor(values) for name, values in padded.items()}

    weights = []
    for size, accumulated in ((8, 1), (2, 4)):
        model = tiny_model(1)
        args = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulated,
            max_steps=3,
            learning_rate=0.1,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            optim="sgd",
        )
        data = datasets.Dataset.from_list(rows)
        func = hf_compute_loss(loss)
        Trainer(model, args, train_dataset=data, data_collator=collate, compute_loss_func=func).train()
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    start = torch.cat([p.detach().flatten() for p in tiny_model(1).parameters()])
    moved = (weights[0] - start).abs().max()
    assert moved > 1e-5 and (weights[0] - weights[1]).abs().max() < 2e-3 * moved
