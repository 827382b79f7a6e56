"""Artifacts byte for byte, written down by hand: what is written, and what is read of it."""

import json

import numpy as np
import safetensors.numpy

from dpq_rec import (
    CodeLayout,
    EmbeddingStore,
    Int64Vocabulary,
    StringVocabulary,
    TableContents,
    pack_codes,
    verify,
    write_artifact,
)

LAYOUT = CodeLayout(num_subspaces=2, num_codes=5)

# A table of 3 rows, E=4, D=2, K=5 (3 bits, rows of 1 byte), written down from contract 3 and the safetensors format.
GOLDEN_HEADER = (
    '{"ids":{"dtype":"I64","shape":[3],"data_offsets":[0,24]},'
    '"rows":{"dtype":"U32","shape":[3],"data_offsets":[24,36]},'
    '"values":{"dtype":"F32","shape":[2,5,2],"data_offsets":[36,116]},'
    '"padding":{"dtype":"U8","shape":[12],"data_offsets":[116,128]},'
    '"packed_codes":{"dtype":"U8","shape":[3,1],"data_offsets":[128,131]}}'
)
GOLDEN_BYTES = bytes.fromhex(
    "3801000000000000"  # the header's 312 bytes
    + GOLDEN_HEADER.encode().hex()
    + "f9ffffffffffffff0a000000000000002c01000000000000"  # ids -7, 10, 300
    + "020000000000000001000000"  # live in rows 2, 0, 1
    + "000000000000003f0000803f0000c03f00000040000020400000404000006040000080400000904000002041"
    + "000028410000304100003841000040410000484100005041000058410000604100006841"  # 0, 0.5, 1, ... 4.5, 10, ... 14.5
    + "000000000000000000000000"
    + "210013"  # codes 1 4, 0 0, 3 2: 0b100_001, 0, 0b010_011
)
GOLDEN_SHA256 = "79f2dfc4575f117bd3966ef2bcafb6a9db5b69a0a11639ccec214eca521f24b9"
GOLDEN_ENTRY = {
    "file": "tables/t.safetensors",
    "bytes": 451,
    "sha256": GOLDEN_SHA256,
    "kind": "dpq",
    "num_embeddings": 3,
    "embedding_dim": 4,
    "num_subspaces": 2,
    "num_levels": 1,
    "num_codes": 5,
    "code_bits": 3,
    "row_bytes": 1,
    "shared_values": False,
    "features": ["f", "g"],
    "vocabulary": {"kind": "int64"},
}

# The same of strings: "", "a\0", "b" and "ü" live in rows 2, 2, 1 and 0; E=1, D=1, K=2.
GOLDEN_STRING_HEADER = (
    '{"id_offsets":{"dtype":"I64","shape":[5],"data_offsets":[0,40]},'
    '"rows":{"dtype":"U32","shape":[4],"data_offsets":[40,56]},'
    '"id_slots":{"dtype":"U32","shape":[7],"data_offsets":[56,84]},'
    '"values":{"dtype":"F32","shape":[1,2,1],"data_offsets":[84,92]},'
    '"id_bytes":{"dtype":"U8","shape":[5],"data_offsets":[92,97]},'
    '"padding":{"dtype":"U8","shape":[31],"data_offsets":[97,128]},'
    '"packed_codes":{"dtype":"U8","shape":[3,1],"data_offsets":[128,131]}}'
)
GOLDEN_STRING_BYTES = bytes.fromhex(
    "b801000000000000"  # the header's 440 bytes
    + GOLDEN_STRING_HEADER.encode().hex()
    + "0000000000000000000000000000000002000000000000000300000000000000"
    + "0500000000000000"
    + "02000000020000000100000000000000"
    # Hashes 0, 0x0a0eca07a6acbde2, 0xec0445e4548ca4a7, 0xfc17142e72b1e722: homes 0, 0, 6, 6, and 3 bits for the number.
    + "01000000"
    + "12ef6535"
    + "14398f95"  # "" at home, "a\0" behind it, "ü" behind both
    + "00" * 12
    + "3b2565a4"  # "b"
    + "0000003f0000c03f"  # 0.5, 1.5
    + "6100"
    + "62"
    + "c3bc"
    + "00" * 31
    + "010001"
)


def golden_artifact(path):
    steps = np.array([0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5], np.float32)
    contents = TableContents(
        num_embeddings=3,
        embedding_dim=4,
        vocabulary=Int64Vocabulary.from_ids([10, 300, -7]),
        layout=LAYOUT,
        values=np.stack([steps, steps + 10]).reshape(2, 5, 2),
        chunks=[pack_codes(np.array([[1, 4], [0, 0]]), LAYOUT), pack_codes(np.array([[3, 2]]), LAYOUT)],
        features=("f", "g"),
    )
    return write_artifact(path, {"t": contents}, version="golden")


def golden_string_artifact(path):
    layout = CodeLayout(num_subspaces=1, num_codes=2)
    contents = TableContents(
        num_embeddings=3,
        embedding_dim=1,
        vocabulary=StringVocabulary.from_pairs(["b", "ü", "", "a\0"], [1, 0, 2, 2]),
        layout=layout,
        values=np.array([[[0.5], [1.5]]], np.float32),
        chunks=[pack_codes(np.array([[1], [0], [1]]), layout)],
    )
    return write_artifact(path, {"t": contents}, version="golden")


def test_write_artifact_writes_the_golden_bytes(tmp_path):
    golden_artifact(tmp_path / "a")
    assert (tmp_path / "a/tables/t.safetensors").read_bytes() == GOLDEN_BYTES


def test_write_artifact_writes_the_golden_bytes_of_a_table_of_strings(tmp_path):
    path = golden_string_artifact(tmp_path / "a")
    assert (path / "tables/t.safetensors").read_bytes() == GOLDEN_STRING_BYTES
    assert json.loads((path / "manifest.json").read_text())["tables"]["t"]["vocabulary"] == {"kind": "string"}


def test_safetensors_reads_every_tensor_of_a_table_of_strings(tmp_path):
    path = golden_string_artifact(tmp_path / "a")
    tensors = safetensors.numpy.load_file(path / "tables/t.safetensors")
    found = {name: (str(tensor.dtype), tensor.tolist()) for name, tensor in tensors.items() if name != "padding"}
    assert found == {
        "id_offsets": ("int64", [0, 0, 2, 3, 5]),
        "rows": ("uint32", [2, 2, 1, 0]),
        "id_slots": ("uint32", [1, 0x3565EF12, 0x958F3914, 0, 0, 0, 0xA465253B]),
        "values": ("float32", [[[0.5], [1.5]]]),
        "id_bytes": ("uint8", list("a\0bü".encode())),
        "packed_codes": ("uint8", [[1], [0], [1]]),
    }


def test_write_artifact_writes_the_golden_manifest(tmp_path):
    manifest = json.loads((golden_artifact(tmp_path / "a") / "manifest.json").read_text())
    assert manifest.pop("created_at").endswith("+00:00")
    assert manifest == {
        "format": "dpq-rec",
        "format_version": 1,
        "version": "golden",
        "producer": "dpq_rec 0.1.0",
        "tables": {"t": GOLDEN_ENTRY},
    }


def test_open_artifact_reads_the_golden_bytes(tmp_path):
    manifest = {"format": "dpq-rec", "format_version": 1, "version": "golden", "created_at": "now", "producer": "hand"}
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables/t.safetensors").write_bytes(GOLDEN_BYTES)
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "tables": {"t": GOLDEN_ENTRY}}))
    assert verify(tmp_path).version == "golden"
    vectors, missing = EmbeddingStore.open(tmp_path).lookup("t", [-7, 10, 11, 300])
    assert vectors.tolist() == [[3, 3.5, 12, 12.5], [1, 1.5, 14, 14.5], [0, 0, 0, 0], [0, 0.5, 10, 10.5]]
    assert missing.tolist() == [2]


def test_open_artifact_finds_the_golden_strings(tmp_path):
    path = golden_string_artifact(tmp_path / "a")
    vectors, missing = EmbeddingStore.open(path).lookup("t", ["ü", "b", "a", "", "a\0"])
    assert (vectors.tolist(), missing.tolist()) == ([[1.5], [0.5], [0], [1.5], [1.5]], [2])
    assert verify(path).tables["t"].vocabulary_bytes == 5 + 5 * 8 + 4 * 4 + 7 * 4
