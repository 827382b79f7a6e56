"""Every option of the method, frozen: the artifact holds what eval mode returns, bit for bit, in the format promised.

A loop that knows the format alone decodes rows from the file, as the safetensors library reads it.
"""

import itertools

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import nn

from dpq_rec import EmbeddingStore, verify
from dpq_rec.nn import freeze
from dpq_rec.nn.quantizer import NO_CODE
from tests.dpq_rec.nn.modules import KINDS, batch, build, config, train, vectors
from tests.dpq_rec.nn.options import OPTIONS

K, D = 11, 4  # 4 bits a code, of which some numbers are no code
MORE_THAN_A_CHUNK = 70_000
CASES = [
    (name, kind, MORE_THAN_A_CHUNK if name in ("sx, two levels, cosine, tied, shared, half", "vq") else 50)
    for name, kind in zip(OPTIONS, itertools.cycle(KINDS), strict=False)
]
TABLE_OF = {"old": "item"}  # output name -> table, where they differ


def frozen(tmp_path, name, kind, num_rows):
    """A model after some steps on some of its rows, and its artifact."""
    torch.manual_seed(0)
    module = build(kind, config(num_subspaces=D, num_codes=K, **OPTIONS[name]), num_embeddings=num_rows)
    train(module, batch(kind, range(0, num_rows, 3)), lr=1.0)
    model = nn.Sequential(module)
    freeze(model, tmp_path / "artifact")
    return module.eval(), tmp_path / "artifact"


@pytest.mark.parametrize(
    ("name", "kind", "num_rows"), CASES, ids=[f"{name}, {kind.__name__}" for name, kind, _ in CASES]
)
def test_artifact_of_any_option_holds_what_eval_mode_returns(name, kind, num_rows, tmp_path):
    module, path = frozen(tmp_path, name, kind, num_rows)
    ids, store = np.arange(num_rows), EmbeddingStore.open(path)
    verify(path)
    for output, wanted in vectors(module, batch(kind, ids.tolist())).items():
        table = "0" if output == "table" else TABLE_OF.get(output, output)
        stored = store.lookup(table, ids)
        assert stored.vectors.tobytes() == wanted.detach().numpy().tobytes()
        assert stored.missing.tolist() == ([] if module.padding_idx is None else [module.padding_idx])


@pytest.mark.parametrize(("name", "kind", "num_rows"), [(n, kind, 50) for n, kind, _ in CASES], ids=OPTIONS.keys())
def test_artifact_of_any_option_is_what_its_manifest_says(name, kind, num_rows, tmp_path):
    module, path = frozen(tmp_path, name, kind, num_rows)
    for table, entry in EmbeddingStore.open(path).tables.items():
        quantizer = module.quantizer("table" if table == "0" else table)
        chosen, manifest, file = quantizer.config, entry.manifest, load_file(path / entry.manifest.file)
        assert (manifest.kind, manifest.num_codes) == ("dpq-tiers" if chosen.tiers else "dpq", K)
        assert (manifest.num_subspaces, manifest.num_levels) == (D, chosen.num_levels)
        assert manifest.shared_values == chosen.share_subspaces
        assert manifest.row_bytes == D * chosen.num_levels // 2  # 4 bits a code
        rounded = quantizer.values_MKS.detach().numpy().astype(chosen.values_dtype)
        assert file["values"].dtype == rounded.dtype
        assert np.array_equal(file["values"], rounded)
        assert len({name for name in file if name.startswith("packed_codes")}) == 1 + len(chosen.tiers)
        codes = quantizer.encode(module.query_weights()["table" if table == "0" else table], rows_N=torch.arange(50))
        for row in range(50):
            packed_W, num_codes = packed_row(file, chosen, row)
            assert unpacked(packed_W) == codes[row, :num_codes].tolist()
            assert codes[row, num_codes:].tolist() == [NO_CODE] * (D * chosen.num_levels - num_codes)
            want = quantizer.decode(codes[row : row + 1]).detach()[0]
            assert decoded(file, codes[row, :num_codes].tolist(), manifest) == want.tolist()


def packed_row(file, chosen, row):
    """Packed codes of one of 50 rows, which may be of a tier of its own, and how many they are."""
    starts = [0, *(round(50 * share) for share, _ in chosen.tiers), 50]
    levels = [chosen.num_levels, *(num_levels for _, num_levels in chosen.tiers)]
    tier = next(at for at in range(len(levels)) if row < starts[at + 1])
    packed_VW = file[f"packed_codes.{tier}" if tier else "packed_codes"]
    assert packed_VW.shape == (starts[tier + 1] - starts[tier], D * levels[tier] // 2)
    return packed_VW[row - starts[tier]], D * levels[tier]


def unpacked(row_W):
    """Codes of four bits, the lower half of a byte first."""
    return [half for byte in row_W.tolist() for half in (byte & 15, byte >> 4)]


def decoded(file, codes_M, manifest):
    """The concatenation of the groups, each the sum of its levels' values in fp32, in order."""
    out = []
    for d in range(D):
        group_S = None
        for level in range(len(codes_M) // D):
            place = level if manifest.shared_values else level * D + d
            value_S = file["values"][place, codes_M[level * D + d]].astype(np.float32)
            group_S = value_S if group_S is None else group_S + value_S
        out += group_S.tolist()
    return out
