"""DPQ options of single tables. In: what --per-table or JSON says of them. Out: the same, checked, in its types."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from dpq_rec import ConfigError, DPQConfig
from training import flags

PerTable = dict[str, dict[str, Any]]  # table -> option -> value
_CHOSEN = {"num_subspaces", "num_codes", "num_levels", "tiers", "values_dtype"}  # by target_ratio, or beside it


def checked(per_table: PerTable, dpq: DPQConfig | None, embedding_dim: int, target_ratio: float | None) -> PerTable:
    """The options, with the types that a DPQConfig wants.

    Args:
        per_table: values as JSON holds them, or as text that an option's own flag takes.
        dpq: how all other tables are quantized; None where they are plain.
        embedding_dim: E.
        target_ratio: as in `EmbeddingOptions`.

    Raises:
        ConfigError: an option that there is not, or that makes no sense there.
    """
    if per_table and dpq is None:
        raise ConfigError("--per-table: --embedding full has plain tables, without such options; leave it out")
    typed = {}
    for table, changes in per_table.items():
        where = f"--per-table: {table}."
        if "method" in changes:
            raise ConfigError(f"{where}method: --embedding says it for all tables; leave it out")
        if target_ratio is not None and (chosen := sorted(_CHOSEN & set(changes))):
            raise ConfigError(f"{where}{chosen[0]}: --target-ratio chooses it for each table by its rows; leave it out")
        typed[table] = flags.changes(DPQConfig, changes, where)
        try:
            with_own(dpq, typed[table]).query_dim(embedding_dim)
        except ConfigError as error:
            raise ConfigError(f"{where}{error}") from error
    return typed


def with_own(dpq: DPQConfig | None, own: Mapping[str, Any]) -> DPQConfig:
    """How a table with options of its own is quantized."""
    assert dpq is not None, "plain tables have none"
    return dataclasses.replace(dpq, **own) if own else dpq


def check_tables(per_table: PerTable, names: Collection[str]) -> None:
    """Raises ConfigError for a table that is none of a run's."""
    if unknown := sorted(set(per_table) - set(names)):
        raise ConfigError(f"--per-table: got table {', '.join(unknown)}; the tables: {', '.join(names)}")
