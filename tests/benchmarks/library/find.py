"""Ids to rows, beside numpy.searchsorted and a dict. In: sizes. Out: ids a second, bytes an id; lines of results.

All find the rows of the same number of ids, on one thread, some of which are unknown. Ours, with its index and without,
and numpy search a list that is mapped from its file, as a server has it. Ids follow from their place in the list by
arithmetic: drawing them brings no part of the list into the cache.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from dpq_rec.errors import ConfigError
from dpq_rec.kernels import MISSING_ROW
from dpq_rec.kernels.ids import find_string_rows, sorted_integers
from dpq_rec.kernels.lookup import find_integer_rows
from dpq_rec.tensorfile import map_tensors, write_tensors
from dpq_rec.vocabulary import Int64Vocabulary, StringVocabulary, Vocabulary, load_vocabulary
from tests import references
from tests.benchmarks.record import add_config_flags, add_results_flag, append, check_counts, head, line_of
from tests.benchmarks.rounds import POPULARITIES, Popularity, draw_rows, take_turns

Kind = Literal["int64", "string"]
KINDS: tuple[Kind, ...] = get_args(Kind)
BASELINES = {"int64": "numpy.searchsorted", "string": "dict"}
PACKAGES = ("dpq-rec", "numpy")
_MOST_IN_DICT = 10_000_000  # integers; a dict takes 100 bytes an id and more
_CHUNK_IDS = 1 << 20
_SEED = 0


@dataclass(frozen=True, kw_only=True)
class FindConfig:
    """What is measured: a list of U ids, how many a lookup asks for, and how many of 100 of those are unknown."""

    num_known: int = 1_000_000
    num_ids: int = 16_384
    percent_unknown: int = 10
    num_rounds: int = 200

    def __post_init__(self) -> None:
        check_counts(self, "num_known", "num_ids", "num_rounds")
        if not 0 <= self.percent_unknown <= 100:
            raise ConfigError(f"percent_unknown: got {self.percent_unknown}, want 0 to 100")


def measure(config: FindConfig, kind: Kind) -> list[dict[str, Any]]:
    """Settings and figures of one kind of vocabulary, for each kind of popularity."""
    with tempfile.TemporaryDirectory(prefix="dpq-rec-bench-") as folder:
        file = Path(folder) / "vocabulary.safetensors"
        write_tensors(file, (_integers if kind == "int64" else _strings)(config.num_known).tensors())
        vocabulary = load_vocabulary(kind, config.num_known, map_tensors(file))
        num_bytes = sum(tensor.nbytes for tensor in vocabulary.tensors().values())
        settings = {"kind": kind, "threads": 1, **vars(config), "vocabulary_bytes": num_bytes}
        contenders = _contenders(vocabulary, config.num_known)
        return [
            {"ids": popularity, **settings, "contenders": _time(contenders, config, kind, popularity)}
            for popularity in POPULARITIES
        ]


def _time(
    contenders: Mapping[str, Callable[[Any], object]], config: FindConfig, kind: Kind, popularity: Popularity
) -> dict[str, Any]:
    generator = np.random.default_rng(_SEED)
    ids_of = _draw_integers if kind == "int64" else _draw_strings

    def draw() -> Any:
        rows_N = draw_rows(popularity, config.num_known, config.num_ids, generator)
        return ids_of(rows_N, generator.random(config.num_ids) * 100 < config.percent_unknown, config.num_known)

    rounds = take_turns(contenders, draw, config.num_rounds, f"{popularity} {kind} ids", time.thread_time)
    return rounds.summary(BASELINES[kind], config.num_ids)


def _contenders(vocabulary: Vocabulary, num_known: int) -> dict[str, Callable[[Any], object]]:
    """Each takes ids and gives their rows [N] (int64)."""
    contenders: dict[str, Callable[[Any], object]] = {"find": vocabulary.rows}
    tensors = vocabulary.tensors()
    if vocabulary.kind == "int64":
        known_U, rows_U = tensors["ids"], tensors["rows"]
        without_tree = sorted_integers(known_U, rows_U)
        contenders["find, no index"] = lambda ids_N: find_integer_rows(ids_N, without_tree)
        contenders["numpy.searchsorted"] = lambda ids_N: references.find_integer_rows(ids_N, known_U, rows_U)
    else:
        packed = tensors["id_bytes"], tensors["id_offsets"], tensors["rows"]
        contenders["find, no index"] = lambda ids: find_string_rows(ids, *packed)
    if num_known <= _MOST_IN_DICT or vocabulary.kind == "string":
        row_of_id = _row_of_id(vocabulary.kind, num_known)
        contenders["dict"] = lambda ids: _look_up(row_of_id, ids)
    return contenders


def _look_up(row_of_id: Mapping[Any, int], ids: NDArray[np.int64] | list[str]) -> NDArray[np.int64]:
    wanted = ids.tolist() if isinstance(ids, np.ndarray) else ids
    return np.array([row_of_id.get(i, MISSING_ROW) for i in wanted], np.int64)


def _row_of_id(kind: str, num_known: int) -> dict[Any, int]:
    rows_U = np.arange(num_known)
    ids = integers_at(places_of(rows_U, num_known), num_known).tolist() if kind == "int64" else texts_of(rows_U)
    return dict(zip(ids, rows_U.tolist(), strict=True))


# Integers: rows are spread over the list, whose ids are spread over all of int64


def _integers(num_known: int) -> Int64Vocabulary:
    ids_U, rows_U = np.empty(num_known, np.int64), np.empty(num_known, np.uint32)
    for start in range(0, num_known, _CHUNK_IDS):
        places_N = np.arange(start, min(start + _CHUNK_IDS, num_known))
        ids_U[places_N] = integers_at(places_N, num_known)
        rows_U[places_N] = places_N * pow(_stride(num_known), -1, num_known) % num_known
    return Int64Vocabulary(ids_U, rows_U).indexed()


def _draw_integers(rows_N: NDArray[np.int64], unknown_N: NDArray[np.bool_], num_known: int) -> NDArray[np.int64]:
    return integers_at(places_of(rows_N, num_known), num_known) + unknown_N


def integers_at(places_N: NDArray[np.int64], num_known: int) -> NDArray[np.int64]:
    """The ids [N] (int64) at places in an ascending list of num_known: each somewhere in a part of the numbers."""
    width = np.uint64(2**64 // (num_known + 1))
    ids_N = places_N.astype(np.uint64) * width + _mixed(places_N) % width
    signed_N: NDArray[np.int64] = (ids_N ^ np.uint64(1 << 63)).view(np.int64)
    return signed_N


def places_of(rows_N: NDArray[np.int64], num_known: int) -> NDArray[np.int64]:
    """Where in the list the ids of rows are: rows that follow each other are far apart."""
    return rows_N * _stride(num_known) % num_known


def _stride(num_known: int) -> int:
    """A number that has no factor in common with num_known, near the golden section of it."""
    stride = max(1, int(num_known * 0.618))
    while np.gcd(stride, num_known) != 1:
        stride += 1
    return stride


def _mixed(numbers_N: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Numbers that look random (uint64), different for different ones (splitmix64)."""
    mixed_N = numbers_N.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed_N = (mixed_N ^ (mixed_N >> np.uint64(shift))) * np.uint64(factor)
    return mixed_N ^ (mixed_N >> np.uint64(31))


# Strings: of 12 to 36 bytes, made anew for each lookup, as a server makes them from a request


def _strings(num_known: int) -> StringVocabulary:
    return StringVocabulary.from_ids(texts_of(np.arange(num_known)))


def _draw_strings(rows_N: NDArray[np.int64], unknown_N: NDArray[np.bool_], num_known: int) -> list[str]:
    return texts_of(rows_N + unknown_N * num_known)


def texts_of(rows_N: NDArray[np.int64]) -> list[str]:
    """The string of each row, different for different ones."""
    heads_N = rows_N.astype(np.uint64) * np.uint64(0x9E3779B1) % np.uint64(1 << 32)
    tails_N = _mixed(rows_N)
    pairs = zip(heads_N.tolist(), tails_N.tolist(), strict=True)
    return [f"{begin:08x}-{tail:027d}"[: 12 + tail % 25] for begin, tail in pairs]


def report(line: dict[str, Any]) -> str:
    """The figures of a line, and what is needed to judge them."""
    sizes = "{num_known:,} {kind} ids, {vocabulary_bytes:,} bytes".format_map(line)
    sizes += f" ({line['vocabulary_bytes'] / line['num_known']:.2f} an id)"
    rounds = "{num_ids:,} {ids} ids, {percent_unknown} % unknown, {threads} thread, median of {num_rounds} rounds"
    figures = [
        f"{name:20s}{1e3 * of_it['seconds']:8.3f} ms{1e9 / of_it['per_second']:8.1f} ns an id"
        f"{of_it['per_second'] / 1e6:7.1f} million a second"
        f"{of_it['times_baseline']:7.2f} times as fast as {BASELINES[line['kind']]}"
        for name, of_it in line["contenders"].items()
    ]
    return "\n".join([head(line), sizes, rounds.format_map(line), *figures])


def main(flags: Sequence[str]) -> None:
    """Measure, print, and add to the results."""
    parser = argparse.ArgumentParser("python -m tests.benchmarks.library find", description=__doc__.split("\n")[0])
    add_config_flags(parser, FindConfig())
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="both")
    add_results_flag(parser)
    options = vars(parser.parse_args(flags))
    results, kinds, config = options.pop("results"), options.pop("kinds"), FindConfig(**options)
    for kind in kinds:
        for measured in measure(config, kind):
            line = line_of("find", measured, PACKAGES)
            append(results, [line])
            print(report(line), end="\n\n")
