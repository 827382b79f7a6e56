"""An artifact's tables as modules, in place of trained ones. In: rows, as those take them. Out: vectors, as served."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional
from torchrec import KeyedJaggedTensor, KeyedTensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from dpq_rec import EmbeddingStore
from dpq_rec.table import Table


class ServedTable(nn.Module):
    """A table in the place of nn.Embedding and of nn.EmbeddingBag, which averages.

    Args:
        table: of an artifact.
    """

    def __init__(self, table: Table) -> None:
        super().__init__()
        self.table = table

    def forward(self, rows: torch.Tensor, offsets_B: torch.Tensor | None = None) -> torch.Tensor:
        """Vectors [..., E] of rows [...] (int64); given where each of B bags begins, their means [B, E].

        The mean of an empty bag is zeros.
        """
        rows_N, at = torch.unique(rows, return_inverse=True)
        vectors_NE = torch.from_numpy(self.table.decode(rows_N.cpu().numpy())).to(rows.device)
        return vectors_NE[at] if offsets_B is None else functional.embedding_bag(at, vectors_NE, offsets_B, mode="mean")


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
        bags = features.to_dict()
        pooled = [
            ServedTable(self.store.table(name))(bags[name].values(), bags[name].offsets()[:-1]) for name in self.tables
        ]
        return KeyedTensor(self.tables, [each.shape[1] for each in pooled], torch.cat(pooled, dim=1))
