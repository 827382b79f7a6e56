"""Training side of DPQ: the only place that imports torch and torchrec.

`quantizer` (with `scores` and `collectives` below it), then `embedding`, then `freeze`.
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

from dpq_rec.nn.embedding import DPQEmbeddingBagCollection
from dpq_rec.nn.freeze import freeze
from dpq_rec.nn.quantizer import Quantized, Quantizer

__all__ = ["DPQEmbeddingBagCollection", "Quantized", "Quantizer", "freeze"]
