"""Stretches end to end, held to ranges written one after the other."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from training.data.stretches import places


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 6)), max_size=20))
def test_places_are_ranges_one_after_the_other(stretches: list[tuple[int, int]]) -> None:
    firsts_N, lengths_N = np.array(stretches, np.int64).reshape(-1, 2).T
    wanted = [place for first, length in stretches for place in range(first, first + length)]
    assert places(firsts_N, lengths_N).tolist() == wanted


def test_one_number_begins_all_stretches() -> None:
    assert places(7, np.array([2, 0, 3])).tolist() == [7, 8, 7, 8, 9]
