"""What happens to a server in production: disks that fill, files that change, workers that hang, signals."""

import asyncio
import contextlib
import inspect
import os
import resource
import shutil
import signal
import socket

import grpc
import httpx
import numpy as np
import pytest
import uvicorn
from grpc_health.v1 import health_pb2, health_pb2_grpc

from service import supervisor, worker
from service.grpc_api import GrpcServer
from service.metrics import WorkerCounts
from service.proto.dpq.v1 import embedding_pb2 as pb
from service.proto.dpq.v1 import embedding_pb2_grpc as pb_grpc
from service.served_files import ServedFiles
from service.settings import Settings
from tests.service.test_server import is_alive, metric, until


def lookup(server, table, **arguments):
    return server.web.post(f"/v1/tables/{table}/lookup", **arguments or {"json": {"ids": [1]}})


def check_files(server):
    for pid in server.worker_pids():
        os.kill(pid, worker.CHECK_FILES)


# Disks


def test_a_server_counts_without_a_temporary_folder(start_server, tmp_path):
    server = start_server(environment={"TMPDIR": str(tmp_path / "none")}).wait_until_ready()
    for _ in range(5):
        assert lookup(server, "user_id").status_code == 200
    assert metric(server, "dpq_ids_total") == {'table="user_id"': 5.0}
    assert server.end()[0] == 0
    assert list(tmp_path.iterdir()) == []


# Files that change


@pytest.fixture
def served(start_server, artifact, tmp_path):
    """A server of an artifact of its own, and the file of its table item_id."""
    folder = shutil.copytree(artifact, tmp_path / "artifact")
    server = start_server("--workers=2", artifact=folder).wait_until_ready()
    return server, folder / "tables" / "item_id.safetensors"


def assert_item_id_alone_is_refused(server, why):
    binary = {"Content-Type": "application/octet-stream", "Accept": "application/octet-stream"}
    for arguments in ({"json": {"ids": [1]}}, {"content": np.array([1], "<i8").tobytes(), "headers": binary}):
        reply = lookup(server, "item_id", **arguments)
        assert (reply.status_code, reply.json()["error_type"]) == (503, "not_ready")
        assert why in reply.json()["error"]
    for path in ("/v1/tables/item_id/search", "/v1/lookup"):
        request = {"ids": [1]} if "search" in path else {"tables": {"user_id": {"ids": [1]}, "item_id": {"ids": [1]}}}
        assert server.web.post(path, json=request).status_code == 503
    ready = server.web.get("/readyz")
    assert ready.status_code == 503
    assert why in ready.json()["error"]
    with grpc.insecure_channel(server.grpc) as channel:
        stub, health = pb_grpc.EmbeddingServiceStub(channel), health_pb2_grpc.HealthStub(channel)
        assert health.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert stub.Lookup(pb.LookupRequest(table="user_id", ids=[1])).dim == 1
        with pytest.raises(grpc.RpcError) as error:
            stub.Lookup(pb.LookupRequest(table="item_id", ids=[1]))
        assert error.value.code() == grpc.StatusCode.UNAVAILABLE
    assert server.web.get("/livez").status_code == 200
    assert [lookup(server, "user_id").status_code for _ in range(10)] == [200] * 10


def test_a_truncated_file_takes_a_worker_once_and_its_table_but_no_other(served):
    server, file = served
    before = server.worker_pids()
    os.truncate(file, 0)
    with contextlib.suppress(httpx.TransportError):  # the connection of the worker that dies of it
        lookup(server, "item_id")
    until(lambda: not set(before) <= set(server.worker_pids()))
    until(lambda: metric(server, "dpq_ready_workers") == {None: 2.0})
    check_files(server)
    for _ in range(10):
        until(lambda: lookup(server, "item_id").status_code == 503)
    assert_item_id_alone_is_refused(server, "item_id.safetensors was truncated")
    assert len(set(before) & set(server.worker_pids())) == 1, "more than one worker died"
    exit_code, logged = server.end()
    assert exit_code == 0
    assert "died with -7 (SIGBUS)" in logged
    assert "Fatal Python error: Bus error" in logged
    assert "was truncated from" in logged
    assert "never write to one that is served" in logged


def test_a_file_overwritten_in_place_is_refused_once_it_is_seen(served):
    server, file = served
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    with file.open("r+b") as opened:
        opened.write(content)
    os.utime(file, ns=(0, 10**18))
    check_files(server)
    for _ in range(10):
        until(lambda: lookup(server, "item_id").status_code == 503)
    assert_item_id_alone_is_refused(server, "item_id.safetensors was overwritten in place")
    assert "was overwritten in place" in server.end()[1]


@pytest.mark.timeout(60)
def test_used_up_descriptors_are_logged_and_serving_goes_on_when_there_are_some_again(start_server):
    server = start_server("--workers=1").wait_until_ready()
    (pid,) = server.worker_pids()
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, before[1]))
    check_files(server)
    line = next(line for line in server.process.stderr if "Too many open files" in line)
    assert "raise `ulimit -n`" in line
    resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
    until(lambda: lookup(server, "user_id").status_code == 200)


# Workers


def test_a_worker_that_hangs_is_replaced(start_server):
    server = start_server("--workers=2", "--hang-seconds=3").wait_until_ready()
    victim, _ = server.worker_pids()
    os.kill(victim, signal.SIGSTOP)
    until(lambda: not is_alive(victim))
    until(lambda: metric(server, "dpq_ready_workers") == {None: 2.0})
    assert f"worker {victim} gave no sign of life for 3 s" in server.end()[1]


def test_a_worker_listens_on_http_once_all_else_serves(store, monkeypatch, tmp_path):
    """Else callers of the other workers would be refused by one that is still starting: they share a socket."""
    refused, start = [], GrpcServer.start

    async def start_later(self, address):
        with socket.socket() as caller:
            refused.append(caller.connect_ex(sock.getsockname()) != 0)
        return await start(self, address)

    monkeypatch.setattr(GrpcServer, "start", start_later)
    sock = supervisor.bind("127.0.0.1", 0, shared=False)
    grpc_address = supervisor.address_of(supervisor.bind("127.0.0.1", 0, shared=True))
    ready_read, ready_write = os.pipe()
    parent_read, parent_write = os.pipe()
    wiring = worker.Wiring(sock, grpc_address, ServedFiles(store), [WorkerCounts()], 0, ready_write, parent_read)
    settings = Settings(artifact=tmp_path, drain_seconds=0, stop_seconds=0)

    async def scenario():
        serving = asyncio.create_task(worker.serve(store, settings, wiring))
        assert await asyncio.to_thread(os.read, ready_read, 1) == worker.READY
        async with httpx.AsyncClient(base_url=f"http://{supervisor.address_of(sock)}") as client:
            assert (await client.get("/readyz")).status_code == 200
        os.close(parent_write)
        return await serving

    assert asyncio.run(scenario()) == 0
    assert refused == [True]


# Signals and settings


def started_with(sighup, start_server):
    """A server that inherits what is done on SIGHUP, which the tests themselves may have been told to ignore."""
    previous = signal.signal(signal.SIGHUP, sighup)
    try:
        return start_server().wait_until_ready()
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_sighup_stops_the_server_in_order_and_with_a_line(start_server):
    server = started_with(signal.SIG_DFL, start_server)
    exit_code, logged = server.end(signal.SIGHUP)
    assert exit_code == 0
    assert "SIGHUP: stopping" in logged


def test_sighup_that_nohup_ignores_stops_nothing(start_server):
    server = started_with(signal.SIG_IGN, start_server)
    for pid in (server.process.pid, *server.worker_pids()):
        os.kill(pid, signal.SIGHUP)
    assert lookup(server, "user_id").status_code == 200
    exit_code, logged = server.end()
    assert (exit_code, "SIGHUP" in logged) == (0, False)


# Libraries


def test_uvicorn_has_the_undocumented_parts_that_a_worker_rests_on(make_engine):
    """Where this fails, a newer uvicorn has moved them: adapt `worker.HttpServer`, then the limit in pyproject."""

    async def scenario():
        config, sock = worker.http_config(make_engine()), supervisor.bind("127.0.0.1", 0, shared=False)
        server = uvicorn.Server(config)
        with server.capture_signals():
            pass
        serving = asyncio.create_task(uvicorn.Server.serve(server, sockets=[sock.dup()]))
        while not server.started:
            await asyncio.sleep(0.01)
        async with httpx.AsyncClient(base_url=f"http://{supervisor.address_of(sock)}") as client:
            assert (await client.get("/livez")).status_code == 200
            (connection,) = server.server_state.connections
            connection.check(0.0)  # by this project's own protocol
        (listening,) = server.servers
        assert listening.is_serving()
        config.http_protocol_class(config=config, server_state=server.server_state, app_state={})
        server.should_exit = True
        await serving
        assert list(inspect.signature(server.shutdown).parameters) == ["sockets"]

    asyncio.run(scenario())
