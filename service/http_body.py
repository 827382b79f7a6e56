"""Bodies of HTTP requests. In: a buffer of what has arrived. Out: pieces of a body, cut off from it; then all of it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

from starlette.requests import ClientDisconnect
from starlette.types import Receive

from service.admission import Admission
from service.errors import MalformedError, TooManyBytesError
from service.http_lookup import check_encoding

_SIZE_LINE = re.compile(rb"([0-9A-Fa-f]{1,16})(?:[ \t]*;[\t -~\x80-\xff]*)?\r\n")
_TRAILERS = re.compile(rb"(?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t -~\x80-\xff]*\r\n)*\r\n")
_LONGEST_LINE, _LONGEST_TRAILERS = 1024, 8192
_CHUNKS_AT_A_TIME = 1024  # other connections wait meanwhile, and chunks may be of a byte each
_MOST_CHUNKS = 1 << 17  # of a body: they take some 3 us each


class Body:
    """A body of so many bytes."""

    def __init__(self, num_bytes: float) -> None:
        self.num_left = num_bytes

    @property
    def is_whole(self) -> bool:
        """Whether nothing is left to arrive."""
        return self.num_left == 0

    def take(self, buffer: bytearray) -> bytes:
        """What the buffer holds of the body; its end may hold what follows."""
        size = min(len(buffer), int(self.num_left))
        piece = bytes(buffer[:size])
        del buffer[:size]
        self.num_left -= size
        return piece


class ChunkedBody(Body):
    """A body in chunks (RFC 9112, 7.1). Extensions and trailers are passed over, if they are some."""

    def __init__(self) -> None:
        super().__init__(math.inf)
        self._chunk, self._num_chunks = Body(0), 0
        self._is_between = True  # two chunks, and not before the line that ends one

    def take(self, buffer: bytearray) -> bytes:
        """What the buffer holds of the body, or its first chunks if there are many.

        Raises:
            MalformedError: these are no chunks, or more than make sense.
        """
        pieces = []
        for _ in range(_CHUNKS_AT_A_TIME):
            if not self._chunk.is_whole:
                pieces.append(self._chunk.take(buffer))
            if not self._chunk.is_whole or not self._skip(buffer) or self.is_whole:
                break
        return b"".join(pieces)

    def _skip(self, buffer: bytearray) -> bool:
        """Pass over what stands before the next chunk's bytes; whether it was there."""
        if not self._is_between:
            if not b"\r\n".startswith(buffer[:2]):
                raise MalformedError("body: a chunk is longer than it says")
            if len(buffer) < 2:
                return False
            del buffer[:2]
            self._is_between = True
        return self._read_size(buffer)

    def _read_size(self, buffer: bytearray) -> bool:
        line = _SIZE_LINE.match(buffer, 0, _LONGEST_LINE)
        if line is None:
            begun = buffer[:_LONGEST_LINE]
            if b"\n" in begun or len(begun) == _LONGEST_LINE or not begun[:1].strip(b"0123456789ABCDEFabcdef") == b"":
                raise MalformedError("body: want a chunk's length in hex, and CR LF behind it")
            return False
        size = int(line[1], 16)
        if size == 0:
            return self._read_trailers(buffer, line.end())
        del buffer[: line.end()]
        self._chunk, self._is_between = Body(size), False
        self._num_chunks += 1
        if self._num_chunks > _MOST_CHUNKS:
            raise MalformedError(f"body: got more than {_MOST_CHUNKS} chunks; send longer ones")
        return True

    def _read_trailers(self, buffer: bytearray, begin: int) -> bool:
        trailers = _TRAILERS.match(buffer, begin, begin + _LONGEST_TRAILERS)
        if trailers is None:
            if b"\r\n\r\n" in buffer[begin - 2 :] or len(buffer) - begin >= _LONGEST_TRAILERS:
                raise MalformedError("body: want an empty line, or NAME: VALUE, behind the last chunk")
            return False
        del buffer[: trailers.end()]
        self.num_left = 0
        return True


async def read_body(headers: Iterable[tuple[bytes, bytes]], receive: Receive, admission: Admission) -> bytes:
    """The body, read no further than the limit whatever its length is said to be.

    Raises:
        UnsupportedMediaTypeError: it is encoded.
        TooManyBytesError: it is longer.
        OverloadedError: too many bytes of bodies are arriving.
        MalformedError: it comes in chunks that are none, or does not arrive in time.
        ClientDisconnect: the client left.
    """
    check_encoding(headers)
    limit_bytes = admission.engine.settings.body_limit_bytes
    declared = dict(headers).get(b"content-length", b"")
    if declared.isdigit() and int(declared) > limit_bytes:
        raise _too_many_bytes(limit_bytes)
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        piece: bytes = message.get("body", b"")
        if len(body) + len(piece) > limit_bytes:
            raise _too_many_bytes(limit_bytes)
        if not message.get("more_body", False):
            return bytes(body + piece) if body else piece
        admission.receive(len(piece))
        body += piece


def _too_many_bytes(limit_bytes: int) -> TooManyBytesError:
    return TooManyBytesError(f"body: got more than {limit_bytes} bytes; send several, or raise --max-body-bytes")
