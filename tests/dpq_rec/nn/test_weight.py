"""The decoded weight of a DPQ table: what forward gives for all rows, output layers that are tied to it, resizing."""

import copy
import io
import re

import numpy as np
import pytest
import torch
import torch.fx
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional

from dpq_rec import ConfigError, DPQConfig, EmbeddingStore
from dpq_rec.nn import DPQEmbedding, DPQEmbeddingBag, TiedLinear, freeze, replace_embeddings, warm_up
from tests.dpq_rec.nn.modules import STRAIGHT, config, decoded, queries
from tests.dpq_rec.nn.options import OPTIONS

V, E = 20, 12
ALL = torch.arange(V)
TIERS = {"method": "vq", "num_levels": 3, "tiers": ((0.26, 2), (0.5, 1))}


def trained(options, kind=DPQEmbedding, **more):
    """A module after a batch, in training mode."""
    torch.manual_seed(0)
    module = kind(V, E, config(**options), **more)
    module(ALL[:, None] if kind is DPQEmbeddingBag else ALL)
    return module


def summed(module, vectors_VE):
    """Gradients of a loss that weighs every number differently, by the parameter's name."""
    weights = torch.randn(vectors_VE.shape, generator=torch.Generator().manual_seed(1))
    (vectors_VE * weights).sum().backward()
    return {name: parameter.grad for name, parameter in module.named_parameters()}


@pytest.mark.parametrize("padding_idx", [None, 3])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_weight_is_forward_of_all_ids_in_bits_gradients_and_statistics(options, padding_idx):
    one = trained(options, padding_idx=padding_idx)
    other = copy.deepcopy(one)
    weight_VE, vectors_VE = one.weight, other(ALL)
    assert torch.equal(weight_VE, vectors_VE)
    ours, wanted = summed(one, weight_VE), summed(other, vectors_VE)
    assert ours.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(ours[name], gradient)
    assert all(torch.equal(a, b) for a, b in zip(one.buffers(), other.buffers(), strict=True))
    assert torch.equal(one.eval().weight, one(ALL))


@pytest.mark.parametrize("padding_idx", [None, 0, 7, V - 1])
def test_weight_gives_queries_the_gradients_of_torchs_tied_table(padding_idx):
    module = trained(STRAIGHT, padding_idx=padding_idx)
    dense = nn.Embedding(V, E, padding_idx=padding_idx)
    dense.weight.data = decoded(module)
    ids, targets = torch.tensor([5, 19, 5, 0]), torch.tensor([1, 2, 3, 19])
    for embedding in (module, dense):
        logits = functional.linear(embedding(ids), embedding.weight)
        functional.cross_entropy(logits, targets).backward()
    if padding_idx is not None:  # torch moves its row by way of the output; ours is zeros and stays so
        dense.weight.grad[padding_idx] = 0
    torch.testing.assert_close(queries(module).grad, dense.weight.grad)


def test_codebook_loss_of_a_read_is_the_mean_over_rows_and_is_there_only_where_it_is_differentiated():
    """Beside the one of a forward, as of several forwards."""
    module, values = trained({"method": "vq"}), None
    for factor in (0.0, 1.0):
        module.zero_grad()
        (module(ALL[:4]).sum() * 0 + (module.weight.sum() * 0 if factor else 0)).backward()
        values = module.only_quantizer.values_MKS.grad.clone() - (0 if values is None else values)
    rows = queries(module).detach()
    (want,) = torch.autograd.grad(module.only_quantizer(rows).codebook_loss, [module.only_quantizer.values_MKS])
    torch.testing.assert_close(values, want)


@pytest.mark.parametrize("kind", [DPQEmbedding, DPQEmbeddingBag])
@pytest.mark.parametrize("options", [{"method": "sx"}, TIERS], ids=["sx", "tiers"])
def test_weight_in_eval_mode_has_the_bits_of_the_artifact(tmp_path, options, kind):
    model = nn.ModuleDict({"t": trained(options, kind, padding_idx=2)}).eval()
    freeze(model, tmp_path / "artifact")
    stored = EmbeddingStore.open(tmp_path / "artifact").lookup("t", ALL.numpy()).vectors
    assert stored.tobytes() == model["t"].weight.detach().numpy().tobytes()


def test_weight_of_a_table_that_warms_up_is_its_queries():
    model = nn.Sequential(trained({"method": "vq"}, padding_idx=1))
    warm_up(model)
    want = queries(model[0]).detach().clone()
    want[1] = 0
    assert torch.equal(model[0].weight, want)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{"method": "sx"}, {"method": "vq", "ema_decay": 0.9}], ids=["sx", "ema"])
def test_weight_says_what_a_parameter_would(options, mode, training):
    """And requires gradients wherever what is computed from parameters does."""
    module = trained(options).train(training)
    with mode():
        weight = module.weight
        assert (weight.shape, weight.dtype, weight.device.type) == ((V, E), torch.float32, "cpu")
        assert weight.requires_grad == (mode is torch.enable_grad)
        assert torch.equal(weight.data, module(ALL).data) or training  # in which running means have moved since
        assert not module.requires_grad_(requires_grad=False).weight.requires_grad


def test_weight_of_a_table_on_meta_has_its_shape():
    weight = DPQEmbedding(V, E, config(), device=torch.device("meta")).weight
    assert (weight.shape, weight.is_meta) == ((V, E), True)


@pytest.mark.parametrize("value", [nn.Parameter(torch.zeros(V, E)), torch.zeros(V, E), None])
@pytest.mark.parametrize("make", [trained, lambda options: TiedLinear(trained(options))], ids=["embedding", "linear"])
def test_weight_cannot_be_set_and_says_how_to_share(make, value):
    module = make({"method": "sx"})
    with pytest.raises(ConfigError, match=r"weight: got another one, .* TiedLinear\(embedding\)"):
        module.weight = value


def test_running_means_stay_without_gradients_when_all_get_some():
    module = trained({"method": "vq", "ema_decay": 0.9})
    module.requires_grad_(requires_grad=False).requires_grad_()
    assert [p.requires_grad for p in (queries(module), module.only_quantizer.values_MKS)] == [True, False]


def tied(num_embeddings=1, *, bias=True, twice=False):
    """A model whose output layer scores the rows of its tables, which share one weight."""
    torch.manual_seed(0)
    names = ["words", "more"][:num_embeddings]
    model = nn.ModuleDict({name: nn.Embedding(V, E) for name in names})
    outputs = ["over", "aside"] if twice else ["over"]
    model.update({name: nn.Linear(E, V, bias=bias) for name in outputs})
    for name in (*names, *outputs):
        model[name].weight = model[names[0]].weight
    return model


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("from_weights", [True, False])
def test_tied_output_layer_scores_the_decoded_rows(from_weights, bias):
    model = tied(bias=bias)
    kept = model["over"].bias
    replace_embeddings(model, config(), from_weights=from_weights)
    assert (type(model["words"]), type(model["over"]), model["over"].bias) == (DPQEmbedding, TiedLinear, kept)
    hidden = torch.randn(3, E)
    want = hidden @ model.eval()["words"](ALL).T + (kept if bias else 0)
    torch.testing.assert_close(model["over"](hidden), want)
    assert model["over"].extra_repr() == nn.Linear(E, V, bias=bias).extra_repr()


def test_modules_of_one_weight_become_one_table_that_is_counted_and_saved_once(tmp_path):
    model = replace_embeddings(tied(2, twice=True), config())
    assert model["words"] is model["more"]
    assert type(model["aside"]) is type(model["over"]) is TiedLinear
    alone = DPQEmbedding(V, E, config())
    assert sum(map(torch.numel, model.parameters())) == sum(map(torch.numel, alone.parameters())) + 2 * V
    assert [name for name in model.state_dict() if name.startswith(("over", "aside"))] == ["over.bias", "aside.bias"]
    freeze(model, tmp_path / "artifact")
    assert list(EmbeddingStore.open(tmp_path / "artifact").tables) == ["words"]


def test_copies_of_a_tied_model_are_tied_to_their_own_table():
    model = replace_embeddings(tied(), config())
    for twin in (copy.deepcopy(model), torch.load(_saved(model), weights_only=False)):
        twin["words"].reset_parameters()
        assert torch.equal(twin.eval()["over"].weight, twin["words"](ALL))
        assert not torch.equal(twin["over"].weight, model.eval()["over"].weight)


def _saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


def test_tied_tables_that_are_not_chosen_stay_tied():
    model = tied(2)
    model["else"] = nn.Embedding(V, E)
    replace_embeddings(model, config(), tables=["else"])
    assert model["words"].weight is model["more"].weight is model["over"].weight
    assert type(model["over"]) is nn.Linear


def test_a_tied_model_of_a_frozen_weight_stays_frozen_but_for_its_bias():
    model = tied()
    model["words"].requires_grad_(requires_grad=False)
    replace_embeddings(model, config())
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["over.bias"]


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("options", [{"method": "sx"}, TIERS], ids=["sx", "tiers"])
@pytest.mark.parametrize("num_rows", [1, 4, 5, 6, 10, 19, 20, 21, 33])
def test_resized_table_keeps_the_vectors_of_its_rows(tmp_path, num_rows, options, mode):
    """Whatever tiers they are in; and the artifact agrees."""
    module = trained(options)
    before = module.eval()(ALL).detach()
    module.train(mode == "train").num_embeddings = num_rows
    weight = module.eval().weight.detach()
    assert weight.shape == (num_rows, E)
    assert torch.equal(weight[:V], before[:num_rows])
    freeze(nn.ModuleDict({"t": module}), tmp_path / "artifact")
    stored = EmbeddingStore.open(tmp_path / "artifact").lookup("t", np.arange(num_rows)).vectors
    assert stored.tobytes() == weight.numpy().tobytes()


def test_resized_table_trains_its_new_rows_and_knows_no_others():
    module = trained({"method": "sx"}, padding_idx=2)
    out = module(ALL)  # a graph that is alive meanwhile
    module.resize(V + 2)
    module.weight.sum().backward()
    assert queries(module).grad[V:].any()
    assert len(out) == V
    with pytest.raises(IndexError, match=re.escape(f"want 0 to {V + 1}")):
        module(torch.tensor([V + 2]))
    twin = DPQEmbedding(V + 2, E, config(), padding_idx=2)
    twin.load_state_dict(module.state_dict())
    assert torch.equal(twin.eval().weight, module.eval().weight)


def test_resizing_below_the_padding_row_leaves_none():
    module = trained({"method": "sx"}, padding_idx=7)
    module.resize(8)
    assert module.padding_idx == 7
    module.resize(7)
    assert module.padding_idx is None
    assert module.weight.any(1).all()


def test_new_rows_take_nothing_from_the_padding_row_which_may_hold_anything():
    module = trained({"method": "sx"}, padding_idx=7)
    queries(module).data[7] = float("nan")
    module.resize(V + 2)
    kept = torch.cat([queries(module)[:7], queries(module)[8:V]])
    assert torch.equal(queries(module)[V:], kept.mean(0).expand(2, -1))
    assert module.weight.isfinite().all()


def test_a_tied_bias_of_another_size_than_a_resized_table_is_refused_in_a_sentence():
    module = trained({"method": "sx"})
    tied = TiedLinear(module, nn.Parameter(torch.zeros(V)))
    module.resize(V + 1)
    with pytest.raises(ConfigError, match=f"bias: got {V} numbers for a table that was resized to {V + 1} rows"):
        tied(torch.randn(2, E))


def test_a_table_of_a_padding_row_alone_grows():
    module = DPQEmbedding(1, E, config(), padding_idx=0)
    module.resize(4)
    assert module(torch.arange(4)).isfinite().all()


@pytest.mark.parametrize("num_rows", [0, -1])
def test_resizing_to_no_rows_is_refused(num_rows):
    with pytest.raises(ConfigError, match=f"num_embeddings: got {num_rows}, want 1 or more"):
        trained({"method": "sx"}).resize(num_rows)


def test_tiers_of_a_resized_table_are_in_its_config():
    """From which the table can be built again."""
    module = trained(TIERS)
    for num_rows in (31, 9, 400):
        module.resize(num_rows)
        told: DPQConfig = module.only_quantizer.config
        assert [tier.first_row for tier in told.tiers_of(num_rows)] == [0, 5] + ([10] if num_rows == 31 else [])
        assert DPQEmbedding(num_rows, E, told).only_quantizer.tiers == module.only_quantizer.tiers


class Scored(nn.Module):
    """Scores of all rows for vectors, by a tied layer or by the weight itself."""

    def __init__(self, *, tied_layer):
        super().__init__()
        self.words = DPQEmbedding(V, E, config())
        self.over = TiedLinear(self.words) if tied_layer else None

    def forward(self, vectors):
        return self.over(vectors) if self.over is not None else functional.linear(vectors, self.words.weight)


def test_tied_layer_is_one_node_to_torch_fx_and_trains_its_table():
    model = Scored(tied_layer=True)
    traced = torch.fx.symbolic_trace(model)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["over"]
    vectors = torch.randn(3, E)
    assert torch.equal(traced.eval()(vectors), model.eval()(vectors))
    model.train()  # the table is no part of this graph
    traced(vectors).sum().backward()
    assert queries(model.words).grad.any()


def test_weight_is_read_anew_by_each_run_of_what_torch_fx_traced():
    model = Scored(tied_layer=False)
    traced = torch.fx.symbolic_trace(model)
    vectors = torch.randn(3, E)
    with torch.no_grad():
        queries(model.words).mul_(-1)  # after the trace
    assert torch.equal(traced.eval()(vectors), model.eval()(vectors))
    model.train()
    traced.train()(vectors).sum().backward()
    assert queries(model.words).grad.any()


def test_weight_of_a_table_in_pieces_is_refused_with_the_remedy(one_rank):
    model = Scored(tied_layer=False)
    fully_shard(model)
    with pytest.raises(ConfigError, match="weight: got a table that FSDP holds in pieces; read it in the forward"):
        _ = model.words.weight
