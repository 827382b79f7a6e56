"""The parent of the workers. In: Settings and an opened artifact. Out: the ready line, and an exit code.

It binds the ports, forks the workers, starts anew one that dies or hangs, and stops them on SIGTERM, SIGINT and SIGHUP.
It imports no grpc, whose threads would not survive the forks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import logging
import math
import os
import resource
import selectors
import signal
import socket
import sys
import time
from collections.abc import Iterator

from dpq_rec import EmbeddingStore
from service import worker
from service.engine import largest_reply_bytes
from service.metrics import WorkerCounts
from service.served_files import ServedFiles
from service.settings import Settings

logger = logging.getLogger("service.supervisor")

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_MAX_FAILED_STARTS = 3  # in a row; then there is no point in another
_NUM_SERIES = 1024  # combinations of routes and statuses to count, far more than there are
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.1, 5.0
_STEADY_SECONDS = 10.0  # a worker that served so long did not die of how it started
_KILL_SECONDS = 5.0  # on top of what a worker may take to stop
_START_SECONDS = 120.0  # most from a worker's fork until it serves: a cold disk takes its time
_NUM_ABORT_TICKS = 3  # from the signal that makes a worker that hangs print its stack to the one that ends it


def run(store: EmbeddingStore, settings: Settings) -> int:
    """Serve until a signal.

    Returns:
        0 after an orderly end; 1 when workers do not start, or did not stop in time.

    Raises:
        ConfigError: settings that do not fit the artifact.
        OSError: a port cannot be listened on.
    """
    largest_reply_bytes(store, settings.max_ids)
    # A connection takes a descriptor, and the usual limit is 1,024: take as many as the system gives.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # where "unlimited" is more than the kernel gives
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with (
        bind(settings.host, settings.http_port, shared=False) as http_socket,
        bind(settings.host, settings.grpc_port, shared=True) as grpc_socket,
        hold_ipv6(grpc_socket),
    ):
        return Supervisor(store, settings, http_socket, grpc_socket).run()


def bind(host: str, port: int, *, shared: bool) -> socket.socket:
    """A bound socket that does not listen; port 0 takes any free one; other sockets may listen on a shared one.

    Raises:
        OSError: the port is taken, or the host has no such address.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:  # the latter of a name too long for the name service
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"host: got {host!r}, want a name or an address of this machine: {reason}") from error
    if shared and port:
        # A shared port can be bound beside another server's, which would then get half of the calls.
        bind(host, port, shared=False).close()
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, shared)
        if family == socket.AF_INET6:  # :: is every interface, of IPv4 too, as for gRPC, whatever the system's default
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise OSError(error.errno, f"cannot listen on {address}: {error.strerror}") from error
    return sock


@contextlib.contextmanager
def hold_ipv6(sock: socket.socket) -> Iterator[None]:
    """Keep gRPC, which takes 0.0.0.0 for every interface, from listening on those of IPv6 too.

    Its port is bound there, and not listened on: gRPC then has IPv4 alone, and callers by IPv6 are refused.
    """
    host, port = sock.getsockname()[:2]
    with contextlib.ExitStack() as held:
        if host in ("0.0.0.0", "::ffff:0.0.0.0"):
            with contextlib.suppress(OSError):  # a machine without IPv6, or with another server there: nor can gRPC
                ipv6 = held.enter_context(socket.socket(socket.AF_INET6, socket.SOCK_STREAM))
                ipv6.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                ipv6.bind(("::", port))
        yield


def address_of(sock: socket.socket) -> str:
    """HOST:PORT; an IPv6 host in brackets, with the interface of an address that needs one."""
    host, port = socket.getnameinfo(sock.getsockname(), socket.NI_NUMERICHOST | socket.NI_NUMERICSERV)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@dataclasses.dataclass(kw_only=True)
class Child:
    """A running worker."""

    pid: int
    worker: int
    ready_fd: int
    started_at: float
    is_ready: bool = False
    num_silent_ticks: int = 0


class Supervisor:
    """The workers and their fate. They inherit the store, mapped, and sockets that are bound.

    They listen on http_socket; grpc_socket keeps its port while they come and go, and never listens itself.
    """

    def __init__(
        self, store: EmbeddingStore, settings: Settings, http_socket: socket.socket, grpc_socket: socket.socket
    ) -> None:
        self._store, self._settings = store, settings
        self._http_socket = http_socket
        self._http_address, self._grpc_address = address_of(http_socket), address_of(grpc_socket)
        # SIGHUP stops nothing where `nohup` had it ignored.
        is_ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        self._signals = [each for each in _SIGNALS if each != signal.SIGHUP or not is_ignored]
        self._files = ServedFiles(store)
        self._counts = [WorkerCounts(_NUM_SERIES + len(store.tables)) for _ in range(settings.workers)]
        self._selector = selectors.DefaultSelector()
        self._children: dict[int, Child] = {}  # by ready_fd
        self._starts_at: list[float] = [0.0] * settings.workers  # of workers that are to be started
        self._num_early_deaths = 0  # in a row, of workers that did not serve for long
        self._num_failed_starts = 0  # in a row, of workers that never served
        self._is_announced = False
        self._next_tick_at = 0.0
        self._kill_at: float | None = None  # once the server is to stop
        self._exit_code = 0
        self._alive_read, self._alive_write = os.pipe()

    def run(self) -> int:
        """Keep the workers running until a signal; the exit code."""
        wake_fd, wake_write = os.pipe()  # gets a byte, its number, for each signal
        os.set_blocking(wake_write, False)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        for number in self._signals:
            signal.signal(number, lambda *_: None)
        self._selector.register(wake_fd, selectors.EVENT_READ)
        while self._children or (self._starts_at and self._kill_at is None):
            self._start_due()
            self._tick()
            for key, _ in self._selector.select(self._pause_seconds()):
                if key.fd != wake_fd:
                    self._hear(self._children[key.fd])
                    continue
                for heard in os.read(wake_fd, 64):
                    if heard in _SIGNALS:
                        logger.info("%s: stopping", signal.Signals(heard).name)
                        self._stop()
            self._kill_late()
        return self._exit_code

    def _pause_seconds(self) -> float:
        """How long nothing but signals and workers can happen."""
        times = [*self._starts_at, self._next_tick_at] if self._kill_at is None else [self._kill_at]
        return max(0.0, min(times) - time.monotonic())

    # Starting

    def _start_due(self) -> None:
        now = time.monotonic()
        for at in [at for at in self._starts_at if at <= now and self._kill_at is None]:
            self._starts_at.remove(at)
            number = min(set(range(self._settings.workers)) - {child.worker for child in self._children.values()})
            ready_read, ready_write = os.pipe()
            # A signal between the fork and the child's own handlers would be taken for the parent's.
            signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
            pid = os.fork()
            if pid == 0:
                self._become_worker(number, ready_write)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
            os.close(ready_write)
            self._children[ready_read] = Child(pid=pid, worker=number, ready_fd=ready_read, started_at=time.monotonic())
            self._selector.register(ready_read, selectors.EVENT_READ)

    def _become_worker(self, number: int, ready_fd: int) -> None:
        """Serve in the child; never returns."""
        exit_code = 1
        try:
            faulthandler.enable()  # where it stood, should it die of a signal
            os.setpgid(0, 0)  # Ctrl-C reaches the parent alone, which passes it on once
            signal.set_wakeup_fd(-1)
            for heard in self._signals:
                signal.signal(heard, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
            os.close(self._alive_write)
            sockets = self._http_socket, self._grpc_address
            wiring = worker.Wiring(*sockets, self._files, self._counts, number, ready_fd, self._alive_read)
            exit_code = worker.run(self._store, self._settings, wiring)
        except BaseException:
            logger.exception("worker %s failed", os.getpid())
        finally:
            logging.shutdown()
            os._exit(exit_code)

    def _hear(self, child: Child) -> None:
        """Bytes from a worker's pipe say that it serves, and still does; the pipe's end, that it is gone."""
        if not os.read(child.ready_fd, 1024):
            self._bury(child)
            return
        child.num_silent_ticks = 0
        if child.is_ready:
            return
        child.is_ready = True
        self._num_failed_starts = 0
        if not self._is_announced and sum(each.is_ready for each in self._children.values()) == self._settings.workers:
            self._is_announced = True
            tables = ", ".join(sorted(self._store.tables))
            addresses = f"http://{self._http_address} grpc://{self._grpc_address}"
            sys.stdout.write(f"ready: {addresses} version {self._store.version} tables {tables}\n")
            sys.stdout.flush()

    # Ending

    def _bury(self, child: Child) -> None:
        self._selector.unregister(child.ready_fd)
        os.close(child.ready_fd)
        del self._children[child.ready_fd]
        code = os.waitstatus_to_exitcode(os.waitpid(child.pid, 0)[1])
        self._counts[child.worker].forget_gauges()
        if self._kill_at is None:
            self._plan_restart(child, code)
        elif code not in (0, -signal.SIGTERM):
            self._exit_code = 1

    def _plan_restart(self, child: Child, code: int) -> None:
        steady = child.is_ready and time.monotonic() - child.started_at > _STEADY_SECONDS
        self._num_early_deaths = 0 if steady else self._num_early_deaths + 1
        self._num_failed_starts += not child.is_ready
        is_serving = self._is_announced and any(other.is_ready for other in self._children.values())
        died = f"worker {child.pid} died with {code}" + (f" ({signal.Signals(-code).name})" if code < 0 else "")
        if self._num_failed_starts >= _MAX_FAILED_STARTS and not is_serving:
            logger.error("%s before it was ready; giving up", died)
            self._exit_code = 1
            self._stop()
            return
        pause = min(_FIRST_PAUSE_SECONDS * 2 ** min(self._num_early_deaths, 10), _LONGEST_PAUSE_SECONDS)
        logger.warning("%s; another starts in %.1f s", died, pause)
        if code == -signal.SIGBUS:
            self._explain_bus_error()
        self._starts_at.append(time.monotonic() + pause)

    def _explain_bus_error(self) -> None:
        """Reading a mapped file failed: say which, and let the other workers see it before they read there."""
        damage = self._files.damage()
        for reason in damage.values():
            logger.error("%s", reason)
        if not damage:
            logger.error("a mapped file could not be read, though none has changed: is its disk failing?")
        for child in self._children.values():
            if child.is_ready:
                os.kill(child.pid, worker.CHECK_FILES)

    def _tick(self) -> None:
        """End workers that have been silent for too long. Ticks are counted, not seconds: a machine may sleep."""
        now = time.monotonic()
        if now < self._next_tick_at or self._kill_at is not None:
            return
        self._next_tick_at = now + worker.BEAT_SECONDS
        for child in self._children.values():
            child.num_silent_ticks += 1
            seconds = self._settings.hang_seconds if child.is_ready else _START_SECONDS
            num_late_ticks = child.num_silent_ticks - math.ceil(seconds / worker.BEAT_SECONDS)
            if num_late_ticks == 1:
                logger.error("worker %s gave no sign of life for %g s; killing it", child.pid, seconds)
                os.kill(child.pid, signal.SIGABRT)
            elif num_late_ticks > _NUM_ABORT_TICKS:
                os.kill(child.pid, signal.SIGKILL)

    def _stop(self) -> None:
        if self._kill_at is None:
            wait = self._settings.drain_seconds + self._settings.stop_seconds + _KILL_SECONDS
            self._kill_at = time.monotonic() + wait
            # Else, when the workers have closed theirs, callers would wait for an answer here rather than be refused.
            self._http_socket.close()
        for child in self._children.values():
            os.kill(child.pid, signal.SIGTERM)

    def _kill_late(self) -> None:
        if self._kill_at is None or time.monotonic() < self._kill_at:
            return
        for child in self._children.values():
            logger.error("worker %s did not stop in time; killed", child.pid)
            self._exit_code = 1
            os.kill(child.pid, signal.SIGKILL)
        self._kill_at += _KILL_SECONDS
