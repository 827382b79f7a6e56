"""Bags that are pooled as they are decoded, held to plain numpy and to a loop."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpq_rec import CodeLayout, DamagedArtifactError, kernels, pack_codes
from dpq_rec.kernels import MISSING_ROW, Coded
from tests import references
from tests.dpq_rec.builders import random_codes, random_values
from tests.dpq_rec.kernels.test_decode_forms import HARD_TO_ROUND, coded, dtypes, layouts, some_rows, threads


def some_bags(num_ids, num_bags, generator):
    """Lengths of bags that take all ids; many are empty."""
    ends = np.sort(generator.integers(0, num_ids + 1, num_bags - 1))
    return np.diff(np.concatenate([[0], ends, [num_ids]]))


def assert_pools_as_the_reference(stored, rows_N, bag_lengths_B, **options):
    pooled_BE = kernels.decode_bags(stored, rows_N, bag_lengths_B, **options)
    wanted_BE = references.decode_bags(stored, rows_N, bag_lengths_B, **options)
    assert (pooled_BE.dtype, pooled_BE.shape) == (wanted_BE.dtype, wanted_BE.shape)
    assert pooled_BE.tobytes() == wanted_BE.tobytes()


def pool_one_by_one(vectors_NE, rows_N, bag_lengths, weights_N, *, mean):
    """The definition: add in order in fp32, then divide by the rows that are there."""
    pooled, start = [], 0
    for length in bag_lengths:
        total, count = np.zeros(vectors_NE.shape[1], np.float32), 0
        for at in range(start, start + length):
            if rows_N[at] != MISSING_ROW:
                total, count = total + np.float32(weights_N[at]) * vectors_NE[at], count + 1
        pooled.append(total / np.float32(count) if mean and count else total)
        start += length
    return np.array(pooled, np.float32)


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dim", [1, 7, 16, 50])
@pytest.mark.parametrize("bag_lengths", [[300], [0, 3, 0, 0, 17, 280, 0], [1] * 300, [299, 1]])
def test_bags_equal_adding_one_by_one(dim, bag_lengths, mean, weighted):
    generator = np.random.default_rng(3)
    stored_VE = (generator.standard_normal((90, dim)) * 10.0 ** generator.integers(-3, 4, (90, 1))).astype(np.float32)
    rows_N = some_rows(90, 300)
    weights_N = generator.standard_normal(300).astype(np.float32) if weighted else None
    ones_N = np.ones(300) if weights_N is None else weights_N
    wanted_BE = pool_one_by_one(kernels.decode(stored_VE, rows_N), rows_N, bag_lengths, ones_N, mean=mean)
    pooled_BE = kernels.decode_bags(stored_VE, rows_N, np.array(bag_lengths), mean=mean, weights_N=weights_N)
    assert pooled_BE.tobytes() == wanted_BE.tobytes()


@given(layouts, st.integers(1, 20), st.booleans(), st.integers(3, 60), st.integers(1, 20), st.data(), dtypes, threads)
def test_bags_of_codes_equal_the_reference(layout, subspace_dim, shared, num_ids, num_bags, data, dtype, num_threads):
    percents = data.draw(st.lists(st.integers(0, 100), max_size=layout.num_levels - 1).map(sorted))
    stored = coded(layout, 9, subspace_dim, [p / 100 for p in percents], shared=shared)
    generator = np.random.default_rng(num_ids)
    weights_N = generator.standard_normal(num_ids).astype(np.float32) if data.draw(st.booleans()) else None
    options = {"mean": data.draw(st.booleans()), "dtype": dtype, "num_threads": num_threads}
    lengths_B = some_bags(num_ids, num_bags, generator)
    assert_pools_as_the_reference(stored, some_rows(9, num_ids), lengths_B, weights_N=weights_N, **options)


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("num_threads", [2, 3, 64])
@pytest.mark.parametrize("num_bags", [1, 40, 9_000])
def test_bags_are_the_same_on_several_threads(num_bags, num_threads, mean):
    stored = coded(CodeLayout(num_subspaces=5, num_codes=31, num_levels=2), 700, 3, [0.5])
    rows_N, lengths_B = some_rows(700, 20_000), some_bags(20_000, num_bags, np.random.default_rng(0))
    for dtype in (np.float32, np.float16):
        alone = kernels.decode_bags(stored, rows_N, lengths_B, mean=mean, dtype=dtype)
        together = kernels.decode_bags(stored, rows_N, lengths_B, mean=mean, dtype=dtype, num_threads=num_threads)
        assert together.tobytes() == alone.tobytes()


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("bag_lengths", [[], [0, 0], [0] * 5_000])
def test_bags_without_ids_are_zeros(bag_lengths, num_threads):
    lengths_B, none = np.array(bag_lengths, np.int64), np.empty(0, np.int64)
    pooled_BE = kernels.decode_bags(np.ones((4, 3), np.float32), none, lengths_B, num_threads=num_threads)
    assert pooled_BE.tobytes() == np.zeros((len(bag_lengths), 3), np.float32).tobytes()


@pytest.mark.parametrize("mean", [False, True])
def test_a_bag_of_missing_ids_is_zeros_whatever_their_weights(mean):
    weights_N = np.array([np.nan, np.inf], np.float32)
    rows_N = np.full(2, MISSING_ROW)
    pooled_BE = kernels.decode_bags(np.ones((4, 3), np.float32), rows_N, np.array([2]), mean=mean, weights_N=weights_N)
    assert pooled_BE.tolist() == [[0, 0, 0]]


@pytest.mark.parametrize("dim", [1, 16])  # one by one, and as many as a register holds
def test_sums_are_rounded_to_float16_as_numpy_does(dim):
    numbers = np.array([*HARD_TO_ROUND, *(-number for number in HARD_TO_ROUND)], np.float32)
    vectors_VE = numbers[:, None].repeat(dim, axis=1)
    with np.errstate(over="ignore"):
        wanted = (np.float32(0) + vectors_VE).astype(np.float16)
    ones = np.ones(len(numbers), np.int64)
    pooled = kernels.decode_bags(vectors_VE, np.arange(len(numbers)), ones, dtype=np.float16)
    assert pooled.tobytes() == wanted.tobytes()


def test_sums_are_rounded_to_float16_once():
    vectors_VE = np.array([[1], [2.0**-12]], np.float32)  # in fp16 each of the sixteen would round away
    rows_N = np.array([0, *[1] * 16])
    assert kernels.decode_bags(vectors_VE, rows_N, np.array([17]), dtype=np.float16).tolist() == [[1 + 2.0**-8]]


@pytest.mark.parametrize("num_threads", [1, 3])
def test_bags_name_the_first_damage_whatever_the_threads(num_threads):
    layout = CodeLayout(num_subspaces=3, num_codes=5)
    codes_NM = random_codes(700, layout)
    codes_NM[6, 2] = 7
    stored = Coded.of(pack_codes(codes_NM, CodeLayout(num_subspaces=3, num_codes=8)), random_values(layout, 4), layout)
    rows_N, lengths_B = np.arange(20_000) % 6, np.full(200, 100)
    for damaged, message in (([6, 700], "row 6 holds a code of 5 or more"), ([-2, 6], "row -2 is outside the table's")):
        rows_N[[5_000, 9_000]] = damaged
        with pytest.raises(DamagedArtifactError, match=message):
            kernels.decode_bags(stored, rows_N, lengths_B, num_threads=num_threads)


@pytest.mark.parametrize("row", [-2, 37, 2**62, -(2**63), 2**63 - 1])
def test_bags_raise_for_a_row_outside_a_dense_table(row):
    with pytest.raises(DamagedArtifactError, match=f"row {row} is outside the table's 37 rows"):
        kernels.decode_bags(np.zeros((37, 5), np.float32), np.array([3] * 30 + [row]), np.array([31]))
