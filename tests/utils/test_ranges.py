"""Ranges that stand on a dataclass's fields: each kind, values without one, and fields that hold dataclasses."""

from dataclasses import dataclass
from math import inf, nan
from typing import Annotated

import pytest

from cafe.errors import RecipeError
from cafe.utils.ranges import Above, AtLeast, Below, Between, HalfOpen, check_ranges


@dataclass
class Inner:
    count: Annotated[int | None, Above(0)] = None


@dataclass
class Outer:
    free: float = -1.0
    seed: Annotated[int, AtLeast(0), Below(100_000)] = 0
    weights: Annotated[tuple[float, ...] | None, AtLeast(0)] = None
    one: Inner | str = "auto"
    many: tuple[Inner, ...] = ()


@pytest.mark.parametrize(
    ("allowed", "inside", "outside", "words"),
    [
        (Above(0), [1e-300, inf], [0, -1, nan], "above 0"),
        (AtLeast(0), [0, inf], [-1e-300, nan], "0 or more"),
        (Below(2**32), [2**32 - 1, -inf], [2**32, nan], "below 4,294,967,296"),
        (Between(0, 1), [0, 0.5, 1], [-0.1, 1.1, nan], "between 0 and 1"),
        (HalfOpen(0, 1), [0, 0.5], [-0.1, 1, nan], "0 or more and below 1"),
    ],
)
def test_each_range_knows_its_numbers_and_its_words(allowed, inside, outside, words):
    assert all(value in allowed for value in inside)
    assert not any(value in allowed for value in outside)
    assert str(allowed) == words


def test_values_in_their_ranges_pass_and_none_is_in_every_one():
    check_ranges(Outer())
    check_ranges(Outer(seed=99_999, weights=(0, 1.5), one=Inner(1), many=(Inner(), Inner(2))), "outer")


@pytest.mark.parametrize(
    ("value", "path", "sentence"),
    [
        (Outer(seed=-1), "", "seed should be 0 or more, not -1."),
        (Outer(seed=100_000), "outer", "outer.seed should be below 100,000, not 100000."),
        (Outer(weights=(1, -2)), "outer", "outer.weights should be 0 or more, not -2."),
        (Outer(one=Inner(0)), "", "one.count should be above 0, not 0."),
        (Outer(many=(Inner(), Inner(-3))), "outer", "outer.many[1].count should be above 0, not -3."),
    ],
)
def test_a_number_out_of_its_range_is_named_with_its_path(value, path, sentence):
    with pytest.raises(RecipeError) as error:
        check_ranges(value, path)
    assert str(error.value) == sentence


def test_infinity_is_refused_unless_it_means_something():
    @dataclass
    class Settings:
        rate: Annotated[float, Above(0)] = 1.0
        bound: Annotated[float, Above(0, finite=False)] = 1.0

    check_ranges(Settings(bound=inf))
    with pytest.raises(RecipeError, match="rate should be finite, not inf"):
        check_ranges(Settings(rate=inf))
    with pytest.raises(RecipeError, match="bound should be above 0, not nan"):
        check_ranges(Settings(bound=nan))
