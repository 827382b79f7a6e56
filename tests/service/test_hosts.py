"""HTTP and gRPC listen on the same addresses, whatever names them; a host that cannot be had is in the error."""

import socket

import pytest

from service.supervisor import bind
from tests.service.conftest import Server

LOOPBACKS = ("127.0.0.1", "::1")


def answers(host, port):
    try:
        socket.create_connection((host, port), timeout=10).close()
    except OSError:
        return False
    return True


@pytest.fixture
def _ipv6():
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError:
        pytest.skip("this machine has no IPv6")


@pytest.mark.usefixtures("_ipv6")
@pytest.mark.parametrize(
    ("host", "wanted"),
    [
        ("0.0.0.0", ["127.0.0.1"]),
        ("::ffff:0.0.0.0", ["127.0.0.1"]),
        ("::", ["127.0.0.1", "::1"]),
        ("::1", ["::1"]),
    ],
)
def test_both_apis_listen_on_the_same_addresses(start_server, host, wanted):
    server = start_server(f"--host={host}", "--workers=1").wait_until_ready()
    ports = [int(address.rpartition(":")[2]) for address in (server.http, server.grpc)]
    assert [[each for each in LOOPBACKS if answers(each, port)] for port in ports] == [wanted, wanted]


@pytest.mark.parametrize("host", ["nosuch.invalid", "a" * 70, "a..b"])
def test_bind_names_the_host_that_it_does_not_find(host):
    with pytest.raises(OSError, match=f"host: got '{host}', want a name or an address of this machine"):
        bind(host, 0, shared=False)


def test_server_exits_1_with_a_line_that_names_a_host_that_there_is_not(artifact):
    exit_code, logged = Server(artifact, "--host=nosuch.invalid").wait()
    assert (exit_code, len(logged.splitlines())) == (1, 1)
    assert "nosuch.invalid" in logged
