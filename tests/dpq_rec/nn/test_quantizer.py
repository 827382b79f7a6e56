"""DPQ-SX and DPQ-VQ held to the paper's equations, written out as loops, and to finite differences."""

import pytest
import torch

from dpq_rec import DPQConfig
from dpq_rec.nn import Quantizer

METHODS = ["sx", "vq"]


def make(method, embedding_dim=12, num_subspaces=3, num_codes=5, **config):
    torch.manual_seed(0)
    quantizer = Quantizer(
        embedding_dim, DPQConfig(method=method, num_subspaces=num_subspaces, num_codes=num_codes, **config)
    )
    return quantizer, torch.randn(7, embedding_dim)


def normalised_scores(quantizer, queries_NE, counts_N):
    """Scores of every group and code, batch norm by torch over all occurrences."""
    keys = quantizer.keys_MKS
    groups = queries_NE.unflatten(1, (keys.shape[0], -1))
    if quantizer.config.method == "sx":
        raw = torch.stack([groups[:, d] @ keys[d].T for d in range(len(keys))], 1)
    else:
        raw = -torch.stack([torch.cdist(groups[:, d], keys[d]) ** 2 for d in range(len(keys))], 1)
    if not quantizer.config.batch_norm:
        return raw
    every = raw.repeat_interleave(counts_N.long(), 0)
    return (raw - every.mean((0, 1))) / (every.var((0, 1), unbiased=False) + quantizer.score_norms[0].epsilon).sqrt()


def soft_vectors(quantizer, queries_NE, counts_N):
    """T(Q | tau=1): the mixture of values by the softmax of the scores (DPQ paper, eq. 4)."""
    weights = normalised_scores(quantizer, queries_NE, counts_N).softmax(-1)
    return torch.cat([weights[:, d] @ quantizer.values_MKS[d] for d in range(weights.shape[1])], 1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize(
    ("embedding_dim", "num_subspaces", "num_codes"), [(12, 3, 5), (12, 12, 2), (12, 1, 300), (7, 7, 3)]
)
def test_quantizer_emits_the_value_of_the_best_code(method, batch_norm, embedding_dim, num_subspaces, num_codes):
    quantizer, queries = make(method, embedding_dim, num_subspaces, num_codes, batch_norm=batch_norm)
    counts = torch.arange(1.0, 8.0)
    got = quantizer(queries, counts)
    codes = normalised_scores(quantizer, queries, counts).argmax(-1)
    assert torch.equal(got.codes_NM, codes)
    for n in range(len(queries)):
        want = torch.cat([quantizer.values_MKS[d, codes[n, d]] for d in range(num_subspaces)])
        assert torch.equal(got.vectors_NE[n], want)


@pytest.mark.parametrize("batch_norm", [True, False])
def test_sx_has_the_gradient_of_the_soft_mixture(batch_norm):
    quantizer, queries = make("sx", batch_norm=batch_norm)
    quantizer.double()
    queries, counts = queries.double().requires_grad_(), torch.arange(1.0, 8.0).double()
    weights = torch.randn(7, 12, dtype=torch.float64)
    wanted_of = [queries, quantizer.keys_MKS, quantizer.values_MKS]
    got = torch.autograd.grad((quantizer(queries, counts).vectors_NE * weights).sum(), wanted_of)
    want = torch.autograd.grad((soft_vectors(quantizer, queries, counts) * weights).sum(), wanted_of)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


def test_sx_gradient_equals_finite_differences_of_the_soft_mixture():
    quantizer, queries = make("sx")
    quantizer.double()
    queries, counts = queries.double().requires_grad_(), torch.ones(7).double()
    weights = torch.randn(7, 12, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((quantizer(queries, counts).vectors_NE * weights).sum(), [queries])
    step = 1e-6
    for n, e in [(0, 0), (3, 5), (6, 11)]:
        nudge = torch.zeros_like(queries)
        nudge[n, e] = step
        up = (soft_vectors(quantizer, queries + nudge, counts) * weights).sum()
        down = (soft_vectors(quantizer, queries - nudge, counts) * weights).sum()
        torch.testing.assert_close(gradient[n, e], (up - down) / (2 * step), rtol=1e-5, atol=1e-8)


def test_vq_passes_the_gradient_straight_to_the_query():
    quantizer, queries = make("vq")
    queries.requires_grad_()
    weights = torch.randn(7, 12)
    gradients = torch.autograd.grad(
        (quantizer(queries).vectors_NE * weights).sum(), [queries, quantizer.values_MKS], allow_unused=True
    )
    assert torch.equal(gradients[0], weights)
    assert gradients[1] is None


def test_vq_penalty_is_the_mean_squared_distance_to_the_queries():
    quantizer, queries = make("vq", penalty_weight=0.5)
    queries.requires_grad_()
    counts = torch.arange(1.0, 8.0)
    quantized = quantizer(queries, counts)
    errors = (quantizer.decode(quantized.codes_NM) - queries.detach()).repeat_interleave(counts.long(), 0) ** 2
    torch.testing.assert_close(quantized.penalty, 0.5 * errors.mean())
    got = torch.autograd.grad(quantized.penalty, [quantizer.values_MKS, queries], allow_unused=True)
    torch.testing.assert_close(got[0], torch.autograd.grad(0.5 * errors.mean(), [quantizer.values_MKS])[0])
    assert got[1] is None


def test_sx_has_no_penalty():
    quantizer, queries = make("sx")
    assert quantizer(queries).penalty == 0


@pytest.mark.parametrize("method", METHODS)
def test_eval_mode_returns_the_very_bits_of_the_values(method):
    quantizer, queries = make(method)
    quantizer(queries)
    got = quantizer.eval()(queries)
    want = torch.cat([quantizer.values_MKS[d, got.codes_NM[:, d]] for d in range(3)], 1)
    assert torch.equal(got.vectors_NE, want)
    assert torch.equal(got.codes_NM, quantizer.encode(queries))


@pytest.mark.parametrize("method", METHODS)
def test_eval_mode_codes_do_not_depend_on_the_batch(method):
    quantizer, queries = make(method)
    quantizer(queries)
    quantizer.eval()
    alone = torch.cat([quantizer(row[None]).codes_NM for row in queries])
    assert torch.equal(alone, quantizer(queries).codes_NM)


def test_vq_takes_65536_codes():
    quantizer, queries = make("vq", embedding_dim=4, num_subspaces=2, num_codes=65_536)
    quantized = quantizer(queries)
    nearest = [torch.cdist(queries[:, 2 * d : 2 * d + 2], quantizer.keys_MKS[d]) for d in range(2)]
    assert quantized.codes_NM.shape == (7, 2)
    plain, _ = make("vq", embedding_dim=4, num_subspaces=2, num_codes=65_536, batch_norm=False)
    assert torch.equal(plain(queries).codes_NM, torch.stack(nearest, 1).argmin(-1))


@pytest.mark.parametrize("method", METHODS)
def test_quantizer_takes_no_rows(method):
    quantizer, queries = make(method)
    assert quantizer(queries[:0]).vectors_NE.shape == (0, 12)
