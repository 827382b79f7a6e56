"""Models in wrappers, at any depth: tables keep the names that the user knows, and freeze to what the model returns."""

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper, offload_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torchrec.distributed.model_parallel import DistributedModelParallel

from dpq_rec import EmbeddingStore, Int64Vocabulary
from dpq_rec.errors import ConfigError
from dpq_rec.nn import freeze, replace_embeddings, start, warm_up
from dpq_rec.nn.model import find_tables
from tests.dpq_rec.nn.modules import NUM_IDS, config

pytestmark = pytest.mark.usefixtures("one_rank")
IDS = torch.arange(NUM_IDS)
NAMES = ("first", "inner.0")


class Model(nn.Module):
    """The sum of two tables' vectors."""

    def __init__(self):
        super().__init__()
        self.first, self.inner = nn.Embedding(NUM_IDS, 12), nn.Sequential(nn.Embedding(NUM_IDS, 12))

    def forward(self, ids):
        return self.first(ids) + self.inner(ids)


def inside(model, wrapper):
    """Wrapped at every depth."""
    model.first, model.inner[0], model.inner = wrapper(model.first), wrapper(model.inner[0]), wrapper(model.inner)
    return wrapper(model)


def compiled(module):
    return torch.compile(module, backend="eager")


def sharded(module):
    return fully_shard(module, mesh=init_device_mesh("cpu", (1,)))


def flattened(module, **options):
    return FullyShardedDataParallel(module, device_id=torch.device("cpu"), **options)


WRAPPERS = {
    "compile": compiled,
    "compile at every depth": lambda model: inside(model, compiled),
    "DDP": DistributedDataParallel,
    "DDP of compile": lambda model: DistributedDataParallel(compiled(model)),
    "compile of DDP": lambda model: compiled(DistributedDataParallel(model)),
    "DataParallel": DataParallel,
    "DMP": lambda model: DistributedModelParallel(model, device=torch.device("cpu")),
    "checkpoint at every depth": lambda model: inside(model, checkpoint_wrapper),
    "offload": offload_wrapper,
    "AveragedModel": AveragedModel,
    "AveragedModel, buffers": lambda model: AveragedModel(model, use_buffers=True),
    "fully_shard": sharded,
    "fully_shard at every depth": lambda model: inside(model, sharded),
    "compile of fully_shard": lambda model: compiled(sharded(model)),
    "FSDP's wrapper": flattened,
    "FSDP's wrapper, original parameters": lambda model: flattened(model, use_orig_params=True),
    "fx": torch.fx.symbolic_trace,
}


def replaced(**options):
    torch.manual_seed(0)
    return replace_embeddings(Model(), config(**options))


def train(model):
    """Two steps; an average takes in each."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (model(IDS) - 1).square().mean().backward()
        optimizer.step()
        if isinstance(model, AveragedModel):
            model.update_parameters(model.module)


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapped_model_freezes_to_what_it_returns_and_trains_on(name, tmp_path):
    model = WRAPPERS[name](replaced())
    train(model)
    ids = Int64Vocabulary(IDS.numpy() + 100, IDS.numpy().astype("uint32"))
    store = EmbeddingStore.open(freeze(model, tmp_path / "artifact", vocabularies={"inner.0": ids}))
    served = torch.from_numpy(store.lookup("first", IDS.numpy()).vectors)
    served = served + torch.from_numpy(store.lookup("inner.0", IDS.numpy() + 100).vectors)
    assert torch.equal(model.eval()(IDS), served)
    train(model.train())


@pytest.mark.parametrize("name", sorted(set(WRAPPERS) - {"fx"}))
def test_tables_are_named_as_without_the_wrapper(name):
    assert tuple(find_tables(WRAPPERS[name](replaced()))) == NAMES


@pytest.mark.parametrize("wrapper", [compiled, checkpoint_wrapper, lambda model: inside(model, compiled)])
def test_a_wrapped_model_is_replaced_by_the_names_of_the_user(wrapper):
    model = replace_embeddings(wrapper(Model()), {"inner.0": config()})
    assert tuple(find_tables(model)) == ("inner.0",)
    model(IDS).sum().backward()


def test_plain_tables_under_fully_shard_freeze_to_what_they_hold(tmp_path):
    model = sharded(replace_embeddings(Model(), config(), tables=["first"]))
    train(model)
    store = EmbeddingStore.open(freeze(model, tmp_path / "artifact", tables=["inner.0"]))
    held = model.inner[0].weight.full_tensor().detach()
    assert torch.equal(torch.from_numpy(store.lookup("inner.0", IDS.numpy()).vectors), held)
    train(model)


@pytest.mark.parametrize("options", [{"method": "vq", "ema_decay": 0.9}, {"method": "sx", "revive_after": 2}])
def test_what_moves_without_gradients_is_refused_under_fully_shard(options):
    model = sharded(replaced(**options))
    with pytest.raises(ConfigError, match=r"ema_decay or revive_after under FSDP.*; train it under Distributed"):
        model(IDS)


def test_start_and_replace_are_refused_under_fully_shard():
    model = sharded(replaced())
    with pytest.raises(ConfigError, match="call start before"):
        start(model)
    with pytest.raises(ConfigError, match="replace its embeddings before it is wrapped"):
        replace_embeddings(model, config())


@pytest.mark.parametrize("wrapper", [sharded, flattened])
def test_resizing_is_refused_under_fsdp(wrapper):
    model = replaced()
    wrapper(model)
    with pytest.raises(ConfigError, match="resize it before it is distributed"):
        model.first.resize(NUM_IDS + 1)


def test_tables_beside_layers_under_fully_shard_are_replaced_started_and_frozen(tmp_path):
    model = nn.ModuleDict({"word": nn.Embedding(NUM_IDS, 12), "layer": sharded(nn.Linear(12, 12))})
    start(replace_embeddings(model, config(method="vq", ema_decay=0.9)))
    model["layer"](model["word"](IDS)).sum().backward()
    freeze(model, tmp_path / "artifact")


def test_warm_up_under_fully_shard_hands_out_the_queries():
    model = sharded(replaced())
    warm_up(model)
    train(model)
    queries = [p for name, p in model.named_parameters() if ".queries." in name]
    assert torch.equal(model.eval()(IDS), sum(q.full_tensor() for q in queries))
