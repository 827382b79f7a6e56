"""Whether files are still what was opened."""

import errno
import logging
import os

import numpy as np
import pytest

from dpq_rec import EmbeddingStore, IdentityVocabulary, TableContents, write_artifact
from service import served_files
from service.served_files import ServedFiles, watch_descriptors


@pytest.fixture
def opened(tmp_path):
    """A store of the tables `a` and `b`, its files, and the path of a's."""
    contents = {
        name: TableContents(
            num_embeddings=4, embedding_dim=2, vocabulary=IdentityVocabulary(4), chunks=[np.ones((4, 2), np.float32)]
        )
        for name in ("a", "b")
    }
    store = EmbeddingStore.open(write_artifact(tmp_path / "artifact", contents))
    return ServedFiles(store), store.artifact.path / "tables" / "a.safetensors"


def later(path):
    """Give a file another time of change, however coarse the file system's clock is."""
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 10**9))


@pytest.mark.parametrize("num_bytes", [0, 1, -1])
def test_a_truncated_file_is_damage_and_says_so(opened, num_bytes):
    files, path = opened
    whole = path.stat().st_size
    os.truncate(path, num_bytes % whole)
    assert list(files.damage()) == ["a"]
    assert f"table 'a': {path} was truncated from {whole} to {num_bytes % whole} bytes" in files.damage()["a"]


@pytest.mark.parametrize("change", ["first byte", "last byte", "longer"])
def test_a_file_overwritten_in_place_is_damage(opened, change):
    files, path = opened
    content = bytearray(path.read_bytes())
    if change == "longer":
        content += b"\0"
    else:
        content[0 if change == "first byte" else -1] ^= 1
    with path.open("r+b") as file:
        file.write(content)
    later(path)
    assert {name: "overwritten in place" in text for name, text in files.damage().items()} == {"a": True}


def test_a_file_overwritten_in_place_is_damage_though_its_time_was_set_back(opened):
    files, path = opened
    before = path.stat()
    with path.open("r+b") as file:
        file.write(b"\xff")
    while path.stat().st_ctime_ns == before.st_ctime_ns:  # the file system's clock is coarse
        os.utime(path, ns=(0, before.st_mtime_ns))
    os.utime(path, ns=(0, before.st_mtime_ns))
    assert list(files.damage()) == ["a"]


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENOENT, errno.EACCES])
def test_a_file_that_cannot_be_read_now_is_looked_at_again(opened, monkeypatch, number):
    def refuse(path):
        raise OSError(number, os.strerror(number), str(path))

    files, path = opened
    with path.open("r+b") as file:
        file.write(b"\xff")
    later(path)
    with monkeypatch.context() as patched:
        patched.setattr(served_files, "sha256_of", refuse)
        assert files.damage() == {}
    assert list(files.damage()) == ["a"]


def test_a_file_that_was_touched_or_written_with_the_same_bytes_is_none(opened):
    files, path = opened
    content = path.read_bytes()
    path.write_bytes(content)
    later(path)
    assert files.damage() == {}
    assert files.damage() == {}


@pytest.mark.parametrize("put_another", [True, False])
def test_a_file_that_was_replaced_or_removed_is_none_for_what_is_mapped(opened, tmp_path, put_another):
    files, path = opened
    (tmp_path / "other").write_bytes(b"shorter")
    if put_another:
        (tmp_path / "other").rename(path)
    else:
        path.unlink()
    assert files.damage() == {}


def test_damage_stays_though_the_file_is_whole_again(opened):
    files, path = opened
    content = path.read_bytes()
    os.truncate(path, 0)
    before = files.damage()
    path.write_bytes(content)
    later(path)
    assert files.damage() == before


def test_used_up_descriptors_are_logged_once_and_again_when_there_are_some(monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.EMFILE, "Too many open files")

    with caplog.at_level(logging.WARNING):
        with monkeypatch.context() as patched:
            patched.setattr(os, "open", refuse)
            assert watch_descriptors(watch_descriptors(False)) is True
        assert watch_descriptors(True) is False
        assert watch_descriptors(False) is False
    assert [record.levelname for record in caplog.records] == ["ERROR", "WARNING"]
    assert "raise `ulimit -n`" in caplog.text
