import dataclasses
import json
import os
import resource
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpq_rec import (
    ArtifactError,
    CodeLayout,
    ConfigError,
    DamagedArtifactError,
    EmbeddingStore,
    IdentityVocabulary,
    Int64Vocabulary,
    ModuloVocabulary,
    StringVocabulary,
    TableContents,
    open_artifact,
    verify,
    write_artifact,
)
from dpq_rec.strings import PackedStrings
from tests.dpq_rec.builders import dense_contents, dpq_contents, edit_manifest, small_artifact

LAYOUT = CodeLayout(num_subspaces=2, num_codes=5)


@pytest.fixture
def artifact(tmp_path):
    return small_artifact(tmp_path / "artifact")


# Writing


def test_write_artifact_writes_nothing_but_the_manifest_and_the_tables(artifact):
    files = {str(path.relative_to(artifact)) for path in artifact.rglob("*") if path.is_file()}
    assert files == {"manifest.json", "tables/item.safetensors", "tables/dense.safetensors"}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_write_artifact_leaves_nothing_behind_when_a_chunk_fails(tmp_path, error):
    def chunks():
        yield np.zeros((1, 1), np.uint8)
        raise error

    contents = dataclasses.replace(dpq_contents(2, LAYOUT), chunks=chunks())
    with pytest.raises(error):
        write_artifact(tmp_path / "a", {"good": dpq_contents(2, LAYOUT), "bad": contents})
    assert list(tmp_path.iterdir()) == []


def test_write_artifact_shows_nothing_at_its_path_before_all_is_written(tmp_path):
    def chunks():
        assert not (tmp_path / "a").exists()
        yield np.zeros((2, 1), np.uint8)

    write_artifact(tmp_path / "a", {"t": dataclasses.replace(dpq_contents(2, LAYOUT), chunks=chunks())})
    assert (tmp_path / "a/manifest.json").is_file()


def test_write_artifact_leaves_nothing_behind_when_its_path_is_taken_meanwhile(tmp_path):
    def chunks():
        (tmp_path / "a").mkdir()
        (tmp_path / "a/mine").touch()
        yield np.zeros((2, 1), np.uint8)

    with pytest.raises(OSError, match="not empty"):
        write_artifact(tmp_path / "a", {"t": dataclasses.replace(dpq_contents(2, LAYOUT), chunks=chunks())})
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "mine"]


def test_write_artifact_refuses_a_path_that_exists(artifact):
    with pytest.raises(FileExistsError, match="never changed"):
        write_artifact(artifact, {"t": dpq_contents(2, LAYOUT)})


@pytest.mark.parametrize("name", ["../t", "a/b", "", ".hidden", "-x", "a b", "tä"])
def test_write_artifact_refuses_a_table_name_that_is_no_plain_file_name(tmp_path, name):
    with pytest.raises(ConfigError, match="table name"):
        write_artifact(tmp_path / "a", {name: dpq_contents(2, LAYOUT)})


@pytest.mark.parametrize("version", ["../v", "a/b", ".hidden", "v 1"])
def test_write_artifact_refuses_a_version_that_is_no_plain_folder_name(tmp_path, version):
    with pytest.raises(ConfigError, match="version"):
        write_artifact(tmp_path / "a", {"t": dpq_contents(2, LAYOUT)}, version=version)


@pytest.mark.parametrize(
    "wrong",
    [
        {"values": None},
        {"values": np.zeros((2, 5, 3), np.float32)},
        {"values": np.zeros((2, 4, 2), np.float32)},
        {"values": np.zeros((2, 5, 2), np.float64)},
        {"embedding_dim": 5},
        {"embedding_dim": 0},
        {"embedding_dim": -4},
        {"embedding_dim": 4.0},
        {"embedding_dim": True},
        {"embedding_dim": 1 << 21},
        {"num_embeddings": 2.0},
        {"num_embeddings": -2},
        {"num_embeddings": True},
    ],
)
def test_write_artifact_refuses_values_that_do_not_fit(tmp_path, wrong):
    contents = dataclasses.replace(dpq_contents(2, LAYOUT), **wrong)
    with pytest.raises(ConfigError, match="table 't'"):
        write_artifact(tmp_path / "a", {"t": contents})


def test_write_artifact_refuses_codes_that_were_not_packed(tmp_path):
    contents = dataclasses.replace(dpq_contents(2, LAYOUT), chunks=[np.zeros((2, 2), np.uint16)])
    with pytest.raises(ValueError, match="got a chunk uint16"):
        write_artifact(tmp_path / "a", {"t": contents})


def test_write_artifact_makes_a_version_of_its_own_each_time(tmp_path):
    versions = {open_artifact(write_artifact(tmp_path / n, {"t": dpq_contents(1, LAYOUT)})).version for n in "abc"}
    assert len(versions) == 3


# Opening


texts = st.one_of(st.text("\0abü€😀", max_size=4), st.text(max_size=9))


@given(st.dictionaries(texts, st.integers(0, 6), max_size=20), st.lists(texts, max_size=20))
def test_strings_are_found_in_an_artifact_as_in_a_dict(tmp_path_factory, row_of_text, wanted_ids):
    vocabulary = StringVocabulary.from_pairs(list(row_of_text), list(row_of_text.values()))
    contents = dense_contents(np.arange(1, 8, dtype=np.float32)[:, None], vocabulary)
    path = write_artifact(tmp_path_factory.mktemp("strings") / "a", {"t": contents})
    verify(path)
    wanted_ids = [*wanted_ids, *row_of_text]
    vectors, missing = EmbeddingStore.open(path).lookup("t", wanted_ids)
    assert vectors[:, 0].tolist() == [row_of_text.get(text, -1) + 1 for text in wanted_ids]
    assert missing.tolist() == [at for at, text in enumerate(wanted_ids) if text not in row_of_text]


def test_open_artifact_gives_back_what_was_written(artifact):
    opened = open_artifact(artifact)
    assert (opened.path, opened.version, list(opened.tables)) == (artifact, "v1", ["item", "dense"])


def test_table_bytes_count_values_and_codes_as_they_lie_on_disk_and_the_vocabulary_apart(tmp_path):
    layout = CodeLayout(num_subspaces=4, num_codes=16, num_levels=2)
    vocabulary = Int64Vocabulary.from_ids(np.arange(100))
    contents = dpq_contents(100, layout, subspace_dim=8, vocabulary=vocabulary, shared=True, dtype=np.float16)
    table = open_artifact(write_artifact(tmp_path / "a", {"t": contents})).tables["t"]
    assert table.artifact_bytes == 100 * 4 + 2 * 16 * 8 * 2
    assert table.vocabulary_bytes == 100 * 12 + 16 * 8  # a root of 7 keys
    assert table.full_bytes == 100 * 32 * 4
    assert table.compression_ratio == 12800 / 912


def lists_without_index(num_ids):
    """A vocabulary of integers and one of strings, made of the bare lists."""
    rows_U = np.arange(num_ids, dtype=np.uint32)
    texts = PackedStrings.pack(sorted(str(i).encode() for i in range(num_ids)))
    return {"i": Int64Vocabulary(np.arange(num_ids) * 7, rows_U), "s": StringVocabulary(texts, rows_U)}


def test_write_artifact_adds_what_finds_ids_fast(tmp_path):
    contents = {name: dpq_contents(50, LAYOUT, vocabulary=lists) for name, lists in lists_without_index(50).items()}
    tables = verify(write_artifact(tmp_path / "a", contents)).tables
    assert list(tables["i"].vocabulary.tensors()) == ["id_tree", "ids", "rows"]
    assert "id_slots" in tables["s"].vocabulary.tensors()


def test_open_artifact_reads_one_without_what_finds_ids_fast(tmp_path, monkeypatch):
    for kind in (Int64Vocabulary, StringVocabulary):
        monkeypatch.setattr(kind, "indexed", lambda self: self)
    contents = {name: dpq_contents(50, LAYOUT, vocabulary=lists) for name, lists in lists_without_index(50).items()}
    path = write_artifact(tmp_path / "a", contents)
    tables = verify(path).tables
    assert not {"id_tree", "id_slots"} & {*tables["i"].tensors, *tables["s"].tensors}
    store = EmbeddingStore.open(path)
    assert store.lookup("i", [0, 5, 7 * 49]).missing.tolist() == [1]
    assert store.lookup("s", ["0", "50", "49"]).missing.tolist() == [1]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_open_artifact_holds_values_in_memory_as_float32(tmp_path, dtype):
    path = write_artifact(tmp_path / "a", {"t": dpq_contents(2, LAYOUT, dtype=dtype)})
    values_MKS = open_artifact(path).tables["t"].tensors["values_fp32"]
    assert values_MKS.dtype == np.float32
    assert values_MKS.flags.owndata


def test_open_artifact_ignores_tensors_and_manifest_fields_that_it_does_not_know(tmp_path):
    class WithIndex(IdentityVocabulary):
        def tensors(self):
            return {"index": np.arange(7)}

    path = write_artifact(tmp_path / "a", {"t": dpq_contents(2, LAYOUT, vocabulary=WithIndex(2))})
    edit_manifest(path, lambda manifest: manifest["tables"]["t"].update(tiers=3))
    assert open_artifact(path).tables["t"].vocabulary.kind == "identity"


def set_field(name, value):
    return lambda manifest: manifest["tables"]["item"].update({name: value})


def drop_field(name):
    return lambda manifest: manifest["tables"]["item"].pop(name)


CONTRADICTIONS = {
    "file outside": set_field("file", "../x"),
    "file outside, hidden": set_field("file", "tables/../../x"),
    "file at the root": set_field("file", "/etc/passwd"),
    "file that is a folder": set_field("file", "tables"),
    "file that is not there": set_field("file", "tables/x.safetensors"),
    "file that is no text": set_field("file", 7),
    "file of another table": set_field("file", "tables/dense.safetensors"),
    "no file": drop_field("file"),
    "bytes": set_field("bytes", 3),
    "no bytes": drop_field("bytes"),
    "one row more": set_field("num_embeddings", 5),
    "rows that are a float": set_field("num_embeddings", 4.0),
    "rows that are negative": set_field("num_embeddings", -4),
    "rows that are text": set_field("num_embeddings", "4"),
    "rows that are null": set_field("num_embeddings", None),
    "dimension": set_field("embedding_dim", 12),
    "dimension that D does not divide": set_field("embedding_dim", 11),
    "no subspaces": set_field("num_subspaces", 0),
    "subspaces": set_field("num_subspaces", 10),
    "subspaces that are a boolean": set_field("num_subspaces", True),
    "levels": set_field("num_levels", 2),
    "no levels": set_field("num_levels", 0),
    "codes": set_field("num_codes", 6),
    "one code": set_field("num_codes", 1),
    "too many codes": set_field("num_codes", 65_537),
    "code bits": set_field("code_bits", 4),
    "row bytes": set_field("row_bytes", 3),
    "shared values": set_field("shared_values", True),
    "no features": drop_field("features"),
    "features that are null": set_field("features", None),
    "dpq table called dense": set_field("kind", "dense"),
    "no vocabulary": drop_field("vocabulary"),
    "vocabulary that is null": set_field("vocabulary", None),
    "vocabulary without a kind": set_field("vocabulary", {}),
    "table that is a list": lambda manifest: manifest["tables"].update(item=[1]),
    "table that is null": lambda manifest: manifest["tables"].update(item=None),
    "tables that are a list": lambda manifest: manifest.update(tables=[]),
    "no tables": lambda manifest: manifest.pop("tables"),
    "no version": lambda manifest: manifest.pop("version"),
    "no format": lambda manifest: manifest.pop("format"),
    "no format version": lambda manifest: manifest.pop("format_version"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_open_artifact_calls_a_manifest_damaged_that_contradicts_the_files(artifact, name):
    edit_manifest(artifact, CONTRADICTIONS[name])
    with pytest.raises(DamagedArtifactError):
        open_artifact(artifact)


@pytest.mark.parametrize("file", ["../outside.safetensors", "tables/../../outside.safetensors", "absolute"])
def test_open_artifact_opens_no_file_outside_its_folder(artifact, file):
    outside = shutil.copy(artifact / "tables/item.safetensors", artifact.parent / "outside.safetensors")
    edit_manifest(artifact, set_field("file", str(outside) if file == "absolute" else file))
    with pytest.raises(DamagedArtifactError, match="lies outside the artifact"):
        open_artifact(artifact)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"7", b'"manifest"', b"\xff\xfe\x00", b"[" * 200_000, b'{"a":' * 200_000],
    ids=["empty", "cut off", "list", "null", "number", "text", "no text", "deep list", "deep object"],
)
def test_open_artifact_calls_a_manifest_damaged_that_is_no_manifest(artifact, content):
    (artifact / "manifest.json").write_bytes(content)
    with pytest.raises(DamagedArtifactError, match=r"manifest\.json"):
        open_artifact(artifact)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda manifest: manifest.update(format="other"), "reads dpq-rec version 1"),
        (lambda manifest: manifest.update(format_version=2), "got dpq-rec version 2"),
        (set_field("kind", "lattice"), "got kind 'lattice'"),
        (set_field("vocabulary", {"kind": "uuid"}), "got 'uuid'"),
    ],
)
def test_open_artifact_says_what_this_version_cannot_read(artifact, edit, message):
    edit_manifest(artifact, edit)
    with pytest.raises(ArtifactError, match=message) as raised:
        open_artifact(artifact)
    assert not isinstance(raised.value, DamagedArtifactError)


def test_open_artifact_calls_a_table_damaged_that_was_cut_off(artifact):
    file = artifact / "tables/item.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DamagedArtifactError, match="the manifest says"):
        open_artifact(artifact)


def test_open_artifact_calls_a_table_damaged_that_is_gone(artifact):
    (artifact / "tables/item.safetensors").unlink()
    with pytest.raises(DamagedArtifactError, match="got no file"):
        open_artifact(artifact)


@pytest.mark.parametrize("path", [".", "nothing/here"])
def test_open_artifact_says_that_a_path_holds_no_artifact(tmp_path, path):
    with pytest.raises(ArtifactError, match=r"neither manifest\.json .* nor CURRENT") as raised:
        open_artifact(tmp_path / path)
    assert not isinstance(raised.value, DamagedArtifactError)


def test_open_artifact_reads_no_more_of_a_table_of_16_gb_than_of_a_small_one(tmp_path):
    num_rows, row_bytes = 1 << 30, 16
    layout = CodeLayout(num_subspaces=16, num_codes=256)
    path = write_artifact(tmp_path / "a", {"t": dpq_contents(1, layout)})
    file = path / "tables/t.safetensors"
    header_bytes = int.from_bytes(file.read_bytes()[:8], "little")
    header = json.loads(file.read_bytes()[8 : 8 + header_bytes])
    codes = header["packed_codes"]
    codes.update(shape=[num_rows, row_bytes], data_offsets=[codes["data_offsets"][0]] * 2)
    codes["data_offsets"][1] += num_rows * row_bytes
    with file.open("r+b") as content:
        content.write((header_bytes + 64).to_bytes(8, "little") + json.dumps(header).encode().ljust(header_bytes + 64))
        size = 8 + header_bytes + 64 + codes["data_offsets"][1]
        os.truncate(content.fileno(), size)  # sparse: takes no room on the disk
    edit_manifest(path, lambda manifest: manifest["tables"]["t"].update(num_embeddings=num_rows, bytes=size))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    artifact = open_artifact(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 2_000  # pages touched; the table has 4,194,304
    assert artifact.tables["t"].tensors["packed_codes"].shape == (num_rows, row_bytes)


def test_dense_table_is_stored_as_it_is(tmp_path):
    vectors_VE = np.random.default_rng(0).standard_normal((7, 3)).astype(np.float32)
    path = write_artifact(tmp_path / "a", {"t": dense_contents(vectors_VE)})
    np.testing.assert_array_equal(verify(path).tables["t"].tensors["vectors"], vectors_VE)


@pytest.mark.parametrize(
    ("vocabulary", "message"),
    [
        (Int64Vocabulary(np.array([9, 3]), np.array([0, 1], np.uint32)), "not strictly ascending"),
        (Int64Vocabulary(np.array([3, 9]), np.array([0, 4], np.uint32)), "a row outside the table's 4"),
        (StringVocabulary(PackedStrings.pack([b"b", b"a"]), np.zeros(2, np.uint32)), "not strictly ascending"),
        (StringVocabulary(PackedStrings.pack([b"\xff"]), np.zeros(1, np.uint32)), "not UTF-8"),
        (StringVocabulary.from_pairs(["a", "b"], [0, 4]), "a row outside the table's 4"),
        (IdentityVocabulary(5), "one of 5 rows, the table has 4"),
        (ModuloVocabulary(5), "one of 5 rows, the table has 4"),
    ],
)
def test_write_artifact_refuses_a_vocabulary_that_verify_would_call_damaged(tmp_path, vocabulary, message):
    vectors = np.zeros((4, 2), np.float32)
    contents = TableContents(num_embeddings=4, embedding_dim=2, vocabulary=vocabulary, chunks=[vectors])
    with pytest.raises(ConfigError, match=message):
        write_artifact(tmp_path / "artifact", {"t": contents})
    assert list(tmp_path.iterdir()) == []
