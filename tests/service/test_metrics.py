"""Counts in memory that workers share, and the text about them."""

import os
import threading

import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from service import metrics
from service.metrics import Metrics, WorkerCounts


def lines_of(text):
    return {line for line in text.decode().splitlines() if not line.startswith("#") and "_created" not in line}


def in_a_child(count):
    """Run count() in a forked process that then ends without a word."""
    pid = os.fork()
    if pid == 0:
        count()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0


def test_the_histogram_is_what_prometheus_client_makes_of_the_same_observations():
    observed = [0.0, 0.0005, 0.00051, 0.3, 10.0, 11.0, 1e9, 0.3]
    counted, registry = Metrics("v"), CollectorRegistry()
    wanted = Histogram(
        "dpq_request_seconds", "Time to answer.", ["api", "method"], buckets=metrics._SECONDS, registry=registry
    )
    for at, seconds in enumerate(observed):
        counted.answered("http", "GET /x", str(200 + at % 2), seconds)
        wanted.labels("http", "GET /x").observe(seconds)
    assert {line for line in lines_of(counted.render()) if "request_seconds" in line} == lines_of(
        generate_latest(registry)
    )


def test_labels_are_escaped_as_prometheus_wants_them():
    counted = Metrics('a"b\\c')
    counted.looked_up("ü\n", 1, 0)
    assert {'dpq_artifact_info{version="a\\"b\\\\c"} 1.0', 'dpq_ids_total{table="ü\\n"} 1.0'} <= lines_of(
        counted.render()
    )


def test_threads_count_each_of_their_lookups_once():
    counted = Metrics("v")

    def count():
        for _ in range(500):
            counted.looked_up("t", 2, 1)
            counted.answered("http", "POST /x", "200", 0.1)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {
        'dpq_ids_total{table="t"} 4000.0',
        'dpq_missing_ids_total{table="t"} 2000.0',
        'dpq_requests_total{api="http",code="200",method="POST /x"} 2000.0',
    } <= lines_of(counted.render())


def test_what_a_worker_counted_is_there_after_its_end_and_goes_on_in_the_one_that_replaces_it():
    counts = [WorkerCounts(), WorkerCounts()]
    for worker in (0, 1, 1):
        in_a_child(lambda worker=worker: Metrics("v", counts, worker).looked_up("t", 10 + worker, 1))
    assert {'dpq_ids_total{table="t"} 32.0', 'dpq_missing_ids_total{table="t"} 3.0'} <= lines_of(
        Metrics("v", counts, 0).render()
    )


def test_gauges_are_those_of_living_workers():
    counts = [WorkerCounts(), WorkerCounts()]
    for worker in (0, 1):
        worker_metrics = Metrics("v", counts, worker)
        worker_metrics.gauges.num_ready = 1
        worker_metrics.gauges.num_in_flight = worker + 3
        worker_metrics.measure_memory()
    assert {"dpq_ready_workers 2.0", "dpq_in_flight_requests 7.0"} <= lines_of(worker_metrics.render())
    counts[0].forget_gauges()
    lines = lines_of(worker_metrics.render())
    assert {"dpq_ready_workers 1.0", "dpq_in_flight_requests 4.0"} <= lines
    assert len({line for line in lines if line.startswith("dpq_worker_memory_bytes")}) == 2


@pytest.mark.parametrize("table", ["t", "t" * 1000])
def test_what_finds_no_room_is_counted_as_other(table):
    counted = Metrics("v", [WorkerCounts(max_series=4)])
    for at in range(2):
        counted.answered("http", f"GET /{at}", "200", 0.1)
    for _ in range(3):
        counted.looked_up(table, 5, 0)
        counted.answered("http", "GET /2", "404", 0.1)
    assert {
        'dpq_ids_total{table="other"} 15.0',
        'dpq_requests_total{api="other",code="other",method="other"} 3.0',
        'dpq_requests_total{api="http",code="200",method="GET /1"} 1.0',
    } <= lines_of(counted.render())
