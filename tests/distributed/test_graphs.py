"""What rewrites, wraps or reruns a replaced model has the losses of the plain loop, on one rank and on two."""

import numpy as np
import pytest

from tests.distributed.graphs import PIPELINES, REPLACED
from tests.dpq_rec.nn.holding import HELD

TOLERANCE = {"rtol": 0, "atol": 1e-5}


def graphs(runs, world_size):
    return runs[world_size].report["graphs"]


@pytest.mark.parametrize("tables", REPLACED)
@pytest.mark.parametrize("pipeline", PIPELINES)
def test_a_train_pipeline_has_the_losses_of_the_plain_loop(runs, pipeline, tables):
    said = graphs(runs, 2)["pipelines"][tables]
    assert said[pipeline][0] == said["plain"][0]
    assert len(set(said["plain"][0])) > 1, "it learns nothing that could differ"


@pytest.mark.parametrize("tables", REPLACED)
def test_an_eval_pipeline_has_the_losses_of_the_plain_loop(runs, tables):
    said = graphs(runs, 2)["pipelines"][tables]
    assert said["eval"][0] == said["plain eval"][0]
    assert said["eval"][0] != said["plain"][0]


@pytest.mark.parametrize("pipeline", sorted(set(PIPELINES) - {"base"}))
def test_ids_of_stock_collections_beside_replaced_ones_are_sent_ahead(runs, pipeline):
    assert graphs(runs, 2)["pipelines"]["one table of two"][pipeline][1] == ["ids"]


@pytest.mark.parametrize("tables", REPLACED)
def test_a_pipeline_on_two_ranks_has_the_losses_of_one(runs, tables):
    one, two = (graphs(runs, size)["pipelines"][tables]["sparse dist"][0] for size in (1, 2))
    np.testing.assert_allclose(two, one, **TOLERANCE)


@pytest.mark.parametrize("name", HELD)
def test_a_replaced_holder_on_two_ranks_has_the_losses_of_one(runs, name):
    one, two = (graphs(runs, size)["holders"][name] for size in (1, 2))
    np.testing.assert_allclose(two, one, **TOLERANCE)


@pytest.mark.parametrize("way", ["reentrant", "not reentrant"])
def test_a_sharded_model_trains_by_checkpointing_as_without(runs, way):
    said = graphs(runs, 2)["checkpointing"]
    assert said[way] == said["plain"]


@pytest.mark.parametrize("way", ["DDP", "FSDP", "FSDP's wrapper"])
def test_data_parallel_training_on_two_ranks_has_the_losses_of_one(runs, way):
    one, two = (graphs(runs, size)["data parallel"] for size in (1, 2))
    np.testing.assert_allclose(two[way], one["DDP"], **TOLERANCE)


def test_a_model_under_fsdp_is_served_as_it_returned_vectors(runs):
    assert graphs(runs, 2)["data parallel"]["served as FSDP returned it"]
