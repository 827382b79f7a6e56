"""Awkward shapes of queries and codes; what the method computes is held to loops in test_method."""

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
    keys = quantizer.values_MKS if quantizer.own_keys_MKS is None else quantizer.own_keys_MKS
    groups = queries_NE.unflatten(1, (keys.shape[0], -1))
    if quantizer.config.method == "sx":
        raw = torch.stack([groups[:, d] @ keys[d].T for d in range(len(keys))], 1)
    else:
        raw = -torch.stack([torch.cdist(groups[:, d], keys[d]) ** 2 for d in range(len(keys))], 1)
    if not quantizer.config.batch_norm:
        return raw
    every = raw.repeat_interleave(counts_N.long(), 0)
    return (raw - every.mean((0, 1))) / (every.var((0, 1), unbiased=False) + quantizer.score_norms[0].epsilon).sqrt()


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


def test_sx_has_no_codebook_loss():
    quantizer, queries = make("sx")
    assert quantizer(queries).codebook_loss == 0


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
    nearest = [torch.cdist(queries[:, 2 * d : 2 * d + 2], quantizer.values_MKS[d]) for d in range(2)]
    assert quantized.codes_NM.shape == (7, 2)
    plain, _ = make("vq", embedding_dim=4, num_subspaces=2, num_codes=65_536, batch_norm=False)
    assert torch.equal(plain(queries).codes_NM, torch.stack(nearest, 1).argmin(-1))


@pytest.mark.parametrize("method", METHODS)
def test_quantizer_takes_no_rows(method):
    quantizer, queries = make(method)
    assert quantizer(queries[:0]).vectors_NE.shape == (0, 12)


def test_a_forward_that_waits_for_its_backward_keeps_what_it_compared():
    """Revival in a second forward writes keys and values; the first one's gradient must not see it."""

    def gradient(*, second_forward):
        quantizer, queries = make("sx", revive_after=1, batch_norm=False)
        queries.requires_grad_()
        waiting = quantizer(queries[:1]).vectors_NE  # one row leaves most codes idle
        keys = quantizer.own_keys_MKS.detach().clone()
        if second_forward:
            quantizer(torch.randn(50, 12))
            assert not torch.equal(quantizer.own_keys_MKS, keys), "nothing was revived"
        return torch.autograd.grad(waiting.square().sum(), [queries, quantizer.own_keys_MKS, quantizer.values_MKS])

    for got, want in zip(gradient(second_forward=True), gradient(second_forward=False), strict=True):
        assert torch.equal(got, want)


def test_training_forward_without_gradients_builds_no_graph():
    quantizer, queries = make("sx")
    with torch.no_grad():
        assert not quantizer(queries).vectors_NE.requires_grad
