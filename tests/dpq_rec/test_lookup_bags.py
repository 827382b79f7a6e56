import numpy as np
import pytest

from dpq_rec import ConfigError, EmbeddingStore, IdTypeError, UnknownIdsError, UnknownTableError
from tests.dpq_rec.builders import small_artifact

IDS = [40, -3, 999, 7, 7]  # of table item; 999 is unknown


@pytest.fixture
def store(tmp_path):
    return EmbeddingStore.open(small_artifact(tmp_path / "artifact"))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("pooling", ["sum", "mean"])
def test_lookup_bags_pools_the_vectors_of_lookup(store, pooling, dtype):
    a, b, _, c, _ = store.lookup("item", IDS).vectors
    first, last = np.float32(0) + a + b, np.float32(0) + c + c
    wanted = np.array([first, np.zeros_like(a), last] if pooling == "sum" else [first / 2, np.zeros_like(a), last / 2])
    pooled_BE, missing = store.lookup_bags("item", IDS, [3, 0, 2], pooling=pooling, dtype=dtype)
    assert (pooled_BE.dtype, missing.tolist()) == (np.dtype(dtype), [2])
    np.testing.assert_array_equal(pooled_BE, wanted.astype(dtype))


def test_lookup_bags_sums_unless_told_otherwise_and_takes_weights(store):
    pooled_BE, _ = store.lookup_bags("dense", [0, 2, 1], [2, 1], weights=[2, 0.5, -1])
    assert pooled_BE.tolist() == [[4, 6.5, 9, 11.5], [-4, -5, -6, -7]]


def test_lookup_bags_of_no_ids_and_of_no_bags(store):
    assert store.lookup_bags("dense", [], [0, 0], weights=[]).vectors.tolist() == [[0] * 4] * 2
    assert store.lookup_bags("dense", [], []).vectors.shape == (0, 4)


@pytest.mark.parametrize("num_threads", [1, 2])
def test_lookup_on_several_threads_is_the_same(store, num_threads):
    ids = [0, 1, 2, 5] * 2_000
    wanted = np.array([[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [0, 0, 0, 0]] * 2_000)
    found = store.lookup("dense", ids, num_threads=num_threads)
    assert found.missing.tolist() == list(range(3, 8_000, 4))
    np.testing.assert_array_equal(found.vectors, wanted)
    bags = store.lookup_bags("dense", ids, [4] * 2_000, num_threads=num_threads)
    np.testing.assert_array_equal(bags.vectors, [[12, 15, 18, 21]] * 2_000)


@pytest.mark.parametrize(
    ("bag_lengths", "message"),
    [
        ([3, 1], "a sum of 4, want the 5 ids"),
        ([3, 3], "a sum of 6, want the 5 ids"),
        ([6, -1], "-1 to 6, want 0 to the 5 ids"),
        ([2**63 - 1, 2**63 - 1, 7], "want 0 to the 5 ids"),  # in int64 they sum to 5
        ([5.0], "want integers"),
        ([[5]], r"want integers \[B\]"),
        ([True] * 5, "want integers"),
        ([], "a sum of 0"),
    ],
)
def test_lookup_bags_refuses_lengths_that_do_not_fit_the_ids(store, bag_lengths, message):
    with pytest.raises(ConfigError, match=f"bag_lengths: got .*{message}"):
        store.lookup_bags("item", IDS, bag_lengths)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pooling": "max"}, "pooling: got 'max', want sum or mean"),
        ({"pooling": "mean", "weights": [1] * 5}, "weights: got some with pooling mean, want sum"),
        ({"weights": [1] * 4}, r"weights: got shape \(4,\), want one for each of the 5 ids"),
        ({"weights": [[1]] * 5}, r"weights: got shape \(5, 1\)"),
        ({"dtype": "float64"}, "dtype: got"),
        ({"missing": "ignore"}, "missing: got"),
        ({"num_threads": 0}, "num_threads: got 0, want 1 or more"),
    ],
)
def test_lookup_bags_refuses_options_that_make_no_sense(store, options, message):
    with pytest.raises(ConfigError, match=message):
        store.lookup_bags("item", IDS, [5], **options)


def test_lookup_refuses_no_threads(store):
    with pytest.raises(ConfigError, match="num_threads: got 0, want 1 or more"):
        store.lookup("item", IDS, num_threads=0)


def test_lookup_bags_refuses_what_lookup_refuses(store):
    with pytest.raises(UnknownIdsError, match="999"):
        store.lookup_bags("item", IDS, [5], missing="error")
    with pytest.raises(IdTypeError):
        store.lookup_bags("item", ["40"], [1])
    with pytest.raises(UnknownTableError):
        store.lookup_bags("usr", [1], [1])
