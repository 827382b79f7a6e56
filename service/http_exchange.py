"""A request and its reply as ASGI sees them: uvicorn's, and what it leaves to chance.

A reply leaves in one piece where it can, and is done when the socket has taken all of it. A client that has closed its
side is told of to who asks, and still gets its reply.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, cast

from uvicorn._types import (
    ASGI3Application,
    ASGIReceiveCallable,
    ASGIReceiveEvent,
    ASGISendCallable,
    ASGISendEvent,
    Scope,
)
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from service.errors import MalformedError
from service.http_head import Head

if TYPE_CHECKING:
    from service.http_protocol import LookupProtocol


class _Output:
    """What uvicorn takes for the transport: it keeps pieces until they are sent together."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self.pieces: list[bytes] = []
        self.is_closing = transport.is_closing
        self.wants_close = False

    def write(self, data: bytes) -> None:
        self.pieces.append(data)

    def close(self) -> None:
        self.wants_close = True


class Exchange(RequestResponseCycle):
    """See the module.

    Args:
        protocol: the connection's.
        head: of the request.

    Attributes:
        error: raised to who reads the body, once it cannot arrive any more.
        has_left: whether the client sends no more.
    """

    def __init__(self, protocol: LookupProtocol, head: Head) -> None:
        scope = {**head.scope, "client": protocol.client, "server": protocol.server, "state": {}}
        self.protocol, self.output = protocol, _Output(protocol.transport)
        super().__init__(
            scope=cast(Any, {**scope, "headers": [*head.scope["headers"]]}),
            transport=cast(asyncio.Transport, self.output),
            flow=protocol.flow,
            logger=protocol.logger,
            access_logger=protocol.access_logger,
            access_log=False,
            default_headers=protocol.server_state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=head.waits,
            keep_alive=head.keeps_alive,
            on_response=lambda: None,
        )
        self.error: MalformedError | None = None
        self.has_left = self._is_delivered = False

    async def run_asgi(self, app: ASGI3Application) -> None:
        """Answer the request. No reply to a client that has left is no fault."""

        async def call(scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
            await app(scope, receive, send)
            self.disconnected |= self.has_left and not self.response_started

        await super().run_asgi(call)
        if not self.response_complete:
            self.protocol.transport.close()

    async def receive(self) -> ASGIReceiveEvent:
        """The next piece of the body, as it arrives; behind the last, that the client has left, when it has.

        Raises:
            MalformedError: the body cannot arrive any more.
        """
        if self.waiting_for_100_continue and not self.output.is_closing():
            self.protocol.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self.waiting_for_100_continue = False
        if not (self.disconnected or self.response_complete or (self.has_left and self._is_delivered)):
            self.protocol.throttle()
            await self.message_event.wait()
            self.message_event.clear()
        if self.error is not None:
            raise self.error
        if self.disconnected or self.response_complete or self._is_delivered:
            return {"type": "http.disconnect"}
        self._is_delivered = not self.more_body
        body, self.body = bytes(self.body), bytearray()
        return {"type": "http.request", "body": body, "more_body": self.more_body}

    async def send(self, message: ASGISendEvent) -> None:
        """Send a piece of the reply; of the last one, return when the socket has taken it."""
        if message["type"] == "http.response.start":
            self.keep_alive = self.keep_alive and self.protocol.stays_open()
        await super().send(message)
        if message["type"] == "http.response.start" or self.disconnected:
            return
        self.protocol.transport.writelines(self.output.pieces)
        self.output.pieces = []
        if self.response_complete:
            self.protocol.replied(self)
            if self.flow.write_paused:
                await self.flow.drain()
