"""The gRPC API (contract 5). In: an Engine and an address. Out: a GrpcServer on the running event loop.

Imported only after the fork: gRPC's threads do not survive one. gRPC's server with threads answers up to twice as
many small calls, but its threads would take the interpreter from the loop that HTTP is answered on, and the engine
counts without locks; a caller in haste has StreamLookup, which gains as much.
`python -m tests.benchmarks.service grpc` compares them.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

import grpc
import grpc.aio
import numpy as np
from google.protobuf.message import DecodeError, Message
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from numpy.typing import NDArray

from dpq_rec import Lookup
from dpq_rec.search import Similarity
from dpq_rec.table import MissingPolicy, VectorType
from dpq_rec.wire import Buffer, bytes_of
from service import errors
from service.engine import Engine, largest_reply_bytes
from service.grpc_calls import Calls, is_of_use
from service.messages import Pooling, SearchRequest, TableRequest
from service.proto.dpq.v1 import embedding_pb2 as pb

T = TypeVar("T")
M = TypeVar("M", bound=Message)

SERVICE = pb.DESCRIPTOR.services_by_name["EmbeddingService"].full_name
_DTYPES: dict[int, VectorType] = {pb.FLOAT32: "float32", pb.FLOAT16: "float16"}
_POLICIES: dict[int, MissingPolicy] = {pb.ZEROS: "zeros", pb.ERROR: "error"}
_SIMILARITIES: dict[int, Similarity] = {pb.DOT: "dot", pb.COSINE: "cosine"}
_POOLINGS: dict[int, Pooling] = {pb.NONE: "none", pb.SUM: "sum", pb.MEAN: "mean"}
_POLL_SECONDS = 0.02
_FINISH_SECONDS = 1.0  # for the last replies to be sent
_CONNECTIONS_FOR_ALL_CALLS = 4  # one alone must not take every call that a worker holds
_SMALL_BYTES = 1 << 15  # of a message that is parsed on the event loop
_REQUEST_VALUES = 512  # a request of a batch takes as long as so many values, besides its ids
_KEEPALIVE_MS = 60_000
_FIELD_1 = 1 << 3 | 2  # the tag of a field of bytes, or of a message
_MOST_KEPT = 256  # ends of replies
_HANDSHAKE_MS = 10_000  # from a connection to its first frame, lest those that send nothing take all places


class GrpcServer:
    """The embedding service, health and reflection of one worker."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        logging.getLogger("grpc._cython.cygrpc").addFilter(is_of_use)
        self._server = grpc.aio.server(options=_options(engine))
        self._health = health.aio.HealthServicer()
        self._calls = Calls(engine)
        self._server.add_generic_rpc_handlers((_handlers(EmbeddingServicer(engine), self._calls),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)

    async def start(self, address: str) -> int:
        """Listen, beside the other workers on the same port; the port. Health says NOT_SERVING until `serve`.

        Raises:
            RuntimeError: the address cannot be listened on.
        """
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        self._calls.port = self._server.add_insecure_port(address)
        await self._server.start()
        self._watch = asyncio.create_task(self._calls.watch())
        return self._calls.port

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
        self._watch.cancel()

    async def _set_health(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for name in (health.OVERALL_HEALTH, SERVICE):
            await self._health.set(name, status)


def _options(engine: Engine) -> list[tuple[str, int]]:
    settings = engine.settings
    return [
        ("grpc.so_reuseport", 1),
        ("grpc.max_receive_message_length", settings.body_limit_bytes),
        ("grpc.max_send_message_length", largest_reply_bytes(engine.store, settings.max_ids)),
        ("grpc.max_allowed_incoming_connections", settings.max_connections),
        ("grpc.server_handshake_timeout_ms", _HANDSHAKE_MS),
        ("grpc.max_concurrent_streams", max(1, settings.max_calls // _CONNECTIONS_FOR_ALL_CALLS)),
        # Clients of long streams ask by pings whether the connection still holds; gRPC allows one in five minutes.
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", round(1000 * settings.min_ping_seconds)),
        # And so does the server, lest callers who are gone keep their streams.
        ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
        ("grpc.http2.max_pings_without_data", 0),
    ]


def _handlers(servicer: EmbeddingServicer, calls: Calls) -> grpc.GenericRpcHandler:
    """The procedures by name. Not the generated ones: see `service.grpc_calls`."""
    unary = {
        "Lookup": servicer.lookup,
        "BatchLookup": servicer.batch_lookup,
        "ListTables": servicer.list_tables,
        "Search": servicer.search,
    }
    handlers = {
        method: grpc.stream_unary_rpc_method_handler(functools.partial(calls.unary, method, respond))
        for method, respond in unary.items()
    }
    stream = functools.partial(calls.stream, "StreamLookup", servicer.lookup)
    handlers["StreamLookup"] = grpc.stream_stream_rpc_method_handler(stream)
    return grpc.method_handlers_generic_handler(SERVICE, handlers)


class EmbeddingServicer:
    """The procedures, from a serialized message to a serialized reply. They parse, call the engine and render."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._most_bytes = largest_reply_bytes(engine.store, engine.settings.max_ids)

    async def lookup(self, message: bytes) -> bytes:
        """Vectors of ids of one table."""
        return await self._run(pb.LookupRequest, message, lambda request: b"".join(self._lookup([request])[0]))

    async def batch_lookup(self, message: bytes) -> bytes:
        """Several lookups, all from one version."""
        return await self._run(pb.BatchLookupRequest, message, lambda batch: batch_reply(self._lookup(batch.requests)))

    async def _run(self, kind: type[M], message: bytes, answer: Callable[[M], bytes]) -> bytes:
        """The reply to a message, in a thread where it asks for much: its ids may be of a byte, its requests of few."""
        engine = self._engine
        if len(message) > _SMALL_BYTES or not engine.is_small(len(message)):
            return await engine.run_in_thread(lambda: answer(_parsed(kind, message)))
        parsed = _parsed(kind, message)
        requests = parsed.requests if isinstance(parsed, pb.BatchLookupRequest) else [parsed]
        num_ids = sum(len(each.ids) + len(each.string_ids) + len(each.bag_lengths) for each in requests)
        num_values = num_ids * engine.max_dim + len(requests) * _REQUEST_VALUES
        return await engine.run_values(lambda: answer(parsed), num_values)

    async def search(self, message: bytes) -> bytes:
        """The ids most similar to queries."""

        def work(check: Callable[[], None]) -> bytes:
            answers, missing = self._engine.search(_search_of(_parsed(pb.SearchRequest, message), self._engine), check)
            found = pb.SearchReply(missing=missing.tolist(), version=self._engine.version)
            for ids_T, scores_T in answers:
                kind = "string_ids" if ids_T and isinstance(ids_T[0], str) else "ids"
                found.neighbours.add(**{kind: ids_T}, scores=scores_T)
            reply: bytes = found.SerializeToString()
            if len(reply) > self._most_bytes:
                got = f"{len(reply)} bytes of answers, want at most {self._most_bytes}"
                raise errors.TooManyIdsError(f"k: got {got} in a message; ask for fewer")
            return reply

        return await self._engine.run_search(work)

    async def list_tables(self, message: bytes) -> bytes:
        """The tables that are served."""
        _parsed(pb.ListTablesRequest, message)
        infos = [pb.TableInfo(**dataclasses.asdict(table)) for table in self._engine.list_tables()]
        return bytes(pb.ListTablesReply(version=self._engine.version, tables=infos).SerializeToString())

    def _lookup(self, messages: Sequence[pb.LookupRequest]) -> list[list[Buffer]]:
        self._engine.check_num_ids(sum(len(message.ids) + len(message.string_ids) for message in messages))
        lookups, version = self._engine.lookup([_request_of(message) for message in messages]), self._engine.version
        return [reply_pieces(version, message.dtype, found) for message, found in zip(messages, lookups, strict=True)]


def _parsed(kind: type[M], message: bytes) -> M:
    try:
        parsed: M = kind.FromString(message)
        return parsed
    except DecodeError:
        got = f"{len(message)} bytes that are no {kind.DESCRIPTOR.name}"
        wanted = "one with strings in UTF-8 and every field complete"
        raise errors.MalformedError(f"message: got {got}; want {wanted}") from None


def _request_of(message: pb.LookupRequest) -> TableRequest:
    ids = _ids_of(message)
    pooling = _named(_POOLINGS, message.pooling, "pooling")
    has_bags = pooling != "none" or len(message.bag_lengths)
    return TableRequest(
        table=message.table,
        ids=ids,
        dtype=_named(_DTYPES, message.dtype, "dtype"),
        missing=_named(_POLICIES, message.missing, "missing"),
        pooling=pooling,
        bag_lengths_B=_array(message.bag_lengths) if has_bags else None,
    )


def _search_of(message: pb.SearchRequest, engine: Engine) -> SearchRequest:
    ids = _ids_of(message)
    num_numbers, dim = len(message.queries), engine.table(message.table).manifest.embedding_dim
    if num_numbers % dim:
        raise errors.InvalidRequestError(f"queries: got {num_numbers} numbers, want a multiple of {dim}")
    return SearchRequest(
        table=message.table,
        queries=np.fromiter(message.queries, np.float32, num_numbers).reshape(-1, dim) if num_numbers else None,
        ids=ids if len(ids) else None,
        k=message.k or SearchRequest.k,
        similarity=_named(_SIMILARITIES, message.similarity, "similarity"),
        missing=_named(_POLICIES, message.missing, "missing"),
    )


def _ids_of(message: pb.LookupRequest | pb.SearchRequest) -> NDArray[np.int64] | list[str]:
    if len(message.ids) and len(message.string_ids):
        raise errors.InvalidRequestError("ids, string_ids: got both, want those that the table's vocabulary has")
    return list(message.string_ids) if len(message.string_ids) else _array(message.ids)


def _named(names: dict[int, T], number: int, what: str) -> T:
    if number not in names:
        raise errors.InvalidRequestError(f"{what}: got {number}, want one of {sorted(names)}")
    return names[number]


def _array(numbers: Sequence[int]) -> NDArray[np.int64]:
    return np.fromiter(numbers, np.int64, len(numbers))


# Replies. protobuf's own way copies the vectors into a message, out of it and together; here they are copied once: a
# message's fields may be written one behind the other, each as its tag, its length and its content.


def reply_pieces(version: str, dtype: int, found: Lookup) -> list[Buffer]:
    """A serialized LookupReply, in pieces that are to be joined."""
    vectors = bytes_of(found.vectors)
    dim, missing = found.vectors.shape[1], found.missing.tolist()
    # What is missing seldom repeats: such a reply would be kept for nothing.
    make_rest = _fields_behind_vectors.__wrapped__ if missing else _fields_behind_vectors
    rest = make_rest(version, dtype, dim, tuple(missing))
    return [_head_of_field_1(len(vectors)), vectors, rest] if len(vectors) else [rest]


def batch_reply(replies: Sequence[Sequence[Buffer]]) -> bytes:
    """A serialized BatchLookupReply of the pieces of its replies."""
    pieces: list[Buffer] = []
    for reply in replies:
        pieces += [_head_of_field_1(sum(map(len, reply))), *reply]
    return b"".join(pieces)


@functools.lru_cache(_MOST_KEPT)
def _fields_behind_vectors(version: str, dtype: int, dim: int, missing: tuple[int, ...]) -> bytes:
    message = pb.LookupReply(dim=dim, dtype=dtype, missing=missing, version=version)  # type: ignore[arg-type] # an int
    return bytes(message.SerializeToString())


def _head_of_field_1(num_bytes: int) -> bytes:
    """Tag and length of LookupReply.vectors, or of one of BatchLookupReply.replies."""
    head = bytearray([_FIELD_1])
    while num_bytes > 0x7F:
        head.append(num_bytes & 0x7F | 0x80)
        num_bytes >>= 7
    head.append(num_bytes)
    return bytes(head)
