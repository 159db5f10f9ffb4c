"""What held-out rows are worth, against a plain forward pass of the model and rewards by hand."""

from types import SimpleNamespace

import pytest
import torch

from logratio.benchmarks.comparing.contestants import contestant
from logratio.benchmarks.comparing.rows import as_kind, write
from logratio.benchmarks.comparing.running import Budget, Job, own_examples, own_loss
from logratio.benchmarks.comparing.scores import Asked, Scorer
from logratio.losses import GRPOLoss
from logratio.trainers.errors import UserError
from logratio.trainers.rollout.engines.protocol import Sample
from logratio.trainers.setup import build

ROWS = [
    {"prompt": "7294=", "chosen": "ccee", "rejected": "a", "answer": "ccee"},
    {"prompt": "00=", "chosen": "ab", "rejected": "bbb", "answer": "aa"},
    {"prompt": "13=", "chosen": "aaaa", "rejected": "b", "answer": "b"},
]
SAID = [["ccee", "aecb", "bcee"], ["ab", "aa", "aa"], ["", "b", "b"]]
"""Two samples of each row, and a greedy one. Worth 1, 7/31, 0 (no 7 at b); 4/7, 1, 1; 0, 0, 0."""
BASKET = "logratio.trainers.data.tasks.shopping:cheap_basket"


def built(folder, *words, spec="sft", asked=None):
    """A run, its scorer, and the log-probs of texts by a plain pass of its model."""
    config = contestant(spec).config(["--lr_scheduler_type", "constant", "--batch_size", "2", *words])
    asked = asked or Asked((BASKET,), 2, 6)
    job = Job("it", config, 0, Budget("steps", 1), 1, asked, ROWS, ROWS, folder)
    write(job.data, as_kind(ROWS, config.loss.kind))
    run = build(job.resolved(), saves=False)

    def logp(prompt, text):
        ids = run.tokenizer(prompt)["input_ids"]
        whole = torch.tensor([[*ids, *run.tokenizer(text)["input_ids"], run.tokenizer.eos_token_id]])
        with torch.no_grad():
            logps = run.policy.causal_lm(input_ids=whole).logits[0].double().log_softmax(-1)
        return logps[:-1].gather(1, whole[0, 1:, None])[len(ids) - 1 :].sum().item()

    return run, Scorer(run, ROWS, asked), logp


def moved(run):
    with torch.no_grad():
        for p in run.policy.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())), alpha=0.05)


@pytest.mark.parametrize("words", [[], ["--lora_r", "2"]], ids=["whole", "adapters"])
def test_every_metric_by_hand(tmp_path, monkeypatch, words):
    run, scorer, logp = built(tmp_path, *words)
    texts = [(row["prompt"], text) for row, said in zip(ROWS, SAID, strict=True) for text in said[:2]]
    texts += [(row["prompt"], row[side]) for row in ROWS for side in ("chosen", "rejected")]
    before = {key: logp(*key) for key in texts}
    moved(run)
    now = {key: logp(*key) for key in texts}
    gained = {key: now[key] - before[key] for key in texts}

    def sample(requests, prompts):
        eos = run.tokenizer.eos_token_id
        assert all(len(r.seeds) == 3 and None not in r.seeds[:2] and r.seeds[2] is None for r in requests)
        ids = [[[*run.tokenizer(text)["input_ids"], eos] for text in said] for said in SAID]
        return [[Sample(one, "stop", [0.0] * len(one)) for one in said] for said in ids]

    monkeypatch.setattr(scorer.rollouts, "sample", sample)
    found = scorer()
    assert found["reward"] == pytest.approx([(1 + 7 / 31) / 2, (4 / 7 + 1) / 2, 0])
    assert found["greedy"] == pytest.approx([0, 1, 0])
    assert found["exact"] == [0.5, 0.5, 0.5] and found["length"] == [5, 3, 1.5]
    sampled = [[gained[row["prompt"], text] for text in said[:2]] for row, said in zip(ROWS, SAID, strict=True)]
    assert min(abs(sum(both)) for both in sampled) > 0.1, "it has moved"
    assert found["kl"] == pytest.approx([sum(both) / 2 for both in sampled], rel=1e-4)
    nll = [-now[row["prompt"], row["chosen"]] / (len(row["chosen"]) + 1) for row in ROWS]
    assert found["nll"] == pytest.approx(nll, rel=1e-5)
    gains = [[gained[row["prompt"], row[side]] for side in ("chosen", "rejected")] for row in ROWS]
    assert found["accuracy"] == [float(chosen > rejected) for chosen, rejected in gains]
    tokens = [len(row["chosen"]) + 1 for row in ROWS]
    mean = sum(-now[row["prompt"], row["chosen"]] for row in ROWS) / sum(tokens)
    assert own_loss(run, own_examples(run, ROWS)) == pytest.approx(mean, rel=1e-5)


def test_pairs_are_in_order_where_chosen_has_gained_more(monkeypatch):
    scorer = Scorer.__new__(Scorer)  # of no model
    scorer.before = [(-5.0, -9.0, 2)] * 3
    monkeypatch.setattr(scorer, "of_pairs", lambda logps: [(-4.0, -9.0, 2), (-4.0, -7.0, 2), (-4.0, -8.0, 2)])
    assert scorer.preferred() == {"accuracy": [1, 0, 0.5], "nll": [2, 2, 2]}


def test_held_out_rows_that_are_cut_away_are_said(tmp_path):
    message = r"^1 of 3 held-out rows have nothing scored within --max_length 5; make it larger$"
    with pytest.raises(UserError, match=message):
        built(tmp_path, "--max_length", "5")


def test_what_samples_has_no_loss_of_its_own():
    run = SimpleNamespace(config=SimpleNamespace(loss=GRPOLoss()))
    assert own_examples(run, ROWS) is None
