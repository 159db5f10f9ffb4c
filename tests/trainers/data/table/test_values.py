"""What rewards are given comes back from a file as it was, whatever its type."""

import datetime
import decimal
import json
import uuid

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logratio.trainers.data.table.values import TAG, from_json, to_json

scalars = (
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats(allow_nan=False) | st.text()
    | st.binary() | st.dates() | st.datetimes(timezones=st.none() | st.just(datetime.UTC)) | st.times()
    | st.timedeltas() | st.uuids() | st.decimals(allow_nan=False)
)  # fmt: skip
values = st.recursive(
    scalars,
    lambda inside: (
        st.lists(inside)
        | st.lists(inside).map(tuple)
        | st.dictionaries(st.text() | st.just(TAG), inside)
        | st.dictionaries(st.integers(), inside)
    ),
    max_leaves=8,
)


def typed(value):
    """The value with the types of all that is in it; 1, 1.0 and True are equal."""
    if isinstance(value, dict):
        return {(type(k), k): typed(v) for k, v in value.items()}
    return (type(value), [typed(v) for v in value]) if isinstance(value, list | tuple) else (type(value), value)


@settings(deadline=None)
@given(value=values)
def test_every_value_comes_back_with_its_type(value):
    assert typed(from_json(to_json(value))) == typed(value)


def test_what_json_can_say_is_said_in_json():
    value = {"answer": [1, 2.5, None, True, "\ud800"], "more": {"a": []}}
    assert json.loads(to_json(value)) == value


@pytest.mark.parametrize("value", [object(), {1, 2}, [complex(1, 2)], {"a": range(3)}])
def test_what_no_file_can_hold_is_refused(value):
    with pytest.raises(TypeError):
        to_json(value)


def test_examples_of_each_kind():
    kept = [b"\xff\0", decimal.Decimal("1.10"), uuid.UUID(int=3), datetime.date(2026, 1, 2)]
    assert from_json(to_json(kept)) == kept and str(from_json(to_json(kept))[1]) == "1.10"
