"""The best ids for a query, beside what else finds them. In: sizes. Out: times and ratios; lines of results.

Ours adds up scores of packed codes. numpy multiplies the fp32 table with the query and selects by argpartition; faiss's
IndexPQ holds the same codes and values, and adds up fp32 scores too. One query at a time, one thread.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from dpq_rec.codes import unpack_codes
from dpq_rec.errors import ConfigError
from dpq_rec.table import Table
from tests.benchmarks.library.decode import DecodeConfig, random_table
from tests.benchmarks.record import add_results_flag, append, head, line_of
from tests.benchmarks.rounds import POPULARITIES, Popularity, draw_rows, take_turns

BASELINE = "numpy, fp32 table"
PACKAGES = ("dpq-rec", "numpy", "faiss-cpu")
_SEED = 0


@dataclass(frozen=True, kw_only=True)
class SearchConfig(DecodeConfig):
    """What is measured: V rows of E numbers, D groups of K codes in L levels, and how many answers a query wants."""

    num_embeddings: int = 1_000_000
    num_ids: int = 1
    num_rounds: int = 50
    k: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_ids != 1 or self.k < 1:
            raise ConfigError(f"num_ids, k: got {self.num_ids}, {self.k}, want one query and 1 answer or more")


def measure(config: SearchConfig, popularity: Popularity) -> dict[str, Any]:
    """Settings and figures; queries are the vectors of uniformly drawn rows, or of hot ones.

    Raises:
        ConfigError: sizes that do not fit each other.
    """
    generator = np.random.default_rng(_SEED)
    faiss.omp_set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="dpq-rec-bench-") as folder, threadpool_limits(1):
        table = random_table(config, Path(folder) / "artifact", generator)
        full_VE = table.decode(np.arange(config.num_embeddings))

        def by_numpy(query_1E: NDArray[np.float32]) -> NDArray[np.int64]:
            scores_V = full_VE @ query_1E[0]
            best_T = np.argpartition(scores_V, -config.k)[-config.k :]
            return np.asarray(best_T[np.argsort(-scores_V[best_T])])

        contenders = {
            "search, dot": lambda query_1E: table.search(query_1E, config.k),
            "search, cosine": lambda query_1E: table.search(query_1E, config.k, similarity="cosine"),
            BASELINE: by_numpy,
        }
        if (index := faiss_index(table)) is not None:
            contenders["faiss IndexPQ"] = lambda query_1E: index.search(query_1E, config.k)
        rounds = take_turns(
            contenders,
            lambda: full_VE[draw_rows(popularity, config.num_embeddings, 1, generator)],
            config.num_rounds,
            f"{popularity} queries",
        )
    settings = {name: value for name, value in vars(config).items() if name != "num_ids"}
    return {"ids": popularity, "threads": 1, **settings, "contenders": rounds.summary(BASELINE, config.num_embeddings)}


def faiss_index(table: Table) -> Any | None:
    """An IndexPQ of the same codes and values; None where faiss has none, of residual levels or odd widths of codes."""
    layout, values_MKS = table.manifest.layout, table.values_fp32
    if layout.num_levels > 1 or layout.num_codes != 1 << layout.code_bits or len(values_MKS) == 1:
        return None
    index = faiss.IndexPQ(
        table.manifest.embedding_dim, layout.num_subspaces, layout.code_bits, faiss.METRIC_INNER_PRODUCT
    )
    faiss.copy_array_to_vector(values_MKS.ravel(), index.pq.centroids)
    index.is_trained = True
    codes_VM = unpack_codes(table.tensors["packed_codes"], layout)
    packed = faiss.pack_bitstrings(codes_VM.astype(np.int32), layout.code_bits)
    faiss.copy_array_to_vector(packed.ravel(), index.codes)
    index.ntotal = len(codes_VM)
    return index


def report(line: dict[str, Any]) -> str:
    """The figures of a line, and what is needed to judge them."""
    sizes = "V={num_embeddings:,} E={embedding_dim} D={num_subspaces} K={num_codes} L={num_levels}".format_map(line)
    rounds = f"the best {line['k']}, {line['ids']} queries, {line['threads']} thread, median of {line['num_rounds']}"
    figures = [
        f"{name:20s}{1e3 * of_it['seconds']:8.2f} ms{1e9 / of_it['per_second']:8.2f} ns a row"
        f"{of_it['times_baseline']:7.2f} times as fast as {BASELINE}"
        for name, of_it in line["contenders"].items()
    ]
    return "\n".join([head(line), f"{sizes}, {rounds} rounds", *figures])


def main(flags: list[str]) -> None:
    """Measure, print, and add to the results."""
    parser = argparse.ArgumentParser("python -m tests.benchmarks.library search", description=__doc__.split("\n")[0])
    for field, default in vars(SearchConfig()).items():
        if field != "num_ids":
            parser.add_argument(f"--{field.replace('_', '-')}", type=int, default=default, help=f"{default:,}")
    add_results_flag(parser)
    options = vars(parser.parse_args(flags))
    results, config = options.pop("results"), SearchConfig(**options)
    for popularity in POPULARITIES:
        line = line_of("search", measure(config, popularity), PACKAGES)
        append(results, [line])
        print(report(line), end="\n\n")
