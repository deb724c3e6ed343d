"""Filters: dates, folders, sizes and the columns of records, against Python's own comparisons."""

import json
import operator
import time
from datetime import UTC, date, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cafe.errors import CafeError
from cafe.index.filters import Condition, Filters, local_time

TIMES = st.datetimes(datetime(1900, 1, 1), datetime(2100, 1, 1))


def allows(
    filters, path="/photos/2024/Italy/boat.jpg", taken_at=datetime(2024, 5, 31), width=640, height=480, **columns
):
    """Whether filters allow an image."""
    return filters.compile().allows(path, taken_at, width, height, json.dumps(columns) if columns else None)


@given(TIMES, TIMES)
def test_after_is_from_the_beginning_of_a_year_month_or_day_on_and_before_ends_there(limit, taken_at):
    beginnings = {
        f"{limit:%Y}": datetime(limit.year, 1, 1),
        f"{limit:%Y-%m}": datetime(limit.year, limit.month, 1),
        f"{limit.year}-{limit.month}-{limit.day}": datetime(limit.year, limit.month, limit.day),
        limit.isoformat(): limit,
        limit.date(): datetime(limit.year, limit.month, limit.day),
        limit: limit,
    }
    for text, beginning in beginnings.items():
        assert allows(Filters(after=text), taken_at=taken_at) == (taken_at >= beginning)
        assert allows(Filters(before=text), taken_at=taken_at) == (taken_at < beginning)
        assert allows(Filters(after=text), taken_at=beginning) and not allows(Filters(before=text), taken_at=beginning)


def test_a_time_with_a_time_zone_is_meant_there_and_images_are_in_local_time(monkeypatch):
    monkeypatch.setenv("TZ", "America/New_York")
    time.tzset()
    try:
        noon = datetime(2024, 7, 1, 12)  # 16:00 in UTC
        aware = datetime(2024, 7, 1, 16, tzinfo=UTC)
        for same in (
            "2024-07-01T16:00Z",
            "2024-07-01T18:00+02:00",
            aware,
            aware.astimezone(timezone(timedelta(hours=9))),
        ):
            assert allows(Filters(after=same), taken_at=noon)
            assert not allows(Filters(after=same), taken_at=noon - timedelta(seconds=1))
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize(
    "text", ["May", "2024-13", "2024-02-30", "0000", "24", "", "2024-05-31T99:00", "0001-01-01T00:00+14:00"]
)
def test_what_is_no_date_is_one_sentence(text):
    with pytest.raises(CafeError, match="is not of the form 2024, 2024-05, 2024-05-31"):
        Filters(before=text).compile()


@given(st.text())
def test_any_text_is_a_date_or_that_error(text):
    try:
        Filters(after=text).compile()
    except CafeError as error:
        assert "is not of the form" in str(error)


def test_date_objects_are_taken_as_they_are():
    assert allows(Filters(after=date(2024, 5, 31), before=date(2024, 6, 1)))


@pytest.mark.parametrize(
    ("folder", "is_in"),
    [
        ("Italy", True),
        ("italy", True),
        ("tal", True),
        ("2024", True),
        ("boat", False),  # the file's own name
        ("France", False),
        ("/photos/2024", True),
        ("/photos/2024/", True),
        ("/photos/202", False),
        ("/photos/2024/Italy/boat.jpg", False),
        ("/", True),
    ],
)
def test_a_folder_is_a_part_of_a_name_or_with_a_slash_a_path(folder, is_in):
    assert allows(Filters(folder=folder)) == is_in


def test_folders_may_be_relative_and_names_composed_or_not(tmp_path, monkeypatch):
    path = str(tmp_path / "Cafe\u0301 STRASSE" / "boat.jpg")  # as macOS writes é
    monkeypatch.chdir(tmp_path.parent)
    monkeypatch.setenv("HOME", str(tmp_path))
    for folder in (".", "..", "~", f"./{tmp_path.name}", "~/Cafe\u0301 STRASSE", "Caf\u00e9", "straße"):
        assert allows(Filters(folder=folder), path=path), folder
    assert not allows(Filters(folder="."), path="/elsewhere/boat.jpg")


@given(*[st.integers(0, 3)] * 4)
def test_sizes_are_least_ones(width, height, min_width, min_height):
    expected = width >= min_width and height >= min_height
    assert allows(Filters(min_width=min_width, min_height=min_height), width=width, height=height) == expected


OPERATORS = {
    "=": operator.eq,
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    ">": operator.gt,
    "<=": operator.le,
    ">=": operator.ge,
}


@given(
    st.integers(-20, 20) | st.floats(-20, 20),
    st.integers(-20, 20) | st.floats(-20, 20),
    st.sampled_from(list(OPERATORS)),
)
def test_numbers_are_compared_as_numbers(actual, value, sign):
    assert allows(Filters(where=(f"year {sign} {value}",)), year=actual) == OPERATORS[sign](actual, value)
    assert allows(Filters(where=(f"year{sign}{value}",)), year=str(actual)) == OPERATORS[sign](actual, value)


@given(st.text("abcxyz", min_size=1), st.text("abcxyz", min_size=1), st.sampled_from(list(OPERATORS)))
def test_texts_are_compared_as_texts(actual, value, sign):
    assert allows(Filters(where=(f"name{sign}{value}",)), name=actual) == OPERATORS[sign](actual, value)


def test_all_conditions_hold_and_none_of_a_column_that_is_not_there():
    assert allows(Filters(where=("license=cc-by", "year>=2020")), license="cc-by", year=2021)
    assert not allows(Filters(where=("license=cc-by", "year>=2022")), license="cc-by", year=2021)
    assert not allows(Filters(where=("color!=red",)), license="cc-by")
    assert not allows(Filters(where=("color=red",)))
    assert allows(Filters(where=("public=true",)), public=True) and allows(
        Filters(where=("public=False",)), public=False
    )
    assert not allows(Filters(where=("public=true",)), public=False)


@pytest.mark.parametrize("text", ["license", "=cc-by", "", "~ 3"])
def test_what_is_no_condition_is_one_sentence(text):
    with pytest.raises(CafeError, match="is not of the form COLUMN=VALUE"):
        Filters(where=(text,)).compile()


def test_a_number_beyond_any_float_is_compared_as_a_text():
    assert allows(Filters(where=("size>1",)), size=10**400) == (str(10**400) > "1")


def test_a_condition_of_much_white_space_is_read_in_time():
    # A pattern that tries all ways to read it would take minutes.
    space = " " * 20_000
    assert Condition.parse(f"{space}a b{space}>={space}1 2{space}") == Condition("a b", ">=", "1 2")
    for text in (space, f"{space}=1", f"a{space}b"):
        with pytest.raises(CafeError):
            Condition.parse(text)


def test_no_filters_allow_all():
    assert Filters().compile().allows_all and not Filters(folder="x").compile().allows_all


@given(st.floats(-1e18, 1e18) | st.integers(-(10**12), 10**12))
def test_a_files_time_is_a_date_however_odd(seconds):
    assert isinstance(local_time(seconds), datetime)


def test_a_files_time_is_local():
    assert local_time(1.7e9) == datetime.fromtimestamp(1.7e9)
