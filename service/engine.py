"""The tables behind limits, which both APIs call. In: TableRequests, SearchRequests. Out: Answer, SearchAnswer.

It knows neither HTTP nor gRPC: it raises the errors of `service.errors` and `dpq_rec.errors`, which they translate.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from dpq_rec import ConfigError, EmbeddingStore, IdTypeError, Lookup
from dpq_rec.table import MissingPolicy, Rows, Table
from dpq_rec.wire import ID_BYTES, Form, LookupBytes, PackedRows
from service.admission import Admission, State
from service.errors import InvalidRequestError, NotReadyError, OverloadedError, TooManyIdsError
from service.messages import Answer, SearchAnswer, SearchRequest, TableList, TableRequest, describe
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


class Engine:
    """The tables of one artifact behind limits. One per worker."""

    def __init__(self, store: EmbeddingStore, settings: Settings, metrics: Metrics) -> None:
        self.store = store
        self.settings = settings
        self.metrics = metrics
        self.num_in_flight = 0  # requests that have arrived whole; the metric counts those that are arriving, too
        self.num_bytes_arriving = 0
        self.state = State.STARTING
        self.damage: dict[str, str] = {}  # tables whose files changed while they were served, and how
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
        return self.store.table(name)

    def list_tables(self) -> TableList:
        """The tables of the version that is served, by name."""
        store = self.store
        return TableList(store.version, [describe(store.tables[name]) for name in sorted(store.tables)])

    def lookup(self, requests: Sequence[TableRequest]) -> Answer:
        """Vectors for several tables, from one version.

        Raises:
            UnknownTableError: no such table.
            UnknownIdsError: an id is not in the vocabulary, and the request wants an error.
            IdTypeError: ids of another type than the vocabulary's.
            InvalidRequestError: bag lengths that do not fit the ids, or pooling without them.
            TooManyIdsError: more ids, rows of the reply or requests than `max_ids`.
        """
        self._check_limits(requests)
        return Answer(self.store.version, [self._lookup(request) for request in requests])

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
        return [self._table_for(request).rows(request.ids, missing=request.missing) for request in requests]

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
        self.check_num_ids(sum(request.num_rows for request in requests), "rows of the reply")
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

    def search(self, request: SearchRequest, check: Callable[[], None] | None = None) -> SearchAnswer:
        """The rows most similar to queries; check() is called now and then, and what it raises ends the search.

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
        return SearchAnswer(self.store.version, found, missing)
