"""What is measured, and the artifact it is measured on. In: flags. Out: BenchConfig; an artifact; ids to ask for."""

from __future__ import annotations

import argparse
import functools
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dpq_rec import CodeLayout, ConfigError, Int64Vocabulary, write_artifact
from tests.benchmarks.record import add_config_flags, add_results_flag, check_counts
from tests.benchmarks.rounds import Popularity, draw_rows
from tests.benchmarks.tables import random_contents

TABLE = "item_id"
_LARGEST_ID = 1 << 40
_SEED = 0


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """V rows of E numbers as D groups of K codes; ids of a request; how often and how long each has its turn."""

    num_embeddings: int = 1_000_000
    embedding_dim: int = 64
    num_subspaces: int = 16
    num_codes: int = 256
    num_ids: int = 256
    num_connections: int = 16
    num_rounds: int = 5
    seconds: int = 3

    def __post_init__(self) -> None:
        check_counts(self, *vars(self))

    @property
    def layout(self) -> CodeLayout:
        """How the codes of a row are laid out."""
        return CodeLayout(num_subspaces=self.num_subspaces, num_codes=self.num_codes)


def parse(name: str, text: str, flags: list[str]) -> tuple[BenchConfig, Path | None]:
    """The configuration that flags give, and the file for results.

    Raises:
        ConfigError: sizes that make no sense, or fewer than two cores.
    """
    parser = argparse.ArgumentParser(f"python -m tests.benchmarks.service {name}", description=text)
    add_config_flags(parser, BenchConfig())
    add_results_flag(parser)
    options = vars(parser.parse_args(flags))
    results = options.pop("results")
    cores()
    return BenchConfig(**options), results


@functools.cache
def cores() -> tuple[int, int]:
    """Two cores: for what is measured, and for what measures, as they were before anything was put on one.

    Raises:
        ConfigError: this process may run on one alone.
    """
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) < 2:
        raise ConfigError(f"got {len(allowed)} core, want two: what is measured must not share its core")
    return allowed[0], allowed[1]


def use_second_core() -> None:
    """Put this process, and the programs that it will start, on the core of what measures; servers choose theirs."""
    os.sched_setaffinity(0, {cores()[1]})


def need(program: str, package: str) -> str:
    """The path of a program.

    Raises:
        ConfigError: it is not installed.
    """
    path = shutil.which(program)
    if path is None:
        raise ConfigError(f"{program} is not installed; install it: apt-get install {package} (Debian, Ubuntu)")
    return path


def make_ids(config: BenchConfig) -> NDArray[np.int64]:
    """The id of each row (int64 [V]), of no order."""
    generator = np.random.default_rng(_SEED)
    ids_V = np.unique(generator.integers(0, _LARGEST_ID, 2 * config.num_embeddings + 64))
    return generator.permutation(ids_V)[: config.num_embeddings]


def make_artifact(config: BenchConfig, ids_V: NDArray[np.int64], path: Path) -> Path:
    """An artifact of one table of random codes and values."""
    shape, vocabulary = (config.num_embeddings, config.embedding_dim), Int64Vocabulary.from_ids(ids_V)
    contents = random_contents(shape, config.layout, vocabulary, np.random.default_rng(_SEED))
    return write_artifact(path, {TABLE: contents})


def draw_ids(
    popularity: Popularity, ids_V: NDArray[np.int64], num_ids: int, generator: np.random.Generator
) -> NDArray[np.int64]:
    """Ids to ask for (int64 [N])."""
    return ids_V[draw_rows(popularity, len(ids_V), num_ids, generator)]
