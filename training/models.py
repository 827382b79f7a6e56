"""Models that are trained around the tables. In: rows of a batch. Out: the loss.

`TwoTower` has no layer after its tables: the vectors that are served are the ones to search with.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import nn
from torch.nn import functional
from torchrec import EmbeddingBagCollection, KeyedJaggedTensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from dpq_rec.nn import DPQEmbeddingBagCollection
from training.config import RunConfig

USER, ITEM, NEGATIVE = "user_id", "item_id", "negative_item_id"
_BLOCK_USERS = 256  # so that scores stay in the cache, and their memory is used again rather than mapped anew


class TwoTower(nn.Module):
    """Cosine of a user's and an item's vector, trained by sampled softmax against uniform negatives.

    Args:
        config: of the run.
        num_embeddings: rows of the tables `user_id` and `item_id`.
        device: of the parameters.
    """

    def __init__(self, config: RunConfig, num_embeddings: Mapping[str, int], device: torch.device) -> None:
        super().__init__()
        features = {USER: [USER], ITEM: [ITEM, NEGATIVE]}
        bound = config.embedding_dim**-0.5
        tables = [
            EmbeddingBagConfig(
                name=name,
                embedding_dim=config.embedding_dim,
                num_embeddings=num_embeddings[name],
                feature_names=features[name],
                init_fn=partial(nn.init.uniform_, a=-bound, b=bound),
            )
            for name in (USER, ITEM)
        ]
        dpq = config.dpq
        self.tables: nn.Module = (
            EmbeddingBagCollection(tables=tables, device=device)
            if dpq is None
            else DPQEmbeddingBagCollection(tables, dpq, device=device)
        )
        self.temperature: torch.Tensor
        self.register_buffer("temperature", torch.tensor(config.temperature, device=device))

    def forward(self, features: KeyedJaggedTensor, items_B: torch.Tensor, negatives_N: torch.Tensor) -> torch.Tensor:
        """Mean loss of a batch.

        Args:
            features: rows by feature, as `two_tower_features` lays them out.
            items_B: the positive rows, and
            negatives_N: the sampled rows again, to leave out a negative that is the example's own item.
        """
        pooled = self.tables(features)
        users_BE, positives_BE = (functional.normalize(pooled[name], dim=1) for name in (USER, ITEM))
        sampled_NE = functional.normalize(pooled[NEGATIVE][: len(negatives_N)], dim=1)
        users_BE = users_BE / self.temperature  # here, not at the B x N scores: those set the time of a step
        blocks = zip(*(t.split(_BLOCK_USERS) for t in (users_BE, positives_BE, items_B)), strict=True)
        losses = [_sampled_softmax(u_BE, p_BE, i_B, sampled_NE, negatives_N) for u_BE, p_BE, i_B in blocks]
        return torch.cat(losses).mean()


def _sampled_softmax(
    users_BE: torch.Tensor,
    positives_BE: torch.Tensor,
    items_B: torch.Tensor,
    sampled_NE: torch.Tensor,
    negatives_N: torch.Tensor,
) -> torch.Tensor:
    """-log softmax of each example's own item among itself and the sampled ones [B]."""
    positive_B = (users_BE * positives_BE).sum(1)
    negative_BN = (users_BE @ sampled_NE.t()).masked_fill_(items_B[:, None] == negatives_N, -torch.inf)
    return torch.logaddexp(positive_B, negative_BN.logsumexp(1)) - positive_B


def two_tower_features(users_B: torch.Tensor, items_B: torch.Tensor, negatives_N: torch.Tensor) -> KeyedJaggedTensor:
    """Rows (int64) as TorchRec takes them. Only the first N bags of the negatives hold one; N is at most B."""
    ones_B = torch.ones_like(users_B)
    with_negative_B = (torch.arange(len(users_B), device=users_B.device) < len(negatives_N)).long()
    return KeyedJaggedTensor(
        keys=[USER, ITEM, NEGATIVE],
        values=torch.cat([users_B, items_B, negatives_N]),
        lengths=torch.cat([ones_B, ones_B, with_negative_B]),
    )
