"""Rows that a program gives as a list are those that a file would give."""

import datetime
import json
from types import MappingProxyType

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset

from logratio.losses import Kind
from logratio.trainers.classes.objects import rows_of
from logratio.trainers.data.own_rows import OwnRows
from logratio.trainers.data.rows import Rows, load_rows
from logratio.trainers.errors import RowError, UserError
from logratio.trainers.ground.given import giving


def test_rows_are_dicts_of_pythons_own_values():
    when = datetime.datetime(2026, 1, 2)
    rows = OwnRows(
        "own", [MappingProxyType({"label": np.bool_(True)}), {"a": [np.float32(0.5)], "b": np.eye(2), "t": when}]
    )
    assert rows[0] == {"label": True} and type(rows[0]["label"]) is bool
    assert rows[1] == {"a": [0.5], "b": [[1.0, 0.0], [0.0, 1.0]], "t": when}
    assert list(rows) == rows[0:2] and len(rows) == 2


def test_one_that_is_no_mapping_is_a_bad_row_and_not_the_end():
    rows = OwnRows("own", [{"a": 1}, "x"])
    assert isinstance(rows[1], RowError) and str(rows[1]).startswith("own, row 1 (counted from 0) must be one object")
    assert rows.digest != OwnRows("own", [{"a": 1}, "y"]).digest


def test_the_digest_is_of_what_the_rows_say():
    own = OwnRows("own", [{"a": np.int64(1), "t": datetime.date(2026, 1, 2)}])
    assert own.digest == OwnRows("other", ({"a": 1, "t": datetime.date(2026, 1, 2)},)).digest
    assert own.digest != OwnRows("own", [{"a": 1, "t": datetime.date(2026, 1, 3)}]).digest
    with pytest.raises(
        UserError, match=r"^own, row 0 \(counted from 0\) has a value that cannot be kept \(object\): leave"
    ):
        OwnRows("own", [{"a": object()}]).digest  # noqa: B018


def test_a_list_and_a_dataset_are_read_alike():
    rows = [{"prompt": "a", "completion": "b", "n": i} for i in range(3)]
    with giving({"object:list": {"train": rows}, "object:set": {"train": Dataset.from_list(rows)}}):
        both = [list(load_rows(name, Kind.SEQUENCE)) for name in ("object:list", "object:set")]
    assert both[0] == both[1] == json.loads(json.dumps(rows))


def test_a_transform_counts_by_what_it_makes():
    """Its name and place in memory, which datasets knows it by, may be those of one that is gone."""

    def said(suffix):
        def transform(batch):
            return {"text": [text + suffix for text in batch["text"]]}

        rows = Dataset.from_list([{"text": "a"}]).with_transform(transform)
        return Rows("own", rows).digest()

    digests = {said(str(i)) for i in range(30)}
    assert len(digests) == 30 and said("1") in digests


def test_a_table_that_is_taken_from_by_column_is_refused():
    with pytest.raises(UserError, match=r"^train_dataset= must be rows, got a Table of pyarrow: give datasets.Dataset"):
        rows_of(pa.table({"text": ["a"]}), "train_dataset")
