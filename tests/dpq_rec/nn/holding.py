"""TorchRec's modules around a collection, in small, with a batch for each."""

import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingCollection
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig, PoolingType
from torchrec.modules.embedding_tower import EmbeddingTower, EmbeddingTowerCollection
from torchrec.modules.feature_processor_ import PositionWeightedModule, PositionWeightedModuleCollection
from torchrec.modules.fp_embedding_modules import FeatureProcessedEmbeddingBagCollection
from torchrec.modules.itep_embedding_modules import ITEPEmbeddingBagCollection, ITEPEmbeddingCollection
from torchrec.modules.itep_modules import GenericITEPModule
from torchrec.modules.mc_embedding_modules import (
    ManagedCollisionEmbeddingBagCollection,
    ManagedCollisionEmbeddingCollection,
)
from torchrec.modules.mc_modules import (
    DistanceLFU_EvictionPolicy,
    ManagedCollisionCollection,
    MCHManagedCollisionModule,
)
from torchrec.modules.pec_embedding_modules import PECEmbeddingCollection

ROWS, DIM, LONGEST = 20, 8, 4
FEATURES = {"item": ["item", "old"], "user": ["user"]}


def tables(kind):
    more = {"pooling": PoolingType.SUM} if kind is EmbeddingBagConfig else {}
    return [
        kind(name=name, num_embeddings=ROWS, embedding_dim=DIM, feature_names=features, **more)
        for name, features in FEATURES.items()
    ]


def bags(*, is_weighted=False):
    return EmbeddingBagCollection(tables=tables(EmbeddingBagConfig), is_weighted=is_weighted)


def ids():
    return EmbeddingCollection(tables=tables(EmbeddingConfig))


class Sums(nn.Module):
    """What a tower makes of a collection's vectors: bags [B, F * E]."""

    def __init__(self):
        super().__init__()
        self.over = nn.Linear(3 * DIM, 3 * DIM)

    def forward(self, looked):
        return self.over(side_by_side(looked))


def side_by_side(looked):
    """The features' pooled vectors [B, F * E] of what a collection returned."""
    if not isinstance(looked, dict):
        return looked.values()
    return torch.cat([looked[name].to_padded_dense(LONGEST).sum(1) for name in ("item", "old", "user")], 1)


def _positions():
    return {name: PositionWeightedModule(LONGEST) for names in FEATURES.values() for name in names}


def _position_collection():
    return PositionWeightedModuleCollection({name: LONGEST for names in FEATURES.values() for name in names})


HELD = {
    "feature processors": lambda: FeatureProcessedEmbeddingBagCollection(bags(is_weighted=True), _positions()),
    "a collection of processors": lambda: FeatureProcessedEmbeddingBagCollection(
        bags(is_weighted=True), _position_collection()
    ),
    "tower of bags": lambda: EmbeddingTower(bags(), Sums()),
    "tower of ids": lambda: EmbeddingTower(ids(), Sums()),
    "towers": lambda: EmbeddingTowerCollection([EmbeddingTower(bags(), Sums())]),
    "priorities": lambda: PECEmbeddingCollection(ids()),
}


def _managed(collection, kind):
    bags = isinstance(collection, EmbeddingBagCollection)
    configs = collection.embedding_bag_configs() if bags else collection.embedding_configs()
    collisions = ManagedCollisionCollection(
        {
            table.name: MCHManagedCollisionModule(
                zch_size=ROWS,
                device=torch.device("cpu"),
                eviction_policy=DistanceLFU_EvictionPolicy(),
                eviction_interval=2,
                input_hash_size=1000,
            )
            for table in configs
        },
        configs,
    )
    return kind(collection, collisions)


def _pruning():
    return GenericITEPModule(
        table_name_to_unpruned_hash_sizes=dict.fromkeys(FEATURES, 2 * ROWS),
        lookups=None,
        enable_pruning=False,
    )


REFUSED = {
    "managed collisions of bags": lambda: _managed(bags(), ManagedCollisionEmbeddingBagCollection),
    "managed collisions of ids": lambda: _managed(ids(), ManagedCollisionEmbeddingCollection),
    "pruning of bags": lambda: ITEPEmbeddingBagCollection(bags(), _pruning()),
    "pruning of ids": lambda: ITEPEmbeddingCollection(ids(), _pruning()),
}
