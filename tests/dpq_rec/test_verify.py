import dataclasses

import numpy as np
import pytest

from dpq_rec import CodeLayout, ConfigError, DamagedArtifactError, Int64Vocabulary, verify, write_artifact
from tests.dpq_rec.builders import dense_contents, dpq_contents, overwrite, small_artifact, word_artifact


@pytest.fixture
def artifact(tmp_path):
    return small_artifact(tmp_path / "artifact")


def test_verify_accepts_what_write_artifact_writes(artifact):
    assert verify(artifact).version == "v1"


def test_verify_tells_its_progress_in_bytes_of_files_and_codes(artifact):
    seen = []
    opened = verify(artifact, seen.append)
    files = sum(table.manifest.bytes for table in opened.tables.values())
    assert sum(seen) == files + opened.tables["item"].tensors["packed_codes"].nbytes


def test_verify_finds_any_flipped_byte(artifact):
    file = artifact / "tables/item.safetensors"
    content = file.read_bytes()
    for at in range(len(content)):
        file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(DamagedArtifactError):
            verify(artifact)


def test_verify_finds_a_wrong_digest(artifact):
    overwrite(artifact, "item", "values", 0, b"\x00\x00\x80\x3f", forge_digest=False)
    with pytest.raises(DamagedArtifactError, match="got sha256"):
        verify(artifact)


# Rows of `item` are 5 codes of 3 bits, K=5, and 1 padding bit.
def test_verify_finds_a_code_that_cannot_be(artifact):
    overwrite(artifact, "item", "packed_codes", 4, b"\x05\x00")
    with pytest.raises(DamagedArtifactError, match="table 'item': row 2 holds an impossible code"):
        verify(artifact)


def test_verify_finds_a_padding_bit(artifact):
    overwrite(artifact, "item", "packed_codes", 6, b"\x00\x80")
    with pytest.raises(DamagedArtifactError, match="table 'item': row 3 holds an impossible code or padding bit"):
        verify(artifact)


def test_verify_finds_a_damaged_row_beyond_the_first_piece(tmp_path, monkeypatch):
    monkeypatch.setattr("dpq_rec.artifact._CHECK_ROWS", 2)
    artifact = small_artifact(tmp_path / "artifact")
    overwrite(artifact, "item", "packed_codes", 6, b"\xff\x00")
    with pytest.raises(DamagedArtifactError, match="row 3"):
        verify(artifact)


LAYOUT = CodeLayout(num_subspaces=5, num_codes=5)
NUMBERS = {
    "fp32 values": ("item", dpq_contents(4, LAYOUT), "values", 24, "<f4"),
    "fp16 values": ("item", dpq_contents(4, LAYOUT, dtype=np.float16), "values", 12, "<f2"),
    "vectors": ("dense", dense_contents(np.ones((4, 5), np.float32)), "vectors", 24, "<f4"),
}


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", NUMBERS)
def test_verify_finds_a_number_that_is_not_finite(tmp_path, name, number):
    table, contents, tensor, at, dtype = NUMBERS[name]
    path = write_artifact(tmp_path / "a", {table: contents})
    verify(path)
    overwrite(path, table, tensor, at, np.array(number, dtype).tobytes())
    place = {"values": r"\[0, 3, 0\]", "vectors": r"\[1, 1\]"}[tensor]
    with pytest.raises(DamagedArtifactError, match=f"table '{table}': {tensor}{place} is {number}"):
        verify(path)


def test_verify_finds_what_is_not_finite_beyond_the_first_piece(tmp_path, monkeypatch):
    monkeypatch.setattr("dpq_rec.artifact._CHECK_NUMBERS", 10)
    path = write_artifact(tmp_path / "a", {"t": dense_contents(np.ones((7, 4), np.float32))})
    verify(path)
    overwrite(path, "t", "vectors", 4 * 22, np.array(np.nan, "<f4").tobytes())
    with pytest.raises(DamagedArtifactError, match=r"table 't': vectors\[5, 2\] is nan"):
        verify(path)


@pytest.mark.parametrize("number", [np.nan, np.inf])
@pytest.mark.parametrize("kind", ["values", "vectors"])
def test_write_artifact_refuses_a_number_that_verify_would_refuse(tmp_path, kind, number):
    contents = dpq_contents(4, LAYOUT)
    if kind == "vectors":
        contents = dataclasses.replace(dense_contents(np.ones((4, 5), np.float32)), chunks=[])
        contents.chunks.extend([np.ones((3, 5), np.float32), np.full((1, 5), number, np.float32)])
    else:
        contents.values[2, 1, 0] = number
    with pytest.raises(ConfigError, match=r"table 't': .*want finite numbers"):
        write_artifact(tmp_path / "a", {"t": contents})
    assert list(tmp_path.iterdir()) == []


def test_verify_finds_ids_out_of_order(artifact):
    overwrite(artifact, "item", "ids", 0, (41).to_bytes(8, "little"))
    with pytest.raises(DamagedArtifactError, match=r"table 'item': .* not strictly ascending"):
        verify(artifact)


def test_verify_finds_an_id_that_lives_outside_the_table(artifact):
    overwrite(artifact, "item", "rows", 4, (4).to_bytes(4, "little"))
    with pytest.raises(DamagedArtifactError, match=r"table 'item': .* a row outside the table's 4"):
        verify(artifact)


# The ids of `word` in the file: "", -ing, 7, the, ü; they begin at bytes 0, 0, 4, 5, 8 and end at 10.
HOSTILE_STRINGS = {
    "ids out of order": ("id_bytes", 4, b"z", "not strictly ascending"),
    "an id twice": ("id_offsets", 16, bytes(8), "not strictly ascending"),
    "bytes that are not UTF-8": ("id_bytes", 9, b"\x20", "not UTF-8"),
    "an id that lives outside the table": ("rows", 0, b"\x05", "a row outside the table's 5"),
    "an offset beyond the bytes": ("id_offsets", 16, (2**40).to_bytes(8, "little"), "see number 1"),
    "an offset below the bytes": ("id_offsets", 16, b"\xff" * 8, "see number 1"),
    "a first offset that is not 0": ("id_offsets", 0, b"\x01", "want 0 to 10"),
    "a last offset that is not the end": ("id_offsets", 40, b"\x09", "want 0 to 10"),
    "a slot of another id": ("id_slots", 0, b"\x77", "id_slots are not those of its ids"),
}


@pytest.mark.parametrize("name", HOSTILE_STRINGS)
def test_verify_finds_a_damaged_vocabulary_of_strings(tmp_path, name):
    tensor, at, data, message = HOSTILE_STRINGS[name]
    path = word_artifact(tmp_path / "words")
    verify(path)
    overwrite(path, "word", tensor, at, data)
    with pytest.raises(DamagedArtifactError, match=message):
        verify(path)


def test_verify_finds_a_damaged_tree_of_integers(tmp_path):
    contents = dense_contents(np.ones((50, 2), np.float32), Int64Vocabulary.from_ids(np.arange(50)))
    path = write_artifact(tmp_path / "a", {"t": contents})
    verify(path)
    overwrite(path, "t", "id_tree", 16, b"\x1f")
    with pytest.raises(DamagedArtifactError, match=r"table 't': .* id_tree is not that of its ids"):
        verify(path)
