"""Artifacts that nobody means well by, and odd ones that are sound. Each is a good artifact, and what is done to it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dpq_rec import (
    CodeLayout,
    IdentityVocabulary,
    Int64Vocabulary,
    ModuloVocabulary,
    StringVocabulary,
    TableContents,
    pack_codes,
    write_artifact,
)
from dpq_rec.codes import cut_into_tiers
from dpq_rec.manifest import MAX_MANIFEST_BYTES
from dpq_rec.tensorfile import MAX_HEADER_BYTES

VERSION = "v1"
LAYOUT = CodeLayout(num_subspaces=2, num_codes=5)
LEVELS = CodeLayout(num_subspaces=1, num_codes=2, num_levels=257)
V = 4


class Case(NamedTuple):
    """What is done to a good artifact, where that is noticed, "open" or "verify", and what is then said."""

    damage: Callable[[Path], object]
    noticed_by: str
    says: str


def write_good(path: Path) -> Path:
    """One table of each kind."""
    tables = {
        "item": _coded(LAYOUT, Int64Vocabulary.from_ids([40, -3, 7, 1 << 40])),
        "bucket": _coded(LAYOUT, ModuloVocabulary(V)),
        "half": _coded(LAYOUT, IdentityVocabulary(V), dtype=np.float16),
        "dense": TableContents(
            num_embeddings=V,
            embedding_dim=4,
            vocabulary=IdentityVocabulary(V),
            chunks=[np.arange(4 * V, dtype=np.float32).reshape(V, 4)],
        ),
        "word": _coded(LAYOUT, StringVocabulary.from_ids(["the", "", "ü", "-ing"])),
        "tiers": _with_tiers(CodeLayout(num_subspaces=2, num_codes=5, num_levels=3), [2, 1]),
    }
    return write_artifact(path, tables, version=VERSION)


def _coded(layout: CodeLayout, vocabulary: Any, dtype: Any = np.float32) -> TableContents:
    rng = np.random.default_rng(0)
    return TableContents(
        num_embeddings=vocabulary_size(vocabulary),
        embedding_dim=layout.num_subspaces * 2,
        vocabulary=vocabulary,
        layout=layout,
        values=rng.standard_normal((layout.codes_per_row, layout.num_codes, 2)).astype(dtype),
        chunks=[pack_codes(rng.integers(0, layout.num_codes, (V, layout.codes_per_row)), layout)],
    )


def vocabulary_size(vocabulary: Any) -> int:
    return vocabulary.num_embeddings if hasattr(vocabulary, "num_embeddings") else len(vocabulary.rows_U)


def _with_tiers(layout: CodeLayout, levels: list[int], num_rows: int = V) -> TableContents:
    """The first rows have all levels, and of each further tier the last of its rows is one row further down."""
    shares = [((num_rows - len(levels) + at) / num_rows, fewer) for at, fewer in enumerate(levels)]
    tiers = cut_into_tiers(layout, num_rows, shares)
    rng = np.random.default_rng(0)
    chunks = [
        pack_codes(rng.integers(0, layout.num_codes, (tier.num_rows, tier.layout.codes_per_row)), tier.layout)
        for tier in tiers
    ]
    return TableContents(
        num_embeddings=num_rows,
        embedding_dim=layout.num_subspaces,
        vocabulary=IdentityVocabulary(num_rows),
        layout=layout,
        values=rng.standard_normal((layout.codes_per_row, layout.num_codes, 1)).astype(np.float32),
        chunks=chunks,
        tiers=tiers,
    )


# What can be done to an artifact


def edit(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Change the parsed manifest."""

    def damage(path: Path) -> None:
        manifest = json.loads((path / "manifest.json").read_text())
        change(manifest)
        (path / "manifest.json").write_text(json.dumps(manifest))

    return damage


def top(**fields: Any) -> Callable[[Path], None]:
    """Fields of the manifest."""
    return edit(lambda manifest: manifest.update(fields))


def of(table: str, **fields: Any) -> Callable[[Path], None]:
    """Fields of a table's entry."""
    return edit(lambda manifest: manifest["tables"][table].update(fields))


def without(table: str, field: str) -> Callable[[Path], None]:
    return edit(lambda manifest: manifest["tables"][table].pop(field))


def called(name: str) -> Callable[[Path], None]:
    """Another name for the first table."""

    def rename(manifest: dict[str, Any]) -> None:
        manifest["tables"] = {name: manifest["tables"].pop("item"), **manifest["tables"]}

    return edit(rename)


def text(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Change the manifest's bytes."""

    def damage(path: Path) -> None:
        (path / "manifest.json").write_bytes(change((path / "manifest.json").read_bytes()))

    return damage


def file_of(table: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Change a table's file; the manifest says its new size and digest."""

    def damage(path: Path) -> None:
        file = path / "tables" / f"{table}.safetensors"
        content = change(file.read_bytes())
        file.write_bytes(content)
        of(table, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())(path)

    return damage


def header_of(table: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Change the header of a table's file."""

    def rewrite(content: bytes) -> bytes:
        end = 8 + int.from_bytes(content[:8], "little")
        header = change(content[8:end])
        return len(header).to_bytes(8, "little") + header + content[end:]

    return file_of(table, rewrite)


def tensor_of(table: str, tensor: str, at: int, data: bytes) -> Callable[[Path], None]:
    """Overwrite bytes of a tensor."""

    def rewrite(content: bytes) -> bytes:
        end = 8 + int.from_bytes(content[:8], "little")
        begin = end + json.loads(content[8:end])[tensor]["data_offsets"][0] + at
        return content[:begin] + data + content[begin + len(data) :]

    return file_of(table, rewrite)


def with_tensor(table: str, dtype: str, num_bytes: int, shape: list[int]) -> Callable[[Path], None]:
    """One tensor more at the end of a table's file."""

    def rewrite(content: bytes) -> bytes:
        end = 8 + int.from_bytes(content[:8], "little")
        header, used = json.loads(content[8:end]), len(content) - end
        header["further"] = {"dtype": dtype, "shape": shape, "data_offsets": [used, used + num_bytes]}
        packed = json.dumps(header).encode()
        return len(packed).to_bytes(8, "little") + packed + content[end:] + bytes(num_bytes)

    return file_of(table, rewrite)


def sparse(file: str, num_bytes: int, begin: bytes = b"") -> Callable[[Path], None]:
    """A file that looks large and takes no room on the disk."""

    def damage(path: Path) -> None:
        (path / file).write_bytes(begin)
        os.truncate(path / file, num_bytes)
        if file.startswith("tables/"):
            of(Path(file).stem, bytes=num_bytes)(path)

    return damage


def linked(table: str, to: str) -> Callable[[Path], None]:
    """A table's file is a link."""

    def damage(path: Path) -> None:
        file = path / "tables" / f"{table}.safetensors"
        file.rename(path / to)
        file.symlink_to(os.path.relpath(path / to, file.parent))

    return damage


def replaced(contents: Callable[[], TableContents]) -> Callable[[Path], None]:
    """Another artifact in its place."""

    def damage(path: Path) -> None:
        path.rename(path.with_name("before"))
        write_artifact(path, {"item": contents()}, version=VERSION)

    return damage


def many(num_tables: int) -> Callable[[Path], None]:
    """As many tables, of one file."""

    def add(manifest: dict[str, Any]) -> None:
        manifest["tables"] = {f"t{i}": manifest["tables"]["item"] for i in range(num_tables)}

    return edit(add)


def in_turn(*damages: Callable[[Path], object]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        for each in damages:
            each(path)

    return damage


def one_tier_more(path: Path) -> None:
    """257 tiers, the last of no rows and no codes, where 256 are good."""
    replaced(lambda: _with_tiers(LEVELS, [*range(256, 1, -1)], 300))(path)
    edit(lambda manifest: manifest["tables"]["item"]["tiers"].append({"rows": 0, "num_levels": 1}))(path)
    last = {"dtype": "U8", "shape": [0, 1], "data_offsets": [0, 0]}
    header_of("item", lambda header: b'{"packed_codes.256":' + json.dumps(last).encode() + b"," + header[1:])(path)


# Names

NAMES: dict[str, Any] = {
    "a line end": "v\r\nSet-Cookie: a=b",
    "a line end behind": "v1\n",
    "NUL": "v\0",
    "an escape": "v\x1b[2J",
    "another script": "版本",
    "Latin-1": "café",
    "digits of another script": "v\u0661",
    "nothing": "",
    "a blank": "v 1",
    "a folder up": "../v1",
    "this folder": ".",
    "the folder above": "..",
    "a hidden file's": ".v1",
    "an option's": "-v",
    "a slash": "v/1",
    "a backslash": "v\\1",
    "a percent sign": "v%2F",
    "244 letters": "v" * 244,
    "256 letters": "v" * 256,
    "100,000 letters": "v" * 100_000,
    "half a surrogate pair": "\ud800",
}
_NO_NAMES: dict[str, Any] = {"a number": 7, "null": None, "true": True, "a list": ["v1"], "an object": {"v": 1}}
_RESERVED = ["CURRENT", "current", "Current"]
_FEATURES: dict[str, Any] = {
    **{"lists and null": [[1], None], "null": None, "text": "abc", "an object": {"a": 1}, "a number": [1]},
    **{"true": [True], "an empty name": [""], "a line end": ["a\r\nb"], "NUL": ["\0"], "another script": ["日本"]},
    **{"256 letters": ["f" * 256], "half a surrogate pair": ["\udc00"], "an escape": ["\x9b2J"], "a tab": ["a\tb"]},
}
_FILES: dict[str, Any] = {
    **{"outside": "../x", "outside, hidden": "tables/../../x", "the root": "/etc/passwd", "nothing": ""},
    **{"backslashes": "..\\x.safetensors", "a drive": "C:/x", "NUL": "tables/x\0.safetensors", "this folder": "."},
    **{"a detour": "tables/./item.safetensors", "two slashes": "tables//item.safetensors", "a line end": "tables/a\nb"},
    **{"256 letters": "tables/" + "x" * 256, "thousands of folders": "x/" * 3_000 + "x", "a home": "~/x"},
    **{"a number": 7, "null": None, "a list": ["tables/item.safetensors"], "bytes as text": "tables/\udcff"},
}
_COUNTS: dict[str, Any] = {
    **{"a float": 4.0, "negative": -4, "true": True, "text": "4", "null": None, "2**31": 2**31, "2**63": 2**63},
    **{"2**64": 2**64, "100 digits": 10**100, "5,000 digits": int("9" * 4_000), "a list": [4], "minus zero": -0.0},
}
_SIZES = ("num_embeddings", "embedding_dim", "num_subspaces", "num_levels", "num_codes", "code_bits", "row_bytes")

# Refused when they are opened.

OPEN: dict[str, Case] = {}


def _add(name: str, damage: Callable[[Path], object], says: str) -> None:
    assert name not in OPEN
    OPEN[name] = Case(damage, "open", says)


for _name, _version in {**NAMES, **_NO_NAMES, **{name: name for name in _RESERVED}}.items():
    _add(f"version: {_name}", top(version=_version), "surrogates" if _version == "\ud800" else "version: got")
for _name, _table in NAMES.items():
    _add(f"table: {_name}", called(_table), "surrogates" if _table == "\ud800" else "table name: got")
for _name, _features in _FEATURES.items():
    _add(f"features: {_name}", of("item", features=_features), "surrogates" if "half" in _name else "features?: got")
for _what in ("created_at", "producer"):
    for _name, _text in {"a line end": "a\r\nb", "256 letters": "x" * 256, **_NO_NAMES}.items():
        _add(f"{_what}: {_name}", top(**{_what: _text}), f"{_what}: got")
for _name, _file in _FILES.items():
    _add(f"file: {_name}", of("item", file=_file), "surrogates" if "bytes" in _name else "file:? ")
for _size in (*_SIZES, "bytes"):
    for _name, _count in _COUNTS.items():
        _add(f"{_size}: {_name}", of("item", **{_size: _count}), "table 'item'|item.safetensors|out of range")
    _add(f"{_size}: none", without("item", _size), f"does not say its {_size}")
for _size in ("embedding_dim", "num_subspaces", "num_levels", "num_codes", "code_bits", "row_bytes"):
    _add(f"{_size}: 0", of("item", **{_size: 0}), "table 'item'")
for _size, _count in {"num_codes": 1, "num_levels": 2**40, "num_subspaces": 3, "row_bytes": 2}.items():
    _add(f"{_size}: {_count}", of("item", **{_size: _count}), "table 'item'")
_add("num_codes: 65,537", of("item", num_codes=65_537), "num_codes: got 65537")
for _size in ("embedding_dim", "num_subspaces", "num_levels", "num_codes", "code_bits", "row_bytes"):
    _add(f"dense, {_size}: 7", of("dense", **{_size: 7}), "table 'dense'")
_add("dense, embedding_dim: 0", of("dense", embedding_dim=0, row_bytes=0), "embedding_dim: got 0")


def _empty(table: str, tensor: str, **fields: Any) -> Callable[[Path], None]:
    """The manifest and the header agree that a tensor is empty."""

    def drop(content: bytes) -> bytes:
        end = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:end])
        begin, stop = header[tensor]["data_offsets"]
        assert stop == len(content) - end
        header[tensor].update(shape=[0, *header[tensor]["shape"][1:]], data_offsets=[begin, begin])
        if "embedding_dim" in fields:
            header[tensor]["shape"] = [V, 0]
        packed = json.dumps(header).encode()
        return len(packed).to_bytes(8, "little") + packed + content[end : end + begin]

    return in_turn(file_of(table, drop), of(table, **fields))


OPEN |= {
    "dense, no numbers": Case(
        _empty("dense", "vectors", embedding_dim=0, row_bytes=0), "open", "embedding_dim: got 0, want 1"
    ),
    "modulo, no rows": Case(
        _empty("bucket", "packed_codes", num_embeddings=0), "open", "modulo vocabulary: got 0 rows"
    ),
    "vectors of 2**62 numbers, none of them": Case(
        of("dense", num_embeddings=0, embedding_dim=2**62, row_bytes=2**64), "open", "embedding_dim: got 4611"
    ),
    "values beyond memory": Case(
        of("item", num_levels=2**30, row_bytes=2**30 * 2 * 3 // 8), "open", r"got \d+ values, want at most 1073741824"
    ),
    "257 tiers": Case(one_tier_more, "open", "tiers: got 257, want at most 256"),
    "a million tiers": Case(
        of("tiers", tiers=[{"rows": 0, "num_levels": 1}] * 100_000), "open", "tiers: got 100000, want at most 256"
    ),
    "tiers: a list": Case(of("tiers", tiers=[[4, 3]]), "open", "table 'tiers'"),
    "tiers: true": Case(of("tiers", tiers=[{"rows": True, "num_levels": 3}]), "open", "want counts"),
    "tiers: none": Case(of("tiers", tiers=[]), "open", "packed_codes: got"),
    "tiers: null": Case(of("tiers", tiers=None), "open", "table 'tiers': TypeError"),
    "shared_values: 0": Case(of("item", shared_values=0), "open", "shared_values: got 0, want true or false"),
    "sha256: null": Case(of("item", sha256=None), "open", "sha256: got None"),
    "sha256: capitals": Case(of("item", sha256="A" * 64), "open", "sha256: got"),
    "vocabulary: a list": Case(of("item", vocabulary=["int64"]), "open", "vocabulary: got"),
    "vocabulary: a number": Case(of("item", vocabulary={"kind": 7}), "open", "vocabulary: got"),
    "vocabulary: of strings": Case(of("item", vocabulary={"kind": "string"}), "open", "the string vocabulary needs"),
    "a file that is a folder": Case(of("item", file="tables"), "open", "got no file"),
    "a file of another table": Case(of("item", file="tables/dense.safetensors"), "open", "the manifest says"),
    "a link that leads outside": Case(linked("item", "../elsewhere"), "open", "lies outside the artifact"),
    "a link to itself": Case(
        lambda path: ((f := path / "tables/item.safetensors").unlink(), f.symlink_to(f)), "open", "got no file"
    ),
    "a pipe": Case(
        lambda path: ((f := path / "tables/item.safetensors").unlink(), os.mkfifo(f)), "open", "got no file"
    ),
    "manifest: two versions": Case(
        text(lambda content: content.replace(b"{", b'{"version":"v2",', 1)), "open", "a key stands there twice"
    ),
    "manifest: a table twice": Case(
        text(lambda content: content.replace(b'"dense":', b'"item":', 1)), "open", "a key stands there twice"
    ),
    "manifest: NaN": Case(top(x=float("nan")), "open", "NaN or out of range"),
    "manifest: UTF-16": Case(text(lambda content: content.decode().encode("utf-16")), "open", "UnicodeDecodeError"),
    "manifest: too large": Case(sparse("manifest.json", MAX_MANIFEST_BYTES + 1, b"{"), "open", "want at most 8388608"),
    "manifest: 3 GB": Case(sparse("manifest.json", 3 << 30), "open", "got 3221225472 bytes"),
    "manifest: lists": Case(
        text(lambda _: b'{"x":[' + b"[]," * (MAX_MANIFEST_BYTES // 3 - 9) + b"0]}"), "open", "manifest.json"
    ),
    "manifest: nested": Case(text(lambda _: b"[" * 1_000_000), "open", "manifest.json"),
    "manifest: numbers of 1,000,000 digits": Case(
        text(lambda _: b'{"format":' + b"9" * 1_000_000 + b"}"), "open", "NaN or out of range"
    ),
    "manifest: a table with 100,000 letters": Case(
        edit(lambda manifest: manifest["tables"].update({"x" * 100_000: None})), "open", "table name: got"
    ),
    "format_version: true": Case(top(format_version=True), "open", "got dpq-rec version True"),
    "format_version: a float": Case(top(format_version=1.0), "open", r"got dpq-rec version 1\.0"),
    "header: UTF-16": Case(header_of("item", lambda h: h.decode().encode("utf-16-le")), "open", "does not describe"),
    "header: a blank before": Case(header_of("item", lambda h: b" " + h), "open", "does not begin with"),
    "header: a tensor twice": Case(
        header_of("item", lambda h: b'{"rows":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},' + h[1:]),
        "open",
        "a key stands there twice",
    ),
    "header: lists": Case(
        header_of("item", lambda _: b'{"a":' + b"[" + b"[]," * ((MAX_HEADER_BYTES - 20) // 3) + b"0]}"),
        "open",
        "the header does not describe the file",
    ),
    "header: too large": Case(header_of("item", lambda h: h + b" " * MAX_HEADER_BYTES), "open", "want at most 1048576"),
    "header: 3 GB": Case(
        sparse("tables/item.safetensors", 3 << 30, (2 << 30).to_bytes(8, "little")), "open", "want at most 1048576"
    ),
    "header: an unknown dtype": Case(with_tensor("item", "U9", 9, [8]), "open", "KeyError: 'U9'"),
    "header: half a byte": Case(with_tensor("item", "F4", 2, [3]), "open", "offsets and shape disagree"),
    "a gap": Case(file_of("item", lambda content: content + b"\0"), "open", "the file holds"),
    "packed codes of another type": Case(
        header_of("item", lambda h: h.replace(b'"U8","shape":[4,1]', b'"I8","shape":[4,1]')),
        "open",
        "packed_codes: got int8",
    ),
    "values of another type": Case(
        header_of("item", lambda h: h.replace(b'"F32"', b'"I32"')), "open", "values: got int32"
    ),
    "values of a type that numpy lacks": Case(
        header_of("half", lambda h: h.replace(b'"F16"', b'"BF16"')), "open", r"values: got \|V1"
    ),
}

# Opened, and refused by verify and publish.

NAN, INF = np.array(np.nan, "<f4").tobytes(), np.array(-np.inf, "<f4").tobytes()
VERIFY = {
    "NaN among values": Case(tensor_of("item", "values", 8, NAN), "verify", r"values\[0, 1, 0\] is nan"),
    "infinity among values": Case(tensor_of("tiers", "values", 0, INF), "verify", r"values\[0, 0, 0\] is -inf"),
    "NaN among fp16 values": Case(tensor_of("half", "values", 2, b"\x00\x7e"), "verify", r"values\[0, 0, 1\] is nan"),
    "infinity among fp16 values": Case(tensor_of("half", "values", 2, b"\x00\x7c"), "verify", r"\[0, 0, 1\] is inf"),
    "NaN among vectors": Case(tensor_of("dense", "vectors", 20, NAN), "verify", r"vectors\[1, 1\] is nan"),
    "infinity among vectors": Case(tensor_of("dense", "vectors", 60, INF), "verify", r"vectors\[3, 3\] is -inf"),
    "a code that cannot be": Case(tensor_of("item", "packed_codes", 2, b"\x07"), "verify", "row 2 holds an impossible"),
    "a padding bit": Case(tensor_of("item", "packed_codes", 3, b"\x80"), "verify", "row 3 holds an impossible code"),
    "ids out of order": Case(tensor_of("item", "ids", 0, b"\x7f" * 8), "verify", "not strictly ascending"),
    "a row outside": Case(tensor_of("item", "rows", 0, b"\x04"), "verify", "a row outside the table's 4"),
    "a slot of another id": Case(tensor_of("word", "id_slots", 0, b"\xee"), "verify", "id_slots"),
    "a string that is not UTF-8": Case(tensor_of("word", "id_bytes", 0, b"\xff"), "verify", "not"),
    "another digest": Case(of("word", sha256="0" * 64), "verify", "got sha256"),
    "another digest of the same file": Case(
        edit(lambda m: m["tables"].update(other={**m["tables"]["item"], "sha256": "0" * 64})), "verify", "got sha256"
    ),
}

# Odd, and sound.

SOUND: dict[str, Callable[[Path], object]] = {
    "as written": lambda path: None,
    "256 tiers": replaced(lambda: _with_tiers(LEVELS, [*range(256, 1, -1)], 300)),
    "no rows": replaced(
        lambda: TableContents(num_embeddings=0, embedding_dim=3, vocabulary=IdentityVocabulary(0), chunks=[])
    ),
    "no rows of codes": replaced(
        lambda: TableContents(
            num_embeddings=0,
            embedding_dim=2,
            vocabulary=Int64Vocabulary.from_ids([]),
            layout=LAYOUT,
            values=np.ones((2, 5, 1), np.float32),
            chunks=[],
        )
    ),
    "no tables": top(tables={}),
    "one file of 200 tables": many(200),
    "two kinds of ids in one file": edit(
        lambda m: m["tables"].update(row={**m["tables"]["item"], "vocabulary": {"kind": "identity"}})
    ),
    "names of 243 letters": in_turn(top(version="v" * 243), called("t" * 243)),
    "a name of every sign": in_turn(top(version="_A.z-9"), called("_A.z-9")),
    "a table called CURRENT": called("CURRENT"),
    "features with signs": of("item", features=["a b", "user:id@x", "é", "f" * 255]),
    "no features": of("item", features=[]),
    "fields that are not known": in_turn(top(x=[1, {}]), of("item", x=None, tiers=3)),
    "a link that stays inside": linked("item", "tables/elsewhere"),
    "a file in another folder": lambda path: (
        (path / "deep").mkdir(),
        (path / "tables/item.safetensors").rename(path / "deep/x"),
        of("item", file="deep/x")(path),
    ),
    "blanks behind the header": header_of("item", lambda header: header + b" \n"),
    "tensors of other types": in_turn(
        with_tensor("item", "BOOL", 8, [8]),
        with_tensor("bucket", "BF16", 16, [2, 4]),
        with_tensor("half", "F8_E4M3", 8, [8]),
        with_tensor("dense", "F4", 4, [8]),
        with_tensor("word", "U64", 64, [8]),
        with_tensor("tiers", "F64", 64, [8]),
    ),
    "a further tensor called values_fp32": header_of(
        "item", lambda h: b'{"values_fp32":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},' + h[1:]
    ),
    "a further tensor called values": header_of(
        "dense", lambda h: b'{"values":{"dtype":"BF16","shape":[0],"data_offsets":[0,0]},' + h[1:]
    ),
}
