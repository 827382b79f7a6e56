"""Replaced models in what rewrites, wraps or reruns them, on any number of ranks. Out: the losses of each.

Each way of training runs the same steps: plain, by TorchRec's train pipelines, with checkpointed forwards, under FSDP.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import _apply_optimizer_in_backward
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torchrec import EmbeddingBagCollection, EmbeddingCollection, KeyedJaggedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import (
    EvalPipelineSparseDist,
    TrainPipelineBase,
    TrainPipelineSparseDist,
)
from torchrec.distributed.train_pipeline.train_pipelines import TrainPipelineSparseDistLite
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig
from torchrec.streamable import Pipelineable

from dpq_rec import DPQConfig, EmbeddingStore
from dpq_rec.nn import freeze, replace_embeddings
from tests.distributed.model import load_whole
from tests.dpq_rec.nn.holding import HELD, side_by_side

CPU = torch.device("cpu")
ROWS, DIM, NUM_STEPS, NUM_EXAMPLES = 40, 8, 4, 12
FEATURES = ("item", "old", "user", "tag")
MOVING = {"method": "vq", "num_subspaces": 4, "num_codes": 8, "ema_decay": 0.8, "revive_after": 2}
CONFIGS = {"moving": DPQConfig(**MOVING), "sx": DPQConfig(num_subspaces=4, num_codes=8)}
REPLACED = {
    "one table of two": ("item",),
    "all": ("item", "user", "tag", "word"),
}
PIPELINES = {
    "base": lambda *arguments: TrainPipelineBase(*arguments),
    "sparse dist": lambda *arguments: TrainPipelineSparseDist(*arguments),
    "sparse dist, postproc": lambda *arguments: TrainPipelineSparseDist(*arguments, pipeline_postproc=True),
    "sparse dist, jit": lambda *arguments: TrainPipelineSparseDist(*arguments, apply_jit=True),
    "sparse dist lite": lambda *arguments: TrainPipelineSparseDistLite(*arguments),
}


@dataclass
class Batch(Pipelineable):
    """A rank's share of a step's examples."""

    features: KeyedJaggedTensor
    words: torch.Tensor
    labels: torch.Tensor

    def to(self, device, non_blocking=False):
        moved = [x.to(device, non_blocking=non_blocking) for x in (self.features, self.words, self.labels)]
        return Batch(*moved)

    def record_stream(self, stream):
        raise AssertionError("no streams on CPU")

    def pin_memory(self):
        return self


def batches():
    """The steps' batches; the same examples on any number of ranks, apart in the two halves, for revival's draws."""
    rank, size, half = dist.get_rank(), dist.get_world_size(), NUM_EXAMPLES // 2
    share = slice(rank * NUM_EXAMPLES // size, (rank + 1) * NUM_EXAMPLES // size)
    second = torch.arange(NUM_EXAMPLES) >= half
    for step in range(NUM_STEPS):
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(0, 10, (len(FEATURES), NUM_EXAMPLES, 2), generator=generator) + 10 * second[:, None]
        words = torch.randint(0, ROWS // 2, (NUM_EXAMPLES,), generator=generator) + ROWS // 2 * second
        labels = torch.randn(NUM_EXAMPLES, generator=generator)
        values = ids[:, share].reshape(-1)
        lengths = torch.full((len(FEATURES) * (share.stop - share.start),), 2)
        yield Batch(KeyedJaggedTensor(list(FEATURES), values, lengths=lengths), words[share], labels[share])


class Model(nn.Module):
    """Tables of every kind, and a layer over them."""

    def __init__(self):
        super().__init__()
        size = {"num_embeddings": ROWS, "embedding_dim": DIM}
        self.bags = EmbeddingBagCollection(
            [
                EmbeddingBagConfig(name="item", feature_names=["item", "old"], **size),
                EmbeddingBagConfig(name="user", feature_names=["user"], **size),
            ]
        )
        self.ids = EmbeddingCollection([EmbeddingConfig(name="tag", feature_names=["tag"], **size)])
        self.word = nn.Embedding(ROWS, DIM)
        self.over = nn.Linear(5 * DIM, 1)

    def forward(self, batch):
        tags = self.ids(batch.features)["tag"].to_padded_dense(2).sum(1)
        bags = self.bags(batch.features)
        vectors = [bags["item"], bags["old"], bags["user"], tags, self.word(batch.words)]
        loss = nn.functional.mse_loss(self.over(torch.cat(vectors, 1))[:, 0], batch.labels)
        return loss, loss.detach()


class Holding(nn.Module):
    """One of TorchRec's modules around a collection, and a layer over it."""

    def __init__(self, name):
        super().__init__()
        self.holder, self.over = HELD[name](), nn.Linear(3 * DIM, 1)

    def forward(self, batch):
        looked = self.holder(batch.features)
        vectors = looked if isinstance(looked, torch.Tensor) else side_by_side(looked)
        loss = nn.functional.mse_loss(self.over(vectors)[:, 0], batch.labels)
        return loss, loss.detach()


def sharded(model):
    """Under DMP, tables trained by an optimizer in backward, and the optimizer of the rest."""
    for module in model.modules():
        if isinstance(module, EmbeddingBagCollection | EmbeddingCollection):
            _apply_optimizer_in_backward(torch.optim.SGD, module.parameters(), {"lr": 0.2})
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wrapped = DistributedModelParallel(model, device=CPU)
    load_whole(wrapped, weights)
    return wrapped, _sgd([p for p in wrapped.parameters() if not hasattr(p, "_in_backward_optimizers")])


def _sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def replaced(model, tables, config="moving"):
    return replace_embeddings(model, CONFIGS[config], tables=tables) if tables else model


def over_ranks(losses):
    """Their means over ranks."""
    total = torch.stack(losses)
    dist.all_reduce(total)
    return (total / dist.get_world_size()).tolist()


def loop(wrapped, optimizer, forward=None):
    """The plain loop."""
    losses = []
    for batch in batches():
        loss, said = (forward or wrapped)(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(said)
    return over_ranks(losses)


def pipelined(pipeline):
    """The losses of a pipeline, and which sharded modules it sends ids ahead for."""
    losses, source = [], batches()
    while True:
        try:
            losses.append(pipeline.progress(source))
        except StopIteration:
            break
    return over_ranks(losses), [module.forward.name for module in getattr(pipeline, "_pipelined_modules", ())]


def by_pipelines():
    """Tables that are replaced -> way of training -> losses, and what was pipelined."""
    report = {}
    for name, tables in REPLACED.items():
        said = report[name] = {"plain": [loop(*_fresh(tables)), []]}
        for pipeline, make in PIPELINES.items():
            said[pipeline] = pipelined(make(*_fresh(tables), CPU))
        model, optimizer = _fresh(tables)
        said["eval"] = pipelined(EvalPipelineSparseDist(model.eval(), optimizer, CPU))
        model, _ = _fresh(tables)
        with torch.no_grad():
            said["plain eval"] = [over_ranks([model.eval()(batch)[1] for batch in batches()]), []]
    return report


def _fresh(tables):
    torch.manual_seed(0)
    return sharded(replaced(Model(), tables))


def by_holders():
    """Holder -> losses."""
    report = {}
    for name in HELD:
        torch.manual_seed(0)
        report[name] = loop(*sharded(replaced(Holding(name), ["item", "user"])))
    return report


def by_checkpointing():
    """Way -> losses, of a model under DMP whose statistics, values and keys move by use."""
    report = {}
    for name, options in {"plain": None, "reentrant": True, "not reentrant": False}.items():
        wrapped, optimizer = _fresh(REPLACED["all"])

        def forward(batch, wrapped=wrapped, options=options):
            if options is None:
                return wrapped(batch)
            anchor = torch.zeros((), requires_grad=True)  # reentrant checkpointing wants an input with a gradient
            loss = checkpoint(lambda a: wrapped(batch)[0] + a, anchor, use_reentrant=options)
            return loss, loss.detach()

        report[name] = loop(wrapped, optimizer, forward)
    return report


def by_data_parallel(out):
    """Way -> losses, of a model without DMP; and which tables are served otherwise than FSDP returned them."""
    report = {}
    for name in ("DDP", "FSDP's wrapper", "FSDP"):
        torch.manual_seed(0)
        model = replaced(Model(), REPLACED["all"], "sx")
        wrapped = DistributedDataParallel(model)
        if name == "FSDP's wrapper":
            wrapped = FullyShardedDataParallel(wrapped.module, device_id=torch.device("cpu"))
        elif name == "FSDP":
            mesh = init_device_mesh("cpu", (dist.get_world_size(),))
            wrapped = fully_shard(wrapped.module, mesh=mesh)
        report[name] = loop(wrapped, _sgd(wrapped.parameters()))
    freeze(wrapped, out)
    words, returned = torch.arange(ROWS), []
    wrapped.eval().word.register_forward_hook(lambda module, arguments, vectors: returned.append(vectors.detach()))
    for batch in batches():
        batch.words = words[: len(batch.labels)]
        wrapped(batch)
    served = EmbeddingStore.open(out).lookup("word", words.numpy()).vectors
    report["served as FSDP returned it"] = torch.equal(torch.from_numpy(served)[: len(returned[0])], returned[0])
    return report


def report(out):
    """All of it; every rank calls this."""
    return {
        "pipelines": by_pipelines(),
        "holders": by_holders(),
        "checkpointing": by_checkpointing(),
        "data parallel": by_data_parallel(out / "data parallel"),
    }
