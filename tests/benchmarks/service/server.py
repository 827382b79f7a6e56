"""The server that is measured: `python -m tests.benchmarks.service.server ARTIFACT CORE`. Out: its two ports.

One worker, wired as the product wires it, and beside its routes what it is compared with, in the same server: constant
bytes, and a lookup as FastAPI does one by default. On another port gRPC's server with threads.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import uvicorn
import uvloop
from fastapi import FastAPI
from pydantic import BaseModel
from starlette.types import ASGIApp, Receive, Scope, Send

from dpq_rec import EmbeddingStore
from service import supervisor, worker
from service.engine import Engine
from service.grpc_api import SERVICE, EmbeddingServicer, GrpcServer
from service.http_schema import LookupReply
from service.metrics import Metrics
from service.proto.dpq.v1 import embedding_pb2 as pb
from service.settings import Settings

_CONSTANT = "/constant/"  # and how many bytes
_DEFAULT = "/default/"
_THREADS = 4


class Ids(BaseModel):
    """A body as FastAPI parses it."""

    ids: list[int]


class Compared:
    """ASGI: the product's application, and what it is compared with."""

    def __init__(self, app: ASGIApp, engine: Engine) -> None:
        self.app, self.default = app, _default(engine)
        self.constant: dict[str, bytes] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        path = scope["path"]
        if not path.startswith(_CONSTANT):
            await (self.default if path.startswith(_DEFAULT) else self.app)(scope, receive, send)
            return
        num_bytes = path.removeprefix(_CONSTANT)
        body = self.constant.setdefault(num_bytes, bytes(int(num_bytes)))
        await receive()
        headers = [(b"content-length", num_bytes.encode()), (b"content-type", b"application/octet-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


def _default(engine: Engine) -> FastAPI:
    """A lookup as one writes it first: models in and out, or a model in and through jsonable_encoder out."""
    app, store = FastAPI(), engine.store

    @app.post(_DEFAULT + "{table}")
    def lookup(table: str, request: Ids) -> LookupReply:
        vectors, missing = store.lookup(table, np.array(request.ids, np.int64))
        return LookupReply(
            table=table,
            version=store.version,
            dim=vectors.shape[1],
            vectors=vectors.tolist(),
            missing=missing.tolist(),
        )

    @app.post(_DEFAULT + "encoder/{table}", response_model=None)
    def lookup_encoded(table: str, request: Ids) -> dict[str, Any]:
        vectors, missing = store.lookup(table, np.array(request.ids, np.int64))
        found = {"table": table, "version": store.version, "dim": vectors.shape[1]}
        return {**found, "vectors": vectors.tolist(), "missing": missing.tolist()}

    return app


def _threaded(engine: Engine, port: int) -> grpc.Server:
    """GRPC's server with threads, and the same procedures."""
    servicer = EmbeddingServicer(engine)

    def lookup(request: bytes, context: Any) -> bytes:
        return b"".join(servicer._lookup([pb.LookupRequest.FromString(request)])[0])

    def stream(requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        return (lookup(request, context) for request in requests)

    handlers = {
        "Lookup": grpc.unary_unary_rpc_method_handler(lookup),
        "StreamLookup": grpc.stream_stream_rpc_method_handler(stream),
    }
    server = grpc.server(
        concurrent.futures.ThreadPoolExecutor(_THREADS), options=[("grpc.max_receive_message_length", -1)]
    )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    return server


async def serve(artifact: Path) -> None:
    """Serve until killed."""
    store = EmbeddingStore.open(artifact)
    engine = Engine(store, Settings(artifact=artifact), Metrics(store.version))
    config = worker.http_config(engine)
    config.app = Compared(config.app, engine)  # type: ignore[arg-type] # it is an application
    sock = supervisor.bind("127.0.0.1", 0, shared=False)
    server, grpc_server = uvicorn.Server(config), GrpcServer(engine)
    task = asyncio.create_task(server.serve(sockets=[sock]))
    grpc_port = await grpc_server.start("127.0.0.1:0")
    await grpc_server.serve()
    threaded_port = supervisor.bind("127.0.0.1", 0, shared=True).getsockname()[1]
    threaded = _threaded(engine, threaded_port)
    engine.start()
    while not server.started:
        await asyncio.sleep(0.01)
    sys.stdout.write(f"{sock.getsockname()[1]} {grpc_port} {threaded_port}\n")
    sys.stdout.flush()
    await task
    threaded.stop(0)


if __name__ == "__main__":
    os.sched_setaffinity(0, {int(sys.argv[2])})
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(Path(sys.argv[1])))
