"""Metrics for Prometheus. In: events of one worker. Out: the text of /metrics, for all workers together.

The workers count in memory that they share: whichever worker answers adds up, and the counts of a worker that was
killed stay. No file is involved, so that neither a full disk nor a kill can disturb serving or leave anything behind.

    counts = [WorkerCounts(), WorkerCounts()] # before the fork
    Metrics(version, counts, worker=1)        # in the second worker, and in the one that replaces it
"""

from __future__ import annotations

import bisect
import collections
import ctypes
import itertools
import json
import mmap
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_BOUNDS = [*map(str, _SECONDS), "+Inf"]
_SUM = len(_BOUNDS)  # a series has a count for each bucket, then the sum of seconds
_KEY_BYTES = 512
_REQUESTS, _IDS = "requests", "ids"
_NUM_KINDS = 2  # each has a series "other" for what finds no room
_STATUS = Path("/proc/self/status")

Key = tuple[str, ...]  # _REQUESTS, API, method, code; or _IDS, table
Numbers = ctypes.Array[ctypes.c_double]


class _Series(ctypes.Structure):
    """The numbers of one combination of labels. Of ids, the first two are used: looked up, and missing."""

    key: bytes
    numbers: Numbers
    _fields_ = (("key", ctypes.c_char * _KEY_BYTES), ("numbers", ctypes.c_double * (_SUM + 1)))


class _Gauges(ctypes.Structure):
    """What is true of a worker now; pid is 0 where there is none. And how many series it has counted."""

    num_series: Any
    _fields_ = tuple(
        (name, ctypes.c_int64)
        for name in ("pid", "num_ready", "num_in_flight", "anonymous_bytes", "file_bytes", "num_series")
    )


class WorkerCounts:
    """One worker's counts, in memory that all workers share: make one for each before they are forked.

    Memory is taken only for those combinations of labels, of at most max_series, that occur.
    """

    def __init__(self, max_series: int = 1024) -> None:
        memory = mmap.mmap(-1, ctypes.sizeof(_Gauges) + max_series * ctypes.sizeof(_Series))
        self.gauges: Any = _Gauges.from_buffer(memory)
        self._series = (_Series * max_series).from_buffer(memory, ctypes.sizeof(_Gauges))
        self._known: dict[Key, Numbers] = {}

    def series(self) -> Iterator[tuple[Key, Numbers]]:
        """What this worker, and those that it replaced, have counted."""
        for series in self._series[: self.gauges.num_series]:
            yield tuple(json.loads(series.key)), series.numbers

    def numbers_of(self, key: Key) -> Numbers:
        """The numbers of these labels, to be counted up; where no room is left, those of "other"."""
        if not self._known:
            self._known.update(self.series())  # a worker before this one may have counted: it goes on
        return self._known.get(key) or self._add(key)

    def _add(self, key: Key) -> Numbers:
        at, other = self.gauges.num_series, (key[0], *["other"] * (len(key) - 1))
        text = json.dumps(key).encode()
        if key != other and (at >= len(self._series) - _NUM_KINDS or len(text) > _KEY_BYTES):
            return self.numbers_of(other)
        series = self._series[at]
        series.key = text
        self.gauges.num_series = at + 1  # last: from here on other workers read it
        return self._known.setdefault(key, series.numbers)

    def forget_gauges(self) -> None:
        """A dead worker holds no requests and no memory; its counts stay."""
        ctypes.memset(ctypes.byref(self.gauges), 0, _Gauges.num_series.offset)  # the last field: others may read it now


class Metrics:
    """The counters of one worker, and the text about all. What is counted here is written when the call returns.

    Args:
        version: the artifact's version.
        counts: of all workers; of this one alone if not given.
        worker: which of them is this one's.

    Attributes:
        gauges: what is true of this worker now, to be set: `num_ready` (0 or 1), and `num_in_flight`, of requests.
    """

    def __init__(self, version: str, counts: Sequence[WorkerCounts] | None = None, worker: int = 0) -> None:
        self._version, self._all = version, counts or [WorkerCounts()]
        self._own = self._all[worker]
        self.gauges = self._own.gauges
        self.gauges.pid = os.getpid()
        self._lock = threading.Lock()

    def answered(self, api: str, method: str, code: str, seconds: float) -> None:
        """Count a request of an API, "http" or "grpc": the route's template or the procedure, its status, its time."""
        with self._lock:
            numbers = self._own.numbers_of((_REQUESTS, api, method, code))
            numbers[bisect.bisect_left(_SECONDS, seconds)] += 1.0
            numbers[_SUM] += seconds

    def looked_up(self, table: str, num_ids: int, num_missing: int) -> None:
        """Count the ids of a lookup; any thread may."""
        with self._lock:
            numbers = self._own.numbers_of((_IDS, table))
            numbers[0] += num_ids
            numbers[1] += num_missing

    def measure_memory(self) -> None:
        """Note the resident memory; the page cache of the mapped artifact stands apart (Linux only)."""
        if _STATUS.exists():
            status = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
            for name, field in (("RssAnon", "anonymous_bytes"), ("RssFile", "file_bytes")):
                setattr(self.gauges, field, 1024 * int(status.get(name, "0 kB").split()[0]))

    def render(self) -> bytes:
        """The text of /metrics, in the text format 0.0.4 of Prometheus."""
        return generate_latest(self)

    def collect(self) -> Iterator[Metric]:
        """All workers' counts, added up; prometheus_client calls it."""
        yield from _counters(self._all)
        alive = [each.gauges for each in self._all if each.gauges.pid]
        num_in_flight, num_ready = sum(each.num_in_flight for each in alive), sum(each.num_ready for each in alive)
        yield GaugeMetricFamily("dpq_in_flight_requests", "Requests being received or answered.", value=num_in_flight)
        yield GaugeMetricFamily("dpq_ready_workers", "Workers that are ready.", value=num_ready)
        memory = GaugeMetricFamily(
            "dpq_worker_memory_bytes",
            "Resident memory of a worker: anonymous is its own, file is mapped and shared between the workers.",
            labels=["kind", "pid"],
        )
        for gauges in alive:
            memory.add_metric(["anonymous", str(gauges.pid)], gauges.anonymous_bytes)
            memory.add_metric(["file", str(gauges.pid)], gauges.file_bytes)
        yield memory
        artifact = GaugeMetricFamily("dpq_artifact_info", "The version served.", labels=["version"])
        artifact.add_metric([self._version], 1)
        yield artifact


def _counters(counts: Sequence[WorkerCounts]) -> Iterator[Metric]:
    totals: dict[Key, NDArray[np.float64]] = collections.defaultdict(lambda: np.zeros(_SUM + 1))
    by_method = totals.copy()
    for key, numbers in itertools.chain.from_iterable(each.series() for each in counts):
        totals[key] += np.asarray(numbers)
    requests = CounterMetricFamily(
        "dpq_requests", "Requests answered, by status code.", labels=["api", "method", "code"]
    )
    ids = CounterMetricFamily("dpq_ids", "Ids looked up.", labels=["table"])
    missing_ids = CounterMetricFamily("dpq_missing_ids", "Ids that no vocabulary holds.", labels=["table"])
    for (kind, *labels), total in sorted(totals.items()):
        if kind == _IDS:
            ids.add_metric(labels, total[0])
            missing_ids.add_metric(labels, total[1])
        else:
            requests.add_metric(labels, total[:_SUM].sum())
            by_method[tuple(labels[:2])] += total
    seconds = HistogramMetricFamily("dpq_request_seconds", "Time to answer.", labels=["api", "method"])
    for method_labels, total in by_method.items():
        buckets = zip(_BOUNDS, total[:_SUM].cumsum(), strict=True)
        seconds.add_metric(method_labels, list(buckets), total[_SUM])
    yield from (requests, seconds, ids, missing_ids)
