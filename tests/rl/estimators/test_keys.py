from __future__ import annotations

import numpy as np
import pytest
from helpers.toys import global_random_states

from coupled.rl.keys import generator, integer_seed, uniform


def test_equal_keys_give_equal_numbers_whatever_was_drawn_in_between() -> None:
    first = uniform((3, 2), 7, "mask", "row")
    uniform((100,), 7, "mask", "other")
    np.random.default_rng().random(5)
    assert np.array_equal(uniform((3, 2), 7, "mask", "row"), first)


def test_the_numbers_of_a_key_never_change_between_versions() -> None:
    """A change here would change every run, and break the resumption of those under way."""
    assert uniform((3,), 0, "mask", 1, "a").tolist() == [0.6927269611290794, 0.3569858113778188, 0.623022214168261]


@pytest.mark.parametrize("shape", [(), (1,), (4, 5), (2, 3, 4)])
def test_uniform_numbers_have_the_shape_and_lie_in_zero_to_one(shape: tuple[int, ...]) -> None:
    numbers = uniform(shape, "shape")
    assert np.shape(numbers) == shape
    assert np.asarray(numbers).dtype == np.float64
    assert np.min(numbers) >= 0
    assert np.max(numbers) < 1


def test_uniform_numbers_fill_the_range_evenly() -> None:
    counts = np.histogram(uniform((20_000,), "even"), bins=10, range=(0, 1))[0]
    assert (np.square(counts - 2000) / 2000).sum() < 27.9, "chi-square with 9 degrees of freedom, p = 0.001"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((1, "mask"), (2, "mask")),
        ((1, "mask"), (1, "denoise")),
        ((1, 2), (2, 1)),
        ((1, 23), (12, 3)),
        (("a", "b"), ("ab",)),
        (("a", ""), ("a",)),
        ((1,), ("1",)),
    ],
)
def test_different_keys_give_different_numbers(one: tuple[int | str, ...], other: tuple[int | str, ...]) -> None:
    assert not np.array_equal(uniform((4,), *one), uniform((4,), *other))


def test_streams_of_neighbouring_keys_are_uncorrelated() -> None:
    numbers = np.stack([uniform((200,), "stream", i) for i in range(40)])
    correlations = np.corrcoef(numbers)[np.triu_indices(40, k=1)]
    assert np.abs(correlations).max() < 0.3
    assert abs(correlations.mean()) < 0.02


def test_an_integer_seed_is_a_pure_function_of_its_key_and_fits_in_63_bits() -> None:
    assert integer_seed(0, "init") == integer_seed(0, "init")
    assert integer_seed(0, "init") != integer_seed(1, "init")
    assert all(0 <= integer_seed(i) < 2**63 for i in range(100))


def test_keyed_draws_leave_the_global_generators_alone() -> None:
    before = global_random_states()
    uniform((10,), "a")
    generator("b").permutation(10)
    integer_seed("c")
    assert global_random_states() == before
