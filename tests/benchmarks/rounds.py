"""Contenders, taking turns. In: what each does with ids. Out: seconds of each in each round, and what they make of it.

Timings on a shared machine drift, so nothing is measured alone: in every round each contender has its turn, with fresh
ids of its own, so that none finds its rows in the cache. Ratios are taken within a round.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

T = TypeVar("T")
Popularity = Literal["uniform", "hot"]
POPULARITIES: tuple[Popularity, ...] = get_args(Popularity)


def draw_rows(
    popularity: Popularity, num_embeddings: int, num_ids: int, generator: np.random.Generator
) -> NDArray[np.int64]:
    """Rows to look up (int64 [N]): each as likely as the others, or row r in proportion to 1 / (r + 1).

    Tables are sorted by frequency: the hot rows are the first.
    """
    if popularity == "uniform":
        return generator.integers(0, num_embeddings, num_ids)
    ranks = np.exp(generator.random(num_ids) * np.log(num_embeddings + 1))  # Zipf's law, by its inverse
    hot_N: NDArray[np.int64] = np.minimum(ranks.astype(np.int64) - 1, num_embeddings - 1)
    return hot_N


class Rounds(NamedTuple):
    """Seconds of each contender, round by round."""

    seconds: dict[str, list[float]]

    def median(self, name: str) -> float:
        """Median seconds of a contender."""
        return statistics.median(self.seconds[name])

    def times_faster(self, name: str, than: str) -> float:
        """How many times a contender is as fast as another: the median of the rounds' ratios."""
        pairs = zip(self.seconds[than], self.seconds[name], strict=True)
        return statistics.median(slow / fast for slow, fast in pairs)

    def summary(self, baseline: str, num_items: int) -> dict[str, Any]:
        """Of each contender: median seconds, items a second, and how many times the baseline that is."""
        return {
            name: {
                "seconds": self.median(name),
                "per_second": num_items / self.median(name),
                "times_baseline": self.times_faster(name, baseline),
            }
            for name in self.seconds
        }


def take_turns(
    contenders: Mapping[str, Callable[[T], object]],
    draw: Callable[[], T],
    num_rounds: int,
    title: str = "",
    clock: Callable[[], float] = time.perf_counter,
) -> Rounds:
    """Time contenders, in their order, each round again; drawing is not timed, and a first round is not counted.

    Args:
        contenders: name -> what is timed, called with what `draw` gives.
        draw: fresh input for each turn.
        num_rounds: that are counted.
        title: of the progress bar.
        clock: seconds; time.thread_time leaves out what other processes take of the processor.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in tqdm(range(num_rounds + 1), title, unit="round", leave=False):
        for name, run in contenders.items():
            drawn = draw()
            start = clock()
            run(drawn)
            taken = clock() - start
            if number > 0:
                seconds[name].append(taken)
    return Rounds(seconds)
