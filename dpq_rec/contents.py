"""One table to its file. In: TableContents. Out: tables/TABLE.safetensors, and the entry of it in the manifest."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpq_rec.codes import CodeLayout
from dpq_rec.errors import ConfigError, DamagedArtifactError
from dpq_rec.manifest import DENSE, DPQ, DPQ_TIERS, MAX_EMBEDDING_DIM, MAX_VALUES, TableManifest
from dpq_rec.tensorfile import Stream, write_tensors
from dpq_rec.tiers import Tier, as_entries, cut_into_tiers, of_entries, packed_streams
from dpq_rec.vocabulary import Vocabulary


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableContents:
    """What goes into one table of an artifact.

    Attributes:
        num_embeddings: V, rows.
        embedding_dim: E.
        vocabulary: the map from ids to rows.
        chunks: the rows in order, in pieces of any size: packed codes [N, W] (uint8), or vectors [N, E] (float32) of a
            dense table. No piece holds rows of two tiers.
        layout: how the codes of a row are laid out, of the first tier where there are several; None is a dense table.
        tiers: of the rows, where there are several.
        values: float32 or float16 [L*D, K, S], or [L, K, S] where the subspaces share them; None for a dense table.
        features: the names under which a model looks the table up.
    """

    num_embeddings: int
    embedding_dim: int
    vocabulary: Vocabulary
    chunks: Iterable[NDArray[Any]]
    layout: CodeLayout | None = None
    values: NDArray[Any] | None = None
    features: tuple[str, ...] = ()
    tiers: tuple[Tier, ...] = ()


def write_table(folder: Path, name: str, contents: TableContents) -> TableManifest:
    """Write a table's file.

    Args:
        folder: of the artifact.
        name: of the table.
        contents: what goes into it.

    Raises:
        ConfigError: contents that `open_artifact` or `verify` would refuse.
        ValueError: chunks that do not add up to the rows.
    """
    rows, dim, layout, values = contents.num_embeddings, contents.embedding_dim, contents.layout, contents.values
    try:
        _check_contents(contents)
    except (ConfigError, DamagedArtifactError) as error:
        raise ConfigError(f"table {name!r}: {error}") from error
    tensors: dict[str, NDArray[Any] | Stream] = dict(contents.vocabulary.indexed().tensors())
    if layout is None:
        tensors["vectors"] = Stream(np.float32, (rows, dim), _finite_chunks(name, contents.chunks))
    else:
        assert values is not None
        tensors["values"] = values
        tensors |= packed_streams(contents.tiers or cut_into_tiers(layout, rows), contents.chunks)
    file = f"tables/{name}.safetensors"
    written = write_tensors(folder / file, tensors)
    return TableManifest(
        file=file,
        bytes=written.num_bytes,
        sha256=written.sha256,
        kind=DENSE if layout is None else DPQ_TIERS if contents.tiers else DPQ,
        num_embeddings=int(rows),
        embedding_dim=int(dim),
        num_subspaces=layout.num_subspaces if layout else 0,
        num_levels=layout.num_levels if layout else 0,
        num_codes=layout.num_codes if layout else 0,
        code_bits=layout.code_bits if layout else 0,
        row_bytes=layout.row_bytes if layout else 4 * int(dim),
        shared_values=bool(layout and values is not None and values.shape != value_shapes(layout, dim)[0]),
        features=contents.features,
        vocabulary={"kind": contents.vocabulary.kind},
        tiers=as_entries(contents.tiers),
    )


def _check_contents(contents: TableContents) -> None:
    """All but the chunks, which come as they are written.

    Raises:
        ConfigError, DamagedArtifactError: sizes, values, tiers or vocabulary that cannot be.
    """
    rows, dim, layout, values = contents.num_embeddings, contents.embedding_dim, contents.layout, contents.values
    if isinstance(rows, bool) or not isinstance(rows, int | np.integer) or rows < 0:
        raise ConfigError(f"num_embeddings: got {rows!r}, want a count")
    if isinstance(dim, bool) or not isinstance(dim, int | np.integer) or not 1 <= dim <= MAX_EMBEDDING_DIM:
        raise ConfigError(f"embedding_dim: got {dim!r}, want 1 to {MAX_EMBEDDING_DIM}")
    contents.vocabulary.check(rows)
    if layout is None:
        return
    if dim % layout.num_subspaces:
        raise ConfigError(f"num_subspaces {layout.num_subspaces} does not divide {dim}")
    shapes = value_shapes(layout, dim)
    if values is None or values.shape not in shapes or values.dtype not in (np.float32, np.float16):
        got = "nothing" if values is None else f"{values.dtype} {values.shape}"
        raise ConfigError(f"values: got {got}, want float32 or float16 in one of {shapes}")
    if values.size > MAX_VALUES:
        raise ConfigError(f"values: got {values.size} numbers, want at most {MAX_VALUES}")
    at = find_not_finite(values)
    if at is not None:
        raise ConfigError(f"values{list(at)}: got {values[at]}, want finite numbers")
    if contents.tiers:
        of_entries(as_entries(contents.tiers), layout, rows, "contents")


def _finite_chunks(name: str, chunks: Iterable[NDArray[Any]]) -> Iterator[NDArray[Any]]:
    row = 0
    for chunk in chunks:
        at = find_not_finite(chunk)
        if at is not None:
            raise ConfigError(f"table {name!r}: row {row + at[0]}: got {chunk[at]}, want finite numbers")
        row += len(chunk)
        yield chunk


def find_not_finite(numbers: NDArray[Any]) -> tuple[int, ...] | None:
    """Where the first NaN or infinity among numbers stands; None where there is none."""
    finite = np.isfinite(numbers)
    return None if finite.all() else tuple(int(at) for at in np.unravel_index(finite.argmin(), numbers.shape))


def value_shapes(layout: CodeLayout, embedding_dim: int) -> list[tuple[int, ...]]:
    """The shape of values of one's own, and of shared ones."""
    tail = (layout.num_codes, embedding_dim // layout.num_subspaces)
    return [(layout.codes_per_row, *tail), (layout.num_levels, *tail)]
