"""What lets requests into an engine. In: its settings and state. Out: an Admission of each request."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

from service.errors import OverloadedError

if TYPE_CHECKING:  # which imports this module
    from service.engine import Engine


class State(enum.Enum):
    """Where a worker stands between its start and its end."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    STOPPING = "stopping"


class Admission:
    """One request, from its head to the end of its reply: entered and left by `with`.

    What a body holds while it arrives is limited for all of them together; a slot is taken when it has arrived, so that
    callers who send nothing keep nobody waiting. A class, for a generator's context manager would take twice the time.

    Args:
        engine: that lets it in.
        has_arrived: whether it is here whole: it takes its slot as it is entered.

    Raises:
        NotReadyError: on entering; the worker is starting or stopping.
        OverloadedError: as `take_slot`, on entering what has arrived.
    """

    __slots__ = ("_has_arrived", "_has_slot", "_num_bytes", "engine")

    def __init__(self, engine: Engine, *, has_arrived: bool = False) -> None:
        self.engine = engine
        self._has_arrived, self._has_slot, self._num_bytes = has_arrived, False, 0

    def __enter__(self) -> Admission:
        engine = self.engine
        if engine.state in (State.STARTING, State.STOPPING):
            engine.check_ready()
        if self._has_arrived:
            self.take_slot()
        engine.metrics.gauges.num_in_flight += 1
        return self

    def receive(self, num_bytes: int) -> None:
        """Hold so many more bytes of the body.

        Raises:
            OverloadedError: bodies that are arriving hold as much as those of `max_in_flight` requests may.
        """
        engine, settings = self.engine, self.engine.settings
        if engine.num_bytes_arriving + num_bytes > settings.max_in_flight * settings.body_limit_bytes:
            raise OverloadedError("the bodies that are arriving are too many bytes; try again later")
        engine.num_bytes_arriving += num_bytes
        self._num_bytes += num_bytes

    def take_slot(self) -> None:
        """Take the room that `max_in_flight` limits; the body has arrived.

        Raises:
            OverloadedError: there is none.
        """
        engine, limit = self.engine, self.engine.settings.max_in_flight
        if engine.num_in_flight >= limit:
            raise OverloadedError(f"{limit} requests are in flight, as many as --max-in-flight allows; try again later")
        engine.num_in_flight += 1
        engine.num_bytes_arriving -= self._num_bytes
        self._has_slot, self._num_bytes = True, 0

    def __exit__(self, *error: object) -> None:
        engine = self.engine
        engine.num_in_flight -= self._has_slot
        engine.num_bytes_arriving -= self._num_bytes
        engine.metrics.gauges.num_in_flight -= 1
