"""Models that are trained around the tables. In: features of a batch. Out: the loss, or logits.

`TwoTower` has no layer after its tables: the vectors that are served are the ones to search with. `ClickThrough` is
TorchRec's DLRM, as it is, around them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional
from torchrec import EmbeddingBagCollection, KeyedJaggedTensor
from torchrec.models.dlrm import DLRM
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType

from dpq_rec.nn import DPQEmbeddingBagCollection, freeze
from training.config import EmbeddingOptions
from training.data.batches import Bag
from training.interaction_options import DLRMOptions, TwoTowerOptions
from training.per_table import check_tables
from training.sampled_softmax import sampled_softmax

USER, ITEM, NEGATIVE, HISTORY = "user_id", "item_id", "negative_item_id", "history_item_id"
_META = torch.device("meta")


def make_tables(
    features: Mapping[str, Sequence[str]],
    num_embeddings: Mapping[str, int],
    options: EmbeddingOptions,
    device: torch.device = _META,
) -> nn.Module:
    """The tables, plain or DPQ, named by their columns; values of a feature are averaged.

    A table that DPQ makes no smaller stays plain.

    On the meta device they take no memory until they are sharded, so that no rank ever holds a whole one.

    Args:
        features: table -> the features that it serves.
        num_embeddings: table -> rows.
        options: of the tables.
        device: of the parameters.
    """
    tables = bag_configs(features, num_embeddings, options)
    if options.dpq is None:
        return EmbeddingBagCollection(tables=tables, device=device)
    check_tables(options.per_table, features)
    configs = options.dpq_by_table({name: num_embeddings[name] for name in features})
    if not any(configs.values()):
        return EmbeddingBagCollection(tables=tables, device=device)
    return DPQEmbeddingBagCollection(tables, configs, device=device)


def bag_configs(
    features: Mapping[str, Sequence[str]], num_embeddings: Mapping[str, int], options: EmbeddingOptions
) -> list[EmbeddingBagConfig]:
    """TorchRec's configs of the tables; see `make_tables`."""
    bound = options.embedding_dim**-0.5
    return [
        EmbeddingBagConfig(
            name=name,
            embedding_dim=options.embedding_dim,
            num_embeddings=num_embeddings[name],
            feature_names=list(served),
            pooling=PoolingType.SUM if name in (USER, ITEM) else PoolingType.MEAN,  # an id is a bag of one
            init_fn=partial(nn.init.uniform_, a=-bound, b=bound),
        )
        for name, served in features.items()
    ]


class TableKind(NamedTuple):
    """How the trainer makes tables and freezes them; the benchmarks bring kinds of their own.

    Attributes:
        make: as `make_tables`, of features, rows and options.
        freeze: as `dpq_rec.nn.freeze`, of the model, the artifact's folder and vocabularies.
    """

    make: Callable[[Mapping[str, Sequence[str]], Mapping[str, int], EmbeddingOptions], nn.Module] = make_tables
    freeze: Callable[..., object] = freeze


BY_CONFIGURATION = TableKind()


class TwoTower(nn.Module):
    """Similarity of a user's and an item's vector, trained by a softmax against sampled items.

    A user's vector is its row or, with `history`, the mean of the items that the user chose.

    With `log_q`, a candidate's score is s / temperature - log Q: s the similarity, Q how many candidates of a step are
    expected to be this item (Yi et al., 2019, eq. 4 and 5: from the probability it differs by a constant, which cancels
    out). In-batch candidates are drawn as the training split is: of B examples B * share are the item's. N uniform ones
    of V items add N / V (Yang et al., 2020, mix them so). Where all are uniform Q is constant, and nothing is
    subtracted.

    Args:
        options: of the recipe.
        tables: sums of vectors of `item_id`, of `user_id` or `history_item_id` and, where negatives are drawn, of
            `negative_item_id`.
        item_shares_V: each item's share of the training split, float32.
        device: of the buffers.
    """

    TABLES = "tables."  # what the names of the tables' weights begin with

    def __init__(
        self, options: TwoTowerOptions, tables: nn.Module, item_shares_V: torch.Tensor, device: torch.device
    ) -> None:
        super().__init__()
        self.options, self.tables = options, tables
        self.temperature: torch.Tensor
        self.register_buffer("temperature", torch.tensor(options.temperature, device=device))
        self.item_shares_V: torch.Tensor
        self.register_buffer("item_shares_V", item_shares_V.to(device), persistent=False)

    def forward(self, features: KeyedJaggedTensor, items_B: torch.Tensor, negatives_N: torch.Tensor) -> torch.Tensor:
        """Mean loss of a batch.

        Args:
            features: rows by feature, as `two_tower_features` lays them out.
            items_B: the positive rows, and
            negatives_N: the sampled rows again, to leave out a candidate that is the example's own item.
        """
        pooled = self.tables(features)
        if self.options.history:
            users_BE = pooled[HISTORY] / features[HISTORY].lengths().clamp(min=1)[:, None]
        else:
            users_BE = pooled[USER]
        users_BE, positives_BE = self._scaled(users_BE), self._scaled(pooled[ITEM])
        drawn = [(self._scaled(pooled[NEGATIVE][: len(negatives_N)]), negatives_N)] if len(negatives_N) else []
        in_batch = [] if self.options.negatives == "uniform" else [(positives_BE, items_B)]
        vectors, rows = zip(*drawn, *in_batch, strict=True)
        users_BE = users_BE / self.temperature  # here, not at the B x C scores: those set the time of a step
        own_B, rows_C, log_q_C = (users_BE * positives_BE).sum(1), torch.cat(rows), None
        if in_batch and self.options.log_q:
            log_q_C = self._log_q(rows_C, len(items_B), len(negatives_N))
            own_B = own_B - self._log_q(items_B, len(items_B), len(negatives_N))
        return sampled_softmax(users_BE, torch.cat(vectors), own_B, items_B, rows_C, log_q_C)

    def _scaled(self, vectors_NE: torch.Tensor) -> torch.Tensor:
        return functional.normalize(vectors_NE, dim=1) if self.options.similarity == "cosine" else vectors_NE

    def _log_q(self, rows_N: torch.Tensor, num_examples: int, num_negatives: int) -> torch.Tensor:
        return (num_examples * self.item_shares_V[rows_N] + num_negatives / len(self.item_shares_V)).log()


def two_tower_features(
    users: torch.Tensor | Bag, items_B: torch.Tensor, negatives_N: torch.Tensor
) -> KeyedJaggedTensor:
    """Rows (int64) as TorchRec takes them. Only the first N bags of the negatives hold one; N is at most B.

    Args:
        users: rows [B] of users, or the rows of items that users chose.
        items_B: rows of the examples' own items.
        negatives_N: rows of those sampled.
    """
    ones_B, device = torch.ones_like(items_B), items_B.device
    features = {ITEM: (items_B, ones_B)}
    if isinstance(users, Bag):
        features[HISTORY] = (torch.from_numpy(users.rows_T).to(device), torch.from_numpy(users.lengths_B).to(device))
    else:
        features[USER] = (users, ones_B)
    if len(negatives_N):
        features[NEGATIVE] = (negatives_N, (torch.arange(len(items_B), device=device) < len(negatives_N)).long())
    values, lengths = zip(*features.values(), strict=True)
    return KeyedJaggedTensor(keys=list(features), values=torch.cat(values), lengths=torch.cat(lengths))


class ClickThrough(nn.Module):
    """DLRM (Naumov et al., 2019) over vectors of ids and categorical features and over standardised dense features.

    Args:
        options: of the recipe.
        tables: pooled vectors by column; anything with TorchRec's interface of an EmbeddingBagCollection.
        means_F: of the dense features in the training split (float64: float32 has too few digits for large numbers that
            lie close together), and
        deviations_F: their standard deviations, more than 0. Both are buffers: the saved model takes features
            as they come.
        device: of the weights.
    """

    TABLES = "dlrm.sparse_arch.embedding_bag_collection."  # what the names of the tables' weights begin with

    def __init__(
        self,
        options: DLRMOptions,
        tables: EmbeddingBagCollection,
        means_F: torch.Tensor,
        deviations_F: torch.Tensor,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.means_F: torch.Tensor
        self.deviations_F: torch.Tensor
        self.register_buffer("means_F", means_F.to(device))
        self.register_buffer("deviations_F", deviations_F.to(device))
        self.dlrm = DLRM(
            embedding_bag_collection=tables,
            dense_in_features=max(1, len(means_F)),
            dense_arch_layer_sizes=[*options.dense_layers, tables.embedding_bag_configs()[0].embedding_dim],
            over_arch_layer_sizes=[*options.over_layers, 1],
            dense_device=device,
        )

    def forward(self, features: KeyedJaggedTensor, dense_BF: torch.Tensor) -> torch.Tensor:
        """Logits [B] of the label being 1.

        Args:
            features: rows by column.
            dense_BF: the dense features as they come (float64, or what they fit in).
        """
        standard_BF = ((dense_BF - self.means_F) / self.deviations_F).float()
        if not dense_BF.shape[1]:  # DLRM wants one at least: without any, its dense part is a vector that is learned
            standard_BF = standard_BF.new_ones(len(dense_BF), 1)
        return self.dlrm(standard_BF, features).squeeze(1)
