"""Constraints for TorchRec's planner, in one process: what the planner makes of them is checked by its own plan."""

import pytest
import torch
from torch import nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from dpq_rec import ConfigError
from dpq_rec.nn import DPQEmbedding, DPQEmbeddingBagCollection, subspace_constraints
from tests.dpq_rec.nn.modules import config, two_tables

META = torch.device("meta")


def plan(model, num_ranks):
    """Table -> columns of each shard, as TorchRec's planner cuts them."""
    planner = EmbeddingShardingPlanner(
        topology=Topology(world_size=num_ranks, compute_device="cpu"),
        constraints=subspace_constraints(model, num_ranks),
    )
    planned = planner.plan(model, [EmbeddingCollectionSharder()])
    return {
        name: [shard.shard_sizes[1] for shard in parameter.sharding_spec.shards]
        for module in planned.plan.values()
        for name, parameter in module.items()
    }


@pytest.mark.parametrize(
    ("num_ranks", "embedding_dim", "num_subspaces", "want"),
    [
        (2, 16, 4, [8, 8]),
        (2, 16, 2, [8, 8]),
        (4, 16, 4, [4, 4, 4, 4]),
        (4, 24, 6, [8, 8, 8]),  # 6 subspaces are not shared by 4
        (3, 16, 4, [8, 8]),
        (4, 16, 16, [4, 4, 4, 4]),
        (1, 12, 3, [12]),
    ],
)
def test_planner_cuts_between_subspaces(num_ranks, embedding_dim, num_subspaces, want):
    embedding = DPQEmbedding(100, embedding_dim, config(num_subspaces=num_subspaces), name="word", device=META)
    assert plan(nn.Sequential(embedding), num_ranks) == {"word": want}


def test_constraints_name_every_dpq_table_of_a_model():
    ids = DPQEmbeddingBagCollection(two_tables(EmbeddingBagConfig, 20), {"item": config(num_subspaces=2), "user": None})
    words = DPQEmbedding(100, 16, config(), name="a.word")
    found = subspace_constraints(nn.ModuleDict({"words": words, "ids": ids, "plain": nn.Embedding(4, 4)}), 2)
    assert {name: c.min_partition for name, c in found.items() if c.sharding_types == ["column_wise"]} == {
        "a_word": 8,
        "item": 4,
    }


@pytest.mark.parametrize(
    ("num_subspaces", "num_ranks", "message"),
    [
        (2, 2, "table 'table': got 2 subspaces in queries of 12 columns, want some that 2 to 2 shards can share"),
        (1, 4, "in multiples of 4 columns; shard it by rows instead"),
    ],
)
def test_constraints_refuse_tables_that_cannot_be_cut(num_subspaces, num_ranks, message):
    with pytest.raises(ConfigError, match=message):
        subspace_constraints(DPQEmbedding(9, 12, config(num_subspaces=num_subspaces)), num_ranks)


def test_constraints_refuse_tables_of_one_name_that_are_cut_differently():
    """TorchRec's planner goes by the name alone, and would cut one of them through a subspace."""
    words, tags = DPQEmbedding(9, 16, config()), DPQEmbedding(9, 24, config(num_subspaces=2))
    with pytest.raises(ConfigError, match="two tables are named 'table', to be cut every 8 and every 12 columns; name"):
        subspace_constraints(nn.Sequential(words, tags), 2)
    assert list(subspace_constraints(nn.Sequential(words, DPQEmbedding(5, 16, config())), 2)) == ["table"]
