"""Rows with the first levels only: what reaches which level. Formulas: test_method; frozen: test_frozen_options."""

import dataclasses

import pytest
import torch

from dpq_rec import ConfigError, DPQConfig
from dpq_rec.nn import DPQEmbedding, Quantizer, start
from dpq_rec.nn.codebook import kmeans
from dpq_rec.nn.level import Level
from dpq_rec.nn.quantizer import NO_CODE
from tests.dpq_rec.nn.modules import queries as queries_of

V, E = 40, 6
CONFIG = DPQConfig(method="vq", num_subspaces=3, num_codes=4, num_levels=5, tiers=((0.25, 3), (0.5, 1)))
STARTS = (0, 10, 20, V)  # rows of each tier
ALL_ROWS = torch.arange(V)


def make(**changes):
    torch.manual_seed(0)
    return Quantizer(E, dataclasses.replace(CONFIG, **changes), num_embeddings=V), torch.randn(V, E)


@pytest.mark.parametrize("method", ["sx", "vq"])
@pytest.mark.parametrize("shared", [False, True])
def test_eval_mode_gives_each_tier_what_a_quantizer_of_its_levels_gives(method, shared):
    """The others have the same keys, values and statistics, of the first levels."""
    quantizer, queries = make(method=method, share_subspaces=shared)
    quantizer(queries, rows_N=ALL_ROWS)
    got = quantizer.eval()(queries, rows_N=ALL_ROWS)
    for tier, num_levels in enumerate((5, 3, 1)):
        rows = slice(STARTS[tier], STARTS[tier + 1])
        plain = Quantizer(E, dataclasses.replace(quantizer.config, num_levels=num_levels, tiers=())).eval()
        state = quantizer.state_dict()
        plain.load_state_dict(
            {
                name: state[name][: len(own)] if own.dim() > 1 else state[name]
                for name, own in plain.state_dict().items()
            }
        )
        want = plain(queries[rows])
        assert torch.equal(got.codes_NM[rows, : 3 * num_levels], want.codes_NM)
        assert (got.codes_NM[rows, 3 * num_levels :] == NO_CODE).all()
        assert got.vectors_NE[rows].detach().numpy().tobytes() == want.vectors_NE.detach().numpy().tobytes()


@pytest.mark.parametrize("rows", [[3], [39], [9, 10], [19, 20, 21], [0, 10, 20, 39], []])
def test_a_rows_vector_does_not_depend_on_the_rows_beside_it(rows):
    quantizer, queries = make()
    quantizer.eval()
    rows_N = torch.tensor(rows, dtype=torch.int64)
    assert torch.equal(
        quantizer(queries[rows_N], rows_N=rows_N).vectors_NE, quantizer(queries, rows_N=ALL_ROWS).vectors_NE[rows_N]
    )


def test_training_asks_no_level_for_rows_that_lack_it(monkeypatch):
    quantizer, queries = make(ema_decay=0.9, revive_after=1)
    choose, compared = Level.choose, []

    def counted(self, residual_NDS, *more):
        compared.append(len(residual_NDS))
        return choose(self, residual_NDS, *more)

    monkeypatch.setattr(Level, "choose", counted)
    quantizer(queries, rows_N=ALL_ROWS)
    quantizer.eval()(queries, rows_N=ALL_ROWS)
    assert compared == [40, 20, 20, 10, 10] * 2


def test_running_means_of_a_level_are_of_the_rows_that_have_it():
    quantizer, queries = make(ema_decay=0.75)
    quantizer(queries, torch.full((V,), 2.0), ALL_ROWS)
    of_levels = quantizer.running_means.counts_MK.view(5, 3, 4).sum(2)  # a quarter of the occurrences of a batch
    assert torch.equal(of_levels, torch.tensor([20.0, 10, 10, 5, 5])[:, None].expand(5, 3))


def test_revived_codes_are_placed_on_rows_that_have_the_level():
    """Queries of the last tier are far from all others: none of them may be found in a later level."""
    quantizer, queries = make(revive_after=1, batch_norm=False, num_codes=30)
    queries[20:] += 1000
    for _ in range(4):
        quantizer(queries, rows_N=ALL_ROWS)
    assert quantizer.values_MKS.data[:3].max() > 900
    assert quantizer.values_MKS.data[3:].abs().max() < 100


def test_start_places_a_level_by_the_rows_that_have_it():
    torch.manual_seed(0)
    module = DPQEmbedding(V, E, dataclasses.replace(CONFIG, batch_norm=False))
    start(module, seed=3)
    quantizer, rest = module.only_quantizer, queries_of(module).detach().view(V, 3, 2)
    for level, num_rows in enumerate((40, 20, 20, 10, 10)):
        rest = rest[:num_rows]
        placed = quantizer.values_MKS.detach()[3 * level : 3 * level + 3]
        found = kmeans(rest, 4, shared=False, spherical=False, seed=3 + level)
        torch.testing.assert_close(placed, found)
        nearest = torch.cdist(rest.transpose(0, 1), placed).argmin(2)  # [D, N]
        rest = rest - torch.stack([placed[d, nearest[d]] for d in range(3)], 1)


def test_start_leaves_a_level_alone_that_no_sampled_row_has():
    quantizer, queries = make()
    before = quantizer.values_MKS.detach().clone()
    quantizer.start(queries[20:], ALL_ROWS[20:])
    changed = (quantizer.values_MKS != before).flatten(1).any(1)
    assert changed.tolist() == [True] * 3 + [False] * 12


def test_levels_that_no_row_of_a_batch_has_learn_nothing_and_stay_finite():
    quantizer, queries = make(commitment_weight=0.25, value_gradient=True)
    rows = ALL_ROWS[20:]
    found = quantizer(queries[20:].requires_grad_(), None, rows)
    (found.vectors_NE.square().sum() + found.codebook_loss).backward()
    gradient = quantizer.values_MKS.grad
    assert gradient.isfinite().all()
    assert gradient[:3].any()
    assert not gradient[3:].any()


def test_tiers_want_the_number_of_rows_and_the_rows():
    with pytest.raises(ConfigError, match="num_embeddings: got none with tiers"):
        Quantizer(E, CONFIG)
    quantizer, queries = make()
    with pytest.raises(ConfigError, match="rows_N: got none with tiers"):
        quantizer(queries)
    with pytest.raises(ConfigError, match="rows_N: got none with tiers"):
        quantizer.encode(queries)
