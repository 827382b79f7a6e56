"""TorchRec's modules around a collection: replaced they do the same and can be sharded, or they are refused by name."""

import pytest
import torch
from torch import nn
from torchrec.distributed.model_parallel import DistributedModelParallel

from dpq_rec import EmbeddingStore
from dpq_rec.errors import ConfigError
from dpq_rec.nn import freeze, replace_embeddings
from dpq_rec.nn.tables import DPQTables
from tests.dpq_rec.nn.holding import HELD, REFUSED, ROWS, side_by_side
from tests.dpq_rec.nn.modules import config, decoded, keyed

BATCH = {"item": [[1, 2, 2], [], [3]], "old": [[4], [5, 6], []], "user": [[7, 7], [8], [9, 19]]}


class Model(nn.Module):
    """One holder, and a layer over it."""

    def __init__(self, holder):
        super().__init__()
        self.holder, self.over = holder, nn.Linear(24, 1)

    def forward(self, features):
        looked = self.holder(features)
        return self.over(looked if isinstance(looked, torch.Tensor) else side_by_side(looked))


def weights_of_tables(model):
    """Of a stock model: table -> its weight."""
    return {
        name.split(".")[-2]: p for name, p in model.named_parameters() if name.endswith(("item.weight", "user.weight"))
    }


def twins(name):
    """A model with its tables replaced, and the stock one of the same vectors and other weights."""
    torch.manual_seed(0)
    stock = Model(HELD[name]())
    torch.manual_seed(0)
    replaced = replace_embeddings(Model(HELD[name]()), config(method="vq", batch_norm=False))
    (tables,) = [module for module in replaced.modules() if isinstance(module, DPQTables)]
    with torch.no_grad():
        for table, weight in weights_of_tables(stock).items():
            weight.copy_(decoded(tables, table))
    return replaced, stock


@pytest.mark.parametrize("name", HELD)
def test_a_replaced_holder_does_what_it_did_to_the_vectors(name):
    replaced, stock = twins(name)
    torch.testing.assert_close(replaced.eval()(keyed(BATCH)), stock.eval()(keyed(BATCH)))


@pytest.mark.parametrize("name", HELD)
def test_what_a_holder_holds_beside_the_tables_has_the_gradients_of_the_stock_one(name):
    replaced, stock = twins(name)
    for model in (replaced, stock):
        model(keyed(BATCH)).square().sum().backward()
    got = dict(replaced.named_parameters())
    for path, parameter in stock.named_parameters():
        if path in got:
            torch.testing.assert_close(got[path].grad, parameter.grad)


@pytest.mark.parametrize("name", HELD)
def test_a_replaced_holder_is_the_same_kind_of_module(name):
    model = Model(HELD[name]())
    holder, kind = model.holder, type(model.holder)
    assert replace_embeddings(model, config()).holder is holder
    assert isinstance(holder, kind)


@pytest.mark.parametrize("name", HELD)
@pytest.mark.usefixtures("one_rank")
def test_a_replaced_holder_is_sharded_trained_and_frozen(name, tmp_path):
    model = replace_embeddings(Model(HELD[name]()), config(method="vq"))
    wrapped = DistributedModelParallel(model, device=torch.device("cpu"))
    assert {name for plan in wrapped.plan.plan.values() for name in plan} == {"item", "user"}
    before = wrapped(keyed(BATCH))
    before.sum().backward()
    store = EmbeddingStore.open(freeze(wrapped, tmp_path / "artifact"))
    assert store.lookup("item", range(ROWS)).vectors.any()


@pytest.mark.usefixtures("one_rank")
def test_a_holder_whose_tables_stay_is_sharded_as_a_whole():
    model = nn.ModuleDict({"held": HELD["feature processors"](), "word": nn.Embedding(ROWS, 8)})
    replace_embeddings(model, config(), tables=["word"])
    wrapped = DistributedModelParallel(model, device=torch.device("cpu"))
    assert set(wrapped.plan.plan) == {"held", "word.queries.8"}


@pytest.mark.parametrize("name", REFUSED)
def test_tables_whose_rows_a_holder_moves_are_refused_before_anything_changes(name):
    model = nn.ModuleDict({"word": nn.Embedding(ROWS, 8), "deep": Model(REFUSED[name]())})
    modules = list(model.modules())
    kind = type(model["deep"].holder).__name__
    with pytest.raises(ConfigError, match=rf"table 'item': got a {kind} around it at deep\.holder.*tables=") as raised:
        replace_embeddings(model, config())
    assert "\n" not in str(raised.value)
    assert all(one is other for one, other in zip(model.modules(), modules, strict=True))


@pytest.mark.parametrize("name", REFUSED)
def test_other_tables_of_a_model_with_such_a_holder_are_replaced(name):
    model = nn.ModuleDict({"word": nn.Embedding(ROWS, 8), "holder": REFUSED[name]()})
    holder = model["holder"]
    replace_embeddings(model, config(), tables=["word"])
    assert isinstance(model["word"], DPQTables)
    assert model["holder"] is holder
    assert not any(isinstance(module, DPQTables) for module in holder.modules())


def test_a_subclass_of_such_a_holder_is_refused_too():
    class Mine(type(REFUSED["managed collisions of bags"]())):
        """As users write them."""

    holder = REFUSED["managed collisions of bags"]()
    holder.__class__ = Mine
    with pytest.raises(ConfigError, match="got a Mine around it at the model"):
        replace_embeddings(holder, config())
