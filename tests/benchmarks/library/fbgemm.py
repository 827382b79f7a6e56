"""FBGEMM's quantized tables on CPU. In: sizes. Out: lookups, to be timed beside ours.

What TorchRec serves on CPU with. Rows of random bytes: what they hold makes no difference to how fast they are found.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen
from numpy.typing import NDArray

PACKAGE = "fbgemm-gpu-cpu"
_TYPES = {"int8": SparseType.INT8, "int4": SparseType.INT4}


def lookups(num_embeddings: int, embedding_dim: int, num_ids: int) -> dict[str, Callable[[NDArray[np.int64]], Any]]:
    """Name -> what gives fp32 vectors of `num_ids` rows; each width in both forms, as neither is always the faster.

    One form has no bags; the other has bags of one id, for which FBGEMM generates machine code.
    """
    by_name = {}
    for bits, weights in _TYPES.items():
        spec = ("table", num_embeddings, embedding_dim, weights, EmbeddingLocation.HOST)
        for form, pooling in (("", PoolingMode.NONE), (", bags of one", PoolingMode.SUM)):
            table = IntNBitTableBatchedEmbeddingBagsCodegen(
                [spec], pooling_mode=pooling, output_dtype=SparseType.FP32, device="cpu"
            )
            table.fill_random_weights()
            ends = torch.arange(num_ids + 1) if form else torch.tensor([0, num_ids])
            by_name[f"fbgemm {bits}{form}"] = _lookup(table, ends)
    return by_name


def _lookup(table: Any, ends: torch.Tensor) -> Callable[[NDArray[np.int64]], Any]:
    return lambda rows_N: table(torch.from_numpy(rows_N), ends)
