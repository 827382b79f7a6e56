"""What every rank sees, as plain facts for the tests to judge. In: a model under DMP. Out: what JSON can hold."""

import hashlib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torchrec import KeyedJaggedTensor

from dpq_rec import EmbeddingStore
from dpq_rec.errors import ConfigError
from dpq_rec.nn import freeze, start
from dpq_rec.nn.shards import rows_of, shards_of
from tests.distributed.cases import EMBEDDING_DIM, FEATURES, SIZES
from tests.distributed.model import batch


def of_all_ranks(fact):
    """Rank -> what it says; every rank calls this."""
    said = [None] * dist.get_world_size()
    dist.all_gather_object(said, fact)
    return said


def differing(model):
    """Parameters and buffers beside the tables that have not the same bits on every rank."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    kept = [(name, tensor) for name, tensor in tensors if ".queries." not in name and ".plain." not in name]
    digests = {name: hashlib.sha256(tensor.detach().numpy().tobytes()).hexdigest() for name, tensor in kept}
    assert any("values_MKS" in name for name in digests), f"no quantizer among {list(digests)}"
    said = of_all_ranks(digests)
    return [name for name in digests if len({ranks.get(name) for ranks in said}) > 1]


def owners(model):
    """Table -> the ranks that hold some of its queries."""
    return {name: sorted({s.owner for s in shards_of(w)}) for name, w in model.tables.query_weights().items()}


def queries(model):
    """Table -> its queries, whole."""
    weights = model.tables.query_weights()
    return {name: rows_of(weight, torch.arange(len_of(weight))) for name, weight in weights.items()}


def len_of(weight):
    """Rows of a weight, sharded or not."""
    return max(s.first_row + s.num_rows for s in shards_of(weight))


def served_otherwise(model, path):
    """Features whose vectors in eval mode have not the bits of the artifact's, for rows of every shard."""
    num_ids = 49
    ids = {"user": torch.arange(1, 2 * num_ids, 2), "item": torch.arange(1, num_ids + 1)}
    features = KeyedJaggedTensor(
        keys=list(FEATURES),
        values=torch.cat([ids[table] for table in FEATURES.values()]),
        lengths=torch.ones(num_ids * len(FEATURES), dtype=torch.long),
        weights=torch.ones(num_ids * len(FEATURES)) if model.case.weighted else None,
    )
    model.eval()
    with torch.no_grad():
        pooled = model.pool(features).split(EMBEDDING_DIM, 1)
    model.train()
    store = EmbeddingStore.open(path)
    otherwise = []
    for (feature, table), vectors_BE in zip(FEATURES.items(), pooled, strict=True):
        name = table if table in model.case.sizes else "user"
        stored_BE = store.lookup(name, ids[table].numpy()).vectors
        if stored_BE.tobytes() != vectors_BE.contiguous().numpy().tobytes():
            otherwise.append(feature)
    return otherwise


def refusal(action):
    """What it raised, for a user to read."""
    try:
        action()
    except (ConfigError, FileExistsError) as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def refusals_of_cuts(model, wrapped, out: Path):
    """What each entry says to column shards that cut through a subspace."""
    features, labels = batch(model.case, 0, dist.get_rank(), dist.get_world_size())
    return {
        "forward": refusal(lambda: wrapped(features, labels)),
        "start": refusal(lambda: start(wrapped)),
        "freeze": refusal(lambda: freeze(wrapped, out / "never made")),
    }


def refusals_of_not_finite(model, wrapped, out: Path):
    """What each entry says to a query of row 70 that is NaN, and which the last rank alone asks for; then to none."""
    user = 70 if dist.get_rank() == dist.get_world_size() - 1 else 3
    ids = torch.tensor([{"user": user}.get(table, 1) for table in FEATURES.values()])
    features = KeyedJaggedTensor(keys=list(FEATURES), values=ids, lengths=torch.ones(len(ids), dtype=torch.long))
    entries = {
        "forward": lambda: wrapped(features, torch.ones(1)).backward(),
        "start": lambda: start(wrapped, num_samples=2),
        "freeze": lambda: freeze(wrapped, out / "never made"),
    }
    before = _set_query(model, 70, float("nan"))
    said = {name: refusal(action) for name, action in entries.items() if name != "freeze" or not model.is_warming_up}
    _set_query(model, 70, before)
    return {**said, "mended": refusal(entries["forward"])}


def _set_query(model, row, number):
    """Set the first number of a row of the users' queries, on the rank that holds it; what it was there."""
    before = 0.0
    for shard in shards_of(model.tables.query_weights()["user"]):
        here = row - shard.first_row
        if shard.tensor is not None and 0 <= here < shard.num_rows and shard.first_column == 0:
            before = float(shard.tensor[here, 0])
            shard.tensor[here, 0] = number
    return before


def first_state(model):
    """How a model begins that was built on meta."""
    shards = [
        shard.tensor
        for weight in model.tables.query_weights().values()
        for shard in shards_of(weight)
        if shard.tensor is not None
    ]
    buffers = dict(model.named_buffers())
    return {
        "norm means": sorted({m for name, b in buffers.items() if name.endswith("mean_K") for m in b.tolist()}),
        "norm variances": sorted({v for name, b in buffers.items() if name.endswith("var_K") for v in b.tolist()}),
        "zeros": [name for name, parameter in model.named_parameters() if parameter.numel() and not parameter.any()],
        "query bounds": [float(tensor.abs().max()) for tensor in shards],
        "query spreads": [float(tensor.std()) for tensor in shards],
        "table rows": {name: len_of(weight) for name, weight in model.tables.query_weights().items()},
    }


def resident_bytes(field):
    """VmRSS, memory of this process, or VmHWM, its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"/proc/self/status has no {field}")


def frozen_vectors(path, name):
    """All vectors of a frozen table."""
    return EmbeddingStore.open(path).lookup(name, np.arange(SIZES[name])).vectors
