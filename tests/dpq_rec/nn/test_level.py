"""Scores, codes and batch norm, held to plain loops and to torch's own mean and variance over all scores."""

import numpy as np
import pytest
import torch

from dpq_rec.nn.estimators import scores
from dpq_rec.nn.level import ScoreNorm, _encode_chunk, encode, score_moments

EUCLIDEAN = pytest.mark.parametrize("euclidean", [False, True])


def naive_scores(queries_NDS, keys_DKS, *, euclidean):
    out = queries_NDS.new_empty(*queries_NDS.shape[:2], keys_DKS.shape[1])
    for n in range(out.shape[0]):
        for d in range(out.shape[1]):
            for k in range(out.shape[2]):
                query, key = queries_NDS[n, d], keys_DKS[d, k]
                out[n, d, k] = -((query - key) ** 2).sum() if euclidean else query @ key
    return out


def some(num_rows=9, num_subspaces=3, num_codes=5, subspace_dim=4, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(num_rows, num_subspaces, subspace_dim, dtype=dtype, generator=generator) + 0.7
    keys = torch.randn(num_subspaces, num_codes, subspace_dim, dtype=dtype, generator=generator)
    return queries, keys, torch.randint(1, 4, (num_rows,), generator=generator)


def identity(num_codes, dtype=torch.float32):
    return torch.ones(num_codes, dtype=dtype), torch.zeros(num_codes, dtype=dtype)


def test_scores_are_the_dot_products_of_the_paper():
    queries, keys, _ = some()
    torch.testing.assert_close(scores(queries, keys, euclidean=False), naive_scores(queries, keys, euclidean=False))


@EUCLIDEAN
def test_score_moments_equal_mean_and_variance_over_all_occurrences(euclidean):
    queries, keys, counts = some()
    every_score_K = naive_scores(queries.repeat_interleave(counts, 0), keys, euclidean=euclidean).flatten(0, 1)
    mean_K, var_K, num_occurrences = score_moments(queries, keys, counts.double(), euclidean=euclidean)
    torch.testing.assert_close(mean_K, every_score_K.mean(0))
    torch.testing.assert_close(var_K, every_score_K.var(0, unbiased=False))
    assert num_occurrences == counts.sum()


@EUCLIDEAN
def test_score_moments_have_the_gradients_of_mean_and_variance(euclidean):
    queries, keys, counts = some()
    queries.requires_grad_(), keys.requires_grad_()
    mean_K, var_K, _ = score_moments(queries, keys, counts.double(), euclidean=euclidean)
    every_score_K = naive_scores(queries.repeat_interleave(counts, 0), keys, euclidean=euclidean).flatten(0, 1)
    weights = torch.arange(1.0, 6.0, dtype=torch.float64)
    ours = torch.autograd.grad((mean_K * weights).sum() + (var_K * weights).sum(), (queries, keys))
    naive = (every_score_K.mean(0) * weights).sum() + (every_score_K.var(0, unbiased=False) * weights).sum()
    for got, want in zip(ours, torch.autograd.grad(naive, (queries, keys)), strict=True):
        torch.testing.assert_close(got, want)


@EUCLIDEAN
def test_score_moments_of_no_rows_are_finite(euclidean):
    queries, keys, counts = some(num_rows=0)
    mean_K, _, num_occurrences = score_moments(queries, keys, counts.double(), euclidean=euclidean)
    assert torch.isfinite(mean_K).all()
    assert num_occurrences == 0


@EUCLIDEAN
@pytest.mark.parametrize("shape", [(9, 3, 5, 4), (1, 1, 2, 1), (33, 2, 17, 3), (0, 2, 4, 2)])
def test_encode_chooses_the_highest_score(euclidean, shape):
    queries, keys, _ = some(*shape, dtype=torch.float32)
    want = naive_scores(queries.double(), keys.double(), euclidean=euclidean).argmax(-1)
    assert torch.equal(encode(queries, keys, *identity(shape[2]), euclidean=euclidean), want)


@EUCLIDEAN
def test_encode_on_other_devices_equals_the_kernel_bit_for_bit(euclidean):
    queries, keys, _ = some(200, 4, 37, 4, dtype=torch.float32)
    normalisation = torch.rand(37) + 0.5, torch.randn(37)
    codes = [run(queries, keys, *normalisation, euclidean=euclidean) for run in (_encode_chunk, encode)]
    assert torch.equal(*codes)


@pytest.mark.parametrize("run", [encode, _encode_chunk])
def test_encode_gives_a_tie_to_the_lowest_code(run):
    keys = torch.randn(2, 40, 3).repeat(1, 2, 1)
    assert run(torch.randn(50, 2, 3), keys, *identity(80), euclidean=True).max() < 40


@pytest.mark.parametrize("run", [encode, _encode_chunk])
def test_encode_does_not_depend_on_the_batch(run):
    queries, keys, _ = some(64, 4, 256, 4, dtype=torch.float32)
    alone = torch.cat([run(row[None], keys, *identity(256), euclidean=False) for row in queries])
    assert torch.equal(alone, run(queries, keys, *identity(256), euclidean=False))


def test_score_norm_gives_each_code_zero_mean_and_unit_variance():
    queries, keys, counts = some(200)
    scale_K, shift_K = ScoreNorm(5, euclidean=False).double()(queries, keys, counts.double())
    normalised = naive_scores(queries.repeat_interleave(counts, 0), keys, euclidean=False) * scale_K + shift_K
    np.testing.assert_allclose(normalised.mean((0, 1)), 0, atol=1e-9)
    np.testing.assert_allclose(normalised.var((0, 1), unbiased=False), 1, atol=1e-4)


def test_score_norm_in_eval_uses_what_training_saw():
    norm = ScoreNorm(5, euclidean=False).double()
    queries, keys, counts = some(200)
    trained = norm(queries, keys, counts.double())
    evaluated = norm.eval()(queries[:3] + 9, keys, torch.ones(3).double())
    for got, want in zip(evaluated, trained, strict=True):
        torch.testing.assert_close(got, want)


def test_score_norm_averages_its_first_batches_plainly():
    norm, means = ScoreNorm(5, euclidean=False).double(), []
    for seed in range(4):
        queries, keys, counts = some(50, seed=seed)
        norm(queries, keys, counts.double())
        means.append(score_moments(queries, keys, counts.double(), euclidean=False)[0])
    torch.testing.assert_close(norm.mean_K, torch.stack(means).mean(0))


def test_score_norm_ignores_an_empty_batch():
    norm = ScoreNorm(5, euclidean=False).double()
    queries, keys, counts = some(50)
    norm(queries, keys, counts.double())
    before = norm.mean_K.clone()
    norm(queries[:0], keys, counts[:0].double())
    assert torch.equal(norm.mean_K, before)
