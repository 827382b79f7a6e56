"""Tables to a folder and back. In: TableContents. Out: a folder that never changes once written; opened, it is mapped.

    manifest.json                 written last
    tables/TABLE.safetensors      `packed_codes` and `values`, or `vectors`; and the vocabulary's tensors

A table with tiers, of kind "dpq-tiers", is as one of kind "dpq", but for this: its entry has `tiers`, the `rows` and
`num_levels` of each in the order of rows, and each tier has packed codes of its own, `packed_codes` the first, and
`packed_codes.1` and so on the others, as wide as its levels want. `num_levels` and `row_bytes` are the first tier's. As
values stand level by level, those of a tier are the first of all.

`manifest` says how versions, tables and features may be called, and how large things may be. A file's header takes at
most 1 MiB. Other tensors, of any type, may stand in a file. Several tables may name the same one: it is mapped once.

`write_artifact` writes beside the target and renames, so that a reader sees the whole artifact or none. `open_artifact`
checks the structure and takes no time that grows with the tables; `verify` reads every byte, and wants numbers finite.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import math
import os
import reprlib
import secrets
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpq_rec.codes import find_damaged_row
from dpq_rec.contents import TableContents as TableContents  # what this module writes
from dpq_rec.contents import find_not_finite, value_shapes, write_table
from dpq_rec.errors import ArtifactError, ConfigError, DamagedArtifactError
from dpq_rec.files import renamed_into, write_file
from dpq_rec.kernels import Coded, Stored
from dpq_rec.manifest import (
    CURRENT,
    FORMAT,
    FORMAT_VERSION,
    MAX_MANIFEST_BYTES,
    Manifest,
    TableManifest,
    fault_of_features,
    fault_of_name,
    parse_manifest,
)
from dpq_rec.reopen import Reopened
from dpq_rec.tensorfile import map_tensors, sha256_of, shorten
from dpq_rec.tiers import PackedTier, codes_name
from dpq_rec.vocabulary import Vocabulary, load_vocabulary

MANIFEST = "manifest.json"
PRODUCER = "dpq_rec 0.1.0"
_MOST_OF_CURRENT = 300  # bytes of CURRENT that are read: more than a version may have
_CHECK_ROWS = 1 << 16
_CHECK_NUMBERS = 1 << 22  # or codes, looked at together
VALUES_FP32 = "values_fp32"  # of a table's tensors: in memory alone


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table(Reopened):
    """One table of an opened artifact; the tensors are mapped from the file, values are in memory as float32."""

    name: str
    manifest: TableManifest
    tensors: Mapping[str, NDArray[Any]]
    vocabulary: Vocabulary

    @functools.cached_property
    def tiers(self) -> tuple[PackedTier, ...]:
        """The packed codes in the order of rows: one tier of all rows in a table of kind "dpq"; none where dense."""
        if not self.manifest.has_codes:
            return ()
        return tuple(
            PackedTier(tier.first_row, tier.layout, self.tensors[codes_name(at)])
            for at, tier in enumerate(self.manifest.cut())
        )

    @functools.cached_property
    def stored(self) -> Stored:
        """The vectors of all rows, as the kernels take them."""
        return Coded(self.tiers, self.tensors[VALUES_FP32]) if self.manifest.has_codes else self.tensors["vectors"]

    @property
    def packed_bytes(self) -> int:
        """Bytes of packed codes as they lie on disk."""
        return sum(tier.packed_VW.nbytes for tier in self.tiers)

    @property
    def artifact_bytes(self) -> int:
        """Bytes of packed codes and values, or of the vectors, as they lie on disk."""
        rest = (self.tensors[name].nbytes for name in ("values", "vectors") if name in self.tensors)
        return self.packed_bytes + sum(rest)

    @property
    def vocabulary_bytes(self) -> int:
        """Bytes of the vocabulary as it lies on disk."""
        return sum(tensor.nbytes for tensor in self.vocabulary.tensors().values())

    @property
    def full_bytes(self) -> int:
        """Bytes of the fp32 table that this one replaces."""
        return 4 * self.manifest.num_embeddings * self.manifest.embedding_dim

    @property
    def compression_ratio(self) -> float:
        """`full_bytes` / `artifact_bytes`; the vocabulary's bytes are not in it."""
        return self.full_bytes / max(1, self.artifact_bytes)


def sizes(tables: Collection[Table]) -> dict[str, Any]:
    """Rows and bytes of tables, added up, and their compression ratio: what `inspect` and metrics.json show."""
    full_bytes, artifact_bytes = sum(t.full_bytes for t in tables), sum(t.artifact_bytes for t in tables)
    return {
        "num_embeddings": sum(t.manifest.num_embeddings for t in tables),
        "full_bytes": full_bytes,
        "artifact_bytes": artifact_bytes,
        "vocabulary_bytes": sum(t.vocabulary_bytes for t in tables),
        "compression_ratio": full_bytes / max(1, artifact_bytes),
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Artifact(Reopened):
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
    faults = [fault_of_name("version", version), *(fault_of_name("table name", name) for name in tables)]
    faults += [fault_of_features(contents.features) for contents in tables.values()]
    for fault in filter(None, faults):
        raise ConfigError(fault)
    with renamed_into(target) as folder:
        (folder / "tables").mkdir()
        manifest = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "version": version,
            "created_at": now.isoformat(timespec="seconds"),
            "producer": PRODUCER,
            "tables": {name: write_table(folder, name, t).as_dict() for name, t in tables.items()},
        }
        write_file(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    return target


# Reading


def open_artifact(path: str | os.PathLike[str]) -> Artifact:
    """Open an artifact, or the current one of a store, and check its structure.

    Raises:
        ArtifactError: there is none at the path, or this version cannot read it.
        DamagedArtifactError: manifest and files disagree.
    """
    try:
        folder = find_artifact(Path(path))
        manifest = _read_manifest(folder / MANIFEST)
        if folder != Path(path) and manifest.version != folder.name:
            got = f"the manifest in {folder.name} says version {manifest.version}"
            raise DamagedArtifactError(f"{Path(path) / CURRENT}: names {folder.name!r}, but {got}")
        files: dict[str, dict[str, NDArray[Any]]] = {}
        tables = {name: _open_table(folder, name, entry, files) for name, entry in manifest.tables.items()}
    except (OSError, MemoryError) as error:
        raise ArtifactError(f"{path}: cannot be read: {shorten(error)}") from error
    return Artifact(
        path=folder,
        version=manifest.version,
        created_at=manifest.created_at,
        producer=manifest.producer,
        tables=tables,
    )


def _read_manifest(path: Path) -> Manifest:
    num_bytes = path.stat().st_size
    if num_bytes > MAX_MANIFEST_BYTES:
        raise DamagedArtifactError(f"{path}: got {num_bytes} bytes, want at most {MAX_MANIFEST_BYTES}")
    try:
        return parse_manifest(path.read_bytes())
    except ArtifactError as error:
        raise type(error)(f"{path}: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedArtifactError(f"{path}: {shorten(error)}") from error


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
    for tier in table.tiers:
        _check_codes(table.name, tier, progress)


def _check_finite(what: str, numbers: NDArray[Any]) -> None:
    rows = max(1, _CHECK_NUMBERS // max(1, math.prod(numbers.shape[1:])))
    for start in range(0, len(numbers), rows):
        at = find_not_finite(numbers[start : start + rows])
        if at is not None:
            at = (start + at[0], *at[1:])
            raise DamagedArtifactError(f"{what}{list(at)} is {numbers[at]}, want finite numbers")


def _check_codes(name: str, tier: PackedTier, progress: Callable[[int], object]) -> None:
    num_rows = min(_CHECK_ROWS, max(1, _CHECK_NUMBERS // tier.layout.codes_per_row))
    for start in range(0, len(tier.packed_VW), num_rows):
        piece_NW = tier.packed_VW[start : start + num_rows]
        damaged = find_damaged_row(piece_NW, tier.layout)
        if damaged is not None:
            row = tier.first_row + start + damaged
            raise DamagedArtifactError(f"table {name!r}: row {row} holds an impossible code or padding bit")
        progress(piece_NW.nbytes)


def find_artifact(path: Path) -> Path:
    """The artifact's folder: the path itself, or what its CURRENT names where it is a store.

    Raises:
        ArtifactError: neither.
    """
    if (path / MANIFEST).is_file():
        return path
    if not (path / CURRENT).is_file():
        raise ArtifactError(f"{path}: holds neither {MANIFEST} (an artifact) nor CURRENT (a store of artifacts)")
    version = read_current(path)
    if fault_of_name("version", version) or not (path / version / MANIFEST).is_file():
        raise DamagedArtifactError(
            f"{path / CURRENT}: names {reprlib.repr(version)}, which is not a version in this store"
        )
    return path / version


def read_current(store: Path) -> str:
    """What a store's CURRENT says; of one that is too long for a version, no more than shows that."""
    with (store / CURRENT).open("rb") as file:
        return file.read(_MOST_OF_CURRENT).decode(errors="replace").removesuffix("\n")
