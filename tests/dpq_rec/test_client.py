"""The client that takes codes, against servers of a socket each. tests/contracts holds it to the reference."""

import socket
import threading

import numpy as np
import pytest

from dpq_rec import ConfigError, DamagedArtifactError, EmbeddingStore, Int64Vocabulary, TableContents, write_artifact
from dpq_rec.client import CodesClient
from dpq_rec.codes import CodeLayout
from dpq_rec.errors import IdTypeError, ServerError
from dpq_rec.packed import values_of_bytes, values_to_bytes

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
        self.listener, self.replies, self.asked = socket.create_server(("127.0.0.1", 0)), list(replies), []
        self.thread = threading.Thread(target=self.serve, daemon=True)
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}/prefix"

    def serve(self):
        while self.replies:
            connection, _ = self.listener.accept()
            with connection:
                while self.replies and (head := self.received(connection)):
                    self.asked.append(head)
                    reply = self.replies.pop(0)
                    if reply is None:  # closes the connection instead
                        break
                    for piece in reply:
                        connection.sendall(piece)

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
    return reply(values_to_bytes(store.tables["t"], version))


def test_client_gives_the_vectors_of_the_store_and_asks_for_values_once(store):
    peer = Peer(codes(store), values(store), codes(store))
    with CodesClient(peer.url, api_key="secret") as client:
        for _ in range(2):
            vectors, missing = client.lookup("t", np.array([2**53 + 1, 5]))
            assert vectors.tobytes() == store.lookup("t", [2**53 + 1, 5]).vectors.tobytes()
            assert missing.tolist() == [1]
    assert [head.split(b" HTTP")[0] for head in peer.asked] == [
        b"POST /prefix/v1/tables/t/lookup?missing=zeros",
        b"GET /prefix/v1/tables/t/values",
        b"POST /prefix/v1/tables/t/lookup?missing=zeros",
    ]
    assert all(b"X-API-Key: secret" in head for head in peer.asked)


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
    assert len(peer.asked) == 4


def test_client_gives_up_when_the_versions_never_meet(store):
    peer = Peer(*[codes(store), values(store, "two")] * 3)
    with CodesClient(peer.url) as client, pytest.raises(ServerError, match="different versions"):
        client.lookup("t", [2**53 + 1, 5])


def test_client_connects_anew_where_an_idle_connection_was_closed(store):
    peer = Peer(codes(store), values(store), None, codes(store))
    with CodesClient(peer.url) as client:
        client.lookup("t", [2**53 + 1, 5])
        assert client.lookup("t", [2**53 + 1, 5]).missing.tolist() == [1]


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
    assert peer.asked[0].startswith(b"POST /prefix/v1/tables/x%2Fy/lookup")


def test_client_refuses_a_reply_without_a_length(store):
    peer = Peer([b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"])
    with CodesClient(peer.url) as client, pytest.raises(ServerError, match="without a Content-Length"):
        client.lookup("t", [1])


def test_client_never_takes_a_late_reply_for_the_next_one(store):
    """Its second try, after an idle connection was closed, is answered too late."""
    peer = Peer(codes(store), values(store), None, [b"HTTP/1.1 200 OK\r\n"], codes(store))
    with CodesClient(peer.url, timeout_seconds=0.3) as client:
        client.lookup("t", [2**53 + 1, 5])
        with pytest.raises(TimeoutError):
            client.lookup("t", [2**53 + 1, 5])
        assert client._socket is None


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
    content = values_to_bytes(store.tables["t"], "one")
    for old, new in ((b'"num_codes":"256"', b'"num_codes":"255"'), (b'"num_levels":"[1]"', b'"num_levels":"[3]"'),
                     (b'"num_levels":"[1]"', b'"num_levels":"[]" '), (b'"values"', b'"valuez"')):  # fmt: skip
        assert old in content
        with pytest.raises(DamagedArtifactError, match="values: got"):
            values_of_bytes(content.replace(old, new))
