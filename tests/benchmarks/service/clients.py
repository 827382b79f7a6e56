"""Clients that cost little, so that the server is what is measured. In: an address. Out: ask(n), for `open_loop`."""

from __future__ import annotations

import asyncio
import collections
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import grpc

from service.proto.dpq.v1 import embedding_pb2 as pb
from service.proto.dpq.v1 import embedding_pb2_grpc as pb_grpc

Ask = Callable[[int], Awaitable[bool]]
_END_OF_HEAD = b"\r\n\r\n"
_LENGTH = b"content-length:"


class _Connection(asyncio.Protocol):
    """One request at a time over HTTP/1.1, kept alive."""

    def __init__(self) -> None:
        self._received = bytearray()
        self._wanted: int | None = None  # bytes of the whole reply
        self._reply: asyncio.Future[bool] | None = None
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        if self._reply is not None and not self._reply.done():
            self._reply.set_exception(error or ConnectionResetError("the server closed the connection"))

    def data_received(self, data: bytes) -> None:
        self._received += data
        if self._wanted is None and (end := self._received.find(_END_OF_HEAD)) >= 0:
            head = bytes(self._received[:end]).lower()
            length = head.partition(_LENGTH)[2].partition(b"\r\n")[0]
            self._wanted = end + len(_END_OF_HEAD) + int(length or 0)
        if self._wanted is not None and len(self._received) >= self._wanted and self._reply is not None:
            self._reply.set_result(self._received.startswith(b"HTTP/1.1 200"))

    async def ask(self, request: bytes) -> bool:
        """Whether the reply to these bytes is a 200."""
        assert self._transport is not None
        self._received.clear()
        self._wanted, self._reply = None, asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await self._reply

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


@contextlib.asynccontextmanager
async def http_client(host: str, port: int, requests: Sequence[bytes], num_connections: int) -> AsyncIterator[Ask]:
    """ask(n) sends requests[n % len(requests)], whole HTTP requests, over the connection that was free last."""
    loop = asyncio.get_running_loop()
    free = collections.deque(
        [(await loop.create_connection(_Connection, host, port))[1] for _ in range(num_connections)]
    )
    connections, waiting = list(free), asyncio.Semaphore(num_connections)

    async def ask(n: int) -> bool:
        async with waiting:
            connection = free.pop()
            try:
                return await connection.ask(requests[n % len(requests)])
            finally:
                free.append(connection)

    try:
        yield ask
    finally:
        for connection in connections:
            connection.close()


@contextlib.asynccontextmanager
async def grpc_client(host: str, port: int, requests: Sequence[pb.LookupRequest]) -> AsyncIterator[Ask]:
    """ask(n) calls Lookup with requests[n % len(requests)]."""
    async with grpc.aio.insecure_channel(f"{host}:{port}", [("grpc.max_receive_message_length", -1)]) as channel:
        stub: Any = pb_grpc.EmbeddingServiceStub(channel)  # type: ignore[no-untyped-call]

        async def ask(n: int) -> bool:
            try:
                await stub.Lookup(requests[n % len(requests)])
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                    raise
                return False
            return True

        yield ask
