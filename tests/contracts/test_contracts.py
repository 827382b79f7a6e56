"""One suite over every way to get a vector: the same cases, the same bits.

`cases` says what is looked up, `readers` and `server_readers` how; the expected answer is the reference reader's.
"""

import contextlib
import functools

import httpx
import numpy as np
import pytest

from tests.contracts import cases
from tests.contracts.readers import OF_ARTIFACT, ReaderError, ReferenceReader
from tests.contracts.server_readers import OF_SERVER, Server


@pytest.fixture(scope="session")
def artifact(tmp_path_factory):
    return cases.write_cases(tmp_path_factory.mktemp("contracts") / "artifact")


@pytest.fixture(scope="session")
def server(artifact):
    with contextlib.closing(Server(artifact)) as server:
        yield server


@pytest.fixture(scope="session")
def reference(artifact):
    return ReferenceReader(artifact)


READERS = {**OF_ARTIFACT, **OF_SERVER}


@pytest.fixture(scope="session")
def open_reader(artifact, request):
    """Name -> reader; each is made once, and the server when the first reader needs it."""
    with contextlib.ExitStack() as stack:

        @functools.cache
        def open_once(name):
            source = artifact if name in OF_ARTIFACT else request.getfixturevalue("server")
            return stack.enter_context(contextlib.closing(READERS[name](source)))

        yield open_once


@pytest.fixture(params=READERS)
def reader(request, open_reader):
    return open_reader(request.param)


def each_reader(names, values_of):
    """Parametrize over each reader, the tables it knows, and what it can do with each."""
    cases_of_readers = [
        (name, table, *values)
        for name, kind in READERS.items()
        for table in kind.tables
        for values in values_of(kind, table)
    ]
    return pytest.mark.parametrize(("reader", "table", *names), cases_of_readers, indirect=["reader"])


def lists_of_ids(kind, table):
    return [(ids,) for ids in cases.IDS if ids != "none" or kind.takes_no_ids]


def lists_of_ids_and_dtypes(kind, table):
    return [(*ids, dtype) for ids in lists_of_ids(kind, table) for dtype in kind.dtypes]


def wrong_types_of_ids(kind, table):
    return [(wrong,) for wrong in (kind.string_id_types if table in cases.STRING_TABLES else kind.id_types)]


@each_reader(["ids", "dtype"], lists_of_ids_and_dtypes)
def test_lookup_gives_the_vectors_of_the_reference_bit_for_bit(reader, reference, table, ids, dtype):
    table_ids = cases.ids_of(table, ids)
    vectors, _ = reader.lookup(table, table_ids, dtype, "zeros")
    wanted = reference.lookup(table, table_ids, dtype, "zeros").vectors
    assert (vectors.dtype, vectors.shape) == (wanted.dtype, wanted.shape)
    assert vectors.tobytes() == wanted.tobytes()


@each_reader(["ids"], lists_of_ids)
def test_lookup_reports_the_positions_of_unknown_ids(reader, reference, table, ids):
    table_ids = cases.ids_of(table, ids)
    wanted = reference.lookup(table, table_ids, "float32", "zeros").missing
    assert bool(wanted) == cases.has_unknown_ids(table, ids)
    assert list(reader.lookup(table, table_ids, "float32", "zeros").missing) == wanted


@each_reader([], lambda kind, table: [()])
def test_lookup_gives_zeros_to_unknown_ids_alone(reader, table):
    vectors, missing = reader.lookup(table, cases.ids_of(table, "mixed"), "float32", "zeros")
    is_missing = np.isin(np.arange(len(vectors)), list(missing))
    assert not vectors[is_missing].any()
    assert vectors[~is_missing].any(axis=1).all()


@each_reader(["ids"], lists_of_ids)
def test_lookup_with_missing_error_fails_for_unknown_ids_alone(reader, reference, table, ids):
    table_ids = cases.ids_of(table, ids)
    if cases.has_unknown_ids(table, ids):
        with pytest.raises(ReaderError, match=r"^unknown_ids$"):
            reader.lookup(table, table_ids, "float32", "error")
    else:
        vectors, missing = reader.lookup(table, table_ids, "float32", "error")
        assert vectors.tobytes() == reference.lookup(table, table_ids, "float32", "error").vectors.tobytes()
        assert list(missing) == []


def bags_of_ids_and_dtypes(kind, table):
    if not kind.pools:
        return []
    return [(ids, dtype, pooling) for ids in cases.IDS for dtype in kind.dtypes for pooling in ("sum", "mean")]


@each_reader(["ids", "dtype", "pooling"], bags_of_ids_and_dtypes)
def test_pooled_bags_are_those_of_the_reference_bit_for_bit(reader, reference, table, ids, dtype, pooling):
    table_ids = cases.ids_of(table, ids)
    half = len(table_ids) // 2
    bag_lengths = [0, half, 0, *([1] * (len(table_ids) - half)), 0]
    pooled, missing = reader.pool(table, table_ids, bag_lengths, dtype, pooling)
    wanted = reference.pool(table, table_ids, bag_lengths, dtype, pooling)
    assert (pooled.dtype, pooled.shape) == (wanted.vectors.dtype, wanted.vectors.shape)
    assert pooled.tobytes() == wanted.vectors.tobytes()
    assert list(missing) == wanted.missing


@pytest.mark.parametrize("missing", ["zeros", "error"])
def test_lookup_in_an_unknown_table_fails(reader, missing):
    with pytest.raises(ReaderError, match=r"^unknown_table$"):
        reader.lookup(cases.UNKNOWN_TABLE, [7], "float32", missing)


@each_reader(["wrong"], wrong_types_of_ids)
def test_lookup_of_ids_of_another_type_fails(reader, table, wrong):
    with pytest.raises(ReaderError, match=r"^id_type$"):
        reader.lookup(table, cases.WRONG_IDS[wrong], "float32", "zeros")


@pytest.mark.parametrize("table", cases.STRING_TABLES)
def test_http_refuses_bytes_for_a_table_of_strings(open_reader, table):
    with pytest.raises(httpx.HTTPStatusError, match="415"):
        open_reader("http-binary").lookup(table, [7], "float32", "zeros")


def test_the_reference_decodes_as_contract_3_says(artifact):
    """The reference itself, held to a loop over the letters of the contract: table two_levels, D=2, L=2, K=20, S=16."""
    tensors = ReferenceReader(artifact).tensors["two_levels"]
    packed, values = tensors["packed_codes"], tensors["values"]
    row = tensors["rows"].tolist()[tensors["ids"].tolist().index(-7)]
    bits = "".join(f"{byte:08b}"[::-1] for byte in packed[row])
    codes = [int(bits[5 * m : 5 * m + 5][::-1], 2) for m in range(4)]
    wanted = np.concatenate([values[j, codes[j]] + values[2 + j, codes[2 + j]] for j in range(2)])
    found = ReferenceReader(artifact).lookup("two_levels", [-7], "float32", "zeros").vectors
    assert found.tobytes() == wanted.tobytes()
