"""Lists of different lengths, held to lists of lists."""

import doctest

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from training.data import ragged
from training.data.ragged import Bag, pair, ranges, unpair

LISTS = st.lists(st.lists(st.integers(0, 99), max_size=3), max_size=8)


def bag_of(lists: list[list[int]]) -> Bag:
    rows_T = np.array([each for values in lists for each in values], np.int64)
    return Bag.of(rows_T, np.array([len(each) for each in lists], np.int64))


def lists_of(bag: Bag) -> list[list[int]]:
    assert bag.rows_T.dtype == bag.offsets.dtype == bag.lengths.dtype == np.int64
    return [each.tolist() for each in np.split(bag.rows_T, bag.offsets[1:])[:-1]]


@given(LISTS, st.data())
def test_take_follows_the_order_given(lists: list[list[int]], data: st.DataObject) -> None:
    order = data.draw(st.lists(st.sampled_from(range(len(lists))))) if lists else []
    assert lists_of(bag_of(lists).take(np.array(order, np.int64))) == [lists[i] for i in order]


@given(LISTS, st.integers(0, 8), st.integers(0, 8))
def test_slice_and_join_are_those_of_lists(lists: list[list[int]], start: int, stop: int) -> None:
    start, stop = sorted((min(start, len(lists)), min(stop, len(lists))))
    parts = [bag_of(lists).slice(*each) for each in ((0, start), (start, stop), (stop, len(lists)))]
    assert lists_of(parts[1]) == lists[start:stop]
    assert lists_of(Bag.join(parts)) == lists


@given(LISTS)
def test_keep_leaves_every_example_some_of_its_rows(lists: list[list[int]]) -> None:
    bag = bag_of(lists)
    assert lists_of(bag.keep(bag.rows_T % 3 == 0)) == [[each for each in values if each % 3 == 0] for values in lists]


@given(LISTS)
def test_pairs_are_sorted_by_example_and_row_and_make_the_bag_again(lists: list[list[int]]) -> None:
    pairs_T = np.unique(bag_of(lists).pairs())
    wanted = sorted({(number, row) for number, rows in enumerate(lists) for row in rows})
    assert list(zip(*(each.tolist() for each in unpair(pairs_T)), strict=True)) == wanted
    assert lists_of(Bag.of_pairs(pairs_T, len(lists))) == [sorted(set(rows)) for rows in lists]


def test_pair_holds_the_largest_row_of_an_artifact() -> None:
    assert unpair(pair(np.array([5]), np.array([2**32 - 1]))) == (5, 2**32 - 1)


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 6)), max_size=20))
def test_ranges_come_one_after_the_other(found: list[tuple[int, int]]) -> None:
    firsts_N, lengths_N = np.array(found, np.int64).reshape(-1, 2).T
    wanted = [each for first, length in found for each in range(first, first + length)]
    assert ranges(firsts_N, lengths_N).tolist() == wanted


def test_one_number_begins_all_ranges() -> None:
    assert ranges(7, np.array([2, 0, 3])).tolist() == [7, 8, 7, 8, 9]


def test_the_worked_example_runs() -> None:
    found = doctest.testmod(ragged)
    assert (found.attempted > 2, found.failed) == (True, 0)
