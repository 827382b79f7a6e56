"""manifest.json: found, read and checked. In: a folder, or bytes. Out: its texts, and a TableManifest for each table.

Names of versions, tables and features end up in paths, URLs, headers of replies and terminals, so that one pattern
holds for each wherever it comes in: when an artifact is written, opened and published.

    version, table          1 to 243 letters, digits, "_", "-" and ".", the first neither "-" nor "."; a version is not
                            CURRENT, in capitals or not: that is a file of every store
    feature                 1 to 255 printable characters of Latin-1, blanks among them
    created_at, producer    at most 255 printable characters
    file                    such names with "/" between them, below the artifact's folder

Sizes are counts that fit each other. A manifest has at most 8 MiB, a vector 2**20 numbers, a table 2**30 values, which
are held in memory, and 256 tiers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dpq_rec.codes import MAX_TIERS, CodeLayout, Tier
from dpq_rec.errors import ArtifactError, ConfigError, DamagedArtifactError
from dpq_rec.tensorfile import parse_json, shorten

FORMAT, FORMAT_VERSION = "dpq-rec", 1
DPQ, DPQ_TIERS, DENSE = "dpq", "dpq-tiers", "dense"  # kinds of tables
MANIFEST, CURRENT = "manifest.json", "CURRENT"
MAX_MANIFEST_BYTES = 1 << 23  # about 10,000 tables'
MAX_EMBEDDING_DIM = 1 << 20
MAX_VALUES = 1 << 30  # 4 GiB in memory
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,242}")  # with .safetensors behind it, no more than a file's may have
_FEATURE = re.compile(r"[ -~\xa1-\xac\xae-\xff]{1,255}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MOST_OF_CURRENT = 300  # bytes of it that are read: more than a version may have
_MOST_TEXT = 255  # characters of created_at and producer
_MOST_FOLDERS = 8  # that a table's file lies in
_SIZES = ("num_embeddings", "embedding_dim", "num_subspaces", "num_levels", "num_codes", "code_bits", "row_bytes")


def check_name(what: str, name: object) -> None:
    """Raises ConfigError where a version or a table ("table name") must not be called so."""
    if not (isinstance(name, str) and _NAME.fullmatch(name)):
        wanted = "1 to 243 letters, digits, '_', '-' and '.', the first neither '-' nor '.'"
        raise ConfigError(f"{what}: got {reprlib.repr(name)}, want {wanted}")
    if what == "version" and name.upper() == CURRENT:  # some file systems do not tell cases apart
        raise ConfigError(f"version: got {name!r}, the name of a file of every store; want another")


def check_features(features: object) -> None:
    """Raises ConfigError where features of a table must not be called so."""
    if not isinstance(features, list | tuple):
        raise ConfigError(f"features: got {reprlib.repr(features)}, want a list of names")
    for feature in features:
        if not (isinstance(feature, str) and _FEATURE.fullmatch(feature)):
            raise ConfigError(f"feature: got {reprlib.repr(feature)}, want 1 to 255 printable characters of Latin-1")


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
        """The tiers of the rows; one of all rows, where the table has none.

        Raises:
            DamagedArtifactError: `tiers` contradicts the sizes.
        """
        return parse_tiers(self.tiers, self.layout, self.num_embeddings, self.file)

    def as_dict(self) -> dict[str, Any]:
        """As manifest.json holds it: only a table with tiers has `tiers`."""
        entry = dataclasses.asdict(self)
        if not self.tiers:
            del entry["tiers"]
        return entry


def tier_entries(tiers: Sequence[Tier]) -> tuple[Mapping[str, int], ...]:
    """Tiers as manifest.json holds them."""
    return tuple({"rows": tier.num_rows, "num_levels": tier.layout.num_levels} for tier in tiers)


def parse_tiers(
    entries: Sequence[Mapping[str, int]], layout: CodeLayout, num_embeddings: int, file: str
) -> tuple[Tier, ...]:
    """Tiers of what manifest.json holds of them; one of all rows of what it holds of a table without.

    Args:
        entries: `rows` and `num_levels` of each.
        layout: of the first tier.
        num_embeddings: V.
        file: of the table, to be named in an error.

    Raises:
        DamagedArtifactError: they are no rows that add up to all, or no levels that fall from the table's own.
    """
    entries = entries or [{"rows": num_embeddings, "num_levels": layout.num_levels}]
    if len(entries) > MAX_TIERS:
        raise DamagedArtifactError(f"{file}: tiers: got {len(entries)}, want at most {MAX_TIERS}")
    rows, levels = [entry["rows"] for entry in entries], [entry["num_levels"] for entry in entries]
    if not all(type(count) is int and count >= 0 for count in (*rows, *levels)):
        raise DamagedArtifactError(f"{file}: tiers: got {reprlib.repr(entries)}, want counts")
    falls = all(before > after > 0 for before, after in itertools.pairwise(levels))
    if sum(rows) != num_embeddings or levels[0] != layout.num_levels or not falls:
        wanted = f"{num_embeddings} rows in all, and levels that fall from {layout.num_levels}"
        raise DamagedArtifactError(f"{file}: tiers: got {reprlib.repr(entries)}, want {wanted}")
    starts = itertools.accumulate(rows, initial=0)
    tiers = zip(starts, rows, levels, strict=False)
    return tuple(
        Tier(first, num_rows, dataclasses.replace(layout, num_levels=level)) for first, num_rows, level in tiers
    )


def parse_manifest(content: bytes) -> tuple[dict[str, str], dict[str, TableManifest]]:
    """The texts of a manifest (`version`, `created_at`, `producer`) and its tables.

    Raises:
        ArtifactError: of a format, or with a kind of table, that this version does not know.
        DamagedArtifactError: names or sizes that cannot be.
        ValueError, KeyError, TypeError, AttributeError, RecursionError: no manifest.
    """
    found = parse_json(content)
    got, version = found["format"], found["format_version"]
    if got != FORMAT or type(version) is not int or version != FORMAT_VERSION:
        shown = f"{reprlib.repr(got)} version {reprlib.repr(version)}".replace("'", "")
        raise ArtifactError(f"got {shown}, this version reads {FORMAT} version {FORMAT_VERSION}")
    with _as_damage():
        check_name("version", found["version"])
    for what in ("created_at", "producer"):
        text = found[what]
        if not (isinstance(text, str) and len(text) <= _MOST_TEXT and text.isprintable()):
            wanted = f"at most {_MOST_TEXT} printable characters"
            raise DamagedArtifactError(f"{what}: got {reprlib.repr(text)}, want {wanted}")
    tables = {}
    for name, entry in found["tables"].items():
        with _as_damage():
            check_name("table name", name)
        with _as_damage(f"table {name!r}: "):
            tables[name] = _table_manifest(entry)
    texts = {what: found[what] for what in ("version", "created_at", "producer")}
    return texts, tables


@contextlib.contextmanager
def _as_damage(where: str = "") -> Iterator[None]:
    """What would be a caller's mistake is damage in a file; errors say in which table."""
    try:
        yield
    except ArtifactError as error:
        raise type(error)(f"{where}{error}") from error
    except ConfigError as error:
        raise DamagedArtifactError(f"{where}{error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedArtifactError(f"{where}{shorten(error)}") from error


def _table_manifest(entry: Mapping[str, Any]) -> TableManifest:
    fields = dataclasses.fields(TableManifest)
    missing = [field.name for field in fields if field.name not in entry and field.default is dataclasses.MISSING]
    if missing:
        raise DamagedArtifactError(f"the manifest does not say its {', '.join(missing)}")
    found: dict[str, Any] = {field.name: entry[field.name] for field in fields if field.name in entry}
    if found["kind"] not in (DPQ, DPQ_TIERS, DENSE):
        wanted = f"{DPQ}, {DPQ_TIERS} and {DENSE}"
        raise ArtifactError(f"got kind {reprlib.repr(found['kind'])}, this version reads {wanted}")
    _check_file(found)
    check_features(found["features"])
    if type(found["vocabulary"]) is not dict or type(found["vocabulary"].get("kind")) is not str:
        raise DamagedArtifactError(f"vocabulary: got {reprlib.repr(found['vocabulary'])}, want its kind")
    found["features"] = tuple(found["features"])
    found["tiers"] = tuple(found["tiers"]) if found["kind"] == DPQ_TIERS else ()
    _check_sizes(found)
    return TableManifest(**found)


def _check_file(found: Mapping[str, Any]) -> None:
    file, num_bytes, digest = found["file"], found["bytes"], found["sha256"]
    shown = reprlib.repr(file)
    if not isinstance(file, str):
        raise DamagedArtifactError(f"file: got {shown}, want tables/TABLE.safetensors")
    parts = file.split("/")
    if len(parts) > _MOST_FOLDERS or not all(_NAME.fullmatch(part.removesuffix(".safetensors")) for part in parts):
        wanted = "tables/TABLE.safetensors"
        raise DamagedArtifactError(f"file {shown} lies outside the artifact, or is no name: want {wanted}")
    if type(num_bytes) is not int or num_bytes < 0:
        raise DamagedArtifactError(f"bytes: got {reprlib.repr(num_bytes)}, want a count")
    if not (isinstance(digest, str) and _SHA256.fullmatch(digest)):
        raise DamagedArtifactError(f"sha256: got {reprlib.repr(digest)}, want 64 hexadecimal digits")


def _check_sizes(found: Mapping[str, Any]) -> None:
    """Raises DamagedArtifactError where sizes are no counts, or contradict each other."""
    sizes = {name: found[name] for name in _SIZES}
    if not all(type(size) is int and size >= 0 for size in sizes.values()):
        raise DamagedArtifactError(f"the manifest's sizes are no counts: {reprlib.repr(sizes)}")
    if type(found["shared_values"]) is not bool:
        raise DamagedArtifactError(f"shared_values: got {reprlib.repr(found['shared_values'])}, want true or false")
    dim = found["embedding_dim"]
    if not 1 <= dim <= MAX_EMBEDDING_DIM:
        raise DamagedArtifactError(f"embedding_dim: got {reprlib.repr(dim)}, want 1 to {MAX_EMBEDDING_DIM}")
    if found["kind"] == DENSE:
        wanted = {"num_subspaces": 0, "num_levels": 0, "num_codes": 0, "code_bits": 0, "row_bytes": 4 * dim}
    else:
        layout = CodeLayout(**{name: sizes[name] for name in ("num_subspaces", "num_levels", "num_codes")})
        if dim % layout.num_subspaces:
            raise DamagedArtifactError(f"num_subspaces {layout.num_subspaces} does not divide embedding_dim {dim}")
        width = dim // layout.num_subspaces if found["shared_values"] else dim
        num_values = layout.num_levels * layout.num_codes * width
        if num_values > MAX_VALUES:
            raise DamagedArtifactError(f"got {reprlib.repr(num_values)} values, want at most {MAX_VALUES}")
        wanted = {"code_bits": layout.code_bits, "row_bytes": layout.row_bytes}
    wrong = {name: sizes[name] for name, size in wanted.items() if sizes[name] != size}
    if wrong:
        raise DamagedArtifactError(f"sizes that contradict each other: got {reprlib.repr(wrong)}, want {wanted}")


def read_manifest(folder: Path) -> tuple[dict[str, str], dict[str, TableManifest]]:
    """What `parse_manifest` says of an artifact's manifest.json.

    Raises:
        ArtifactError, DamagedArtifactError: as there, and where there is no manifest in the file.
        OSError: it cannot be read.
    """
    path = folder / MANIFEST
    num_bytes = path.stat().st_size
    if num_bytes > MAX_MANIFEST_BYTES:
        raise DamagedArtifactError(f"{path}: got {num_bytes} bytes, want at most {MAX_MANIFEST_BYTES}")
    try:
        return parse_manifest(path.read_bytes())
    except ArtifactError as error:
        raise type(error)(f"{path}: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedArtifactError(f"{path}: {shorten(error)}") from error


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
    with contextlib.suppress(ConfigError):
        check_name("version", version)
        if (path / version / MANIFEST).is_file():
            return path / version
    raise DamagedArtifactError(f"{path / CURRENT}: names {reprlib.repr(version)}, which is not a version in this store")


def read_current(store: Path) -> str:
    """What a store's CURRENT says; of one that is too long for a version, no more than shows that."""
    with (store / CURRENT).open("rb") as file:
        return file.read(_MOST_OF_CURRENT).decode(errors="replace").removesuffix("\n")
