"""What the tests run under torchrun: every case, `graphs`, then what must be refused, and models built on meta.

In: a folder. Out, written by rank 0: OUT/report.json, what all ranks saw; OUT/CASE, artifacts; OUT/CASE.pt, weights.
Each case trains on the same examples, whatever the number of ranks: a rank takes its share.
"""

import gc
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from dpq_rec import DPQConfig
from dpq_rec.nn import DPQEmbeddingBagCollection, freeze, start, warm_up
from tests.distributed import checks, graphs, tied
from tests.distributed.cases import CASES, NUM_STEPS, Case, default_config
from tests.distributed.model import Model, batch, constraints, dense_optimizer, shard, shard_with_weights, train_step

BIG_TABLE = {"num_embeddings": 1_000_000, "embedding_dim": 64}
NOT_FINITE = {  # with sums over ranks of its own, and with none
    "vq": Case(config=default_config("vq", ema_decay=0.9, revive_after=2), sharding="row_wise"),
    "sx-no_batch_norm": Case(config=default_config("sx", batch_norm=False), sharding="column_wise"),
    "warm-up": Case(config=default_config("sx"), sharding="table_wise", full_steps=1),
}
META = {
    "table_wise": Case(config=default_config("sx", share_subspaces=True), sharding="table_wise", plain_items=True),
    "row_wise": Case(config=default_config("vq", ema_decay=0.9, num_levels=2, revive_after=2), sharding="row_wise"),
    "column_wise": Case(config=default_config("vq"), sharding="column_wise", num_shards=4),
}


def train(case, out):
    """Ten steps, then freeze."""
    torch.manual_seed(0)
    model = Model(case)
    wrapped = shard_with_weights(model, constraints(model))
    report = {"owners": checks.owners(model)}
    if case.full_steps:
        warm_up(wrapped)
        report["losses of full steps"] = _losses(model, wrapped, range(-case.full_steps, 0))
        warm_up(wrapped, enabled=False)
    if case.start:
        torch.manual_seed(dist.get_rank())  # what k-means does not place is random, and must come from one rank
        start(wrapped, seed=3)
        report["differing after start"] = checks.differing(model)
    saved = {"first": _quantizers(model)}
    report["losses"] = _losses(model, wrapped, range(NUM_STEPS))
    report["differing"] = checks.differing(model)
    saved |= {"last": _quantizers(model), "queries": checks.queries(model)}
    freeze(wrapped, out, version="of-a-test")
    report["freeze into the same folder"] = checks.of_all_ranks(checks.refusal(lambda: freeze(wrapped, out)))
    report["served otherwise"] = checks.of_all_ranks(checks.served_otherwise(model, out))
    if dist.get_rank() == 0:
        torch.save(saved, out.with_suffix(".pt"))
    return report


def _quantizers(model):
    return {name: tensor.clone() for name, tensor in model.tables.quantizers.state_dict().items()}


def _losses(model, wrapped, steps):
    optimizer, world_size, losses = dense_optimizer(wrapped), dist.get_world_size(), []
    for step in steps:
        total = train_step(model, wrapped, optimizer, *batch(model.case, step, dist.get_rank(), world_size))
        dist.all_reduce(total)
        losses.append((total / world_size).tolist())
    return losses


def cut_through_subspaces(out):
    """Shards of 4 columns where subspaces have 8; every rank must refuse, and none wait for another."""
    case = Case(config=DPQConfig(num_subspaces=2, num_codes=4), sharding="column_wise")
    model = Model(case)
    cut = ParameterConstraints(sharding_types=["column_wise"], compute_kernels=["fused"], min_partition=4)
    wrapped = shard(model, dict.fromkeys(case.sizes, cut))
    return checks.of_all_ranks(checks.refusals_of_cuts(model, wrapped, out))


def not_finite(case, out):
    """Every rank must refuse, whichever of them asks for the row or holds it, and none wait for another."""
    model = Model(case)
    wrapped = shard(model, constraints(model))
    model.is_warming_up = bool(case.full_steps)
    warm_up(wrapped, enabled=model.is_warming_up)
    return checks.of_all_ranks(checks.refusals_of_not_finite(model, wrapped, out))


def built_on_meta(case):
    """How it begins, and whether it trains."""
    torch.manual_seed(dist.get_rank())  # so that only what is sent from rank to rank is the same on both
    model = Model(case, device=torch.device("meta"))
    wrapped = shard(model, constraints(model))
    report = {"first": checks.of_all_ranks(checks.first_state(model)), "differing at first": checks.differing(model)}
    return report | {"losses": _losses(model, wrapped, range(NUM_STEPS)), "differing": checks.differing(model)}


def memory_of_a_big_table(out):
    """By how much each rank's peak grows when a table of 256 MB is built on meta, sharded, trained and frozen."""
    before = checks.resident_bytes("VmRSS")
    case = Case(config=DPQConfig(num_subspaces=4, num_codes=8), sharding="row_wise")
    model = Model(case, device=torch.device("meta"))
    table = EmbeddingBagConfig(name="user", feature_names=["user"], **BIG_TABLE)
    model.tables = DPQEmbeddingBagCollection([table], case.config, device=torch.device("meta"))
    model.over = torch.nn.Linear(BIG_TABLE["embedding_dim"], 1, device="meta")
    wrapped = shard(model, constraints(model))
    rank, world_size = dist.get_rank(), dist.get_world_size()
    train_step(model, wrapped, dense_optimizer(wrapped), *batch(case, 0, rank, world_size))
    freeze(wrapped, out)
    return checks.of_all_ranks(checks.resident_bytes("VmHWM") - before)


def main():
    out = Path(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    # First, while the peak of this process is what its imports took.
    report = {"growth": memory_of_a_big_table(out / "big")}
    report["cases"] = {name: train(case, out / name) for name, case in CASES.items()}
    report["graphs"] = graphs.report(out)
    report["tied"] = {name: tied.train(case, out / name) for name, case in tied.TIED.items()}
    if dist.get_world_size() > 1:
        report["cuts"] = cut_through_subspaces(out)
        report["not finite"] = {name: not_finite(case, out) for name, case in NOT_FINITE.items()}
        report["meta"] = {name: built_on_meta(case) for name, case in META.items()}
    if dist.get_rank() == 0:
        (out / "report.json").write_text(json.dumps(report))
    dist.destroy_process_group()
    gc.collect()  # as `training.distributed.process_group` does, and for the same reason


if __name__ == "__main__":
    main()
