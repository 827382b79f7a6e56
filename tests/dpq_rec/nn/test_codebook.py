"""Running means and revival, held to their formulas as loops. Two ranks against one: tests/distributed."""

import numpy as np
import pytest
import torch

from dpq_rec import DPQConfig
from dpq_rec.nn import Quantizer
from dpq_rec.nn.codebook import Revival


def make(embedding_dim=6, num_subspaces=3, num_codes=4, **config):
    torch.manual_seed(0)
    config = DPQConfig(num_subspaces=num_subspaces, num_codes=num_codes, **config)
    return Quantizer(embedding_dim, config)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("num_levels", [1, 2])
def test_values_follow_the_running_means_of_their_queries(shared, num_levels):
    quantizer = make(method="vq", ema_decay=0.75, share_subspaces=shared, num_levels=num_levels, batch_norm=False)
    counts = np.zeros(quantizer.values_MKS.shape[:2])
    sums = np.zeros(quantizer.values_MKS.shape)
    want = quantizer.values_MKS.detach().double().numpy().copy()
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        queries = torch.randn(9, 6, generator=generator)
        occurrences = torch.randint(1, 4, (9,), generator=generator)
        values, codes = quantizer.values_MKS.detach().clone(), quantizer(queries, occurrences.float()).codes_NM
        new_counts, new_sums = np.zeros_like(counts), np.zeros_like(sums)
        for n in range(9):
            for d in range(3):
                rest = queries[n, 2 * d : 2 * d + 2]
                for level in range(num_levels):
                    group, code = (level if shared else level * 3 + d), codes[n, level * 3 + d]
                    new_counts[group, code] += occurrences[n].item()
                    new_sums[group, code] += (occurrences[n] * rest).numpy()
                    rest = rest - values[group, code]
        counts, sums = 0.75 * counts + 0.25 * new_counts, 0.75 * sums + 0.25 * new_sums
        chosen = new_counts > 0
        want[chosen] = sums[chosen] / counts[chosen][:, None]
        np.testing.assert_allclose(quantizer.values_MKS.detach(), want, rtol=0, atol=1e-5)
    assert not quantizer.values_MKS.requires_grad


def test_first_batch_makes_each_value_the_mean_of_its_queries():
    quantizer = make(method="vq", ema_decay=0.99, batch_norm=False)
    queries = torch.randn(40, 6)
    codes = quantizer(queries).codes_NM
    for d in range(3):
        for code in codes[:, d].unique():
            mean = queries[codes[:, d] == code, 2 * d : 2 * d + 2].mean(0)
            torch.testing.assert_close(quantizer.values_MKS.detach()[d, code], mean)


def far_away(quantizer, group, code):
    """Put a key where no query goes."""
    keys = quantizer.values_MKS if quantizer.own_keys_MKS is None else quantizer.own_keys_MKS
    keys.data[group, code] = 100.0


REVIVED = [
    {"method": "vq", "batch_norm": False},
    {"method": "vq", "ema_decay": 0.9, "batch_norm": False},
    {"method": "vq", "num_levels": 2, "batch_norm": False, "share_subspaces": True},
    {"method": "sx", "metric": "euclidean", "batch_norm": False},
]


@pytest.mark.parametrize("options", REVIVED, ids=str)
def test_a_code_that_no_row_chooses_is_revived_on_a_query(options):
    quantizer = make(revive_after=3, **options)
    queries = torch.randn(50, 6)
    quantizer.start(queries)
    far_away(quantizer, 0, 2)
    for _ in range(3):
        assert 2 not in quantizer(queries).codes_NM[:, 0]
    revived = quantizer(queries)
    first_level = revived.codes_NM[:, : 3 if options.get("share_subspaces") else 1]
    assert (first_level == 2).any()
    placed = (quantizer.values_MKS if quantizer.own_keys_MKS is None else quantizer.own_keys_MKS)[0, 2]
    groups = queries.view(-1, 2) if options.get("share_subspaces") else queries[:, :2]
    if "ema_decay" not in options:  # a running mean moves on at once, to the mean of those that chose it
        assert (groups == placed).all(1).any()
    assert (quantizer.values_MKS.abs() < 50).all()


def test_a_code_in_use_stays_where_it_is():
    quantizer = make(method="vq", revive_after=1, batch_norm=False)
    queries = torch.randn(50, 6)
    quantizer.start(queries)
    before = quantizer.values_MKS.detach().clone()
    for _ in range(3):
        quantizer(queries)
    assert torch.equal(quantizer.values_MKS, before)


def test_a_revived_key_emits_what_its_query_got_before():
    """DPQ-SX has values apart: the new key must not change what the row it was placed on returns."""
    quantizer = make(method="sx", metric="euclidean", revive_after=1, batch_norm=False)
    queries = torch.randn(50, 6)
    quantizer.start(queries)
    quantizer.values_MKS.data.normal_()
    far_away(quantizer, 0, 2)
    before = quantizer(queries).vectors_NE
    after = quantizer(queries)
    moved = after.codes_NM[:, 0] == 2
    on_it = (queries[:, :2] == quantizer.own_keys_MKS[0, 2]).all(1)
    assert moved[on_it].all()
    assert torch.equal(after.vectors_NE[on_it], before[on_it])


def test_revival_resets_what_the_running_mean_remembers():
    quantizer = make(method="vq", ema_decay=0.9, revive_after=1, batch_norm=False)
    queries = torch.randn(50, 6)
    quantizer.start(queries)
    quantizer.running_means.counts_MK[0, 2], quantizer.running_means.sums_MKS[0, 2] = 1e6, 1e8
    far_away(quantizer, 0, 2)
    quantizer(queries)
    codes = quantizer(queries).codes_NM
    members = queries[codes[:, 0] == 2, :2]
    torch.testing.assert_close(quantizer.values_MKS.detach()[0, 2], members.mean(0))


def test_revival_waits_where_a_batch_is_empty():
    quantizer = make(method="vq", revive_after=1, batch_norm=False)
    for _ in range(3):
        quantizer(torch.randn(0, 6))
    assert (quantizer.revival.idle_MK == 3).all()


@pytest.mark.parametrize("num_queries", [1, 5, 12])
def test_draw_takes_every_row_once_before_any_comes_again(num_queries):
    queries = torch.arange(5.0)[:, None, None].expand(5, 2, 3)
    drawn = Revival((2, 4), 1).draw(queries, num_queries)[:, 0, 0].tolist()
    assert len(drawn) == num_queries
    assert len(set(drawn[:5])) == min(num_queries, 5)
    assert set(drawn) <= {0.0, 1.0, 2.0, 3.0, 4.0}


def test_upkeep_survives_a_state_dict():
    quantizer = make(method="vq", ema_decay=0.9, revive_after=5)
    for _ in range(3):
        quantizer(torch.randn(20, 6))
    other = make(method="vq", ema_decay=0.9, revive_after=5)
    other.load_state_dict(quantizer.state_dict())
    queries = torch.randn(20, 6)
    for _ in range(4):
        quantizer(queries), other(queries)
    for name, tensor in quantizer.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
