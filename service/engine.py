"""The tables behind limits, which both APIs call. In: TableRequests, SearchRequests. Out: Lookups, Rows, a SearchReply.

It knows neither HTTP nor gRPC: it raises the errors of `service.errors` and `dpq_rec.errors`, which they translate.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import enum
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from dpq_rec import ConfigError, EmbeddingStore, IdTypeError, Lookup, UnknownTableError
from dpq_rec.table import MissingPolicy, Rows, Table
from dpq_rec.wire import ID_BYTES, Form, LookupBytes, PackedRows
from service.errors import InvalidRequestError, NotReadyError, OverloadedError, TooManyIdsError
from service.messages import SearchReply, SearchRequest, TableInfo, TableRequest
from service.metrics import Metrics
from service.settings import Settings

T = TypeVar("T")
_MOST_REPLY_BYTES = (1 << 31) - 1  # what a gRPC message can hold
# Values (ids x dim) that are found, decoded and copied in much less than a millisecond: less than that is not worth a
# thread, more would keep the worker's other requests waiting.
INLINE_VALUES = 1 << 15
_MOST_SEARCHES = 8  # of a worker at a time: one is done, the others wait


def largest_reply_bytes(store: EmbeddingStore, max_ids: int) -> int:
    """Bytes that no reply over gRPC exceeds, with `max_ids` ids, in one lookup or in as many.

    Raises:
        ConfigError: more than a message can hold.
    """
    max_dim = _max_dim(store)
    # A vector, its position if missing, and what stands around it in a reply of its own.
    num_bytes = max_ids * (4 * max_dim + 5 + 64 + len(store.version.encode())) + (1 << 16)
    if num_bytes > _MOST_REPLY_BYTES:
        most = _MOST_REPLY_BYTES * max_ids // num_bytes
        raise ConfigError(f"max_ids: got {max_ids}, want at most {most} with vectors of {max_dim}: a reply holds 2 GiB")
    return num_bytes


def _max_dim(store: EmbeddingStore) -> int:
    return max((table.manifest.embedding_dim for table in store.tables.values()), default=1)


class State(enum.Enum):
    """Where a worker stands between its start and its end."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    STOPPING = "stopping"


class Engine:
    """The tables of one artifact behind limits. One per worker.

    Attributes:
        version: of the artifact that is served.
        num_in_flight: requests that have arrived whole; the metric counts those that are arriving, too.
        num_bytes_arriving: of the bodies that have not.
        damage: tables whose files changed while they were served, and how.
        max_dim: of the widest table's vectors.
    """

    def __init__(self, store: EmbeddingStore, settings: Settings, metrics: Metrics) -> None:
        self.store, self.settings, self.metrics = store, settings, metrics
        self.version, self._tables = store.version, store.tables
        self.num_in_flight = self.num_bytes_arriving = 0
        self.state = State.STARTING
        self.damage: dict[str, str] = {}
        self.max_dim = _max_dim(store)
        self._threads = concurrent.futures.ThreadPoolExecutor(settings.threads, thread_name_prefix="lookup")
        self._search_thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="search")
        self._num_searches = 0

    # Readiness

    def start(self) -> None:
        """Answer requests from now on."""
        self.state = State.READY
        self.metrics.gauges.num_ready = 1

    def drain(self) -> None:
        """Say that this worker is about to stop; requests are still answered."""
        self.state = State.DRAINING
        self.metrics.gauges.num_ready = 0

    def stop(self) -> None:
        """Refuse requests from now on; those in flight may finish."""
        self.state = State.STOPPING

    def check_ready(self) -> None:
        """Whether new callers should be sent here.

        Raises:
            NotReadyError: they should not.
        """
        for reason in self.damage.values():
            raise NotReadyError(reason)
        if self.state is not State.READY:
            raise NotReadyError(f"the server is {self.state.value}; ask again later, or another replica")

    # Limits

    def admission(self) -> Admission:
        """Of a request whose body is still to arrive; entering it raises what `Admission` says."""
        return Admission(self)

    def slot(self) -> Admission:
        """Room for one request that has arrived, until its reply is sent; entering it raises what `Admission` says."""
        return Admission(self, has_arrived=True)

    @property
    def has_room(self) -> bool:
        """Whether there is a slot, and a reply has nothing to say beside what the request wants."""
        return self.state is State.READY and self.num_in_flight < self.settings.max_in_flight

    def check_num_ids(self, num_ids: int, what: str = "ids") -> None:
        """Keep to the limit of ids.

        Raises:
            TooManyIdsError: there are more than `max_ids`.
        """
        if num_ids > self.settings.max_ids:
            raise TooManyIdsError(
                f"{what}: got {num_ids}, want at most {self.settings.max_ids} in a request; send several, or raise "
                "--max-ids"
            )

    # Lookups

    def is_small(self, num_bytes: int) -> bool:
        """Whether a binary request of so many bytes may be answered on the event loop."""
        return num_bytes // 8 * self.max_dim <= INLINE_VALUES

    async def run_values(self, work: Callable[[], T], num_values: int) -> T:
        """The result of work(): at once where the request is small, in a thread where it is large.

        Args:
            work: parse, look up and render; it must not touch the event loop.
            num_values: of binary vectors, which take as long.
        """
        return work() if num_values <= INLINE_VALUES else await self.run_in_thread(work)

    async def run_in_thread(self, work: Callable[[], T]) -> T:
        """The result of work(), of a request that is large."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def run_search(self, work: Callable[[Callable[[], None]], T]) -> T:
        """The result of work(check), which looks at every row of a table, in the one thread for such: lookups go on.

        Where the task that waits for it is cancelled, work is not begun, or check() ends it by what it raises.

        Raises:
            OverloadedError: as many searches as may are waiting for it.
        """
        if self._num_searches >= _MOST_SEARCHES:
            raise OverloadedError(f"{_MOST_SEARCHES} searches are waiting; try again later, or another replica")
        self._num_searches += 1
        is_over = threading.Event()

        def check() -> None:
            if is_over.is_set():
                raise concurrent.futures.CancelledError

        try:
            return await asyncio.get_running_loop().run_in_executor(self._search_thread, work, check)
        finally:
            is_over.set()
            self._num_searches -= 1

    def table(self, name: str) -> Table:
        """One table.

        Raises:
            UnknownTableError: there is none of that name.
            NotReadyError: its file changed while it was served, so that reading it could end this process.
        """
        if name in self.damage:
            raise NotReadyError(self.damage[name])
        try:
            return self._tables[name]
        except KeyError:
            raise UnknownTableError(name, self._tables) from None

    def list_tables(self) -> list[TableInfo]:
        """The tables that are served, by name."""
        return [TableInfo.of(self._tables[name]) for name in sorted(self._tables)]

    def lookup(self, requests: Sequence[TableRequest]) -> list[Lookup]:
        """Vectors for several tables, from one version; with pooling, a row for each bag.

        Raises:
            UnknownTableError: no such table.
            UnknownIdsError: an id is not in the vocabulary, and the request wants an error.
            IdTypeError: ids of another type than the vocabulary's.
            InvalidRequestError: bag lengths that do not fit the ids, or pooling without them.
            TooManyIdsError: more ids, rows of the reply or requests than `max_ids`.
        """
        self._check_limits(requests)
        return [self._lookup(request) for request in requests]

    def _lookup(self, request: TableRequest) -> Lookup:
        table = self._table_for(request)
        _, ids, dtype, missing, pooling, bag_lengths_B = request
        if pooling == "none":
            found = table.lookup(ids, dtype=dtype, missing=missing)
        else:
            found = table.lookup_bags(ids, bag_lengths_B, pooling=pooling, dtype=dtype, missing=missing)
        self.metrics.looked_up(table.name, len(ids), len(found.missing))
        return found

    def find_rows(self, requests: Sequence[TableRequest]) -> list[Rows]:
        """Where `lookup` would look for the vectors of several requests without bags; it raises what that raises."""
        self._check_limits(requests)
        return [self._table_for(request).find(request.ids, request.missing) for request in requests]

    def lookup_bytes(self, table: str, ids: bytes, form: Form, missing: MissingPolicy = "zeros") -> LookupBytes:
        """What `lookup`, or `lookup_codes`, finds for a request without bags, as it travels; it raises what they do."""
        num_ids = len(ids) // ID_BYTES
        self.check_num_ids(num_ids)
        found = self.table(table).lookup_bytes(ids, form=form, missing=missing)
        self.metrics.looked_up(table, num_ids, found.num_missing)
        return found

    def lookup_codes(
        self, table: str, ids: NDArray[np.int64] | list[str], missing: MissingPolicy = "zeros"
    ) -> PackedRows:
        """Packed codes of ids of one table, which is not dense; it raises what `lookup` does."""
        self.check_num_ids(len(ids))
        found = self._table_for(TableRequest(table, ids)).codes(ids, missing=missing)
        self.metrics.looked_up(table, len(ids), len(found.missing))
        return found

    def _check_limits(self, requests: Sequence[TableRequest]) -> None:
        self.check_num_ids(sum(len(request.ids) for request in requests))
        num_rows = sum(len(each.ids if each.bag_lengths_B is None else each.bag_lengths_B) for each in requests)
        self.check_num_ids(num_rows, "rows of the reply")
        self.check_num_ids(len(requests), "requests")

    def _table_for(self, request: TableRequest) -> Table:
        """The table of a request that fits it: ids of the vocabulary's type, and bags that have all of them.

        Strings must not reach numpy, whose arrays of strings are as wide as the longest of them.
        """
        table, ids, bag_lengths_B = self.table(request.table), request.ids, request.bag_lengths_B
        wants_strings = table.vocabulary.kind == "string"
        if len(ids) and wants_strings != isinstance(ids, list):
            got, wanted = ("integers", "strings") if wants_strings else ("strings", "integers")
            raise IdTypeError(f"ids: got {got}, table {table.name!r} wants {wanted}")
        if request.pooling == "none":
            if bag_lengths_B is not None:
                raise InvalidRequestError("bag_lengths: got some without pooling; ask for pooling SUM or MEAN")
        elif bag_lengths_B is None:
            raise InvalidRequestError("pooling: got no bag_lengths; they say how many ids, in order, each bag has")
        elif (num_pooled := int(bag_lengths_B.sum())) != len(ids):
            raise InvalidRequestError(f"bag_lengths: got a sum of {num_pooled}, want the {len(ids)} ids")
        return table

    def search(self, request: SearchRequest, check: Callable[[], None] | None = None) -> SearchReply:
        """The ids most similar to queries; check() is called now and then, and what it raises ends the search.

        Raises:
            UnknownTableError: no such table.
            UnknownIdsError: an id is not in the vocabulary, and the request wants an error.
            IdTypeError: ids of another type than the vocabulary's.
            InvalidRequestError: queries that do not fit the table, no k, or neither queries nor ids.
            TooManyIdsError: more than `max_queries` queries, or `max_ids` answers.
        """
        ids = request.ids
        if (request.queries is None) == (ids is None):
            raise InvalidRequestError("queries, ids: got both or neither, want one of them")
        num_queries = len(request.queries if ids is None else ids)
        if num_queries > self.settings.max_queries:
            wanted = f"at most {self.settings.max_queries} in a request; send several, or raise --max-queries"
            raise TooManyIdsError(f"queries: got {num_queries}, want {wanted}")
        self.check_num_ids(num_queries * max(0, request.k), "answers")
        queries, missing = request.queries, np.empty(0, np.uint32)
        table = self._table_for(TableRequest(request.table, [] if ids is None else ids))
        if ids is not None:
            queries, missing = table.lookup(ids, missing=request.missing)
            queries = np.delete(queries, missing, axis=0)
            self.metrics.looked_up(table.name, num_queries, len(missing))
        try:
            found = table.search(queries, request.k, similarity=request.similarity, check=check)
        except ConfigError as error:
            raise InvalidRequestError(str(error)) from error
        ids_QT = found.ids if isinstance(found.ids, list) else found.ids.tolist()
        answers = iter(zip(ids_QT, found.scores.tolist(), strict=True))
        unknown = set(missing.tolist())
        return SearchReply([([], []) if at in unknown else next(answers) for at in range(num_queries)], missing)


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
