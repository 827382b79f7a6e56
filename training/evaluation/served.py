"""An artifact's tables in the place of trained ones. In: rows, as those take them. Out: vectors, as served."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional
from torchrec import KeyedJaggedTensor, KeyedTensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from dpq_rec import EmbeddingStore
from dpq_rec.table import Table


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
            vectors_NE, at_T = _distinct_vectors(self.store.table(name), bags[name].values())
            offsets = bags[name].offsets()
            pooled.append(functional.embedding_bag(at_T, vectors_NE, offsets, mode="mean", include_last_offset=True))
        return KeyedTensor(self.tables, [each.shape[1] for each in pooled], torch.cat(pooled, dim=1))


class ServedEmbedding(nn.Module):
    """Vectors [..., E] of rows [...], as nn.Embedding gives them.

    Args:
        table: of an artifact.
    """

    def __init__(self, table: Table) -> None:
        super().__init__()
        self.table = table

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Vectors of rows (int64)."""
        vectors_NE, at_T = _distinct_vectors(self.table, rows.reshape(-1))
        return vectors_NE[at_T].view(*rows.shape, -1)


class ServedEmbeddingBag(nn.Module):
    """Means [B, E] of bags of rows, as nn.EmbeddingBag gives them; an empty bag is zeros.

    Args:
        table: of an artifact.
    """

    def __init__(self, table: Table) -> None:
        super().__init__()
        self.table = table

    def forward(self, rows_T: torch.Tensor, offsets_B: torch.Tensor) -> torch.Tensor:
        """Means of rows (int64), of which each bag begins at its offset."""
        vectors_NE, at_T = _distinct_vectors(self.table, rows_T)
        return functional.embedding_bag(at_T, vectors_NE, offsets_B, mode="mean")


def _distinct_vectors(table: Table, rows_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The vectors [N, E] of the distinct rows, and the position of each row among them [T]."""
    rows_N, at_T = torch.unique(rows_T, return_inverse=True)
    return torch.from_numpy(table.decode(rows_N.cpu().numpy())).to(rows_T.device), at_T
