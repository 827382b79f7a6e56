"""Every way to get a vector, behind one method. Another way: a class of this form, and a line at the end."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import grpc
import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.numpy
import torch

from dpq_rec import CodeLayout, EmbeddingStore, IdTypeError, UnknownIdsError, UnknownTableError, publish
from dpq_rec.cli import main
from dpq_rec.export import ExportConfig, export_table
from dpq_rec.kernels import MISSING_ROW, reference
from service.proto.dpq.v1 import embedding_pb2 as pb
from service.proto.dpq.v1 import embedding_pb2_grpc as pb_grpc
from tests.contracts import cases

ROOT = Path(__file__).parents[2]


class Answer(NamedTuple):
    """vectors [N, E] of the dtype asked for, and the positions of unknown ids."""

    vectors: np.ndarray
    missing: list[int]


class ReaderError(Exception):
    """What went wrong: "unknown_table", "unknown_ids" or "id_type"."""


class Reader(Protocol):
    """One way to get vectors out of an artifact.

    Attributes:
        tables: those it knows.
        dtypes: what it can be asked for.
        id_types: the keys of `cases.WRONG_IDS` that it can be given at all for a table of integers.
        string_id_types: likewise, for a table of strings.
        takes_no_ids: whether it can be asked for no ids.
    """

    tables: Sequence[str]
    dtypes: tuple[str, ...]
    id_types: tuple[str, ...]
    string_id_types: tuple[str, ...]
    takes_no_ids: bool

    def lookup(self, table: str, ids: Sequence[Any], dtype: str, missing: str) -> Answer:
        """Vectors of ids.

        Raises:
            ReaderError: see there.
        """

    def close(self) -> None:
        """Let go of what the reader holds."""


class _Anything:
    """A reader without limits, that holds nothing."""

    tables: Sequence[str] = cases.TABLES
    dtypes: tuple[str, ...] = ("float32", "float16")
    id_types: tuple[str, ...] = ("strings", "floats", "booleans")
    string_id_types: tuple[str, ...] = ("integers", "floats", "booleans")
    takes_no_ids = True

    def close(self) -> None:
        pass


class ReferenceReader(_Anything):
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
            return reference.decode(tensors["packed_codes"], values, rows_N, CodeLayout(**sizes))
        vectors_NE, first = np.zeros((len(rows_N), entry["embedding_dim"]), np.float32), 0
        for at, tier in enumerate(entry["tiers"]):
            here_N = (rows_N >= first) & (rows_N < first + tier["rows"])
            layout = CodeLayout(**{**sizes, "num_levels": tier["num_levels"]})
            packed_VW = tensors[f"packed_codes.{at}" if at else "packed_codes"]
            of_levels = values[: layout.codes_per_row]
            vectors_NE[here_N] = reference.decode(packed_VW, of_levels, rows_N[here_N] - first, layout)
            first += tier["rows"]
        return vectors_NE


class StoreReader(_Anything):
    """In process, from the artifact's folder."""

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


class ModuleReader(_Anything):
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


class CommandLineReader(_Anything):
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
        answer = _from_json(json.loads(stdout.getvalue()), dtype)
        assert code == (1 if answer.missing else 0)
        if answer.missing and missing == "error":
            raise ReaderError("unknown_ids")
        return answer


class ParquetReader(_Anything):
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


class Server:
    """A server of its own process, started once for all readers that ask it."""

    def __init__(self, artifact: Path) -> None:
        flags = ["--http-port", "0", "--grpc-port", "0", "--workers", "1", "--drain-seconds", "0"]
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - `close` closes it
        self.process = subprocess.Popen(
            [sys.executable, "-m", "service", "--artifact", str(artifact), *flags],
            cwd=ROOT,
            env={name: value for name, value in os.environ.items() if not name.startswith("DPQ_")},
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        ready = re.match(r"ready: (http://\S+) grpc://(\S+)", line)
        if not ready:
            self.process.kill()
            self.log.seek(0)
            raise RuntimeError(f"the server printed {line!r} and logged {self.log.read()}")
        self.http, self.grpc = ready.groups()

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(30)
        self.log.close()


def _from_json(reply: dict[str, Any], dtype: str) -> Answer:
    vectors = np.array(reply["vectors"], np.float64).astype(np.float32).astype(dtype)
    return Answer(vectors.reshape(-1, reply["dim"]), reply["missing"])


class _HttpReader(_Anything):
    def __init__(self, server: Server) -> None:
        self.client = httpx.Client(base_url=server.http)

    def _post(self, path: str, dtype: str, missing: str, **body: Any) -> httpx.Response:
        reply = self.client.post(path, params={"dtype": dtype, "missing": missing}, **body)
        if reply.status_code == 404:
            raise ReaderError(reply.json()["error_type"])
        if reply.status_code == 422:
            raise ReaderError("id_type")
        return reply.raise_for_status()

    def close(self) -> None:
        self.client.close()


class HttpJsonReader(_HttpReader):
    """POST /v1/tables/{table}/lookup, JSON both ways."""

    def lookup(self, table: str, ids: Sequence[Any], dtype: str, missing: str) -> Answer:
        reply = self._post(f"/v1/tables/{table}/lookup", dtype, missing, json={"ids": list(ids)}).json()
        assert reply["table"] == table
        return _from_json(reply, dtype)


class HttpTablesReader(_HttpReader):
    """POST /v1/lookup, which takes several tables."""

    def lookup(self, table: str, ids: Sequence[Any], dtype: str, missing: str) -> Answer:
        body = {"tables": {"one_row": {"ids": [42]}, table: {"ids": list(ids)}}}
        reply = self._post("/v1/lookup", dtype, missing, json=body).json()
        return _from_json(reply["tables"][table], dtype)


class HttpBinaryReader(_HttpReader):
    """POST /v1/tables/{table}/lookup, bytes both ways: eight of them are always an integer."""

    tables = tuple(table for table in cases.TABLES if table not in cases.STRING_TABLES)
    id_types = ()

    def lookup(self, table: str, ids: Sequence[Any], dtype: str, missing: str) -> Answer:
        octets = "application/octet-stream"
        headers, content = {"Content-Type": octets, "Accept": octets}, np.array(ids, "<i8").tobytes()
        reply = self._post(f"/v1/tables/{table}/lookup", dtype, missing, content=content, headers=headers)
        num_rows, dim = int(reply.headers["X-Num-Rows"]), int(reply.headers["X-Dim"])
        element = np.dtype(reply.headers["X-Dtype"]).newbyteorder("<")
        vectors = np.frombuffer(reply.content, element, num_rows * dim).reshape(num_rows, dim)
        unknown = np.frombuffer(reply.content, "<u4", int(reply.headers["X-Num-Missing"]), vectors.nbytes)
        assert len(reply.content) == vectors.nbytes + unknown.nbytes
        return Answer(vectors, unknown.tolist())


class GrpcReader(_Anything):
    """Lookup."""

    id_types, string_id_types = ("strings",), ("integers",)  # the message has no field for others

    def __init__(self, server: Server) -> None:
        self.channel = grpc.insecure_channel(server.grpc)
        self.stub = pb_grpc.EmbeddingServiceStub(self.channel)

    def lookup(self, table: str, ids: Sequence[Any], dtype: str, missing: str) -> Answer:
        field = "string_ids" if ids and isinstance(ids[0], str) else "ids"
        wanted = {"dtype": pb.FLOAT16 if dtype == "float16" else pb.FLOAT32}
        policy = {"missing": pb.ERROR if missing == "error" else pb.ZEROS}
        try:
            reply = self._call(pb.LookupRequest(table=table, **{field: ids}, **wanted, **policy))
        except grpc.RpcError as error:
            raise ReaderError(self._kind(error)) from error
        assert reply.dtype == wanted["dtype"]
        element = np.dtype(dtype).newbyteorder("<")
        return Answer(np.frombuffer(reply.vectors, element).reshape(-1, reply.dim), list(reply.missing))

    def _call(self, request: Any) -> Any:
        return self.stub.Lookup(request)

    @staticmethod
    def _kind(error: Any) -> str:
        if error.code() == grpc.StatusCode.NOT_FOUND:
            return "unknown_table" if "is not in this artifact" in error.details() else "unknown_ids"
        return "id_type" if error.code() == grpc.StatusCode.INVALID_ARGUMENT else str(error)

    def close(self) -> None:
        self.channel.close()


class GrpcBatchReader(GrpcReader):
    """BatchLookup, which takes several requests."""

    def _call(self, request: Any) -> Any:
        other = pb.LookupRequest(table="one_row", ids=[42])
        return self.stub.BatchLookup(pb.BatchLookupRequest(requests=[other, request])).replies[1]


# Readers of the artifact's folder, and of the server that serves it.
OF_ARTIFACT: dict[str, type[Any]] = {
    "reference": ReferenceReader,
    "module": ModuleReader,
    "store": StoreReader,
    "published": PublishedReader,
    "cli": CommandLineReader,
    "parquet": ParquetReader,
}
OF_SERVER: dict[str, type[Any]] = {
    "http-json": HttpJsonReader,
    "http-tables": HttpTablesReader,
    "http-binary": HttpBinaryReader,
    "grpc": GrpcReader,
    "grpc-batch": GrpcBatchReader,
}
