"""An artifact's tables in the place of trained ones. In: KeyedJaggedTensor of rows. Out: KeyedTensor, as served."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional
from torchrec import KeyedJaggedTensor, KeyedTensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from dpq_rec import EmbeddingStore
from dpq_rec.lookup import decode_rows


class ServedTables(nn.Module):
    """Pooled vectors of an artifact: single values as they are, several averaged; an empty bag is zeros.

    Args:
        store: the artifact.
        tables: which of its tables, in the order that the model had them; a table's feature has its name.
    """

    def __init__(self, store: EmbeddingStore, tables: Sequence[str]) -> None:
        super().__init__()
        self.store, self.tables = store, list(tables)

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """The tables' configs, as TorchRec's models ask for them."""
        manifests = {name: self.store.table(name).manifest for name in self.tables}
        return [
            EmbeddingBagConfig(
                name=name,
                embedding_dim=manifest.embedding_dim,
                num_embeddings=manifest.num_embeddings,
                feature_names=[name],
            )
            for name, manifest in manifests.items()
        ]

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Pooled vectors [B, number of tables * E] of rows."""
        bags, pooled = features.to_dict(), []
        for name in self.tables:
            rows_T = bags[name].values()
            rows_N, at_T = torch.unique(rows_T, return_inverse=True)
            vectors_NE = torch.from_numpy(decode_rows(self.store.table(name), rows_N.cpu().numpy())).to(rows_T.device)
            offsets = bags[name].offsets()
            pooled.append(functional.embedding_bag(at_T, vectors_NE, offsets, mode="mean", include_last_offset=True))
        return KeyedTensor(self.tables, [each.shape[1] for each in pooled], torch.cat(pooled, dim=1))
