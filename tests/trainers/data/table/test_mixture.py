"""Several data sets: which rows an epoch draws, in which order, and how they are named."""

import json
from collections import Counter
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logratio.trainers.config import DataConfig
from logratio.trainers.data.examples import Completion, Example
from logratio.trainers.data.table.load import load_data
from logratio.trainers.data.table.mixture import Mixture, data_sets
from logratio.trainers.data.table.stored import Table
from logratio.trainers.data.table.writer import TableWriter
from logratio.trainers.errors import UserError
from logratio.trainers.loop import train_run
from logratio.trainers.options import parse_train
from logratio.trainers.policy.tiny import tiny_tokenizer
from logratio.trainers.setup import batches, build


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """tables(3, 5): of so many examples, whose only prompt token is their number over all."""
    folder, made = tmp_path_factory.mktemp("tables"), {}

    def of(*sizes):
        found, before = [], 0
        for size in sizes:
            if (size, before) not in made:
                with TableWriter(folder / f"{size}-{before}") as table:
                    for i in range(size):
                        table.add(Example([before + i], [Completion([1])], row=i))
                    table.close({"rows": size})
                made[size, before] = Table(folder / f"{size}-{before}")
            found.append(made[size, before])
            before += size
        return found

    return of


def mixture(tables, weights, chosen=None):
    return Mixture(tables, [f"{'abc'[n]}.jsonl" for n in range(len(tables))], weights, chosen)


def drawn(mixed, epochs, **options):
    return [mixed.order(epoch, **{"shuffle": True, "seed": 3, **options}) for epoch in range(epochs)]


@pytest.mark.parametrize(
    ("sizes", "weights", "shares"),
    [
        ((100, 10), (2, 1), (20, 10)),  # T = min(100 / (2/3), 10 / (1/3)) = 30
        ((100, 10), (1, 1), (10, 10)),
        ((30, 10), (3, 1), (30, 10)),
        ((30, 10, 7), (0.5, 0.25, 0.25), (14, 7, 7)),
        ((10,), (5,), (10,)),
        ((7, 100), (1, 0.1), (7, 1)),  # 0.7 rounded
    ],
)
def test_an_epoch_is_as_long_as_the_proportions_can_be_without_a_row_twice(tables, sizes, weights, shares):
    mixed = mixture(tables(*sizes), weights)
    assert mixed.shares == list(shares) and mixed.epoch_size == sum(shares) and len(mixed) == sum(sizes)
    bounds = [sum(sizes[:n]) for n in range(len(sizes) + 1)]
    for order in drawn(mixed, 3):
        assert len(set(order)) == len(order) or sizes[0] % shares[0], "a pass may end within an epoch"
        for low, high, share in zip(bounds, bounds[1:], shares, strict=False):
            assert sum(low <= i < high for i in order) == share


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=3),
    weights=st.lists(st.floats(0.3, 3), min_size=3, max_size=3),
    shuffle=st.booleans(),
)
def test_all_rows_of_a_data_set_come_before_any_comes_again(tables, sizes, weights, shuffle):
    try:
        mixed = mixture(tables(*sizes), weights[: len(sizes)])
    except UserError as error:
        assert "no example would be drawn" in str(error)
        return
    counts = Counter()
    for order in drawn(mixed, 12, shuffle=shuffle):
        counts.update(order)
        before = 0
        for size in sizes:
            own = [counts[before + i] for i in range(size)]
            assert max(own) - min(own) <= 1
            before += size


def test_an_order_depends_on_the_seed_and_the_epoch_alone(tables):
    mixed = mixture(tables(40, 20), (1, 1))
    orders = drawn(mixed, 4)
    assert drawn(mixture(tables(40, 20), (1, 1)), 4) == orders
    assert drawn(mixed, 1, seed=4) != orders[:1] and orders[0] != orders[2]
    assert sorted(orders[0] + orders[1])[:40] == list(range(40)), "the first data set, once"
    assert drawn(mixed, 2, shuffle=False) == [[*range(20), *range(40, 60)], [*range(20, 40), *range(40, 60)]]
    assert any(abs(a - b) > 25 for a, b in zip(orders[0], orders[0][1:], strict=False)), "mixed, not one by one"


def test_batches_go_on_where_they_were_left(tables):
    mixed = mixture(tables(40, 10), (2, 1))
    whole = list(islice(batches(mixed, 7, shuffle=True, seed=1), 14))
    assert [len(items) for items, _ in whole[:5]] == [7, 7, 7, 7, 2]
    assert [position for _, position in whole[3:6]] == [
        {"epoch": 0, "offset": 28}, {"epoch": 0, "offset": 35}, {"epoch": 1, "offset": 7}
    ]  # fmt: skip
    for number, (_, position) in enumerate(whole[:-1]):
        start = json.loads(json.dumps(position))
        rest = batches(mixed, 7, shuffle=True, seed=1, start=start)
        assert list(islice(rest, 13 - number)) == whole[number + 1 :]


def test_rows_held_out_of_a_mixture_are_not_drawn(tables):
    kept = [i for i in range(50) if i % 5]
    mixed = mixture(tables(40, 10), (1, 1), __import__("numpy").array(kept))
    assert mixed.shares == [8, 8] and len(mixed) == 40
    assert {mixed[i].prompt_ids[0] for order in drawn(mixed, 4) for i in order} == set(kept)


def test_a_weight_too_small_to_draw_anything_is_refused(tables):
    with pytest.raises(UserError, match="^of b.jsonl no example would be drawn in an epoch: give it more weight"):
        mixture(tables(10, 90), (100, 1))


# --- options


@pytest.fixture
def files(tmp_path):
    for name, size in (("a", 9), ("b", 6)):
        rows = [{"prompt": f"{name}{i}", "chosen": "y", "rejected": "no", "answer": 1} for i in range(size)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def config_of(files, method, *options):
    names = [str(files / name) for name in ("a.jsonl", "b.jsonl")]
    return parse_train([method, "--dataset_name", *names, "--output_dir", str(files / "out"), *options])


def test_data_sets_without_weights_are_trained_on_one_with_the_other(files):
    data = load_data(config_of(files, "dpo"), tiny_tokenizer())
    assert len(data.train) == data.epoch_size == 15 and [e.row for e in data.train] == list(range(15))
    assert data.notes == [f"{files}/a.jsonl: 9 examples", f"{files}/b.jsonl: 6 examples"]
    assert str(data.train[9].row) == f"0 ({files}/b.jsonl)"
    order = [e.row for step, _ in islice(batches(data.train, 5, shuffle=True, seed=0), 3) for e in step]
    assert sorted(order) == list(range(15)) != order


def test_weighted_data_sets_train(files):
    run = build(config_of(files, "dpo", "--dataset_weights", "1", "2", "--batch_size", "4", "--num_train_epochs", "1"))
    assert run.total_steps == 3 and run.data.epoch_size == 9
    said = f"an epoch draws 3 of the 9 examples of {files}/a.jsonl, 6 of the 6 examples of {files}/b.jsonl"
    assert said in run.notes
    assert train_run(run, quiet=True)["step"] == 3


def test_a_fingerprint_is_of_all_that_decides_on_the_data(files):
    def found(*options, tokenizer=None):
        return load_data(config_of(files, "dpo", *options), tokenizer or tiny_tokenizer()).fingerprint

    first = found()
    assert first == found() and len(first) == 64
    options = (
        ("--max_length", "3"),
        ("--dataset_weights", "1", "2"),
        ("--dataset_weights", "1", "1"),
        ("--eval_size", "2"),
        ("--eval_size", "2", "--seed", "1"),
    )
    assert len({first, *(found(*each) for each in options)}) == len(options) + 1


def test_trls_form_in_yaml(files, tmp_path):
    (tmp_path / "run.yaml").write_text(
        f"datasets:\n- path: {files}/a.jsonl\n  columns: [prompt, chosen, rejected]\n  fraction: 0.25\n"
        f"- path: {files}\n  split: b\n  fraction: 0.75\n"
    )
    data = load_data(parse_train(["dpo", "--config", str(tmp_path / "run.yaml")]), tiny_tokenizer())
    assert data.train.shares == [2, 6]
    assert data.train.names == [f"{files}/a.jsonl", f"{files}/b.jsonl"]


REFUSED = {
    ("--dataset_weights", "1"): "--dataset_weights has 1 numbers for 2 data sets in --dataset_name",
    ("--dataset_weights", "1", "0"): "the weight 0.0 of a data set must be a finite number above 0; leave the set out",
    ("--dataset_weights", "1", "inf"): "--dataset_weights must be finite, got (1.0, inf)",
    ("--datasets", '{"path": "a"}'): "--dataset_name and --datasets both say what to train on; leave one of them out",
}
FORMS = {
    "a": "--datasets: 'a' is no object such as {path: rows.jsonl, fraction: 0.5}",
    '{"path": "a", "data_dir": "b"}': "--datasets: 'data_dir' is not supported; name the folder as its path",
    '{"path": "a", "data_files": "b"}': "--datasets: 'data_files' is not supported; name the file as its path",
    '{"path": "a", "streaming": true}': "--datasets: unknown key 'streaming', expected one of: path, name, revis",
    '{"name": "a"}': '--datasets: {"name": "a"} has no \'path\'',
    '{"path": 3}': "--datasets: 'path' cannot be 3",
    '{"path": "a", "fraction": true}': "--datasets: 'fraction' cannot be True",
    '{"path": "a", "columns": "prompt"}': "--datasets: 'columns' cannot be 'prompt'",
}


@pytest.mark.parametrize("options", REFUSED)
def test_options_that_contradict_each_other_are_refused(files, options):
    with pytest.raises(UserError) as caught:
        data_sets(config_of(files, "dpo", *options).data)
    assert str(caught.value).startswith(REFUSED[options])


@pytest.mark.parametrize("text", FORMS)
def test_what_of_trls_form_is_not_honoured_is_named(text):
    with pytest.raises(UserError) as caught:
        data_sets(DataConfig(datasets=(text,)))
    assert str(caught.value).startswith(FORMS[text])


def test_fractions_stand_at_all_data_sets_or_at_none():
    with pytest.raises(UserError, match="^--datasets: 'fraction' stands at some data sets and not at others"):
        data_sets(DataConfig(datasets=('{"path": "a", "fraction": 1}', '{"path": "b"}')))


def test_prompts_of_all_data_sets_bring_the_same_columns(files):
    (files / "b.jsonl").write_text('{"prompt": "q", "solution": "1"}')
    (files / "a.jsonl").write_text('{"prompt": "q", "answer": "1"}')
    with pytest.raises(
        UserError, match="b.jsonl has the columns solution beside the prompt, .*a.jsonl has answer: rew"
    ):
        load_data(config_of(files, "grpo"), tiny_tokenizer())


def test_an_error_names_the_data_set(files):
    with (files / "b.jsonl").open("a") as file:
        file.write('{"prompt": "q"}\n')
    with pytest.raises(UserError, match=r"b\.jsonl, line 7 lacks 'chosen'"):
        load_data(config_of(files, "dpo"), tiny_tokenizer())
