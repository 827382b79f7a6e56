"""`python -m service` as its users meet it: processes, ports, signals, exit codes."""

import http.client
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import grpc
import httpx
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from dpq_rec import EmbeddingStore, IdentityVocabulary, TableContents, write_artifact
from service.proto.dpq.v1 import embedding_pb2 as pb
from service.proto.dpq.v1 import embedding_pb2_grpc as pb_grpc

ROOT = Path(__file__).parents[2]
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def until(condition, seconds=60.0):
    """Wait for what happens in another process."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not so within {seconds} s"
        time.sleep(0.02)


def is_alive(pid):
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def metric(server, name):
    """The samples of a metric, as whichever worker answers a new connection gives them: labels -> value."""
    lines = server.web.get("/metrics").text.splitlines()
    found = (re.fullmatch(rf"{name}(?:{{(.*)}})? (\S+)", line) for line in lines)
    return {match[1]: float(match[2]) for match in found if match}


def refuses_connections(server):
    try:
        server.web.get("/livez")
    except httpx.TransportError as error:
        return isinstance(error, httpx.ConnectError)
    return False


def open_request(address, length=12):
    """A connection that has sent the head of a lookup, and none of its body."""
    host, port = address.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=10)
    head = f"POST /v1/tables/user_id/lookup HTTP/1.1\r\nHost: x\r\nContent-Length: {length}"
    connection.sendall(head.encode() + b"\r\nContent-Type: application/json\r\n\r\n")
    return connection


# The ready line, and both APIs


def test_server_says_where_it_serves_what(server):
    assert (server.version, server.tables) == ("test-1", "item_id, user_id")
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+", server.http)
    assert re.fullmatch(r"127\.0\.0\.1:\d+", server.grpc)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_server_gives_the_same_vectors_over_http_and_grpc(server, references, dtype):
    ids = np.concatenate([references["item_id"].ids, [10**12]])[::-1]
    vectors, missing = references["item_id"].lookup(ids, dtype)
    url = f"/v1/tables/item_id/lookup?dtype={dtype}"
    binary = {"Content-Type": "application/octet-stream", "Accept": "application/octet-stream"}
    as_bytes = server.web.post(url, content=ids.astype("<i8").tobytes(), headers=binary)
    assert as_bytes.content == vectors.tobytes() + np.array(missing, "<u4").tobytes()
    as_json = server.web.post(url, json={"ids": ids.tolist()}).json()
    np.testing.assert_array_equal(np.array(as_json["vectors"]).astype(dtype), vectors)
    with grpc.insecure_channel(server.grpc) as channel:
        request = pb.LookupRequest(table="item_id", ids=ids.tolist(), dtype=int(dtype == "float16"))
        reply = pb_grpc.EmbeddingServiceStub(channel).Lookup(request)
    assert (reply.vectors, list(reply.missing)) == (vectors.tobytes(), missing)


def test_server_sends_the_largest_reply_to_a_client_that_takes_it(server):
    ids = [3] * 65_536
    with grpc.insecure_channel(server.grpc, [("grpc.max_receive_message_length", -1)]) as channel:
        reply = pb_grpc.EmbeddingServiceStub(channel).Lookup(pb.LookupRequest(table="item_id", ids=ids))
        assert len(reply.vectors) == 65_536 * 24 * 4
        with pytest.raises(grpc.RpcError) as error:
            pb_grpc.EmbeddingServiceStub(channel).Lookup(pb.LookupRequest(table="item_id", ids=[*ids, 3]))
    assert error.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    answer = server.web.post("/v1/tables/item_id/lookup", json={"ids": ids})
    assert len(answer.json()["vectors"]) == 65_536


def test_server_answers_many_callers_at_once(server, references):
    ids = references["item_id"].ids.tolist()
    wanted = references["item_id"].lookup(ids)[0].tobytes()
    failures = []

    def ask(number):
        headers = {"Accept": "application/octet-stream"}
        with httpx.Client(base_url=server.http) as client, grpc.insecure_channel(server.grpc) as channel:
            stub = pb_grpc.EmbeddingServiceStub(channel)
            for _ in range(10):
                over_http = client.post("/v1/tables/item_id/lookup", json={"ids": ids}, headers=headers).content
                over_grpc = stub.Lookup(pb.LookupRequest(table="item_id", ids=ids)).vectors
                failures.extend([number] * (over_http != wanted) + [number] * (over_grpc != wanted))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_server_closes_the_connection_of_a_body_that_is_too_long(server):
    with open_request(server.http, length=1 << 40) as connection:
        answer = connection.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b'"error_type":"too_many_bytes"' in answer


def test_server_counts_a_chunked_body_as_it_arrives(server):
    host, port = server.http.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(b"POST /v1/lookup HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n")
        connection.sendall(b"Content-Type: application/json\r\n\r\n")
        pieces = (b"10000\r\n" + b" " * 0x10000 + b"\r\n") * 1000  # 65 MB, and no end; 4 MiB are allowed
        with pytest.raises(OSError, match=r"reset|pipe"):
            connection.sendall(pieces)


def test_server_survives_callers_that_leave_in_the_middle(server):
    for _ in range(5):
        open_request(server.http).close()
    until(lambda: metric(server, "dpq_in_flight_requests") == {None: 0.0})
    until(
        lambda: (
            metric(server, "dpq_requests_total").get('api="http",code="499",method="POST /v1/tables/{table}/lookup"')
            == 5
        )
    )


# Workers


def test_workers_map_one_and_the_same_file_of_the_current_version(server):
    pids = server.worker_pids()
    assert len(pids) == 2
    file = str(server.artifact / "test-1" / "tables" / "item_id.safetensors")
    for pid in pids:
        assert any(file in line and " r--" in line for line in Path(f"/proc/{pid}/maps").read_text().splitlines())


def test_metrics_are_those_of_all_workers_whichever_answers(server):
    before = metric(server, "dpq_ids_total").get('table="user_id"', 0)
    for _ in range(30):
        server.web.post("/v1/tables/user_id/lookup", json={"ids": [1, 99]})
    assert {metric(server, "dpq_ids_total")['table="user_id"'] for _ in range(15)} == {before + 60}
    assert metric(server, "dpq_ready_workers") == {None: 2.0}
    pids = {re.search(r'pid="(\d+)"', labels)[1] for labels in metric(server, "dpq_worker_memory_bytes")}
    assert pids == {str(pid) for pid in server.worker_pids()}


def test_supervisor_replaces_a_worker_that_dies_and_keeps_its_counts(start_server):
    server = start_server("--workers=2").wait_until_ready()
    for _ in range(10):
        server.web.post("/v1/tables/user_id/lookup", json={"ids": [1]})
    victim, other = server.worker_pids()
    os.kill(victim, signal.SIGKILL)
    until(lambda: len(server.worker_pids()) == 2 and victim not in server.worker_pids())
    until(lambda: metric(server, "dpq_ready_workers") == {None: 2.0})
    assert other in server.worker_pids()
    assert metric(server, "dpq_ids_total") == {'table="user_id"': 10.0}
    assert not any(f'pid="{victim}"' in labels for labels in metric(server, "dpq_worker_memory_bytes"))
    exit_code, logged = server.end()
    assert exit_code == 0
    assert f"worker {victim} died with -9" in logged


def test_supervisor_gives_up_when_workers_die_at_start(start_server, tmp_path):
    (tmp_path / "grpc").mkdir()
    (tmp_path / "grpc" / "__init__.py").write_text("raise RuntimeError('a broken grpc')")
    server = start_server("--workers=2", environment={"PYTHONPATH": str(tmp_path)})
    exit_code, logged = server.wait()
    assert exit_code == 1
    assert "giving up" in logged
    assert "a broken grpc" in logged


def test_workers_stop_when_their_parent_is_killed(start_server, tmp_path):
    server = start_server("--workers=2", environment={"TMPDIR": str(tmp_path)}).wait_until_ready()
    pids = server.worker_pids()
    server.process.kill()
    until(lambda: not any(is_alive(pid) for pid in pids))
    assert list(tmp_path.iterdir()) == []


# Stopping


def test_server_drains_then_exits_0(start_server, tmp_path):
    """Readiness fails first, while lookups are answered; what is in flight when the drain ends finishes."""
    server = start_server("--drain-seconds=600", environment={"TMPDIR": str(tmp_path)}).wait_until_ready()
    with grpc.insecure_channel(server.grpc) as channel, open_request(server.http) as in_flight:
        stub, health = pb_grpc.EmbeddingServiceStub(channel), health_pb2_grpc.HealthStub(channel)
        until(lambda: metric(server, "dpq_in_flight_requests") == {None: 1.0})
        server.process.send_signal(signal.SIGTERM)
        until(lambda: server.web.get("/readyz").status_code == 503)
        until(lambda: health.Check(health_pb2.HealthCheckRequest()).status == NOT_SERVING)
        time.sleep(0.3)
        assert server.web.get("/livez").status_code == 200
        assert server.web.post("/v1/tables/user_id/lookup", json={"ids": [1]}).status_code == 200
        assert stub.Lookup(pb.LookupRequest(table="user_id", ids=[1])).dim == 1
        server.process.send_signal(signal.SIGTERM)  # ends the drain, however slow this machine is
        until(lambda: refuses_connections(server))
        time.sleep(0.3)
        assert server.process.poll() is None
        in_flight.sendall(b'{"ids": [1]}')
        assert in_flight.makefile("rb").read().startswith(b"HTTP/1.1 200 ")
    exit_code, logged = server.wait()
    assert (exit_code, "Traceback" in logged) == (0, False), logged
    assert list(tmp_path.iterdir()) == []


def test_server_cuts_off_what_does_not_finish_in_time(start_server):
    server = start_server("--stop-seconds=0.5", "--workers=1").wait_until_ready()
    with open_request(server.http):
        until(lambda: metric(server, "dpq_in_flight_requests") == {None: 1.0})
        assert server.end(timeout=60)[0] == 0


def test_a_second_signal_ends_the_drain(start_server):
    server = start_server("--drain-seconds=600").wait_until_ready()
    server.process.send_signal(signal.SIGINT)
    until(lambda: server.web.get("/readyz").status_code == 503)
    assert server.end(timeout=60)[0] == 0


class PooledClients:
    """Threads that ask one of several servers again and again, on connections that they keep; what fails is kept, too.

    Nothing is lost where no server listens any more: the request was never sent, and the next server is asked.
    """

    def __init__(self, servers):
        self.servers, self.failures, self.num_answered, self._is_done = servers, [], 0, False
        clients = [(HttpxPool, 0.0), (HttpxPool, 0.05), (RawPool, 0.0), (RawPool, 0.02)]
        self._threads = [threading.Thread(target=self._ask, args=client) for client in clients]
        for thread in self._threads:
            thread.start()

    def _ask(self, pool, pause_seconds):
        ask = pool()
        while not self._is_done:
            for server in [*self.servers]:
                try:
                    assert ask(server.http) == 200
                    self.num_answered += 1
                    break
                except (httpx.ConnectError, ConnectionRefusedError):
                    continue
                except Exception as error:
                    self.failures.append(repr(error))
            time.sleep(pause_seconds)

    def end(self):
        self._is_done = True
        for thread in self._threads:
            thread.join()


class HttpxPool:
    def __init__(self):
        self.client = httpx.Client()

    def __call__(self, url):
        return self.client.post(f"{url}/v1/tables/user_id/lookup", json={"ids": [1]}).status_code


class RawPool:
    def __init__(self):
        self.connections = {}

    def __call__(self, url):
        connection = self.connections.setdefault(url, http.client.HTTPConnection(url.removeprefix("http://")))
        headers = dict.fromkeys(("Content-Type", "Accept"), "application/octet-stream")
        try:
            connection.request("POST", "/v1/tables/user_id/lookup", bytes(8), headers)
            answer = connection.getresponse()
            answer.read()
        except Exception:
            connection.close()
            raise
        return answer.status


def test_pooled_clients_lose_no_request_in_a_rolling_restart(start_server):
    flags = ("--workers=2", "--drain-seconds=0.3")
    servers = [start_server(*flags).wait_until_ready() for _ in range(2)]
    clients = PooledClients(servers)
    try:
        for old in [*servers]:
            until(lambda: clients.num_answered > 50)
            clients.num_answered = 0
            servers.append(start_server(*flags).wait_until_ready())
            assert old.end()[0] == 0
            servers.remove(old)
        until(lambda: clients.num_answered > 50)
    finally:
        clients.end()
    assert clients.failures == []


# What keeps it from serving


def run_service(*flags, **environment):
    return subprocess.run(
        [sys.executable, "-m", "service", *flags],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_server_exits_1_with_a_line_when_there_is_no_artifact(tmp_path):
    done = run_service("--artifact", str(tmp_path))
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"service: .*holds neither manifest.json .*\n", done.stderr)


def test_server_exits_1_with_a_line_when_the_artifact_is_damaged(tmp_path):
    rows = np.ones((4, 2), np.float32)
    table = TableContents(num_embeddings=4, embedding_dim=2, vocabulary=IdentityVocabulary(4), chunks=[rows])
    folder = write_artifact(tmp_path / "artifact", {"t": table})
    file = folder / "tables" / "t.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    done = run_service("--artifact", str(folder))
    assert done.returncode == 1
    assert re.fullmatch(r"service: .*t\.safetensors: got \d+ bytes, the manifest says \d+ bytes\n", done.stderr)


@pytest.mark.parametrize("flags", [["--http-port={http}"], ["--http-port=0", "--grpc-port={grpc}"]])
def test_server_exits_1_with_a_line_when_a_port_is_taken(server, artifact, flags):
    """The gRPC port too, though the workers of one server share it."""
    ports = {"http": server.http.rpartition(":")[2], "grpc": server.grpc.rpartition(":")[2]}
    done = run_service(f"--artifact={artifact}", *(flag.format(**ports) for flag in flags))
    assert done.returncode == 1
    assert re.fullmatch(r"service: .*cannot listen on .*Address already in use\n", done.stderr)


def test_server_exits_2_for_usage_errors(artifact):
    done = run_service(f"--artifact={artifact}", DPQ_WORKERS="none")
    assert done.returncode == 2
    assert "Error parsing --workers" in done.stderr
    assert "set in the environment: DPQ_WORKERS" in done.stderr


def test_server_exits_2_when_replies_could_not_be_sent(artifact):
    done = run_service(f"--artifact={artifact}", "--max-ids=100000000")
    assert done.returncode == 2
    assert "service: max_ids: got 100000000, want at most" in done.stderr


# The rest of the promise


def test_server_takes_settings_from_the_environment(start_server):
    environment = {"DPQ_API_KEY": "secret", "DPQ_MAX_IDS": "2", "DPQ_WORKERS": "1", "DPQ_HOST": "localhost"}
    server = start_server(environment=environment).wait_until_ready()
    assert server.web.get("/v1/tables").status_code == 401
    key = {"Authorization": "Bearer secret"}
    answer = server.web.post("/v1/tables/user_id/lookup", json={"ids": [1, 2, 3]}, headers=key)
    assert answer.status_code == 413
    assert len(server.worker_pids()) == 1
    exit_code, logged = server.end()
    assert (exit_code, "secret" in logged) == (0, False)


def test_server_reports_a_damaged_row_as_an_error_of_its_own(start_server, artifact, tmp_path, references):
    """Codes are not checked at start; a wrong one is neither served nor fatal."""
    folder = tmp_path / "artifact"
    shutil.copytree(artifact, folder)
    file = folder / "tables" / "item_id.safetensors"
    damaged = bytearray(file.read_bytes())
    codes = EmbeddingStore.open(artifact).tables["item_id"].tensors["packed_codes"].tobytes()
    damaged[damaged.find(codes)] = 0xFF  # row 0: code 7 of 5
    file.write_bytes(damaged)
    server = start_server("--workers=1", artifact=folder).wait_until_ready()
    ids = references["item_id"].ids.tolist()
    answer = server.web.post("/v1/tables/item_id/lookup", json={"ids": ids[:1]})
    assert (answer.status_code, answer.json()["error_type"]) == (500, "internal")
    with grpc.insecure_channel(server.grpc) as channel, pytest.raises(grpc.RpcError) as error:
        pb_grpc.EmbeddingServiceStub(channel).Lookup(pb.LookupRequest(table="item_id", ids=ids[:1]))
    assert error.value.code() == grpc.StatusCode.INTERNAL
    assert server.web.post("/v1/tables/item_id/lookup", json={"ids": ids[1:]}).status_code == 200
    assert "row 0 holds a code of 5 or more" in server.end()[1]


def test_server_serves_both_apis_where_torch_cannot_be_imported(server):
    """The fixture's server finds, before the real ones, a torch and a torchrec that raise."""
    poisoned = subprocess.run([sys.executable, "-c", "import torch"], env=server.environment, capture_output=True)
    assert b"torch was imported" in poisoned.stderr
    assert server.web.post("/v1/tables/item_id/lookup", json={"ids": [1]}).status_code == 200
    with grpc.insecure_channel(server.grpc) as channel:
        assert pb_grpc.EmbeddingServiceStub(channel).Lookup(pb.LookupRequest(table="item_id", ids=[1])).dim == 24


def test_modules_of_the_service_import_no_torch_and_the_parents_no_grpc():
    code = (
        "import sys, service.__main__, service.settings, service.supervisor, service.worker\n"
        "assert not {'grpc', 'torch', 'torchrec'} & set(sys.modules)\n"
        "import service.grpc_api\n"
        "assert 'grpc' in sys.modules and not {'torch', 'torchrec'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)
