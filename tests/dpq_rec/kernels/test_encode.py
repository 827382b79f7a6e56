import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpq_rec import kernels
from tests import references

METRICS = [pytest.param(False, id="dot"), pytest.param(True, id="euclidean")]


def problem(num_queries, num_subspaces, num_codes, subspace_dim, seed=0):
    generator = np.random.default_rng(seed)
    queries_NDS = generator.standard_normal((num_queries, num_subspaces, subspace_dim)).astype(np.float32)
    keys_DKS = generator.standard_normal((num_subspaces, num_codes, subspace_dim)).astype(np.float32)
    scale_K = generator.uniform(0.2, 3, num_codes).astype(np.float32)
    return queries_NDS, keys_DKS, scale_K, generator.standard_normal(num_codes).astype(np.float32)


def plain(num_codes):
    return np.ones(num_codes, np.float32), np.zeros(num_codes, np.float32)


@pytest.mark.parametrize("euclidean", METRICS)
@pytest.mark.parametrize("num_codes", [2, 3, 15, 16, 17, 32, 100, 256, 1000])
@pytest.mark.parametrize("subspace_dim", [1, 3, 4, 16])
def test_encode_equals_the_reference(num_codes, subspace_dim, euclidean):
    arguments = problem(70, 3, num_codes, subspace_dim)
    codes_ND = kernels.encode(*arguments, euclidean=euclidean)
    assert (codes_ND.dtype, codes_ND.shape) == (np.uint16, (70, 3))
    np.testing.assert_array_equal(codes_ND, references.encode(*arguments, euclidean=euclidean))


@settings(max_examples=50)
@given(st.integers(0, 130), st.integers(1, 9), st.integers(2, 70), st.integers(1, 9), st.booleans(), st.integers(0, 99))
def test_encode_equals_the_reference_in_any_shape(num_queries, num_subspaces, num_codes, dim, euclidean, seed):
    arguments = problem(num_queries, num_subspaces, num_codes, dim, seed)
    np.testing.assert_array_equal(
        kernels.encode(*arguments, euclidean=euclidean), references.encode(*arguments, euclidean=euclidean)
    )


@pytest.mark.parametrize("euclidean", METRICS)
def test_encode_equals_the_reference_where_many_scores_are_nearly_equal(euclidean):
    # Keys of few distinct small numbers: scores collide often, and a sum in another order would round differently.
    queries_NDS, keys_DKS, scale_K, shift_K = problem(200, 2, 200, 6)
    keys_DKS = (np.round(keys_DKS) * np.float32(0.1)).astype(np.float32)
    queries_NDS = (np.round(queries_NDS) * np.float32(0.3)).astype(np.float32)
    arguments = queries_NDS, keys_DKS, np.ones_like(scale_K), np.zeros_like(shift_K)
    np.testing.assert_array_equal(
        kernels.encode(*arguments, euclidean=euclidean), references.encode(*arguments, euclidean=euclidean)
    )


@pytest.mark.parametrize("euclidean", METRICS)
def test_encode_takes_the_last_of_65536_codes(euclidean):
    keys_DKS = np.zeros((1, 65_536, 2), np.float32)
    keys_DKS[0, -1] = 1
    queries_NDS = np.ones((2, 1, 2), np.float32)
    assert kernels.encode(queries_NDS, keys_DKS, *plain(65_536), euclidean=euclidean).tolist() == [[65_535]] * 2


@pytest.mark.parametrize("euclidean", METRICS)
@pytest.mark.parametrize("first", [0, 1, 14, 15, 16, 17, 31, 38])
@pytest.mark.parametrize("second", [15, 16, 17, 33, 39])
def test_encode_gives_a_tie_to_the_lowest_code(first, second, euclidean):
    num_codes = 40
    keys_DKS = np.full((1, num_codes, 3), -9, np.float32)
    keys_DKS[0, [first, second]] = 2
    queries_NDS = np.full((1, 1, 3), 2, np.float32)
    code = kernels.encode(queries_NDS, keys_DKS, *plain(num_codes), euclidean=euclidean)
    assert code.tolist() == [[min(first, second)]]


@pytest.mark.parametrize("euclidean", METRICS)
@pytest.mark.parametrize("num_codes", [2, 15, 16, 17, 33])
def test_encode_gives_code_zero_where_all_keys_are_equal(num_codes, euclidean):
    queries_NDS, keys_DKS = np.ones((3, 2, 4), np.float32), np.ones((2, num_codes, 4), np.float32)
    assert not kernels.encode(queries_NDS, keys_DKS, *plain(num_codes), euclidean=euclidean).any()


@pytest.mark.parametrize("euclidean", METRICS)
@pytest.mark.parametrize("num_codes", [2, 5, 17])
def test_encode_never_takes_a_code_of_the_padding(num_codes, euclidean):
    # Every real score is far below 0, which is what a padding key of zeros would score by itself.
    keys_DKS = np.full((1, num_codes, 2), -1e18, np.float32)
    queries_NDS = np.full((1, 1, 2), 1e18, np.float32)
    assert kernels.encode(queries_NDS, keys_DKS, *plain(num_codes), euclidean=euclidean).tolist() == [[0]]


@pytest.mark.parametrize("euclidean", METRICS)
def test_encode_applies_scale_and_shift_of_each_code(euclidean):
    keys_DKS = np.array([[[1.0], [1.0], [1.0]]], np.float32)
    queries_NDS = np.array([[[3.0]]], np.float32)  # dot 3, squared distance 4
    scale_K, shift_K = np.array([1, 0.5, 2], np.float32), np.array([0, 0, -8], np.float32)
    wanted = 1 if euclidean else 0  # -4, -2, -16; 3, 1.5, -2
    assert kernels.encode(queries_NDS, keys_DKS, scale_K, shift_K, euclidean=euclidean).tolist() == [[wanted]]


@pytest.mark.parametrize("euclidean", METRICS)
@pytest.mark.parametrize("batch", [1, 2, 63, 64, 65, 100])
def test_encode_gives_a_row_the_same_codes_in_any_batch(batch, euclidean):
    queries_NDS, *rest = problem(200, 4, 37, 5)
    whole_ND = kernels.encode(queries_NDS, *rest, euclidean=euclidean)
    pieces = [kernels.encode(queries_NDS[at : at + batch], *rest, euclidean=euclidean) for at in range(0, 200, batch)]
    np.testing.assert_array_equal(np.concatenate(pieces), whole_ND)


def test_encode_takes_queries_that_are_a_view_of_something_larger():
    queries_NDS, *rest = problem(40, 3, 20, 4)
    np.testing.assert_array_equal(
        kernels.encode(queries_NDS[::2], *rest, euclidean=True),
        kernels.encode(queries_NDS, *rest, euclidean=True)[::2],
    )


def test_encode_of_no_queries_is_no_codes():
    _, *rest = problem(1, 3, 20, 4)
    assert kernels.encode(np.empty((0, 3, 4), np.float32), *rest, euclidean=False).shape == (0, 3)
