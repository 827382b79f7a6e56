"""Requests as bytes. In: a head; a buffer of what has arrived. Out: a Head; pieces of a body, cut off from the buffer.

httptools checks the syntax of heads; what it lets pass although two readers could take it for two things is refused
here. An offer of an upgrade is ignored (RFC 9110, 7.8), which httptools cannot do: it takes what follows the head for
another protocol. So it is given heads alone, and bodies are read here.
"""

from __future__ import annotations

import math
import re
import urllib.parse
from typing import Any, NamedTuple

import httptools

from service.errors import MalformedError

HEAD_END = b"\r\n\r\n"
_MAX_HEAD_BYTES = 1 << 16
_OTHER_VERSION = re.compile(rb" HTTP/(?!1\.[01])\d\.\d\Z")
_OF_HOSTS = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._~!$&'()*+,;=%:[]-"
_ONCE = (b"host", b"transfer-encoding", b"expect", b"content-type")
_SIZE_LINE = re.compile(rb"([0-9A-Fa-f]{1,16})(?:[ \t]*;[\t -~\x80-\xff]*)?\r\n")
_TRAILERS = re.compile(rb"(?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t -~\x80-\xff]*\r\n)*\r\n")
_LONGEST_LINE, _LONGEST_TRAILERS = 1024, 8192
_CHUNKS_AT_A_TIME = 1024  # other connections wait meanwhile, and chunks may be of a byte each
_MOST_CHUNKS = 1 << 17  # of a body: they take some 3 us each
_ERROR_TYPES = {
    400: "malformed",
    408: "timeout",
    417: "expectation_failed",
    431: "head_too_large",
    501: "not_implemented",
    503: "overloaded",
    505: "unsupported_version",
}


class HeadError(Exception):
    """A request that is refused before anybody knows what it asks for; its connection is closed.

    Args:
        status: of the reply.
        text: what is wrong.
    """

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status, self.error_type = status, _ERROR_TYPES[status]


class Head(NamedTuple):
    """What a request is, apart from its body.

    Attributes:
        scope: ASGI's, without what depends on the connection.
        num_bytes: of the body; None if it comes in chunks.
        keeps_alive: whether the client wants to send more requests.
        waits: for a 100 before it sends the body.
    """

    scope: dict[str, Any]
    num_bytes: int | None
    keeps_alive: bool
    waits: bool


class _Events:
    """What httptools calls while it reads a head."""

    def __init__(self) -> None:
        self.url, self.method, self.version, self.keeps_alive = b"", "", "", False
        self.headers: list[tuple[bytes, bytes]] = []
        self.parser = httptools.HttpRequestParser(self)

    def on_headers_complete(self) -> None:
        self.method, self.version = self.parser.get_method().decode("ascii"), self.parser.get_http_version()
        # Behind an empty body the parser has forgotten it. HTTP/1.0 may keep a connection, too, but need not.
        self.keeps_alive = self.version == "1.1" and self.parser.should_keep_alive()

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value.rstrip(b" \t")))


def parse_head(head: bytes) -> Head:
    """A head, given without its empty line.

    Raises:
        HeadError: it is none.
    """
    first_line = head.partition(b"\r\n")[0]
    if not first_line.endswith((b" HTTP/1.1", b" HTTP/1.0")) or first_line.count(b" ") != 2 or b"#" in first_line:
        raise HeadError(505 if _OTHER_VERSION.search(first_line) else 400, "first line: want METHOD TARGET HTTP/1.1")
    found = _Events()
    try:
        found.parser.feed_data(head + HEAD_END)
    except httptools.HttpParserUpgrade:
        pass  # it was all that was given
    except httptools.HttpParserError as error:
        raise HeadError(400, f"head: {error}") from None
    del found.parser  # they know each other, and would be there until the garbage is collected
    headers = _checked_headers(found)
    path, query = _path_and_query(found.url)
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": found.version,
        "method": found.method,
        "scheme": "http",
        "root_path": "",
        "path": urllib.parse.unquote(path.decode("ascii")),
        "raw_path": path,
        "query_string": query,
        "headers": found.headers,
    }
    num_bytes = None if b"transfer-encoding" in headers else int(headers.get(b"content-length", b"0"))
    return Head(scope, num_bytes, found.keeps_alive, waits=b"expect" in headers and found.version == "1.1")


def _path_and_query(target: bytes) -> tuple[bytes, bytes]:
    try:
        url = httptools.parse_url(target)
        path, query = url.path or b"", url.query or b""
    except httptools.HttpParserError:
        path, query = b"", b""
    if not path.startswith(b"/"):
        raise HeadError(400, f"target: got {target.decode('latin-1')!r}, want a path")
    return path, query


def _checked_headers(found: _Events) -> dict[bytes, bytes]:
    """Name -> value; where there are several of a name, the last."""
    headers, is_old = dict(found.headers), found.version == "1.0"
    names = [name for name, _ in found.headers]
    for name in _ONCE:
        if names.count(name) > 1:
            raise HeadError(400, f"{name.decode().title()}: got {names.count(name)}, want one")
    host = headers.get(b"host", b"" if is_old else None)
    if host is None or host.translate(None, _OF_HOSTS):
        got = "none" if host is None else repr(host.decode("latin-1"))
        raise HeadError(400, f"Host: got {got}, want NAME or NAME:PORT")
    coding, expected = headers.get(b"transfer-encoding"), headers.get(b"expect", b"100-continue")
    if coding is not None and is_old:
        raise HeadError(400, "Transfer-Encoding: HTTP/1.0 has none")
    if coding is not None and coding.lower() != b"chunked":
        raise HeadError(501, f"Transfer-Encoding: got {coding.decode('latin-1')!r}, want chunked alone")
    if expected.lower() != b"100-continue" and not is_old:
        raise HeadError(417, f"Expect: got {expected.decode('latin-1')!r}, want 100-continue")
    return headers


class IncomingHead:
    """Heads as they arrive: what cannot become one need not be waited for."""

    def __init__(self) -> None:
        self._parser: Any = None
        self._num_seen = 0  # bytes of it that are known to hold no end

    def take(self, buffer: bytearray) -> bytes | None:
        """Cut a head, without its empty line, off the begin of what has arrived; None where it is not there whole.

        Empty lines before it are passed over.

        Raises:
            HeadError: it cannot become a head, or is too long.
        """
        while buffer[:2] == b"\r\n":
            del buffer[:2]
            self._parser, self._num_seen = None, 0
        at = buffer.find(HEAD_END, max(0, self._num_seen - len(HEAD_END) + 1))
        if at > _MAX_HEAD_BYTES or (at < 0 and len(buffer) > _MAX_HEAD_BYTES):
            raise HeadError(431, f"head: got more than {_MAX_HEAD_BYTES} bytes")
        if at < 0:
            self._look_at(bytes(buffer[self._num_seen :]))
            self._num_seen = len(buffer)
            return None
        head = bytes(buffer[:at])
        del buffer[: at + len(HEAD_END)]
        self._parser, self._num_seen = None, 0
        return head

    def _look_at(self, piece: bytes) -> None:
        if self._parser is None:
            self._parser = httptools.HttpRequestParser(None)
        try:
            self._parser.feed_data(piece)
        except httptools.HttpParserError as error:
            status = 400 if self._parser.get_http_version() in ("0.0", "0.9", "1.0", "1.1") else 505
            raise HeadError(status, f"head: {error}") from None


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
            if not self._chunk.is_whole or not self._skip_to_chunk(buffer) or self.is_whole:
                break
        return b"".join(pieces)

    def _skip_to_chunk(self, buffer: bytearray) -> bool:
        """Pass over what stands before the next chunk's bytes; whether it was there."""
        if not self._is_between:
            if not b"\r\n".startswith(buffer[:2]):
                raise MalformedError("body: a chunk is longer than it says")
            if len(buffer) < 2:
                return False
            del buffer[:2]
            self._is_between = True
        line = _SIZE_LINE.match(buffer, 0, _LONGEST_LINE)
        if line is None:
            begun = buffer[:_LONGEST_LINE]
            if b"\n" in begun or len(begun) == _LONGEST_LINE or begun[:1].strip(b"0123456789ABCDEFabcdef"):
                raise MalformedError("body: want a chunk's length in hex, and CR LF behind it")
            return False
        size = int(line[1], 16)
        if size == 0:
            return self._skip_trailers(buffer, line.end())
        del buffer[: line.end()]
        self._chunk, self._is_between = Body(size), False
        self._num_chunks += 1
        if self._num_chunks > _MOST_CHUNKS:
            raise MalformedError(f"body: got more than {_MOST_CHUNKS} chunks; send longer ones")
        return True

    def _skip_trailers(self, buffer: bytearray, begin: int) -> bool:
        trailers = _TRAILERS.match(buffer, begin, begin + _LONGEST_TRAILERS)
        if trailers is None:
            if b"\r\n\r\n" in buffer[begin - 2 :] or len(buffer) - begin >= _LONGEST_TRAILERS:
                raise MalformedError("body: want an empty line, or NAME: VALUE, behind the last chunk")
            return False
        del buffer[: trailers.end()]
        self.num_left = 0
        return True
