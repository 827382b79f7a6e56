"""Hostile HTTP requests, as raw bytes to a real server: one request has one reply, and what is doubtful is refused.

Behind each case stands a question for `/livez`: where the connection is still good it is answered, as the next request,
and where it is not the connection ends before. So a body that is taken for a request shows as a reply too many.
"""

import gzip
import socket
import struct

import numpy as np
import pytest

from dpq_rec import IdentityVocabulary, TableContents, write_artifact
from tests.service.conftest import Server
from tests.service.http_requests import BINARY, JSON

LOOKUP = "/v1/tables/t/lookup"
NUM_ROWS = 300
IDS = [7, 299, 300, 0]  # the third is not there
BODY = struct.pack("<4q", *IDS)
LAST = b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
VECTORS = np.arange(2 * NUM_ROWS, dtype=np.float32).reshape(NUM_ROWS, 2)
WANTED = b"".join(VECTORS[i].tobytes() if i < NUM_ROWS else bytes(8) for i in IDS) + struct.pack("<I", 2)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    contents = TableContents(
        num_embeddings=NUM_ROWS, embedding_dim=2, vocabulary=IdentityVocabulary(NUM_ROWS), chunks=[VECTORS]
    )
    artifact = write_artifact(tmp_path_factory.mktemp("requests") / "artifact", {"t": contents}, version="v")
    server = Server(artifact, "--workers=1").wait_until_ready()
    yield server
    assert server.end()[0] == 0


def connect(server):
    host, port = server.http.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def ask(server, *pieces):
    """Statuses and bodies of all replies to some pieces, each in a packet of its own, and `/livez` behind them."""
    with connect(server) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece in (*pieces, LAST):
            connection.sendall(piece)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return replies_of(connection.makefile("rb"))


def replies_of(file):
    found = []
    while line := file.readline():
        status, length = int(line.split()[1]), 0
        while (header := file.readline()) not in (b"\r\n", b""):
            name, _, value = header.partition(b":")
            length = int(value) if name.lower() == b"content-length" else length
        if status != 100:
            found.append((status, file.read(length)))
    return found


def head(*headers, method="POST", path=LOOKUP, version="HTTP/1.1", given=BINARY, length=32):
    lines = [f"{method} {path} {version}", "Host: x", f"Content-Type: {given}", f"Accept: {BINARY}"]
    lines += [] if length is None else [f"Content-Length: {length}"]
    return "\r\n".join([*lines, *headers]).encode("latin-1") + b"\r\n\r\n"


H2C = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA")
CHUNKED = "Transfer-Encoding: chunked"
IN_CHUNKS = b"8\r\n" + BODY[:8] + b"\r\n18\r\n" + BODY[8:] + b"\r\n0\r\n\r\n"
UPGRADES = {
    "h2c": H2C,
    "websocket": ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Key: x", "Sec-WebSocket-Version: 13"),
    "TLS": ("Connection: upgrade", "Upgrade: TLS/1.2, HTTP/1.1"),
    "several": ("Connection: keep-alive", "Connection: Upgrade", "Upgrade: a", "Upgrade: b"),
}


@pytest.mark.parametrize("expect", [(), ("Expect: 100-continue",)], ids=["", "expect"])
@pytest.mark.parametrize("cut", [0, 1, 3], ids=["whole", "head and body", "cut in the body"])
@pytest.mark.parametrize("upgrade", UPGRADES.values(), ids=UPGRADES)
def test_server_ignores_an_offer_of_an_upgrade(server, upgrade, cut, expect):
    first = head(*upgrade, *expect)
    pieces = {0: [first + BODY], 1: [first, BODY], 3: [first + BODY[:5], BODY[5:20], BODY[20:]]}[cut]
    (status, body), last = ask(server, *pieces)
    assert (status, body) == (200, WANTED)
    assert last[0] == 200


@pytest.mark.parametrize(
    "pieces", [[IN_CHUNKS], [IN_CHUNKS[:1], IN_CHUNKS[1:20], IN_CHUNKS[20:]]], ids=["whole", "cut"]
)
def test_server_ignores_an_offer_of_an_upgrade_of_chunks(server, pieces):
    (status, body), last = ask(server, head(*H2C, CHUNKED, length=None), *pieces)
    assert (status, body, last[0]) == (200, WANTED, 200)


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_server_ignores_an_offer_of_an_upgrade_without_a_body(server, method):
    found = ask(server, head(*H2C, method=method, path="/v1/tables", length=0))
    assert [status for status, _ in found] == [200 if method == "GET" else 405, 200]


GOOD = {
    "chunks": head(CHUNKED, length=None) + IN_CHUNKS,
    "a name in capitals": head("TRANSFER-ENCODING: Chunked", length=None) + IN_CHUNKS,
    "an extension of a chunk": head(CHUNKED, length=None) + b'20;a="b c"\r\n' + BODY + b"\r\n0\r\n\r\n",
    "trailers": head(CHUNKED, length=None) + IN_CHUNKS[:-2] + b"A: b\r\nC:\r\n\r\n",
    "lines before the head": b"\r\n\r\n" + head() + BODY,
    "blanks behind a value": head("X: y \t") + BODY,
    "identity": head("Content-Encoding: identity") + BODY,
    "no encoding": head("Content-Encoding:") + BODY,
    "a whole URL": head(path=f"http://example.com{LOOKUP}") + BODY,
    "an escaped letter": head(path="/v1/tables/%74/lookup") + BODY,
    "Latin-1": head("X: \xfc") + BODY,
    "a long head": head("X: " + "y" * 60_000) + BODY,
    "an expectation": head("Expect: 100-continue") + BODY,
}


@pytest.mark.parametrize("name", GOOD)
def test_server_answers_what_is_unusual_but_right(server, name):
    (status, body), last = ask(server, GOOD[name])
    assert (status, body, last[0]) == (200, WANTED, 200)


TWO_HOSTS = head().replace(b"Host: x", b"Host: x\r\nHost: x")
BAD = {  # the connection ends: nobody knows where the next request begins
    "two lengths": (head("Content-Length: 32") + BODY, {400}),
    "two lengths that differ": (head("Content-Length: 8") + BODY, {400}),
    "a list of lengths": (head("Content-Length: 32, 32", length=None) + BODY, {400}),
    "a length with a sign": (head("Content-Length: +32", length=None) + BODY, {400}),
    "a negative length": (head("Content-Length: -1", length=None) + BODY, {400}),
    "a length in hex": (head("Content-Length: 0x20", length=None) + BODY, {400}),
    "no length": (head("Content-Length:", length=None) + BODY, {400}),
    "a length beyond 64 bits": (head(f"Content-Length: {1 << 70}", length=None) + BODY, {400, 413}),
    "a length of 64 bits": (head(f"Content-Length: {(1 << 64) - 1}", length=None) + BODY, {400, 413}),
    "a length and chunks": (head(CHUNKED) + IN_CHUNKS, {400}),
    "chunks and a length": (head(CHUNKED, "Content-Length: 3", length=None) + IN_CHUNKS, {400}),
    "chunks, twice": (head("Transfer-Encoding: chunked, chunked", length=None) + IN_CHUNKS, {400, 501}),
    "chunks, in two headers": (head(CHUNKED, CHUNKED, length=None) + IN_CHUNKS, {400, 501}),
    "gzip in chunks": (head("Transfer-Encoding: gzip, chunked", length=None) + IN_CHUNKS, {400, 501}),
    "gzip in chunks, in two headers": (head("Transfer-Encoding: gzip", CHUNKED, length=None) + IN_CHUNKS, {400, 501}),
    "gzip": (head("Transfer-Encoding: gzip", length=None) + BODY, {400, 501}),
    "identity": (head("Transfer-Encoding: identity", length=None) + BODY, {400, 501}),
    "almost chunks": (head("Transfer-Encoding: xchunked", length=None) + IN_CHUNKS, {400, 501}),
    "chunks in HTTP/1.0": (head(CHUNKED, length=None, version="HTTP/1.0") + IN_CHUNKS, {400}),
    "a bare line feed": (head("X: y\nZ: w") + BODY, {400}),
    "a head of bare line feeds": (head().replace(b"\r\n", b"\n"), {400}),
    "a bare carriage return": (head("X: y\rZ: w") + BODY, {400}),
    "a folded header": (head("X: y\r\n z") + BODY, {400}),
    "a folded length": (head("Content-Length:\r\n 32", length=None) + BODY, {400}),
    "a header before the first": (head().replace(b"Host", b" Host") + BODY, {400}),
    "a blank before the colon": (head("Content-Length : 32", length=None) + BODY, {400}),
    "a name without a colon": (head("X") + BODY, {400}),
    "no name": (head(": y") + BODY, {400}),
    "a name that is none": (head("X(y): z") + BODY, {400}),
    "NUL in a value": (head("X: y\0z") + BODY, {400}),
    "NUL in a name": (head("X\0: y") + BODY, {400}),
    "a control character": (head("X: y\x07") + BODY, {400}),
    "no host": (head().replace(b"Host: x\r\n", b"") + BODY, {400}),
    "two hosts": (TWO_HOSTS + BODY, {400}),
    "two hosts that differ": (TWO_HOSTS.replace(b"Host: x\r\nContent", b"Host: y\r\nContent") + BODY, {400}),
    "two types of a body": (head("Content-Type: application/json") + BODY, {400}),
    "a host with a blank": (head().replace(b"Host: x", b"Host: x y") + BODY, {400}),
    "a host with a path": (head().replace(b"Host: x", b"Host: x/y") + BODY, {400}),
    "HTTP/0.9": (b"GET /livez\r\n\r\n", {400}),
    "HTTP/0.9, said": (head(version="HTTP/0.9") + BODY, {400, 505}),
    "HTTP/1.2": (head(version="HTTP/1.2") + BODY, {400, 505}),
    "HTTP/2.0": (head(version="HTTP/2.0") + BODY, {400, 505}),
    "HTTP/3.0": (head(version="HTTP/3.0") + BODY, {400, 505}),
    "http/1.1": (head(version="http/1.1") + BODY, {400}),
    "no HTTP": (head(version="RTSP/1.0", method="DESCRIBE") + BODY, {400, 505}),
    "HTTP/2's preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0", {400, 405, 505}),
    "CONNECT": (b"CONNECT example.com:443 HTTP/1.1\r\nHost: example.com:443\r\n\r\n", {400, 405}),
    "two blanks": (head(path=f" {LOOKUP}") + BODY, {400}),
    "a blank in the path": (head(path=f"{LOOKUP} x") + BODY, {400}),
    "a fragment": (head(path=f"{LOOKUP}#x") + BODY, {400}),
    "bytes in the path": (head(path="/v1/tables/\xfc/lookup") + BODY, {400}),
    "a method that is none": (head(method="G@T") + BODY, {400, 501}),
    "a TLS hello": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(200)), {400}),
    "garbage": (bytes(range(128, 256)) * 10, {400}),
    "an unknown expectation": (head("Expect: 200-ok") + BODY, {417}),
    "a chunk without a length": (head(CHUNKED, length=None) + b"\r\n" + BODY, {400}),
    "a chunk with a sign": (head(CHUNKED, length=None) + b"+20\r\n" + BODY + b"\r\n0\r\n\r\n", {400}),
    "a chunk with 0x": (head(CHUNKED, length=None) + b"0x20\r\n" + BODY + b"\r\n0\r\n\r\n", {400}),
    "a chunk beyond 64 bits": (head(CHUNKED, length=None) + b"1" + b"0" * 16 + b"\r\n" + BODY, {400, 413}),
    "a chunk longer than it says": (head(CHUNKED, length=None) + b"8\r\n" + BODY + b"\r\n0\r\n\r\n", {400}),
    "a chunk that ends in a line feed": (head(CHUNKED, length=None) + b"20\n" + BODY + b"\n0\n\n", {400}),
    "a line feed in an extension": (head(CHUNKED, length=None) + b"20;\n\r\n" + BODY + b"\r\n0\r\n\r\n", {400}),
    "an endless extension": (head(CHUNKED, length=None) + b"20;" + b"x" * 100_000, {400, 413, 431}),
    "a trailer that is none": (head(CHUNKED, length=None) + IN_CHUNKS[:-2] + b"A b\r\n\r\n", {400}),
    "endless trailers": (head(CHUNKED, length=None) + IN_CHUNKS[:-2] + b"A: b\r\n" * 20_000, {400, 413, 431}),
    "a head beyond 64 KiB": (head("X: " + "y" * (1 << 16)) + BODY, {431}),
    "an endless header": (head()[:-2] + b"X: " + b"y" * 200_000, {431}),
    "endless headers": (head()[:-2] + b"X: y\r\n" * 20_000, {431}),
    "an endless path": (b"GET /" + b"x" * 200_000, {414, 431}),
    "an endless first line": (b"G" * 200_000, {400, 431}),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_server_refuses_what_is_doubtful_and_closes(server, name):
    sent, statuses = BAD[name]
    ((status, body),) = ask(server, sent)
    assert status in statuses
    assert b'"error_type"' in body
    assert server.web.get("/livez").status_code == 200


@pytest.mark.parametrize("name", BAD)
def test_a_good_request_keeps_its_reply_whatever_follows_in_the_packet(server, name):
    sent, statuses = BAD[name]
    first, second = ask(server, head() + BODY + sent)
    assert first == (200, WANTED)
    assert second[0] in statuses


NO_ROUTES = ["lookup%0A", "lookup%0a", "lookup%2F", "lookup%2f", "lookup%00", "lookup%7F", "lookup/", "lookup%20",
             "lookup%3F", "lookup;", "%2Flookup", "lookup%0D%0AX:y", "%6Cookup%0A"]  # fmt: skip


@pytest.mark.parametrize("tail", NO_ROUTES)
@pytest.mark.parametrize("stem", ["/v1/tables/t/", "/v1/"], ids=["table", "tables"])
def test_a_path_with_an_escaped_end_is_no_route(server, stem, tail):
    first, last = ask(server, head(path=stem + tail) + BODY)
    assert (first[0], last[0]) == (404, 200)


@pytest.mark.parametrize(
    "path", ["/livez%0A", "/readyz%0a", "/v1/tables%0A", "/v1%2Ftables", "/v1/tables/t%2Fvalues", "/metrics%0A"]
)
def test_a_path_with_an_escaped_slash_or_end_is_no_route_of_get(server, path):
    first, last = ask(server, head(method="GET", path=path, length=0))
    assert (first[0], last[0]) == (404, 200)


ENCODINGS = [
    "gzip",
    "GZIP",
    "deflate",
    "br",
    "zstd",
    "x-gzip",
    "identity, gzip",
    "gzip, identity",
    "compress",
    "aes128gcm",
]
TEXT = b'{"ids": [7]}'
BODIES = {
    "bytes": (LOOKUP, BINARY, BODY),
    "JSON": (LOOKUP, JSON, TEXT),
    "tables": ("/v1/lookup", JSON, b'{"tables": {"t": {"ids": [7]}}}'),
    "search": ("/v1/tables/t/search", JSON, TEXT),
}


@pytest.mark.parametrize("in_pieces", [False, True], ids=["whole", "in pieces"])
@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_server_refuses_a_body_that_is_encoded(server, name, encoding, in_pieces):
    path, given, text = BODIES[name]
    body = gzip.compress(text, mtime=0)
    body += bytes(-len(body) % 8)
    sent = head(f"Content-Encoding: {encoding}", path=path, given=given, length=len(body)).replace(
        f"Accept: {BINARY}".encode(), b"Accept: */*"
    )
    found = ask(server, *([sent, body] if in_pieces else [sent + body]))
    assert [status for status, _ in found] == [415, 200]
    assert b"identity" in found[0][1]


def test_server_refuses_a_body_that_is_encoded_in_the_second_of_two_headers(server):
    found = ask(server, head("Content-Encoding: identity", "Content-Encoding: gzip") + BODY)
    assert [status for status, _ in found] == [415, 200]


@pytest.mark.parametrize("name", BODIES)
def test_server_reads_a_body_that_says_identity(server, name):
    path, given, text = BODIES[name]
    sent = head("Content-Encoding: Identity", path=path, given=given, length=len(text))
    found = ask(server, sent.replace(f"Accept: {BINARY}".encode(), b"Accept: */*") + text)
    assert [status for status, _ in found] == [200, 200]
