"""Every way to get a vector, behind one method. Another way: a class of this form, and a line at the end.

Those that ask a server are in `server_readers`.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.numpy
import torch

from dpq_rec import CodeLayout, EmbeddingStore, IdTypeError, UnknownIdsError, UnknownTableError, publish
from dpq_rec.cli import main
from dpq_rec.export import ExportConfig, export_table
from dpq_rec.kernels import MISSING_ROW, Coded
from tests import references
from tests.contracts import cases


class Answer(NamedTuple):
    """vectors [N, E] of that dtype, and the positions of unknown ids."""

    vectors: np.ndarray
    missing: list[int]


class ReaderError(Exception):
    """What went wrong: "unknown_table", "unknown_ids" or "id_type"."""


class Reader(Protocol):
    """One way to get vectors out of an artifact.

    Attributes:
        tables: those it knows.
        dtypes: what it can return.
        id_types: the keys of `cases.WRONG_IDS` that it can be given at all for a table of integers.
        string_id_types: likewise, for a table of strings.
        takes_no_ids: whether it can look up no ids.
        pools: whether it has `pool`, which takes the ids in each bag, and "sum" or "mean" for the policy.
    """

    tables: Sequence[str]
    dtypes: tuple[str, ...]
    id_types: tuple[str, ...]
    string_id_types: tuple[str, ...]
    takes_no_ids: bool
    pools: bool

    def lookup(self, table: str, ids: Sequence[Any], dtype: str, missing: str) -> Answer:
        """Vectors of ids.

        Raises:
            ReaderError: see there.
        """

    def close(self) -> None:
        """Let go of what the reader holds."""


class Anything:
    """A reader without limits, that holds nothing."""

    tables: Sequence[str] = cases.TABLES
    dtypes: tuple[str, ...] = ("float32", "float16")
    id_types: tuple[str, ...] = ("strings", "floats", "booleans")
    string_id_types: tuple[str, ...] = ("integers", "floats", "booleans")
    takes_no_ids = True
    pools = False

    def close(self) -> None:
        pass


class ReferenceReader(Anything):
    """The plain numpy decoder on what the safetensors library and `json` read: the measure of all others."""

    def __init__(self, artifact: Path) -> None:
        self.tables = json.loads((artifact / "manifest.json").read_text())["tables"]
        self.tensors = {
            name: safetensors.numpy.load_file(artifact / entry["file"]) for name, entry in self.tables.items()
        }

    def lookup(self, table: str, ids: Sequence[Any], dtype: str, missing: str) -> Answer:
        if table not in self.tables:
            raise ReaderError("unknown_table")
        wanted = str if self.tables[table]["vocabulary"]["kind"] == "string" else int
        if any(type(i) is not wanted for i in ids):
            raise ReaderError("id_type")
        rows = [self._row(table, i) for i in ids]
        unknown = [at for at, row in enumerate(rows) if row == MISSING_ROW]
        if unknown and missing == "error":
            raise ReaderError("unknown_ids")
        return Answer(self._decode(table, np.array(rows, np.int64)).astype(dtype), unknown)

    def pool(self, table: str, ids: Sequence[Any], bag_lengths: list[int], dtype: str, pooling: str) -> Answer:
        """The definition: add in fp32, one by one, then divide by the ids that are there, then round."""
        vectors_NE, unknown = self.lookup(table, ids, "float32", "zeros")
        pooled, start = [], 0
        for length in bag_lengths:
            total, known = np.zeros(vectors_NE.shape[1], np.float32), set(range(start, start + length)) - set(unknown)
            for at in sorted(known):
                total = total + vectors_NE[at]
            pooled.append(total / np.float32(len(known)) if pooling == "mean" and known else total)
            start += length
        return Answer(np.array(pooled, np.float32).reshape(len(bag_lengths), -1).astype(dtype), unknown)

    def _row(self, table: str, wanted: Any) -> int:
        kind, num_rows = self.tables[table]["vocabulary"]["kind"], self.tables[table]["num_embeddings"]
        if kind == "modulo":
            return wanted % num_rows
        if kind == "identity":
            return wanted if 0 <= wanted < num_rows else MISSING_ROW
        rows = self.tensors[table]["rows"].tolist()
        return dict(zip(self._ids(table), rows, strict=True)).get(wanted, MISSING_ROW)

    def _ids(self, table: str) -> list[Any]:
        tensors = self.tensors[table]
        if self.tables[table]["vocabulary"]["kind"] == "int64":
            return tensors["ids"].tolist()
        content = tensors["id_bytes"].tobytes()
        return [content[begin:end].decode() for begin, end in itertools.pairwise(tensors["id_offsets"].tolist())]

    def _decode(self, table: str, rows_N: np.ndarray) -> np.ndarray:
        entry, tensors = self.tables[table], self.tensors[table]
        if entry["kind"] == "dense":
            return np.where(rows_N[:, None] == MISSING_ROW, np.float32(0), tensors["vectors"][rows_N])
        sizes = {name: entry[name] for name in ("num_subspaces", "num_codes", "num_levels")}
        values = tensors["values"].astype(np.float32)
        if entry["kind"] == "dpq":
            return references.decode(Coded.of(tensors["packed_codes"], values, CodeLayout(**sizes)), rows_N)
        vectors_NE, first = np.zeros((len(rows_N), entry["embedding_dim"]), np.float32), 0
        for at, tier in enumerate(entry["tiers"]):
            here_N = (rows_N >= first) & (rows_N < first + tier["rows"])
            layout = CodeLayout(**{**sizes, "num_levels": tier["num_levels"]})
            packed_VW = tensors[f"packed_codes.{at}" if at else "packed_codes"]
            of_levels = Coded.of(packed_VW, values[: layout.codes_per_row], layout)
            vectors_NE[here_N] = references.decode(of_levels, rows_N[here_N] - first)
            first += tier["rows"]
        return vectors_NE


class StoreReader(Anything):
    """In process, from the artifact's folder."""

    pools = True

    def __init__(self, artifact: Path) -> None:
        self.store = EmbeddingStore.open(artifact)

    def lookup(self, table: str, ids: Sequence[Any], dtype: str, missing: str) -> Answer:
        try:
            found = self.store.lookup(table, ids, dtype=dtype, missing=missing)
        except UnknownTableError as error:
            raise ReaderError("unknown_table") from error
        except UnknownIdsError as error:
            raise ReaderError("unknown_ids") from error
        except IdTypeError as error:
            raise ReaderError("id_type") from error
        return Answer(found.vectors, found.missing.tolist())

    def pool(self, table: str, ids: Sequence[Any], bag_lengths: list[int], dtype: str, pooling: str) -> Answer:
        found = self.store.lookup_bags(table, ids, bag_lengths, dtype=dtype, pooling=pooling)
        return Answer(found.vectors, found.missing.tolist())


class ModuleReader(Anything):
    """The torch modules in eval mode, before they were frozen. They take rows, so the vocabulary is put before them."""

    tables = cases.TRAINED
    dtypes = ("float32",)
    id_types = ()
    takes_no_ids = False  # a KeyedJaggedTensor has at least one bag

    def __init__(self, artifact: Path) -> None:
        self.modules = dict(zip(cases.TRAINED, cases.trained_model().eval(), strict=True))

    def lookup(self, table: str, ids: Sequence[Any], dtype: str, missing: str) -> Answer:
        if table not in self.modules:
            raise ReaderError("unknown_table")
        rows = [cases.LONG_IDS.index(i) if i in cases.LONG_IDS else MISSING_ROW for i in ids]
        unknown = [at for at, row in enumerate(rows) if row == MISSING_ROW]
        if unknown and missing == "error":
            raise ReaderError("unknown_ids")
        known_N = torch.tensor([max(row, 0) for row in rows], dtype=torch.long)
        vectors_NE = self.modules[table](cases.bags_of_one(table, known_N)).values().detach().numpy().copy()
        vectors_NE[unknown] = 0
        return Answer(vectors_NE, unknown)


class PublishedReader(StoreReader):
    """In process, from a store that the artifact was published to."""

    def __init__(self, artifact: Path) -> None:
        self.folder = tempfile.TemporaryDirectory()
        publish(artifact, self.folder.name)
        super().__init__(Path(self.folder.name))

    def close(self) -> None:
        self.folder.cleanup()


class CommandLineReader(Anything):
    """`dpq-rec lookup`. It prints zeros for unknown ids and says so by its exit code."""

    dtypes = ("float32",)
    id_types = ("strings", "floats")  # on a command line nothing is a boolean
    string_id_types = ()  # and everything is a string
    takes_no_ids = False

    def __init__(self, artifact: Path) -> None:
        self.artifact = artifact

    def lookup(self, table: str, ids: Sequence[Any], dtype: str, missing: str) -> Answer:
        with contextlib.redirect_stdout(io.StringIO()) as stdout, contextlib.redirect_stderr(io.StringIO()) as stderr:
            try:
                code = main(["lookup", str(self.artifact), "--table", table, "--", *map(str, ids)])
            except SystemExit as exit_:
                code = exit_.code
        if code == 2:
            raise ReaderError("id_type" if "want an integer" in stderr.getvalue() else "unknown_table")
        answer = from_json(json.loads(stdout.getvalue()), dtype)
        assert code == (1 if answer.missing else 0)
        if answer.missing and missing == "error":
            raise ReaderError("unknown_ids")
        return answer


class ParquetReader(Anything):
    """`dpq-rec export`, read by pyarrow. A file has no policies and no types of ids but its own."""

    id_types = string_id_types = ()

    def __init__(self, artifact: Path) -> None:
        self.store = EmbeddingStore.open(artifact)
        self.folder = tempfile.TemporaryDirectory()
        self.exports: dict[tuple[str, str], dict[Any, np.ndarray]] = {}

    def lookup(self, table: str, ids: Sequence[Any], dtype: str, missing: str) -> Answer:
        manifest = self._table(table).manifest
        if manifest.vocabulary["kind"] == "modulo":  # whoever joins by id must hash as the model did
            ids = [i % manifest.num_embeddings for i in ids]
        vectors = self._export(table, dtype)
        unknown = [at for at, i in enumerate(ids) if i not in vectors]
        if unknown and missing == "error":
            raise ReaderError("unknown_ids")
        found = [vectors.get(i, np.zeros(manifest.embedding_dim, dtype)) for i in ids]
        return Answer(np.array(found, dtype).reshape(len(ids), manifest.embedding_dim), unknown)

    def _table(self, table: str) -> Any:
        try:
            return self.store.table(table)
        except UnknownTableError as error:
            raise ReaderError("unknown_table") from error

    def _export(self, table: str, dtype: str) -> dict[Any, np.ndarray]:
        if (table, dtype) not in self.exports:
            folder = Path(self.folder.name) / f"{table}-{dtype}"
            export_table(self._table(table), folder, ExportConfig(dtype=dtype, rows_per_part=13))
            lines = pa.concat_tables(pq.read_table(part) for part in sorted(folder.iterdir()))
            vectors = (np.array(vector, dtype) for vector in lines["vector"].to_pylist())
            self.exports[table, dtype] = dict(zip(lines["id"].to_pylist(), vectors, strict=True))
        return self.exports[table, dtype]

    def close(self) -> None:
        self.folder.cleanup()


def from_json(reply: dict[str, Any], dtype: str) -> Answer:
    vectors = np.array(reply["vectors"], np.float64).astype(np.float32).astype(dtype)
    return Answer(vectors.reshape(-1, reply["dim"]), reply["missing"])


# Readers of the artifact's folder.
OF_ARTIFACT: dict[str, type[Any]] = {
    "reference": ReferenceReader,
    "module": ModuleReader,
    "store": StoreReader,
    "published": PublishedReader,
    "cli": CommandLineReader,
    "parquet": ParquetReader,
}
