"""Retrieval metrics of an artifact. In: an artifact and a split. Out: name -> mean over the users of all ranks.

What is ranked are the distinct items of the training split, whatever rows they live in: items that share a row have
equal vectors, and ties count against the model.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch.nn import functional

from dpq_rec import ConfigError, EmbeddingStore
from dpq_rec.decode import decode_rows
from training.config import TwoTowerOptions
from training.evaluation.ranking import EvaluatedUsers, RetrievalMetrics, VectorsOf, evaluate, evaluated_users
from training.models import ITEM, USER
from training.parallel import add_up
from training.source import Source, distinct_values


class Retrieval:
    """The users of each split, shared out over the ranks and found once; every rank makes it.

    A user that is not in the training split and has no row misses all its items. With a modulo vocabulary it has one,
    that of other users, and is measured by it, as it would be served.

    Args:
        source: the data and the vocabularies of user_id and item_id.
        options: how many users to measure at most, and whether by cosine or by dot product.
    """

    def __init__(self, source: Source, options: TwoTowerOptions) -> None:
        self.interactions, self.options = source.interactions, options
        candidates = distinct_values(source, ITEM)
        self.vocabularies = {USER: source.vocabularies[USER], ITEM: candidates.vocabulary}
        self._item_rows_C = np.arange(candidates.num_embeddings)
        if candidates is not source.columns[ITEM]:
            ids_C = candidates.vocabulary.ids_of_rows(0, candidates.num_embeddings).ids_N
            self._item_rows_C = source.vocabularies[ITEM].rows(
                ids_C if isinstance(ids_C, np.ndarray) else ids_C.tolist()
            )
        self._users: dict[int, EvaluatedUsers] = {}

    def measure(self, store: EmbeddingStore, split: int) -> dict[str, float]:
        """Metrics of the vectors that an artifact serves, on VALIDATION or TEST; every rank calls it.

        Raises:
            ConfigError: no user has items in the split.
        """
        found = self.by_user(store, split)
        *sums, num_users = add_up([*found.sums, found.num_users])
        if not num_users:
            raise ConfigError(f"data: got no user with items in split {split}, want at least one")
        return {name: total / num_users for name, total in zip(found.names, sums, strict=True)}

    def by_user(self, store: EmbeddingStore, split: int) -> RetrievalMetrics:
        """The metrics of each of this rank's users; see `measure`."""
        if split not in self._users:
            users = evaluated_users(self.interactions, self.vocabularies, split, max_users=self.options.max_eval_users)
            self._users[split] = users.take(np.arange(dist.get_rank(), len(users.user_ids_U), dist.get_world_size()))
        item_vectors = self._vectors(store, ITEM)
        return evaluate(
            self._users[split],
            self._vectors(store, USER),
            lambda candidates_N: item_vectors(self._item_rows_C[candidates_N]),
            num_items=len(self._item_rows_C),
        )

    def _vectors(self, store: EmbeddingStore, table: str) -> VectorsOf:
        """What the model compares: by cosine, vectors of length one."""

        def vectors_of(rows_N: NDArray[np.int64]) -> torch.Tensor:
            vectors_NE = torch.from_numpy(decode_rows(store.table(table), rows_N))
            return functional.normalize(vectors_NE, dim=1) if self.options.similarity == "cosine" else vectors_NE

        return vectors_of
