"""Ranks, devices and sharding. In: a model of plain modules. Out: the model as the ranks train it together.

Stock TorchRec throughout: its planner places the tables, its fused optimizers update them in the backward pass. A model
with small tables is whole on every rank instead, under DistributedDataParallel.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.optim import _apply_optimizer_in_backward
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel
from torchrec import EmbeddingBagCollection, EmbeddingCollection
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.optim.clipping import GradientClipping, GradientClippingOptimizer
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from dpq_rec import ConfigError, DpqRecError
from dpq_rec.nn import Quantizer

if TYPE_CHECKING:
    from training.config import RunConfig
    from training.recipes.interactions import TableOptimisation

T = TypeVar("T")
_FUSED: dict[str, tuple[type[torch.optim.Optimizer], dict[str, float]]] = {
    "rowwise-adagrad": (RowWiseAdagrad, {"eps": 1e-8}),
    "adagrad": (torch.optim.Adagrad, {"eps": 1e-8}),
    "sgd": (torch.optim.SGD, {}),
    "adam": (torch.optim.Adam, {}),
}


def choose_device(config: RunConfig) -> torch.device:
    """The device of this rank: `auto` takes CUDA where present.

    Raises:
        ConfigError: CUDA is wanted and absent; or an optimizer that the device has not.
    """
    name, has_cuda = config.run.device, torch.cuda.is_available()
    if name == "cuda" and not has_cuda:
        raise ConfigError("--device: got cuda, and no CUDA device is there; want auto or cpu")
    if name == "cpu" or not has_cuda:
        if getattr(config.optimisation, "optimizer", None) == "adam":
            want = "rowwise-adagrad, adagrad or sgd, or CUDA"
            raise ConfigError(f"--optimizer: got adam on CPU, where FBGEMM has no fused Adam; want {want}")
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """The ranks that torchrun started; without torchrun, one rank of its own."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        # torchrun keeps one store over restarts, where ranks would find addresses of those that were killed.
        store, rank, world_size = next(rendezvous("env://"))
        life = dist.PrefixStore(f"restart-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group(backend, store=life, rank=rank, world_size=world_size)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
        dist.barrier()  # time for gloo's threads to let go of the last collective's tensors: see `freeze`
    finally:
        dist.destroy_process_group()
        gc.collect()  # sharded modules hold the group in cycles, and a gloo thread that outlives Python aborts it


def shard(
    model: nn.Module, options: TableOptimisation, device: torch.device
) -> tuple[DistributedModelParallel, CombinedOptimizer]:
    """The model under DistributedModelParallel, and the optimizer of all its parameters.

    Tables and queries take the optimizer that the options name, fused into the backward pass; other parameters Adam,
    keys and values at a rate of their own.
    """
    fused, fixed = _FUSED[options.optimizer]
    collections = [m for m in model.modules() if isinstance(m, EmbeddingBagCollection | EmbeddingCollection)]
    names = []
    for collection in collections:
        _apply_optimizer_in_backward(fused, collection.parameters(), {"lr": options.learning_rate, **fixed})
        plain = isinstance(collection, EmbeddingBagCollection)
        names += [t.name for t in (collection.embedding_bag_configs() if plain else collection.embedding_configs())]
    sharders: list[Any] = [EmbeddingBagCollectionSharder(), EmbeddingCollectionSharder()]
    # Data-parallel EmbeddingCollections compute wrongly on CPU (FBGEMM #4586). Column-wise shards could be frozen where
    # they hold whole subspaces (dpq_rec.nn.subspace_constraints); rows spread a table evenly whatever D and E are.
    constraint = ParameterConstraints(sharding_types=["table_wise", "row_wise"], compute_kernels=["fused"])
    planner = EmbeddingShardingPlanner(
        topology=Topology(world_size=dist.get_world_size(), compute_device=device.type),
        constraints=dict.fromkeys(names, constraint),
    )
    plan = planner.collective_plan(model, sharders, dist.group.WORLD)
    # Running means move values without a gradient: where nothing else is dense, DDP has nothing to do, and refuses.
    of_tables = {id(weight) for collection in collections for weight in collection.parameters()}
    has_dense = any(weight.requires_grad and id(weight) not in of_tables for weight in model.parameters())
    wrapped = DistributedModelParallel(model, device=device, plan=plan, sharders=sharders, init_data_parallel=has_dense)
    _broadcast_quantizers(wrapped)
    trained = in_backward_optimizer_filter(wrapped.named_parameters())
    dense = {name: weight for name, weight in trained if weight.requires_grad}
    placed = {id(w) for module in wrapped.modules() if isinstance(module, Quantizer) for w in module.parameters()}
    values = {name: dense.pop(name) for name in list(dense) if id(dense[name]) in placed}
    rate = options.dense_learning_rate
    optimizers: list[Any] = [("fused", wrapped.fused_optimizer)]
    for name, weights, lr in (("dense", dense, rate), ("values", values, rate * options.value_rate)):
        if weights:
            optimizers.append((name, _keyed(weights, partial(torch.optim.Adam, lr=lr))))
    return wrapped, CombinedOptimizer(optimizers)


def _keyed(weights: dict[str, Any], make: Callable[[list[torch.Tensor]], torch.optim.Optimizer]) -> KeyedOptimizer:
    """An optimizer with a state already, so that a checkpoint has a place to load its own into."""
    keyed = KeyedOptimizerWrapper(weights, make)
    keyed.init_state()
    for state in keyed.state.values():
        if "step" in state:
            state["step"].zero_()  # that was none
    keyed.zero_grad()
    return keyed


def replicate(
    model: nn.Module,
    device: torch.device,
    make_optimizer: Callable[[list[torch.Tensor]], torch.optim.Optimizer],
    *,
    clip_norm: float | None = None,
) -> tuple[nn.Module, KeyedOptimizer]:
    """The model whole on every rank, as rank 0 has it, and one optimizer of all its parameters.

    Args:
        model: that fits on every rank.
        device: of this rank.
        make_optimizer: of the parameters.
        clip_norm: the largest norm of the gradient of all parameters together, averaged over ranks.
    """
    model.to(device)
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    optimizer = _keyed(trained, make_optimizer)
    if clip_norm is not None:
        optimizer = GradientClippingOptimizer(optimizer, GradientClipping.NORM, clip_norm)
    if dist.get_world_size() == 1:
        return model, optimizer
    # Quantizers sum their statistics over ranks by themselves.
    return DistributedDataParallel(model, broadcast_buffers=False), optimizer


def stored(model: nn.Module) -> nn.Module:
    """The module whose state_dict has the names that the model gave, whatever it is wrapped in."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def _broadcast_quantizers(model: nn.Module) -> None:
    """Give every rank the keys, values and statistics of rank 0; DDP broadcasts parameters alone, and not always."""
    for module in model.modules():
        if isinstance(module, Quantizer):
            for tensor in (*module.parameters(), *module.buffers()):
                dist.broadcast(tensor.data, 0)


def on_rank_0(work: Callable[[], T]) -> T:
    """What rank 0's call returns, on every rank: the others wait for it. It has to be small, and can be pickled.

    Raises:
        ConfigError: rank 0 raised one, or an OSError: on every rank, so that none is left waiting.
    """
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = work()
        except (DpqRecError, OSError) as error:
            box[1] = str(error)
    dist.broadcast_object_list(box, 0)
    if box[1] is not None:
        raise ConfigError(box[1])
    return box[0]


def check_shared_out(batch_size: int) -> None:
    """Raises ConfigError where the ranks cannot share out the examples of a step evenly."""
    if batch_size % dist.get_world_size():
        raise ConfigError(f"--batch-size: got {batch_size} on {dist.get_world_size()} ranks, want a multiple of them")


def add_up(values: list[float]) -> list[float]:
    """Each number, added up over ranks."""
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    return total.tolist()
