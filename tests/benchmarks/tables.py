"""Tables to measure on. In: sizes and a vocabulary. Out: TableContents of random codes and values."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from dpq_rec.artifact import TableContents
from dpq_rec.codes import CodeLayout, pack_codes
from dpq_rec.vocabulary import Vocabulary

_CHUNK_ROWS = 1 << 17


def random_contents(
    shape: tuple[int, int], layout: CodeLayout, vocabulary: Vocabulary, generator: np.random.Generator
) -> TableContents:
    """Contents of a table [V, E]; its codes are drawn as they are written.

    Args:
        shape: V and E.
        layout: of the codes of a row.
        vocabulary: of V rows.
        generator: of values and codes.
    """
    num_embeddings, embedding_dim = shape
    value_shape = (layout.codes_per_row, layout.num_codes, embedding_dim // layout.num_subspaces)

    def chunks() -> Iterator[NDArray[np.uint8]]:
        for start in range(0, num_embeddings, _CHUNK_ROWS):
            of_chunk = (min(_CHUNK_ROWS, num_embeddings - start), layout.codes_per_row)
            yield pack_codes(generator.integers(0, layout.num_codes, of_chunk, np.uint16), layout)

    return TableContents(
        num_embeddings=num_embeddings,
        embedding_dim=embedding_dim,
        vocabulary=vocabulary,
        layout=layout,
        values=generator.standard_normal(value_shape, np.float32),
        chunks=chunks(),
    )
