"""A trained table compressed by DPQ after the fact (DPQ paper, G.3). In: vectors_VE. Out: Stored.

The library's own quantizer learns to reconstruct the rows: its queries begin as the rows, keys and values as the
library begins them or by k-means of the rows, and all are trained on the squared error. What has the least error over
all rows counts. From k-means little is left to gain, since it has minimised the same error.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from dpq_rec import DPQConfig
from dpq_rec.codes import pack_codes
from dpq_rec.nn import Quantizer
from tests.benchmarks.quality.faiss_codes import decode
from tests.benchmarks.quality.stored import Stored

_BATCH_ROWS = 4096
_SAMPLE_ROWS = 1 << 16  # of the k-means that it starts with, as in `dpq_rec.nn.start`


@dataclasses.dataclass(frozen=True)
class Reconstruction:
    """DPQ trained to reconstruct.

    Attributes:
        config: method, D, K, L and the rest.
        num_epochs: passes over the rows.
        learning_rate: of Adam, for rows of length one; it grows with their length.
        start: of keys and values.
        seed: of the start and of the batches.
    """

    config: DPQConfig
    num_epochs: int = 40
    learning_rate: float = 0.001
    start: Literal["uniform", "kmeans"] = "kmeans"
    seed: int = 0

    def num_bytes(self, num_embeddings: int, embedding_dim: int) -> int:
        """Packed codes and values."""
        shape, value_bytes = (num_embeddings, embedding_dim), np.dtype(self.config.values_dtype).itemsize
        return self.config.layout.table_bytes(shape, value_bytes, share_subspaces=self.config.share_subspaces)

    def fit(self, vectors_VE: NDArray[np.float32]) -> Stored:
        """See the module."""
        rng = np.random.default_rng(self.seed)
        target_VE = torch.from_numpy(np.ascontiguousarray(vectors_VE))
        torch.manual_seed(self.seed)
        quantizer = Quantizer(target_VE.shape[1], self.config)
        if self.start == "kmeans":
            quantizer.start(target_VE[rng.permutation(len(target_VE))[:_SAMPLE_ROWS]], seed=self.seed)
        queries_VQ = torch.nn.Parameter(target_VE.clone())
        trained = [weight for weight in (queries_VQ, *quantizer.parameters()) if weight.requires_grad]
        optimizer = torch.optim.Adam(trained, lr=self.learning_rate * float(target_VE.norm(dim=1).mean()))
        best, least = self._stored(quantizer, queries_VQ), np.inf
        for epoch in range(self.num_epochs + 1):
            if epoch:
                self._epoch(quantizer, queries_VQ, target_VE, optimizer, rng)
            stored = self._stored(quantizer, queries_VQ)
            error = float(np.square(stored.vectors_VE - vectors_VE).mean())
            if error < least:
                best, least = stored, error
        return best

    def _epoch(
        self,
        quantizer: Quantizer,
        queries_VQ: torch.nn.Parameter,
        target_VE: torch.Tensor,
        optimizer: torch.optim.Optimizer,
        rng: np.random.Generator,
    ) -> None:
        quantizer.train()
        for rows_N in torch.from_numpy(rng.permutation(len(target_VE))).split(_BATCH_ROWS):
            quantized = quantizer(queries_VQ[rows_N], torch.ones(len(rows_N)))
            loss = functional.mse_loss(quantized.vectors_NE, target_VE[rows_N])
            optimizer.zero_grad()
            (loss + quantized.codebook_loss).backward()
            optimizer.step()

    @torch.no_grad()
    def _stored(self, quantizer: Quantizer, queries_VQ: torch.Tensor) -> Stored:
        quantizer.eval()
        layout = self.config.layout
        values_MKS = quantizer.stored_values().numpy().astype(self.config.values_dtype)
        packed_VW = pack_codes(quantizer.encode(queries_VQ).numpy(), layout)
        tensors = {"packed_codes": packed_VW, "values": values_MKS}
        return Stored(tensors=tensors, vectors_VE=decode(tensors, layout), layout=layout)
