"""Tables to a folder and back. In: TableContents. Out: a folder that never changes once written; opened, it is mapped.

    manifest.json                 written last
    tables/TABLE.safetensors      `packed_codes` and `values`, or `vectors`; and the vocabulary's tensors

A table with tiers, of kind "dpq-tiers", is as one of kind "dpq", but for this: its entry has `tiers`, the `rows` and
`num_levels` of each in the order of rows, and each tier has packed codes of its own, `packed_codes` the first, and
`packed_codes.1` and so on the others, as wide as its levels want. `num_levels` and `row_bytes` are the first tier's. As
values stand level by level, those of a tier are the first of all.

`manifest` says how versions, tables and features may be called, and how large things may be. A file's header takes at
most 1 MiB. Other tensors, of any type, may stand in a file. Several tables may name the same one: it is mapped once.

>>> from dpq_rec import Int64Vocabulary
>>> contents = TableContents(
...     num_embeddings=3,
...     embedding_dim=4,
...     vocabulary=Int64Vocabulary.from_ids([70, 7, 9]),
...     layout=CodeLayout(num_subspaces=2, num_codes=4),  # 2 codes of 2 bits a row
...     chunks=[np.array([[0b0100], [0b0000], [0b1011]], np.uint8)],  # (0, 1), (0, 0), (3, 2)
...     values=np.arange(16, dtype=np.float32).reshape(2, 4, 2),
... )
>>> path = write_artifact("artifact", {"item_id": contents}, version="v1")
>>> table = open_artifact(path).tables["item_id"]
>>> vectors_NE, missing = table.lookup([9, 8, 70])
>>> vectors_NE.tolist()  # 9 is in row 2: values[0, 3] and values[1, 2]
[[6.0, 7.0, 12.0, 13.0], [0.0, 0.0, 0.0, 0.0], [0.0, 1.0, 10.0, 11.0]]
>>> missing.tolist()
[1]
>>> (table.full_bytes, table.artifact_bytes)  # 3 x 4 numbers; 3 bytes of codes, and 64 of values
(48, 67)

`write_artifact` writes beside the target and renames, so that a reader sees the whole artifact or none. `open_artifact`
checks the structure and takes no time that grows with the tables; `verify` reads every byte, and wants numbers finite.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import os
import reprlib
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpq_rec.codes import CodeLayout, Tier, cut_into_tiers, find_damaged_row
from dpq_rec.errors import ArtifactError, ConfigError, DamagedArtifactError
from dpq_rec.files import PickledByPath, renamed_into, write_file
from dpq_rec.manifest import (
    CURRENT,
    DENSE,
    DPQ,
    DPQ_TIERS,
    FORMAT,
    FORMAT_VERSION,
    MANIFEST,
    MAX_EMBEDDING_DIM,
    MAX_VALUES,
    TableManifest,
    check_features,
    check_name,
    find_artifact,
    parse_tiers,
    read_manifest,
    tier_entries,
)
from dpq_rec.search import find_not_finite
from dpq_rec.table import VALUES_FP32, Table, codes_name
from dpq_rec.tensorfile import Stream, map_tensors, sha256_of, shorten, write_tensors
from dpq_rec.vocabulary import Vocabulary, load_vocabulary

PRODUCER = "dpq_rec 0.1.0"
_CHECK_ROWS = 1 << 16
_CHECK_NUMBERS = 1 << 22  # or codes, looked at together


@dataclasses.dataclass(frozen=True, kw_only=True)
class Artifact(PickledByPath):
    """An opened artifact. It, its tables and their vocabularies are pickled as path and version, and mapped again."""

    path: Path
    version: str
    created_at: str
    producer: str
    tables: Mapping[str, Table]

    def __post_init__(self) -> None:
        which = str(self.path.resolve()), self.version  # a folder that a relative path or a link may not lead to later
        vars(self)["opened_as"] = which
        for name, table in self.tables.items():
            vars(table)["opened_as"] = *which, name
            vars(table.vocabulary)["opened_as"] = *which, name, "vocabulary"


# Writing


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


def write_artifact(
    path: str | os.PathLike[str], tables: Mapping[str, TableContents], *, version: str | None = None
) -> Path:
    """Write an artifact; on any error nothing is left behind.

    Args:
        path: the folder to make; it must not exist.
        tables: name -> contents.
        version: a name for this artifact, unique in its store; the time and a random suffix if not given.

    Raises:
        ConfigError: a table's name or contents make no sense.
        FileExistsError: the path exists.
    """
    target = Path(path)
    if target.exists():
        raise FileExistsError(f"{target} exists; an artifact is never changed: write to another folder")
    now = datetime.datetime.now(datetime.UTC)
    version = f"{now:%Y%m%dT%H%M%SZ}-{secrets.token_hex(4)}" if version is None else version
    check_name("version", version)
    for name, contents in tables.items():
        check_name("table name", name)
        check_features(contents.features)
    with renamed_into(target) as folder:
        (folder / "tables").mkdir()
        manifest = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "version": version,
            "created_at": now.isoformat(timespec="seconds"),
            "producer": PRODUCER,
            "tables": {name: _write_table(folder, name, t).as_dict() for name, t in tables.items()},
        }
        write_file(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    return target


def _write_table(folder: Path, name: str, contents: TableContents) -> TableManifest:
    """Write a table's file into an artifact's folder.

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
        tensors |= _packed_streams(contents.tiers or cut_into_tiers(layout, rows), contents.chunks)
    file = f"tables/{name}.safetensors"
    num_bytes, digest = write_tensors(folder / file, tensors)
    sizes = {"num_subspaces": 0, "num_levels": 0, "num_codes": 0, "code_bits": 0, "row_bytes": 4 * int(dim)}
    if layout is not None:
        sizes = {name: getattr(layout, name) for name in sizes}
    return TableManifest(
        file=file,
        bytes=num_bytes,
        sha256=digest,
        kind=DENSE if layout is None else DPQ_TIERS if contents.tiers else DPQ,
        num_embeddings=int(rows),
        embedding_dim=int(dim),
        **sizes,
        shared_values=bool(layout and values is not None and values.shape != value_shapes(layout, dim)[0]),
        features=contents.features,
        vocabulary={"kind": contents.vocabulary.kind},
        tiers=tier_entries(contents.tiers),
    )


def _packed_streams(tiers: Sequence[Tier], chunks: Iterable[NDArray[Any]]) -> dict[str, Stream]:
    """The packed codes by tensor, to be written in this order: each takes its rows from the same chunks."""
    rest = iter(chunks) if len(tiers) == 1 else (chunk for chunk in chunks if len(chunk))  # of no rows are of no tier
    return {
        codes_name(at): Stream(
            np.uint8,
            (tier.num_rows, tier.layout.row_bytes),
            rest if at == len(tiers) - 1 else _taken(rest, tier.num_rows),  # the last would take too many, too
        )
        for at, tier in enumerate(tiers)
    }


def _taken(chunks: Iterator[NDArray[Any]], num_rows: int) -> Iterator[NDArray[Any]]:
    while num_rows > 0:
        chunk = next(chunks, None)
        if chunk is None:  # too few rows, as whoever counts them will say
            return
        num_rows -= len(chunk)
        yield chunk


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
        parse_tiers(tier_entries(contents.tiers), layout, rows, "contents")


def _finite_chunks(name: str, chunks: Iterable[NDArray[Any]]) -> Iterator[NDArray[Any]]:
    row = 0
    for chunk in chunks:
        at = find_not_finite(chunk)
        if at is not None:
            raise ConfigError(f"table {name!r}: row {row + at[0]}: got {chunk[at]}, want finite numbers")
        row += len(chunk)
        yield chunk


def value_shapes(layout: CodeLayout, embedding_dim: int) -> list[tuple[int, ...]]:
    """The shape of values of one's own, and of shared ones."""
    tail = (layout.num_codes, embedding_dim // layout.num_subspaces)
    return [(layout.codes_per_row, *tail), (layout.num_levels, *tail)]


# Reading


def open_artifact(path: str | os.PathLike[str]) -> Artifact:
    """Open an artifact, or the current one of a store, and check its structure.

    Raises:
        ArtifactError: there is none at the path, or this version cannot read it.
        DamagedArtifactError: manifest and files disagree.
    """
    try:
        folder = find_artifact(Path(path))
        texts, entries = read_manifest(folder)
        if folder != Path(path) and texts["version"] != folder.name:
            got = f"the manifest in {folder.name} says version {texts['version']}"
            raise DamagedArtifactError(f"{Path(path) / CURRENT}: names {folder.name!r}, but {got}")
        files: dict[str, dict[str, NDArray[Any]]] = {}
        tables = {name: _open_table(folder, name, entry, files) for name, entry in entries.items()}
    except (OSError, MemoryError) as error:
        raise ArtifactError(f"{path}: cannot be read: {shorten(error)}") from error
    return Artifact(path=folder, tables=tables, **texts)


def _open_table(folder: Path, name: str, manifest: TableManifest, files: dict[str, dict[str, NDArray[Any]]]) -> Table:
    """Open one table; `files` holds the tensors of the files that are mapped already."""
    path = folder / manifest.file
    num_bytes = path.stat().st_size if path.is_file() else None
    if num_bytes != manifest.bytes:
        found = "no file" if num_bytes is None else f"{num_bytes} bytes"
        raise DamagedArtifactError(f"{path}: got {found}, the manifest says {manifest.bytes} bytes")
    if not path.resolve().is_relative_to(folder.resolve()):
        raise DamagedArtifactError(f"{path}: links to a file that lies outside the artifact: put a copy in its place")
    if manifest.file not in files:
        files[manifest.file] = {what: array for what, array in map_tensors(path).items() if what != VALUES_FP32}
    tensors = files[manifest.file]
    try:
        _check_tensors(manifest, tensors)
        vocabulary = load_vocabulary(manifest.vocabulary["kind"], manifest.num_embeddings, tensors)
    except ArtifactError as error:
        raise type(error)(f"table {name!r}: {error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedArtifactError(f"table {name!r}: {shorten(error)}") from error
    if manifest.has_codes and VALUES_FP32 not in tensors:
        # Small, and read at every lookup: in memory, in the type that the sums are made in.
        tensors[VALUES_FP32] = np.array(tensors["values"], np.float32)
    return Table(name=name, manifest=manifest, tensors=tensors, vocabulary=vocabulary)


def _check_tensors(manifest: TableManifest, tensors: Mapping[str, NDArray[Any]]) -> None:
    """The tensors are there, in the types and shapes that the manifest promises."""
    rows, dim = manifest.num_embeddings, manifest.embedding_dim
    wanted: dict[str, tuple[tuple[str, ...], list[tuple[int, ...]]]] = {"vectors": (("float32",), [(rows, dim)])}
    if manifest.has_codes:
        shapes = value_shapes(manifest.layout, dim)
        wanted = {
            codes_name(at): (("uint8",), [(tier.num_rows, tier.layout.row_bytes)])
            for at, tier in enumerate(manifest.cut())
        }
        wanted["values"] = (("float32", "float16"), shapes[1:] if manifest.shared_values else shapes[:1])
    for tensor_name, (dtypes, shapes) in wanted.items():
        tensor = tensors.get(tensor_name)
        if tensor is None or str(tensor.dtype) not in dtypes or tensor.shape not in shapes:
            got = "nothing" if tensor is None else f"{tensor.dtype} {reprlib.repr(tensor.shape)}"
            raise DamagedArtifactError(f"{tensor_name}: got {got}, want {dtypes} {shapes}")


def verify(path: str | os.PathLike[str], progress: Callable[[int], object] = lambda num_bytes: None) -> Artifact:
    """Read every byte: digests, codes, padding bits, vocabularies, and whether numbers are finite.

    Args:
        path: an artifact or a store.
        progress: called with the bytes of each piece that was checked: of every file, then of its packed codes.

    Raises:
        ArtifactError, DamagedArtifactError: as `open_artifact`, and for bytes that are not what was published.
    """
    artifact = open_artifact(path)
    digests: dict[str, str] = {}  # by file, which several tables may share
    checked: set[str] = set()
    for table in artifact.tables.values():
        file, wanted = table.manifest.file, table.manifest.sha256
        if file not in digests:
            digests[file] = sha256_of(artifact.path / file, progress)
        if digests[file] != wanted:
            raise DamagedArtifactError(f"{file}: got sha256 {digests[file]}, the manifest says {wanted}")
        content = repr(dataclasses.replace(table.manifest, features=()))
        if content not in checked:
            checked.add(content)
            _check_content(table, progress)
    return artifact


def _check_content(table: Table, progress: Callable[[int], object]) -> None:
    """Look at every id, number and code of a table."""
    try:
        table.vocabulary.check(table.manifest.num_embeddings)
        for what in ("values",) if table.manifest.has_codes else ("vectors",):
            _check_finite(what, table.tensors[what])
    except DamagedArtifactError as error:
        raise DamagedArtifactError(f"table {table.name!r}: {error}") from error
    for tier, packed_VW in zip(table.tiers, table.packed, strict=True):
        _check_codes(table.name, tier, packed_VW, progress)


def _check_finite(what: str, numbers: NDArray[Any]) -> None:
    rows = max(1, _CHECK_NUMBERS // max(1, math.prod(numbers.shape[1:])))
    for start in range(0, len(numbers), rows):
        at = find_not_finite(numbers[start : start + rows])
        if at is not None:
            at = (start + at[0], *at[1:])
            raise DamagedArtifactError(f"{what}{list(at)} is {numbers[at]}, want finite numbers")


def _check_codes(name: str, tier: Tier, packed_VW: NDArray[np.uint8], progress: Callable[[int], object]) -> None:
    num_rows = min(_CHECK_ROWS, max(1, _CHECK_NUMBERS // tier.layout.codes_per_row))
    for start in range(0, len(packed_VW), num_rows):
        piece_NW = packed_VW[start : start + num_rows]
        damaged = find_damaged_row(piece_NW, tier.layout)
        if damaged is not None:
            row = tier.first_row + start + damaged
            raise DamagedArtifactError(f"table {name!r}: row {row} holds an impossible code or padding bit")
        progress(piece_NW.nbytes)
