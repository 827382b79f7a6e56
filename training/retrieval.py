"""Retrieval metrics of an artifact. In: an artifact and a split. Out: name -> mean over the users of all ranks."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch.nn import functional

from dpq_rec import ConfigError, EmbeddingStore, Vocabulary
from dpq_rec.lookup import decode_rows
from training.config import TwoTowerOptions
from training.evaluation import EvaluatedUsers, VectorsOf, evaluate, evaluated_users
from training.interactions import Interactions
from training.models import ITEM, USER
from training.parallel import add_up


class Retrieval:
    """The users of each split, shared out over the ranks and found once.

    Args:
        interactions: the data.
        vocabularies: of user_id and item_id.
        options: how many users to measure at most, and whether by cosine or by dot product.
    """

    def __init__(
        self, interactions: Interactions, vocabularies: Mapping[str, Vocabulary], options: TwoTowerOptions
    ) -> None:
        self.interactions, self.vocabularies, self.options = interactions, vocabularies, options
        self._users: dict[int, EvaluatedUsers] = {}

    def measure(self, store: EmbeddingStore, split: int) -> dict[str, float]:
        """Metrics of the vectors that an artifact serves, on VALIDATION or TEST; every rank calls it.

        Raises:
            ConfigError: no user has items in the split.
        """
        if split not in self._users:
            users = evaluated_users(self.interactions, self.vocabularies, split, max_users=self.options.max_eval_users)
            self._users[split] = users.take(np.arange(dist.get_rank(), len(users.user_ids_U), dist.get_world_size()))
        found = evaluate(
            self._users[split],
            self._vectors(store, USER),
            self._vectors(store, ITEM),
            num_items=store.table(ITEM).manifest.num_embeddings,
        )
        *sums, num_users = add_up([*found.sums, found.num_users])
        if not num_users:
            raise ConfigError(f"data: got no user with items in split {split}, want at least one")
        return {name: total / num_users for name, total in zip(found.names, sums, strict=True)}

    def _vectors(self, store: EmbeddingStore, table: str) -> VectorsOf:
        """What the model compares: by cosine, vectors of length one."""

        def vectors_of(rows_N: NDArray[np.int64]) -> torch.Tensor:
            vectors_NE = torch.from_numpy(decode_rows(store.table(table), rows_N))
            return functional.normalize(vectors_NE, dim=1) if self.options.similarity == "cosine" else vectors_NE

        return vectors_of
