import numpy as np
import pytest

from service.pooling import pool


def pool_one_by_one(vectors_NE, missing, bag_lengths, pooling):
    """The definition: add in request order in fp32, then divide by the ids that were found."""
    pooled, start = [], 0
    for length in bag_lengths:
        total, count = np.zeros(vectors_NE.shape[1], np.float32), 0
        for at in range(start, start + length):
            if at not in missing:
                total, count = total + vectors_NE[at], count + 1
        pooled.append(total / np.float32(count) if pooling == "mean" and count else total)
        start += length
    return np.array(pooled, np.float32).reshape(len(bag_lengths), vectors_NE.shape[1])


@pytest.mark.parametrize("pooling", ["sum", "mean"])
@pytest.mark.parametrize("dim", [1, 7])
@pytest.mark.parametrize("bag_lengths", [[300], [0, 3, 0, 0, 17, 280, 0], [1] * 300, [299, 1]])
def test_pool_equals_adding_one_by_one(pooling, dim, bag_lengths):
    rng = np.random.default_rng(3)
    vectors_NE = (rng.standard_normal((300, dim)) * 10.0 ** rng.integers(-3, 4, (300, 1))).astype(np.float32)
    missing = np.array([0, 2, 3, 19, 299], np.uint32)
    vectors_NE[missing] = 0
    pooled_BE = pool(vectors_NE, missing, np.array(bag_lengths), pooling)
    assert pooled_BE.dtype == np.float32
    np.testing.assert_array_equal(pooled_BE, pool_one_by_one(vectors_NE, missing, bag_lengths, pooling))


@pytest.mark.parametrize("pooling", ["sum", "mean"])
def test_pool_gives_zeros_to_a_bag_of_missing_ids(pooling):
    pooled_BE = pool(np.zeros((2, 3), np.float32), np.array([0, 1], np.uint32), np.array([2]), pooling)
    np.testing.assert_array_equal(pooled_BE, np.zeros((1, 3)))


@pytest.mark.parametrize("bag_lengths", [[], [0, 0]])
def test_pool_takes_no_ids(bag_lengths):
    none = np.zeros((0, 3), np.float32)
    assert pool(none, np.array([], np.uint32), np.array(bag_lengths, np.int64), "mean").shape == (len(bag_lengths), 3)
