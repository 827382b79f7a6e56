"""The gradients of a softmax choice held to the plain twin, and the twin to torch's automatic differentiation."""

import numpy as np
import pytest
import torch

from dpq_rec import kernels
from tests import references

METRICS = [pytest.param(False, id="dot"), pytest.param(True, id="euclidean")]


def problem(num_queries, num_subspaces, num_codes, key_dim, value_dim, seed=0):
    generator = np.random.default_rng(seed)
    shapes = [
        (num_queries, num_subspaces, key_dim),
        (num_subspaces, num_codes, key_dim),
        (num_subspaces, num_codes, value_dim),
        (num_queries, num_subspaces, value_dim),
    ]
    queries, keys, values, gradients = (generator.standard_normal(shape).astype(np.float32) for shape in shapes)
    affine = (generator.uniform(0.2, 2, num_codes), generator.standard_normal(num_codes))
    return queries, keys, values, tuple(a.astype(np.float32) for a in affine), gradients


def in_double(queries, keys, values, affine, gradients):
    as_double = [array.astype(np.float64) for array in (queries, keys, values, *affine, gradients)]
    return *as_double[:3], tuple(as_double[3:5]), as_double[5]


@pytest.mark.parametrize("euclidean", METRICS)
def test_reference_equals_automatic_differentiation(euclidean):
    queries, keys, values, affine, gradients = in_double(*problem(6, 3, 5, 4, 2))
    leaves = [torch.tensor(a, requires_grad=True) for a in (queries, keys, values, *affine)]
    q, k, v, scale, shift = leaves
    scores = -((q[:, :, None] - k) ** 2).sum(-1) if euclidean else torch.einsum("ndx,dkx->ndk", q, k)
    mixture = torch.einsum("ndk,dks->nds", (scores * scale + shift).softmax(-1), v)
    want = torch.autograd.grad((mixture * torch.tensor(gradients)).sum(), leaves)
    got = references.softmax_gradients(queries, keys, values, affine, gradients, euclidean=euclidean)
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("euclidean", METRICS)
@pytest.mark.parametrize("num_codes", [2, 15, 16, 17, 100, 256])
@pytest.mark.parametrize("dims", [(1, 1), (2, 2), (3, 3), (4, 4), (8, 8), (5, 2), (1, 16)])
def test_softmax_gradients_equal_the_reference(num_codes, dims, euclidean):
    arguments = problem(70, 3, num_codes, *dims)
    got = kernels.softmax_gradients(*arguments, euclidean=euclidean)
    want = references.softmax_gradients(*in_double(*arguments), euclidean=euclidean)
    for g, w in zip(got, want, strict=True):
        assert g.dtype == np.float32
        np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-5 * np.abs(w).max())


def test_softmax_gradients_stay_finite_where_scores_are_far_apart():
    queries, keys, values, affine, gradients = problem(20, 2, 40, 4, 4)
    got = kernels.softmax_gradients(queries * 1e4, keys, values, affine, gradients, euclidean=False)
    assert all(np.isfinite(array).all() for array in got)


def test_softmax_gradients_of_no_queries_are_zero():
    got = kernels.softmax_gradients(*problem(0, 2, 5, 4, 4), euclidean=False)
    assert got[0].shape == (0, 2, 4)
    assert not any(array.any() for array in got)
