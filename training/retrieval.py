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
from training.config import RunConfig
from training.evaluation import EvaluatedUsers, VectorsOf, evaluate, evaluated_users
from training.interactions import Interactions
from training.models import ITEM, USER
from training.parallel import add_up
from training.splits import TEST, VALIDATION

_SPLITS = {"validation": VALIDATION, "test": TEST}


class Retrieval:
    """The users of each split, shared out over the ranks and found once.

    Args:
        interactions: the data.
        vocabularies: of user_id and item_id.
        config: says how many users to measure at most.
    """

    def __init__(self, interactions: Interactions, vocabularies: Mapping[str, Vocabulary], config: RunConfig) -> None:
        self.interactions, self.vocabularies, self.config = interactions, vocabularies, config
        self._users: dict[str, EvaluatedUsers] = {}

    def measure(self, store: EmbeddingStore, split: str) -> dict[str, float]:
        """Metrics of the vectors that an artifact serves, on "validation" or "test"; every rank calls it.

        Raises:
            ConfigError: no user has items in the split.
        """
        if split not in self._users:
            users = evaluated_users(
                self.interactions, self.vocabularies, _SPLITS[split], max_users=self.config.max_eval_users
            )
            self._users[split] = users.take(np.arange(dist.get_rank(), len(users.user_ids_U), dist.get_world_size()))
        found = evaluate(
            self._users[split],
            _unit_vectors(store, USER),
            _unit_vectors(store, ITEM),
            num_items=store.table(ITEM).manifest.num_embeddings,
        )
        *sums, num_users = add_up([*found.sums, found.num_users])
        if not num_users:
            raise ConfigError(f"data: got no user with items in the {split} split, want at least one")
        return {name: total / num_users for name, total in zip(found.names, sums, strict=True)}


def _unit_vectors(store: EmbeddingStore, table: str) -> VectorsOf:
    """Vectors of length one: the model compares by cosine."""

    def vectors_of(rows_N: NDArray[np.int64]) -> torch.Tensor:
        return functional.normalize(torch.from_numpy(decode_rows(store.table(table), rows_N)), dim=1)

    return vectors_of
