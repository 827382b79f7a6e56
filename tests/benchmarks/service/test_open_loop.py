"""Load at a fixed rate, and how long its requests take."""

import asyncio

import numpy as np
import pytest

from tests.benchmarks.service.open_loop import at_rate


def test_requests_are_asked_at_their_times():
    async def ask(n):
        calls.append((n, asyncio.get_running_loop().time()))
        return True

    calls = []
    latencies = asyncio.run(at_rate(ask, 200, 0.5))
    assert [n for n, _ in calls] == list(range(100))
    assert calls[-1][1] - calls[0][1] == pytest.approx(99 / 200, rel=0.2)
    assert len(latencies.seconds_N) == 100


def test_requests_behind_a_slow_one_have_waited_too():
    """A server that does one at a time and stops once for 0.3 s: a client that waits would have seen one slow reply."""

    async def ask(n):
        async with server:
            if n == 10:
                await asyncio.sleep(0.3)
        return True

    async def load():
        return await at_rate(ask, 100, 0.6)

    server = asyncio.Semaphore(1)
    seconds_N = asyncio.run(load()).seconds_N
    waited_N = np.maximum(0, 0.3 - np.arange(50) / 100)  # those after the slow one, by how much later they came
    np.testing.assert_allclose(seconds_N[10:], waited_N, atol=0.1)
    assert (seconds_N > 0.1).sum() > 10


def test_refusals_are_counted_and_have_no_latency():
    async def ask(n):
        return n % 4 > 0

    latencies = asyncio.run(at_rate(ask, 1000, 0.02))
    assert (latencies.num_refused, len(latencies.seconds_N)) == (5, 15)


def test_summary_has_percentiles_in_milliseconds():
    async def ask(n):
        return True

    summary = asyncio.run(at_rate(ask, 1000, 0.01)).summary()
    assert 0 <= summary["p50_ms"] <= summary["p99.9_ms"] <= summary["most_ms"]
    assert (summary["asked_per_second"], summary["num_answered"], summary["num_refused"]) == (1000, 10, 0)


def test_an_error_of_the_client_ends_the_load():
    async def ask(n):
        raise ConnectionResetError("gone")

    with pytest.raises(ExceptionGroup):
        asyncio.run(at_rate(ask, 100, 0.1))
