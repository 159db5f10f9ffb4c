"""The demo's pieces: what it counts as right, how sure it is of that, and what data it makes of mistakes."""

import dataclasses
import json
import math
import random
from types import SimpleNamespace

import pytest

from logratio.losses import LOSSES, Kind
from logratio.trainers import demo
from logratio.trainers.config import RunConfig
from logratio.trainers.data.examples import load_rows, prepare, prepare_prompts
from logratio.trainers.data.rows import Rows
from logratio.trainers.data.tasks.arithmetic import arithmetic_rows
from logratio.trainers.demo import METHODS, SHOPPING, SHOPPING_START, START, Method, Result, Score
from logratio.trainers.errors import UserError
from logratio.trainers.policy.tiny import tiny_tokenizer
from logratio.trainers.rollout.engines.protocol import Sample

TOKENIZER = tiny_tokenizer()
RUN = SimpleNamespace(policy=None, tokenizer=TOKENIZER)


def prompts_of(*questions: str):
    rows = [{"prompt": f"{q}=", "answer": str(sum(map(int, q.split("+"))))} for q in questions]
    return prepare_prompts(Rows("questions", rows), TOKENIZER)[0]


def test_the_standard_error_is_the_spread_of_means_over_clusters():
    # 4,000 experiments with 60 questions, each asked twice and answered alike both times
    rng = random.Random(0)
    scores = []
    for _ in range(4000):
        once = [float(rng.random() < 0.6) for _ in range(60)]
        scores.append(demo.clustered(once * 2, list(range(60)) * 2))
    mean = sum(s.accuracy for s in scores) / len(scores)
    spread = math.sqrt(sum((s.accuracy - mean) ** 2 for s in scores) / len(scores))
    told = sum(s.standard_error for s in scores) / len(scores)
    assert told == pytest.approx(spread, rel=0.05)
    assert told == pytest.approx(math.sqrt(0.6 * 0.4 / 60), rel=0.05)  # 120 questions are worth 60


def test_without_clusters_it_is_that_of_a_proportion():
    right = [1.0] * 300 + [0.0] * 100
    score = demo.clustered(right, range(400))
    assert score.accuracy == 0.75
    assert score.standard_error == pytest.approx(math.sqrt(0.75 * 0.25 / 399))
    assert str(Score(0.5, 0.25)) == "0.500 ± 0.250"


def test_two_scores_are_compared_by_the_error_of_their_difference():
    assert Score(0.7, 0.03).beyond(Score(0.5, 0.04)) == pytest.approx(0.2 / 0.05)
    assert Score(0.5, 0.04).beyond(Score(0.7, 0.03)) < 0


def test_accuracy_is_that_of_greedy_answers(monkeypatch):
    prompts = prompts_of("12+34", "34+12", "50+50", "10+11")
    said = {"12+34=": "46", "34+12=": "47", "50+50=": "100", "10+11=": "12"}

    def generate(policy, tokenizer, asked, *, max_new_tokens, **sampling):
        assert sampling == {"seeds": None} and max_new_tokens > len(TOKENIZER("100<|im_end|>")["input_ids"])
        return [Sample(TOKENIZER(said[p.prompt] + "<|im_end|>")["input_ids"], "stop", []) for p in asked]

    monkeypatch.setattr(demo, "generate", generate)
    score = demo.score(RUN, prompts)
    # clusters {12, 34}: 1 of 2 right, {50}: right, {10, 11}: wrong; about the mean 0.5 their sums are 0, 0.5, -0.5
    assert score == Score(0.5, pytest.approx(math.sqrt(0.5 * 3 / 2) / 4))


def test_validation_and_training_share_no_question_even_mirrored():
    rows = arithmetic_rows(Kind.GROUPED)
    validation, training = demo.split_validation(rows)
    assert len(validation) >= 200 and len(validation) + len(training) == len(rows)
    assert not {demo.addends(r["prompt"]) for r in validation} & {demo.addends(r["prompt"]) for r in training}
    assert demo.addends("12+34=") == demo.addends("34+12=") != demo.addends("12+43=")


def test_preferences_are_right_answers_against_the_models_mistakes(tmp_path):
    prompts = prompts_of("12+34", "50+50", "10+11", "20+20")
    files = demo.preferences(prompts, ["46", "90", "22", ""])
    assert files["pairs"] == [
        {"prompt": "50+50=", "chosen": "100", "rejected": "90"},
        {"prompt": "10+11=", "chosen": "21", "rejected": "22"},
    ]
    assert [(r["prompt"], r["completion"], r["label"]) for r in files["labeled"]] == [
        ("50+50=", "100", True),
        ("50+50=", "90", False),
        ("10+11=", "21", True),
        ("10+11=", "22", False),
    ]
    assert files["chosen"] == [{"prompt": "50+50=", "completion": "100"}, {"prompt": "10+11=", "completion": "21"}]
    # and they are data that the methods can read
    demo.write(tmp_path, files)
    for name, kind in (("pairs", Kind.PAIRED), ("labeled", Kind.LABELED), ("chosen", Kind.SEQUENCE)):
        rows = load_rows(str(tmp_path / f"{name}.jsonl"), kind)
        assert prepare(rows, kind, TOKENIZER)[1].examples == len(files[name])


def test_every_method_is_shown_and_one_control(tmp_path):
    assert {m.name for m in METHODS if not m.control} | {START.name} == {"sft", "dpo", "kto", "orpo", "grpo"}
    assert len({m.folder for m in (START, *METHODS)}) == 1 + len(METHODS)
    for method in (START, *METHODS):
        assert type(method.loss) is LOSSES[method.name]
        config = demo.configuration(method, "tiny", tmp_path)
        assert isinstance(config, RunConfig) and json.dumps(config.as_dict())


def results_with(gain: float, control_gain: float) -> list[Result]:
    start = Result(START, Score(0.55, 0.01), 200, 10.0, 400.0)
    gains = {False: gain, True: control_gain}
    return [start, *(Result(m, Score(0.55 + gains[m.control], 0.01), 75, 10.0, 400.0) for m in METHODS)]


@pytest.mark.parametrize(("gain", "control_gain", "status"), [(0.03, -0.5, 0), (0.027, 0.5, 1), (-0.1, 0.5, 1)])
def test_the_status_tells_whether_every_method_helped(monkeypatch, capsys, gain, control_gain, status):
    # two standard errors of the difference are 2 * 0.01 * sqrt(2) = 0.0283
    monkeypatch.setattr(demo, "train_all", lambda folder, say: results_with(gain, control_gain))
    monkeypatch.setattr(demo, "shop", lambda folder, say: shopped_with(0.03))
    assert demo.demo("nowhere") == status
    shown = capsys.readouterr().out
    assert all(m.title in shown for m in METHODS) and (("not two standard errors" in shown) == (status == 1))


def shopped_with(beyond: float) -> list[Result]:
    """dpo that far above the control, grpo far above it."""
    start = Result(SHOPPING_START, Score(0.3, 0.01), 150, 10.0, 400.0)
    scores = {"dpo": 0.36 + beyond, "grpo": 0.9, "sft": 0.36}
    return [start, *(Result(m, Score(scores[m.name], 0.01), 60, 10.0, 400.0) for m in SHOPPING)]


@pytest.mark.parametrize(("beyond", "status"), [(0.03, 0), (0.027, 1)])
def test_the_status_tells_whether_preferences_taught_more_than_imitation(monkeypatch, capsys, beyond, status):
    monkeypatch.setattr(demo, "train_all", lambda folder, say: results_with(0.1, 0.1))
    monkeypatch.setattr(demo, "shop", lambda folder, say: shopped_with(beyond))
    assert demo.demo("nowhere") == status
    said = "dpo: 0.387 ± 0.010 is not two standard errors above the control's 0.360 ± 0.010"
    assert (said in capsys.readouterr().out) == (status == 1)


def test_thrift_is_the_mean_worth_of_sampled_answers(monkeypatch):
    prompts = prepare_prompts(Rows("lists", [{"prompt": "7294="}, {"prompt": "00="}]), TOKENIZER)[0]
    monkeypatch.setattr(demo, "answers", lambda speaker, asked, *, seed, tokens: ["ccee", "ab"][: len(asked)])
    assert demo.thrift(RUN, prompts).accuracy == pytest.approx((1 + 4 / 7) / 2)


def test_shopping_has_a_start_what_learns_from_preferences_and_a_control(tmp_path, monkeypatch):
    asked = []

    def phase(method: Method, model: str, folder, test, *, by):
        asked.append((method, model, (folder / f"{method.data}.jsonl").exists(), len(test), by))
        return RUN, Result(method, Score(0.4, 0.01), method.steps, 1.0, 1.0)

    monkeypatch.setattr(demo, "phase", phase)
    assert [result.method for result in demo.shop(tmp_path, print)] == [SHOPPING_START, *SHOPPING]
    start = str(tmp_path / "sft")
    assert [one[1] for one in asked] == ["tiny", start, start, start]
    assert all(there and lists == 500 and by is demo.thrift for _, _, there, lists, by in asked)
    assert [m.control for m in SHOPPING] == [False, False, True]


def test_sft_that_learns_nothing_is_said(monkeypatch, tmp_path):
    def phase(method: Method, *_args, **_kwargs):
        return RUN, Result(method, Score(0.1, 0.01), method.steps, 1.0, 1.0)

    monkeypatch.setattr(demo, "phase", phase)
    with pytest.raises(UserError, match=f"SFT did not reach an accuracy of {demo.TARGET} "):
        demo.train_all(tmp_path, print)


def test_a_phase_stops_where_it_is_told_and_scores_what_it_trained(tmp_path):
    validation, _ = demo.split_validation(arithmetic_rows(Kind.GROUPED))
    demo.write(tmp_path, {"sft": [{"prompt": r["prompt"], "completion": r["answer"]} for r in validation.rows]})
    few = Rows("few", validation.rows[:8])
    method = dataclasses.replace(START, batch_size=2)
    run, result = demo.phase(method, "tiny", tmp_path, few, until=lambda run, row: row["step"] == 3)
    assert result.steps == 3 and result.score == demo.score(run, demo.prepared(few, run))
    assert (tmp_path / "sft" / "model.safetensors").exists() and result.peak_mem_mib > 0
    assert len((tmp_path / "sft" / "metrics.jsonl").read_text().splitlines()) == 3
