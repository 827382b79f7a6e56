"""Ids to vectors, as who calls `EmbeddingStore.lookup` pays for it. In: sizes. Out: times, ratios; lines of results.

Everything that a caller waits for is in it: the ids as they are given, the vocabulary, the codes, a new array for the
vectors. Beside it stands what no lookup can be faster than: to make an array of the same size and to write it once.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpq_rec.artifact import write_artifact
from dpq_rec.codes import CodeLayout
from dpq_rec.lookup import EmbeddingStore
from dpq_rec.vocabulary import Int64Vocabulary
from tests.benchmarks.library.find import integers_at, places_of
from tests.benchmarks.record import add_config_flags, add_results_flag, append, check_counts, head, line_of
from tests.benchmarks.rounds import POPULARITIES, Popularity, draw_rows, take_turns
from tests.benchmarks.tables import random_contents

BASELINE = "write the output"
PACKAGES = ("dpq-rec", "numpy")
_TABLE = "table"
_SEED = 0


@dataclass(frozen=True, kw_only=True)
class LookupConfig:
    """What is measured: V rows of E numbers, D groups of K codes, and how many ids a lookup asks for."""

    num_embeddings: int = 2_000_000
    embedding_dim: int = 64
    num_subspaces: int = 16
    num_codes: int = 256
    num_ids: int = 16_384
    num_rounds: int = 200

    def __post_init__(self) -> None:
        check_counts(self, "num_embeddings", "num_ids", "num_rounds")


def measure(config: LookupConfig) -> list[dict[str, Any]]:
    """Settings and figures, for each kind of ids.

    Raises:
        ConfigError: sizes that do not fit each other.
    """
    generator, num_rows = np.random.default_rng(_SEED), config.num_embeddings
    layout = CodeLayout(num_subspaces=config.num_subspaces, num_codes=config.num_codes)
    with tempfile.TemporaryDirectory(prefix="dpq-rec-bench-") as folder:
        vocabulary = Int64Vocabulary.from_ids(_ids_of(np.arange(num_rows), num_rows))
        contents = random_contents((num_rows, config.embedding_dim), layout, vocabulary, generator)
        store = EmbeddingStore.open(write_artifact(Path(folder) / "artifact", {_TABLE: contents}))
        return [
            {"ids": popularity, **vars(config), "contenders": _time(store, config, popularity, generator)}
            for popularity in POPULARITIES
        ]


def _time(
    store: EmbeddingStore, config: LookupConfig, popularity: Popularity, generator: np.random.Generator
) -> dict[str, Any]:
    def draw() -> NDArray[np.int64]:
        rows_N = draw_rows(popularity, config.num_embeddings, config.num_ids, generator)
        return _ids_of(rows_N, config.num_embeddings)

    rounds = take_turns(_contenders(store, config), draw, config.num_rounds, f"{popularity} ids")
    return rounds.summary(BASELINE, config.num_ids)


def _contenders(store: EmbeddingStore, config: LookupConfig) -> dict[str, Callable[[NDArray[np.int64]], Any]]:
    vector_bytes = 4 * config.embedding_dim
    return {
        "lookup": lambda ids_N: store.lookup(_TABLE, ids_N),
        "lookup, fp16": lambda ids_N: store.lookup(_TABLE, ids_N, dtype="float16"),
        "lookup, 2 threads": lambda ids_N: store.lookup(_TABLE, ids_N, num_threads=2),
        BASELINE: lambda ids_N: np.empty((len(ids_N), vector_bytes), np.uint8).fill(0),  # which is memset
        f"{BASELINE}, fp16": lambda ids_N: np.empty((len(ids_N), vector_bytes // 2), np.uint8).fill(0),
    }


def _ids_of(rows_N: NDArray[np.int64], num_rows: int) -> NDArray[np.int64]:
    """Ids [N] (int64) of rows: spread over all integers, and in the vocabulary far from those of the rows beside."""
    return integers_at(places_of(rows_N, num_rows), num_rows)


def report(line: dict[str, Any]) -> str:
    """The figures of a line, and what is needed to judge them."""
    sizes = "V={num_embeddings:,} E={embedding_dim} D={num_subspaces} K={num_codes}, int64 ids".format_map(line)
    rounds = f"{line['num_ids']:,} {line['ids']} ids, median of {line['num_rounds']} rounds"
    titles = f"{'':24s}{'ms':>8s}{'ns an id':>10s}   times the time to {BASELINE}"
    figures = [
        f"{name:24s}{1e3 * of_it['seconds']:8.3f}{1e9 / of_it['per_second']:10.1f}{1 / of_it['times_baseline']:8.2f}"
        for name, of_it in line["contenders"].items()
    ]
    return "\n".join([head(line), f"{sizes}, {rounds}", titles, *figures])


def main(flags: list[str]) -> None:
    """Measure, print, and add to the results."""
    parser = argparse.ArgumentParser("python -m tests.benchmarks.library lookup", description=__doc__.split("\n")[0])
    add_config_flags(parser, LookupConfig())
    add_results_flag(parser)
    options = vars(parser.parse_args(flags))
    results, config = options.pop("results"), LookupConfig(**options)
    for measured in measure(config):
        line = line_of("lookup", measured, PACKAGES)
        append(results, [line])
        print(report(line), end="\n\n")
