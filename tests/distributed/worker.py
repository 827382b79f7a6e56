"""What test_ranks.py runs under torchrun: ten steps of every case, then freeze. Rank 0 writes OUT/results.json.

Each case trains on the same twelve examples a step, whatever the number of ranks: a rank takes its share. The options
of the method are spread over the cases: each stands in one at least.
"""

import dataclasses
import json
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.optim import _apply_optimizer_in_backward
from torchrec import EmbeddingBagCollection, EmbeddingCollection, KeyedJaggedTensor
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig, PoolingType
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from dpq_rec import ConfigError, DPQConfig, EmbeddingStore
from dpq_rec.nn import (
    DPQEmbedding,
    DPQEmbeddingBagCollection,
    DPQEmbeddingCollection,
    freeze,
    start,
    subspace_constraints,
)


@dataclasses.dataclass(frozen=True)
class Case:
    """How one model is made, sharded and trained."""

    sharding: str
    config: DPQConfig
    optimizer: type = RowWiseAdagrad
    kind: str = "bags"
    start: bool = False


def sx(**settings):
    return DPQConfig(method="sx", num_subspaces=4, num_codes=8, **settings)


def vq(**settings):
    return DPQConfig(method="vq", num_subspaces=4, num_codes=8, **settings)


CASES = {
    "sx-row": Case("row_wise", sx()),
    "vq-row": Case("row_wise", vq()),
    "sx-table": Case("table_wise", sx(share_subspaces=True, key_dim=8), torch.optim.Adagrad),
    "vq-table": Case("table_wise", vq(ema_decay=0.9), start=True),
    "sx-column": Case("column_wise", sx(num_levels=2, metric="euclidean", values_dtype="float16"), torch.optim.SGD),
    "vq-column": Case("column_wise", vq(num_levels=2, value_gradient=True, commitment_weight=0.1), start=True),
    "sx-ids-row": Case("row_wise", sx(tie_keys=True), torch.optim.Adagrad, kind="ids"),
    "vq-one-row": Case("row_wise", vq(commitment_weight=0.5), torch.optim.SGD, kind="one"),
    # Which queries are drawn for unused codes depends on how rows lie on ranks: these are the same on all ranks only.
    "sx-revival": Case("row_wise", sx(revive_after=1)),
    "vq-revival": Case("table_wise", vq(ema_decay=0.9, revive_after=1), kind="ids"),
}
SIZES = {"user": 101, "item": 50}
FEATURES = {"user": "user", "item": "item", "clicked": "item"}
BATCH, STEPS, DIM = 12, 10, 16
LEARNING_RATE, EPSILON = 0.05, 1e-8
BIG_ROWS, BIG_DIM = 1_000_000, 64  # 256 MB


class Model(nn.Module):
    def __init__(self, case):
        super().__init__()
        self.kind = case.kind
        tables = {
            name: {
                "name": name,
                "embedding_dim": DIM,
                "num_embeddings": size,
                "feature_names": [f for f, table in FEATURES.items() if table == name],
            }
            for name, size in SIZES.items()
        }
        if case.kind == "bags":
            poolings = (PoolingType.SUM, PoolingType.MEAN)
            configs = [EmbeddingBagConfig(**t, pooling=p) for t, p in zip(tables.values(), poolings, strict=True)]
            self.tables = DPQEmbeddingBagCollection(configs, case.config)
        elif case.kind == "ids":
            self.tables = DPQEmbeddingCollection([EmbeddingConfig(**t) for t in tables.values()], case.config)
        else:
            self.tables = DPQEmbedding(SIZES["item"], DIM, case.config, padding_idx=7, name="item")
        self.over = nn.Linear(DIM * (2 if case.kind == "one" else len(FEATURES)), 1)

    def forward(self, features, labels):
        return nn.functional.mse_loss(self.over(self.vectors(features))[:, 0], labels)

    def vectors(self, features):
        """Vectors of each example; where there are no bags, of its first ids, and zeros where it has none."""
        if self.kind == "bags":
            return self.tables(features).values()
        if self.kind == "ids":
            padded = [jagged.to_padded_dense(1)[:, 0] for jagged in self.tables(features).values()]
            return torch.cat(padded, 1)
        jagged = features.to_dict()
        ids = [jagged[name].to_padded_dense(1, padding_value=7)[:, 0].long() for name in ("item", "clicked")]
        return torch.cat([self.tables(ids_B) for ids_B in ids], 1)  # one module, called twice


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


def wrap(model, constraints, sharding):
    sharders = [EmbeddingCollectionSharder(), EmbeddingBagCollectionSharder()]
    planner = EmbeddingShardingPlanner(
        topology=Topology(world_size=dist.get_world_size(), compute_device="cpu"), constraints=constraints
    )
    plan = planner.collective_plan(model, sharders, dist.group.WORLD)
    assert {p.sharding_type for m in plan.plan.values() for p in m.values()} == {sharding}
    return DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=sharders)


def shard(model, case):
    options = {"lr": LEARNING_RATE}
    if case.optimizer is not torch.optim.SGD:
        options["eps"] = EPSILON
    _apply_optimizer_in_backward(case.optimizer, model.tables.queries.parameters(), options)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if case.sharding == "column_wise":
        constraints = subspace_constraints(model, 2)
    else:
        constraint = ParameterConstraints(sharding_types=[case.sharding], compute_kernels=["fused"])
        constraints = dict.fromkeys(SIZES, constraint)
    wrapped = wrap(model, constraints, case.sharding)
    copy_weights(wrapped, weights)
    return wrapped


def run(name, out):
    case = CASES[name]
    torch.manual_seed(0)
    model = Model(case)
    wrapped = shard(model, case)
    if case.start:
        start(wrapped, num_samples=40)
    dense = [p for key, p in wrapped.named_parameters() if ".queries." not in key and p.requires_grad]
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
    check_same_on_all_ranks(model)
    freeze(wrapped, out / name, version=name)
    check_refused(wrapped, out / name)
    check_frozen(model.tables.eval(), case, out / name)
    return losses


def check_same_on_all_ranks(model):
    """Keys, values and statistics, bit for bit."""
    for key, tensor in model.tables.quantizers.state_dict().items():
        first = tensor.detach().clone()
        dist.broadcast(first, 0)
        assert torch.equal(first, tensor), f"{key} of rank {dist.get_rank()} is not rank 0's"
        assert "num_draws" not in key or tensor > 0, f"{key}: no code was placed anew"


def check_refused(wrapped, path):
    """Rank 0 alone finds that the folder exists; every rank must raise, and none may wait for another."""
    try:
        freeze(wrapped, path)
    except FileExistsError:
        return
    raise AssertionError(f"rank {dist.get_rank()} froze into {path}, which exists")


def check_frozen(tables, case, path):
    """Every rank's eval output is what the artifact holds, bit for bit, for rows of either rank."""
    ids, store = torch.arange(50), EmbeddingStore.open(path)
    features = KeyedJaggedTensor(keys=list(FEATURES), values=ids.repeat(3), lengths=torch.ones(150, dtype=torch.long))
    if case.kind == "one":
        got = {"item": tables(ids)}
    else:
        answer = tables(features)
        got = {f: answer[f] if case.kind == "bags" else answer[f].values() for f in ("user", "item")}
    for feature, vectors in got.items():
        stored = store.lookup(feature, ids.numpy()).vectors
        assert stored.tobytes() == vectors.detach().numpy().tobytes(), f"{feature} differs from {path}"


def check_cut_is_refused():
    """A shard that ends within a subspace is found before it trains: columns 0 to 3 of subspaces 8 wide."""
    config = DPQConfig(num_subspaces=2, num_codes=4)
    model = DPQEmbedding(50, DIM, config, name="item")
    _apply_optimizer_in_backward(torch.optim.SGD, model.queries.parameters(), {"lr": 0.1})
    constraint = ParameterConstraints(sharding_types=["column_wise"], compute_kernels=["fused"], min_partition=4)
    wrapped = wrap(model, {"item": constraint}, "column_wise")
    for refused in (lambda: wrapped(torch.arange(3)), lambda: start(wrapped), lambda: freeze(wrapped, "nowhere")):
        try:
            refused()
        except ConfigError as error:
            message = str(error)
        else:
            message = "nothing: the cut was taken"
        assert "want cuts at multiples of 8" in message, message


def check_plain_tables_freeze(out):
    """Stock tables beside quantized ones, of both kinds of collection, sharded."""
    bags = [EmbeddingBagConfig(name=n, num_embeddings=50, embedding_dim=8, feature_names=[n]) for n in ("a", "b")]
    model = nn.ModuleDict(
        {
            "mixed": DPQEmbeddingBagCollection(bags, {"a": sx(), "b": None}),
            "ids": EmbeddingCollection(
                tables=[EmbeddingConfig(name="c", num_embeddings=50, embedding_dim=8, feature_names=["c"])]
            ),
            "bags": EmbeddingBagCollection(
                tables=[EmbeddingBagConfig(name="d", num_embeddings=50, embedding_dim=8, feature_names=["d"])]
            ),
        }
    )
    _apply_optimizer_in_backward(torch.optim.SGD, model.parameters(), {"lr": 0.1})
    constraint = ParameterConstraints(sharding_types=["table_wise"], compute_kernels=["fused"])
    wrapped = wrap(model, dict.fromkeys("abcd", constraint), "table_wise")
    freeze(wrapped, out / "plain")
    store = EmbeddingStore.open(out / "plain")
    ids = torch.arange(50)
    features = KeyedJaggedTensor(keys=list("abcd"), values=ids.repeat(4), lengths=torch.ones(200, dtype=torch.long))
    model.eval()
    mixed = model["mixed"](features)
    got = {
        "a": mixed["a"],
        "b": mixed["b"],
        "c": model["ids"](features)["c"].values(),
        "d": model["bags"](features)["d"],
    }
    for name, vectors in got.items():
        assert store.lookup(name, ids.numpy()).vectors.tobytes() == vectors.detach().numpy().tobytes(), name


def peak_bytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def grow_by(work: Callable[[], None]) -> int:
    """By how much the peak of this process's memory grows."""
    before = peak_bytes()
    work()
    return peak_bytes() - before


def train_big_table(out):
    """A table built on meta, sharded, started, trained and frozen: a rank may hold its rows only."""
    big = [EmbeddingBagConfig(name="big", num_embeddings=BIG_ROWS, embedding_dim=BIG_DIM, feature_names=["big"])]
    model = nn.Sequential(DPQEmbeddingBagCollection(big, vq(), device=torch.device("meta")))
    _apply_optimizer_in_backward(torch.optim.SGD, model[0].queries.parameters(), {"lr": 0.1})
    constraint = ParameterConstraints(sharding_types=["row_wise"], compute_kernels=["fused"])
    wrapped = wrap(model, {"big": constraint}, "row_wise")
    quantizer = model[0].quantizer("big")
    assert quantizer.score_norms[0].var_K.tolist() == [1.0] * 8
    start(wrapped, num_samples=1000)
    ids = torch.tensor([0, BIG_ROWS - 1])
    features = KeyedJaggedTensor(keys=["big"], values=ids, lengths=torch.ones(2, dtype=torch.long))
    wrapped(features).values().sum().backward()
    freeze(wrapped, out / "big")
    stored = EmbeddingStore.open(out / "big").lookup("big", ids.numpy()).vectors
    assert np.array_equal(stored, model[0].eval()(features).values().detach().numpy())


def main():
    out = Path(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results = {"losses": {name: run(name, out) for name in CASES}}
    check_plain_tables_freeze(out)
    if dist.get_world_size() > 1:
        check_cut_is_refused()
        growth = torch.tensor([grow_by(lambda: train_big_table(out))])
        dist.all_reduce(growth, dist.ReduceOp.MAX)
        results["big_table_bytes"] = int(growth)
    if dist.get_rank() == 0:
        (out / "results.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
