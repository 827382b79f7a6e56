"""What test_ranks.py runs under torchrun: ten steps of every case, then freeze. Rank 0 writes OUT/losses.json.

Each case trains on the same twelve examples a step, whatever the number of ranks: a rank takes its share.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.optim import _apply_optimizer_in_backward
from torchrec import KeyedJaggedTensor
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from dpq_rec import DPQConfig
from dpq_rec.nn import DPQEmbeddingBagCollection, freeze

CASES = [(method, sharding) for method in ("sx", "vq") for sharding in ("row_wise", "table_wise")]
SIZES = {"user": 101, "item": 50}
FEATURES = {"user": "user", "item": "item", "clicked": "item"}
BATCH = 12
STEPS = 10
LEARNING_RATE, EPSILON = 0.05, 1e-8


class Model(nn.Module):
    def __init__(self, method):
        super().__init__()
        tables = [
            EmbeddingBagConfig(
                name=name,
                embedding_dim=16,
                num_embeddings=size,
                feature_names=[f for f, table in FEATURES.items() if table == name],
                pooling=pooling,
            )
            for (name, size), pooling in zip(SIZES.items(), (PoolingType.SUM, PoolingType.MEAN), strict=True)
        ]
        self.tables = DPQEmbeddingBagCollection(tables, DPQConfig(method=method, num_subspaces=4, num_codes=8))
        self.over = nn.Linear(16 * len(FEATURES), 1)

    def forward(self, features, labels):
        return nn.functional.mse_loss(self.over(self.tables(features).values())[:, 0], labels)


def batch(generator, rank, world_size):
    """A rank's share of a step's examples; bags of 0 to 3 ids, so that some are empty and some ids repeat."""
    lengths_FB = torch.randint(0, 4, (len(FEATURES), BATCH), generator=generator)
    per_rank = BATCH // world_size
    values, lengths = [], []
    for length_B, table in zip(lengths_FB, FEATURES.values(), strict=True):
        ids = torch.randint(0, SIZES[table], (int(length_B.sum()),), generator=generator)
        bags = ids.split(length_B.tolist())[rank * per_rank : (rank + 1) * per_rank]
        values.append(torch.cat(bags))
        lengths.append(length_B[rank * per_rank : (rank + 1) * per_rank])
    labels = torch.randn(BATCH, generator=generator)[rank * per_rank : (rank + 1) * per_rank]
    return KeyedJaggedTensor(keys=list(FEATURES), values=torch.cat(values), lengths=torch.cat(lengths)), labels


def copy_weights(wrapped, weights):
    """Give a sharded model the weights of a plain one; the sharder starts with others."""
    for name, tensor in wrapped.state_dict().items():
        shards = tensor.local_shards() if isinstance(tensor, ShardedTensor) else []
        for shard in shards:
            (row, column), (num_rows, num_columns) = shard.metadata.shard_offsets, shard.metadata.shard_sizes
            shard.tensor.copy_(weights[name][row : row + num_rows, column : column + num_columns])


def shard(model, sharding):
    _apply_optimizer_in_backward(
        RowWiseAdagrad, model.tables.queries.parameters(), {"lr": LEARNING_RATE, "eps": EPSILON}
    )
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sharders = [EmbeddingCollectionSharder()]
    constraints = {name: ParameterConstraints(sharding_types=[sharding], compute_kernels=["fused"]) for name in SIZES}
    planner = EmbeddingShardingPlanner(
        topology=Topology(world_size=dist.get_world_size(), compute_device="cpu"), constraints=constraints
    )
    plan = planner.collective_plan(model, sharders, dist.group.WORLD)
    assert {p.sharding_type for m in plan.plan.values() for p in m.values()} == {sharding}
    wrapped = DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=sharders)
    copy_weights(wrapped, weights)
    return wrapped


def run(method, sharding, out):
    torch.manual_seed(0)
    model = Model(method)
    wrapped = shard(model, sharding)
    dense = [p for name, p in wrapped.named_parameters() if ".queries." not in name]
    optimizer = torch.optim.SGD(dense, lr=0.1)
    generator = torch.Generator().manual_seed(1)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    losses = []
    for _ in range(STEPS):
        loss = wrapped(*batch(generator, rank, world_size))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total = torch.stack([loss.detach(), *model.tables.penalties.values()])
        dist.all_reduce(total)
        losses.append((total / world_size).tolist())
    freeze(wrapped, out / f"{method}-{sharding}", version=f"{method}-{sharding}")
    check_refused(wrapped, out / f"{method}-{sharding}")
    check_frozen(model.tables.eval(), out / f"{method}-{sharding}")
    return losses


def check_refused(wrapped, path):
    """Rank 0 alone finds that the folder exists; every rank must raise, and none may wait for another."""
    try:
        freeze(wrapped, path)
    except FileExistsError:
        return
    raise AssertionError(f"rank {dist.get_rank()} froze into {path}, which exists")


def check_frozen(tables, path):
    """Every rank's eval output is what the artifact holds, bit for bit, for rows of either rank."""
    from dpq_rec import EmbeddingStore

    ids = torch.arange(50)
    features = KeyedJaggedTensor(keys=list(FEATURES), values=ids.repeat(3), lengths=torch.ones(150, dtype=torch.long))
    pooled, store = tables(features), EmbeddingStore.open(path)
    for feature in ("user", "item"):
        stored = store.lookup(feature, ids.numpy()).vectors
        assert stored.tobytes() == pooled[feature].detach().numpy().tobytes(), f"{feature} differs from {path}"


def main():
    out = Path(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    losses = {f"{method}-{sharding}": run(method, sharding, out) for method, sharding in CASES}
    if dist.get_rank() == 0:
        (out / "losses.json").write_text(json.dumps(losses))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
