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
from dpq_rec.nn.collection import DPQEmbeddingBagCollection, DPQEmbeddingCollection, without_small
from dpq_rec.nn.embedding import DPQEmbedding, DPQEmbeddingBag, TiedLinear
from dpq_rec.nn.find import mark_plain, modules_with_tables
from dpq_rec.nn.holders import hold_dpq, holders_of
from dpq_rec.nn.shards import is_under_fsdp
from dpq_rec.nn.tables import DPQTables
from dpq_rec.nn.warm_up import start

_NOT_KEPT = {  # settings of torch's modules, and why a DPQ table does not have them
    "max_norm": "vectors are sums of values that rows share, and cannot be shortened one by one",
    "scale_grad_by_freq": "queries get the sum of the gradients of their occurrences",
    "sparse": "queries have dense gradients; leave it out, or let TorchRec fuse the optimizer into backward",
}


class _Stock(NamedTuple):
    """A module that can be replaced, and its tables' weights under the names that a caller uses."""

    path: str
    module: Any
    weights: dict[str, nn.Parameter]
    twins: tuple[nn.Embedding, ...] = ()  # other modules that are the same to the bit, with the same weight


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
    places stays one, and several
    nn.Embedding of one weight become one, under the name of the first; an nn.Linear of that weight, a tied output
    layer, becomes a `TiedLinear`. Device, training mode and requires_grad are kept; hooks on a replaced module are not.
    Do it before optimizers are made and before DistributedModelParallel, which takes the queries over as they are,
    unless they are on meta.

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
    wrappers = DistributedModelParallel | DistributedDataParallel
    under_fsdp = any(is_under_fsdp(module) for _, module in modules_with_tables(model))
    if under_fsdp or any(isinstance(module, wrappers) for module in model.modules()):
        raise ConfigError("model: got one that is distributed already; replace its embeddings before it is wrapped")
    stock = list(_stock_modules(model))
    shapes = {name: (len(w), w.shape[1]) for found in stock for name, w in found.weights.items()}
    asked = _chosen(shapes, config, tables)
    chosen = without_small(asked, shapes)
    plain = [found.module for found in stock if asked.keys() - chosen.keys() >= found.weights.keys()]
    stock = [found for found in stock if chosen.keys() & found.weights.keys()]
    for found in stock:
        for name in chosen.keys() & found.weights.keys():
            _check(name, found, chosen[name], from_weights=from_weights)
    outputs = _tied_outputs(model, stock)
    _check_ties(model, stock, chosen, outputs)
    first_chosen = {id(found.module): next(name for name in found.weights if name in chosen) for found in stock}
    holders = holders_of(model, first_chosen)
    made: dict[int, nn.Module] = {}
    for found in stock:
        replacement = _replacement(found, chosen, from_weights=from_weights)
        if from_weights:
            start(replacement, seed=seed)
        made |= dict.fromkeys(map(id, (found.module, *found.twins)), replacement)
        if isinstance(replacement, DPQEmbedding | DPQEmbeddingBag):
            for linear in outputs.get(id(found.module.weight), ()):
                made[id(linear)] = TiedLinear(replacement, linear.bias).train(linear.training)
    for module in plain:
        mark_plain(module)
    _leave_ties_to_us(model, made)
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
    twins: set[int] = set()
    for path, module in modules_with_tables(model):
        kind = type(module)
        if kind is EmbeddingBagCollection or kind is EmbeddingCollection:
            tables = module.embedding_bags if kind is EmbeddingBagCollection else module.embeddings
            yield _Stock(path, module, {name: table.weight for name, table in tables.items()})
        elif id(module) in twins:
            continue
        elif kind is nn.Embedding or kind is nn.EmbeddingBag:
            others: list[Any] = [each for each in model.modules() if each is not module and _are_twins(module, each)]
            twins |= set(map(id, others))
            yield _Stock(path, module, {path or "table": module.weight}, tuple(others))


def _are_twins(one: Any, other: Any) -> bool:
    """Whether two of torch's nn.Embedding share their weight and do the same with it."""
    if not (type(one) is type(other) is nn.Embedding and one.weight is other.weight):
        return False
    return all(getattr(one, name) == getattr(other, name) for name in ("padding_idx", *_NOT_KEPT))


def _tied_outputs(model: nn.Module, stock: list[_Stock]) -> dict[int, list[nn.Linear]]:
    """The nn.Linear that use a table's weight, by the weight's id; of torch's own embeddings alone."""
    weights = {id(found.module.weight) for found in stock if isinstance(found.module, nn.Embedding | nn.EmbeddingBag)}
    outputs: dict[int, list[nn.Linear]] = {}
    for module in model.modules():
        if type(module) is nn.Linear and id(module.weight) in weights:
            outputs.setdefault(id(module.weight), []).append(module)
    return outputs


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


def _check_ties(
    model: nn.Module,
    stock: list[_Stock],
    chosen: Mapping[str, DPQConfig],
    outputs: Mapping[int, list[nn.Linear]],
) -> None:
    """A weight that another module uses too, and that cannot be tied anew, would silently cease to be the same."""
    replaced = {id(w): name for found in stock for name, w in found.weights.items() if name in chosen}
    inside = {id(m) for found in stock for m in found.module.modules()}
    tied = {id(m) for found in stock for m in found.twins} | {id(m) for each in outputs.values() for m in each}
    holders: dict[int, str] = {}
    for path, module in model.named_modules():
        for parameter in module._parameters.values():
            if id(parameter) not in replaced or id(module) in tied:
                continue
            if id(module) not in inside or id(parameter) in holders:
                got = f"got a weight that {path or 'the model'} uses too"
                raise ConfigError(
                    f"table {replaced[id(parameter)]!r}: {got}; an nn.Embedding can share its own with an nn.Linear "
                    "or an nn.Embedding of its settings; untie it, or leave the table out"
                )
            holders[id(parameter)] = path


def _leave_ties_to_us(model: nn.Module, made: Mapping[int, nn.Module]) -> None:
    """Strike replaced weights from the names by which transformers ties weights again, after resizing for example.

    Of modules that became one it is told so: it saves what they share once.
    """
    for module in model.modules():
        for attribute in ("_tied_weights_keys", "all_tied_weights_keys"):
            ties = getattr(module, attribute, None)
            if not isinstance(ties, dict):
                continue
            kept = {}
            for names in ties.items():
                ours = [_replacement_of(module, name, made) for name in names]
                if ours == [None, None]:
                    kept[names[0]] = names[1]
                elif ours[0] is ours[1] and attribute == "_tied_weights_keys":
                    kept[names[0].removesuffix(".weight")] = names[1].removesuffix(".weight")
            setattr(module, attribute, kept)


def _replacement_of(module: nn.Module, name: str, made: Mapping[int, nn.Module]) -> nn.Module | None:
    """What the submodule with a weight of this name, if it is a name and no pattern, is about to be replaced by."""
    path, _, parameter = name.rpartition(".")
    try:
        return made.get(id(module.get_submodule(path))) if parameter == "weight" else None
    except AttributeError:
        return None


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
            if isinstance(made, DPQEmbedding) and made.padding_idx is not None and weight[made.padding_idx].any():
                made.keep_padding()
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
