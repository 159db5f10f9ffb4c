"""What evaluations say: means over prompts, how sure they are, and pass@k."""

import itertools
import json
import math

import pytest
import torch

from logratio.trainers import cli, setup
from logratio.trainers.rollout.evaluation import Z, figures, pass_at

NAN = math.nan


def of(*rows):
    return figures(torch.tensor(rows, dtype=torch.float64))


def test_figures_worked_out_by_hand():
    """Four prompts with 0, 1, 2 and 4 of four right: p = 7/16, s^2 = 35/192 with Bessel's correction."""
    found = of([0, 0, 0, 0], [0, 1, 0, 0], [1, 0, 0, 1], [1, 1, 1, 1])
    trials = (7 / 16 * 9 / 16) / (35 / 192 / 4)
    low, high = (found[f"mean@4_{end}"] for end in ("low", "high"))
    assert found.keys() == {"mean@4", "mean@4_low", "mean@4_high", "pass@1", "pass@2", "pass@4"}
    assert found["mean@4"] == found["pass@1"] == 7 / 16
    assert found["pass@2"] == pytest.approx((0 + 1 / 2 + 5 / 6 + 1) / 4) and found["pass@4"] == 0.75
    for end in (low, high):  # Wilson's bounds are where the share is Z standard errors away
        assert abs(end - 7 / 16) == pytest.approx(Z * math.sqrt(end * (1 - end) / trials), rel=1e-12)
    assert low < 7 / 16 < high


def test_a_graded_reward_has_a_mean_and_its_standard_error_over_prompts():
    found = of([0.0, 1.0], [2.0, 4.0], [1.0, NAN], [NAN, NAN])
    error = math.sqrt(((0.5 - 1.5) ** 2 + (3 - 1.5) ** 2 + (1 - 1.5) ** 2) / 2 / 3)
    assert found == pytest.approx({"mean@2": 1.5, "mean@2_low": 1.5 - Z * error, "mean@2_high": 1.5 + Z * error})


def test_what_cannot_be_said_is_left_out():
    assert of([NAN, NAN]) == {}
    assert of([1.0, NAN, 0.0]) == {"mean@3": 0.5, "pass@1": 0.5, "pass@2": 1.0}, "one prompt"
    assert of([1.0, NAN, 0.0, 0.0]).keys() == {"mean@4", "pass@1", "pass@2"}, "no four of three"
    assert of([0.5], [0.5]) == {"mean@1": 0.5, "mean@1_low": 0.5, "mean@1_high": 0.5}
    certain = of(*[[1.0, 1.0]] * 50)
    assert certain["mean@2_high"] == 1 and 0.9 < certain["mean@2_low"] < 0.95
    assert of(*[[0.0, 1.0]] * 50)["mean@2_low"] == pytest.approx(0.366, abs=1e-3), "alike prompts count once each"
    third = of(*[[0.0, 0.0, 1.0]] * 50)["mean@3_low"]
    assert third == pytest.approx((1 / 3 + Z**2 / 100 - Z * math.sqrt(2 / 450 + Z**2 / 10000)) / (1 + Z**2 / 50))


def test_pass_at_k_is_the_share_of_subsets_with_a_right_one():
    for n in range(1, 7):
        for right, k in itertools.product(range(n + 1), range(1, n + 1)):
            subsets = list(itertools.combinations([1] * right + [0] * (n - right), k))
            assert pass_at(k, n, right) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-15)


def test_intervals_hold_the_truth_as_often_as_they_say():
    """Of prompts that are right with a chance of their own, few of them and most nearly always: 95 %, to the noise of
    2,000 draws; taking completions for independent would hold it in 83 and 72 %."""
    rng = torch.Generator().manual_seed(0)
    for power, truth in ((0.2, 1 / 1.2), (1.0, 0.5)):  # chances u ** power
        held = 0
        for _ in range(2000):
            chances = torch.rand(40, 1, generator=rng, dtype=torch.float64) ** power
            found = figures((torch.rand(40, 8, generator=rng) < chances).double())
            held += found["mean@8_low"] <= truth <= found["mean@8_high"]
        assert 0.92 < held / 2000 < 0.975, (power, held)


def test_a_run_evaluates_with_completions_of_their_own_number(tmp_path, monkeypatch, capsys):
    (tmp_path / "right.py").write_text(
        "def even(completion_ids, **_):\n    return [float(len(ids) % 2 == 0) for ids in completion_ids]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": f"{i}+1="}) + "\n" for i in range(7)))
    words = "train grpo --dataset_name rows.jsonl --num_generations 2 --max_completion_length 8 --max_steps 1"
    words += " --batch_size 2 --eval_size 5 --num_generations_eval 5 --reward_funcs right:even --output_dir out"
    assert cli.main(words.split()) == 0
    row = json.loads((tmp_path / "out" / "metrics.jsonl").read_text())
    found = {name.partition("even/")[2]: value for name, value in row.items() if name.startswith("eval_rewards/even/")}
    assert found.keys() == {"mean", "std", "mean@5", "mean@5_low", "mean@5_high", "pass@1", "pass@2", "pass@4"}
    told = f"rewards/even/mean@5 {found['mean@5']:.4g} ({found['mean@5_low']:.4g} to {found['mean@5_high']:.4g})"
    said = capsys.readouterr().out
    assert f"step 1/1 evaluated  reward {found['mean']:.4g}" in said and told in said
    assert setup.UNTRAINED not in said, "these rewards differ"
    assert found["mean"] == pytest.approx(found["mean@5"]) and found["mean@5"] * 25 == pytest.approx(
        round(found["mean@5"] * 25)
    )
