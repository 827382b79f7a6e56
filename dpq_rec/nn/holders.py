"""TorchRec's modules around a collection. In: a model. Out: holders whose collection can be replaced, or a refusal.

A sharder takes a module of exactly its type, with the stock collection in it, as a whole. A subclass that changes
nothing is no such module: DistributedModelParallel then shards what is in it, and trains the rest data parallel.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torchrec.modules.embedding_tower import EmbeddingTower, EmbeddingTowerCollection
from torchrec.modules.fp_embedding_modules import FeatureProcessedEmbeddingBagCollection
from torchrec.modules.itep_embedding_modules import ITEPEmbeddingBagCollection, ITEPEmbeddingCollection
from torchrec.modules.mc_embedding_modules import BaseManagedCollisionEmbeddingCollection
from torchrec.modules.pec_embedding_modules import PECEmbeddingCollection

from dpq_rec.errors import ConfigError

_REFUSED: dict[type[nn.Module], str] = {
    BaseManagedCollisionEmbeddingCollection: "gives rows to other ids",
    ITEPEmbeddingBagCollection: "prunes rows",
    ITEPEmbeddingCollection: "prunes rows",
}


class DPQFeatureProcessedEmbeddingBagCollection(FeatureProcessedEmbeddingBagCollection):
    """TorchRec's, around a DPQEmbeddingBagCollection."""


class DPQEmbeddingTower(EmbeddingTower):
    """TorchRec's, around a DPQ collection."""


class DPQEmbeddingTowerCollection(EmbeddingTowerCollection):
    """TorchRec's, around DPQ collections."""


class DPQPECEmbeddingCollection(PECEmbeddingCollection):
    """TorchRec's, around a DPQEmbeddingCollection; rows are sent as by any other, without priorities."""


_DPQ: dict[type[nn.Module], type[nn.Module]] = {
    FeatureProcessedEmbeddingBagCollection: DPQFeatureProcessedEmbeddingBagCollection,
    EmbeddingTower: DPQEmbeddingTower,
    EmbeddingTowerCollection: DPQEmbeddingTowerCollection,
    PECEmbeddingCollection: DPQPECEmbeddingCollection,
}


def holders_of(model: nn.Module, tables: Mapping[int, str]) -> list[nn.Module]:
    """The modules to hand to `hold_dpq` once what they hold was replaced.

    Args:
        model: plain.
        tables: id of each collection that is to be replaced -> one of its tables that are.

    Raises:
        ConfigError: one is in a module whose sharded form does more than to look rows up.
    """
    holders = []
    for path, module in model.named_modules():
        held = next((tables[id(inner)] for inner in module.modules() if id(inner) in tables), None)
        if held is None:
            continue
        for kind, does in _REFUSED.items():
            if isinstance(module, kind):
                raise ConfigError(
                    f"table {held!r}: got a {type(module).__name__} around it at {path or 'the model'}, which {does} "
                    "while it trains, and a DPQ table cannot follow; name the other tables (tables=...), or map ids to "
                    "rows before a plain collection"
                )
        if type(module) in _DPQ:
            holders.append(module)
    return holders


def hold_dpq(holder: nn.Module) -> None:
    """Make a module of the subclass that DistributedModelParallel does not take as a whole."""
    holder.__class__ = _DPQ[type(holder)]
