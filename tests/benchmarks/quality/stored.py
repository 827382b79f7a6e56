"""What a compressed table is on disk, and the vectors it serves. In: tensors. Out: bytes, and tables of an artifact.

A method hands over the tensors that would lie on disk, and its vectors are decoded from these alone: what is counted is
what is measured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpq_rec.artifact import TableContents, write_artifact
from dpq_rec.codes import CodeLayout
from dpq_rec.vocabulary import Vocabulary


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stored:
    """A compressed table.

    Attributes:
        tensors: all that would lie on disk, by name. With a layout: `packed_codes` and `values` of contract 3.
        vectors_VE: what is decoded from them (float32).
        layout: how codes are laid out, where the artifact's format holds the tensors as they are; else None.
    """

    tensors: Mapping[str, NDArray[Any]]
    vectors_VE: NDArray[np.float32]
    layout: CodeLayout | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def plain(vectors_VE: NDArray[np.float32]) -> Stored:
    """A table that stays as it is."""
    return Stored(tensors={"vectors": vectors_VE}, vectors_VE=vectors_VE)


def write_stored(
    path: Path,
    tables: Mapping[str, Stored],
    vocabularies: Mapping[str, Vocabulary],
    features: Mapping[str, tuple[str, ...]],
) -> None:
    """Write an artifact of compressed tables: of kind "dpq" where the format holds them, else decoded, of kind "dense".

    Args:
        path: the folder to make; it must not exist.
        tables: table -> what became of it.
        vocabularies: table -> the map from ids to rows.
        features: table -> the names under which a model looks it up.
    """
    contents = {}
    for name, stored in tables.items():
        num_embeddings, embedding_dim = stored.vectors_VE.shape
        coded = stored.layout is not None
        contents[name] = TableContents(
            num_embeddings=num_embeddings,
            embedding_dim=embedding_dim,
            vocabulary=vocabularies[name],
            chunks=[stored.tensors["packed_codes"] if coded else stored.vectors_VE],
            layout=stored.layout,
            values=stored.tensors["values"] if coded else None,
            features=features[name],
        )
    write_artifact(path, contents)
