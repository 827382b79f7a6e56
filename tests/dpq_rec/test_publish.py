import shutil

import numpy as np
import pytest

from dpq_rec import (
    CodeLayout,
    ConfigError,
    DamagedArtifactError,
    EmbeddingStore,
    open_artifact,
    publish,
    write_artifact,
)
from tests.dpq_rec.builders import dpq_contents, edit_manifest, overwrite, small_artifact

LAYOUT = CodeLayout(num_subspaces=2, num_codes=5)


@pytest.fixture
def artifact(tmp_path):
    return small_artifact(tmp_path / "artifact")


@pytest.fixture
def store(tmp_path):
    return tmp_path / "store"


def publish_version(tmp_path, store, version):
    artifact = write_artifact(tmp_path / f"artifact-{version}", {"t": dpq_contents(2, LAYOUT)}, version=version)
    return publish(artifact, store)


def test_publish_makes_the_store_and_names_the_current_version(tmp_path, store):
    assert publish_version(tmp_path, store, "v1") == store / "v1"
    assert (store / "CURRENT").read_text() == "v1\n"


def test_publish_switches_current_and_keeps_the_older_version(tmp_path, store):
    for version in ("v1", "v2"):
        publish_version(tmp_path, store, version)
    assert (store / "CURRENT").read_text() == "v2\n"
    assert sorted(path.name for path in store.iterdir()) == ["CURRENT", "v1", "v2"]


def test_publish_copies_every_byte(tmp_path, store):
    published = publish_version(tmp_path, store, "v1")
    for file in ("manifest.json", "tables/t.safetensors"):
        assert (published / file).read_bytes() == (tmp_path / "artifact-v1" / file).read_bytes()


def test_publish_takes_the_current_version_of_another_store(tmp_path, store):
    publish_version(tmp_path, store, "v1")
    publish(store, tmp_path / "other")
    assert open_artifact(tmp_path / "other").version == "v1"


def test_open_artifact_of_a_store_opens_the_current_version(tmp_path, store):
    for version in ("v1", "v2"):
        publish_version(tmp_path, store, version)
    opened = open_artifact(store)
    assert (opened.version, opened.path) == ("v2", store / "v2")


def test_an_open_artifact_keeps_its_version_when_another_is_published(tmp_path, store):
    publish_version(tmp_path, store, "v1")
    opened = EmbeddingStore.open(store)
    before = opened.lookup("t", [0, 1]).vectors
    publish_version(tmp_path, store, "v2")
    shutil.rmtree(store / "v1")
    np.testing.assert_array_equal(opened.lookup("t", [0, 1]).vectors, before)


def test_publish_refuses_a_version_that_is_published_already(tmp_path, store):
    publish_version(tmp_path, store, "v1")
    with pytest.raises(FileExistsError, match="published once"):
        publish(tmp_path / "artifact-v1", store)


def test_publish_of_an_older_version_makes_it_current_again(tmp_path, store):
    for version in ("v1", "v2"):
        publish_version(tmp_path, store, version)
    publish(tmp_path / "artifact-v1", store)
    assert open_artifact(store).version == "v1"


def test_publish_ends_one_that_was_cut_off_before_the_switch(tmp_path, store):
    publish_version(tmp_path, store, "v1")
    (store / "CURRENT").unlink()
    publish(tmp_path / "artifact-v1", store)
    assert open_artifact(store).version == "v1"


def test_publish_refuses_another_artifact_of_a_version(tmp_path, store):
    for version in ("v1", "v2"):
        publish_version(tmp_path, store, version)
    manifest = tmp_path / "artifact-v1" / "manifest.json"
    manifest.write_text(manifest.read_text() + " ")
    with pytest.raises(FileExistsError, match="holds another artifact of that version"):
        publish(tmp_path / "artifact-v1", store)


def test_publish_refuses_a_damaged_artifact_and_leaves_the_store_as_it_was(tmp_path, store):
    publish_version(tmp_path, store, "v1")
    damaged = small_artifact(tmp_path / "damaged")
    edit_manifest(damaged, lambda manifest: manifest.update(version="v2"))
    overwrite(damaged, "item", "packed_codes", 0, b"\xff")
    with pytest.raises(DamagedArtifactError):
        publish(damaged, store)
    assert sorted(path.name for path in store.iterdir()) == ["CURRENT", "v1"]


def test_publish_refuses_a_version_that_lies_outside_the_store(artifact, store):
    edit_manifest(artifact, lambda manifest: manifest.update(version="../elsewhere"))
    with pytest.raises(DamagedArtifactError, match=r"version: got '\.\./elsewhere'"):
        publish(artifact, store)


def test_publish_refuses_a_store_whose_current_is_a_folder_and_leaves_it_as_it_was(artifact, store):
    (store / "CURRENT").mkdir(parents=True)
    with pytest.raises(ConfigError, match="CURRENT: got a folder, want a file that names a version"):
        publish(artifact, store)
    assert [path.name for path in store.iterdir()] == ["CURRENT"]


@pytest.mark.parametrize(
    "current", [b"../artifact-v1\n", b"/etc\n", b"v9\n", b"", b"\n", b"v1\nv2\n", b".\n", b"v1/../v1\n", b"\xff\xfe\n"]
)
def test_open_artifact_calls_a_store_damaged_whose_current_names_no_version(tmp_path, store, current):
    publish_version(tmp_path, store, "v1")
    (store / "CURRENT").write_bytes(current)
    with pytest.raises(DamagedArtifactError, match="not a version in this store"):
        open_artifact(store)
