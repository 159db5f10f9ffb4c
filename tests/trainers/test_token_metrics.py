"""`entropy` and `mean_token_accuracy` are the installed TRL's, for the methods that have them there."""

import copy

import pytest
import torch
from transformers import LlamaConfig

from logratio.benchmarks.peers.randoms import random_model, random_rows
from logratio.losses import LOSSES
from logratio.reference import trl
from logratio.trainers.data.examples import prepare
from logratio.trainers.data.rows import Rows
from logratio.trainers.options import parse_train
from logratio.trainers.policy.policy import Policy
from logratio.trainers.policy.reference import AdapterReference
from logratio.trainers.policy.tiny import tiny_tokenizer
from logratio.trainers.setup import make_policy, start_accelerator
from logratio.trainers.step import Step

BOTH = {"entropy", "mean_token_accuracy"}
HAS = {"sft": BOTH, "dpo": BOTH, "tpo": BOTH, "kto": {"entropy"}, "orpo": set(), "cpo": set()}


@pytest.fixture(scope="module")
def model():
    """One that often expects an "a"."""
    model = random_model(LlamaConfig, 0)
    with torch.no_grad():
        model.get_base_model().lm_head.weight[ord("a")] *= 4
    return model


def rows_of(method: str) -> list[dict]:
    """Half of the letters of what is scored are an "a"."""
    rows = random_rows(method, 0, longest=12)
    parts = {"chosen", "rejected", "completion", "reference"} & rows[0].keys()
    letters = str.maketrans({c: "a" for c in "bdfhjlnprtvxzBDFHJLNPRTVXZ02468"})
    return [row | {part: row[part].translate(letters) for part in parts} for row in rows]


@pytest.mark.parametrize("method", HAS)
def test_they_are_trls(method, model):
    loss, rows, tokenizer = LOSSES[method](), rows_of(method), tiny_tokenizer()
    theirs = trl.loss_and_grads(method, model, tokenizer, rows, max_length=1024).metrics
    policy = Policy(copy.deepcopy(model), shared=True, stats=(*loss.stats, *loss.metric_stats))
    reference = AdapterReference(policy) if loss.wants_reference else None
    step = Step(start_accelerator("no"), policy, loss, reference, micro_batch_tokens=60, max_length=1024)
    examples, _ = prepare(Rows("rows", rows), loss.kind, tokenizer, max_length=1024, gold=loss.scores_gold)
    micros = step.micro_batches(examples)
    assert len(micros) > 1
    ours = step(micros, step.totals(examples, micros)).reduced(step.accelerator)
    assert BOTH & ours.keys() == BOTH & theirs.keys() == HAS[method]
    for name in HAS[method]:
        assert ours[name] == pytest.approx(theirs[name], rel=1e-5)
        assert name == "entropy" or 0 < ours[name] < 0.9


def test_training_asks_for_them_and_the_loss_alone_does_not(tmp_path):
    options = f"sft --z_loss_coef 1e-4 --learning_rate 1e-3 --output_dir {tmp_path}/out"
    run = parse_train(options.split())
    policy, _ = make_policy(run, torch.device("cpu"))
    assert set(policy.stats) == {"log_z", "entropy", "is_top1"} and run.loss.stats == ("log_z",)
