"""Contenders that take turns for seconds, not for calls. In: what measures each. Out: medians and ratios of rounds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

from tqdm import tqdm

from tests.benchmarks.record import head

Figures = dict[str, float]


def take_turns(
    contenders: Mapping[str, Callable[[], Figures]], num_rounds: int, title: str
) -> dict[str, list[Figures]]:
    """The figures of each contender in each round; a first round, which warms up, does not count.

    Args:
        contenders: name -> what measures it; it gives at least `per_second`.
        num_rounds: that count.
        title: of the progress bar.
    """
    rounds: dict[str, list[Figures]] = {name: [] for name in contenders}
    for number in tqdm(range(num_rounds + 1), title, unit="round", leave=False):
        for name, measure in contenders.items():
            figures = measure()
            if number > 0:
                rounds[name].append(figures)
    return rounds


def summary(rounds: Mapping[str, list[Figures]], baselines: Mapping[str, str]) -> dict[str, Any]:
    """Of each contender: medians, and how many times its baseline's each figure is, the median of the rounds' ratios.

    Args:
        rounds: what `take_turns` gave.
        baselines: of each contender that has one.
    """
    found: dict[str, Any] = {}
    for name, of_it in rounds.items():
        found[name] = {figure: statistics.median(each[figure] for each in of_it) for figure in of_it[0]}
        if name in baselines:
            pairs = list(zip(of_it, rounds[baselines[name]], strict=True))
            times = {
                figure: statistics.median(mine[figure] / theirs[figure] for mine, theirs in pairs)
                for figure in of_it[0]
            }
            found[name] |= {"baseline": baselines[name], "times_baseline": times}
    return found


def report(line: dict[str, Any]) -> str:
    """The figures of a line, and what is needed to judge them."""
    sizes = "V={num_embeddings:,} E={embedding_dim} D={num_subspaces} K={num_codes}".format_map(line)
    turns = "{num_rounds} rounds of {seconds} s, {num_connections} connections".format_map(line)
    rows = [head(line), f"{sizes}, {line['num_ids']:,} {line['ids']} ids, {turns}"]
    for name, of_it in line["contenders"].items():
        figures = [f"{figure} {value:,.6g}" for figure, value in of_it.items() if isinstance(value, float)]
        times = "".join(
            f", {value:.2f} times its {figure}" for figure, value in of_it.get("times_baseline", {}).items()
        )
        versus = f"; beside {of_it['baseline']}{times}" if times else ""
        rows.append(f"  {name}: {', '.join(figures)}{versus}")
    return "\n".join(rows)
