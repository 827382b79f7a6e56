"""What is looked up in every way: an artifact of every kind of table, and ids to look up in each."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torchrec import EmbeddingBagCollection, KeyedJaggedTensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from dpq_rec import (
    CodeLayout,
    DPQConfig,
    IdentityVocabulary,
    Int64Vocabulary,
    ModuloVocabulary,
    StringVocabulary,
    TableContents,
    Vocabulary,
    open_artifact,
    pack_codes,
    write_artifact,
)
from dpq_rec.codes import cut_into_tiers
from dpq_rec.nn import DPQEmbeddingBagCollection, freeze

INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
NUM_ROWS = 50
# Row v holds LONG_IDS[v]: unsorted, negative ones, the limits of int64, and more than a double holds exactly.
LONG_IDS = [2**53 + 1, INT64_MIN, 7, -7, INT64_MAX, 0, *range(1_000, 1_000 + NUM_ROWS - 6)]
# Rare ids that share a row: row_of = 3, 0, 3, 49, 3.
SHARING_IDS, SHARING_ROWS = [-20, -10, 5, 60, 2**40], [3, 0, 3, 49, 3]
# Row v holds STRING_IDS[v]: empty, prefixes of each other, 1 to 4 bytes in UTF-8, NUL, an option's and a number's look.
STRING_IDS = [
    "the",
    "",
    "7",
    "a",
    "ab",
    "a\0",
    "ü",
    "-x",
    "€",
    "😀",
    *(f"item_{i}" for i in range(NUM_ROWS - 11)),
    "z" * 99,
]
SHARING_STRINGS, SHARING_STRING_ROWS = ["rare", "b", "so rare", "c", ""], [3, 0, 3, 49, 3]

TABLES = [
    *(
        "plain",
        "identity",
        "modulo",
        "odd_bits",
        "two_levels",
        "tiers",
        "half",
        "shared",
        "sharing_rows",
        "dense",
        "one_row",
    ),
]
STRING_TABLES = ["strings", "dense_strings", "strings_sharing_rows"]
TABLES += STRING_TABLES
TRAINED = ["trained_sx", "trained_vq", "trained_plain"]  # frozen from `trained_model`; the others are made up
TABLES += TRAINED
IDS = ["hits", "unknown", "mixed", "duplicates", "first_and_last_row", "none", "one"]
WRONG_IDS: dict[str, list[object]] = {
    "strings": ["a", "7"],  # in a table of integers
    "integers": [7, 0],  # in a table of strings
    "floats": [1.5, 7.0],
    "booleans": [True, False],
}
UNKNOWN_TABLE = "nobody"


def write_cases(path: Path) -> Path:
    """The artifact: one table of each kind that a reader must know."""
    long, sharing = (
        Int64Vocabulary.from_ids(LONG_IDS),
        Int64Vocabulary(np.array(SHARING_IDS), np.array(SHARING_ROWS, np.uint32)),
    )
    ids_are_rows = IdentityVocabulary(NUM_ROWS)
    tables = {
        "plain": _dpq(long, CodeLayout(num_subspaces=4, num_codes=256), subspace_dim=4),
        "identity": _dpq(ids_are_rows, CodeLayout(num_subspaces=3, num_codes=16), subspace_dim=2),
        "modulo": _dpq(ModuloVocabulary(NUM_ROWS), CodeLayout(num_subspaces=2, num_codes=32), subspace_dim=8),
        "odd_bits": _dpq(long, CodeLayout(num_subspaces=7, num_codes=5), subspace_dim=3),
        "two_levels": _dpq(long, CodeLayout(num_subspaces=2, num_codes=20, num_levels=2), subspace_dim=16),
        "tiers": _with_tiers(long, CodeLayout(num_subspaces=2, num_codes=20, num_levels=4), ((0.1, 2), (0.5, 1))),
        "half": _dpq(long, CodeLayout(num_subspaces=4, num_codes=300), subspace_dim=2, dtype="float16"),
        "shared": _dpq(
            ids_are_rows, CodeLayout(num_subspaces=3, num_codes=9, num_levels=3), subspace_dim=5, shared=True
        ),
        "sharing_rows": _dpq(sharing, CodeLayout(num_subspaces=2, num_codes=64), subspace_dim=1),
        "dense": TableContents(
            num_embeddings=NUM_ROWS, embedding_dim=6, vocabulary=long, chunks=[_numbers((NUM_ROWS, 6), "float32")]
        ),
        "one_row": _dpq(
            Int64Vocabulary.from_ids([42]), CodeLayout(num_subspaces=1, num_codes=2), subspace_dim=1, num_rows=1
        ),
    }
    strings = StringVocabulary.from_ids(STRING_IDS)
    tables |= {
        "strings": _dpq(strings, CodeLayout(num_subspaces=3, num_codes=11), subspace_dim=4),
        "dense_strings": TableContents(
            num_embeddings=NUM_ROWS, embedding_dim=3, vocabulary=strings, chunks=[_numbers((NUM_ROWS, 3), "float32")]
        ),
        "strings_sharing_rows": _dpq(
            StringVocabulary.from_pairs(SHARING_STRINGS, SHARING_STRING_ROWS),
            CodeLayout(num_subspaces=2, num_codes=90),
            subspace_dim=2,
        ),
    }
    tables |= _frozen(path.with_name("frozen"), long)
    assert list(tables) == TABLES
    return write_artifact(path, tables, version="contract-1")


def trained_model() -> nn.ModuleList:
    """Torch modules with one table each, the same at every call, after a step of training."""
    torch.manual_seed(0)
    configs = [
        EmbeddingBagConfig(name=name, num_embeddings=NUM_ROWS, embedding_dim=12, feature_names=[name])
        for name in TRAINED
    ]
    dpq = DPQConfig(method="sx", num_subspaces=6, num_codes=7)
    model = nn.ModuleList(
        [
            DPQEmbeddingBagCollection(configs[:1], dpq),
            DPQEmbeddingBagCollection(configs[1:2], dataclasses.replace(dpq, method="vq")),
            EmbeddingBagCollection(tables=configs[2:]),
        ]
    )
    for name, collection in zip(TRAINED, model, strict=True):
        collection(bags_of_one(name, torch.arange(NUM_ROWS // 3))).values().square().sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
    return model


def bags_of_one(feature: str, rows_N: torch.Tensor) -> KeyedJaggedTensor:
    """A bag for each row, so that pooling changes nothing."""
    return KeyedJaggedTensor(keys=[feature], values=rows_N, lengths=torch.ones_like(rows_N))


def _frozen(path: Path, vocabulary: Vocabulary) -> dict[str, TableContents]:
    """The trained tables, as `freeze` stores them."""
    freeze(trained_model(), path, vocabularies=dict.fromkeys(TRAINED, vocabulary))
    contents = {}
    for name, table in open_artifact(path).tables.items():
        is_dpq = table.manifest.kind == "dpq"
        contents[name] = TableContents(
            num_embeddings=NUM_ROWS,
            embedding_dim=table.manifest.embedding_dim,
            vocabulary=vocabulary,
            layout=table.manifest.layout if is_dpq else None,
            values=table.tensors["values"] if is_dpq else None,
            chunks=[table.tensors["packed_codes" if is_dpq else "vectors"]],
        )
    return contents


def _dpq(
    vocabulary: Vocabulary,
    layout: CodeLayout,
    *,
    subspace_dim: int,
    dtype: str = "float32",
    shared: bool = False,
    num_rows: int = NUM_ROWS,
) -> TableContents:
    codes_NM = np.random.default_rng(layout.num_codes).integers(0, layout.num_codes, (num_rows, layout.codes_per_row))
    num_groups = layout.num_levels if shared else layout.codes_per_row
    return TableContents(
        num_embeddings=num_rows,
        embedding_dim=layout.num_subspaces * subspace_dim,
        vocabulary=vocabulary,
        layout=layout,
        values=_numbers((num_groups, layout.num_codes, subspace_dim), dtype),
        chunks=[pack_codes(codes_NM, layout)],
    )


def _with_tiers(vocabulary: Vocabulary, layout: CodeLayout, shares: Sequence[tuple[float, int]]) -> TableContents:
    tiers = cut_into_tiers(layout, NUM_ROWS, shares)
    parts = [_dpq(vocabulary, tier.layout, subspace_dim=3, num_rows=tier.num_rows) for tier in tiers]
    chunks = [chunk for part in parts for chunk in part.chunks]
    return dataclasses.replace(parts[0], num_embeddings=NUM_ROWS, chunks=chunks, tiers=tiers)


def _numbers(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Random numbers, and some whose every bit is easily lost: minus zero, subnormal ones, thirds."""
    numbers = np.random.default_rng(shape[-1]).standard_normal(shape).astype(np.float32)
    numbers.reshape(-1)[::7] = np.resize(
        np.array([-0.0, 1e-40, 1 / 3, -6e-8, 1024.1], np.float32), len(numbers.reshape(-1)[::7])
    )
    return numbers.astype(dtype)


def ids_of(table: str, name: str) -> list[Any]:
    """One of the lists of ids in IDS, as it is for one table."""
    known: list[Any]
    unknown: list[Any] = [-99, NUM_ROWS, 2**53 + 3, INT64_MIN + 1, INT64_MAX - 1]
    if table in STRING_TABLES:
        unknown = ["The", "\0", "item_", "\U0010ffff", "rar"]
    if table == "strings_sharing_rows":
        known, first, last = SHARING_STRINGS, "b", "c"
    elif table in STRING_TABLES:
        known, first, last = STRING_IDS, STRING_IDS[0], STRING_IDS[-1]
    elif table == "one_row":
        known, first, last = [42], 42, 42
    elif table == "sharing_rows":
        known, first, last = SHARING_IDS, -10, 60
    elif table in ("identity", "shared"):
        known, first, last = [*range(NUM_ROWS)], 0, NUM_ROWS - 1
    elif table == "modulo":
        known, first, last = [3, -1, INT64_MAX, INT64_MIN, 2**53 + 1, 120], 0, NUM_ROWS - 1
    else:
        known, first, last = LONG_IDS, LONG_IDS[0], LONG_IDS[-1]
    return {
        "hits": known[::-1],
        "unknown": unknown,
        "mixed": [unknown[0], *known[:3], unknown[1], known[-1], unknown[2]],
        "duplicates": [known[0], unknown[0], known[-1], known[0], unknown[0], known[-1]] * 9,
        "first_and_last_row": [last, first],
        "none": [],
        "one": known[:1],
    }[name]


def has_unknown_ids(table: str, name: str) -> bool:
    """Whether some of `ids_of` are not in the vocabulary."""
    return table != "modulo" and name in ("unknown", "mixed", "duplicates")
