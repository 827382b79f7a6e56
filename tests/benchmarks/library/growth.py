"""Rows a second as a table grows. In: sizes. Out: lines of results, and a picture of all.

Ours from codes in memory, beside torch.index_select and a gather that asks for rows ahead of time, both from the fp32
table as long as that fits.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from numpy.typing import NDArray

from dpq_rec import kernels
from dpq_rec.codes import CodeLayout
from dpq_rec.errors import ConfigError
from tests.benchmarks.library.decode import BASELINE, GATHER
from tests.benchmarks.library.shapes import random_codes
from tests.benchmarks.record import add_config_flags, add_results_flag, append, head, line_of
from tests.benchmarks.rounds import POPULARITIES, draw_rows, take_turns

_LINES = {"uniform": "-", "hot": "--"}


@dataclass(frozen=True, kw_only=True)
class GrowthConfig:
    """What is measured: tables of 10 to the least up to 10 to the most rows, with an fp32 table up to another power."""

    least_power: int = 5
    most_power: int = 8
    most_full_power: int = 7
    embedding_dim: int = 64
    num_subspaces: int = 16
    num_ids: int = 16_384
    num_rounds: int = 100

    def __post_init__(self) -> None:
        if min(vars(self).values()) < 1 or self.least_power > self.most_power:
            raise ConfigError(f"sizes: got {self}, want counts from 1, and a most_power from least_power on")
        if self.embedding_dim % self.num_subspaces:
            raise ConfigError(f"num_subspaces: got {self.num_subspaces}, want a divisor of {self.embedding_dim}")


def measure(config: GrowthConfig, power: int) -> list[dict[str, Any]]:
    """Settings and figures of a table of 10^power rows, for each kind of ids."""
    torch.set_num_threads(1)
    generator, num_embeddings = np.random.default_rng(0), 10**power
    contenders = _contenders(config, num_embeddings, generator)
    settings = {name: getattr(config, name) for name in ("embedding_dim", "num_subspaces", "num_ids", "num_rounds")}
    lines = []
    for popularity in POPULARITIES:
        draw = functools.partial(draw_rows, popularity, num_embeddings, config.num_ids, generator)
        rounds = take_turns(contenders, draw, config.num_rounds, f"10^{power} rows, {popularity}")
        figures = {
            name: {"seconds": rounds.median(name), "per_second": config.num_ids / rounds.median(name)}
            for name in contenders
        }
        lines.append({"ids": popularity, "num_embeddings": num_embeddings, **settings, "contenders": figures})
    return lines


def _contenders(
    config: GrowthConfig, num_embeddings: int, generator: np.random.Generator
) -> dict[str, Callable[[NDArray[np.int64]], Any]]:
    layout = CodeLayout(num_subspaces=config.num_subspaces, num_codes=256)
    coded = random_codes(num_embeddings, config.embedding_dim, layout, generator)
    ours = {"decode": lambda rows_N: kernels.decode(coded, rows_N)}
    if num_embeddings > 10**config.most_full_power:
        return ours
    full_VE = generator.standard_normal((num_embeddings, config.embedding_dim), np.float32)
    of_torch_VE = torch.from_numpy(full_VE)
    return {
        **ours,
        BASELINE: lambda rows_N: torch.index_select(of_torch_VE, 0, torch.from_numpy(rows_N)),
        GATHER: lambda rows_N: kernels.decode(full_VE, rows_N),
    }


def draw_picture(lines: list[dict[str, Any]], path: Path) -> None:
    """Rows a second against rows of the table, of each contender and each kind of ids."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for at, name in enumerate(lines[0]["contenders"]):
        for popularity in POPULARITIES:
            points = [
                (line["num_embeddings"], line["contenders"][name]["per_second"])
                for line in lines
                if line["ids"] == popularity and name in line["contenders"]
            ]
            axes.plot(
                *zip(*points, strict=True),
                _LINES[popularity],
                color=f"C{at}",
                marker="o",
                label=f"{name}, {popularity} ids",
            )
    axes.set(xscale="log", xlabel="rows of the table", ylabel="vectors a second, one thread", ylim=(0, None))
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def report(line: dict[str, Any]) -> str:
    """The figures of a line."""
    figures = (f"{name} {of_it['per_second'] / 1e6:.1f}" for name, of_it in line["contenders"].items())
    return f"V={line['num_embeddings']:>11,}, {line['ids']:7s} ids, million rows a second: {', '.join(figures)}"


def main(flags: list[str]) -> None:
    """Measure, print, add to the results and draw."""
    parser = argparse.ArgumentParser("python -m tests.benchmarks.library growth", description=__doc__.split("\n")[0])
    add_config_flags(parser, GrowthConfig())
    add_results_flag(parser)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw a picture, a PNG")
    options = vars(parser.parse_args(flags))
    results, plot, config = options.pop("results"), options.pop("plot"), GrowthConfig(**options)
    lines: list[dict[str, Any]] = []
    for power in range(config.least_power, config.most_power + 1):
        new = [line_of("growth", measured) for measured in measure(config, power)]
        print("\n".join([*([] if lines else [head(new[0])]), *map(report, new)]), flush=True)
        append(results, new)
        lines += new
    if plot is not None:
        plot.parent.mkdir(parents=True, exist_ok=True)
        draw_picture(lines, plot)
