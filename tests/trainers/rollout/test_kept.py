"""What is kept of completions: what was sampled, what it was worth, in the order of one process."""

import json
import types

import pyarrow.parquet as pq
import pytest
import torch

from logratio.trainers import cli
from logratio.trainers.data.examples import Completion, Example
from logratio.trainers.rollout import kept
from logratio.trainers.rollout.engines.protocol import Sample
from logratio.trainers.rollout.sets.rolled import Rolled

ROWS = [{"prompt": f"{i}+1="} for i in range(3)]
TALK = [{"prompt": [{"role": "user", "content": f"{i}+1=é"}]} for i in range(3)]
REWARDS = """
import json
seen = []

def first(prompts, completions, completion_ids, log_extra, **_):
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    given = [float(len(ids) % 2) for ids in completion_ids]
    prompts = [p if isinstance(p, str) else json.dumps(p, ensure_ascii=False) for p in prompts]
    seen.append(list(zip(prompts, texts, [len(ids) for ids in completion_ids], given)))
    log_extra("tokens", [len(ids) for ids in completion_ids])
    return given

def second(completion_ids, **_):
    return [None if len(ids) == 3 else 1.0 for ids in completion_ids]
"""


@pytest.mark.parametrize("rows", [ROWS, TALK])
def test_a_run_keeps_what_its_rewards_saw(rows, tmp_path, monkeypatch, capsys):
    """Also what evaluations and greedy answers are given is seen, but only what is trained on is kept."""
    name = f"kept_rewards_{len(rows[0]['prompt'])}"
    (tmp_path / f"{name}.py").write_text(REWARDS)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    words = "train grpo --dataset_name rows.jsonl --num_generations 2 --max_completion_length 3 --max_steps 2"
    words += " --batch_size 2 --eval_size 1 --eval_steps 2 --output_dir out --advantage_type remax --reward_weights 1 2"
    words += f" --log_completions_steps 2 --reward_funcs {name}:first {name}:second"
    assert cli.main(words.split()) == 0
    seen = __import__(name).seen
    table = pq.read_table("out/completions.parquet").to_pylist()
    assert [len(call) for call in seen] == [4, 2, 4, 2, 2], "sampled, greedy, twice; and the evaluation's"
    wanted = [(step, *one) for step, call in ((1, seen[0]), (2, seen[2])) for one in call]
    names = ("step", "prompt", "completion", "completion_length", "rewards/first")
    assert [tuple(row[n] for n in names) for row in table] == wanted
    for row in table:
        assert row["rewards/second"] == (None if row["completion_length"] == 3 else 1.0)
        assert row["reward"] == row["rewards/first"] + 2 * (row["rewards/second"] or 0.0)
        assert row["finish_reason"] == ("length" if row["completion_length"] == 3 else "stop") or not row["completion"]
        assert row["tokens"] == str(row["completion_length"]) and row["row"] in (0, 1, 2)
    log = [json.loads(line) for line in open("out/metrics.jsonl")]
    assert [row["epoch"] for row in log] == [1.0, 2.0], "a step is a pass over the two prompts that train"
    for step in (1, 2):
        rewards = [row["reward"] for row in table if row["step"] == step]
        assert log[step - 1]["reward"] == pytest.approx(sum(rewards) / 4, abs=1e-12)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("step 2, row", "  reward "))]
    assert len(said) == 3 and "first" in said[1]


def test_nothing_is_kept_where_it_is_not_wanted(tmp_path, monkeypatch, capsys):
    (tmp_path / "kept_none.py").write_text(REWARDS)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    words = "train grpo --dataset_name rows.jsonl --num_generations 2 --max_completion_length 3 --max_steps 1"
    words += " --batch_size 2 --output_dir out --reward_funcs kept_none:first --no_log_completions"
    assert cli.main(words.split()) == 0
    assert not (tmp_path / "out" / "completions.parquet").exists()
    said = " ".join(capsys.readouterr().out.split())
    assert "completions are not kept (--no_log_completions), nor what rewards give to log_extra: tokens" in said


def test_rows_of_all_processes_are_in_the_order_of_the_prompts(monkeypatch):
    """Two steps of three prompts over two processes: 0, 2, 3, 5 and 1, 4."""
    shares = [{place: [{"row": place}] * 2 for place in places} for places in ((0, 2, 3, 5), (1, 4))]
    monkeypatch.setattr(kept, "gather_object", lambda mine: shares)
    main = types.SimpleNamespace(num_processes=2, is_main_process=True)
    assert [row["row"] for row in kept.of_all(main, shares[0])] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert kept.of_all(types.SimpleNamespace(num_processes=2, is_main_process=False), shares[1]) == []


def test_a_row_has_none_for_a_reward_that_nobody_gave():
    nan = torch.full((1, 1, 1), torch.nan, dtype=torch.float64)
    keeper = kept.Keeper(["one"], torch.ones(1, dtype=torch.float64), "logratio")
    (row,) = keeper.rows(
        7,
        Rolled(
            [Example([1], [Completion([5, 6])], row=3)], nan, prompts=["p"], texts=["c"], extra={"why": ["x"]},
            samples=[Sample([5, 6], "length", [-1.0, -2.0], 6)],
        ),
        torch.zeros(1, 1),
    )  # fmt: skip
    assert row == {
        "step": 7, "row": 3, "prompt": "p", "completion": "c", "rewards/one": None, "reward": None, "advantage": 0.0,
        "completion_length": 2, "finish_reason": "length", "sampler_logp": -1.5, "logp_diff": None, "policy_version": 6,
        "engine": "logratio", "why": "x",
    }  # fmt: skip


@pytest.mark.parametrize("iterations", [1, 2])
def test_every_completion_says_how_far_the_trainer_is_from_its_sampler(iterations, tmp_path, monkeypatch):
    """Their mean over tokens is the step's metric, where the sampler's distribution was cut; of a completion that
    nothing is learned from it is not known."""
    (tmp_path / "kept_far.py").write_text(REWARDS)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    words = "train grpo --dataset_name rows.jsonl --num_generations 4 --max_completion_length 3 --batch_size 2"
    words += (
        f" --reward_funcs kept_far:first --micro_batch_tokens 24 --num_iterations {iterations} --learning_rate 1e-2"
    )
    words += f" --max_steps {2 * iterations} --top_k 40 --output_dir"
    assert cli.main([*words.split(), "all"]) == 0
    assert cli.main([*words.split(), "ended", "--mask_truncated_completions"]) == 0
    rows = pq.read_table("all/completions.parquet").to_pylist()
    log = [json.loads(line) for line in open("all/metrics.jsonl")]
    for step in range(1, 2 * iterations + 1, iterations):
        here = [row for row in rows if row["step"] == step]
        total = sum(row["logp_diff"] * row["completion_length"] for row in here)
        mean = total / sum(row["completion_length"] for row in here)
        assert len(here) in (4, 8) and mean == pytest.approx(log[step - 1]["sampling/logp_diff_mean"], rel=1e-5)
        assert len({row["logp_diff"] for row in here}) > 2 and min(row["logp_diff"] for row in here) > 0.1
    cut = pq.read_table("ended/completions.parquet").to_pylist()
    assert all((row["logp_diff"] is None) == (row["finish_reason"] == "length") for row in cut)
    assert cli.main([*words.split(), "set", "--steps_per_generation", "2"]) == 0
    rows = pq.read_table("set/completions.parquet").to_pylist()
    assert {row["step"] for row in rows} == set(range(1, 2 * iterations + 1, 2 * iterations))
    assert min(row["logp_diff"] for row in rows) > 0.1, "of the steps that are still to come, too"
