"""What is written appears whole or not at all, and errors say where."""

import re
from pathlib import Path

import numpy as np
import pytest

from dpq_rec import EmbeddingStore, publish, write_artifact
from dpq_rec.export import export_table
from dpq_rec.files import naming, renamed_into, replace_file
from tests.dpq_rec.builders import dense_contents, small_artifact
from tests.limits import files_up_to

NAMES = ["run:1", "s3:", "file:", "gs:x", "a%20b", "with space", "größe", "~", "~root", "#?&"]


@pytest.fixture
def artifact(tmp_path):
    vectors_VE = np.random.default_rng(0).random((2000, 16), np.float32)
    return write_artifact(tmp_path / "artifact", {"t": dense_contents(vectors_VE)})


def fail_in(target, write):
    with renamed_into(target) as folder:
        write(folder)
        raise KeyboardInterrupt


def test_renamed_into_removes_the_folders_that_it_made_and_no_others_when_it_fails(tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(KeyboardInterrupt):
        fail_in(tmp_path / "there" / "a" / "b" / "c", lambda folder: (folder / "x").touch())
    assert [entry.name for entry in tmp_path.rglob("*")] == ["there"]


def test_renamed_into_leaves_a_folder_that_another_has_put_something_in(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fail_in(tmp_path / "a" / "b", lambda folder: (tmp_path / "a" / "other").touch())
    assert [entry.name for entry in tmp_path.rglob("*")] == ["a", "other"]


@pytest.mark.parametrize(
    "write",
    [
        lambda artifact, path: export_table(EmbeddingStore.open(artifact).table("t"), path),
        lambda artifact, path: publish(artifact, path),
        lambda artifact, path: write_artifact(path, {"t": dense_contents(np.zeros((2000, 16), np.float32))}),
    ],
    ids=["export", "publish", "write_artifact"],
)
def test_a_full_disk_is_told_with_the_path_and_leaves_nothing_behind(artifact, tmp_path, write):
    before = sorted(tmp_path.rglob("*"))
    with files_up_to(20_000), pytest.raises(OSError, match=r"File too large: .*made/run:1/out"):
        write(artifact, tmp_path / "made" / "run:1" / "out")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_full_disk_leaves_the_text_that_was_there(tmp_path):
    replace_file(tmp_path / "a.json", "before")
    with files_up_to(1000), pytest.raises(OSError, match=r"File too large: '.*/a\.json'"):
        replace_file(tmp_path / "a.json", "after" * 1000)
    assert [(entry.name, entry.read_text()) for entry in tmp_path.iterdir()] == [("a.json", "before")]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device: 'run:1'"),
        (FileNotFoundError(2, "No such file", "other"), "[Errno 2] No such file: 'other'"),
        (TimeoutError("too slow"), "run:1: too slow"),
    ],
    ids=["of the system", "with a path", "of a library"],
)
def test_naming_adds_the_path_where_an_error_has_none(error, message):
    with pytest.raises(type(error), match=re.escape(message)), naming(Path("run:1")):
        raise error


@pytest.mark.parametrize("name", NAMES)
def test_every_path_is_a_path_whatever_it_looks_like(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    table = EmbeddingStore.open(small_artifact(tmp_path / name / "artifact")).table("item")
    assert export_table(table, f"{name}/new/{name}")[0] == 1
    assert (tmp_path / name / "new" / name / "part-00000.parquet").is_file()
    assert publish(f"{name}/artifact", f"{name}/store").is_dir()
    assert EmbeddingStore.open(f"{name}/store").lookup("item", [0]).vectors.shape[0] == 1
