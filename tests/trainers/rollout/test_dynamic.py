"""Groups of equal reward are left out, and the next prompts take their place: which, how often, what is said of it."""

import dataclasses
import json

import pyarrow.parquet as pq
import pytest
import torch

from logratio.losses import Mean
from logratio.trainers import cli, loop, setup
from logratio.trainers.config import RolloutConfig
from logratio.trainers.data.examples import Completion, Example
from logratio.trainers.errors import UserError
from logratio.trainers.options import parse_train
from logratio.trainers.resume import Progress
from logratio.trainers.rollout.rollouts import Rollouts
from logratio.trainers.rollout.sets.dynamic import differing
from logratio.trainers.rollout.sets.rolled import Rolled, joined

from ._prompts import sample_of

REWARDS = """
def of_odd_rows(prompts, completions, log_extra, **_):
    log_extra("number", list(range(len(prompts))))
    return [i % 2 * (int(p[0]) % 2) for i, p in enumerate(prompts)]

def never(prompts, **_):
    return [1.0] * len(prompts)

def always(prompts, **_):
    return [i % 2 for i, _ in enumerate(prompts)]
"""


@pytest.fixture
def words(tmp_path, monkeypatch):
    """Eight rows in their order, of which every other one teaches; two prompts of two completions a step."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "dynamic_rewards.py").write_text(REWARDS)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": f"{i}+1="}) + "\n" for i in range(8)))
    given = ["grpo", "--dataset_name", "rows.jsonl", "--no-shuffle", "--batch_size", "2", "--num_generations", "2"]
    given += ["--max_completion_length", "4", "--max_steps", "3", "--lora_r", "2", "--output_dir", "out"]
    return [*given, "--reward_funcs", "dynamic_rewards:of_odd_rows"]


def windows_of(words, steps=3):
    """(what was said, the windows of the first steps)."""
    run, progress = setup.build(parse_train(words)), Progress()
    windows, found, said = loop.steps(run, progress), [], []
    for _ in range(steps):
        found.append(next(windows))
        progress.step += 1
        said += run.rollouts.after(progress.step)
    return said, found


def rows_of(window):
    return [example.row for example in window.examples]


def value(window, name):
    total, count = window.metrics[name]
    return float(total / count)


def test_the_next_prompts_take_the_place_of_those_that_teach_nothing(words):
    """0, 1; 2 for 0; 3 for 2: three rounds; and on from there, over the end of the data."""
    said, windows = windows_of([*words, "--dynamic_sampling", "9"])
    assert [rows_of(window) for window in windows] == [[1, 3], [5, 7], [1, 3]]
    assert [window.position for window in windows] == [
        {"epoch": 0, "offset": 4}, {"epoch": 0, "offset": 8}, {"epoch": 1, "offset": 4},
    ]  # fmt: skip
    for window in windows:
        assert value(window, "dynamic/rounds") == 3 and value(window, "dynamic/filtered") == 0.5
        assert value(window, "reward") == 0.25 and value(window, "frac_reward_zero_std") == 0.5, "of all, not the kept"
        assert all(abs(a) > 0.7 for example in window.examples for a in example.advantages)
        assert window.metrics["rollout_ms"].count == 1
    assert not any("dynamic" in note for note in said)


def test_after_the_last_round_it_goes_on_with_what_there_is_and_says_so(words):
    said, windows = windows_of([*words, "--dynamic_sampling", "2"])
    assert [rows_of(window) for window in windows] == [[0, 1], [3, 5], [6, 7]]
    assert [window.examples[0].advantages == (0.0, 0.0) for window in windows] == [True, False, True]
    assert [note for note in said if "dynamic" in note] == [
        "step 1: after 2 rounds (--dynamic_sampling) 1 of 2 groups had rewards that differ; it goes on with others "
        "beside them, which teach nothing: take prompts that are right now and then"
    ]


def test_where_nothing_can_teach_it_ends_all_the_same(words, capsys):
    given = [*words[:-1], "dynamic_rewards:never", "--dynamic_sampling", "4", "--max_steps", "1"]
    assert cli.main(["train", *given]) == 0
    assert "0 of 2 groups had rewards that differ" in " ".join(capsys.readouterr().out.split())
    assert pq.read_table("out/completions.parquet").num_rows == 2 * 2 * 4


def test_where_every_group_teaches_nothing_changes(words):
    """With a step that divides the data: the same completions, to the token."""
    words = [*words[:-1], "dynamic_rewards:always", "--steps_per_generation", "2"]
    plain, sampled = (windows_of([*words, *more])[1] for more in ([], ["--dynamic_sampling", "9"]))
    assert [w.examples for w in plain] == [w.examples for w in sampled]
    assert [value(w, "dynamic/filtered") for w in sampled] == [0, 0, 0]


def test_several_steps_are_filled_together(words):
    words = [*words, "--dynamic_sampling", "9", "--steps_per_generation", "2", "--batch_size", "3"]
    _, windows = windows_of(words, 2)
    assert [rows_of(window) for window in windows] == [[1, 3, 5], [7, 1, 3]]
    assert value(windows[0], "dynamic/rounds") == 4, "0 to 5; 6, 7, 0 for 0, 2, 4; 1, 2 for 6, 0; 3 for 2"
    one, other = (example.completions[0].ids for example in (windows[0].examples[0], windows[1].examples[1]))
    assert one != other, "a row that comes again has other random numbers"


def test_what_was_left_out_is_kept_without_an_advantage(words):
    assert cli.main(["train", *words, "--dynamic_sampling", "9", "--max_steps", "1"]) == 0
    table = pq.read_table("out/completions.parquet").to_pylist()
    assert [(row["step"], row["row"], row["advantage"] is None) for row in table] == [
        *[(1, 0, True)] * 2, *[(1, 2, True)] * 2, *[(1, 1, False)] * 2, *[(1, 3, False)] * 2,
    ]  # fmt: skip
    assert [row["number"] for row in table] == ["0", "1", "0", "1", "2", "3", "0", "1"], "in its own round"


def test_rounds_take_all_their_time_for_all_their_tokens(words, monkeypatch):
    times, sample = iter([(2.0, 100), (1.0, 20), (0.5, 10)]), Rollouts.sample

    def timed(self, *asked):
        said = sample(self, *asked)
        self.timed = next(times)
        return said

    monkeypatch.setattr(Rollouts, "sample", timed)
    _, (window,) = windows_of([*words, "--dynamic_sampling", "9"], steps=1)
    found = {name: tuple(map(float, window.metrics[name])) for name in ("rollout_ms", "rollout_tokens_per_s")}
    assert found == {"rollout_ms": (3500, 1), "rollout_tokens_per_s": (130, 3.5)} and next(times, None) is None


@pytest.mark.parametrize("kind", ["remax", "reinforce_pp"])
def test_it_is_refused_where_equal_rewards_teach(kind):
    with pytest.raises(UserError, match=f"^--dynamic_sampling 2: with --advantage_type {kind} completions of equal"):
        RolloutConfig(advantage_type=kind, dynamic_sampling=2)


def test_what_differs_for_one_reward_alone_teaches_gdpo(words):
    """Rewards whose sum is the same, each of which tells completions apart."""
    run = setup.build(parse_train([*words[:-1], "dynamic_rewards:always"]))
    by_function = torch.tensor([[[0.0, 1.0], [1.0, 0.0]], [[1.0, 1.0], [1.0, 1.0]]]).double()
    nan = torch.full((1, 2, 2), torch.nan).double()

    run.rollouts.weights = torch.tensor([1.0, 2.0]).double()
    given = torch.cat([by_function, nan])
    assert differing(run.rollouts, given).tolist() == [True, False, False]
    run.rollouts.weights = torch.ones(2).double()
    assert differing(run.rollouts, given).tolist() == [False, False, False]
    run.rollouts.config = dataclasses.replace(
        run.rollouts.config, multi_objective_aggregation="normalize_then_sum", reward_funcs=("a", "b")
    )
    run.rollouts.weights = torch.tensor([1.0, 2.0]).double()
    assert differing(run.rollouts, given).tolist() == [True, False, False]


def rolled(*rows, **others):
    examples = [Example([1], [Completion([row]), Completion([row + 100])], row=row) for row in rows]
    ids = [c.ids for e in examples for c in e.completions]
    return Rolled(
        examples, torch.tensor([[[row], [row + 0.5]] for row in rows]).double().reshape(len(rows), 2, 1), None,
        torch.ones(len(rows), 2), prompts=[str(i) for (i,) in ids], samples=[sample_of(i, True) for i in ids],
        texts=[f"t{i}" for (i,) in ids], places=list(rows), **others,
    )  # fmt: skip


def test_rollouts_of_rounds_and_processes_are_put_together_and_taken_apart():
    one = rolled(4, 2, extra={"a": ["x", "y", "z", "w"]}, logged={"m": Mean(torch.tensor(1.0), torch.tensor(2.0))})
    other = rolled(7, logged={"m": Mean(torch.tensor(4.0), torch.tensor(1.0))}, extra={"b": ["p", "q"]})
    both = joined([one, rolled(), other])
    assert both.extra == {"a": ["x", "y", "z", "w", None, None], "b": [None] * 4 + ["p", "q"]}
    assert tuple(map(float, both.logged["m"])) == (5, 3) and both.places == [4, 2, 7]
    part = both.take([2, 0])
    assert [e.row for e in part.examples] == part.places == [7, 4] and part.texts == ["t7", "t107", "t4", "t104"]
    assert part.by_function.flatten().tolist() == [7, 7.5, 4, 4.5] and part.prompts == ["7", "107", "4", "104"]
    assert [s.ids[0] for s in part.samples] == [7, 107, 4, 104] and part.extra["a"] == [None, None, "x", "y"]
    assert part.ended.shape == (2, 2) and part.logged == {} and both.take([]).by_function.shape == (0, 2, 1)
