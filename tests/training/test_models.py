"""The models' losses and logits held to formulas written out for every example."""

import numpy as np
import pytest
import torch
from torch.nn import functional
from torchrec import KeyedJaggedTensor

from training.data.ragged import Bag
from training.models.dlrm import ClickThrough
from training.models.interactions import make_tables
from training.models.two_tower import TwoTower, two_tower_features
from training.recipes import RECIPES, with_changes

CPU = torch.device("cpu")
NUM_ITEMS, NUM_NEGATIVES = 20, 37
USERS, ITEMS = torch.arange(600) * 7 % 300, torch.arange(600) * 11 % NUM_ITEMS  # more than one block
NEGATIVES = torch.arange(NUM_NEGATIVES) * 3 % NUM_ITEMS
COUNTS = torch.arange(1, NUM_ITEMS + 1)


def two_tower(**changes):
    torch.manual_seed(0)
    small = {"embedding": "full", "embedding-dim": 8} | {name.replace("_", "-"): v for name, v in changes.items()}
    config = with_changes(RECIPES["two-tower"]("synthetic", "run").as_dict(), small)
    served = ["item_id"] if config.model.negatives == "in-batch" else ["item_id", "negative_item_id"]
    served += ["history_item_id"] if config.model.history else []
    sizes = {"user_id": 300, "item_id": NUM_ITEMS}
    users = {} if config.model.history else {"user_id": ["user_id"]}
    tables = make_tables({**users, "item_id": served}, sizes, config.embedding, CPU)
    return TwoTower(config.model, tables, COUNTS / COUNTS.sum(), CPU).eval()


def naive_loss(model, negatives, *, expected=None):
    """The mean of -log softmax, example by example; `expected` counts of an item among the candidates."""
    options, pooled = model.options, model.tables(two_tower_features(USERS, ITEMS, negatives))
    vectors = pooled["item_id"]
    candidates, rows = [], []
    if options.negatives != "in-batch":
        candidates.append(pooled["negative_item_id"][: len(negatives)])
        rows.append(negatives)
    if options.negatives != "uniform":
        candidates.append(vectors)
        rows.append(ITEMS)
    candidates, rows, losses = torch.cat(candidates), torch.cat(rows), []
    for user, item, vector in zip(pooled["user_id"], ITEMS, vectors, strict=True):
        others = rows != item  # a candidate that is the example's own item is no negative
        compared, items = torch.cat([vector[None], candidates[others]]), torch.cat([item[None], rows[others]])
        scores = torch.cosine_similarity(user[None], compared) if options.similarity == "cosine" else compared @ user
        scores = scores / options.temperature
        if expected is not None:
            scores = scores - expected[items].log()
        losses.append(-scores.log_softmax(0)[0])
    return torch.stack(losses).mean()


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("embedding", ["full", "dpq-sx", "dpq-vq"])
def test_two_tower_loss_is_the_sampled_softmax(embedding, similarity):
    dpq = {} if embedding == "full" else {"num_subspaces": 4, "num_codes": 5}
    model = two_tower(embedding=embedding, similarity=similarity, **dpq)
    got = model(two_tower_features(USERS, ITEMS, NEGATIVES), ITEMS, NEGATIVES)
    torch.testing.assert_close(got, naive_loss(model, NEGATIVES))


@pytest.mark.parametrize("log_q", [True, False])
@pytest.mark.parametrize("negatives", ["in-batch", "both"])
def test_in_batch_negatives_are_the_other_items_corrected_by_how_often_they_are_drawn(negatives, log_q):
    model = two_tower(negatives=negatives, log_q=log_q)
    drawn = NEGATIVES if negatives == "both" else NEGATIVES[:0]
    got = model(two_tower_features(USERS, ITEMS, drawn), ITEMS, drawn)
    expected = 600 * COUNTS / COUNTS.sum() + len(drawn) / NUM_ITEMS
    torch.testing.assert_close(got, naive_loss(model, drawn, expected=expected if log_q else None))


@pytest.mark.parametrize("embedding", ["full", "dpq-vq"])
def test_with_a_history_a_user_is_the_mean_of_those_items(embedding):
    dpq = {} if embedding == "full" else {"num_subspaces": 4, "num_codes": 5}
    model = two_tower(embedding=embedding, history=3, **dpq)
    lengths = np.arange(len(USERS)) % 4  # none among them
    history = Bag.of(np.arange(lengths.sum()) * 13 % NUM_ITEMS, lengths)
    features = two_tower_features(history, ITEMS, NEGATIVES)
    got, vectors = model(features, ITEMS, NEGATIVES), model.tables(features)["item_id"]
    item_vectors = dict(zip(ITEMS.tolist(), vectors, strict=True))
    losses, rows = [], history.rows_T.tolist()
    for length, item, vector in zip(lengths.tolist(), ITEMS, vectors, strict=True):
        own, rows = rows[:length], rows[length:]
        user = torch.stack([item_vectors[row] for row in own]).mean(0) if own else torch.zeros(8)
        compared = torch.stack([vector, *(item_vectors[n] for n in NEGATIVES.tolist() if n != int(item))])
        losses.append(-(torch.cosine_similarity(user[None], compared) / 0.1).log_softmax(0)[0])
    torch.testing.assert_close(got, torch.stack(losses).mean())


def test_log_q_changes_nothing_where_all_negatives_are_uniform():
    features = two_tower_features(USERS, ITEMS, NEGATIVES)
    with_it, without = (two_tower(log_q=log_q)(features, ITEMS, NEGATIVES) for log_q in (True, False))
    assert torch.equal(with_it, without)


def clicks(num_dense, embedding="full"):
    torch.manual_seed(0)
    changes = {"embedding": embedding, "embedding-dim": 8, "dense-layers": (5,), "over-layers": (6,)}
    config = with_changes(
        RECIPES["dlrm"]("synthetic", "run").as_dict(), changes | ({} if embedding == "full" else {"num-subspaces": 4})
    )
    sizes = {"user_id": 9, "item_id": 7, "tags": 5}
    tables = make_tables({name: [name] for name in sizes}, sizes, config.embedding, CPU)
    means, deviations = torch.arange(num_dense) + 1.0, torch.arange(num_dense) + 2.0
    return ClickThrough(config.model, tables, means, deviations, CPU).eval()


FEATURES = KeyedJaggedTensor(
    keys=["user_id", "item_id", "tags"],
    values=torch.tensor([1, 2, 3, 4, 5, 6, 0, 1, 4]),
    lengths=torch.tensor([1, 1, 1, 1, 1, 1, 2, 0, 1]),
)


@pytest.mark.parametrize("num_dense", [0, 2])
@pytest.mark.parametrize("embedding", ["full", "dpq-vq"])
def test_click_through_logits_are_those_of_dlrm(num_dense, embedding):
    """Dense layers, pairwise dot products of all vectors, over layers (Naumov et al., 2019), with numpy's loops."""
    model = clicks(num_dense, embedding)
    dense = torch.tensor([[0.5, 3.0], [9.0, -1.0], [0.0, 0.0]])[:, :num_dense]
    got = model(FEATURES, dense)
    pooled = model.dlrm.sparse_arch.embedding_bag_collection(FEATURES)
    layers = [m for m in model.dlrm.dense_arch.modules() if isinstance(m, torch.nn.Linear)]
    over = [m for m in model.dlrm.over_arch.modules() if isinstance(m, torch.nn.Linear)]
    for example in range(3):
        x = (dense[example] - model.means_F) / model.deviations_F if num_dense else torch.ones(1)
        for layer in layers:
            x = functional.relu(layer(x))
        vectors = [x, *(pooled[name][example] for name in ("user_id", "item_id", "tags"))]
        products = [vectors[a] @ vectors[b] for a in range(4) for b in range(a + 1, 4)]
        logit = over[1](functional.relu(over[0](torch.cat([x, torch.stack(products)]))))
        torch.testing.assert_close(got[example], logit[0])


def test_a_multi_valued_feature_is_averaged_and_an_empty_one_is_zeros():
    model = clicks(0)
    pooled = model.dlrm.sparse_arch.embedding_bag_collection(FEATURES)["tags"]
    weight = model.dlrm.sparse_arch.embedding_bag_collection.embedding_bags["tags"].weight
    torch.testing.assert_close(pooled, torch.stack([weight[:2].mean(0), torch.zeros(8), weight[4]]))


def test_dense_features_are_standardised_by_buffers_that_are_saved():
    model = clicks(2)
    state = model.state_dict()
    assert np.array_equal(state["means_F"], [1, 2])
    assert np.array_equal(state["deviations_F"], [2, 3])


def test_click_through_tells_large_numbers_that_lie_close_together_apart():
    model = clicks(1, "full")
    model.means_F, model.deviations_F = torch.tensor([1.7e9], dtype=torch.float64), torch.tensor([2.0])
    far = model(FEATURES, 1.7e9 + torch.tensor([[-2.0], [0.0], [2.0]], dtype=torch.float64))
    model.means_F = torch.zeros(1)
    assert torch.equal(far, model(FEATURES, torch.tensor([[-2.0], [0.0], [2.0]])))
