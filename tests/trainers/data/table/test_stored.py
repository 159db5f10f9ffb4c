"""A table gives back the examples that were written, by index, and what is known of all of them."""

import copy
import os
import pickle
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logratio.losses import Kind
from logratio.trainers.data.examples import Completion, Example, Prompt, Rows, prepare, prepare_prompts
from logratio.trainers.data.table import stored, writer
from logratio.trainers.data.table.extremes import Extremes, extremes_of
from logratio.trainers.data.table.stored import Examples, Row, Table
from logratio.trainers.data.table.writer import TableWriter
from logratio.trainers.errors import UserError
from logratio.trainers.policy.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
ids = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=6)


@st.composite
def alone(draw):
    """An example of one completion, perhaps with a mask, weights or a label."""
    own = draw(ids)
    lists = {"min_size": len(own), "max_size": len(own)}
    scored = draw(st.none() | st.lists(st.booleans(), **lists))
    weights = draw(st.none() | st.lists(st.floats(0, 1e300), **lists))
    label, row = draw(st.sampled_from([None, True, False])), draw(st.integers(0, 2**40))
    return Example(draw(ids), [Completion(own, scored, weights)], label, row)


several = st.builds(
    Example,
    ids,
    st.lists(st.builds(Completion, ids), min_size=2, max_size=4),
    st.none(),
    st.integers(0, 99),
    margin=st.none() | st.floats(allow_nan=False, allow_infinity=False),
)
prompts = st.builds(
    Prompt,
    ids,
    st.text() | st.just([{"role": "user", "content": "é"}]),
    st.dictionaries(st.text(), st.none() | st.integers() | st.text()),
    st.integers(0, 99),
)


def write(path: Path, examples, rows: int = 100) -> Table:
    with TableWriter(path) as table:
        for example in examples:
            table.add(example)
        table.close({"rows": rows})
    return Table(path)


def of(*tables: Table) -> Examples:
    return Examples(tables, [f"{'abc'[n]}.jsonl" for n in range(len(tables))])


@settings(deadline=None)
@given(examples=st.lists(alone() | several, min_size=1, max_size=9) | st.lists(prompts, min_size=1, max_size=5))
def test_what_was_written_is_read(tmp_path_factory, examples):
    path = tmp_path_factory.mktemp("table") / "t"
    kept = (writer.BATCH_ROWS, writer.BATCH_TOKENS)
    digests = set()
    try:
        for writer.BATCH_ROWS in (1, 3, 100):
            table = write(path, examples)
            assert list(of(table)) == examples
            assert table.extremes == extremes_of(examples)
            assert stored.is_whole(path)
            digests.add(table.about["digest"])
    finally:
        writer.BATCH_ROWS, writer.BATCH_TOKENS = kept
    assert len(digests) == 1, "how the table is cut into record batches"


CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "an answer"}]
CASES = {
    "pairs": (Kind.PAIRED, [{"prompt": "p" * i, "chosen": "yes", "rejected": "no"} for i in range(1, 7)], {}),
    "gold": (Kind.PAIRED, [{"prompt": "p", "chosen": "a", "rejected": "b", "reference": "c"}], {"gold": True}),
    "labels": (Kind.LABELED, [{"prompt": "p", "completion": "c" * i, "label": i % 2 == 0} for i in range(1, 5)], {}),
    "chat": (Kind.SEQUENCE, [{"messages": CHAT * i} for i in (1, 2)], {"assistant_only_loss": True}),
    "weights": (Kind.SEQUENCE, [{"text": "ab", "weight": 0.1}, {"text": "cd"}], {}),
}


@pytest.mark.parametrize("case", CASES)
def test_examples_of_rows_are_those_that_prepare_makes(tmp_path, case):
    kind, rows, options = CASES[case]
    examples, _ = prepare(Rows("data", rows), kind, TOKENIZER, **options)
    assert list(of(write(tmp_path / "t", examples))) == examples


def test_prompts_keep_their_columns(tmp_path):
    rows = [{"prompt": [CHAT[0]], "answer": None, "more": {"a": [1, None]}}, {"prompt": "x", "answer": 1.5, "more": ()}]
    made = [p for row in rows for p in prepare_prompts(Rows("data", [row]), TOKENIZER)[0]]
    assert list(of(write(tmp_path / "t", made))) == made
    assert made[0].columns == {"answer": None, "more": {"a": [1, None]}}
    odd = Prompt([1], "p", {"answer": object()}, 7)
    with pytest.raises(UserError, match=r"^row 7 of the data set \(counted from 0\) has a value of type object in its"):
        write(tmp_path / "t", [odd])
    assert not (tmp_path / "t").exists()


def numbered(n, start=0):
    return [Example([1 + i], [Completion([2, 3 + i])], row=i) for i in range(start, start + n)]


def test_parts_are_chosen_by_index_without_a_copy(tmp_path):
    made = numbered(10)
    whole = of(write(tmp_path / "t", made))
    assert len(whole) == 10 and whole[-1] == made[9] and whole[3] == made[3]
    assert list(whole[2:8:2]) == made[2:8:2] and list(whole[::-1]) == made[::-1]
    part = whole.take([7, 1, 7])
    assert isinstance(part, Examples) and list(part) == [made[7], made[1], made[7]]
    assert list(part.take([2, 1])) == [made[7], made[1]] and part[-1] == made[7] and not whole[:0]
    for index in (10, -11):
        with pytest.raises(IndexError):
            whole[index]
    with pytest.raises(IndexError):
        part[3]


def test_a_fingerprint_is_of_the_examples_and_their_order(tmp_path):
    made = numbered(4)
    tables = [write(tmp_path / name, made) for name in "ab"]
    assert of(tables[0]).fingerprint == of(tables[1]).fingerprint
    other = write(tmp_path / "c", made[::-1])
    cut = write(tmp_path / "d", [*made[:3], Example([4], [Completion([2])], row=3)])
    moved = write(tmp_path / "e", [*made[:3], Example([4, 2], [Completion([6])], row=3)])
    masked = write(tmp_path / "f", [*made[:3], Example([4], [Completion([2, 6], [True, True])], row=3)])
    views = [of(tables[0]), of(other), of(cut), of(moved), of(masked), of(*tables), of(tables[0]).take([0, 1, 2])]
    assert len({view.fingerprint for view in views}) == len(views)


def test_rows_of_several_data_sets_are_told_apart(tmp_path):
    made = [numbered(3), numbered(2)]
    both = of(*(write(tmp_path / str(n), part, rows=10) for n, part in enumerate(made)))
    assert [e.prompt_ids for e in both] == [e.prompt_ids for part in made for e in part]
    assert [e.row for e in both] == [0, 1, 2, 10, 11], "one number each"
    assert f"row {both[3].row} of the data set" == "row 0 (b.jsonl) of the data set"
    assert str(both.extremes.token[1]) == "2 (a.jsonl)"
    for again in (copy.deepcopy(both[4].row), pickle.loads(pickle.dumps(both[4].row))):
        assert (int(again), str(again)) == (11, "1 (b.jsonl)") and isinstance(again, Row)


def test_extremes_are_of_the_first_that_has_so_much():
    found = extremes_of([Example([9, 1], [Completion([1])], row=4), Example([1, 9], [Completion([3, 3])], row=5)])
    assert found == Extremes((9, 4), (4, 5), (2, 4), 2)
    assert extremes_of([]) == Extremes() == Extremes() | Extremes()
    assert extremes_of([Prompt([5], "p", {}, 2)]) == Extremes((5, 2), (1, 2), (1, 2), 0)


def resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="tells no resident memory")
def test_reading_a_table_does_not_fill_memory(tmp_path):
    long = list(range(1000, 6000))
    with TableWriter(tmp_path / "t") as table:
        for i in range(3000):
            table.add(Example([i], [Completion(long)], row=i))
        table.close({"rows": 3000})
    assert (tmp_path / "t").stat().st_size > 55 * 2**20
    view = of(Table(tmp_path / "t"))
    assert view[0].completions[0].ids == long
    before, most = resident_mib(), 0.0
    for i in range(len(view)):
        view[i]
        most = max(most, resident_mib() - before)
    assert most < 25 and stored.GIVEN_BACK <= 128
