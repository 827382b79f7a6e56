import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpq_rec import (
    CodeLayout,
    ConfigError,
    DamagedArtifactError,
    EmbeddingStore,
    IdentityVocabulary,
    Int64Vocabulary,
    MissingDependencyError,
    ModuloVocabulary,
    StringVocabulary,
    TableContents,
    unpack_codes,
    write_artifact,
)
from dpq_rec.export import ExportConfig, export_table
from tests.dpq_rec.builders import dense_contents, dpq_contents, overwrite, small_artifact

LAYOUT = CodeLayout(num_subspaces=3, num_codes=5, num_levels=2)
IDS = [70, -5, 12, 1 << 50, 3, 8, 9]


def open_table(path, contents):
    return EmbeddingStore.open(write_artifact(path / "artifact", {"t": contents})).table("t")


@pytest.fixture
def table(tmp_path):
    return open_table(tmp_path, dpq_contents(7, LAYOUT, vocabulary=Int64Vocabulary.from_ids(IDS)))


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def read(out):
    return pa.concat_tables(pq.read_table(part) for part in sorted(out.iterdir()))


def test_export_table_writes_every_id_in_the_order_of_rows(table, out):
    export_table(table, out)
    assert read(out)["id"].to_pylist() == IDS


def test_export_table_writes_the_vectors_that_a_lookup_gives(table, tmp_path, out):
    export_table(table, out)
    vectors_NE = EmbeddingStore.open(tmp_path / "artifact").lookup("t", IDS).vectors
    assert np.array(read(out)["vector"].to_pylist(), np.float32).tobytes() == vectors_NE.tobytes()


def test_export_table_has_the_types_of_the_contract(table, out):
    export_table(table, out)
    assert read(out).schema.types == [pa.int64(), pa.list_(pa.field("element", pa.float32()))]
    assert read(out).schema.names == ["id", "vector"]


def test_export_table_writes_float16_vectors(table, tmp_path, out):
    export_table(table, out, ExportConfig(dtype="float16"))
    assert read(out).schema.field("vector").type.value_type == pa.float16()
    vectors_NE = EmbeddingStore.open(tmp_path / "artifact").lookup("t", IDS, dtype="float16").vectors
    assert np.array(read(out)["vector"].to_pylist(), np.float16).tobytes() == vectors_NE.tobytes()


def test_export_table_writes_codes(table, out):
    export_table(table, out, ExportConfig(codes=True))
    assert read(out).schema.field("codes").type.value_type == pa.uint16()
    assert read(out)["codes"].to_pylist() == unpack_codes(table.tensors["packed_codes"], LAYOUT).tolist()


def test_export_table_splits_the_rows_into_parts(table, out):
    exported = export_table(table, out, ExportConfig(rows_per_part=3))
    assert exported == (3, 7)
    parts = sorted(out.iterdir())
    assert [part.name for part in parts] == ["part-00000.parquet", "part-00001.parquet", "part-00002.parquet"]
    assert [pq.read_table(part)["id"].to_pylist() for part in parts] == [IDS[:3], IDS[3:6], IDS[6:]]


def test_export_table_decodes_in_batches_smaller_than_a_part(table, out, monkeypatch):
    monkeypatch.setattr("dpq_rec.export._BATCH_BYTES", 2 * 4 * 6)
    export_table(table, out, ExportConfig(rows_per_part=5))
    parts = [pq.ParquetFile(part).metadata for part in sorted(out.iterdir())]
    assert [[part.row_group(i).num_rows for i in range(part.num_row_groups)] for part in parts] == [[2, 2, 1], [2]]
    assert read(out)["id"].to_pylist() == IDS


def test_export_table_tells_its_progress_in_rows(tmp_path, out):
    vocabulary = Int64Vocabulary(
        np.array([4, 5, 6, 7]), np.array([9, 2, 9, 4], np.uint32)
    )  # rows 0, 1, 3 ... have none
    table = open_table(tmp_path, dpq_contents(11, LAYOUT, vocabulary=vocabulary))
    seen = []
    export_table(table, out, ExportConfig(rows_per_part=3), seen.append)
    assert sum(seen) == 11
    assert min(seen) >= 0


def test_export_table_gives_ids_that_share_a_row_a_line_each_and_rows_without_an_id_none(tmp_path, out):
    vocabulary = Int64Vocabulary(np.array([4, 5, 6]), np.array([2, 0, 2], np.uint32))
    vectors_VE = np.arange(6, dtype=np.float32).reshape(3, 2)
    export_table(open_table(tmp_path, dense_contents(vectors_VE, vocabulary)), out)
    lines = [{"id": 5, "vector": [0, 1]}, {"id": 4, "vector": [4, 5]}, {"id": 6, "vector": [4, 5]}]
    assert read(out).to_pylist() == lines


def test_export_table_writes_string_ids_and_those_that_share_a_row(tmp_path, out):
    vocabulary = StringVocabulary.from_pairs(["ü", "", "a\0", "7"], [2, 0, 2, 1])
    table = open_table(tmp_path, dense_contents(np.arange(6, dtype=np.float32).reshape(3, 2), vocabulary))
    assert export_table(table, out, ExportConfig(rows_per_part=2)) == (2, 4)
    assert read(out).schema.field("id").type == pa.string()
    lines = [("", [0, 1]), ("7", [2, 3]), ("a\0", [4, 5]), ("ü", [4, 5])]
    assert [(line["id"], line["vector"]) for line in read(out).to_pylist()] == lines


def test_export_table_writes_long_strings_in_smaller_batches(tmp_path, out, monkeypatch):
    monkeypatch.setattr("dpq_rec.export._BATCH_BYTES", 300)
    vocabulary = StringVocabulary.from_ids([letter * 88 for letter in "abcdefg"])  # 100 bytes each, with their 12
    export_table(open_table(tmp_path, dpq_contents(7, LAYOUT, vocabulary=vocabulary)), out)
    metadata = pq.ParquetFile(out / "part-00000.parquet").metadata
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [2, 2, 2, 1]


def test_export_table_refuses_string_ids_that_are_not_utf_8(tmp_path, out):
    open_table(tmp_path, dense_contents(np.zeros((1, 2), np.float32), StringVocabulary.from_ids(["a"])))
    overwrite(tmp_path / "artifact", "t", "id_bytes", 0, b"\xff")
    with pytest.raises(DamagedArtifactError, match="not UTF-8"):
        export_table(EmbeddingStore.open(tmp_path / "artifact").table("t"), out)
    assert not out.exists()


@pytest.mark.parametrize("kind", [IdentityVocabulary, ModuloVocabulary])
def test_export_table_names_rows_by_their_number_where_ids_are_rows(tmp_path, out, kind):
    export_table(open_table(tmp_path, dpq_contents(4, LAYOUT, vocabulary=kind(4))), out)
    assert read(out)["id"].to_pylist() == [0, 1, 2, 3]


def test_export_table_of_an_empty_table_is_one_part_without_lines(tmp_path, out):
    contents = dpq_contents(0, LAYOUT, vocabulary=Int64Vocabulary.from_ids([]))
    assert export_table(open_table(tmp_path, contents), out) == (1, 0)
    assert read(out).schema.names == ["id", "vector"]


def test_export_table_refuses_codes_of_a_dense_table(tmp_path, out):
    table = open_table(tmp_path, dense_contents(np.zeros((2, 2), np.float32)))
    with pytest.raises(ConfigError, match="table 't' is dense and has no codes: export its vectors instead"):
        export_table(table, out, ExportConfig(codes=True))
    assert not out.exists()


@pytest.mark.parametrize(
    "settings", [{"dtype": "float64"}, {"dtype": "float16", "codes": True}, {"rows_per_part": 0}], ids=str
)
def test_export_config_refuses(settings):
    with pytest.raises(ConfigError):
        ExportConfig(**settings)


def test_export_table_refuses_a_folder_that_exists(table, out):
    out.mkdir()
    with pytest.raises(FileExistsError, match="name another one"):
        export_table(table, out)


@pytest.mark.parametrize("codes", [False, True])
def test_export_table_leaves_nothing_behind_when_a_row_is_damaged(tmp_path, codes):
    path = small_artifact(tmp_path / "artifact")
    overwrite(path, "item", "packed_codes", 6, b"\xff\x7f")
    table = EmbeddingStore.open(path).table("item")
    with pytest.raises(DamagedArtifactError, match="row 3"):
        export_table(table, tmp_path / "out", ExportConfig(codes=codes, rows_per_part=2))
    assert [entry.name for entry in tmp_path.iterdir()] == ["artifact"]


def test_export_table_leaves_nothing_behind_when_it_is_interrupted(table, tmp_path):
    def interrupt(num_rows):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_table(table, tmp_path / "out", progress=interrupt)
    assert [entry.name for entry in tmp_path.iterdir()] == ["artifact"]


def test_export_table_says_how_to_install_pyarrow(table, out, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'dpq-rec\[export\]'"):
        export_table(table, out)
    assert not out.exists()


PEAK_MEMORY = """
import json, re, sys
from pathlib import Path
from dpq_rec import EmbeddingStore
from dpq_rec.export import ExportConfig, export_table

def anonymous_kb():  # mapped files are the page cache's, not ours
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

peak = 0
def look(num_rows):
    global peak
    peak = max(peak, anonymous_kb())

config = ExportConfig(rows_per_part=10_000)
_, num_ids = export_table(EmbeddingStore.open(sys.argv[1]).table("t"), sys.argv[2], config, look)
print(json.dumps([num_ids, peak]))
"""


def shuffled_integers(num_rows):
    return Int64Vocabulary.from_ids(np.random.default_rng(0).permutation(num_rows) * 7)


def shuffled_strings(num_rows):
    return StringVocabulary.from_ids([f"{i:0100}" for i in np.random.default_rng(0).permutation(num_rows)])


def peak_kb(tmp_path, num_rows, make_vocabulary):
    layout, generator = CodeLayout(num_subspaces=8, num_codes=256), np.random.default_rng(0)
    contents = TableContents(
        num_embeddings=num_rows,
        embedding_dim=64,
        vocabulary=make_vocabulary(num_rows),
        layout=layout,
        values=generator.standard_normal((8, 256, 8)).astype(np.float32),
        chunks=[generator.integers(0, 256, (num_rows, 8), np.uint8)],
    )
    path = write_artifact(tmp_path / f"artifact-{num_rows}", {"t": contents})
    command = [sys.executable, "-c", PEAK_MEMORY, path, tmp_path / f"out-{num_rows}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    num_ids, peak = json.loads(done.stdout)
    assert num_ids == num_rows
    return peak


@pytest.mark.parametrize("make_vocabulary", [shuffled_integers, shuffled_strings])
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
def test_export_table_takes_no_more_memory_for_a_table_eight_times_as_large(tmp_path, make_vocabulary):
    # 13 and 102 MB of vectors, 5 and 40 MB of strings
    small, large = (peak_kb(tmp_path, num_rows, make_vocabulary) for num_rows in (50_000, 400_000))
    assert large - small < 20_000
