"""Small artifacts for the tests of this folder."""

import hashlib
import json
from pathlib import Path
from unittest import mock

import numpy as np

from dpq_rec import (
    CodeLayout,
    IdentityVocabulary,
    Int64Vocabulary,
    StringVocabulary,
    TableContents,
    pack_codes,
    write_artifact,
)


def random_codes(num_rows, layout, seed=0):
    generator = np.random.default_rng(seed)
    return generator.integers(0, layout.num_codes, (num_rows, layout.codes_per_row)).astype(np.uint16)


def random_values(layout, subspace_dim, *, shared=False, seed=0):
    num_groups = layout.num_levels if shared else layout.codes_per_row
    generator = np.random.default_rng(seed)
    return generator.standard_normal((num_groups, layout.num_codes, subspace_dim)).astype(np.float32)


def dpq_contents(num_rows, layout, *, subspace_dim=2, vocabulary=None, shared=False, dtype=np.float32, seed=0):
    return TableContents(
        num_embeddings=num_rows,
        embedding_dim=layout.num_subspaces * subspace_dim,
        vocabulary=vocabulary or IdentityVocabulary(num_rows),
        layout=layout,
        values=random_values(layout, subspace_dim, shared=shared, seed=seed).astype(dtype),
        chunks=[pack_codes(random_codes(num_rows, layout, seed), layout)],
    )


def dense_contents(vectors_VE, vocabulary=None):
    return TableContents(
        num_embeddings=len(vectors_VE),
        embedding_dim=vectors_VE.shape[1],
        vocabulary=vocabulary or IdentityVocabulary(len(vectors_VE)),
        chunks=[vectors_VE],
    )


def write_unchecked(path: Path, tables) -> Path:
    """As `write_artifact`, which refuses numbers that are not finite: artifacts that hold them are out there."""
    with mock.patch("dpq_rec.artifact.find_not_finite", return_value=None):
        return write_artifact(path, tables)


def small_artifact(path: Path) -> Path:
    """Two tables: `item` (K=5 in 3 bits, so rows have codes that cannot be and a padding bit; int64 ids), `dense`."""
    item = dpq_contents(
        4, CodeLayout(num_subspaces=5, num_codes=5), vocabulary=Int64Vocabulary.from_ids([40, -3, 7, 1 << 40])
    )
    dense = dense_contents(np.arange(12, dtype=np.float32).reshape(3, 4))
    return write_artifact(path, {"item": item, "dense": dense}, version="v1")


WORDS = ["the", "7", "ü", "", "-ing"]


def word_artifact(path: Path) -> Path:
    """One dense table, `word`, of string ids; row v is [2 v, 2 v + 1] and holds WORDS[v]."""
    vectors_VE = np.arange(10, dtype=np.float32).reshape(5, 2)
    contents = dense_contents(vectors_VE, StringVocabulary.from_ids(WORDS))
    return write_artifact(path, {"word": contents}, version="words")


def edit_manifest(artifact: Path, edit) -> None:
    """Apply `edit` to the parsed manifest and write it back."""
    manifest = json.loads((artifact / "manifest.json").read_text())
    edit(manifest)
    (artifact / "manifest.json").write_text(json.dumps(manifest))


def overwrite(artifact: Path, table: str, tensor: str, at: int, data: bytes, *, forge_digest: bool = True) -> None:
    """Write bytes into a tensor; with the digest forged, so that only what looks at the content can notice."""
    file = artifact / "tables" / f"{table}.safetensors"
    content = bytearray(file.read_bytes())
    header_bytes = int.from_bytes(content[:8], "little")
    begin = 8 + header_bytes + json.loads(content[8 : 8 + header_bytes])[tensor]["data_offsets"][0] + at
    content[begin : begin + len(data)] = data
    file.write_bytes(content)
    if forge_digest:
        digest = hashlib.sha256(content).hexdigest()
        edit_manifest(artifact, lambda manifest: manifest["tables"][table].update(sha256=digest))
