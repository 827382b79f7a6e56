"""One call over gRPC, from its head to its end. In: messages and a context of grpc.aio. Out: replies, or a status.

All procedures are declared as taking a stream of bytes, which on the wire is the same: so a call is seen before its
message, which may be missing, late or malformed, and every error is one status, counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import math
import os
import socket
import time
import urllib.parse
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, NoReturn

import grpc
import grpc.aio

from dpq_rec import DamagedArtifactError
from service import errors
from service.auth import check_key
from service.engine import Engine

logger = logging.getLogger("service.grpc")

Respond = Callable[[bytes], Awaitable[bytes]]  # from a message to its reply, both serialized
_HOW_TO_SEND_A_KEY = "send the metadata 'authorization: Bearer KEY' or 'x-api-key'"
_MESSAGE_SECONDS = 30.0  # for a call's message to arrive whole
_REPLY_BYTES = 1 << 27  # of large replies that are made or sent at a time; each is held twice, once by gRPC
_BYTES_PER_SECOND = 1 << 20  # that a caller takes at least, after `send_seconds`
_MOST_DETAILS = 600  # characters of an error: a client takes 8 KiB of headers, which hold them percent-encoded
_EARLY_SECONDS = 0.1  # that an error waits for the message: Python's clients lose a status that comes before it
_WATCH_SECONDS = 0.5  # between looks at the calls' deadlines: timers for each would cost a tenth of a small call
_EOF_SECONDS = 0.05  # in which gRPC says that a call without a message was cancelled, if it was


class ReplyRoom:
    """Bytes that replies may take together, though one alone may be larger; who wants more waits, in order."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = self._left = num_bytes
        self._turn, self._given_back = asyncio.Lock(), asyncio.Event()

    async def take(self, num_bytes: int) -> Callable[[], None]:
        """Wait for room; call the result to give it back."""
        wanted = min(num_bytes, self.num_bytes)
        async with self._turn:
            while wanted > self._left:
                self._given_back.clear()
                await self._given_back.wait()
            self._left -= wanted
        return functools.partial(self._give_back, wanted)

    def _give_back(self, num_bytes: int) -> None:
        self._left += num_bytes
        self._given_back.set()


class Calls:
    """The calls of one engine, and what they take together."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.port = 0  # of the server, once it listens
        self.open: set[Call] = set()
        self.room = ReplyRoom(_REPLY_BYTES)

    async def watch(self) -> None:
        """End what takes too long; runs until it is cancelled."""
        while True:
            await asyncio.sleep(_WATCH_SECONDS)
            now = time.perf_counter()
            for call in [call for call in self.open if call.deadline <= now]:
                call.end_late()

    async def unary(self, method: str, respond: Respond, _: object, context: Any) -> bytes:
        """Answer a call of one message."""
        call = Call(self, method, context)
        try:
            await call.check()
            return await call.reply(await call.only_message(), respond)
        except BaseException as error:
            await call.fail(error)

    async def stream(self, method: str, respond: Respond, _: object, context: Any) -> None:
        """Answer message by message, each once the reply before it is sent; the first that fails ends the call."""
        call = Call(self, method, context)
        try:
            await call.check()
            call.is_idle = True
            while (message := await context.read()) is not grpc.aio.EOF:
                call.start()
                await context.write(await call.reply(message, respond))  # no name may keep it from now on
                call.sent()
                del message
        except BaseException as error:
            await call.fail(error)


class Call:
    """What one call holds: a place among the calls, and for each reply a slot and room until the caller has taken it.

    It gives them back when gRPC says that the call is done: a unary reply is sent after its handler has returned.
    """

    def __init__(self, calls: Calls, method: str, context: Any) -> None:
        self._calls, self._method, self._context = calls, method, context
        self._task = asyncio.current_task()
        self._held = contextlib.ExitStack()  # of the reply
        self._reply_bytes, self._is_late = 0, False
        self.deadline = math.inf  # by time.perf_counter, of what is waited for: a message, or that a reply is taken
        calls.open.add(self)
        context.add_done_callback(self._close)
        self.start()

    def start(self) -> None:
        """A message has come; its time is counted from now on."""
        self._started = time.perf_counter()
        self.is_idle = False  # a message is being answered, or waited for

    async def check(self) -> None:
        """Refuse a call without the API key, or beyond `max_calls`: UnauthorizedError, OverloadedError."""
        settings = self._calls.engine.settings
        try:
            if settings.api_key is not None:
                metadata = self._context.invocation_metadata() or ()
                pairs = ((str(name).encode(), str(value).encode()) for name, value in metadata)
                check_key(pairs, settings.api_key.encode(), _HOW_TO_SEND_A_KEY)
            if len(self._calls.open) > settings.max_calls:
                text = f"{settings.max_calls} calls are open, as many as --max-calls allows; try again later"
                raise errors.OverloadedError(text)
        except errors.RequestError:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_EARLY_SECONDS):
                    await self._context.read()
            raise

    async def only_message(self) -> bytes:
        """The message of a unary call; MalformedError where there is none."""
        self.deadline = self._started + _MESSAGE_SECONDS
        message = await self._context.read()
        if message is grpc.aio.EOF:
            await asyncio.sleep(_EOF_SECONDS)  # a message over the limit ends like this too: gRPC cancels the call
            raise errors.MalformedError("message: got none, want one")
        self.deadline = math.inf
        return message  # type: ignore[no-any-return]

    async def reply(self, message: bytes, respond: Respond) -> bytes:
        """The reply to a message, in a slot and room of its own; `sent` gives both back."""
        engine = self._calls.engine
        if not engine.is_small(len(message)):
            # How large the reply is, is not known before the message is parsed: an id takes a byte of it at least.
            most_bytes = 4 * engine.max_dim * min(len(message), engine.settings.max_ids)
            self._held.callback(await self._calls.room.take(most_bytes))
        self._held.enter_context(engine.slot())
        reply = await respond(message)
        self.count(grpc.StatusCode.OK)
        self._reply_bytes, self.is_idle = len(reply), True
        self.deadline = time.perf_counter() + engine.settings.send_seconds + len(reply) / _BYTES_PER_SECOND
        return reply

    def sent(self) -> None:
        """The caller has the reply, or has left."""
        self.deadline = math.inf
        self._held.close()

    def end_late(self) -> None:
        """End a call whose message does not come, or whose reply is not taken.

        A reply that is not read keeps its memory until its connection ends: a status would only queue behind it.
        """
        self.deadline = math.inf
        if not self.is_idle and self._task is not None:
            self._is_late = True
            self._task.cancel()
            return
        peer = self._context.peer()
        what = "closed" if hang_up(peer, self._calls.port) else "not found"
        text = "%s: %s has not taken a reply of %d bytes in time; its connection is %s"
        logger.warning(text, self._method, peer, self._reply_bytes, what)

    def count(self, code: grpc.StatusCode) -> None:
        """Count a message's outcome."""
        self._calls.engine.metrics.answered("grpc", self._method, code.name, time.perf_counter() - self._started)

    async def fail(self, error: BaseException) -> NoReturn:
        """End the call with the status of what was raised, or with CancelledError where nobody waits for it.

        Call it in `except`.
        """
        if self._is_late and isinstance(error, asyncio.CancelledError):
            error = errors.MalformedError(f"message: it was not complete after {_MESSAGE_SECONDS:.0f} s")
        if not isinstance(error, Exception) or isinstance(error, grpc.aio.InternalError):
            if not self.is_idle:
                self.count(grpc.StatusCode.CANCELLED)
            raise asyncio.CancelledError from error
        code = grpc.StatusCode[errors.ERROR_CODES.get(type(error), errors.INTERNAL).grpc]
        text = str(error)
        if code is grpc.StatusCode.INTERNAL:
            logger.exception("%s failed", self._method)
            if not isinstance(error, DamagedArtifactError):  # which no caller is to blame for
                text = "internal error; the server's log says more"
        elif isinstance(error, errors.MalformedError):
            logger.info("%s from %s: %s", self._method, self._context.peer(), text)
        self.count(code)
        await self._context.abort(code, text if len(text) <= _MOST_DETAILS else f"{text[:_MOST_DETAILS]}…")
        raise AssertionError("abort raises") from error

    def _close(self, context: Any) -> None:
        self._calls.open.discard(self)
        self.sent()


def is_of_use(record: logging.LogRecord) -> bool:
    """A filter for gRPC's log: it writes a traceback where a call ended just before its status was sent."""
    return record.exc_info is None or not isinstance(record.exc_info[1], grpc.aio.InternalError)


def hang_up(peer: str, port: int) -> bool:
    """End this process's TCP connection with a peer; whether there was one. gRPC offers no way to end just one.

    The peer is as gRPC writes it, "ipv4:1.2.3.4:5" or "ipv6:%5B::1%5D:5"; the port is this side's.
    """
    host, _, peer_port = urllib.parse.unquote(peer).partition(":")[2].rpartition(":")
    wanted = (_without_mapping(host.strip("[]")), int(peer_port), port)
    for descriptor in [each for each in Path("/dev/fd").iterdir() if each.is_socket()]:
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(descriptor.name))) as sock:
            if sock.family in (socket.AF_INET, socket.AF_INET6):
                host, peer_port = sock.getpeername()[:2]
                if (_without_mapping(host), peer_port, sock.getsockname()[1]) == wanted:
                    sock.shutdown(socket.SHUT_RDWR)
                    return True
    return False


def _without_mapping(host: str) -> str:
    return host.removeprefix("::ffff:")  # of an IPv4 caller of an IPv6 socket
