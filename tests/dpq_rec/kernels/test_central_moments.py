"""Central moments and their gradient held to the plain twins, and those to torch's automatic differentiation."""

import numpy as np
import pytest
import torch

from dpq_rec import kernels
from tests import references

SHAPES = [(300, 3, 1), (300, 3, 2), (257, 2, 4), (5, 4, 8), (600, 1, 5), (40, 2, 64), (0, 2, 4)]


def problem(num_queries, num_subspaces, dim, seed=0):
    generator = np.random.default_rng(seed)
    queries = generator.standard_normal((num_queries, num_subspaces, dim)) + 0.5
    weights = generator.uniform(0, 2, num_queries) / max(1, num_queries)
    gradients = generator.standard_normal((num_subspaces, dim * dim + dim + 2))
    return queries, generator.standard_normal((num_subspaces, dim)), weights, gradients


def single(*arrays):
    return [array.astype(np.float32) for array in arrays]


def test_reference_gradient_equals_automatic_differentiation():
    queries, mean, weights, gradients = problem(9, 3, 4)
    q = torch.tensor(queries, requires_grad=True)
    c = q - torch.tensor(mean)
    r, w = c.square().sum(-1), torch.tensor(weights)
    parts = [torch.einsum("n,nds,ndt->dst", w, c, c).flatten(1), torch.einsum("n,nd,nds->ds", w, r, c)]
    moments = torch.cat([*parts, torch.stack([w @ r, w @ r**2], 1)], 1)
    np.testing.assert_allclose(references.central_moments(queries, mean, weights), moments.detach(), rtol=1e-12)
    (want,) = torch.autograd.grad((moments * torch.tensor(gradients)).sum(), [q])
    got = references.central_moments_gradient(queries, mean, weights, gradients)
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_central_moments_equal_the_reference(shape):
    queries, mean, weights, _ = problem(*shape)
    want = references.central_moments(queries, mean, weights)
    got = kernels.central_moments(*single(queries, mean, weights))
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * np.abs(want).max(initial=1))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_central_moments_gradient_equals_the_reference(shape):
    queries, mean, weights, gradients = problem(*shape)
    want = references.central_moments_gradient(queries, mean, weights, gradients)
    arguments = single(queries, mean, weights, gradients)
    got = kernels.central_moments_gradient(*arguments)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * np.abs(want).max(initial=0))
    assert np.array_equal(arguments[3], gradients.astype(np.float32)), "the gradients were written to"
