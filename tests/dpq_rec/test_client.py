"""The client that takes codes, against servers of a socket each. tests/contracts holds it to the reference."""

import gzip
import socket
import threading
import zlib

import numpy as np
import pytest

from dpq_rec import ConfigError, DamagedArtifactError, EmbeddingStore, Int64Vocabulary, TableContents, write_artifact
from dpq_rec.client import CodesClient
from dpq_rec.codes import CodeLayout
from dpq_rec.errors import IdTypeError, ServerError
from dpq_rec.wire import Values

IDS = [7, -1, 2**53 + 1]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    layout = CodeLayout(num_subspaces=2, num_codes=256)
    contents = TableContents(
        num_embeddings=3,
        embedding_dim=4,
        vocabulary=Int64Vocabulary.from_ids(IDS),
        chunks=[np.array([[0, 255], [1, 2], [3, 4]], np.uint8)],
        layout=layout,
        values=np.random.default_rng(0).standard_normal((2, 256, 2)).astype(np.float32),
    )
    folder = tmp_path_factory.mktemp("client") / "artifact"
    return EmbeddingStore.open(write_artifact(folder, {"t": contents}, version="one"))


class Peer:
    """A server that answers request after request with what it is told, and keeps what it was sent."""

    def __init__(self, *replies):
        self.listener, self.replies, self.heads = socket.create_server(("127.0.0.1", 0)), list(replies), []
        self.num_connections = 0
        self.thread = threading.Thread(target=self.serve, daemon=True)
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}/prefix"

    def serve(self):
        while self.replies:
            connection, _ = self.listener.accept()
            self.num_connections += 1
            with connection:
                while self.replies and (head := self.received(connection)):
                    self.heads.append(head)
                    reply = self.replies.pop(0)
                    if reply is None:  # closes the connection instead
                        break
                    for piece in reply:
                        if piece is None:  # the connection ends with it
                            break
                        connection.sendall(piece)
                    if reply[-1] is None:
                        break

    @staticmethod
    def received(connection):
        data = b""
        while b"\r\n\r\n" not in data:
            piece = connection.recv(1 << 16)
            if not piece:
                return b""
            data += piece
        head, _, body = data.partition(b"\r\n\r\n")
        length = next((int(line[16:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")), 0)
        while len(body) < length:
            body += connection.recv(1 << 16)
        return head


def reply(body, status="200 OK", **headers):
    lines = [
        f"HTTP/1.1 {status}",
        f"Content-Length: {len(body)}",
        *(f"{k.replace('_', '-')}: {v}" for k, v in headers.items()),
    ]
    return [("\r\n".join(lines) + "\r\n\r\n").encode() + body]


def codes(store, version="one"):
    rows = store.codes("t", [2**53 + 1, 5])
    body = rows.packed_NW.tobytes() + rows.missing.astype("<u4").tobytes()
    return reply(body, X_Num_Rows=2, x_row_bytes=2, X_Num_Missing=1, X_Version=version)


def values(store, version="one"):
    return reply(store.tables["t"].values(version).to_bytes())


def test_client_gives_the_vectors_of_the_store_and_asks_for_values_once(store):
    peer = Peer(codes(store), values(store), codes(store))
    with CodesClient(peer.url, api_key="secret") as client:
        for _ in range(2):
            vectors, missing = client.lookup("t", np.array([2**53 + 1, 5]))
            assert vectors.tobytes() == store.lookup("t", [2**53 + 1, 5]).vectors.tobytes()
            assert missing.tolist() == [1]
    assert [head.split(b" HTTP")[0] for head in peer.heads] == [
        b"POST /prefix/v1/tables/t/lookup?missing=zeros",
        b"GET /prefix/v1/tables/t/values",
        b"POST /prefix/v1/tables/t/lookup?missing=zeros",
    ]
    assert all(b"X-API-Key: secret" in head for head in peer.heads)


def test_client_takes_a_reply_in_pieces(store):
    whole = b"".join(codes(store))
    peer = Peer([whole[i : i + 1] for i in range(len(whole))], values(store))
    with CodesClient(peer.url) as client:
        assert client.lookup("t", [2**53 + 1, 5]).missing.tolist() == [1]


def test_client_asks_for_new_values_when_the_version_changes(store):
    peer = Peer(codes(store), values(store), codes(store, "two"), values(store, "two"))
    with CodesClient(peer.url) as client:
        client.lookup("t", [2**53 + 1, 5])
        client.lookup("t", [2**53 + 1, 5])
    assert len(peer.heads) == 4


def test_client_gives_up_when_the_versions_never_meet(store):
    peer = Peer(*[codes(store), values(store, "two")] * 3)
    with CodesClient(peer.url) as client, pytest.raises(ServerError, match="different versions"):
        client.lookup("t", [2**53 + 1, 5])


def test_client_connects_anew_where_an_idle_connection_was_closed(store):
    peer = Peer(codes(store), values(store), None, codes(store))
    with CodesClient(peer.url) as client:
        client.lookup("t", [2**53 + 1, 5])
        assert client.lookup("t", [2**53 + 1, 5]).missing.tolist() == [1]


def test_client_keeps_the_connection_that_it_made_where_an_idle_one_was_closed(store):
    peer = Peer(codes(store), values(store), None, codes(store), codes(store), codes(store))
    with CodesClient(peer.url) as client:
        for _ in range(4):
            assert client.lookup("t", [2**53 + 1, 5]).missing.tolist() == [1]
    assert peer.num_connections == 2


def test_client_says_when_a_server_closes_a_new_connection(store):
    with CodesClient(Peer(None).url) as client, pytest.raises(ConnectionError, match="before its reply"):
        client.lookup("t", [1])


def test_client_raises_what_the_server_refuses(store):
    peer = Peer(reply(b'{"error": "no", "error_type": "unknown_table"}', "404 Not Found"), reply(b"<html>", "502 Bad"))
    with CodesClient(peer.url) as client:
        with pytest.raises(ServerError, match="404 unknown_table: no") as error:
            client.lookup("x/y", [1])
        assert (error.value.status, error.value.error_type) == (404, "unknown_table")
        with pytest.raises(ServerError, match="502 reply: b'<html>'"):
            client.lookup("t", [1])
    assert peer.heads[0].startswith(b"POST /prefix/v1/tables/x%2Fy/lookup")


def codes_in(store, head, *, join=lambda body: body):
    """The reply of `codes` under another head, whose body went through `join`."""
    (whole,) = codes(store)
    lines, _, body = whole.partition(b"\r\n\r\n")
    names = [line for line in lines.split(b"\r\n")[1:] if not line.lower().startswith(b"content-length")]
    body = join(body)
    return [head % {b"length": len(body), b"names": b"\r\n".join(names)} + body]


def chunked(body, size=3):
    chunks = [body[at : at + size] for at in range(0, len(body), size)]
    return b"".join(b"%X;x=y\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\nTrailer: 1\r\n\r\n"


def raw_deflate(body):
    deflater = zlib.compressobj(wbits=-15)
    return deflater.compress(body) + deflater.flush()


OK = b"HTTP/1.1 200 OK\r\n%(names)b\r\n"
HEADS = {
    "no blank": (OK + b"Content-Length:%(length)d\r\n\r\n", None),
    "blanks around": (OK + b"CONTENT-length: \t %(length)d \t\r\n\r\n", None),
    "twice the same": (OK + b"Content-Length: %(length)d\r\nContent-Length: %(length)d\r\n\r\n", None),
    "a folded header": (OK + b"X-Folded: a\r\n  b: c\r\nContent-Length:\r\n %(length)d\r\n\r\n", None),
    "line feeds alone": (OK.replace(b"\r", b"") + b"Content-Length: %(length)d\n\n", None),
    "an empty line before": (b"\r\n" + OK + b"Content-Length: %(length)d\r\n\r\n", None),
    "no reason": (OK.replace(b" OK", b"") + b"Content-Length: %(length)d\r\n\r\n", None),
    "100 before": (b"HTTP/1.1 100 Continue\r\n\r\n" + OK + b"Content-Length: %(length)d\r\n\r\n", None),
    "103 before": (
        b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" * 2 + OK + b"Content-Length: %(length)d\r\n\r\n",
        None,
    ),
    "chunks": (OK + b"Transfer-Encoding: Chunked\r\n\r\n", chunked),
    "no chunk": (OK + b"Transfer-Encoding: chunked\r\n\r\n", lambda body: chunked(body, 100)),
    "gzip": (OK + b"Content-Encoding: gzip\r\nContent-Length: %(length)d\r\n\r\n", gzip.compress),
    "gzip in chunks": (
        OK + b"Content-Encoding: GZIP\r\nTransfer-Encoding: chunked\r\n\r\n",
        lambda body: chunked(gzip.compress(body)),
    ),
    "gzip in two members": (
        OK + b"Content-Encoding: x-gzip\r\nContent-Length: %(length)d\r\n\r\n",
        lambda body: gzip.compress(body[:3]) + gzip.compress(body[3:]),
    ),
    "zlib": (OK + b"Content-Encoding: deflate\r\nContent-Length: %(length)d\r\n\r\n", zlib.compress),
    "deflate": (OK + b"Content-Encoding: deflate\r\nContent-Length: %(length)d\r\n\r\n", raw_deflate),
    "both": (
        OK + b"Content-Encoding: deflate, gzip\r\nContent-Length: %(length)d\r\n\r\n",
        lambda body: gzip.compress(zlib.compress(body)),
    ),
    "identity": (OK + b"Content-Encoding: identity\r\nContent-Length: %(length)d\r\n\r\n", None),
}


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("in_pieces", [False, True])
def test_client_reads_a_reply_in_every_form_and_the_next_on_the_same_connection(store, name, in_pieces):
    head, join = HEADS[name]
    (whole,) = codes_in(store, head, join=join or (lambda body: body))
    pieces = [whole[at : at + 1] for at in range(len(whole))] if in_pieces else [whole]
    peer = Peer(pieces, values(store), pieces)
    with CodesClient(peer.url) as client:
        for _ in range(2):
            assert client.lookup("t", [2**53 + 1, 5]).missing.tolist() == [1]
    assert peer.num_connections == 1
    assert all(b"Accept-Encoding: identity" in head for head in peer.heads)


@pytest.mark.parametrize(
    "head",
    [
        OK + b"\r\n",
        OK + b"Connection: close\r\n\r\n",
        OK + b"Connection: X-A, Close\r\nContent-Length: %(length)d\r\n\r\n",
        OK.replace(b"1.1", b"1.0") + b"Content-Length: %(length)d\r\n\r\n",
    ],
    ids=["ends with the connection", "closes, without a length", "closes", "HTTP/1.0"],
)
def test_client_makes_a_new_connection_where_the_reply_ends_it(store, head):
    peer = Peer([*codes_in(store, head), None], values(store))
    with CodesClient(peer.url) as client:
        assert client.lookup("t", [2**53 + 1, 5]).missing.tolist() == [1]
    assert peer.num_connections == 2


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        (OK + b"Content-Encoding: br\r\nContent-Length: %(length)d\r\n\r\n", "Content-Encoding br"),
        (OK + b"Content-Encoding: gzip\r\nContent-Length: %(length)d\r\n\r\n", "compressed body that is damaged"),
        (OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n", "Transfer-Encoding b'gzip, chunked'"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", "size of a chunk b'zz'"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n1\r\nabc\r\n", "longer than its size"),
        (OK + b"Content-Length: -1\r\n\r\n", "Content-Length b'-1'"),
        (OK + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n", "Content-Length b'1, 2'"),
        (b"HTTP/1.1 101 Switching\r\n\r\n", "status 101"),
        (b"HTTP/1.1 103 Early\r\n\r\n" * 30, "status 103"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", "SSH-2.0"),
        (b"HTTP/1.1 OK\r\n\r\n", "HTTP/1.1 OK"),
        (OK + b"no colon\r\n\r\n", "no header in .*no colon"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 70_000, "head of more than 65536 bytes"),
    ],
)
def test_client_names_what_it_cannot_read(store, sent, message):
    peer = Peer(codes_in(store, sent) if b"%(" in sent else [sent])
    with CodesClient(peer.url) as client, pytest.raises(ServerError, match=message):
        client.lookup("t", [2**53 + 1, 5])


@pytest.mark.parametrize("name", ["no blank", "chunks", "gzip"])
def test_client_says_when_a_reply_is_truncated(store, name):
    head, join = HEADS[name]
    (whole,) = codes_in(store, head, join=join or (lambda body: body))
    with CodesClient(Peer([whole[:-1], None]).url) as client, pytest.raises(ConnectionError, match="before its reply"):
        client.lookup("t", [2**53 + 1, 5])


def test_client_keeps_no_connection_on_which_more_came_than_was_asked_for(store):
    (whole,) = codes(store)
    peer = Peer([whole + b"HTTP/1.1 500 Late\r\nContent-Length: 0\r\n\r\n", None], values(store), codes(store))
    with CodesClient(peer.url) as client:
        for _ in range(2):
            assert client.lookup("t", [2**53 + 1, 5]).missing.tolist() == [1]
    assert peer.num_connections == 2


def test_client_says_what_a_server_refuses_that_does_not_read_the_body(store):
    """The server answers the head, and closes with the body unread, which resets the connection."""
    listener = socket.create_server(("127.0.0.1", 0))

    def refuse():
        connection, _ = listener.accept()
        with connection:
            connection.recv(100)
            connection.sendall(reply(b'{"error": "big", "error_type": "too_large"}', "413 Too Large")[0])
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(1 << 20):
                pass

    threading.Thread(target=refuse, daemon=True).start()
    with (
        CodesClient(f"http://127.0.0.1:{listener.getsockname()[1]}") as client,
        pytest.raises(ServerError, match="413 too_large: big"),
    ):
        client.lookup("t", np.arange(1 << 19))


def test_client_without_a_body_in_the_reply_says_its_status(store):
    with (
        CodesClient(Peer([b"HTTP/1.1 204 No Content\r\n\r\n"]).url) as client,
        pytest.raises(ServerError, match="204 reply"),
    ):
        client.lookup("t", [1])


@pytest.mark.parametrize("key", ["a\r\nX: y", "a\n", "a\0"])
def test_client_refuses_a_key_that_no_header_can_hold(key):
    with pytest.raises(ConfigError, match="api_key: got"):
        CodesClient("http://localhost:1", api_key=key)


@pytest.mark.parametrize("url", ["http://localhost:x", "http://localhost:99999"])
def test_client_refuses_a_port_that_there_is_not(url):
    with pytest.raises(ConfigError, match="url: got"):
        CodesClient(url)


def test_client_refuses_another_policy_for_missing_ids():
    with CodesClient("http://localhost:1") as client, pytest.raises(ConfigError, match="missing: got"):
        client.lookup("t", [1], missing="zeros HTTP/1.1\r\n")


def test_client_never_takes_a_late_reply_for_the_next_one(store):
    """Its second try, after an idle connection was closed, is answered too late."""
    peer = Peer(codes(store), values(store), None, [b"HTTP/1.1 200 OK\r\n"], codes(store))
    with CodesClient(peer.url, timeout_seconds=0.3) as client:
        client.lookup("t", [2**53 + 1, 5])
        with pytest.raises(TimeoutError):
            client.lookup("t", [2**53 + 1, 5])
        assert not client._idle()


@pytest.mark.parametrize("ids", [np.array([2**64 - 1], np.uint64), np.array([[1, 2]]), [1.5], [True], [2**63]])
def test_client_refuses_ids_as_the_store_does(store, ids):
    with pytest.raises(IdTypeError):
        store.lookup("t", ids)
    with CodesClient("http://localhost:1") as client, pytest.raises(IdTypeError):
        client.lookup("t", ids)


@pytest.mark.parametrize(
    ("headers", "error"),
    [
        ({}, ServerError),
        ({"X_Num_Rows": 3, "x_row_bytes": 2, "X_Num_Missing": 0, "X_Version": "one"}, ServerError),
        ({"X_Num_Rows": 2, "x_row_bytes": 1, "X_Num_Missing": 0, "X_Version": "one"}, DamagedArtifactError),
    ],
    ids=["another reply", "codes of more ids", "narrower codes"],
)
def test_client_refuses_codes_that_do_not_fit(store, headers, error):
    sizes = headers.get("X_Num_Rows", 0) * headers.get("x_row_bytes", 0)
    peer = Peer(reply(bytes(sizes), **headers), values(store))
    with CodesClient(peer.url) as client, pytest.raises(error):
        client.lookup("t", [2**53 + 1, 5])


def test_client_refuses_values_that_are_none(store):
    with CodesClient(Peer(codes(store), reply(b"12345678")).url) as client, pytest.raises(DamagedArtifactError):
        client.lookup("t", [2**53 + 1, 5])


@pytest.mark.parametrize("url", ["localhost:8080", "ftp://x", "http://"])
def test_client_refuses_other_urls(url):
    with pytest.raises(ConfigError, match="url: got"):
        CodesClient(url)


def test_values_of_other_sizes_are_refused(store):
    content = store.tables["t"].values("one").to_bytes()
    for old, new in ((b'"num_codes":"256"', b'"num_codes":"255"'), (b'"num_levels":"[1]"', b'"num_levels":"[3]"'),
                     (b'"num_levels":"[1]"', b'"num_levels":"[]" '), (b'"values"', b'"valuez"')):  # fmt: skip
        assert old in content
        with pytest.raises(DamagedArtifactError, match="values: got"):
            Values.from_bytes(content.replace(old, new))
