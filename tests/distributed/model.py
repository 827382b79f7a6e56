"""The model of a case and its batches. In: a Case. Out: Model, plain or sharded by TorchRec's stock planner."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.optim import _apply_optimizer_in_backward
from torchrec import KeyedJaggedTensor
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig, PoolingType
from torchrec.optim.optimizers import Adam
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from dpq_rec.nn import DPQEmbedding, DPQEmbeddingBagCollection, DPQEmbeddingCollection, subspace_constraints
from tests.distributed.cases import EMBEDDING_DIM, FEATURES, NUM_EXAMPLES, SIZES

# An epsilon so large that it matters on which side of the square root it stands.
ADAGRAD = {"lr": 0.05, "eps": 1e-2}
OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"lr": 0.5}),
    "adagrad": (torch.optim.Adagrad, ADAGRAD),
    "rowwise_adagrad": (RowWiseAdagrad, ADAGRAD),
    "adam": (Adam, {"lr": 0.01, "beta1": 0.9, "beta2": 0.99, "eps": 1e-2}),  # FBGEMM takes no betas
}
POOLING = {"user": PoolingType.SUM, "item": PoolingType.MEAN}
LONGEST_BAG = 3


class Model(nn.Module):
    """Mean squared error of one linear layer over the features' pooled vectors."""

    def __init__(self, case, device=None):
        super().__init__()
        self.case = case
        self.tables = _tables(case, device)
        self.over = nn.Linear(EMBEDDING_DIM * len(FEATURES), 1, device=device)

    def pool(self, features):
        """The pooled vectors of all features, side by side."""
        if self.case.module == "bags":
            return self.tables(features).values()
        if self.case.module == "ids":
            return torch.cat([_sums(jagged) for jagged in self.tables(features).values()], 1)
        padded = [features[name].to_padded_dense(LONGEST_BAG).long() for name in FEATURES]
        return torch.cat([self.tables(ids).sum(1) for ids in padded], 1)

    def forward(self, features, labels):
        return nn.functional.mse_loss(self.over(self.pool(features))[:, 0], labels)


def _tables(case, device):
    if case.module == "embedding":
        return DPQEmbedding(SIZES["user"], EMBEDDING_DIM, case.config, padding_idx=0, name="user", device=device)
    kind = EmbeddingConfig if case.module == "ids" else EmbeddingBagConfig
    tables = []
    for name, size in case.sizes.items():
        more = {} if case.module == "ids" else {"pooling": PoolingType.SUM if case.weighted else POOLING[name]}
        served = [feature for feature, table in FEATURES.items() if table == name]
        tables.append(kind(name=name, num_embeddings=size, embedding_dim=EMBEDDING_DIM, feature_names=served, **more))
    configs = {name: case.config if name in case.quantized else None for name in case.sizes}
    if case.module == "ids":
        return DPQEmbeddingCollection(tables, configs, device=device)
    return DPQEmbeddingBagCollection(tables, configs, is_weighted=case.weighted, device=device)


def _sums(jagged):
    of_B = torch.repeat_interleave(torch.arange(len(jagged.lengths())), jagged.lengths())
    return jagged.values().new_zeros(len(jagged.lengths()), EMBEDDING_DIM).index_add(0, of_B, jagged.values())


def batch(case, step, rank, world_size):
    """A rank's share of a step's examples; bags of 0 to 3 ids, so that some are empty and some ids repeat."""
    generator = torch.Generator().manual_seed(step)
    share = slice(rank * NUM_EXAMPLES // world_size, (rank + 1) * NUM_EXAMPLES // world_size)
    second_B = torch.arange(NUM_EXAMPLES) >= NUM_EXAMPLES // 2
    ids, lengths, weights = [], [], []
    for feature, table in FEATURES.items():
        length_B = torch.randint(0, LONGEST_BAG + 1, (NUM_EXAMPLES,), generator=generator)
        if case.gaps and feature == "user" and step % 2:
            length_B[second_B if step % 4 == 1 else slice(None)] = 0
        num_ids, half = int(length_B.sum()), SIZES[table] // 2
        ids_T = torch.randint(0, half if case.apart else SIZES[table], (num_ids,), generator=generator)
        if case.apart:
            ids_T += half * second_B.repeat_interleave(length_B)
        weights_T = torch.rand(num_ids, generator=generator) + 0.5
        ids += ids_T.split(length_B.tolist())[share]
        weights += weights_T.split(length_B.tolist())[share]
        lengths.append(length_B[share])
    labels_B = torch.randn(NUM_EXAMPLES, generator=generator)[share]
    features = KeyedJaggedTensor(
        keys=list(FEATURES),
        values=torch.cat(ids),
        lengths=torch.cat(lengths),
        weights=torch.cat(weights) if case.weighted else None,
    )
    return features, labels_B


def constraints(model):
    """What the case asks of the planner, for tables quantized and plain."""
    case = model.case
    by_columns = subspace_constraints(model, case.num_shards) if case.sharding == "column_wise" else {}
    as_asked = ParameterConstraints(sharding_types=[case.sharding], compute_kernels=["fused"])
    return {name: by_columns.get(name, as_asked) for name in case.sizes}


def shard(model, constraints, device="cpu"):
    """The model under TorchRec's planner and sharders, its tables trained by the case's optimizer."""
    optimizer, settings = OPTIMIZERS[model.case.optimizer]
    for collections in (model.tables.queries, model.tables.plain):
        _apply_optimizer_in_backward(optimizer, collections.parameters(), dict(settings))  # TorchRec adds to it
    sharders = [EmbeddingCollectionSharder(), EmbeddingBagCollectionSharder()]
    topology = Topology(world_size=dist.get_world_size(), compute_device=device)
    planner = EmbeddingShardingPlanner(topology=topology, constraints=constraints)
    plan = planner.collective_plan(model, sharders, dist.group.WORLD)
    types = {parameter.sharding_type for module in plan.plan.values() for parameter in module.values()}
    assert types == {model.case.sharding}, f"the planner made it {types}, not {model.case.sharding}"
    return DistributedModelParallel(model, device=torch.device(device), plan=plan, sharders=sharders)


def shard_with_weights(model, constraints, device="cpu"):
    """The same, with the weights that the model has; the sharder starts tables with others."""
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wrapped = shard(model, constraints, device)
    load_whole(wrapped, weights)
    return wrapped


def load_whole(wrapped, weights):
    """Whole weights into the shards that this rank holds of them."""
    for name, tensor in wrapped.state_dict().items():
        for piece in tensor.local_shards() if isinstance(tensor, ShardedTensor) else []:
            (row, column), (num_rows, num_columns) = piece.metadata.shard_offsets, piece.metadata.shard_sizes
            piece.tensor.copy_(weights[name][row : row + num_rows, column : column + num_columns])


def train_step(model, wrapped, optimizer, features, labels):
    """One step; its loss and codebook loss, [1 + tables]."""
    loss = wrapped(features, labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return torch.stack([loss.detach(), *model.tables.codebook_losses.values()])


def dense_optimizer(wrapped):
    """Of all that is not a table."""
    return torch.optim.SGD(
        [p for name, p in wrapped.named_parameters() if ".queries." not in name and ".plain." not in name], lr=0.1
    )
