"""Two-tower, retrieval: its model has no layer after the tables, whose vectors are what is searched with.

In: a TwoTowerConfig. Out: a `Task`: batches, the loss, recall and ndcg.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torchrec import KeyedJaggedTensor

from dpq_rec import EmbeddingStore
from training.data.batches import Batch
from training.data.histories import Histories
from training.data.ragged import Bag
from training.evaluation.retrieval import Retrieval
from training.models.interactions import SPLITS, InteractionTask
from training.recipes.two_tower import TwoTowerConfig, TwoTowerOptions
from training.source import ITEM, USER

NEGATIVE, HISTORY = "negative_item_id", "history_item_id"
_BLOCK_SCORES = 1 << 18  # 1 MB


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
        features[HISTORY] = (torch.from_numpy(users.rows_T).to(device), torch.from_numpy(users.lengths).to(device))
    else:
        features[USER] = (users, ones_B)
    if len(negatives_N):
        features[NEGATIVE] = (negatives_N, (torch.arange(len(items_B), device=device) < len(negatives_N)).long())
    values, lengths = zip(*features.values(), strict=True)
    return KeyedJaggedTensor(keys=list(features), values=torch.cat(values), lengths=torch.cat(lengths))


def sampled_softmax(
    examples_BE: torch.Tensor,
    candidates_CE: torch.Tensor,
    own_B: torch.Tensor,
    items_B: torch.Tensor,
    rows_C: torch.Tensor,
    log_q_C: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean of -log softmax of an example's own score among itself and its scores with candidates that are other items.

    The B x C scores set the time of a step. They are made a block of examples at a time, small enough to stay in the
    cache, and the gradients are taken from a block while it is there: no score is kept for the backward pass, or made
    anew in it.

    That of one example is log(1 + sum over c of exp(s_c - own)), s_c = example . candidate_c - log_q_c, over the
    candidates whose row is not its own item.

    Args:
        examples_BE: vectors of examples (float).
        candidates_CE: vectors of candidates.
        own_B: score of each example with its own item; what is to be subtracted from it is already.
        items_B: row of each example's own item (int64), and
        rows_C: of each candidate.
        log_q_C: what is subtracted from the scores with a candidate, without a gradient; nothing where None.

    Returns:
        A number that can be differentiated once.
    """
    loss: torch.Tensor = _SampledSoftmax.apply(examples_BE, candidates_CE, own_B, items_B, rows_C, log_q_C)
    return loss


class _SampledSoftmax(torch.autograd.Function):
    """With p the softmax of an example, its loss moves with s_c by p_c, and with its own score by p_own - 1."""

    @staticmethod
    def forward(
        ctx: Any,
        examples_BE: torch.Tensor,
        candidates_CE: torch.Tensor,
        own_B: torch.Tensor,
        items_B: torch.Tensor,
        rows_C: torch.Tensor,
        log_q_C: torch.Tensor | None,
    ) -> torch.Tensor:
        to_examples_BE, to_candidates_EC = torch.empty_like(examples_BE), torch.zeros_like(candidates_CE.t())
        to_own_B, losses_B = torch.empty_like(own_B), torch.empty_like(own_B)
        first_B, last_B, order_C = _same_items(items_B, rows_C)
        num_rows = max(1, _BLOCK_SCORES // max(1, len(rows_C)))
        for start in range(0, len(items_B), num_rows):
            block = slice(start, start + num_rows)
            scores_bC = examples_BE[block] @ candidates_CE.t()
            if log_q_C is not None:
                scores_bC -= log_q_C
            scores_bC[_pairs(first_B[block], last_B[block], order_C)] = -torch.inf
            own_b = own_B[block]
            most_b = torch.maximum(scores_bC.amax(1), own_b) if len(rows_C) else own_b
            own_exp_b = (own_b - most_b).exp()
            exps_bC = scores_bC.sub_(most_b[:, None]).exp_()
            sums_b = exps_bC.sum(1) + own_exp_b
            losses_B[block] = sums_b.log() + most_b - own_b
            to_own_B[block] = own_exp_b / sums_b - 1
            softmax_bC = exps_bC.div_(sums_b[:, None])
            torch.mm(softmax_bC, candidates_CE, out=to_examples_BE[block])
            to_candidates_EC.addmm_(examples_BE[block].t(), softmax_bC)
        ctx.save_for_backward(to_examples_BE, to_candidates_EC, to_own_B)
        return losses_B.mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        to_examples_BE, to_candidates_EC, to_own_B = ctx.saved_tensors
        to_each = to_loss / len(to_own_B)
        return to_examples_BE * to_each, (to_candidates_EC * to_each).t(), to_own_B * to_each, None, None, None


def _same_items(items_B: torch.Tensor, rows_C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where the candidates that are an example's own item begin and end in an order of the candidates, and that order.

    Few pairs of B x C are such. To compare all would take as long as the product that makes the scores.
    """
    sorted_C, order_C = rows_C.sort()
    return torch.searchsorted(sorted_C, items_B), torch.searchsorted(sorted_C, items_B, right=True), order_C


def _pairs(first_b: torch.Tensor, last_b: torch.Tensor, order_C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Example and candidate of each pair of the same item."""
    counts_b = last_b - first_b
    examples_P = torch.repeat_interleave(counts_b)
    within_P = torch.arange(len(examples_P), device=order_C.device) - (counts_b.cumsum(0) - counts_b)[examples_P]
    return examples_P, order_C[first_b[examples_P] + within_P]


class TwoTowerTask(InteractionTask):
    """Recipe two-tower."""

    chosen_by = "ndcg@10"

    def __init__(self, config: TwoTowerConfig, device: torch.device) -> None:
        self.options = config.model
        super().__init__(config, device)
        self.histories = None
        if self.options.history:
            self.histories = Histories(self.source.interactions, self.source.vocabularies)
            self.vocabularies = {ITEM: self.source.vocabularies[ITEM]}
        self.retrieval = Retrieval(self.source.interactions, self.source.vocabularies, config.model, self.histories)

    def negatives_of(self, batch_size: int) -> int:
        """See `InteractionTask.negatives_of`."""
        return 0 if self.options.negatives == "in-batch" else min(self.options.num_negatives or batch_size, batch_size)

    def model(self) -> TwoTower:
        """See `Task.model`."""
        of_items = [ITEM] if self.options.negatives == "in-batch" else [ITEM, NEGATIVE]
        features = {ITEM: [*of_items, HISTORY]} if self.options.history else {USER: [USER], ITEM: of_items}
        counts_V = torch.from_numpy(self.source.row_counts[ITEM])
        return TwoTower(self.options, self.make_tables(features), (counts_V / counts_V.sum()).float(), self.device)

    def loss(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> torch.Tensor:
        """See `Task.loss`."""
        users, items = batch.bags[USER].rows_T, batch.bags[ITEM].rows_T
        items_B = torch.from_numpy(items).to(self.device)
        num_items, num_negatives = self.source.num_embeddings[ITEM], self.negatives_of(len(items))
        negatives_N = torch.randint(num_items, (num_negatives,), generator=generator).to(self.device)
        users_or_history: torch.Tensor | Bag
        if self.histories is None:
            users_or_history = torch.from_numpy(users).to(self.device)
        else:
            users_or_history = self.histories.draw(users, items, self.options.history, generator)
        return model(two_tower_features(users_or_history, items_B, negatives_N), items_B, negatives_N)

    def measure(self, folder: Path, split: str) -> dict[str, float]:
        """See `Task.measure`: recall and ndcg at 10 and 20."""
        return self.retrieval.measure(EmbeddingStore.open(folder / "artifact"), SPLITS[split])

    def by_user(self, folder: Path, split: str) -> dict[str, NDArray[Any]]:
        """See `InteractionTask.by_user`: `user_ids_U`, and each metric's name -> of each user [U]."""
        return self.retrieval.by_user(EmbeddingStore.open(folder / "artifact"), SPLITS[split])
