"""Lookups as an Arrow IPC stream. In: ids and a Lookup. Out: bytes of one schema and one batch. Imports pyarrow."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from dpq_rec import Lookup
from service.errors import NotAcceptableError
from service.http_format import ARROW, Headers, Ids, Reply


def load_pyarrow() -> Any:
    """The module pyarrow.

    Raises:
        NotAcceptableError: it is not installed, so that this form cannot be had.
    """
    try:
        return importlib.import_module("pyarrow")
    except ImportError:
        text = f"Accept: {ARROW} needs pyarrow on the server; install it there: pip install 'dpq-rec[arrow]'"
        raise NotAcceptableError(text) from None


def lookup_to_arrow(pa: Any, names: tuple[str, str], ids: Ids, lookup: Lookup, *, are_strings: bool) -> Reply:
    """Columns `id` (int64 or string) and `vector` (fixed_size_list of float or halffloat; null where an id is missing).

    Args:
        pa: the module pyarrow.
        names: of the table and the version, which the schema's metadata holds as `table` and `version`.
        ids: of the request.
        lookup: what was found of them.
        are_strings: whether the table's ids are: of no ids their type does not tell.
    """
    vectors_NE, missing = lookup
    num_rows, dim = vectors_NE.shape
    is_missing_N = np.zeros(num_rows, bool)
    is_missing_N[missing] = True
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(vectors_NE.reshape(-1)), dim, mask=pa.array(is_missing_N))
    columns = [pa.array(list(ids), pa.string()) if are_strings else pa.array(ids, pa.int64()), vectors]
    schema = pa.schema(
        [("id", columns[0].type), ("vector", vectors.type)],
        metadata=dict(zip(("table", "version"), names, strict=True)),
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as writer:
        writer.write_batch(pa.record_batch(columns, schema=schema))
    body = memoryview(sink.getvalue())
    named = {"X-Num-Rows": str(num_rows), "X-Num-Missing": str(len(missing)), "X-Version": names[1]}
    return Reply(body, Headers(ARROW, len(body), named))
