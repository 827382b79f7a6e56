"""The gRPC API (contract 5). In: an Engine and an address. Out: a GrpcServer on the running event loop.

Imported only after the fork: gRPC's threads do not survive one. gRPC's server with threads answers up to twice as
many small calls, but its threads would take the interpreter from the loop that HTTP is answered on, and the engine
counts without locks; a caller in haste has StreamLookup, which gains as much. `python -m service.bench grpc` compares
them.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import hmac
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, TypeVar

import grpc
import grpc.aio
import numpy as np
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from numpy.typing import NDArray

from dpq_rec import DamagedArtifactError, IdTypeError, UnknownIdsError, UnknownTableError
from dpq_rec.lookup import MissingPolicy, VectorType
from dpq_rec.octets import Octets
from dpq_rec.search import Similarity
from service import errors
from service.engine import Engine, largest_reply_bytes
from service.grpc_format import batch_reply, reply_pieces
from service.messages import Pooling, SearchAnswer, SearchRequest, TableRequest
from service.proto.dpq.v1 import embedding_pb2 as pb

T = TypeVar("T")
logger = logging.getLogger("service.grpc")

SERVICE = pb.DESCRIPTOR.services_by_name["EmbeddingService"].full_name
_CODES: dict[type[Exception], grpc.StatusCode] = {
    errors.UnauthorizedError: grpc.StatusCode.UNAUTHENTICATED,
    errors.InvalidRequestError: grpc.StatusCode.INVALID_ARGUMENT,
    IdTypeError: grpc.StatusCode.INVALID_ARGUMENT,
    UnknownTableError: grpc.StatusCode.NOT_FOUND,
    UnknownIdsError: grpc.StatusCode.NOT_FOUND,
    errors.TooManyIdsError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.OverloadedError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.NotReadyError: grpc.StatusCode.UNAVAILABLE,
}
_DTYPES: dict[int, VectorType] = {pb.FLOAT32: "float32", pb.FLOAT16: "float16"}
_POLICIES: dict[int, MissingPolicy] = {pb.ZEROS: "zeros", pb.ERROR: "error"}
_SIMILARITIES: dict[int, Similarity] = {pb.DOT: "dot", pb.COSINE: "cosine"}
_POOLINGS: dict[int, Pooling] = {pb.NONE: "none", pb.SUM: "sum", pb.MEAN: "mean"}
_POLL_SECONDS = 0.02
_FINISH_SECONDS = 1.0  # for the last replies to be sent


class GrpcServer:
    """The embedding service, health and reflection of one worker."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._server = grpc.aio.server(options=_options(engine))
        self._health = health.aio.HealthServicer()
        servicer = EmbeddingServicer(engine)
        self._server.add_generic_rpc_handlers((_handlers(servicer),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)

    async def start(self, address: str) -> int:
        """Listen, beside the other workers on the same port; health says NOT_SERVING until `serve`.

        Returns:
            The port.

        Raises:
            RuntimeError: the address cannot be listened on.
        """
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        port: int = self._server.add_insecure_port(address)
        await self._server.start()
        return port

    async def serve(self) -> None:
        """Health says SERVING from now on."""
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)

    async def drain(self) -> None:
        """Health says NOT_SERVING from now on; calls are still answered."""
        await self._health.enter_graceful_shutdown()

    async def stop(self, seconds: float) -> None:
        """End, once the requests in flight have, or after so long; the engine refuses new ones already.

        gRPC's own grace period would be spent whole on a caller that watches health, whose call never ends. (Nor can it
        be cut short by a second `stop`: two that time out together crash the process, as of grpcio 1.85.)
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while self._engine.num_in_flight and loop.time() < end:
            await asyncio.sleep(_POLL_SECONDS)
        await self._server.stop(_FINISH_SECONDS)

    async def _set_health(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for name in (health.OVERALL_HEALTH, SERVICE):
            await self._health.set(name, status)


def _options(engine: Engine) -> list[tuple[str, int]]:
    settings = engine.settings
    return [
        ("grpc.so_reuseport", 1),
        ("grpc.max_receive_message_length", settings.body_limit_bytes),
        ("grpc.max_send_message_length", largest_reply_bytes(engine.store, settings.max_ids)),
    ]


def _handlers(servicer: EmbeddingServicer) -> grpc.GenericRpcHandler:
    """The procedures by name. Not the generated ones: replies of lookups are bytes already (`service.grpc_format`)."""
    as_bytes = pb.ListTablesReply.SerializeToString, pb.SearchReply.SerializeToString
    handlers = {
        "Lookup": grpc.unary_unary_rpc_method_handler(servicer.Lookup, pb.LookupRequest.FromString),
        "BatchLookup": grpc.unary_unary_rpc_method_handler(servicer.BatchLookup, pb.BatchLookupRequest.FromString),
        "StreamLookup": grpc.stream_stream_rpc_method_handler(servicer.StreamLookup, pb.LookupRequest.FromString),
        "ListTables": grpc.unary_unary_rpc_method_handler(
            servicer.ListTables, pb.ListTablesRequest.FromString, as_bytes[0]
        ),
        "Search": grpc.unary_unary_rpc_method_handler(servicer.Search, pb.SearchRequest.FromString, as_bytes[1]),
    }
    return grpc.method_handlers_generic_handler(SERVICE, handlers)


class EmbeddingServicer:
    """The procedures. They parse, call the engine and render."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._most_bytes = largest_reply_bytes(engine.store, engine.settings.max_ids)

    async def Lookup(self, request: pb.LookupRequest, context: Any) -> bytes:  # noqa: N802 - the contract's name
        """Vectors of ids of one table."""
        return await self._answer("Lookup", context, lambda: self.answer_one(request), request.ByteSize())

    async def BatchLookup(self, request: pb.BatchLookupRequest, context: Any) -> bytes:  # noqa: N802
        """Several lookups, all from one version."""

        def work() -> bytes:
            return batch_reply(self._lookup(request.requests))

        return await self._answer("BatchLookup", context, work, request.ByteSize())

    async def StreamLookup(self, requests: AsyncIterator[pb.LookupRequest], context: Any) -> AsyncIterator[bytes]:  # noqa: N802
        """A reply to each request, in order, while the caller sends more; the first that fails ends the stream."""
        async for request in requests:
            work = functools.partial(self.answer_one, request)
            yield await self._answer("StreamLookup", context, work, request.ByteSize())

    async def Search(self, request: pb.SearchRequest, context: Any) -> pb.SearchReply:  # noqa: N802
        """The ids most similar to queries."""

        def work() -> pb.SearchReply:
            reply = _found_of(self._engine.search(_search_of(request, self._engine)))
            if reply.ByteSize() > self._most_bytes:
                got = f"{reply.ByteSize()} bytes of answers, want at most {self._most_bytes}"
                raise errors.TooManyIdsError(f"k: got {got} in a message; ask for fewer")
            return reply

        return await self._answer("Search", context, work, None)

    async def ListTables(self, request: pb.ListTablesRequest, context: Any) -> pb.ListTablesReply:  # noqa: N802
        """The tables that are served."""

        def work() -> pb.ListTablesReply:
            version, tables = self._engine.list_tables()
            return pb.ListTablesReply(
                version=version, tables=[pb.TableInfo(**dataclasses.asdict(table)) for table in tables]
            )

        return await self._answer("ListTables", context, work, request.ByteSize())

    def answer_one(self, request: pb.LookupRequest) -> bytes:
        """A serialized LookupReply."""
        return b"".join(self._lookup([request])[0])

    def _lookup(self, messages: Sequence[pb.LookupRequest]) -> list[list[Octets]]:
        self._engine.check_num_ids(sum(len(message.ids) + len(message.string_ids) for message in messages))
        version, lookups = self._engine.lookup([_request_of(message) for message in messages])
        return [reply_pieces(version, message.dtype, found) for message, found in zip(messages, lookups, strict=True)]

    async def _answer(self, method: str, context: Any, work: Callable[[], T], num_bytes: int | None) -> T:
        """work() within the engine's limits; what it raises becomes a status. Without num_bytes it is never small."""
        started, code = time.perf_counter(), grpc.StatusCode.CANCELLED
        try:
            _check_key(self._engine.settings.api_key, context)
            with self._engine.slot():
                engine = self._engine
                reply = await (engine.run_search(work) if num_bytes is None else engine.run(work, num_bytes))
            code = grpc.StatusCode.OK
            return reply
        except Exception as error:
            code = _CODES.get(type(error), grpc.StatusCode.INTERNAL)
            text = str(error)
            if code is grpc.StatusCode.INTERNAL:
                logger.exception("%s failed", method)
                if not isinstance(error, DamagedArtifactError):  # which no caller is to blame for
                    text = "internal error; the server's log says more"
            await context.abort(code, text)
            raise AssertionError("abort raises") from error
        finally:
            self._engine.metrics.answered("grpc", method, code.name, time.perf_counter() - started)


def _check_key(wanted: str | None, context: Any) -> None:
    if wanted is None:
        return
    metadata = dict(context.invocation_metadata() or ())
    scheme, _, bearer = str(metadata.get("authorization", "")).partition(" ")
    given = bearer.strip() if scheme.lower() == "bearer" else str(metadata.get("x-api-key", ""))
    if not given:
        raise errors.UnauthorizedError("got no API key; send the metadata 'authorization: Bearer KEY' or 'x-api-key'")
    if not hmac.compare_digest(given.encode(), wanted.encode()):
        raise errors.UnauthorizedError("got an API key that is not this server's")


def _request_of(message: pb.LookupRequest) -> TableRequest:
    """The engine's form of a request.

    Raises:
        InvalidRequestError: ids of both kinds, or a number that names no dtype, policy or pooling.
    """
    if len(message.ids) and len(message.string_ids):
        raise errors.InvalidRequestError("ids, string_ids: got both, want those that the table's vocabulary has")
    pooling = _named(_POOLINGS, message.pooling, "pooling")
    has_bags = pooling != "none" or len(message.bag_lengths)
    return TableRequest(
        table=message.table,
        ids=list(message.string_ids) if len(message.string_ids) else _array(message.ids),
        dtype=_named(_DTYPES, message.dtype, "dtype"),
        missing=_named(_POLICIES, message.missing, "missing"),
        pooling=pooling,
        bag_lengths_B=_array(message.bag_lengths) if has_bags else None,
    )


def _search_of(message: pb.SearchRequest, engine: Engine) -> SearchRequest:
    """The engine's form of a search.

    Raises:
        InvalidRequestError: ids of both kinds, queries of another width, or a number that names nothing.
        UnknownTableError: no such table.
    """
    if len(message.ids) and len(message.string_ids):
        raise errors.InvalidRequestError("ids, string_ids: got both, want those that the table's vocabulary has")
    num_numbers, dim = len(message.queries), engine.table(message.table).manifest.embedding_dim
    if num_numbers % dim:
        raise errors.InvalidRequestError(f"queries: got {num_numbers} numbers, want a multiple of {dim}")
    ids = list(message.string_ids) if len(message.string_ids) else _array(message.ids)
    return SearchRequest(
        table=message.table,
        queries=np.fromiter(message.queries, np.float32, num_numbers).reshape(-1, dim) if num_numbers else None,
        ids=ids if len(ids) else None,
        k=message.k or SearchRequest.k,
        similarity=_named(_SIMILARITIES, message.similarity, "similarity"),
        missing=_named(_POLICIES, message.missing, "missing"),
    )


def _found_of(answer: SearchAnswer) -> pb.SearchReply:
    reply = pb.SearchReply(missing=answer.missing.tolist(), version=answer.version)
    for ids_T, scores_T in answer.by_query():
        kind = "string_ids" if ids_T and isinstance(ids_T[0], str) else "ids"
        reply.neighbours.add(**{kind: ids_T}, scores=scores_T)
    return reply


def _named(names: dict[int, T], number: int, what: str) -> T:
    if number not in names:
        raise errors.InvalidRequestError(f"{what}: got {number}, want one of {sorted(names)}")
    return names[number]


def _array(numbers: Sequence[int]) -> NDArray[np.int64]:
    return np.fromiter(numbers, np.int64, len(numbers))
