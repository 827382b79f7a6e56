"""What /metrics says. In: events of one worker. Out: the text that Prometheus reads, for all workers together.

The workers count in memory that they share: whichever worker is asked adds up, and the counts of a worker that was
killed stay. No file is involved, so that neither a full disk nor a kill can disturb serving or leave anything behind.

    counts = SharedCounts(num_workers=2)      # before the fork
    Metrics(version, counts, worker=1)        # in the second worker, and in the one that replaces it
"""

from __future__ import annotations

import bisect
import collections
import itertools
import json
import mmap
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_STATUS = Path("/proc/self/status")
_FLOAT_BYTES, _KEY_BYTES = 8, 512
_WIDTH = len(_SECONDS) + 2  # numbers of a series: a count for each bucket and beyond the last, and the sum of seconds
_SUM = _WIDTH - 1
_PID, _READY, _IN_FLIGHT, _ANONYMOUS, _FILE, _NUM_SERIES = range(6)  # numbers at the front of a worker's block
_NUM_FRONT = 6
_REQUESTS, _IDS = "requests", "ids"
_NUM_KINDS = 2  # each has a series "other" for what finds no room

Key = tuple[str, ...]


class Block(NamedTuple):
    """One worker's part of the memory: numbers at the front, then the series; the keys of the series in order."""

    numbers: memoryview[float]
    keys: memoryview

    def series(self) -> Iterator[tuple[Key, int]]:
        """Keys, and where their numbers begin."""
        for at in range(int(self.numbers[_NUM_SERIES])):
            key = bytes(self.keys[at * _KEY_BYTES : (at + 1) * _KEY_BYTES]).rstrip(b"\0")
            yield tuple(json.loads(key)), _NUM_FRONT + at * _WIDTH


class SharedCounts:
    """Memory for the counts of several workers, to be made before they are forked.

    Args:
        num_workers: blocks, one a worker.
        max_series: most combinations of labels in a block; memory is taken only for those that occur.
    """

    def __init__(self, num_workers: int = 1, max_series: int = 1024) -> None:
        num_numbers = _NUM_FRONT + max_series * _WIDTH
        number_bytes, key_bytes = num_numbers * _FLOAT_BYTES, max_series * _KEY_BYTES
        whole = memoryview(mmap.mmap(-1, num_workers * (number_bytes + key_bytes)))
        numbers, keys = whole[: num_workers * number_bytes], whole[num_workers * number_bytes :]
        self.max_series = max_series
        self.blocks = [
            Block(
                numbers[at * number_bytes : (at + 1) * number_bytes].cast("d"),
                keys[at * key_bytes : (at + 1) * key_bytes],
            )
            for at in range(num_workers)
        ]

    def forget_worker(self, worker: int) -> None:
        """A dead worker holds no requests and no memory; its counts stay."""
        for at in (_PID, _READY, _IN_FLIGHT, _ANONYMOUS, _FILE):
            self.blocks[worker].numbers[at] = 0.0


class Metrics(Collector):
    """The counters of one worker, and the text about all. What is counted here is written when the call returns.

    Args:
        version: the artifact's version.
        counts: shared by the workers; memory of its own if not given.
        worker: which of its blocks is this worker's.
    """

    def __init__(self, version: str, counts: SharedCounts | None = None, worker: int = 0) -> None:
        self._version = version
        self._counts = counts or SharedCounts()
        self._block = self._counts.blocks[worker]
        self._numbers = self._block.numbers
        self._starts = dict(self._block.series())  # what a worker before this one counted goes on
        self._lock = threading.Lock()
        self._numbers[_PID] = os.getpid()
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def answered(self, api: str, method: str, code: str, seconds: float) -> None:
        """Count a request.

        Args:
            api: "http" or "grpc".
            method: the route's template or the procedure's name.
            code: the status.
            seconds: from its start to its reply.
        """
        numbers = self._numbers
        with self._lock:
            start = self._start_of((_REQUESTS, api, method, code))
            numbers[start + bisect.bisect_left(_SECONDS, seconds)] += 1.0
            numbers[start + _SUM] += seconds

    def looked_up(self, table: str, num_ids: int, num_missing: int) -> None:
        """Count the ids of a lookup; any thread may."""
        numbers = self._numbers
        with self._lock:
            start = self._start_of((_IDS, table))
            numbers[start] += num_ids
            numbers[start + 1] += num_missing

    def _start_of(self, key: Key) -> int:
        start = self._starts.get(key)
        return self._add(key) if start is None else start

    def _add(self, key: Key) -> int:
        at = int(self._numbers[_NUM_SERIES])
        text = json.dumps(key).encode()
        if at >= self._counts.max_series - _NUM_KINDS or len(text) > _KEY_BYTES:
            key = (*key[:1], *("other" for _ in key[1:]))
            if key in self._starts:
                return self._starts[key]
            text = json.dumps(key).encode()
        self._block.keys[at * _KEY_BYTES : at * _KEY_BYTES + len(text)] = text
        self._numbers[_NUM_SERIES] = at + 1  # last: from here on other workers read it
        self._starts[key] = _NUM_FRONT + at * _WIDTH
        return self._starts[key]

    def set_ready(self, *, ready: bool) -> None:
        """Say whether this worker is ready."""
        self._numbers[_READY] = 1.0 if ready else 0.0

    def set_in_flight(self, num_requests: int) -> None:
        """Say how many requests are being answered."""
        self._numbers[_IN_FLIGHT] = num_requests

    def measure_memory(self) -> None:
        """Note the resident memory; the page cache of the mapped artifact stands apart (Linux only)."""
        if not _STATUS.exists():
            return
        at_of = {"RssAnon": _ANONYMOUS, "RssFile": _FILE}
        for line in _STATUS.read_text().splitlines():
            name, _, rest = line.partition(":")
            if name in at_of:
                self._numbers[at_of[name]] = 1024 * int(rest.split()[0])

    def render(self) -> bytes:
        """The text of /metrics, in the text format 0.0.4 of Prometheus."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """All workers' counts, added up; prometheus_client calls it."""
        yield from _counters(_added_up(self._counts.blocks))
        alive = [block.numbers for block in self._counts.blocks if block.numbers[_PID]]
        for name, text, at in (
            ("dpq_in_flight_requests", "Requests being received or answered.", _IN_FLIGHT),
            ("dpq_ready_workers", "Workers that are ready.", _READY),
        ):
            yield GaugeMetricFamily(name, text, value=sum(numbers[at] for numbers in alive))
        memory = GaugeMetricFamily(
            "dpq_worker_memory_bytes",
            "Resident memory of a worker: anonymous is its own, file is mapped and shared between the workers.",
            labels=["kind", "pid"],
        )
        for numbers, (kind, at) in itertools.product(alive, (("anonymous", _ANONYMOUS), ("file", _FILE))):
            memory.add_metric([kind, str(int(numbers[_PID]))], numbers[at])
        yield memory
        artifact = GaugeMetricFamily("dpq_artifact_info", "The version served.", labels=["version"])
        artifact.add_metric([self._version], 1)
        yield artifact

    def describe(self) -> list[Metric]:
        """Nothing: registering must not read the counts."""
        return []


def _added_up(blocks: list[Block]) -> dict[Key, list[float]]:
    totals: dict[Key, list[float]] = {}
    for block in blocks:
        for key, start in block.series():
            total = totals.setdefault(key, [0.0] * _WIDTH)
            for at, number in enumerate(block.numbers[start : start + _WIDTH]):
                total[at] += number
    return totals


def _counters(totals: dict[Key, list[float]]) -> Iterator[Metric]:
    requests = CounterMetricFamily(
        "dpq_requests", "Requests answered, by status code.", labels=["api", "method", "code"]
    )
    ids = CounterMetricFamily("dpq_ids", "Ids looked up.", labels=["table"])
    missing_ids = CounterMetricFamily("dpq_missing_ids", "Ids that no vocabulary holds.", labels=["table"])
    by_method: dict[Key, list[float]] = collections.defaultdict(lambda: [0.0] * _WIDTH)
    for (kind, *labels), numbers in sorted(totals.items()):
        if kind == _IDS:
            ids.add_metric(labels, numbers[0])
            missing_ids.add_metric(labels, numbers[1])
        else:
            requests.add_metric(labels, sum(numbers[:_SUM]))
            of_method = by_method[tuple(labels[:2])]
            of_method[:] = [have + more for have, more in zip(of_method, numbers, strict=True)]
    seconds = HistogramMetricFamily("dpq_request_seconds", "Time to answer.", labels=["api", "method"])
    bounds = [*map(str, _SECONDS), "+Inf"]
    for method_labels, numbers in by_method.items():
        buckets = zip(bounds, itertools.accumulate(numbers[:_SUM]), strict=True)
        seconds.add_metric(method_labels, list(buckets), numbers[_SUM])
    yield from (requests, seconds, ids, missing_ids)
