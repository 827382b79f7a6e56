"""Rows to vectors, beside what an fp32 table costs. In: sizes. Out: times and ratios; lines of results.

All find the vectors of the same number of rows: ours from an artifact that is mapped from its file, as a server has
it, on one thread and on two, in fp32 and in fp16; torch, and a gather in C++ that asks for rows ahead of time, from the
fp32 table that the artifact replaces; FBGEMM from tables of 8 and 4 bits. To decode one row again and again takes the
instructions and the writes: the rest of a lookup's time is the wait for codes.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dpq_rec import kernels
from dpq_rec.artifact import open_artifact, write_artifact
from dpq_rec.codes import CodeLayout
from dpq_rec.table import Table
from dpq_rec.vocabulary import IdentityVocabulary
from tests.benchmarks.library import fbgemm
from tests.benchmarks.record import PACKAGES, add_config_flags, add_results_flag, append, check_counts, head, line_of
from tests.benchmarks.rounds import POPULARITIES, Popularity, draw_rows, take_turns
from tests.benchmarks.tables import random_contents

BASELINE = "torch.index_select"
GATHER = "fp32 gather with prefetch"
NO_MISSES = "decode of one row"
_SEED = 0


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """What is measured: V rows of E numbers, D groups of K codes in L levels, and how many ids a lookup asks for."""

    num_embeddings: int = 2_000_000
    embedding_dim: int = 64
    num_subspaces: int = 16
    num_codes: int = 256
    num_levels: int = 1
    num_ids: int = 16_384
    num_rounds: int = 200

    def __post_init__(self) -> None:
        check_counts(self, "num_embeddings", "num_ids", "num_rounds")

    @property
    def layout(self) -> CodeLayout:
        """How the codes of a row are laid out."""
        return CodeLayout(num_subspaces=self.num_subspaces, num_codes=self.num_codes, num_levels=self.num_levels)


def measure(config: DecodeConfig, popularity: Popularity) -> dict[str, Any]:
    """Settings and figures of one kind of ids.

    Raises:
        ConfigError: sizes that do not fit each other.
    """
    torch.set_num_threads(1)
    generator = np.random.default_rng(_SEED)
    with tempfile.TemporaryDirectory(prefix="dpq-rec-bench-") as folder:
        table = random_table(config, Path(folder) / "artifact", generator)
        rounds = take_turns(
            _contenders(config, table),
            lambda: draw_rows(popularity, config.num_embeddings, config.num_ids, generator),
            config.num_rounds,
            f"{popularity} rows",
        )
    figures = rounds.summary(BASELINE, config.num_ids)
    for name, of_it in figures.items():
        of_it["times_gather"] = rounds.times_faster(name, GATHER)
    return {"ids": popularity, **vars(config), "contenders": figures}


def _contenders(config: DecodeConfig, table: Table) -> dict[str, Callable[[NDArray[np.int64]], Any]]:
    full_VE = torch.randn(config.num_embeddings, config.embedding_dim)
    one_row_N = np.zeros(config.num_ids, np.int64)
    return {
        "decode": lambda rows_N: table.decode(rows_N),
        "decode, fp16": lambda rows_N: table.decode(rows_N, dtype=np.float16),
        NO_MISSES: lambda _: table.decode(one_row_N),
        "decode, 2 threads": lambda rows_N: table.decode(rows_N, num_threads=2),
        "decode, fp16, 2 threads": lambda rows_N: table.decode(rows_N, dtype=np.float16, num_threads=2),
        BASELINE: lambda rows_N: torch.index_select(full_VE, 0, torch.from_numpy(rows_N)),
        GATHER: lambda rows_N: kernels.decode(full_VE.numpy(), rows_N),
        **fbgemm.lookups(config.num_embeddings, config.embedding_dim, config.num_ids),
    }


def random_table(config: DecodeConfig, path: Path, generator: np.random.Generator) -> Table:
    """A table of random codes and values, mapped from its file."""
    vocabulary = IdentityVocabulary(config.num_embeddings)
    shape = (config.num_embeddings, config.embedding_dim)
    contents = random_contents(shape, config.layout, vocabulary, generator)
    return open_artifact(write_artifact(path, {"table": contents})).tables["table"]


def report(line: dict[str, Any]) -> str:
    """The figures of a line, and what is needed to judge them."""
    sizes = "V={num_embeddings:,} E={embedding_dim} D={num_subspaces} K={num_codes} L={num_levels}".format_map(line)
    rounds = f"{line['num_ids']:,} {line['ids']} ids, median of {line['num_rounds']} rounds"
    titles = f"{'':28s}{'ms':>8s}{'ns an id':>10s}   times as fast as {BASELINE}, as the {GATHER}"
    figures = [
        f"{name:28s}{1e3 * of_it['seconds']:8.3f}{1e9 / of_it['per_second']:10.1f}"
        f"{of_it['times_baseline']:8.2f}{of_it['times_gather']:8.2f}"
        for name, of_it in line["contenders"].items()
    ]
    return "\n".join([head(line), f"{sizes}, {rounds}", titles, *figures])


def main(flags: list[str]) -> None:
    """Measure, print, and add to the results."""
    parser = argparse.ArgumentParser("python -m tests.benchmarks.library decode", description=__doc__.split("\n")[0])
    add_config_flags(parser, DecodeConfig())
    add_results_flag(parser)
    options = vars(parser.parse_args(flags))
    results, config = options.pop("results"), DecodeConfig(**options)
    for popularity in POPULARITIES:
        line = line_of("decode", measure(config, popularity), [*PACKAGES, fbgemm.PACKAGE])
        append(results, [line])
        print(report(line), end="\n\n")
