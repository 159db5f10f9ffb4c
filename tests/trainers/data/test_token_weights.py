"""Weights: a row's, a message's, what truncation leaves of them, and where packing puts them."""

import json
import re
from dataclasses import replace

import pytest
import torch

from logratio.losses import DPOLoss, Kind, TokenLogps
from logratio.trainers.batches.inputs import loss_inputs
from logratio.trainers.batches.packing import pack
from logratio.trainers.data.examples import Completion, Example, Rows, load_rows, prepare
from logratio.trainers.errors import UserError
from logratio.trainers.policy.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
EOS = TOKENIZER.eos_token_id


def prepared(rows, kind=Kind.SEQUENCE, tokenizer=TOKENIZER, **options):
    return prepare(Rows("data", rows), kind, tokenizer, **options)


def message(role, content, **more):
    return {"role": role, "content": content, **more}


def test_a_rows_weight_is_that_of_its_tokens():
    rows = [{"prompt": "a", "completion": "bc"}, {"prompt": "a", "completion": "bc", "weight": 0.5}]
    rows += [{"text": "ab", "weight": w} for w in (0, 1, None)]
    examples = [prepared([row])[0][0] for row in rows]
    weights = [e.completions[0].weights for e in examples]
    assert weights == [None, [0.5] * 3, [0.0] * 2, None, None]
    assert str(prepared(rows[:2])[1]) == "data: 2 examples; 1 of them with weights other than 1"


def test_weights_are_cut_with_the_ids():
    (example,), _ = prepared([{"prompt": "12", "completion": "abc", "weight": 2}], max_length=4)
    assert example == Example([ord("1"), ord("2")], [Completion([ord("a"), ord("b")], None, [2.0, 2.0])], row=0)


def text_of(example, keep):
    (c,) = example.completions
    return TOKENIZER.decode([t for t, w in zip(c.ids, c.weights, strict=True) if keep(w)])


@pytest.mark.parametrize("assistant_only_loss", [True, False])
def test_a_messages_weight_multiplies_its_own_turn(assistant_only_loss):
    messages = [
        message("user", "ask"),
        message("assistant", "one", weight=0),
        message("user", "again"),
        message("assistant", "two"),
        message("user", "more"),
        message("assistant", "three", weight=3),
    ]
    rows = [{"messages": messages, "weight": 0.5}]
    (example,), _ = prepared(rows, assistant_only_loss=assistant_only_loss)
    (completion,) = example.completions
    assert len(completion.weights) == len(completion.ids)
    assert text_of(example, lambda w: w == 0) == "one<|im_end|>"
    assert text_of(example, lambda w: w == 1.5) == "three<|im_end|>"
    assert "two<|im_end|>" in text_of(example, lambda w: w == 0.5)
    plain = [{"messages": [{k: v for k, v in m.items() if k != "weight"} for m in messages]}]
    (same,), _ = prepared(plain, assistant_only_loss=assistant_only_loss)
    assert (same.prompt_ids, same.completions[0].ids) == (example.prompt_ids, completion.ids)
    assert (same.completions[0].scored, same.completions[0].weights) == (completion.scored, None)
    (cut,), _ = prepared(rows, assistant_only_loss=assistant_only_loss, max_length=70)
    n = len(cut.completions[0].ids)
    assert 0 < n < len(completion.ids) and cut.completions[0].weights == completion.weights[:n]


def test_a_completions_turn_has_its_weight_behind_a_prompt_with_one():
    prompt = [message("user", "a"), message("assistant", "b", weight=7), message("user", "c")]
    (example,), _ = prepared([{"prompt": prompt, "completion": [message("assistant", "d", weight=2)]}])
    assert text_of(example, lambda w: w == 2) == "d<|im_end|>"
    assert 7 not in example.completions[0].weights


@pytest.mark.parametrize("weight", [-1, -0.001, float("nan"), float("inf"), "1", True, [1]])
def test_a_bad_weight_names_its_row(weight):
    with pytest.raises(UserError, match=r"data, row 1 .counted from 0.: 'weight' must be a finite number, 0 or above"):
        prepared([{"text": "ab"}, {"text": "ab", "weight": weight}])
    messages = [message("user", "a"), message("assistant", "b", weight=weight)]
    with pytest.raises(UserError, match=r"row 0 .counted from 0., message 1: 'weight' must be a finite number"):
        prepared([{"messages": messages}])


def test_a_bad_weight_of_a_file_names_its_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": "ab", "weight": w}) for w in (1, -1)))
    with pytest.raises(UserError, match="rows.jsonl, line 2: 'weight' must be"):
        prepare(load_rows(str(path), Kind.SEQUENCE), Kind.SEQUENCE, TOKENIZER)


def test_what_cannot_be_weighed_is_refused():
    with pytest.raises(UserError, match="row 0 .*, message 0 has a 'weight', but its role is 'user'"):
        prepared([{"messages": [message("user", "a", weight=0), message("assistant", "b")]}])
    unmarked = tiny_tokenizer()
    unmarked.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    rows = [{"messages": [message("user", "a"), message("assistant", "b", weight=0)]}]
    with pytest.raises(UserError, match="the chat template does not mark the assistant's turns"):
        prepared(rows, tokenizer=unmarked)


def test_a_labeled_rows_weight_is_that_of_its_tokens():
    rows = [{"prompt": "a", "completion": "bc", "label": label, "weight": w} for label, w in ((True, 0.5), (False, 1))]
    examples, report = prepared(rows, Kind.LABELED)
    assert [e.completions[0].weights for e in examples] == [[0.5] * 3, None]
    assert str(report) == "data: 2 examples; 1 of them desirable; 1 of them with weights other than 1"
    halves, _ = prepared([{"prompt": "a", "chosen": "b", "rejected": "cd", "weight": 3}], Kind.LABELED)
    assert [e.completions[0].weights for e in halves] == [[3.0] * 2, [3.0] * 3]
    with pytest.raises(UserError, match="'weight' must be a finite number, 0 or above, got int -1"):
        prepared([rows[0] | {"weight": -1}], Kind.LABELED)


PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}


def test_a_pairs_margin_is_read_where_it_is_asked_for():
    rows = [PAIR | {"margin": m} for m in (0.5, -2, 0)]
    examples, _ = prepared(rows, Kind.PAIRED, margin=True)
    assert [e.margin for e in examples] == [0.5, -2.0, 0.0]
    assert examples[0].take([1, 0]).margin == 0.5


def test_a_margin_reaches_the_loss_beside_its_pair(pack_one):
    rows = [PAIR | {"margin": m} for m in (0.5, -2)]
    examples, _ = prepared(rows, Kind.PAIRED, margin=True)
    batch = pack_one([*examples, replace(examples[0], margin=None)])
    logps = TokenLogps(torch.zeros(batch.scored.shape))
    margin = loss_inputs(DPOLoss(loss_type="odpo"), batch, logps)["policy"].margin
    assert margin[:2].tolist() == [0.5, -2] and margin[2].isnan(), "none is no margin of 0"
    assert loss_inputs(DPOLoss(), batch, logps)["policy"].margin is None


@pytest.mark.parametrize("kind", [Kind.PAIRED, Kind.LABELED])
def test_a_margin_that_nothing_reads_is_refused(kind):
    message = (
        "data, row 1 (counted from 0) has a 'margin', which this method and loss_type do not read: remove the column, "
        "or use dpo with loss_type odpo"
    )
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        prepared([PAIR, PAIR | {"margin": 0}], kind)
    assert len(prepared([PAIR | {"margin": None}], kind)[0]) == (1 if kind is Kind.PAIRED else 2)


def test_a_margin_that_is_missed_is_named():
    message = (
        "data, row 1 (counted from 0) has no 'margin', by how much chosen is better, which this loss_type compares "
        "with: add the column, or use a loss_type without it, as sigmoid"
    )
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        prepared([PAIR | {"margin": 1}, PAIR], Kind.PAIRED, margin=True)
    for value in (float("nan"), float("inf"), 10**400, "1", True, [1]):
        with pytest.raises(UserError, match=r"row 0 \(counted from 0\): 'margin' must be a finite number, got "):
            prepared([PAIR | {"margin": value}], Kind.PAIRED, margin=True)


def test_other_kinds_ignore_the_column():
    (example,), _ = prepared([{"prompt": "a", "chosen": "b", "rejected": "c", "weight": -3}], Kind.PAIRED)
    assert [c.weights for c in example.completions] == [None, None]


WEIGHTED = [
    Example([5, 6], [Completion([7, 8, 9], [True, False, True], [0.5, 2.0, 3.0])], row=0),
    Example([5], [Completion([6, 7])], row=1),
    Example([1, 2], [Completion([3], weights=[0.0])], row=2),
]


@pytest.mark.parametrize("shared", [True, False])
def test_packed_weights_lie_where_their_tokens_are_scored(shared, pack_one):
    batches = [pack_one(WEIGHTED)] if shared else pack(WEIGHTED, 1000, shared=False)
    got = {}
    for batch in batches:
        if batch.weights is not None:
            assert batch.weights.shape == batch.scored.shape and batch.weights.dtype == torch.float32
            assert (batch.weights[~batch.scored] == 0).all()
        weights = batch.scored.float() if batch.weights is None else batch.weights
        for path, example in enumerate(batch.examples):
            got[example.row] = weights[path, : len(example.completions[0].ids)].tolist()
    assert got == {0: [0.5, 0.0, 3.0], 1: [1.0, 1.0], 2: [0.0]}


def test_a_batch_without_weights_or_without_scores_has_none(pack_one):
    assert pack_one(WEIGHTED[1:2]).weights is None
    assert pack_one(WEIGHTED).unscored().weights is None
    assert pack_one(WEIGHTED).to(torch.device("meta")).weights.device.type == "meta"


def test_the_prompts_path_weighs_one(pack_one):
    batch = pack_one(WEIGHTED, scores_prompt=True)
    # [5, 6] scores 6, and the unscored 8 of its completion
    assert batch.weights[len(batch.completions) :].tolist() == [[1.0, 1.0, 0.0], [0.0] * 3, [1.0, 0.0, 0.0]]
