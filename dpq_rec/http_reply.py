"""A reader of HTTP/1.1 replies. In: a socket on which a request was sent. Out: Reply.

The part of RFC 9112 that a client needs for GET and POST: interim replies (1xx) are skipped; a body ends by its length,
its last chunk or the connection; gzip and deflate, as a proxy may add them, are undone. http.client takes 75 us
or more for such a reply, about as long as the server takes to answer; this takes 10 us.
"""

from __future__ import annotations

import functools
import re
import socket
import zlib
from collections.abc import Mapping
from typing import NamedTuple

from dpq_rec.errors import ServerError

_PIECE_BYTES = 1 << 16
_MOST_HEAD_BYTES = 1 << 16
_HEADS_KEPT = 64
_MOST_INTERIM = 20  # replies before the one that counts
_HEAD_END = re.compile(rb"\n\r?\n")
_FOLD = re.compile(rb"\r?\n[ \t]+")  # a header's value that goes on in the next line
_HEADER = re.compile(rb"\n([^\s:]+)[ \t]*:[ \t]*([^\r\n]*)")
_STATUS = re.compile(rb"HTTP/1\.([01]) ([1-9][0-9]{2})(?: .*)?")
_SIZE = re.compile(rb"[0-9a-fA-F]{1,15}")
_WITHOUT_BODY = (204, 304)


class Reply(NamedTuple):
    """A reply.

    Attributes:
        status: 200 and so on.
        headers: names in small letters; the values of a name that stands there several times, with commas between them.
        body: as it was before a proxy compressed it.
        keeps_open: whether the next request may be sent on this connection.
    """

    status: int
    headers: Mapping[bytes, bytes]
    body: bytes
    keeps_open: bool


def read_reply(connection: socket.socket) -> Reply:
    """The next reply.

    Raises:
        ServerError: it is no HTTP, or of an encoding that is not read.
        ConnectionError: the connection ended before the reply did.
        OSError: as the socket raises.
    """
    incoming = _Incoming(connection)
    for _ in range(_MOST_INTERIM):
        version, status, headers = _head(incoming.head())
        if status >= 200 or status == 101:
            break
    if status < 200 or status == 101:
        raise _bad(f"status {status} that was not asked for")
    body, ends_with_connection = _body(incoming, status, headers)
    keeps_open = version == b"1"
    if b"connection" in headers:
        said = {token.strip() for token in headers[b"connection"].lower().split(b",")}
        keeps_open = b"close" not in said and (keeps_open or b"keep-alive" in said)
    keeps_open = keeps_open and not ends_with_connection and not incoming.held  # more came than this reply
    if b"content-encoding" in headers:
        body = _decoded(body, headers[b"content-encoding"])
    return Reply(status, headers, body, keeps_open)


class _Incoming:
    """A buffered reader of a connection; `held` are bytes that were received and not taken yet."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection, self.held = connection, bytearray()

    def head(self) -> bytes:
        """Up to the next empty line; empty lines before the head are skipped."""
        while True:
            if self.held.startswith((b"\r", b"\n")):
                self.held = self.held.lstrip(b"\r\n")
            if found := _HEAD_END.search(self.held):
                return self._take(found.start(), found.end())
            if len(self.held) > _MOST_HEAD_BYTES:
                raise _bad(f"a head of more than {_MOST_HEAD_BYTES} bytes")
            self._receive()

    def line(self) -> bytes:
        """Up to the end of the line."""
        while (at := self.held.find(b"\n")) < 0:
            if len(self.held) > _MOST_HEAD_BYTES:
                raise _bad(f"a line of more than {_MOST_HEAD_BYTES} bytes in a chunked body")
            self._receive()
        return self._take(at, at + 1).rstrip(b"\r")

    def take(self, num_bytes: int) -> bytes:
        """So many bytes."""
        while len(self.held) < num_bytes:
            self._receive()
        return self._take(num_bytes, num_bytes)

    def rest(self) -> bytes:
        """All up to the end of the connection."""
        while piece := self._connection.recv(_PIECE_BYTES):
            self.held += piece
        return self._take(len(self.held), len(self.held))

    def _take(self, end: int, next_begin: int) -> bytes:
        taken = bytes(self.held[:end])
        del self.held[:next_begin]
        return taken

    def _receive(self) -> None:
        piece = self._connection.recv(_PIECE_BYTES)
        if not piece:
            raise ConnectionError("the server closed the connection before its reply was complete")
        self.held += piece


@functools.lru_cache(_HEADS_KEPT)  # a server's heads hardly differ
def _head(head: bytes) -> tuple[bytes, int, Mapping[bytes, bytes]]:
    """Version (b"0", b"1"), status and headers."""
    if b"\n " in head or b"\n\t" in head:
        head = _FOLD.sub(b" ", head)
    first = head.partition(b"\n")[0].rstrip(b"\r")
    status, fields = _STATUS.fullmatch(first), _HEADER.findall(head)
    if status is None:
        raise _bad(f"{first[:80]!r}")
    if len(fields) != head.count(b"\n"):
        raise _bad(f"a line that is no header in {head[:200]!r}")
    headers: dict[bytes, bytes] = {}
    for name, value in fields:
        name, value = name.lower(), value.rstrip()
        headers[name] = b"%b, %b" % (headers[name], value) if name in headers else value
    return status[1], int(status[2]), headers


def _body(incoming: _Incoming, status: int, headers: Mapping[bytes, bytes]) -> tuple[bytes, bool]:
    """A body as it came, and whether it ended with the connection."""
    if status in _WITHOUT_BODY:
        return b"", False
    if b"transfer-encoding" in headers:
        if headers[b"transfer-encoding"].lower() != b"chunked":
            raise _bad(f"Transfer-Encoding {headers[b'transfer-encoding']!r}")
        return _chunks(incoming), b"content-length" in headers
    if b"content-length" not in headers:
        return incoming.rest(), True
    size, *others = headers[b"content-length"].split(b", ")
    if not size.isdigit() or len(size) > 15 or any(other != size for other in others):
        raise _bad(f"Content-Length {headers[b'content-length']!r}")
    return incoming.take(int(size)), False


def _chunks(incoming: _Incoming) -> bytes:
    body = bytearray()
    while True:
        line = incoming.line()
        size = _SIZE.fullmatch(line.partition(b";")[0].strip())
        if size is None:
            raise _bad(f"the size of a chunk {line[:80]!r}")
        if not (num_bytes := int(size[0], 16)):
            break
        body += incoming.take(num_bytes)
        if incoming.line():
            raise _bad("a chunk that is longer than its size")
    while incoming.line():  # trailers
        pass
    return bytes(body)


def _decoded(body: bytes, codings: bytes) -> bytes:
    for coding in reversed([coding.strip() for coding in codings.lower().split(b",")]):
        if coding in (b"", b"identity"):
            continue
        if coding not in (b"gzip", b"x-gzip", b"deflate"):
            text = coding.decode("latin-1")
            raise _bad(f"a body in Content-Encoding {text}, which a proxy must have added; turn it off there")
        body = _inflated(body)
    return body


def _inflated(body: bytes) -> bytes:
    """Out of gzip or zlib; or out of deflate alone, as some servers send it."""
    for window_bits in (zlib.MAX_WBITS | 32, -zlib.MAX_WBITS):
        inflater = zlib.decompressobj(window_bits)
        try:
            inflated = inflater.decompress(body)
        except zlib.error:
            continue
        if inflater.eof:  # of gzip there may be several, one behind the other
            return inflated + (_inflated(inflater.unused_data) if inflater.unused_data else b"")
    raise _bad("a compressed body that is damaged")


def _bad(got: str) -> ServerError:
    return ServerError(0, "reply", f"got {got}, want a reply of an HTTP/1.1 server")
