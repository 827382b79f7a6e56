"""What is sent to other processes is mapped there again: by pickle, by copies, by spawned processes, by DataLoaders."""

import copy
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import cloudpickle
import numpy as np
import pytest

from dpq_rec import (
    ArtifactError,
    CodeLayout,
    EmbeddingStore,
    Int64Vocabulary,
    StringVocabulary,
    TableContents,
    open_artifact,
    publish,
    write_artifact,
)
from dpq_rec.client import CodesClient
from dpq_rec.kernels import Coded, decode
from dpq_rec.kernels.lookup import JsonTexts
from dpq_rec.wire import Values

NUM_ROWS = 3_000
IDS = np.arange(NUM_ROWS) * 7


def write(path, version="one", seed=0):
    generator = np.random.default_rng(seed)

    def contents(vocabulary):
        return TableContents(
            num_embeddings=NUM_ROWS,
            embedding_dim=8,
            vocabulary=vocabulary,
            chunks=[generator.integers(0, 256, (NUM_ROWS, 4), np.uint8)],
            layout=CodeLayout(num_subspaces=4, num_codes=256),
            values=generator.standard_normal((4, 256, 2)).astype(np.float32),
        )

    tables = {
        "number": contents(Int64Vocabulary.from_ids(IDS)),
        "text": contents(StringVocabulary.from_ids([f"id-{number}" for number in IDS])),
    }
    return write_artifact(path, tables, version=version)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write(tmp_path_factory.mktemp("reopen") / "artifact")


def used(store):
    """After all that makes something beside what was opened."""
    vectors_NE = store.lookup("number", IDS[:3]).vectors
    store.search("number", vectors_NE, 2, similarity="cosine")
    store.lookup_bytes("number", IDS[:3].tobytes(), form="codes")
    store.lookup("text", ["id-7"])
    return store


def again_by_pickle(held):
    return pickle.loads(pickle.dumps(held))


WAYS = {
    "pickle": again_by_pickle,
    "oldest pickle": lambda held: pickle.loads(pickle.dumps(held, 0)),
    "cloudpickle": lambda held: pickle.loads(cloudpickle.dumps(held)),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("prepare", [lambda store: store, used], ids=["fresh", "used"])
def test_a_store_is_the_same_after(path, way, prepare):
    store = prepare(EmbeddingStore.open(path))
    again = WAYS[way](store)
    vectors_NE, missing = again.lookup("number", [*IDS[-3:].tolist(), 5])
    assert vectors_NE.tobytes() == store.lookup("number", [*IDS[-3:].tolist(), 5]).vectors.tobytes()
    assert (again.version, missing.tolist()) == ("one", [3])
    assert again.search("text", vectors_NE[:2], 3).ids == store.search("text", vectors_NE[:2], 3).ids


HELD = {
    "store": lambda store: store,
    "artifact": lambda store: store.artifact,
    "table": lambda store: store.tables["number"],
    "table of strings": lambda store: store.tables["text"],
    "integers": lambda store: store.tables["number"].vocabulary,
    "strings": lambda store: store.tables["text"].vocabulary,
    "all in one": lambda store: {"store": store, "tables": dict(store.tables), "artifact": store.artifact},
}


@pytest.mark.parametrize("name", HELD)
@pytest.mark.parametrize("way", WAYS)
def test_what_lies_in_files_is_pickled_as_where_it_lies(path, name, way):
    held = HELD[name](used(EmbeddingStore.open(path)))
    assert type(WAYS[way](held)) is type(held)
    assert len(pickle.dumps(held)) < 2_000


def test_a_table_and_a_vocabulary_find_the_same_after(path):
    store = used(EmbeddingStore.open(path))
    table, vocabulary = again_by_pickle(store.tables["text"]), again_by_pickle(store.tables["text"].vocabulary)
    assert vocabulary.rows(["id-7", "x"]).tolist() == table.vocabulary.rows(["id-7", "x"]).tolist() == [1, -1]
    query_QE = store.lookup("number", IDS[:1]).vectors
    again = again_by_pickle(store.tables["number"])
    assert again.search(query_QE, 3).ids.tolist() == store.search("number", query_QE, 3).ids.tolist()


def test_what_was_made_in_memory_is_pickled_as_it_is():
    for vocabulary, ids in ((Int64Vocabulary.from_ids([5, 3]), [3, 4]), (StringVocabulary.from_ids(["b", "a"]), ["a"])):
        vocabulary.rows(ids)
        assert again_by_pickle(vocabulary).rows(ids).tolist() == vocabulary.rows(ids).tolist()
    layout = CodeLayout(num_subspaces=2, num_codes=5)
    stored = Coded.of(np.array([[0], [9]], np.uint8), np.ones((2, 5, 3), np.float32), layout)
    texts = JsonTexts.of(stored, np.float32, lambda numbers: ",".join(map(str, numbers)).encode())
    vectors_NE, native = decode(stored, np.arange(2)), texts.native
    assert decode(again_by_pickle(stored), np.arange(2)).tobytes() == vectors_NE.tobytes()
    assert again_by_pickle(texts).groups == texts.groups
    assert native is texts.native


def test_a_subclass_keeps_what_it_has(path):
    class Store(EmbeddingStore):
        pass

    store = Store.open(path)
    store.note = "mine"
    assert (copy.deepcopy(store).note, type(copy.deepcopy(store))) == ("mine", Store)


def test_a_pickled_store_opens_its_version_after_the_path_moved_on(tmp_path):
    root = tmp_path / "store"
    publish(write(tmp_path / "a", "one"), root)
    first = EmbeddingStore.open(root)
    pickled, wanted = pickle.dumps(first), first.lookup("number", IDS[:9]).vectors.tobytes()
    publish(write(tmp_path / "b", "two", seed=1), root)
    again = pickle.loads(pickled)
    assert (again.version, again.lookup("number", IDS[:9]).vectors.tobytes()) == ("one", wanted)
    assert (EmbeddingStore.open(root).version, copy.deepcopy(again).version) == ("two", "one")
    shutil.rmtree(root / "one")
    with pytest.raises(ArtifactError, match=r"version 'one', which was pickled, cannot be opened again: .*one: holds"):
        pickle.loads(pickled)


def test_another_version_at_the_same_path_is_refused(tmp_path):
    store = EmbeddingStore.open(write(tmp_path / "artifact"))
    pickled = [pickle.dumps(HELD[name](store)) for name in HELD]
    shutil.rmtree(tmp_path / "artifact")
    write(tmp_path / "artifact", "two")
    for each in pickled:
        with pytest.raises(ArtifactError, match="got version 'two', want 'one', which was pickled"):
            pickle.loads(each)


@pytest.mark.parametrize("link", [False, True])
def test_a_relative_path_and_a_link_are_followed_when_it_is_opened(tmp_path, path, monkeypatch, link):
    monkeypatch.chdir(path.parent)
    named = "artifact"
    if link:
        (tmp_path / "latest").symlink_to(path)
        named = tmp_path / "latest"
    pickled = pickle.dumps(EmbeddingStore.open(named))
    monkeypatch.chdir("/")
    if link:
        (tmp_path / "latest").unlink()
    assert pickle.loads(pickled).lookup("number", IDS[:1]).missing.tolist() == []


def test_a_client_and_its_values_are_pickled_without_what_is_of_a_process(path):
    client = CodesClient("http://localhost:1/prefix", api_key="key")
    values = Values.from_bytes(open_artifact(path).tables["number"].values("one").to_bytes())
    rows = EmbeddingStore.open(path).codes("number", IDS[:2])
    client._values["number"], wanted = values, values.decode(rows).tobytes()
    again = again_by_pickle(client)
    assert (again._url, again._key, again._values) == (client._url, client._key, {})
    assert len(pickle.dumps(client)) < 2_000
    assert again_by_pickle(values).decode(rows).tobytes() == wanted


# Each process gets the store, which was used before, and looks up rows of its own.
PROCESSES = """
import multiprocessing, sys
import numpy as np
from dpq_rec import EmbeddingStore

class Rows:
    def __init__(self, store):
        self.store = store

    def __len__(self):
        return 8

    def __getitem__(self, at):
        return self.store.lookup("number", [7 * at]).vectors[0]

def look_up(rows_and_at):
    rows, at = rows_and_at
    return rows[at].tolist()

if __name__ == "__main__":
    path, how, method = sys.argv[1:]
    rows = Rows(EmbeddingStore.open(path))
    wanted = [rows[at].tolist() for at in range(8)]
    if how == "pool":
        with multiprocessing.get_context(method).Pool(2) as pool:
            found = pool.map(look_up, [(rows, at) for at in range(8)])
    else:
        import torch
        loader = torch.utils.data.DataLoader(rows, batch_size=4, num_workers=1, multiprocessing_context=method)
        found = [vector.tolist() for batch in loader for vector in batch]
    assert found == wanted
"""


@pytest.mark.parametrize(("how", "method"), [("pool", "spawn"), ("pool", "forkserver"), ("loader", "spawn")])
def test_processes_that_get_a_store_find_the_same(tmp_path, path, how, method):
    script = tmp_path / "processes.py"
    script.write_text(PROCESSES)
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    done = subprocess.run(
        [sys.executable, script, path, how, method], capture_output=True, text=True, timeout=120, env=environment
    )
    assert (done.returncode, done.stderr) == (0, "")
