"""One serving process. In: an opened artifact, a bound HTTP socket, a gRPC address. Out: an exit code.

HTTP and gRPC share one event loop and one engine. On SIGTERM readiness fails first, then, after `drain_seconds` in
which the callers learn of it, connections are refused and the requests in flight finish.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import uvicorn
import uvloop

from dpq_rec import EmbeddingStore
from service.engine import Engine
from service.http_app import create_app
from service.http_protocol import LAST_SECONDS, HttpProtocol, http_protocol
from service.metrics import Metrics, WorkerCounts
from service.served_files import ServedFiles, watch_descriptors
from service.settings import Settings

if TYPE_CHECKING:  # imported in `serve` only: see there
    from service.grpc_api import GrpcServer

logger = logging.getLogger("service.worker")
READY, ALIVE = b"r", b"."
BEAT_SECONDS = 1.0
CHECK_FILES = signal.SIGUSR1  # the parent asks a worker to look at the files at once
_WATCH_SECONDS = 5.0
_POLL_SECONDS = 0.01
_CHECK_SECONDS = 0.5
_LAST_SECONDS = LAST_SECONDS + 0.2  # that uvicorn takes, at most, to refuse connections and close the idle ones
_KEEP_ALIVE_SECONDS = 75  # longer than load balancers keep a connection: they should be the ones who close it


class Wiring(NamedTuple):
    """What a worker gets from its parent."""

    http_socket: socket.socket  # bound; the workers accept from it in turn
    grpc_address: str  # HOST:PORT, which each worker listens on beside the others
    files: ServedFiles  # of the artifact, as they were opened
    counts: list[WorkerCounts]
    worker: int  # which of `counts` is this worker's
    ready_fd: int  # a pipe that READY is written to, once, when the worker serves, and then ALIVE, every BEAT_SECONDS
    parent_fd: int  # a pipe that closes when the parent is gone; the worker then stops too


def run(store: EmbeddingStore, settings: Settings, wiring: Wiring) -> int:
    """Serve until a signal; 0 after an orderly end."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(serve(store, settings, wiring))


async def serve(store: EmbeddingStore, settings: Settings, wiring: Wiring) -> int:
    """See `run`."""
    # Not before the fork: gRPC's threads belong to one process.
    from service.grpc_api import GrpcServer

    stops = _listen_for_stop(wiring.parent_fd)
    engine = Engine(store, settings, Metrics(store.version, wiring.counts, wiring.worker))
    grpc_server, http_server = GrpcServer(engine), HttpServer(http_config(engine))
    await _note_damage(engine, grpc_server, wiring.files)
    await grpc_server.start(wiring.grpc_address)
    engine.start()
    if not engine.damage:
        await grpc_server.serve()
    watch = asyncio.create_task(_watch(engine, grpc_server, wiring.files))
    # Last: the socket is every worker's, and the first connection that this one accepts is to be answered.
    http = asyncio.create_task(http_server.serve(sockets=[wiring.http_socket]))
    check = asyncio.create_task(http_server.check())
    while not http_server.started:
        await asyncio.wait([http], timeout=_POLL_SECONDS)
        if http.done():
            raise http.exception() or RuntimeError("the HTTP server ended before it started")
    beat = asyncio.create_task(_beat(wiring.ready_fd))
    stop = asyncio.create_task(stops.get())
    await asyncio.wait([stop, http, watch, check, beat], return_when=asyncio.FIRST_COMPLETED)
    failed = not stop.done()
    logger.info("draining for %s s", settings.drain_seconds)
    engine.drain()  # readiness fails, and requests are answered until the callers know
    await grpc_server.drain()
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(stops.get(), settings.drain_seconds)  # a second signal ends the wait
    http_server.should_exit = True
    await asyncio.wait([http], timeout=_LAST_SECONDS)
    engine.stop()
    await asyncio.gather(http, grpc_server.stop(settings.stop_seconds))
    for task in (watch, check, beat):
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task  # what it failed of, if it did
    return 1 if failed else 0


def _listen_for_stop(parent_fd: int) -> asyncio.Queue[None]:
    """A queue that gets an entry for each SIGTERM or SIGINT, and one when the parent is gone."""
    loop = asyncio.get_running_loop()
    stops: asyncio.Queue[None] = asyncio.Queue()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stops.put_nowait, None)

    def parent_is_gone() -> None:
        loop.remove_reader(parent_fd)
        stops.put_nowait(None)

    loop.add_reader(parent_fd, parent_is_gone)
    return stops


async def _beat(ready_fd: int) -> None:
    """Tell the parent that this worker serves, and again and again that its event loop turns."""
    os.set_blocking(ready_fd, False)
    os.write(ready_fd, READY)
    while True:
        await asyncio.sleep(BEAT_SECONDS)
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            os.write(ready_fd, ALIVE)


async def _watch(engine: Engine, grpc_server: GrpcServer, files: ServedFiles) -> None:
    """Measure memory, and refuse tables whose files were damaged: now and then, and when the parent asks."""
    check_now, used_up = asyncio.Event(), False
    asyncio.get_running_loop().add_signal_handler(CHECK_FILES, check_now.set)
    while True:
        used_up = watch_descriptors(used_up)
        if not used_up:  # else there is none to read it by
            engine.metrics.measure_memory()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(check_now.wait(), _WATCH_SECONDS)
        check_now.clear()
        await _note_damage(engine, grpc_server, files)


async def _note_damage(engine: Engine, grpc_server: GrpcServer, files: ServedFiles) -> None:
    """Refuse the tables whose files were damaged; readiness fails, and the other tables are served as before."""
    damage = await asyncio.to_thread(files.damage)
    for name in damage.keys() - engine.damage.keys():
        logger.error("%s", damage[name])
    if damage and not engine.damage:
        await grpc_server.drain()
    engine.damage |= damage


def http_config(engine: Engine) -> uvicorn.Config:
    """How uvicorn serves an engine."""
    return uvicorn.Config(
        create_app(engine),
        interface="asgi3",
        http=http_protocol(engine),  # type: ignore[arg-type] # called as a class is
        proxy_headers=False,  # nothing asks who calls or by which scheme
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=max(1, round(engine.settings.stop_seconds)),
    )


class HttpServer(uvicorn.Server):
    """uvicorn, without hands on the signals: it would refuse connections before readiness has failed."""

    async def check(self) -> None:
        """End what takes too long on any connection."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(_CHECK_SECONDS)
            for connection in [*self.server_state.connections]:
                cast(HttpProtocol, connection).check(loop.time())

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn does, but answer who has connected already: whoever closes the socket last would reset them."""
        own, waiting = [listening.dup() for listening in sockets or []], []
        for server in self.servers:
            server.close()
        await asyncio.sleep(_POLL_SECONDS)  # until the loop has closed its own
        for listening in own:
            listening.setblocking(False)
            with listening, contextlib.suppress(BlockingIOError):  # closed once none waits, before another may come
                while True:
                    waiting.append(listening.accept()[0])
        make: Any = self.config.http_protocol_class
        of_server = {"config": self.config, "server_state": self.server_state, "app_state": {}}
        for connection in waiting:
            connection.setblocking(False)
            await asyncio.get_running_loop().connect_accepted_socket(lambda: make(**of_server), connection)
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals to the worker."""
        yield
