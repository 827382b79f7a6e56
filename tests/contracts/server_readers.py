"""A server, and every way to get a vector from it: readers of the form in `readers`, and a line for each at the end."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pyarrow as pa

from dpq_rec.client import CodesClient
from dpq_rec.errors import IdTypeError, ServerError
from service.proto.dpq.v1 import embedding_pb2 as pb
from service.proto.dpq.v1 import embedding_pb2_grpc as pb_grpc
from tests.contracts import cases
from tests.contracts.readers import Answer, Anything, ReaderError, from_json

ROOT = Path(__file__).parents[2]


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


class _HttpReader(Anything):
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
        return from_json(reply, dtype)


class HttpTablesReader(_HttpReader):
    """POST /v1/lookup, which takes several tables."""

    def lookup(self, table: str, ids: Sequence[Any], dtype: str, missing: str) -> Answer:
        body = {"tables": {"one_row": {"ids": [42]}, table: {"ids": list(ids)}}}
        reply = self._post("/v1/lookup", dtype, missing, json=body).json()
        return from_json(reply["tables"][table], dtype)


class HttpBinaryReader(_HttpReader):
    """POST /v1/tables/{table}/lookup, bytes both ways: eight of them are always an integer."""

    tables = tuple(table for table in cases.TABLES if table not in cases.STRING_TABLES)
    id_types = ()

    def lookup(self, table: str, ids: Sequence[Any], dtype: str, missing: str) -> Answer:
        binary = "application/octet-stream"
        headers, content = {"Content-Type": binary, "Accept": binary}, np.array(ids, "<i8").tobytes()
        reply = self._post(f"/v1/tables/{table}/lookup", dtype, missing, content=content, headers=headers)
        num_rows, dim = int(reply.headers["X-Num-Rows"]), int(reply.headers["X-Dim"])
        element = np.dtype(reply.headers["X-Dtype"]).newbyteorder("<")
        vectors = np.frombuffer(reply.content, element, num_rows * dim).reshape(num_rows, dim)
        unknown = np.frombuffer(reply.content, "<u4", int(reply.headers["X-Num-Missing"]), vectors.nbytes)
        assert len(reply.content) == vectors.nbytes + unknown.nbytes
        return Answer(vectors, unknown.tolist())


class HttpArrowReader(_HttpReader):
    """POST /v1/tables/{table}/lookup, JSON to an Arrow IPC stream, in which null stands for an unknown id's vector."""

    def lookup(self, table: str, ids: Sequence[Any], dtype: str, missing: str) -> Answer:
        headers = {"Accept": "application/vnd.apache.arrow.stream"}
        reply = self._post(f"/v1/tables/{table}/lookup", dtype, missing, json={"ids": list(ids)}, headers=headers)
        with pa.ipc.open_stream(reply.content) as stream:
            rows = stream.read_all()
        assert rows["id"].to_pylist() == list(ids)
        vectors = rows["vector"].combine_chunks()
        unknown = np.flatnonzero(vectors.is_null().to_numpy(zero_copy_only=False)).tolist()
        dim = vectors.type.list_size
        found = np.array([v or [0.0] * dim for v in vectors.to_pylist()], np.float64).astype(np.float32).astype(dtype)
        assert str(vectors.type.value_type) == {"float32": "float", "float16": "halffloat"}[dtype]
        return Answer(found.reshape(len(ids), dim), unknown)


class HttpCodesReader(Anything):
    """The client that takes codes and decodes them."""

    tables = tuple(table for table in cases.TABLES if "dense" not in table and table != "trained_plain")
    dtypes = ("float32",)
    id_types: tuple[str, ...] = ("strings", "floats", "booleans")

    def __init__(self, server: Server) -> None:
        self.client = CodesClient(server.http)

    def lookup(self, table: str, ids: Sequence[Any], dtype: str, missing: str) -> Answer:
        try:
            vectors, unknown = self.client.lookup(table, list(ids), missing=missing)
        except IdTypeError as error:
            raise ReaderError("id_type") from error
        except ServerError as error:
            raise ReaderError("id_type" if error.status in (415, 422) else error.error_type) from error
        return Answer(vectors, unknown.tolist())

    def close(self) -> None:
        self.client.close()


class GrpcReader(Anything):
    """Lookup."""

    id_types, string_id_types = ("strings",), ("integers",)  # the message has no field for others
    pools = True

    def __init__(self, server: Server) -> None:
        self.channel = grpc.insecure_channel(server.grpc)
        self.stub = pb_grpc.EmbeddingServiceStub(self.channel)

    def lookup(self, table: str, ids: Sequence[Any], dtype: str, missing: str) -> Answer:
        return self._ask(table, ids, dtype, missing=pb.ERROR if missing == "error" else pb.ZEROS)

    def pool(self, table: str, ids: Sequence[Any], bag_lengths: list[int], dtype: str, pooling: str) -> Answer:
        return self._ask(table, ids, dtype, bag_lengths=bag_lengths, pooling=pb.MEAN if pooling == "mean" else pb.SUM)

    def _ask(self, table: str, ids: Sequence[Any], dtype: str, **more: Any) -> Answer:
        field = "string_ids" if ids and isinstance(ids[0], str) else "ids"
        wanted = {"dtype": pb.FLOAT16 if dtype == "float16" else pb.FLOAT32}
        try:
            reply = self._call(pb.LookupRequest(table=table, **{field: ids}, **wanted, **more))
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


class GrpcStreamReader(GrpcReader):
    """StreamLookup, which takes one request after the other."""

    def _call(self, request: Any) -> Any:
        other = pb.LookupRequest(table="one_row", ids=[42])
        return list(self.stub.StreamLookup(iter([other, request])))[1]


# Readers of the server that serves the artifact.
OF_SERVER: dict[str, type[Any]] = {
    "http-json": HttpJsonReader,
    "http-tables": HttpTablesReader,
    "http-binary": HttpBinaryReader,
    "http-arrow": HttpArrowReader,
    "http-codes": HttpCodesReader,
    "grpc": GrpcReader,
    "grpc-batch": GrpcBatchReader,
    "grpc-stream": GrpcStreamReader,
}
