"""A request and its reply as ASGI sees them. In: a connection and a head. Out: the reply of an application."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from starlette.types import ASGIApp, Message

from service.errors import INTERNAL, MalformedError
from service.http_bodies import error_reply
from service.http_parser import Head

if TYPE_CHECKING:
    from service.http_protocol import HttpProtocol

logger = logging.getLogger("service.http")


class Exchange:
    """See the module.

    A reply leaves in one piece where it can, and is done when the socket has taken all of it. A client that has closed
    its side is told of to who asks, and still gets its reply.

    Attributes:
        body: what has arrived of it, and was not asked for yet.
        is_whole: whether that is the rest of it.
        news: set when there is more of the body, or when its client or its connection has left.
        error: raised to who reads the body, once it cannot arrive any more.
        has_left: whether the client sends no more.
        is_cut_off: whether the connection was lost before the reply was complete.
        is_complete: whether the reply is.
    """

    def __init__(self, connection: HttpProtocol, head: Head) -> None:
        self._connection, self._scope = connection, head.scope
        self.keeps_alive, self.waits = head.keeps_alive, head.waits
        self.body, self.is_whole = bytearray(), head.num_bytes == 0
        self.news = asyncio.Event()
        if self.is_whole:
            self.news.set()
        self.error: MalformedError | None = None
        self.has_left = self.is_cut_off = self.is_complete = False
        self._is_delivered = self._has_begun = False
        self._head: tuple[int, bytes] | None = None

    async def run(self, app: ASGIApp) -> None:
        """Answer the request. No reply to a client that has left is no fault."""
        transport = self._connection.transport
        client, server = transport.get_extra_info("peername"), transport.get_extra_info("sockname")
        scope = {**self._scope, "client": client, "server": server, "state": {}, "headers": [*self._scope["headers"]]}
        try:
            await app(scope, self.receive, self.send)
        except BaseException as error:  # that the server, which ends, cancels it, too
            logger.error("a request failed", exc_info=error)
            if not self._has_begun:
                reply = error_reply(500, INTERNAL.error_type, "internal error", {"Connection": "close"})
                await reply.response()(scope, self.receive, self.send)
        if not self.is_complete:
            transport.close()

    async def receive(self) -> Message:
        """The next piece of the body, as it arrives; behind the last, that the client has left, when it has.

        Raises:
            MalformedError: the body cannot arrive any more.
        """
        if self.waits and not self._connection.transport.is_closing():
            self._connection.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self.waits = False
        if not (self.is_cut_off or self.is_complete or (self.has_left and self._is_delivered)):
            self._connection.throttle()
            await self.news.wait()
            self.news.clear()
        if self.error is not None:
            raise self.error
        if self.is_cut_off or self.is_complete or self._is_delivered:
            return {"type": "http.disconnect"}
        self._is_delivered = self.is_whole
        body, self.body = bytes(self.body), bytearray()
        return {"type": "http.request", "body": body, "more_body": not self.is_whole}

    async def send(self, message: Message) -> None:
        """Send a piece of the reply; of the last one, return when the socket has taken it."""
        connection = self._connection
        await connection.drain()
        if self.is_cut_off:
            return
        if message["type"] == "http.response.start":
            headers, self._has_begun = [*message["headers"]], True
            says_close = (b"connection", b"close") in headers
            self.keeps_alive = self.keeps_alive and connection.stays_open() and not says_close
            if not self.keeps_alive and not says_close:
                headers.append((b"connection", b"close"))
            self.waits = False
            self._head = message["status"], b"".join(b"%b: %b\r\n" % pair for pair in headers) + b"\r\n"
            return
        body = message.get("body", b"")
        if self._head is None:
            connection.transport.write(body)
        else:
            connection.write(*self._head, body)
            self._head = None
        if not message.get("more_body", False):
            self.is_complete = True
            self.news.set()
            connection.replied(keeps_alive=self.keeps_alive)
            await connection.drain()
