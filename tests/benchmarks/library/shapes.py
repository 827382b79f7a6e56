"""Rows to vectors, from codes of several shapes. In: sizes. Out: times, ratios to the first shape; lines of results.

The shapes take turns, so that their ratios hold on a machine whose speed drifts.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpq_rec import kernels
from dpq_rec.codes import CodeLayout
from dpq_rec.errors import ConfigError
from tests.benchmarks.record import add_config_flags, add_results_flag, append, head, line_of
from tests.benchmarks.rounds import POPULARITIES, Popularity, draw_rows, take_turns

LAYOUTS = (
    CodeLayout(num_subspaces=16, num_codes=256),
    CodeLayout(num_subspaces=16, num_codes=32),
    CodeLayout(num_subspaces=16, num_codes=16),
    CodeLayout(num_subspaces=16, num_codes=1024),
    CodeLayout(num_subspaces=4, num_codes=256, num_levels=3),
    CodeLayout(num_subspaces=8, num_codes=256),
    CodeLayout(num_subspaces=32, num_codes=16),
)


@dataclass(frozen=True, kw_only=True)
class ShapesConfig:
    """What is measured: V rows of E numbers, and how many ids a lookup asks for."""

    num_embeddings: int = 2_000_000
    embedding_dim: int = 64
    num_ids: int = 16_384
    num_rounds: int = 200

    def __post_init__(self) -> None:
        if min(vars(self).values()) < 1 or self.embedding_dim % 32:
            raise ConfigError(f"sizes: got {self}, want counts from 1, and an embedding_dim that 32 divides")


def measure(config: ShapesConfig, popularity: Popularity) -> dict[str, Any]:
    """Settings and figures of one kind of ids."""
    generator = np.random.default_rng(0)
    sizes = config.num_embeddings, config.embedding_dim
    contenders = {name_of(layout): _decode(random_codes(*sizes, layout, generator)) for layout in LAYOUTS}
    rounds = take_turns(
        contenders,
        lambda: draw_rows(popularity, config.num_embeddings, config.num_ids, generator),
        config.num_rounds,
        f"{popularity} rows",
    )
    return {
        "ids": popularity,
        **vars(config),
        "contenders": rounds.summary(name_of(LAYOUTS[0]), config.num_ids),
    }


def name_of(layout: CodeLayout) -> str:
    """A layout's letters and numbers."""
    return f"D={layout.num_subspaces} K={layout.num_codes} L={layout.num_levels}"


def random_codes(
    num_embeddings: int, embedding_dim: int, layout: CodeLayout, generator: np.random.Generator
) -> kernels.Coded:
    """Vectors as random codes; K is a power of two, so that any bytes are codes."""
    packed_VW = generator.integers(0, 256, (num_embeddings, layout.row_bytes), np.uint8)
    shape = (layout.codes_per_row, layout.num_codes, embedding_dim // layout.num_subspaces)
    return kernels.Coded.of(packed_VW, generator.standard_normal(shape, np.float32), layout)


def _decode(stored: kernels.Coded) -> Callable[[NDArray[np.int64]], Any]:
    return lambda rows_N: kernels.decode(stored, rows_N)


def report(line: dict[str, Any]) -> str:
    """The figures of a line, and what is needed to judge them."""
    sizes = "V={num_embeddings:,} E={embedding_dim}, {num_ids:,} {ids} ids, median of {num_rounds} rounds"
    figures = [
        f"{name:18s}{1e3 * of_it['seconds']:8.3f} ms{1 / of_it['times_baseline']:8.2f} times the first's time"
        for name, of_it in line["contenders"].items()
    ]
    return "\n".join([head(line), sizes.format_map(line), *figures])


def main(flags: list[str]) -> None:
    """Measure, print, and add to the results."""
    parser = argparse.ArgumentParser("python -m tests.benchmarks.library shapes", description=__doc__.split("\n")[0])
    add_config_flags(parser, ShapesConfig())
    add_results_flag(parser)
    options = vars(parser.parse_args(flags))
    results, config = options.pop("results"), ShapesConfig(**options)
    for popularity in POPULARITIES:
        line = line_of("shapes", measure(config, popularity), ["dpq-rec", "numpy"])
        append(results, [line])
        print(report(line), end="\n\n")
