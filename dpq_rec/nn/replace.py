"""The tables of a model by quantized ones. In: a model with stock tables. Out: the same model, its tables replaced."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchrec import EmbeddingBagCollection, EmbeddingCollection
from torchrec.distributed.model_parallel import DistributedModelParallel

from dpq_rec.config import DPQConfig
from dpq_rec.errors import ConfigError
from dpq_rec.nn.collection import DPQEmbeddingBagCollection, DPQEmbeddingCollection
from dpq_rec.nn.embedding import DPQEmbedding, DPQEmbeddingBag
from dpq_rec.nn.find import modules_with_tables
from dpq_rec.nn.holders import hold_dpq, holders_of
from dpq_rec.nn.shards import is_under_fsdp
from dpq_rec.nn.start import start
from dpq_rec.nn.tables import DPQTables


class _Stock(NamedTuple):
    """A module that can be replaced, and its tables' weights under the names that a caller uses."""

    path: str
    module: Any
    weights: dict[str, nn.Parameter]


def replace_embeddings(
    model: nn.Module,
    config: DPQConfig | Mapping[str, DPQConfig],
    *,
    tables: Collection[str] | None = None,
    from_weights: bool = False,
    seed: int = 0,
) -> nn.Module:
    """Replace a model's embedding tables, in place, by DPQ tables of the same interface.

    >>> model = replace_embeddings(DLRM(EmbeddingBagCollection(tables=[...]), ...), DPQConfig(num_subspaces=16))

    Replaced are EmbeddingBagCollection, EmbeddingCollection, nn.Embedding and nn.EmbeddingBag themselves, at any depth,
    not subclasses, which may do something else; TorchRec's modules around them (FeatureProcessedEmbeddingBagCollection,
    EmbeddingTower) become subclasses that DistributedModelParallel shards from within. A module that stands in several
    places stays one. Device, training mode and requires_grad are kept; hooks on a replaced module are not. Do it before
    optimizers are made and before DistributedModelParallel, which takes the queries over as they are, unless they are
    on meta.

    Args:
        model: plain, not sharded.
        config: for all tables, or table -> config for those it names. A collection's tables have the names of their
            configs; an nn.Embedding or nn.EmbeddingBag has its path in the model.
        tables: which ones; all, or all that the mapping names, if not given. The others stay as they are.
        from_weights: queries start as the weights, keys and values by `start` from them; afresh if not.
        seed: of `start`.

    Returns:
        The model; or what replaces it, where it is a table module itself.

    Raises:
        ConfigError: a name that the model does not have, or a table that cannot be replaced, with the reason, such as
            managed collisions around it. The model is as it was.
    """
    wrappers = DistributedModelParallel | DistributedDataParallel
    under_fsdp = any(is_under_fsdp(module) for _, module in modules_with_tables(model))
    if under_fsdp or any(isinstance(module, wrappers) for module in model.modules()):
        raise ConfigError("model: got one that is distributed already; replace its embeddings before it is wrapped")
    stock = list(_stock_modules(model))
    chosen = _chosen({name for found in stock for name in found.weights}, config, tables)
    stock = [found for found in stock if chosen.keys() & found.weights.keys()]
    for found in stock:
        for name in chosen.keys() & found.weights.keys():
            _check(name, found, chosen[name], from_weights=from_weights)
    _check_ties(model, stock, chosen)
    first_chosen = {id(found.module): next(name for name in found.weights if name in chosen) for found in stock}
    holders = holders_of(model, first_chosen)
    made = {id(found.module): _replacement(found, chosen, from_weights=from_weights) for found in stock}
    if from_weights:
        for replacement in made.values():
            start(replacement, seed=seed)
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if id(child) in made:
                parent._modules[name] = made[id(child)]
    for holder in holders:
        hold_dpq(holder)
    return made.get(id(model), model)


def _stock_modules(model: nn.Module) -> Iterator[_Stock]:
    path: str
    module: Any
    for path, module in modules_with_tables(model):
        kind = type(module)
        if kind is EmbeddingBagCollection or kind is EmbeddingCollection:
            tables = module.embedding_bags if kind is EmbeddingBagCollection else module.embeddings
            yield _Stock(path, module, {name: table.weight for name, table in tables.items()})
        elif kind is nn.Embedding or kind is nn.EmbeddingBag:
            yield _Stock(path, module, {path or "table": module.weight})


def _chosen(
    names: Collection[str], config: DPQConfig | Mapping[str, DPQConfig], tables: Collection[str] | None
) -> dict[str, DPQConfig]:
    """The config of each table to replace."""
    if tables is None:
        tables = names if isinstance(config, DPQConfig) else list(config)
    known = ", ".join(sorted(names)) or "none that can be replaced"
    for what, given in (("tables", tables), ("config", () if isinstance(config, DPQConfig) else config)):
        if unknown := set(given) - set(names):
            raise ConfigError(f"{what}: got {', '.join(sorted(unknown))}; the model's tables: {known}")
    if not tables:
        raise ConfigError(f"tables: got none to replace; the model's tables: {known}")
    if isinstance(config, DPQConfig):
        return dict.fromkeys(tables, config)
    if without := set(tables) - set(config):
        raise ConfigError(
            f"config: got none for {', '.join(sorted(without))}, want one for every table named in tables"
        )
    return {name: config[name] for name in tables}


def _check(name: str, found: _Stock, config: DPQConfig, *, from_weights: bool) -> None:
    """Refuse what a DPQ table would not do as the stock one does."""
    weight, module = found.weights[name], found.module
    refused = {
        "max_norm": "vectors are sums of values that rows share, and cannot be shortened one by one",
        "scale_grad_by_freq": "queries get the sum of the gradients of their occurrences",
        "sparse": "queries have dense gradients; leave it out, or let TorchRec fuse the optimizer into backward",
    }
    for setting, reason in refused.items():
        if getattr(module, setting, None):
            raise ConfigError(f"table {name!r}: got {setting}={getattr(module, setting)}, which is not kept: {reason}")
    if weight.dtype != torch.float32:
        raise ConfigError(f"table {name!r}: got weights of {weight.dtype}, want torch.float32")
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
    """A weight that another module uses too would silently cease to be the same."""
    replaced = {id(w): name for found in stock for name, w in found.weights.items() if name in chosen}
    inside = {id(m) for found in stock for m in found.module.modules()}
    holders: dict[int, str] = {}
    for path, module in model.named_modules():
        for parameter in module._parameters.values():
            if id(parameter) not in replaced:
                continue
            if id(module) not in inside or id(parameter) in holders:
                raise ConfigError(
                    f"table {replaced[id(parameter)]!r}: got a weight that {path or 'the model'} uses too, and a DPQ "
                    "table has none to share; untie it, or leave the table out"
                )
            holders[id(parameter)] = path


@torch.no_grad()
def _replacement(found: _Stock, chosen: Mapping[str, DPQConfig], *, from_weights: bool) -> DPQTables:
    made = _make(found, chosen)
    queries = made.query_weights()
    for name, weight in found.weights.items():
        if name not in chosen:
            _keep_plain(made, name, weight)
            continue
        key = name if name in queries else next(iter(queries))
        if from_weights:
            queries[key].copy_(weight)
        if not weight.requires_grad:
            for width, names in made.names_by_width.items():
                if key in names:
                    made.queries[width].get_submodule(f"embeddings.{key}").requires_grad_(requires_grad=False)
            made.quantizer(key).requires_grad_(requires_grad=False)
    return made.train(found.module.training)


def _make(found: _Stock, chosen: Mapping[str, DPQConfig]) -> DPQTables:
    module, configs = found.module, {name: chosen.get(name) for name in found.weights}
    device = next(iter(found.weights.values())).device
    if isinstance(module, EmbeddingBagCollection):
        return DPQEmbeddingBagCollection(
            module.embedding_bag_configs(), configs, is_weighted=module.is_weighted(), device=device
        )
    if isinstance(module, EmbeddingCollection):
        return DPQEmbeddingCollection(
            module.embedding_configs(), configs, need_indices=module.need_indices(), device=device
        )
    (config,) = configs.values()
    assert config is not None, "a module of one table is replaced only if that table was chosen"
    shape = module.num_embeddings, module.embedding_dim
    common: Any = {"padding_idx": module.padding_idx, "name": found.path or None, "device": device}
    if isinstance(module, nn.EmbeddingBag):
        common |= {"mode": module.mode, "include_last_offset": module.include_last_offset}
        return DPQEmbeddingBag(*shape, config, **common)
    return DPQEmbedding(*shape, config, **common)


def _keep_plain(made: DPQTables, name: str, weight: nn.Parameter) -> None:
    """A table that was not chosen keeps its very weight, so that optimizers and ties hold."""
    for collection in made.plain.values():
        is_bag = isinstance(collection, EmbeddingBagCollection)
        modules: Any = collection.embedding_bags if is_bag else collection.embeddings
        if name in modules:
            modules[name].weight = weight
