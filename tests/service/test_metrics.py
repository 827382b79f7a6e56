"""Counters of one worker, written together."""

import asyncio
import threading

from prometheus_client import CollectorRegistry, Histogram, generate_latest

from service import metrics


def lines_of(text):
    return {line for line in text.decode().splitlines() if not line.startswith("#") and "_created" not in line}


def test_many_observations_give_what_one_after_the_other_gives():
    observed = [0.0, 0.0005, 0.00051, 0.3, 10.0, 11.0, 1e9, 0.3]
    together, alone = CollectorRegistry(), CollectorRegistry()
    metrics._observe(Histogram("h", "h", buckets=metrics._SECONDS, registry=together), observed)
    one = Histogram("h", "h", buckets=metrics._SECONDS, registry=alone)
    for seconds in observed:
        one.observe(seconds)
    assert lines_of(generate_latest(together)) == lines_of(generate_latest(alone))


def test_what_one_turn_of_the_loop_counts_is_written_by_the_next():
    counted = metrics.Metrics("v")

    async def scenario():
        for _ in range(3):
            counted.looked_up("t", 5, 1)
            counted.answered_soon("http", "POST /x", "200", 0.1)
        written = [counted._requests._metrics.copy()]
        await asyncio.sleep(0)
        return [*written, counted._requests._metrics]

    before, after = asyncio.run(scenario())
    assert (before, len(after)) == ({}, 1)
    assert 'dpq_ids_total{table="t"} 15.0' in lines_of(counted.render())


def test_threads_count_each_of_their_lookups_once():
    counted = metrics.Metrics("v")

    def count():
        for _ in range(500):
            counted.looked_up("t", 2, 1)

    async def scenario():
        threads = [threading.Thread(target=count) for _ in range(4)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            counted.answered_soon("http", "POST /x", "200", 0.1)
            await asyncio.sleep(0)
        for thread in threads:
            thread.join()

    asyncio.run(scenario())
    assert {'dpq_ids_total{table="t"} 4000.0', 'dpq_missing_ids_total{table="t"} 2000.0'} <= lines_of(counted.render())
