"""Models that are built on meta and made by DistributedModelParallel, each rank its part."""

import numpy as np
import pytest

from tests.distributed.cases import EMBEDDING_DIM, NUM_STEPS, SIZES
from tests.distributed.worker import BIG_TABLE, META

TABLE_BYTES = 4 * BIG_TABLE["num_embeddings"] * BIG_TABLE["embedding_dim"]
ELSE_BYTES = 100e6  # what a step, a chunk to freeze, and libraries take; less than half the table
UNIFORM_SPREAD = 3**-0.5  # standard deviation of a uniform variable within +-1


@pytest.mark.parametrize("sharding", META)
def test_statistics_of_the_scores_begin_at_mean_0_and_variance_1(runs, sharding):
    for rank in runs[2].report["meta"][sharding]["first"]:
        assert rank["norm means"] == [0]
        assert rank["norm variances"] == [1]


@pytest.mark.parametrize("sharding", META)
def test_keys_and_values_begin_the_same_on_all_ranks_and_not_as_zeros(runs, sharding):
    report = runs[2].report["meta"][sharding]
    assert report["differing at first"] == []
    assert [rank["zeros"] for rank in report["first"]] == [[], []]


@pytest.mark.parametrize("sharding", META)
def test_queries_begin_on_the_scale_of_the_keys_in_every_shard(runs, sharding):
    bound, ranks = EMBEDDING_DIM**-0.5, runs[2].report["meta"][sharding]["first"]
    assert any(rank["query bounds"] for rank in ranks)
    for rank in ranks:
        assert rank["table rows"] == {name: SIZES[name] for name in META[sharding].quantized}
        np.testing.assert_array_less(rank["query bounds"], bound * (1 + 1e-6))
        np.testing.assert_allclose(rank["query spreads"], bound * UNIFORM_SPREAD, rtol=0.15)


@pytest.mark.parametrize("sharding", META)
def test_it_trains_and_ranks_stay_together(runs, sharding):
    report = runs[2].report["meta"][sharding]
    assert np.isfinite(report["losses"]).all()
    assert len(report["losses"]) == NUM_STEPS
    assert report["differing"] == []


def test_a_rank_grows_by_its_part_of_a_table_and_never_holds_the_whole(runs):
    """Peak memory through construction, a step and freeze; the single rank shows that the figure sees a table."""
    (alone,) = runs[1].report["growth"]
    assert TABLE_BYTES < alone < TABLE_BYTES + ELSE_BYTES
    for growth in runs[2].report["growth"]:
        assert TABLE_BYTES / 2 < growth < TABLE_BYTES / 2 + ELSE_BYTES
