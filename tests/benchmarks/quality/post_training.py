"""Post-training compression of a finished run's tables. In: the folder of a full run. Out: an artifact, and its bytes.

    python -m tests.benchmarks.quality.post_training RUN pq --ratio 20 --set num_codes=64 --out DIR

Nothing is trained on data: what is measured is the run's artifact with other vectors.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from dpq_rec import ConfigError, DPQConfig, EmbeddingStore
from dpq_rec.codes import CodeLayout
from tests.benchmarks.quality.faiss_codes import FaissCodes, FaissSizes, Kind
from tests.benchmarks.quality.judge import Judge, config_of
from tests.benchmarks.quality.reconstruction import Reconstruction
from tests.benchmarks.quality.scalars import LowRank, Scalar
from tests.benchmarks.quality.sizes import Largest, Shape, fit_to_budget
from tests.benchmarks.quality.stored import Stored, plain, write_stored
from training.checkpoint import METRICS
from training.recipes import load


class Compressor(Protocol):
    """A method with its size, ready for a table."""

    def num_bytes(self, num_embeddings: int, embedding_dim: int) -> int:
        """Bytes of what `fit` returns."""

    def fit(self, vectors_VE: NDArray[np.float32]) -> Stored:
        """Compress a table."""


class Compressed(NamedTuple):
    """What became of a run's tables: each compressed, and the seconds that all took."""

    tables: dict[str, Stored]
    seconds: float


def _faiss(kind: Kind) -> Callable[..., Largest[Compressor]]:
    """Sizes of one of faiss's quantizers; or, given all of D, K and L, that one."""

    def sizes(
        *, num_codes: int, num_subspaces: int | None = None, num_levels: int | None = None
    ) -> Largest[Compressor]:
        if num_levels is None:
            return FaissSizes(kind, num_codes, num_subspaces or 1).largest
        layout = CodeLayout(num_subspaces=num_subspaces or 1, num_codes=num_codes, num_levels=num_levels)
        return lambda *_: FaissCodes(kind, layout)

    return sizes


def _reconstruction(
    *,
    num_epochs: int = 40,
    learning_rate: float = 0.001,
    start: Literal["uniform", "kmeans"] = "kmeans",
    **config: Any,
) -> Callable[..., Reconstruction]:
    """The one size that DPQ's configuration says."""
    found = Reconstruction(DPQConfig(**config), num_epochs, learning_rate, start)
    return lambda *_: found


METHODS: dict[str, Callable[..., Largest[Compressor]]] = {
    "low-rank": lambda: LowRank.largest,
    "int8": lambda: lambda *_: Scalar(8),
    "int4": lambda: lambda *_: Scalar(4),
    "pq": _faiss("pq"),
    "opq": _faiss("opq"),
    "rq": _faiss("rq"),
    "aq": _faiss("aq"),
    "dpq-reconstruction": _reconstruction,
}
"""Method -> what makes of its settings the largest size that fits into so many bytes."""


def compress(run: Path, method: str, settings: Mapping[str, Any], ratio: float | None) -> Compressed:
    """Compress the tables of a full run.

    Where vectors are compared by cosine rows of length one are compressed: their lengths mean nothing or, where items
    are averaged, less than what it costs to keep them.

    Args:
        run: its folder.
        method: one of METHODS.
        settings: of the method; what they leave open is chosen by the ratio.
        ratio: total fp32 bytes to total bytes, at least; None where the method has one size only.

    Raises:
        ConfigError: no size is small enough; or a run of compressed tables.
    """
    tables = EmbeddingStore.open(run / "artifact").tables
    if coded := [name for name, table in tables.items() if table.manifest.kind != "dense"]:
        raise ConfigError(f"{run}: got tables of codes, {', '.join(coded)}; want a run with --embedding full")
    by_cosine = load(str(run / METRICS))["model"].get("similarity") == "cosine"
    vectors = {name: _vectors(table.tensors["vectors"], by_cosine=by_cosine) for name, table in tables.items()}
    shapes: dict[str, Shape] = {name: vectors_VE.shape for name, vectors_VE in vectors.items()}
    largest, began = METHODS[method](**settings), time.monotonic()
    if ratio is None:
        sizes = {name: largest(*shape, 0) for name, shape in shapes.items()}
    else:
        sizes = fit_to_budget(shapes, ratio, largest)
    stored = {}
    for name, size in tqdm(sizes.items(), method, unit="table", leave=False):
        stored[name] = plain(vectors[name]) if size is None else size.fit(vectors[name])
    return Compressed(stored, time.monotonic() - began)


def _vectors(stored_VE: NDArray[np.float32], *, by_cosine: bool) -> NDArray[np.float32]:
    vectors_VE = np.array(stored_VE)
    if by_cosine:
        vectors_VE /= np.maximum(np.linalg.norm(vectors_VE, axis=1, keepdims=True), 1e-12)
    return vectors_VE


def leave(run: Path, out: Path, tables: Mapping[str, Stored]) -> None:
    """Write what a run leaves, the artifact and the weights beside it, with compressed tables."""
    shutil.rmtree(out / "artifact", ignore_errors=True)  # of a case that was killed
    out.mkdir(parents=True, exist_ok=True)
    originals = EmbeddingStore.open(run / "artifact").tables
    vocabularies = {name: table.vocabulary for name, table in originals.items()}
    features = {name: table.manifest.features for name, table in originals.items()}
    write_stored(out / "artifact", tables, vocabularies, features)
    if (run / "model.safetensors").exists():
        shutil.copyfile(run / "model.safetensors", out / "model.safetensors")


def main() -> None:
    """Compress one run and print what it measures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("run", type=Path, help="folder of a finished run with --embedding full")
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("--ratio", type=float, help="compression ratio over all tables, at least")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the method")
    parser.add_argument("--out", type=Path, required=True, help="folder to write artifact and weights into")
    options = parser.parse_args()
    settings = {name: _value(text) for name, _, text in (each.partition("=") for each in options.set)}
    found = compress(options.run, options.method, settings, options.ratio)
    leave(options.run, options.out, found.tables)
    num_bytes = sum(stored.num_bytes for stored in found.tables.values())
    full_bytes = sum(4 * stored.vectors_VE.size for stored in found.tables.values())
    with Judge.of(config_of(options.run)) as judge:
        metrics = {split: judge.measure(options.out, split) for split in ("validation", "test")}
    print(json.dumps({"bytes": num_bytes, "ratio": full_bytes / num_bytes, "seconds": found.seconds, **metrics}))


def _value(text: str) -> Any:
    """A number where the text is one."""
    try:
        return json.loads(text)
    except ValueError:
        return text


if __name__ == "__main__":
    main()
