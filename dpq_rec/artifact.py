"""Tables to a folder and back. In: TableContents. Out: a folder that never changes once written; opened, it is mapped.

    manifest.json                 written last
    tables/TABLE.safetensors      `packed_codes` and `values`, or `vectors`; and the vocabulary's tensors

A table with tiers, of kind "dpq-tiers", is as one of kind "dpq", but for this: its entry has `tiers`, the `rows` and
`num_levels` of each in the order of rows, and each tier has packed codes of its own, `packed_codes` the first, and
`packed_codes.1` and so on the others, as wide as its levels want. `num_levels` and `row_bytes` are the first tier's. As
values stand level by level, those of a tier are the first of all.

`write_artifact` writes beside the target and renames, so that a reader sees the whole artifact or none. `open_artifact`
checks the structure and takes no time that grows with the tables; `verify` reads every byte.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import os
import re
import secrets
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpq_rec.codes import CodeLayout, find_damaged_row
from dpq_rec.errors import ArtifactError, ConfigError, DamagedArtifactError
from dpq_rec.files import renamed_into, write_file
from dpq_rec.kernels import Coded, Stored
from dpq_rec.tensorfile import Stream, map_tensors, sha256_of, write_tensors
from dpq_rec.tiers import PackedTier, Tier, as_entries, codes_name, cut_into_tiers, of_entries, packed_streams
from dpq_rec.vocabulary import Vocabulary, load_vocabulary

FORMAT, FORMAT_VERSION = "dpq-rec", 1
DPQ, DPQ_TIERS, DENSE = "dpq", "dpq-tiers", "dense"  # kinds of tables
MANIFEST, CURRENT = "manifest.json", "CURRENT"
PRODUCER = "dpq_rec 0.1.0"
VERSION_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_SIZES = ("num_embeddings", "embedding_dim", "num_subspaces", "num_levels", "num_codes", "code_bits", "row_bytes")
_CHECK_ROWS = 1 << 16


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableManifest:
    """One table's entry in manifest.json (contract 3)."""

    file: str
    bytes: int
    sha256: str
    kind: str
    num_embeddings: int
    embedding_dim: int
    num_subspaces: int
    num_levels: int
    num_codes: int
    code_bits: int
    row_bytes: int
    shared_values: bool
    features: tuple[str, ...]
    vocabulary: Mapping[str, Any]
    tiers: tuple[Mapping[str, int], ...] = ()

    @property
    def has_codes(self) -> bool:
        """Whether rows are stored as codes, with tiers or without."""
        return self.kind in (DPQ, DPQ_TIERS)

    @functools.cached_property
    def layout(self) -> CodeLayout:
        """How the codes of a row are laid out; of a row of the first tier, where there are tiers."""
        return CodeLayout(num_subspaces=self.num_subspaces, num_codes=self.num_codes, num_levels=self.num_levels)

    def cut(self) -> tuple[Tier, ...]:
        """The tiers of the rows; one of all rows, where there are none.

        Raises:
            DamagedArtifactError: `tiers` contradicts the sizes.
        """
        return of_entries(self.tiers, self.layout, self.num_embeddings, self.file)

    def as_dict(self) -> dict[str, Any]:
        """As manifest.json holds it: only a table with tiers has `tiers`."""
        entry = dataclasses.asdict(self)
        if not self.tiers:
            del entry["tiers"]
        return entry


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
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
        return Coded(self.tiers, self.tensors["values_fp32"]) if self.manifest.has_codes else self.tensors["vectors"]

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
class Artifact:
    """An opened artifact."""

    path: Path
    version: str
    created_at: str
    producer: str
    tables: Mapping[str, Table]


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
    version = version or f"{now:%Y%m%dT%H%M%SZ}-{secrets.token_hex(4)}"
    for what, name in [("version", version), *(("table name", name) for name in tables)]:
        if not VERSION_NAME.fullmatch(name):
            raise ConfigError(f"{what}: got {name!r}, want letters, digits, '_', '-' and '.'")
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
    rows, dim, layout, values = contents.num_embeddings, contents.embedding_dim, contents.layout, contents.values
    try:
        contents.vocabulary.check(rows)
    except DamagedArtifactError as error:
        raise ConfigError(f"table {name!r}: {error}") from error
    tensors: dict[str, NDArray[Any] | Stream] = dict(contents.vocabulary.indexed().tensors())
    if layout is None:
        tensors["vectors"] = Stream(np.float32, (rows, dim), contents.chunks)
    else:
        if dim % layout.num_subspaces:
            raise ConfigError(f"table {name!r}: num_subspaces {layout.num_subspaces} does not divide {dim}")
        shapes = _value_shapes(layout, dim)
        if values is None or values.shape not in shapes or values.dtype not in (np.float32, np.float16):
            got = "nothing" if values is None else f"{values.dtype} {values.shape}"
            raise ConfigError(f"table {name!r}: values: got {got}, want float32 or float16 in one of {shapes}")
        tensors["values"] = values
        tensors |= packed_streams(contents.tiers or cut_into_tiers(layout, rows), contents.chunks)
    file = f"tables/{name}.safetensors"
    written = write_tensors(folder / file, tensors)
    return TableManifest(
        file=file,
        bytes=written.num_bytes,
        sha256=written.sha256,
        kind=DENSE if layout is None else DPQ_TIERS if contents.tiers else DPQ,
        num_embeddings=rows,
        embedding_dim=dim,
        num_subspaces=layout.num_subspaces if layout else 0,
        num_levels=layout.num_levels if layout else 0,
        num_codes=layout.num_codes if layout else 0,
        code_bits=layout.code_bits if layout else 0,
        row_bytes=layout.row_bytes if layout else 4 * dim,
        shared_values=bool(layout and values is not None and values.shape != _value_shapes(layout, dim)[0]),
        features=contents.features,
        vocabulary={"kind": contents.vocabulary.kind},
        tiers=as_entries(contents.tiers),
    )


def _value_shapes(layout: CodeLayout, embedding_dim: int) -> list[tuple[int, ...]]:
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
    folder = find_artifact(Path(path))
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest["format"] != FORMAT or manifest["format_version"] != FORMAT_VERSION:
            found = f"{manifest['format']} version {manifest['format_version']}"
            raise ArtifactError(f"{folder}: got {found}, this version reads {FORMAT} version {FORMAT_VERSION}")
        return Artifact(
            path=folder,
            version=str(manifest["version"]),
            created_at=str(manifest["created_at"]),
            producer=str(manifest["producer"]),
            tables={name: _open_table(folder, name, entry) for name, entry in manifest["tables"].items()},
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedArtifactError(f"{folder / MANIFEST}: {type(error).__name__}: {error}") from error


def _open_table(folder: Path, name: str, entry: dict[str, Any]) -> Table:
    known = {field.name for field in dataclasses.fields(TableManifest)}
    fields: dict[str, Any] = {k: v for k, v in entry.items() if k in known}
    fields["features"] = tuple(fields["features"])
    fields["tiers"] = tuple(fields["tiers"]) if fields["kind"] == DPQ_TIERS else ()
    manifest = TableManifest(**fields)
    if manifest.kind not in (DPQ, DPQ_TIERS, DENSE):
        wanted = f"{DPQ}, {DPQ_TIERS} and {DENSE}"
        raise ArtifactError(f"table {name!r}: got kind {manifest.kind!r}, this version reads {wanted}")
    if not all(type(fields[size]) is int and fields[size] >= 0 for size in _SIZES):
        raise DamagedArtifactError(f"table {name!r}: the manifest's sizes are no counts: {manifest}")
    path = folder / manifest.file
    if Path(manifest.file).is_absolute() or ".." in Path(manifest.file).parts:
        raise DamagedArtifactError(f"table {name!r}: file {manifest.file!r} lies outside the artifact")
    if not path.is_file() or path.stat().st_size != manifest.bytes:
        found = f"{path.stat().st_size} bytes" if path.is_file() else "no file"
        raise DamagedArtifactError(f"{path}: got {found}, the manifest says {manifest.bytes} bytes")
    tensors = map_tensors(path)
    _check_table(name, manifest, tensors)
    if "values" in tensors:  # small, and read at every lookup: in memory, in the type that the sums are made in
        tensors = {**tensors, "values_fp32": np.array(tensors["values"], np.float32)}
    vocabulary = load_vocabulary(manifest.vocabulary["kind"], manifest.num_embeddings, tensors)
    return Table(name=name, manifest=manifest, tensors=tensors, vocabulary=vocabulary)


def _check_table(name: str, manifest: TableManifest, tensors: Mapping[str, NDArray[Any]]) -> None:
    """The tensors are there, in the types and shapes that the manifest promises."""
    rows, dim = manifest.num_embeddings, manifest.embedding_dim
    wanted: dict[str, tuple[tuple[str, ...], list[tuple[int, ...]]]] = {"vectors": (("float32",), [(rows, dim)])}
    if manifest.has_codes:
        layout = manifest.layout
        if dim % layout.num_subspaces or (manifest.code_bits, manifest.row_bytes) != (
            layout.code_bits,
            layout.row_bytes,
        ):
            raise DamagedArtifactError(f"table {name!r}: the manifest's sizes contradict each other: {manifest}")
        shapes = _value_shapes(layout, dim)
        wanted = {
            codes_name(at): (("uint8",), [(tier.num_rows, tier.layout.row_bytes)])
            for at, tier in enumerate(manifest.cut())
        }
        wanted["values"] = (("float32", "float16"), shapes[1:] if manifest.shared_values else shapes[:1])
    for tensor_name, (dtypes, shapes) in wanted.items():
        tensor = tensors.get(tensor_name)
        if tensor is None or str(tensor.dtype) not in dtypes or tensor.shape not in shapes:
            got = "nothing" if tensor is None else f"{tensor.dtype} {tensor.shape}"
            raise DamagedArtifactError(f"table {name!r}: {tensor_name}: got {got}, want {dtypes} {shapes}")


def verify(path: str | os.PathLike[str], progress: Callable[[int], object] = lambda num_bytes: None) -> Artifact:
    """Read every byte: digests, codes, padding bits, vocabularies.

    Args:
        path: an artifact or a store.
        progress: called with the bytes of each piece that was checked: of every file, then of its packed codes.

    Raises:
        ArtifactError, DamagedArtifactError: as `open_artifact`, and for bytes that are not what was published.
    """
    artifact = open_artifact(path)
    for name, table in artifact.tables.items():
        digest = sha256_of(artifact.path / table.manifest.file, progress)
        if digest != table.manifest.sha256:
            raise DamagedArtifactError(
                f"{table.manifest.file}: got sha256 {digest}, the manifest says {table.manifest.sha256}"
            )
        try:
            table.vocabulary.check(table.manifest.num_embeddings)
        except DamagedArtifactError as error:
            raise DamagedArtifactError(f"table {name!r}: {error}") from error
        for tier in table.tiers:
            _check_codes(name, tier, progress)
    return artifact


def _check_codes(name: str, tier: PackedTier, progress: Callable[[int], object]) -> None:
    for start in range(0, len(tier.packed_VW), _CHECK_ROWS):
        piece_NW = tier.packed_VW[start : start + _CHECK_ROWS]
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
    current = path / CURRENT
    if not current.is_file():
        raise ArtifactError(f"{path}: holds neither {MANIFEST} (an artifact) nor CURRENT (a store of artifacts)")
    version = current.read_text(errors="replace").removesuffix("\n")
    if not VERSION_NAME.fullmatch(version) or not (path / version / MANIFEST).is_file():
        raise DamagedArtifactError(f"{current}: names {version!r}, which is not a version in this store")
    return path / version
