"""Ids of every array library, at every way in. The store's own answer to a plain list is what each is held to."""

import array
import collections
import json

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import torch

from dpq_rec import ConfigError, EmbeddingStore, Int64Vocabulary, StringVocabulary, TableContents, write_artifact
from dpq_rec.client import _body_of
from dpq_rec.codes import CodeLayout
from dpq_rec.errors import IdTypeError, UnknownIdsError
from dpq_rec.ids import ids_of_any_kind, int64_ids, string_ids

NUMBERS, TEXTS = [42, 5, 7], ["ü", "no", "a"]  # 5 and "no" are unknown


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    layout = CodeLayout(num_subspaces=2, num_codes=5)
    tables = {
        name: TableContents(
            num_embeddings=3,
            embedding_dim=4,
            vocabulary=vocabulary,
            chunks=[np.array([[1], [2], [10]], np.uint8)],
            layout=layout,
            values=np.random.default_rng(0).standard_normal((2, 5, 2)).astype(np.float32),
        )
        for name, vocabulary in {
            "numbers": Int64Vocabulary.from_ids([7, 42, -1]),
            "texts": StringVocabulary.from_ids(["a", "ü", ""]),
        }.items()
    }
    return EmbeddingStore.open(write_artifact(tmp_path_factory.mktemp("ids") / "artifact", tables))


INTEGERS = {
    "tuple": tuple(NUMBERS),
    "deque": collections.deque(NUMBERS),
    "array.array": array.array("q", NUMBERS),
    **{np.dtype(kind).name: np.array(NUMBERS, kind) for kind in "bhilqBHILQ"},
    "big-endian": np.array(NUMBERS, ">i8"),
    "strided": np.array([42, 0, 5, 0, 7, 0])[::2],
    "objects": np.array(NUMBERS, object),
    "numpy scalars": [np.int32(42), np.uint8(5), 7],
    "signed and unsigned scalars": [np.int64(42), np.uint64(5), 7],
    "masked, none of them": np.ma.array(NUMBERS, mask=[0, 0, 0]),
    "torch": torch.tensor(NUMBERS),
    "torch int32": torch.tensor(NUMBERS, dtype=torch.int32),
    "torch strided": torch.tensor([NUMBERS, NUMBERS]).T[:, 0],
    "torch scalars": list(torch.tensor(NUMBERS)),
    "pandas with another index": pd.Series(NUMBERS, index=[9, 8, 1]),
    "pandas with an index of strings": pd.Series(NUMBERS, index=["x", "y", "z"]),
    "pandas index": pd.Index(NUMBERS),
    "pandas categories": pd.Series(NUMBERS).astype("category"),
    "pandas Int64": pd.Series(NUMBERS, dtype="Int64"),
    "pandas arrow": pd.Series(NUMBERS, dtype="int64[pyarrow]"),
    "pandas objects": pd.Series(NUMBERS, dtype=object),
    "polars": pl.Series(NUMBERS),
    "polars UInt16": pl.Series(NUMBERS, dtype=pl.UInt16),
    "pyarrow": pa.array(NUMBERS),
    "pyarrow chunks": pa.chunked_array([NUMBERS[:1], NUMBERS[1:]]),
    "pyarrow dictionary": pa.array(NUMBERS).dictionary_encode(),
    "pyarrow slice": pa.array([0, *NUMBERS])[1:],
}
STRINGS = {
    "tuple": tuple(TEXTS),
    "U": np.array(TEXTS),
    "objects": np.array(TEXTS, object),
    "StringDType": np.array(TEXTS, np.dtypes.StringDType()),
    "pandas": pd.Series(TEXTS, index=[9, 8, 1]),
    "pandas objects": pd.Series(TEXTS, dtype=object),
    "pandas string": pd.Series(TEXTS, dtype="string[python]"),
    "pandas string of arrow": pd.Series(TEXTS, dtype="string[pyarrow]"),
    "pandas arrow": pd.Series(TEXTS, dtype=pd.ArrowDtype(pa.string())),
    "pandas categories": pd.Series(TEXTS).astype("category"),
    "pandas index": pd.Index(TEXTS),
    "polars": pl.Series(TEXTS),
    "polars categories": pl.Series(TEXTS).cast(pl.Categorical),
    "polars enum": pl.Series(TEXTS, dtype=pl.Enum(TEXTS)),
    "pyarrow": pa.array(TEXTS),
    "pyarrow large": pa.array(TEXTS, pa.large_string()),
    "pyarrow view": pa.array(TEXTS, pa.string_view()),
    "pyarrow dictionary": pa.array(TEXTS).dictionary_encode(),
    "pyarrow chunks": pa.chunked_array([TEXTS[:1], TEXTS[1:]]),
}
CASES = [
    *(pytest.param("numbers", NUMBERS, held, id=f"numbers-{name}") for name, held in INTEGERS.items()),
    *(pytest.param("texts", TEXTS, held, id=f"texts-{name}") for name, held in STRINGS.items()),
]


@pytest.mark.parametrize(("table", "plain", "held"), CASES)
def test_every_way_in_takes_ids_of_every_library(store, table, plain, held):
    def found(ids):
        return [
            *store.lookup(table, ids),
            *store.lookup_bags(table, ids, [1, 2]),
            *store.rows(table, ids),
            *store.codes(table, ids)[:2],
            store.tables[table].vocabulary.rows(ids),
        ]

    assert [each.tolist() for each in found(held)] == [each.tolist() for each in found(plain)]


@pytest.mark.parametrize(("table", "plain", "held"), CASES)
def test_an_unknown_id_is_named_as_a_plain_one_with_its_position(store, table, plain, held):
    for look_up in (store.lookup, store.rows, store.codes):
        with pytest.raises(UnknownIdsError, match=f"'{table}': {plain[1]!r};") as error:
            look_up(table, held, missing="error")
        assert error.value.positions == [1]


@pytest.mark.parametrize(("table", "plain", "held"), CASES)
def test_client_sends_ids_of_every_library(table, plain, held):
    content_type, body = _body_of(ids_of_any_kind(held))
    if table == "texts":
        assert (content_type, json.loads(body)) == ("application/json", {"ids": plain})
    else:
        assert (content_type, body) == ("application/octet-stream", np.array(plain, "<i8").tobytes())


def test_a_range_is_ids(store):
    assert store.lookup("numbers", range(41, 44)).missing.tolist() == [0, 2]


NO_INTEGERS = {
    "uint64 above 2**63": (np.array([1, 2**63], np.uint64), "9223372036854775808 at position 1"),
    "polars above 2**63": (pl.Series([1, 2**63], dtype=pl.UInt64), "9223372036854775808 at position 1"),
    "an integer of 65 bits": ([1, 2**64], "18446744073709551616 at position 1"),
    "a negative and 2**63": ([-1, 2**63], "9223372036854775808 at position 1"),
    "masked": (np.ma.array([1, 2], mask=[0, 1]), "nothing at position 1, which is masked"),
    "pandas Int64": (pd.Series([1, None], dtype="Int64"), "at position 1"),
    "pandas categories with none": (pd.Series([1, None]).astype("category"), "at position 1"),
    "pandas NaN": (pd.Series([1, None]), "at position 1"),
    "pandas objects with none": (pd.Series([1, None], dtype=object), "NoneType at position 1"),
    "polars null": (pl.Series([1, None]), "at position 1"),
    "pyarrow null": (pa.array([1, None]), "at position 1"),
    "numpy bool": ([np.True_, 1], "bool at position 0"),
    "torch bool": (torch.tensor([True]), "booleans"),
    "pyarrow bool": (pa.array([True]), "booleans"),
    "pandas boolean": (pd.Series([True], dtype="boolean"), "booleans"),
    "object bool": (np.array([1, True], object), "bool at position 1"),
    "numpy float": ([np.float64(1)], "float64 at position 0"),
    "torch float": (torch.tensor([1.0]), "float32"),
    "torch float scalars": ([torch.tensor(1.5)], "Tensor at position 0"),
    "torch bfloat16": (torch.ones(1, dtype=torch.bfloat16), "BFloat16"),
    "torch gradients": (torch.ones(1, requires_grad=True), "float32"),
    "torch meta": (torch.empty(1, dtype=torch.int64, device="meta"), "meta"),
    "128 bits": (pl.Series([1], dtype=pl.Int128), "128-bit"),
    "bytes of numpy": (np.array([b"1"]), "bytes, which are of no encoding"),
    "bytes": (b"\1\0\0\0\0\0\0\0", "bytes, want .*lookup_bytes"),
    "bytearray": (bytearray(8), "bytearray, want .*lookup_bytes"),
    "memoryview": (memoryview(bytes(8)), "memoryview, want .*lookup_bytes"),
    "pandas strings": (pd.Series(["1"]), "strings"),
    "polars strings": (pl.Series(["1"]), "strings"),
    "pyarrow strings": (pa.array(["1"]), "strings"),
    "a scalar": (np.int64(5), "one int64"),
    "an array of no dimension": (np.array(5), "one ndarray"),
    "a tensor of no dimension": (torch.tensor(5), "one Tensor"),
    "a pyarrow scalar": (pa.scalar("abc"), "one StringScalar"),
    "a data frame": (pd.DataFrame({"a": [1]}), r"an array of shape \(1, 1\)"),
    "a generator": ((each for each in [1]), "one generator"),
    "a set": ({1}, "one set"),
    "nested": ([[1], [2]], "list at position 0"),
    "of different lengths": ([np.array([1, 2]), 3], "no array"),
    "dates": (pd.Series(pd.to_datetime(["2020-01-01"])), "datetime64"),
}
NO_STRINGS = {
    "bytes of numpy": (np.array([b"a"]), "bytes, which are of no encoding"),
    "bytes": (b"a", "bytes, want"),
    "bytes of pyarrow": (pa.array([b"a"]), "bytes at position 0"),
    "bytes of polars": (pl.Series([b"a"]), "bytes at position 0"),
    "pandas NA": (pd.Series(["a", None], dtype="string"), "at position 1"),
    "polars null": (pl.Series(["a", None]), "NoneType at position 1"),
    "pyarrow null": (pa.array(["a", None]), "NoneType at position 1"),
    "StringDType with none": (np.array(["a", None], np.dtypes.StringDType(na_object=None)), "NoneType at position 1"),
    "masked": (np.ma.array(["a", "b"], mask=[0, 1]), "nothing at position 1, which is masked"),
    "integers of pandas": (pd.Series([1]), "int64"),
    "integers of torch": (torch.tensor([1]), "int64"),
    "a range": (range(2), "int64"),
    "a generator": ((each for each in "ab"), "one generator"),
    "a set": ({"a"}, "one set"),
    "a pyarrow scalar": (pa.scalar("a"), "one StringScalar"),
    "an array of no dimension": (np.array("a"), "one ndarray"),
}


@pytest.mark.parametrize(
    ("table", "held", "message"),
    [
        *(pytest.param("numbers", *case, id=f"numbers-{name}") for name, case in NO_INTEGERS.items()),
        *(pytest.param("texts", *case, id=f"texts-{name}") for name, case in NO_STRINGS.items()),
    ],
)
def test_what_is_no_id_is_refused_with_what_it_is_and_where(store, table, held, message):
    with pytest.raises(IdTypeError, match=f"ids: got .*{message}"):
        store.lookup(table, held)
    with pytest.raises(IdTypeError, match="ids: got"):
        store.rows(table, held)


@pytest.mark.parametrize(
    "nothing", [[], (), np.array([]), pd.Series([]), pl.Series([]), pa.array([]), torch.tensor([])]
)
def test_no_ids_are_of_either_kind(nothing):
    assert int64_ids(nothing).shape == (0,)
    assert list(string_ids(nothing)) == []
    assert len(ids_of_any_kind(nothing)) == 0


def test_ids_that_are_int64_already_are_not_copied():
    ids_N = np.arange(5)
    assert int64_ids(ids_N) is ids_N
    assert np.shares_memory(int64_ids(torch.from_numpy(ids_N)), ids_N)


def test_bags_take_lengths_and_weights_of_every_library(store):
    wanted = store.lookup_bags("numbers", NUMBERS, [1, 2], weights=[1, 2, 3]).vectors.tobytes()
    for library in (torch.tensor, pd.Series, pl.Series, pa.array, np.array):
        got = store.lookup_bags("numbers", NUMBERS, library([1, 2]), weights=library([1.0, 2.0, 3.0]))
        assert got.vectors.tobytes() == wanted
    weights_N = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    assert store.lookup_bags("numbers", NUMBERS, [1, 2], weights=weights_N).vectors.tobytes() == wanted


@pytest.mark.parametrize("weights", [["a", "b", "c"], np.ma.array([1.0, 2, 3], mask=[1, 0, 0]), [[1], [2, 3]]])
def test_bags_refuse_weights_that_are_no_numbers(store, weights):
    with pytest.raises(ConfigError, match="weights: got"):
        store.lookup_bags("numbers", NUMBERS, [1, 2], weights=weights)


def test_search_takes_queries_of_torch_with_gradients(store):
    queries_QE = torch.ones(2, 4, requires_grad=True)
    got, wanted = (store.search("numbers", queries, 2) for queries in (queries_QE, np.ones((2, 4))))
    assert got.ids.tolist() == wanted.ids.tolist()


@pytest.mark.parametrize("make", [bytearray, memoryview])
def test_lookup_bytes_takes_anything_like_bytes(store, make):
    content = np.array(NUMBERS, "<i8").tobytes()
    assert store.lookup_bytes("numbers", make(content)) == store.lookup_bytes("numbers", content)


@pytest.mark.parametrize("make", [[1], np.array([1]), "12345678", None])
def test_lookup_bytes_refuses_what_is_no_bytes(store, make):
    with pytest.raises(IdTypeError, match="want bytes"):
        store.lookup_bytes("numbers", make)
