"""A teacher's distributions at every place of given rows, `--loss_type gkd`, and those of the start, `asft`."""

import copy
import json
import re
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Qwen2Config

from logratio.benchmarks.peers.randoms import random_model
from logratio.benchmarks.peers.truths import exact
from logratio.losses import SFTLoss
from logratio.reference import oracle
from logratio.trainers.batches.packing import pack
from logratio.trainers.data.examples import Completion, Example
from logratio.trainers.errors import UserError
from logratio.trainers.options import parse_train
from logratio.trainers.policy.policy import Policy
from logratio.trainers.policy.reference import AdapterReference, ModelReference
from logratio.trainers.policy.teacher import distributions
from logratio.trainers.policy.tiny import tiny_model, tiny_tokenizer
from logratio.trainers.setup import build, start_accelerator
from logratio.trainers.step import Step

EXAMPLES = [
    Example([5, 6, 7], [Completion([8, 9, 10, 11])], row=0),
    Example([5, 6], [Completion([7, 8, 9, 10], [False, True, False, True])], row=1),
    Example([20], [Completion([21])], row=2),
]


def student_and_teacher(rows: int | None = None):
    """In float64; rows: of the student's vocabulary, if not as many as the teacher has."""
    student, teacher = exact(random_model(LlamaConfig, 0)), exact(random_model(Qwen2Config, 1).unload())
    if rows is not None:
        student.get_base_model().resize_token_embeddings(rows)
        for name, p in student.named_parameters():
            p.requires_grad_("lora" in name)
    return student, teacher


def stepped(student, teacher, loss, micro_batch_tokens=1000, **more):
    """(the loss, the gradient of every trained parameter) of a step on all examples."""
    policy = Policy(copy.deepcopy(student), stats=loss.stats)
    step = Step(
        start_accelerator("no"),
        policy,
        loss,
        None,
        micro_batch_tokens=micro_batch_tokens,
        max_length=64,
        teacher=ModelReference(Policy(teacher)),
    )
    micros = step.micro_batches(EXAMPLES)
    result = step(micros, step.totals(EXAMPLES, micros), **more)
    grads = {name: p.grad for name, p in policy.model.named_parameters() if p.grad is not None}
    return result, grads, len(micros)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_a_step_is_trls(beta):
    """GKDTrainer.compute_loss on the padded batch, which is what it does at lmbda=0; also cut into micro-batches."""
    from trl.experimental.gkd import GKDTrainer

    student, teacher = student_and_teacher()
    theirs, width = copy.deepcopy(student), 7
    inputs = {name: torch.zeros(3, width, dtype=torch.int64) for name in ("input_ids", "attention_mask", "labels")}
    inputs["labels"] -= 100
    for i, example in enumerate(EXAMPLES):
        completion = example.completions[0]
        ids, first = [*example.prompt_ids, *completion.ids], len(example.prompt_ids)
        inputs["input_ids"][i, : len(ids)] = torch.tensor(ids)
        inputs["attention_mask"][i, : len(ids)] = 1
        for t, (token, scored) in enumerate(zip(completion.ids, completion.scored or [True] * 9, strict=False)):
            inputs["labels"][i, first + t] = token if scored else -100
    trainer = SimpleNamespace(teacher_model=teacher, beta=beta, generalized_jsd_loss=GKDTrainer.generalized_jsd_loss)
    value = GKDTrainer.compute_loss(trainer, theirs, inputs, num_items_in_batch=7)
    value.backward()
    for tokens in (1000, 8):
        ours, grads, micros = stepped(student, teacher, SFTLoss(loss_type="gkd", gkd_beta=beta), tokens)
        assert (micros > 1) == (tokens == 8)
        assert ours.loss.item() == pytest.approx(value.item(), rel=1e-9)
        for name, p in theirs.named_parameters():
            if p.requires_grad:
                torch.testing.assert_close(grads[name], p.grad, rtol=1e-6, atol=1e-10)


def test_more_rows_of_one_of_them_are_left_out():
    """What a model has beyond the words of the other is padding, and no word: both are compared without it."""
    student, teacher = student_and_teacher(rows=270)
    words = teacher.get_output_embeddings().weight.shape[0]
    assert words < 270
    loss = SFTLoss(loss_type="gkd", gkd_temperature=0.7)
    result, grads, _ = stepped(student, teacher, loss)
    with torch.no_grad():
        total = 0.0
        for e in EXAMPLES:
            ids, first = torch.tensor([[*e.prompt_ids, *e.completions[0].ids]]), len(e.prompt_ids) - 1
            rows = [model(ids).logits[0, first:-1, :words] for model in (teacher, student)]
            scored = torch.tensor(e.completions[0].scored or [True] * len(e.completions[0].ids))
            total += oracle.generalized_jsd(*rows, beta=0.5, temperature=0.7)[scored].sum()
    assert result.loss.item() == pytest.approx(total.item() / 7, rel=1e-9)
    assert any(g.any() for g in grads.values())
    larger, _, _ = stepped(teacher, student.unload(), loss, backward=False)  # the teacher's is the larger one
    other, _, _ = stepped(student, teacher, loss, backward=False)
    assert larger.loss.item() == pytest.approx(other.loss.item()), "JSD(1/2) does not ask who is the teacher"


def test_metrics_are_of_the_whole_vocabulary_at_temperature_1():
    student, teacher = student_and_teacher()
    policy = Policy(student, stats=("entropy", "is_top1"))
    batch = pack(EXAMPLES, 1000)[0]
    taught = distributions(ModelReference(Policy(teacher)), SFTLoss(loss_type="gkd", gkd_temperature=3.0), batch)
    out, plain = policy(batch, **taught), policy(batch)
    for name in ("logps", "entropy", "is_top1"):
        assert torch.equal(getattr(out, name), getattr(plain, name)) and not getattr(out, name).requires_grad
    assert out.divergence.requires_grad and plain.divergence is None


HEADS = {"phi": {}, "cohere": {"logit_scale": 0.3}, "gemma2": {"final_logit_softcapping": 2.0, "head_dim": 8}}
"""A bias, a scale, a soft-cap."""


@pytest.mark.parametrize("kind", HEADS)
def test_each_model_has_the_head_of_its_architecture(kind):
    """In both parts, beside a plain one that knows fewer words than it."""
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    size |= {"num_key_value_heads": 2, "pad_token_id": 0, "attn_implementation": "eager"}
    own, plain = (
        AutoModelForCausalLM.from_config(AutoConfig.for_model(name, vocab_size=words, **size, **more)).eval()
        for name, words, more in ((kind, 50, HEADS[kind]), ("llama", 40, {}))
    )
    for model in (own, plain):
        torch.nn.init.normal_(model.get_output_embeddings().weight)
    if kind == "phi":
        torch.nn.init.normal_(own.lm_head.bias)
    batch, ids = pack(EXAMPLES[:1], 1000)[0], torch.tensor([[5, 6, 7, 8, 9, 10, 11]])
    for student, teacher in ((own, plain), (plain, own)):
        loss = SFTLoss(loss_type="gkd", gkd_temperature=0.7)
        out = Policy(student)(batch, **distributions(ModelReference(Policy(teacher)), loss, batch))
        rows = [model(ids).logits[0, 2:-1, :40] for model in (teacher, student)]
        expected = oracle.generalized_jsd(*rows, beta=0.5, temperature=0.7)
        torch.testing.assert_close(out.divergence[0].double(), expected, rtol=1e-4, atol=1e-5)


@pytest.fixture
def run_of(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{i}+1=", "completion": str(i + 1)} for i in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    torch.manual_seed(0)
    model = tiny_model()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * p.std() * torch.randn_like(p) if p.ndim > 1 else 0
    model.save_pretrained("teacher")
    tiny_tokenizer().save_pretrained("teacher")
    words = ["sft", "--dataset_name", "rows.jsonl", "--max_steps", "2", "--batch_size", "6", "--output_dir", "out"]
    return lambda *more: build(parse_train([*words, *more]))


GKD = ("--loss_type", "gkd", "--teacher_model_name_or_path", "teacher")


@pytest.mark.parametrize("more", [(), ("--lora_r", "2")], ids=["full", "lora"])
def test_a_run_comes_nearer_to_its_teacher(run_of, more):
    """The teacher itself stays as it is."""
    run = run_of(*GKD, "--gkd_beta", "0", *more)
    assert run.config.model.disable_dropout
    examples, seen = list(run.data.train), []
    before = copy.deepcopy(run.step.teacher.policy.state_dict())
    for _ in range(8):
        micros = run.step.micro_batches(examples)
        result = run.step(micros, run.step.totals(examples, micros))
        seen.append(result.loss.item())
        with torch.no_grad():
            for p in run.trained:
                p -= 0.05 * p.grad / p.grad.norm().clamp(min=1e-9)
                p.grad = None
    assert seen[-1] < seen[0] and seen[0] > 0
    after = run.step.teacher.policy.state_dict()
    assert all(torch.equal(x, after[name]) for name, x in before.items())


def test_a_teacher_that_is_the_model_has_nothing_to_say(run_of):
    run = run_of("--loss_type", "gkd", "--teacher_model_name_or_path", "tiny")
    micros = run.step.micro_batches(list(run.data.train))
    result = run.step(micros, run.step.totals(list(run.data.train), micros))
    assert result.loss.item() == 0 and not any(p.grad.any() for p in run.trained if p.grad is not None)


def step_of(run):
    """(the means, the gradient of every trained parameter) of a step on all examples."""
    examples = list(run.data.train)
    for p in run.trained:
        p.grad = None
    micros = run.step.micro_batches(examples)
    means = run.step(micros, run.step.totals(examples, micros)).reduced(run.accelerator)
    return means, [p.grad.clone() for p in run.trained]


WAYS = {
    "full": (),
    "lora": ("--lora_r", "2", "--micro_batch_tokens", "16"),
    "adapter": ("--adapter_name_or_path", "adapter"),
    "bf16": ("--lora_r", "2", "--mixed_precision", "bf16"),
}


@pytest.mark.parametrize("way", [pytest.param(way, marks=pytest.mark.slow) if way == "bf16" else way for way in WAYS])
def test_asft_begins_as_dft_and_is_held_to_where_it_began(run_of, way):
    """Of an adapter that goes on training too, which is where it began. After a step the divergence is that of the
    model now from the model then."""
    if way == "adapter":
        lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        get_peft_model(tiny_model(), lora).save_pretrained("adapter")
    asft, dft = (run_of("--loss_type", name, "--disable_dropout", "True", *WAYS[way]) for name in ("asft", "dft"))
    assert isinstance(asft.step.teacher, ModelReference if way == "full" else AdapterReference), "no weights twice"
    (mine, grads), (plain, expected) = step_of(asft), step_of(dft)
    assert mine.pop("kl") == 0 and mine == plain
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True)) and any(g.any() for g in grads)
    began = copy.deepcopy(asft.policy.model)
    for run in (asft, dft):
        with torch.no_grad():
            for p, grad in zip(run.trained, grads, strict=True):
                p -= 0.5 * grad
    (mine, grads), (plain, expected) = step_of(asft), step_of(dft)
    assert mine["loss"] == pytest.approx(plain["loss"] + 0.05 * mine["kl"], rel=1e-6) and mine["kl"] > 0
    assert not any(torch.equal(a, b) for a, b in zip(grads, expected, strict=True) if b.any())
    if way != "bf16":
        assert mine["kl"] == pytest.approx(drift(began, asft), rel=1e-4)


def drift(began, run):
    """Mean KL of the model then and now, by plain passes."""
    found = []
    for example in run.data.train:
        ids, first = torch.tensor([[*example.prompt_ids, *example.completions[0].ids]]), len(example.prompt_ids) - 1
        with torch.no_grad():
            rows = [model(ids).logits[0, first:-1] for model in (began, run.policy.model)]
        found += oracle.generalized_jsd(*rows, beta=0.0).tolist()
    return sum(found) / len(found)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "sft --loss_type gkd",
            "--loss_type gkd is a divergence from a teacher: name it with --teacher_model_name_or_path",
        ),
        (
            "sft --teacher_model_name_or_path x",
            "--teacher_model_name_or_path x is read by grpo, and by sft with --loss_type gkd, but not by this sft; "
            "leave it out",
        ),
        (
            "sft --loss_type asft --teacher_model_name_or_path x",
            "--teacher_model_name_or_path x is read by grpo, and by sft with --loss_type gkd, but not by this sft; "
            "leave it out",
        ),
        (
            "sft --loss_type asft --ref_model_name_or_path x",
            "--ref_model_name_or_path x is about the reference, but this sft has none; leave it out",
        ),
        ("sft --gkd_beta 0.1", "gkd_beta=0.1 is not read by loss_type nll"),
        ("sft --loss_type gkd --gkd_beta 2", "gkd_beta=2.0 must be in [0, 1]"),
    ],
)
def test_what_does_not_fit_is_refused(words, message):
    with pytest.raises(UserError, match=re.escape(message)):
        parse_train(words.split())
