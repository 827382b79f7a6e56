"""Training side of DPQ: the only part that imports torch and torchrec.

`quantizer` loops over the `level`s of a `codebook`, and `estimators` let gradients pass; `tables` look rows up, for
`embedding` and `collection`; `model` finds the tables of a model and warms them up, for `replace` and `freeze`.
`shards`, `tracing` and `recompute` are for what is done to a model: sharding, graph capture, checkpointing.
"""

try:
    import torch  # noqa: F401
    import torchrec  # noqa: F401
except ImportError as error:
    from dpq_rec.errors import MissingDependencyError

    raise MissingDependencyError(
        f"{error.name}, which dpq_rec.nn needs (torchrec after the extra: pip install --no-deps torchrec==1.8.0),",
        "train",
    ) from error

from dpq_rec.nn.collection import DPQEmbeddingBagCollection, DPQEmbeddingCollection
from dpq_rec.nn.embedding import DPQEmbedding, DPQEmbeddingBag, TiedLinear
from dpq_rec.nn.freeze import freeze
from dpq_rec.nn.model import start, subspace_constraints, warm_up
from dpq_rec.nn.quantizer import Quantized, Quantizer
from dpq_rec.nn.replace import replace_embeddings

__all__ = [
    "DPQEmbedding",
    "DPQEmbeddingBag",
    "DPQEmbeddingBagCollection",
    "DPQEmbeddingCollection",
    "Quantized",
    "Quantizer",
    "TiedLinear",
    "freeze",
    "replace_embeddings",
    "start",
    "subspace_constraints",
    "warm_up",
]
