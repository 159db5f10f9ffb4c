"""On-policy distillation: a teacher's log-probs of what was sampled, as advantages of tokens."""

import json
import math
import re

import pytest
import torch
from transformers import AutoModelForCausalLM

from logratio.losses import CompletionLogps, GRPOLoss, Totals, linear_jsd
from logratio.reference import oracle
from logratio.trainers import loop, setup
from logratio.trainers.batches.packing import pack
from logratio.trainers.checkpoints.tensors import fingerprint
from logratio.trainers.data.examples import Completion, Example
from logratio.trainers.errors import UserError
from logratio.trainers.options import parse_train
from logratio.trainers.policy.teacher import check_teacher, log_ratios
from logratio.trainers.policy.tiny import tiny_model, tiny_tokenizer
from logratio.trainers.resume import Progress

from .test_windows import plain_logps

WORDS = ["grpo", "--dataset_name", "rows.jsonl", "--no-shuffle", "--batch_size", "3", "--num_generations", "3"]
WORDS += ["--max_completion_length", "5", "--max_steps", "2", "--temperature", "0.7", "--output_dir", "out"]
TAUGHT = ["--teacher_model_name_or_path", "teacher"]


@pytest.fixture
def run_of(tmp_path, monkeypatch):
    """run_of(*words) -> a run on three rows, beside a folder `teacher` of other weights."""
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{i}+1=", "answer": "2"} for i in "123"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = tiny_model()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * parameter.std() * torch.randn_like(parameter) if parameter.ndim > 1 else 0
    model.save_pretrained("teacher")
    tiny_tokenizer().save_pretrained("teacher")

    def build(*words):
        run = setup.build(parse_train([*WORDS, *words]))
        run.rollouts.rewards = {"r": lambda completion_ids, **_: [float(ids[0] % 3) for ids in completion_ids]}
        return run

    return build


def test_its_expected_gradient_is_that_of_the_reverse_divergence():
    """Every word is one completion, and counts by its probability: that is the expectation. linear_jsd knows KL(p || q)
    and its gradient over the whole vocabulary."""
    torch.manual_seed(0)
    logits, teacher = torch.randn(2, 6, dtype=torch.float64)
    p, log_q = logits.softmax(0), teacher.log_softmax(0)
    leaf = logits.clone().requires_grad_()
    policy = CompletionLogps(leaf.log_softmax(0)[:, None], torch.ones(6, 1, dtype=torch.bool))
    advantages = (len(p) * p * (log_q - p.log()))[:, None]
    GRPOLoss()(policy, advantages=advantages, totals=Totals.of(policy, advantages=advantages)).loss.backward()
    other, eye = logits[None].clone().requires_grad_(), torch.eye(6, dtype=torch.float64)
    linear_jsd(other, eye, teacher[None], eye, beta=1.0).sum().backward()
    torch.testing.assert_close(leaf.grad, other.grad[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("words", "weight", "coef"),
    [
        (["--reward_weights", "0"], 0, 1.0),
        (["--teacher_coef", "0.5", "--num_iterations", "2", "--micro_batch_tokens", "12"], 1, 0.5),
    ],
)
def test_a_tokens_advantage_is_the_rewards_and_the_teachers(run_of, words, weight, coef):
    run = run_of(*TAUGHT, *words, "--scale_rewards", "none")
    window = next(loop.steps(run, Progress()))
    examples = window.examples
    assert (sum(len(m.batch.examples) for m in window.micros) > 3) == ("12" in words)
    rewards = [[weight * (c.ids[0] % 3) for c in e.completions] for e in examples]
    of_rewards = [a for row in oracle.advantages(rewards, "none") for a in row]
    teacher = AutoModelForCausalLM.from_pretrained("teacher")
    apart = []
    sampled = [(e.prompt_ids, c.ids, a) for e in examples for c, a in zip(e.completions, e.advantages, strict=True)]
    for (prompt_ids, ids, a), of_reward in zip(sampled, of_rewards, strict=True):
        own, taught = (plain_logps(m, prompt_ids, ids) for m in (run.policy.model, teacher))
        assert a == pytest.approx((of_reward + coef * (taught - own)).tolist(), abs=1e-4)
        apart += (own - taught).tolist()
    assert max(map(abs, apart)) > 0.1
    total, count = window.metrics["teacher_kl"]
    assert float(total / count) == pytest.approx(sum(apart) / len(apart), rel=1e-3)
    later = "--num_iterations" in words
    assert all((micro.old is not None) == later for micro in window.micros), "on policy there is no old policy"
    parts = [e for micro in window.micros for e in micro.batch.examples]
    inside, whole = (
        {id(c): a for e in some for c, a in zip(e.completions, e.advantages, strict=True)} for some in (parts, examples)
    )
    assert inside == whole
    kept = [row["advantage"] for row in run.rollouts.keeper.taken()]
    assert kept == pytest.approx([sum(a) / len(a) for e in examples for a in e.advantages], abs=1e-6)


def test_a_teacher_that_is_the_policy_teaches_nothing(run_of):
    run = run_of("--teacher_model_name_or_path", "tiny", "--reward_weights", "0")
    window = next(loop.steps(run, Progress()))
    assert all(abs(x) < 1e-5 for e in window.examples for a in e.advantages for x in a)
    run.step(window.micros, run.step.totals(window.examples, window.micros, dealt=True))
    assert max(p.grad.abs().max() for p in run.trained) < 1e-5
    assert run.rollouts.watch.alike == -1, "that rewards are all alike is no matter"
    teacher, other = run.step.teacher.policy, run_of(*TAUGHT).step.teacher.policy
    assert run.frozen == fingerprint(run.policy, teacher) != fingerprint(run.policy, other), "to go on needs the same"


@pytest.mark.slow
def test_the_policy_comes_nearer_to_its_teacher(run_of):
    """The reverse divergence at what the policy samples, over the whole vocabulary, before and after."""
    words = ["--reward_weights", "0", "--learning_rate", "3e-3", "--max_steps", "40", "--num_generations", "8"]
    run = run_of(*TAUGHT, *words)
    progress, seen = Progress(), []
    for window in loop.steps(run, progress):
        seen.append(float(window.metrics["teacher_kl"].total / window.metrics["teacher_kl"].count))
        if len(seen) == 40:
            break
        run.step(window.micros, run.step.totals(window.examples, window.micros, dealt=True))
        run.optimizer.step()
        run.optimizer.zero_grad()
        progress.step += 1
    assert sum(seen[-5:]) < 0.5 * sum(seen[:5]), seen


def test_unscored_tokens_and_fillers_have_none_and_what_is_not_finite_is_named():
    cut = Completion([7, 8, 9], [False] * 3)
    examples = [Example([3], [Completion([5, 6]), cut], row=4), Example([4], [Completion([6])], row=8)]
    batches = pack(examples, 4) + [pack(examples[:1], 9)[0].unscored()]
    ratios = [torch.full(b.scored.shape, 0.5) for b in batches]
    values, mean = log_ratios(examples, zip(batches, ratios, strict=True))
    assert values.tolist() == [[0.5, 0.5], [0.0, 0.0], [0.5, 0.0]]
    assert (float(mean.total), float(mean.count)) == (-1.5, 3)
    ratios[1][:] = math.inf
    with pytest.raises(UserError, match=r"^the teacher's log-probs are not finite \(row 8 of the data set\)"):
        log_ratios(examples, zip(batches, ratios, strict=True))


class Words:
    """A tokenizer as far as its ids go."""

    def __init__(self, **vocabulary):
        self.get_vocab = lambda: vocabulary


@pytest.mark.parametrize("theirs", [{"a": 0, "b": 1}, {"a": 0, "b": 1, "c": 2, "d": 3}, {"a": 0}])
def test_a_tokenizer_may_know_more_or_less(theirs):
    check_teacher(Words(a=0, b=1, c=2), Words(**theirs), "big")


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        ({"a": 0, "b": 2}, "'b' is 1 to the model, and 1 to the teacher is 'nothing'"),
        ({"a": 0, "x": 1}, "'b' is 1 to the model, and 1 to the teacher is 'x'"),
    ],
)
def test_other_ids_are_refused(theirs, said):
    message = f"--teacher_model_name_or_path big has another tokenizer: {said}; distill from a model of the same family"
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        check_teacher(Words(a=0, b=1), Words(**theirs), "big")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("dpo --teacher_model_name_or_path x", "--teacher_model_name_or_path x is read by grpo, and by sft with"),
        ("grpo --teacher_coef 2", "--teacher_coef 2.0 is read only with --teacher_model_name_or_path; add it"),
        (
            "grpo --teacher_model_name_or_path x --dynamic_sampling 2",
            "--dynamic_sampling 2 leaves out completions of equal reward, from which a teacher teaches too",
        ),
        ("grpo --teacher_model_name_or_path x --loss_type vespo", "--loss_type vespo is of whole completions"),
        (
            "grpo --teacher_model_name_or_path x --importance_sampling_level sequence",
            "--importance_sampling_level sequence has one ratio a completion, and a teacher's advantage is of tokens",
        ),
        ("grpo --teacher_model_name_or_path x --teacher_coef -1", "--teacher_coef must not be negative, got -1.0"),
    ],
)
def test_what_does_not_go_with_it_is_refused(words, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        parse_train(words.split())


def test_its_folder_is_asked_before_anything_is_loaded(run_of, tmp_path):
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="^--teacher_model_name_or_path none holds no model"):
        run_of("--teacher_model_name_or_path", "none")
    with pytest.raises(
        UserError, match="would remove --teacher_model_name_or_path teacher, which training starts from"
    ):
        run_of(*TAUGHT, "--output_dir", "teacher", "--overwrite_output_dir")
