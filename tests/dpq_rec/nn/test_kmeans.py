"""The data-driven start held to faiss, to what a start is for: a smaller error."""

import sys

import faiss
import numpy as np
import pytest
import torch

from dpq_rec import ConfigError, DPQConfig, MissingDependencyError
from dpq_rec.nn import Quantizer
from dpq_rec.nn.codebook import kmeans


def queries(num_rows=2000, embedding_dim=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, embedding_dim, generator=generator) @ torch.randn(8, 8, generator=generator)


def error(quantizer, queries_NQ):
    quantizer.eval()
    return ((quantizer.decode(quantizer.encode(queries_NQ)) - queries_NQ) ** 2).mean().item()


def test_start_reaches_the_error_of_faiss_product_quantization():
    rows = queries()
    quantizer = Quantizer(8, DPQConfig(method="vq", num_subspaces=2, num_codes=16, batch_norm=False))
    quantizer.start(rows)
    pq = faiss.ProductQuantizer(8, 2, 4)
    pq.train(rows.numpy())
    want = ((pq.decode(pq.compute_codes(rows.numpy())) - rows.numpy()) ** 2).mean()
    assert error(quantizer, rows) == pytest.approx(want, rel=0.05)


def test_start_of_levels_reaches_the_error_of_faiss_residual_quantization():
    rows = queries()
    quantizer = Quantizer(8, DPQConfig(method="vq", num_subspaces=1, num_codes=16, num_levels=3, batch_norm=False))
    quantizer.start(rows)
    rq = faiss.ResidualQuantizer(8, 3, 4)
    rq.max_beam_size = 1
    rq.train(rows.numpy())
    want = ((rq.decode(rq.compute_codes(rows.numpy())) - rows.numpy()) ** 2).mean()
    assert error(quantizer, rows) == pytest.approx(want, rel=0.1)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "vq"},
        {"method": "vq", "share_subspaces": True, "values_dtype": "float16"},
        {"method": "sx", "metric": "euclidean"},
        {"method": "sx", "metric": "cosine"},
        {"method": "sx", "num_levels": 2, "metric": "euclidean", "tie_keys": True},
    ],
    ids=str,
)
def test_start_brings_vectors_nearer_to_their_queries(options):
    rows = queries()
    quantizer = Quantizer(8, DPQConfig(num_subspaces=4, num_codes=16, **options))
    before = error(quantizer, rows)
    quantizer.train().start(rows)
    assert quantizer.training
    assert error(quantizer, rows) < 0.7 * before


def test_start_leaves_the_sample_s_statistics():
    """Its first statistics are the sample's, so that eval mode chooses as the first batch of training would."""
    rows = queries(300)
    quantizer = Quantizer(8, DPQConfig(method="vq", num_subspaces=4, num_codes=16, num_levels=2))
    quantizer.start(rows)
    assert torch.equal(quantizer.eval()(rows).codes_NM, quantizer.train()(rows).codes_NM)


def test_start_is_the_same_for_the_same_seed():
    first, again, other = (Quantizer(8, DPQConfig(method="vq", num_subspaces=2, num_codes=8)) for _ in range(3))
    first.start(queries(), seed=1), again.start(queries(), seed=1), other.start(queries(), seed=2)
    assert torch.equal(first.values_MKS, again.values_MKS)
    assert not torch.equal(first.values_MKS, other.values_MKS)


def test_start_takes_fewer_rows_than_codes():
    rows = queries(5)
    quantizer = Quantizer(8, DPQConfig(method="vq", num_subspaces=2, num_codes=8, batch_norm=False))
    quantizer.start(rows)
    assert error(quantizer, rows) == 0
    assert len(quantizer.values_MKS[0].unique(dim=0)) == 8


def test_spherical_centroids_have_length_one():
    found = kmeans(queries().view(-1, 2, 4), 8, shared=False, spherical=True, seed=0)
    np.testing.assert_allclose(found.norm(dim=-1), 1, atol=1e-5)


def test_shared_centroids_are_those_of_all_groups_together():
    groups = queries().view(-1, 2, 4)
    together = kmeans(groups.transpose(0, 1).reshape(-1, 1, 4), 8, shared=False, spherical=False, seed=0)
    assert torch.equal(kmeans(groups, 8, shared=True, spherical=False, seed=0), together)


@pytest.mark.parametrize("exponent", [-90, 60, 100])
@pytest.mark.parametrize("num_rows", [2000, 5])
@pytest.mark.parametrize("spherical", [False, True])
def test_centroids_of_any_finite_groups_are_those_of_groups_of_size_one(exponent, num_rows, spherical):
    """Their squares are infinite, or zero; faiss ends the process at those."""
    groups = queries(num_rows).view(-1, 2, 4)
    want = kmeans(groups, 8, shared=False, spherical=spherical, seed=0)
    got = kmeans(groups * 2.0**exponent, 8, shared=False, spherical=spherical, seed=0)
    is_scaled = not spherical or num_rows < 8
    assert torch.equal(got, want * 2.0**exponent if is_scaled else want)


@pytest.mark.parametrize("large", [1e19, 3.4e38])
def test_one_large_group_among_others_becomes_a_centroid(large):
    groups = queries().view(-1, 2, 4)
    groups[17, 0, 1] = -large
    found = kmeans(groups, 8, shared=False, spherical=False, seed=0)
    assert found.isfinite().all()
    assert torch.isclose(found[0, :, 1], torch.tensor(-large)).any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_centroids_refuse_groups_that_are_not_finite(bad):
    groups = queries().view(-1, 2, 4)
    groups[17, 0, 1] = bad
    with pytest.raises(ConfigError, match="k-means: got NaN or infinity in the group of row 17;"):
        kmeans(groups, 8, shared=False, spherical=False, seed=0)


@pytest.mark.parametrize("options", [{}, {"metric": "cosine"}, {"metric": "cosine", "tie_keys": True}], ids=str)
def test_start_suits_queries_of_any_length(options):
    """As torch's tables are often initialised: far shorter than the directions that cosine clusters."""
    rows = queries() * 0.02
    quantizer = Quantizer(8, DPQConfig(method="sx", num_subspaces=4, num_codes=16, **options))
    quantizer.start(rows)
    assert error(quantizer, rows) < 0.6 * (rows**2).mean()


def test_start_gives_own_values_the_means_of_the_queries_that_choose_them():
    rows = queries()
    quantizer = Quantizer(8, DPQConfig(method="sx", num_subspaces=2, num_codes=8, batch_norm=False))
    quantizer.start(rows)
    codes = quantizer.encode(rows)
    for d in range(2):
        for code in codes[:, d].unique():
            mean = rows[codes[:, d] == code, 4 * d : 4 * d + 4].mean(0)
            torch.testing.assert_close(quantizer.values_MKS.detach()[d, code], mean, rtol=1e-4, atol=1e-5)


def test_running_means_go_on_from_the_start():
    rows = queries()
    quantizer = Quantizer(8, DPQConfig(method="vq", num_subspaces=2, num_codes=16, ema_decay=0.99, batch_norm=False))
    quantizer.start(rows)
    before = quantizer.values_MKS.detach().clone()
    quantizer.train()(rows[:20] + 1)
    moved = (quantizer.values_MKS - before).norm(dim=-1)
    assert 0 < moved.max() < 0.05


def test_start_without_faiss_leaves_the_quantizer_as_it_was(monkeypatch):
    quantizer = Quantizer(8, DPQConfig(method="vq", num_subspaces=2, num_codes=8))
    quantizer(queries(50))
    state = {name: tensor.clone() for name, tensor in quantizer.eval().state_dict().items()}
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(MissingDependencyError, match=r"faiss.* pip install 'dpq-rec\[train\]'"):
        quantizer.start(queries())
    assert not quantizer.training
    assert all(torch.equal(tensor, state[name]) for name, tensor in quantizer.state_dict().items())
