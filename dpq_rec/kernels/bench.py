"""The decode kernel beside `torch.index_select`. In: sizes. Out: times on stdout.

    python -m dpq_rec.kernels.bench [--num-embeddings V] [--embedding-dim E] ...

Both find the vectors of the same number of random rows, on one thread: the kernel from an artifact that is mapped from
its file, as a server has it, torch from the fp32 table that the artifact replaces. They take turns within one run, each
with fresh ids every time, so that neither finds its rows in the cache and both meet the same machine.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dpq_rec.artifact import PRODUCER, Table, TableContents, open_artifact, write_artifact
from dpq_rec.codes import CodeLayout, pack_codes
from dpq_rec.decode import decode_rows
from dpq_rec.errors import ConfigError, MissingDependencyError
from dpq_rec.vocabulary import IdentityVocabulary

_CHUNK_ROWS = 1 << 17
_SEED = 0


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What is measured: V rows of E numbers, D groups of K codes in L levels, and how many ids a lookup asks for."""

    num_embeddings: int = 2_000_000
    embedding_dim: int = 64
    num_subspaces: int = 16
    num_codes: int = 256
    num_levels: int = 1
    num_ids: int = 16_384
    num_rounds: int = 200

    def __post_init__(self) -> None:
        for name in ("num_embeddings", "num_ids", "num_rounds"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: got {getattr(self, name)}, want 1 or more")

    @property
    def layout(self) -> CodeLayout:
        """How the codes of a row are laid out."""
        return CodeLayout(num_subspaces=self.num_subspaces, num_codes=self.num_codes, num_levels=self.num_levels)


class Timing(NamedTuple):
    """Medians over the rounds, and the median of the rounds' ratios."""

    decode_ms: float
    index_select_ms: float
    ratio: float


def measure(config: BenchConfig) -> Timing:
    """Time the two.

    Raises:
        ConfigError: sizes that do not fit each other.
        MissingDependencyError: torch is not installed.
    """
    try:
        import torch
    except ModuleNotFoundError as error:
        raise MissingDependencyError("torch, which this compares with,", "train") from error
    torch.set_num_threads(1)
    generator = np.random.default_rng(_SEED)
    full_VE = torch.randn(config.num_embeddings, config.embedding_dim)

    def fresh_ids() -> NDArray[np.int64]:
        return generator.integers(0, config.num_embeddings, config.num_ids)

    decode_ms, index_select_ms = [], []
    with tempfile.TemporaryDirectory(prefix="dpq-rec-bench-") as folder:
        table = _random_table(config, Path(folder) / "artifact", generator)
        for _ in range(config.num_rounds):
            decode_ms.append(_milliseconds(decode_rows, table, fresh_ids()))
            index_select_ms.append(_milliseconds(torch.index_select, full_VE, 0, torch.from_numpy(fresh_ids())))
    ratios = [select / decode for select, decode in zip(index_select_ms, decode_ms, strict=True)]
    return Timing(statistics.median(decode_ms), statistics.median(index_select_ms), statistics.median(ratios))


def _random_table(config: BenchConfig, path: Path, generator: np.random.Generator) -> Table:
    layout = config.layout
    value_shape = (layout.codes_per_row, layout.num_codes, config.embedding_dim // layout.num_subspaces)

    def chunks() -> Iterator[NDArray[np.uint8]]:
        for start in range(0, config.num_embeddings, _CHUNK_ROWS):
            shape = (min(_CHUNK_ROWS, config.num_embeddings - start), layout.codes_per_row)
            yield pack_codes(generator.integers(0, layout.num_codes, shape, np.uint16), layout)

    contents = TableContents(
        num_embeddings=config.num_embeddings,
        embedding_dim=config.embedding_dim,
        vocabulary=IdentityVocabulary(config.num_embeddings),
        layout=layout,
        values=generator.standard_normal(value_shape, np.float32),
        chunks=chunks(),
    )
    return open_artifact(write_artifact(path, {"table": contents})).tables["table"]


def _milliseconds(run: Callable[..., object], *arguments: object) -> float:
    start = time.perf_counter()
    run(*arguments)
    return 1e3 * (time.perf_counter() - start)


def report(config: BenchConfig, timing: Timing) -> str:
    """The figures, and what is needed to judge them."""
    import torch

    sizes = f"V={config.num_embeddings:,} E={config.embedding_dim} D={config.num_subspaces} K={config.num_codes}"
    rounds = f"{config.num_ids:,} random ids, 1 thread, median of {config.num_rounds} rounds"
    decode_ns, select_ns = (1e6 * ms / config.num_ids for ms in (timing.decode_ms, timing.index_select_ms))
    return "\n".join(
        [
            f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC, {_machine()}",
            f"{PRODUCER}, Python {platform.python_version()}, numpy {np.__version__}, torch {torch.__version__}",
            f"{sizes} L={config.num_levels}, {rounds}",
            "",
            f"decode              {timing.decode_ms:7.3f} ms  {decode_ns:6.1f} ns an id",
            f"torch.index_select  {timing.index_select_ms:7.3f} ms  {select_ns:6.1f} ns an id",
            f"ratio               {timing.ratio:7.2f}     index_select / decode, median of the rounds' ratios",
        ]
    )


def _machine() -> str:
    cpu_info = Path("/proc/cpuinfo")
    models = [s for s in cpu_info.read_text().splitlines() if s.startswith("model name")] if cpu_info.is_file() else []
    model = models[0].split(":")[1].strip() if models else platform.processor()
    return f"{platform.system()} {platform.machine()}, {model}, {len(models)} CPUs"


def main() -> int:
    """Measure and print; 2 where that is not possible."""
    parser = argparse.ArgumentParser("python -m dpq_rec.kernels.bench", description=__doc__.split("\n")[0])
    for field, default in vars(BenchConfig()).items():
        parser.add_argument(f"--{field.replace('_', '-')}", type=int, default=default, help=f"{default:,}")
    try:
        config = BenchConfig(**vars(parser.parse_args()))
        sys.stdout.write(report(config, measure(config)) + "\n")
    except (ConfigError, MissingDependencyError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
