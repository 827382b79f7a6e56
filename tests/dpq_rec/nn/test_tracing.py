"""Graph capture: torch.fx sees a leaf, torch.compile calls it between its graphs, what would record ids is refused."""

import pickle

import pytest
import torch
import torchrec.fx
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torchrec import KeyedJaggedTensor

from dpq_rec.errors import ConfigError
from dpq_rec.nn import (
    DPQEmbedding,
    DPQEmbeddingBag,
    DPQEmbeddingBagCollection,
    DPQEmbeddingCollection,
    Quantizer,
    TiedLinear,
    freeze,
    warm_up,
)
from tests.dpq_rec.nn.modules import KINDS, NUM_IDS, batch, build, config, vectors

OTHER_IDS = [3, 1, 1, 8]
TRACERS = {"torch.fx": torch.fx.symbolic_trace, "torchrec.fx": torchrec.fx.symbolic_trace}


class Model(nn.Module):
    """Goes through what a table module returns as users do."""

    def __init__(self, kind, **options):
        super().__init__()
        self.kind, self.inner = kind, nn.ModuleDict({"table": build(kind, config(**options))})
        self.over = nn.Linear(28 if kind in (DPQEmbeddingCollection, DPQEmbeddingBagCollection) else 12, 1)

    def forward(self, arguments):
        out = self.inner["table"](arguments)
        if self.kind is DPQEmbeddingCollection:
            out = torch.cat([jagged.values() for jagged in out.values()], 1)
        elif self.kind is DPQEmbeddingBagCollection:
            out = out.values()
        return self.over(out)


def assert_same(model, other, arguments):
    assert torch.equal(other(arguments), model(arguments))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tracer", TRACERS)
def test_a_traced_model_answers_other_ids_as_the_model(tracer, kind):
    model = Model(kind)
    traced = TRACERS[tracer](model)
    for mode in (True, False):
        assert_same(model.train(mode), traced.train(mode), batch(kind, OTHER_IDS))


@pytest.mark.parametrize("kind", KINDS)
def test_a_traced_model_trains_the_very_weights_of_the_model(kind):
    model = Model(kind)
    traced = torch.fx.symbolic_trace(model)
    assert dict(traced.named_parameters()) == dict(model.named_parameters())
    traced(batch(kind)).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tracer", TRACERS)
def test_a_table_module_is_traced_by_itself(tracer, kind):
    module = build(kind, config()).eval()
    traced = TRACERS[tracer](module)
    ids = batch(kind, OTHER_IDS)
    got = traced(ids)
    if kind is DPQEmbeddingCollection:
        got = {name: jagged.values() for name, jagged in got.items()}
    elif kind is DPQEmbeddingBagCollection:
        got = got.to_dict()
    else:
        got = {"table": got}
    for name, tensor in vectors(module, ids).items():
        assert torch.equal(got[name], tensor)


def test_a_traced_model_is_frozen_under_the_names_of_the_model(tmp_path):
    traced = torch.fx.symbolic_trace(Model(DPQEmbedding))
    assert (freeze(traced, tmp_path / "artifact") / "tables" / "inner.table.safetensors").exists()


def test_a_bag_is_traced_with_offsets_and_weights():
    module = DPQEmbeddingBag(NUM_IDS, 12, config(), mode="sum").eval()

    class Weighted(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = module

        def forward(self, ids, offsets, weights):
            return self.module(ids, offsets=offsets, per_sample_weights=weights)

    arguments = torch.tensor(OTHER_IDS), torch.tensor([0, 3]), torch.rand(4)
    assert torch.equal(torch.fx.symbolic_trace(Weighted())(*arguments), module(*arguments))


@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_model_trains_as_the_model(kind):
    torch.manual_seed(0)
    model = Model(kind, method="vq", ema_decay=0.9, revive_after=1)
    again = pickle.loads(pickle.dumps(model))
    compiled = torch.compile(again, backend="aot_eager")
    for ids in (range(NUM_IDS), OTHER_IDS, [5]):
        assert_same(model, compiled, batch(kind, ids))
        model(batch(kind, ids)).sum().backward()
        compiled(batch(kind, ids)).sum().backward()
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
        assert (one.grad is None and other.grad is None) or torch.equal(one.grad, other.grad)
    torch._dynamo.reset()


RECORDERS = {
    "jit.trace": lambda model, ids: torch.jit.trace(model, ids),
    "jit.trace_module": lambda model, ids: torch.jit.trace_module(model, {"forward": ids}),
    "export": lambda model, ids: torch.export.export(model, (ids,)),
    "make_fx": lambda model, ids: make_fx(model)(ids),
    "make_fx, fake": lambda model, ids: make_fx(model, tracing_mode="fake")(ids),
    "grad": lambda model, ids: torch.func.grad(
        lambda weights: torch.func.functional_call(model, weights, (ids,)).sum()
    )(dict(model.named_parameters())),
    "vmap": lambda model, ids: torch.vmap(model)(ids[None]),
    "jit.script": lambda model, ids: torch.jit.script(model),
}


@pytest.mark.parametrize("kind", [DPQEmbedding, DPQEmbeddingBag])
@pytest.mark.parametrize("recorder", RECORDERS)
@pytest.mark.parametrize("training", [True, False])
def test_what_would_record_the_codes_of_these_ids_is_refused_in_a_sentence(training, recorder, kind):
    model = nn.Sequential(build(kind, config()), nn.Linear(12, 1)).train(training)
    with pytest.raises(ConfigError, match=r"got .*(torch|export).*; .*(freeze|autograd)") as raised:
        RECORDERS[recorder](model, batch(kind))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("recorder", sorted(set(RECORDERS) - {"vmap", "grad"}))
def test_a_quantizer_by_itself_is_refused_too(recorder):
    with pytest.raises(ConfigError, match="Quantizer: got"):
        RECORDERS[recorder](Quantizer(12, config()), torch.randn(3, 12))


@pytest.mark.parametrize("is_warming_up", [False, True])
@pytest.mark.parametrize("recorder", sorted(set(RECORDERS) - {"grad"}))
def test_what_would_record_a_decoded_weight_is_refused_in_a_sentence(recorder, is_warming_up):
    embedding = build(DPQEmbedding, config())
    warm_up(embedding, enabled=is_warming_up)
    with pytest.raises(ConfigError, match=r"(DPQEmbedding|TiedLinear): got .*(torch|export)") as raised:
        RECORDERS[recorder](TiedLinear(embedding).eval(), torch.randn(2, 12))
    assert "\n" not in str(raised.value)


def test_a_compiled_tied_model_reads_its_weight_between_the_graphs():
    """Not by graphs of how it is decoded, of which the compiler would make many."""
    embedding = build(DPQEmbedding, config())
    tied, graphs = TiedLinear(embedding), []
    compiled = torch.compile(tied, backend=lambda graph, inputs: graphs.append(graph) or graph)
    hidden = torch.randn(3, 12)
    for mode in (True, False):
        assert_same(tied.train(mode), compiled, hidden)
    assert all(len(graph.graph.find_nodes(op="call_function", target=torch.unique)) == 0 for graph in graphs)
    assert len(graphs) <= 2
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", [DPQEmbeddingCollection, DPQEmbeddingBagCollection])
def test_a_collection_in_a_traced_function_of_tensors_is_refused(kind):
    collection = build(kind, config())

    def look_up(ids):
        lengths = torch.ones(3 * len(ids), dtype=torch.int64)
        keyed = KeyedJaggedTensor(keys=["item", "old", "user"], values=ids.repeat(3), lengths=lengths)
        return next(iter(vectors(collection, keyed).values()))

    with pytest.raises(ConfigError, match=r"got torch\.jit\.trace"):
        torch.jit.trace(look_up, torch.tensor(OTHER_IDS))


def test_compiling_to_one_graph_says_why_not():
    with pytest.raises(torch._dynamo.exc.Unsupported, match="compile the model without fullgraph"):
        torch.compile(build(DPQEmbedding, config()), backend="eager", fullgraph=True)(batch(DPQEmbedding))
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", KINDS)
def test_functional_call_uses_the_weights_that_it_is_given(kind):
    model = Model(kind, method="sx")
    weights = {name: weight.detach() * 0.5 for name, weight in model.named_parameters()}
    got = torch.func.functional_call(model, weights, (batch(kind),))
    model.load_state_dict(weights, strict=False)
    assert torch.equal(got, model(batch(kind)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_module_on_meta_says_how_to_make_it(kind):
    module = build(kind, config(), device=torch.device("meta"))
    with pytest.raises(ConfigError, match=r"on meta.*to_empty.*reset_parameters"):
        module(batch(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_inference_mode_leaves_training_possible(kind):
    model = Model(kind, method="vq", ema_decay=0.9, revive_after=1)
    with torch.inference_mode():
        model.eval()(batch(kind))
        model.train()(batch(kind))
    model(batch(kind)).sum().backward()
    assert model.over.weight.grad is not None
