"""Requests at a fixed rate, whatever the replies do. In: what asks, a rate. Out: Latencies.

A client that waits for a reply before it asks again slows down with the server, and leaves out the waits that users
would have had (coordinated omission). Here every request has its time beforehand, and its latency counts from then on,
be it that no connection was free, or that the one before took long.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

PERCENTILES = (50.0, 90.0, 99.0, 99.9)
_SPIN_SECONDS = 0.002  # event loops wake up to a millisecond late


class Latencies(NamedTuple):
    """What came of a load.

    Attributes:
        asked_per_second: the rate that was asked for.
        seconds_N: from the time a request was due to its whole reply, of those that were answered (float64).
        num_refused: requests that were answered by a refusal, an overloaded server's say.
        late_seconds: how long after its time the latest request was begun: the client's own fault.
    """

    asked_per_second: float
    seconds_N: NDArray[np.float64]
    num_refused: int
    late_seconds: float

    def summary(self) -> dict[str, Any]:
        """Percentiles in milliseconds, and counts."""
        found = np.percentile(self.seconds_N, PERCENTILES) if len(self.seconds_N) else [float("nan")] * len(PERCENTILES)
        return {
            "asked_per_second": self.asked_per_second,
            "num_answered": len(self.seconds_N),
            "num_refused": self.num_refused,
            **{f"p{percentile:g}_ms": 1e3 * value for percentile, value in zip(PERCENTILES, found, strict=True)},
            "most_ms": 1e3 * self.seconds_N.max(initial=0),
            "client_late_ms": 1e3 * self.late_seconds,
        }


async def at_rate(ask: Callable[[int], Awaitable[bool]], per_second: float, seconds: float) -> Latencies:
    """Ask so many times a second, for so long, and wait for what is still unanswered then.

    Args:
        ask: asks its n-th question; whether that was answered, rather than refused.
        per_second: questions, evenly spaced.
        seconds: in which they are asked.
    """
    num_requests = max(1, round(per_second * seconds))
    seconds_N, answered_N = np.empty(num_requests), np.zeros(num_requests, bool)
    late = 0.0

    async def timed(n: int, due: float) -> None:
        answered_N[n] = await ask(n)
        seconds_N[n] = time.perf_counter() - due

    start = time.perf_counter() + _SPIN_SECONDS
    async with asyncio.TaskGroup() as tasks:
        for n in range(num_requests):
            due = start + n / per_second
            late = max(late, await _until(due) - due)
            tasks.create_task(timed(n, due))
    return Latencies(per_second, seconds_N[answered_N], int((~answered_N).sum()), late)


async def _until(due: float) -> float:
    """Let others run until it is time; the time that it is then."""
    while (now := time.perf_counter()) < due:
        await asyncio.sleep(max(0.0, due - now - _SPIN_SECONDS))
    return now
