"""What /metrics says. In: events of one worker. Out: the text that Prometheus reads, for all workers together.

The workers count into files of one folder, which whichever worker is asked adds up: a registry of its own would make
it answer for itself alone. prometheus_client settles that at its import, by an environment variable, so this module is
imported only after the fork, by the workers.
"""

from __future__ import annotations

import asyncio
import bisect
import collections
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_STATUS = Path("/proc/self/status")


T = TypeVar("T")


class Metrics:
    """The counters of one worker.

    Args:
        version: the artifact's version.
        folder: where the workers count: PROMETHEUS_MULTIPROC_DIR, set before the import. None counts for this process
            alone.
    """

    def __init__(self, version: str, folder: Path | None = None) -> None:
        self._folder = folder
        self._registry = own = CollectorRegistry()
        self._requests = Counter(
            "dpq_requests", "Requests answered, by status code.", ["api", "method", "code"], registry=own
        )
        self._seconds = Histogram(
            "dpq_request_seconds", "Time to answer.", ["api", "method"], buckets=_SECONDS, registry=own
        )
        self._ids = Counter("dpq_ids", "Ids looked up.", ["table"], registry=own)
        self._missing_ids = Counter("dpq_missing_ids", "Ids that no vocabulary holds.", ["table"], registry=own)
        self.in_flight = Gauge(
            "dpq_in_flight_requests", "Requests being answered.", multiprocess_mode="livesum", registry=own
        )
        self._ready = Gauge("dpq_ready_workers", "Workers that are ready.", multiprocess_mode="livesum", registry=own)
        self._memory = Gauge(
            "dpq_worker_memory_bytes",
            "Resident memory of a worker: anonymous is its own, file is mapped and shared between the workers.",
            ["kind"],
            multiprocess_mode="liveall",
            registry=own,
        )
        artifact = Gauge(
            "dpq_artifact_info", "The version served.", ["version"], multiprocess_mode="livemax", registry=own
        )
        artifact.labels(version).set(1)
        self._answered: collections.deque[tuple[tuple[str, str, str], float]] = collections.deque()
        self._looked_up: collections.deque[tuple[str, int, int]] = collections.deque()
        self._is_planned = False
        # `labels` takes longer than counting; there are only so many routes, statuses and tables.
        self._requests_of, self._seconds_of = (
            functools.cache(self._requests.labels),
            functools.cache(self._seconds.labels),
        )
        self._ids_of, self._missing_ids_of = (
            functools.cache(self._ids.labels),
            functools.cache(self._missing_ids.labels),
        )

    def answered(self, api: str, method: str, code: str, seconds: float) -> None:
        """Count a request.

        Args:
            api: "http" or "grpc".
            method: the route's template or the procedure's name.
            code: the status.
            seconds: from its start to its reply.
        """
        self._answered.append(((api, method, code), seconds))
        self.write()

    def answered_soon(self, api: str, method: str, code: str, seconds: float) -> None:
        """Count a request as `answered` does, but together with all others of this turn of the event loop."""
        self._answered.append(((api, method, code), seconds))
        if not self._is_planned:
            self._is_planned = True
            asyncio.get_running_loop().call_soon(self.write)

    def looked_up(self, table: str, num_ids: int, num_missing: int) -> None:
        """Count the ids of a lookup; they are written with the request that they belong to."""
        self._looked_up.append((table, num_ids, num_missing))

    def write(self) -> None:
        """Write what has been counted. Threads may count meanwhile, and write too: each entry is taken once."""
        self._is_planned = False
        requests: dict[tuple[str, str, str], list[float]] = {}
        for labels, seconds in _taken(self._answered):
            requests.setdefault(labels, []).append(seconds)
        for labels, all_seconds in requests.items():
            self._requests_of(*labels).inc(len(all_seconds))
            _observe(self._seconds_of(*labels[:2]), all_seconds)
        ids: dict[str, tuple[int, int]] = {}
        for table, num_ids, num_missing in _taken(self._looked_up):
            before = ids.get(table, (0, 0))
            ids[table] = before[0] + num_ids, before[1] + num_missing
        for table, (num_ids, num_missing) in ids.items():
            self._ids_of(table).inc(num_ids)
            self._missing_ids_of(table).inc(num_missing)

    def set_ready(self, *, ready: bool) -> None:
        """Say whether this worker is ready."""
        self._ready.set(1 if ready else 0)

    def measure_memory(self) -> None:
        """Note the resident memory; the page cache of the mapped artifact stands apart (Linux only)."""
        if not _STATUS.exists():
            return
        kinds = {"RssAnon": "anonymous", "RssFile": "file"}
        for line in _STATUS.read_text().splitlines():
            name, _, rest = line.partition(":")
            if name in kinds:
                self._memory.labels(kinds[name]).set(1024 * int(rest.split()[0]))

    def render(self) -> bytes:
        """The text of /metrics, in the text format 0.0.4 of Prometheus."""
        self.write()
        if self._folder is None:
            return generate_latest(self._registry)
        everyone = CollectorRegistry()
        MultiProcessCollector(everyone, path=str(self._folder))  # type: ignore[no-untyped-call]
        return generate_latest(everyone)


def _observe(histogram: Histogram, all_seconds: list[float]) -> None:
    """`histogram.observe` of each, which would write as often: prometheus_client offers nothing for many."""
    histogram._sum.inc(sum(all_seconds))
    for bucket, num_requests in collections.Counter(map(_bucket_of, all_seconds)).items():
        histogram._buckets[bucket].inc(num_requests)


def _bucket_of(seconds: float) -> int:
    return bisect.bisect_left(_SECONDS, seconds)


def _taken(counted: collections.deque[T]) -> Iterator[T]:
    """The entries, which are then no longer there."""
    while counted:
        try:
            yield counted.popleft()
        except IndexError:  # another thread took the last
            return
