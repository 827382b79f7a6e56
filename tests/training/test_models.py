"""The two-tower's loss held to a softmax written out for every example."""

import pytest
import torch

from training.config import RunConfig
from training.models import TwoTower, two_tower_features


@pytest.mark.parametrize("embedding", ["full", "dpq-sx", "dpq-vq"])
def test_two_tower_loss_is_the_sampled_softmax_of_cosines(embedding):
    torch.manual_seed(0)
    config = RunConfig(data="synthetic", out="run", embedding=embedding, embedding_dim=8, num_subspaces=4, num_codes=5)
    model = TwoTower(config, {"user_id": 300, "item_id": 20}, torch.device("cpu")).eval()
    users = torch.randint(300, (600,))  # more than one block
    items, negatives = torch.randint(20, (600,)), torch.randint(20, (37,))
    got = model(two_tower_features(users, items, negatives), items, negatives)
    pooled = model.tables(two_tower_features(users, items, negatives))
    user_vectors, item_vectors, sampled = (pooled[name] for name in ("user_id", "item_id", "negative_item_id"))
    losses = []
    for user, item, vector in zip(user_vectors, items, item_vectors, strict=True):
        others = sampled[:37][negatives != item]  # a negative that is the positive is no negative
        cosines = torch.cosine_similarity(user[None], torch.cat([vector[None], others])) / 0.1
        losses.append(-cosines.log_softmax(0)[0])
    torch.testing.assert_close(got, torch.stack(losses).mean())
