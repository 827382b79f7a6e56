"""The four modules in small, with a batch for each, and the dense tables that they stand for."""

import torch
from torchrec import KeyedJaggedTensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig, PoolingType

from dpq_rec import DPQConfig
from dpq_rec.nn import DPQEmbedding, DPQEmbeddingBag, DPQEmbeddingBagCollection, DPQEmbeddingCollection

# Vectors are the same in training and eval mode, and gradients pass straight through: those of the queries are those
# of a dense table of the decoded vectors.
STRAIGHT = {"method": "vq", "batch_norm": False}
NUM_IDS = 20  # of the batch


def config(num_subspaces=4, num_codes=5, **options):
    """Of tables that tests make so small that they would stay plain."""
    return DPQConfig(num_subspaces=num_subspaces, num_codes=num_codes, quantize_small=True, **options)


def keyed(lists_by_feature, weights=None, dtype=torch.int64):
    """Feature -> bags of ids."""
    lengths = [len(bag) for lists in lists_by_feature.values() for bag in lists]
    ids = [i for lists in lists_by_feature.values() for bag in lists for i in bag]
    return KeyedJaggedTensor(
        keys=list(lists_by_feature),
        values=torch.tensor(ids, dtype=dtype),
        lengths=torch.tensor(lengths, dtype=dtype),
        weights=weights,
    )


def two_tables(kind, num_embeddings, **more):
    """`item` serves two features, `user` one; two dimensions."""
    pooled = {"pooling": PoolingType.SUM} if kind is EmbeddingBagConfig else {}
    return [
        kind(name="item", num_embeddings=num_embeddings, embedding_dim=8, feature_names=["item", "old"], **pooled),
        kind(name="user", num_embeddings=num_embeddings, embedding_dim=12, feature_names=["user"], **pooled, **more),
    ]


def build(kind, quantized, *, num_embeddings=NUM_IDS, device=None):
    """A module of a kind, of tables of as many rows."""
    if kind is DPQEmbedding:
        return DPQEmbedding(num_embeddings, 12, quantized, padding_idx=0, device=device)
    if kind is DPQEmbeddingBag:
        return DPQEmbeddingBag(num_embeddings, 12, quantized, mode="max", device=device)
    config_kind = EmbeddingBagConfig if kind is DPQEmbeddingBagCollection else EmbeddingConfig
    return kind(two_tables(config_kind, num_embeddings), quantized, device=device)


def batch(kind, ids=range(NUM_IDS)):
    """The module's arguments that ask every table for the ids, one a bag; collections want an example at least."""
    if kind is DPQEmbedding:
        return torch.tensor(ids, dtype=torch.int64)
    if kind is DPQEmbeddingBag:
        return torch.tensor(ids, dtype=torch.int64)[:, None]
    return keyed({name: [[i] for i in ids] or [[]] for name in ("item", "old", "user")})


def vectors(module, arguments):
    """Output name -> vectors [T, E] or bags [B, E]; `table` for the modules of one table."""
    out = module(arguments)
    if isinstance(module, DPQEmbeddingBagCollection):
        return {name: out[name] for name in out.keys()}  # noqa: SIM118, no mapping
    if isinstance(module, DPQEmbeddingCollection):
        return {name: jagged.values() for name, jagged in out.items()}
    return {"table": out}


def train(module, arguments, steps=3, lr=0.1):
    """Some steps of SGD; the loss of each."""
    optimizer, losses = torch.optim.SGD(module.parameters(), lr=lr), []
    for _ in range(steps):
        loss = sum((v - 1).square().sum(-1).mean() for v in vectors(module.train(), arguments).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def decoded(module, table="table"):
    """The dense table that a table stands for in eval mode, zeros in the padding row."""
    quantizer = module.quantizer(table)
    weight = quantizer.decode(quantizer.encode(module.query_weights()[table])).detach().clone()
    if module.padding_idx is not None:
        weight[module.padding_idx] = 0
    return weight


def queries(module, table="table"):
    """The parameter that holds a table's queries."""
    return next(p for name, p in module.queries.named_parameters() if name.endswith(f".{table}.weight"))


KINDS = (DPQEmbedding, DPQEmbeddingBag, DPQEmbeddingCollection, DPQEmbeddingBagCollection)
