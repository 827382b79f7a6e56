"""Contenders that take turns, and the ids they get."""

import numpy as np
import pytest

from tests.benchmarks.rounds import Rounds, draw_rows, take_turns


def test_each_turn_has_input_of_its_own_and_the_first_round_does_not_count():
    drawn, seen = iter(range(100)), []
    contenders = {"a": lambda n: seen.append(("a", n)), "b": lambda n: seen.append(("b", n))}
    rounds = take_turns(contenders, lambda: next(drawn), 2)
    assert seen == [("a", 0), ("b", 1), ("a", 2), ("b", 3), ("a", 4), ("b", 5)]
    assert [len(seconds) for seconds in rounds.seconds.values()] == [2, 2]


def test_ratio_is_the_median_of_the_rounds_ratios():
    rounds = Rounds({"fast": [1.0, 2.0, 1.0], "slow": [3.0, 2.0, 100.0]})
    assert rounds.times_faster("fast", "slow") == 3
    assert rounds.summary("slow", 6)["fast"] == {"seconds": 1, "per_second": 6, "times_baseline": 3}


@pytest.mark.parametrize("num_embeddings", [1, 2, 1000])
@pytest.mark.parametrize("popularity", ["uniform", "hot"])
def test_rows_are_rows_of_the_table(popularity, num_embeddings):
    rows_N = draw_rows(popularity, num_embeddings, 2000, np.random.default_rng(0))
    assert rows_N.dtype == np.int64
    assert set(rows_N.tolist()) <= set(range(num_embeddings))


def test_hot_rows_follow_zipfs_law():
    rows_N = draw_rows("hot", 1000, 200_000, np.random.default_rng(0))
    counts_V = np.bincount(rows_N, minlength=1000)
    assert counts_V[0] / counts_V[9] == pytest.approx(np.log(2) / np.log(11 / 10), rel=0.1)
    assert counts_V[:10].sum() / 200_000 == pytest.approx(np.log(11) / np.log(1001), rel=0.02)
