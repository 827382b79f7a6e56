"""Retrieval metrics of an artifact. In: an artifact and a split. Out: name -> mean over the users of all ranks.

What is ranked are the distinct items of the training split, whatever rows they live in: items that share a row have
equal vectors, and ties count against the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch.nn import functional

from dpq_rec import ConfigError, EmbeddingStore
from dpq_rec.table import Table
from dpq_rec.vocabulary import Vocabulary
from training.data.histories import Histories
from training.data.interactions import Interactions
from training.distributed import add_up
from training.evaluation.ranking import EvaluatedUsers, evaluate, evaluated_users
from training.evaluation.served import ServedTable
from training.source import ITEM, USER, distinct_values

if TYPE_CHECKING:
    from training.recipes.two_tower import TwoTowerOptions


class Retrieval:
    """The users of each split, shared out over the ranks and found once; every rank makes it.

    A user that is not in the training split and has no row misses all its items. With a modulo vocabulary it has one,
    that of other users, and is measured by it, as it would be served.

    Args:
        interactions: the data.
        vocabularies: of user_id and item_id.
        options: how many users to measure at most, and whether by cosine or by dot product.
        histories: the items whose mean is a user's vector; None where users have rows.
    """

    def __init__(
        self,
        interactions: Interactions,
        vocabularies: Mapping[str, Vocabulary],
        options: TwoTowerOptions,
        histories: Histories | None = None,
    ) -> None:
        self.interactions, self.options, self.histories = interactions, options, histories
        candidates, num_candidates = distinct_values(interactions, ITEM, vocabularies[ITEM])
        self.vocabularies = {USER: vocabularies[USER], ITEM: candidates}
        self._item_rows_C = np.arange(num_candidates)
        if candidates is not vocabularies[ITEM]:
            ids_C = candidates.ids_of_rows(0, num_candidates)[0]
            self._item_rows_C = vocabularies[ITEM].rows(ids_C if isinstance(ids_C, np.ndarray) else ids_C.tolist())
        self._users: dict[int, EvaluatedUsers] = {}

    def measure(self, store: EmbeddingStore, split: int) -> dict[str, float]:
        """Metrics of the vectors that an artifact serves, on VALIDATION or TEST; every rank calls it.

        Raises:
            ConfigError: no user has items in the split.
        """
        found = self.by_user(store, split)
        own_users = len(found.pop("user_ids_U"))
        *sums, num_users = add_up([*np.stack([*found.values()], 1).sum(0), own_users])
        if not num_users:
            raise ConfigError(f"data: got no user with items in split {split}, want at least one")
        return {name: total / num_users for name, total in zip(found, sums, strict=True)}

    def by_user(self, store: EmbeddingStore, split: int) -> dict[str, NDArray[Any]]:
        """The ids of this rank's users, `user_ids_U`, and each metric's name -> of each user [U]; see `measure`."""
        if split not in self._users:
            users = evaluated_users(self.interactions, self.vocabularies, split, max_users=self.options.max_eval_users)
            self._users[split] = users.take(np.arange(dist.get_rank(), len(users.user_ids_U), dist.get_world_size()))
        items = store.table(ITEM)
        metrics = evaluate(
            self._users[split],
            lambda rows_N: self._scaled(self._user_vectors(store, rows_N)),
            lambda candidates_N: self._scaled(_decoded(items, self._item_rows_C[candidates_N])),
            num_items=len(self._item_rows_C),
        )
        return {"user_ids_U": self._users[split].user_ids_U, **metrics}

    def _user_vectors(self, store: EmbeddingStore, rows_N: NDArray[np.int64]) -> torch.Tensor:
        if self.histories is None:
            return _decoded(store.table(USER), rows_N)
        items = self.histories.whole(rows_N)
        return ServedTable(store.table(ITEM))(torch.from_numpy(items.rows_T), torch.from_numpy(items.offsets[:-1]))

    def _scaled(self, vectors_NE: torch.Tensor) -> torch.Tensor:
        """What the model compares: by cosine, vectors of length one."""
        return functional.normalize(vectors_NE, dim=1) if self.options.similarity == "cosine" else vectors_NE


def _decoded(table: Table, rows_N: NDArray[np.int64]) -> torch.Tensor:
    return torch.from_numpy(table.decode(rows_N))
