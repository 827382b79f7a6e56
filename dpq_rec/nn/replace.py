"""Replace a model's tables by quantized ones. In: a model with stock tables. Out: the same model, tables replaced.

TorchRec's modules around a collection (feature processors, towers) become subclasses that change nothing. A sharder
takes a module of exactly its type, with the stock collection in it, as a whole: a subclass is no such module, so that
DistributedModelParallel shards what is in it, and trains the rest data parallel.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchrec import EmbeddingBagCollection, EmbeddingCollection
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.modules.embedding_tower import EmbeddingTower, EmbeddingTowerCollection
from torchrec.modules.fp_embedding_modules import FeatureProcessedEmbeddingBagCollection
from torchrec.modules.itep_embedding_modules import ITEPEmbeddingBagCollection, ITEPEmbeddingCollection
from torchrec.modules.mc_embedding_modules import BaseManagedCollisionEmbeddingCollection
from torchrec.modules.pec_embedding_modules import PECEmbeddingCollection

from dpq_rec.config import DPQConfig
from dpq_rec.errors import ConfigError
from dpq_rec.nn.collection import DPQEmbeddingBagCollection, DPQEmbeddingCollection, without_small
from dpq_rec.nn.embedding import DPQEmbedding, DPQEmbeddingBag, TiedLinear
from dpq_rec.nn.model import STAYS_PLAIN, modules_with_tables, start
from dpq_rec.nn.shards import is_under_fsdp, modules_of
from dpq_rec.nn.tables import DPQTables

_NOT_KEPT = {  # settings of torch's modules, and why a DPQ table does not have them
    "max_norm": "vectors are sums of values that rows share, and cannot be shortened one by one",
    "scale_grad_by_freq": "queries get the sum of the gradients of their occurrences",
    "sparse": "queries have dense gradients; leave it out, or let TorchRec fuse the optimizer into backward",
}


class DPQFeatureProcessedEmbeddingBagCollection(FeatureProcessedEmbeddingBagCollection):
    """TorchRec's, around a DPQEmbeddingBagCollection."""


class DPQEmbeddingTower(EmbeddingTower):
    """TorchRec's, around a DPQ collection."""


class DPQEmbeddingTowerCollection(EmbeddingTowerCollection):
    """TorchRec's, around DPQ collections."""


class DPQPECEmbeddingCollection(PECEmbeddingCollection):
    """TorchRec's, around a DPQEmbeddingCollection; rows are sent as by any other, without priorities."""


_AROUND_DPQ: dict[type[nn.Module], type[nn.Module]] = {
    FeatureProcessedEmbeddingBagCollection: DPQFeatureProcessedEmbeddingBagCollection,
    EmbeddingTower: DPQEmbeddingTower,
    EmbeddingTowerCollection: DPQEmbeddingTowerCollection,
    PECEmbeddingCollection: DPQPECEmbeddingCollection,
}
_MOVES_ROWS: dict[type[nn.Module], str] = {  # modules around a collection that a DPQ table cannot follow
    BaseManagedCollisionEmbeddingCollection: "gives rows to other ids",
    ITEPEmbeddingBagCollection: "prunes rows",
    ITEPEmbeddingCollection: "prunes rows",
}


class _Stock(NamedTuple):
    """A module that can be replaced.

    Attributes:
        path: in the model.
        module: a collection of TorchRec, or torch's nn.Embedding or nn.EmbeddingBag.
        weights: of its tables, by the names that a caller uses.
        twins: other nn.Embedding of the same weight and settings.
        outputs: nn.Linear of the same weight.
    """

    path: str
    module: Any
    weights: dict[str, nn.Parameter]
    twins: tuple[nn.Module, ...] = ()
    outputs: tuple[Any, ...] = ()


def replace_embeddings(
    model: nn.Module,
    config: DPQConfig | Mapping[str, DPQConfig],
    *,
    tables: Collection[str] | None = None,
    from_weights: bool = False,
    seed: int = 0,
) -> nn.Module:
    """Replace a model's embedding tables, in place, by DPQ tables of the same interface.

    >>> model = nn.Sequential(nn.Embedding(50_000, 64), nn.Linear(64, 1))
    >>> model = replace_embeddings(model, DPQConfig(num_subspaces=16))
    >>> [type(module).__name__ for module in model]
    ['DPQEmbedding', 'Linear']

    Replaced are EmbeddingBagCollection, EmbeddingCollection, nn.Embedding and nn.EmbeddingBag themselves, at any depth,
    not subclasses, which may do something else; TorchRec's modules around them (FeatureProcessedEmbeddingBagCollection,
    EmbeddingTower) become subclasses that DistributedModelParallel shards from within. A module that stands in several
    places stays one, and several nn.Embedding of one weight become one, under the name of the first; an nn.Linear of
    that weight, a tied output layer, becomes a `TiedLinear`. Device, training mode and requires_grad are kept; hooks on
    a replaced module are not. Do it before optimizers are made and before DistributedModelParallel, which takes the
    queries over as they are, unless they are on meta.

    Args:
        model: plain, not sharded.
        config: for all tables, or table -> config for those it names. A collection's tables have the names of their
            configs; an nn.Embedding or nn.EmbeddingBag has its path in the model. A table that its config would make no
            smaller stays as it is, with a warning (`DPQConfig.quantize_small`), and `freeze` stores it as it is.
        tables: which ones; all, or all that the mapping names, if not given. The others stay as they are.
        from_weights: queries start as the weights, keys and values by `start` from them; afresh if not. An
            nn.Embedding's padding row that is not zeros keeps a vector then (`DPQEmbedding.keep_padding`).
        seed: of `start`.

    Returns:
        The model; or what replaces it, where it is a table module itself.

    Raises:
        ConfigError: a name that the model does not have, or a table that cannot be replaced, with the reason, such as
            managed collisions around it, or weights that are not finite, with the row. The model is as it was.
    """
    stock = _stock_modules(model)
    shapes = {name: (len(w), w.shape[1]) for each in stock for name, w in each.weights.items()}
    wanted = _chosen(shapes, config, tables)
    chosen = without_small(wanted, shapes)
    small = [each.module for each in stock if wanted.keys() - chosen.keys() >= each.weights.keys()]
    stock = [each for each in stock if chosen.keys() & each.weights.keys()]
    for each in stock:
        for name in chosen.keys() & each.weights.keys():
            _check(name, each, chosen[name], from_weights=from_weights)
    _check_ties(model, stock, chosen)
    around = _modules_around(model, stock, chosen)
    replaced: dict[int, nn.Module] = {}
    for each in stock:
        replaced |= _replacements(each, chosen, from_weights=from_weights, seed=seed)
    for module in small:
        setattr(module, STAYS_PLAIN, True)
    _leave_ties_to_us(model, replaced)
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            parent._modules[name] = replaced.get(id(child), child)
    for module in around:
        module.__class__ = _AROUND_DPQ[type(module)]
    return replaced.get(id(model), model)


def _stock_modules(model: nn.Module) -> list[_Stock]:
    found, modules = list(modules_with_tables(model)), list(model.modules())
    is_distributed = any(isinstance(module, DistributedModelParallel | DistributedDataParallel) for module in modules)
    if is_distributed or any(is_under_fsdp(module) for _, module in found):
        raise ConfigError("model: got one that is distributed already; replace its embeddings before it is wrapped")
    stock: list[_Stock] = []
    twins: set[int] = set()
    path: str
    module: Any
    for path, module in found:
        kind = type(module)
        if kind is EmbeddingBagCollection or kind is EmbeddingCollection:
            weights = {name: table.weight for name, table in modules_of(module).items()}
            stock.append(_Stock(path, module, weights))
        elif (kind is nn.Embedding or kind is nn.EmbeddingBag) and id(module) not in twins:
            users = [each for each in modules if each._parameters.get("weight") is module.weight]
            same = tuple(each for each in users if each is not module and _are_twins(module, each))
            outputs = tuple(each for each in users if type(each) is nn.Linear)
            twins |= set(map(id, same))
            stock.append(_Stock(path, module, {path or "table": module.weight}, same, outputs))
    return stock


def _are_twins(one: Any, other: Any) -> bool:
    """Whether two modules of one weight are torch's nn.Embedding and do the same with it."""
    if not type(one) is type(other) is nn.Embedding:
        return False
    return all(getattr(one, name) == getattr(other, name) for name in ("padding_idx", *_NOT_KEPT))


def _chosen(
    names: Collection[str], config: DPQConfig | Mapping[str, DPQConfig], tables: Collection[str] | None
) -> dict[str, DPQConfig]:
    """The config of each table to replace."""
    configs = dict.fromkeys(names, config) if isinstance(config, DPQConfig) else dict(config)
    tables = configs if tables is None else tables
    known = ", ".join(sorted(names)) or "none that can be replaced"
    for what, given in (("tables", tables), ("config", configs)):
        if unknown := set(given) - set(names):
            raise ConfigError(f"{what}: got {', '.join(sorted(unknown))}; the model's tables: {known}")
    if not tables:
        raise ConfigError(f"tables: got none to replace; the model's tables: {known}")
    if without := set(tables) - set(configs):
        raise ConfigError(
            f"config: got none for {', '.join(sorted(without))}, want one for every table named in tables"
        )
    return {name: configs[name] for name in tables}


def _check(name: str, stock: _Stock, config: DPQConfig, *, from_weights: bool) -> None:
    """Refuse what a DPQ table would not do as the stock one does."""
    weight, module = stock.weights[name], stock.module
    for setting, reason in _NOT_KEPT.items():
        if getattr(module, setting, None):
            raise ConfigError(f"table {name!r}: got {setting}={getattr(module, setting)}, which is not kept: {reason}")
    if weight.dtype != torch.float32:
        raise ConfigError(
            f"table {name!r}: got weights of {weight.dtype}, want torch.float32: call .float() on it before"
        )
    if hasattr(weight, "_in_backward_optimizers"):
        raise ConfigError(f"table {name!r}: got an optimizer fused into backward already; apply it after replacing")
    moves_by_use = config.ema_decay is not None or config.revive_after is not None
    if moves_by_use and not weight.requires_grad:
        raise ConfigError(f"table {name!r}: got ema_decay or revive_after with a frozen weight, which they would move")
    try:
        width = config.query_dim(weight.shape[1])
    except ConfigError as error:
        raise ConfigError(f"table {name!r}: {error}") from error
    if from_weights and width != weight.shape[1]:
        got = f"key_dim {config.key_dim} with from_weights"
        raise ConfigError(f"table {name!r}: got {got}: weights are queries of width {weight.shape[1]}, not {width}")
    if from_weights and weight.is_meta:
        raise ConfigError(f"table {name!r}: got from_weights with a model on the meta device, which has no weights")


def _check_ties(model: nn.Module, stock: list[_Stock], chosen: Mapping[str, DPQConfig]) -> None:
    """A weight that another module uses too, and that cannot be tied anew, would silently cease to be the same."""
    replaced = {id(weight): name for each in stock for name, weight in each.weights.items() if name in chosen}
    inside = {id(module) for each in stock for module in each.module.modules()}
    tied = {id(module) for each in stock for module in (*each.twins, *each.outputs)}
    used: set[int] = set()
    for path, module in model.named_modules():
        for weight in map(id, module._parameters.values()):
            if weight not in replaced or id(module) in tied:
                continue
            if id(module) not in inside or weight in used:
                raise ConfigError(
                    f"table {replaced[weight]!r}: got a weight that {path or 'the model'} uses too; an nn.Embedding "
                    "can share its own with an nn.Linear or an nn.Embedding of its settings; untie it, or leave the "
                    "table out"
                )
            used.add(weight)


def _modules_around(model: nn.Module, stock: list[_Stock], chosen: Mapping[str, DPQConfig]) -> list[nn.Module]:
    """TorchRec's modules around a collection that is to be replaced.

    Raises:
        ConfigError: one whose sharded form does more than to look rows up.
    """
    tables = {id(each.module): next(name for name in each.weights if name in chosen) for each in stock}
    around = []
    for path, module in model.named_modules():
        table = next((tables[id(inner)] for inner in module.modules() if id(inner) in tables), None)
        does = next((does for kind, does in _MOVES_ROWS.items() if isinstance(module, kind)), None)
        if table is not None and does is not None:
            raise ConfigError(
                f"table {table!r}: got a {type(module).__name__} around it at {path or 'the model'}, which {does} "
                "while it trains, and a DPQ table cannot follow; name the other tables (tables=...), or map ids to "
                "rows before a plain collection"
            )
        if table is not None and type(module) in _AROUND_DPQ:
            around.append(module)
    return around


@torch.no_grad()
def _replacements(
    stock: _Stock, chosen: Mapping[str, DPQConfig], *, from_weights: bool, seed: int
) -> dict[int, nn.Module]:
    """Id of a module -> what replaces it."""
    made: Any = _make(stock, chosen)
    queries = made.query_weights()
    for name, weight in stock.weights.items():
        if name not in chosen:  # it keeps its very weight, so that optimizers and ties hold
            for plain in map(modules_of, made.plain.values()):
                if name in plain:
                    plain[name].weight = weight
            continue
        key = name if name in queries else next(iter(queries))
        if from_weights:
            queries[key].copy_(weight)
            if isinstance(made, DPQEmbedding) and made.padding_idx is not None and weight[made.padding_idx].any():
                made.keep_padding()
        if not weight.requires_grad:
            made.quantizer(key).requires_grad_(requires_grad=False)
            for collection in map(modules_of, made.queries.values()):
                if key in collection:
                    collection[key].requires_grad_(requires_grad=False)
    made.train(stock.module.training)
    if from_weights:
        start(made, seed=seed)
    outputs = {id(output): TiedLinear(made, output.bias).train(output.training) for output in stock.outputs}
    return dict.fromkeys(map(id, (stock.module, *stock.twins)), made) | outputs


def _make(stock: _Stock, chosen: Mapping[str, DPQConfig]) -> DPQTables:
    module, configs = stock.module, {name: chosen.get(name) for name in stock.weights}
    device = next(iter(stock.weights.values())).device
    if isinstance(module, EmbeddingBagCollection):
        tables = module.embedding_bag_configs()
        return DPQEmbeddingBagCollection(tables, configs, is_weighted=module.is_weighted(), device=device)
    if isinstance(module, EmbeddingCollection):
        tables = module.embedding_configs()
        return DPQEmbeddingCollection(tables, configs, need_indices=module.need_indices(), device=device)
    (config,) = (chosen[name] for name in stock.weights)
    shape = module.num_embeddings, module.embedding_dim
    common: Any = {"padding_idx": module.padding_idx, "name": stock.path or None, "device": device}
    if isinstance(module, nn.EmbeddingBag):
        common |= {"mode": module.mode, "include_last_offset": module.include_last_offset}
        return DPQEmbeddingBag(*shape, config, **common)
    return DPQEmbedding(*shape, config, **common)


def _leave_ties_to_us(model: nn.Module, replaced: Mapping[int, nn.Module]) -> None:
    """Strike replaced weights from the names by which transformers ties weights again, after resizing for example.

    Of modules that became one it is told so: it saves what they share once.
    """
    for module in model.modules():
        for attribute in ("_tied_weights_keys", "all_tied_weights_keys"):
            ties = getattr(module, attribute, None)
            if not isinstance(ties, dict):
                continue
            named = module.named_modules(remove_duplicate=False)
            ours = {f"{path}.weight": replaced[id(inner)] for path, inner in named if id(inner) in replaced}
            kept = {one: other for one, other in ties.items() if one not in ours and other not in ours}
            if attribute == "_tied_weights_keys":
                became_one = [
                    (one, other) for one, other in ties.items() if one in ours and ours[one] is ours.get(other)
                ]
                kept |= {one.removesuffix(".weight"): other.removesuffix(".weight") for one, other in became_one}
            setattr(module, attribute, kept)
