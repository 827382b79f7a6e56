"""Files that another process writes to after they were opened: everything answers, or says that it is damaged."""

import subprocess
import sys

import pytest

# Random bytes come over codes, ids, their indices, offsets, rows and vectors of tables that are open.
SCRIBBLE = """
import mmap, sys
from pathlib import Path
import numpy as np
from dpq_rec import *

path, generator, num_rows = Path(sys.argv[1]), np.random.default_rng(int(sys.argv[2])), 300
layout = CodeLayout(num_subspaces=3, num_codes=5)

def contents(vocabulary, kind):
    codes = {"layout": layout, "values": np.ones((3, 5, 2), np.float32), "chunks": [np.zeros((num_rows, 2), np.uint8)]}
    rest = codes if kind == "codes" else {"chunks": [np.ones((num_rows, 6), np.float32)]}
    return TableContents(num_embeddings=num_rows, embedding_dim=6, vocabulary=vocabulary, **rest)

ids = np.arange(num_rows) * 5
texts = [f"id-{number}" for number in ids]
vocabularies = {"int64": (Int64Vocabulary.from_ids(ids), ids), "string": (StringVocabulary.from_ids(texts), texts)}
names = {f"{kind}-{of}": (of, kind) for kind in ("codes", "dense") for of in vocabularies}
write_artifact(path, {name: contents(vocabularies[of][0], kind) for name, (of, kind) in names.items()})

def uses(store, name, wanted_ids, query_QE):
    yield lambda: store.lookup(name, wanted_ids)
    yield lambda: store.lookup_bags(name, wanted_ids, [num_rows], dtype="float16")
    yield lambda: store.rows(name, wanted_ids)
    yield lambda: store.codes(name, wanted_ids)
    yield lambda: store.lookup_bytes(name, np.arange(num_rows).tobytes())
    yield lambda: store.search(name, query_QE, 5)
    yield lambda: store.search(name, query_QE, 5, similarity="cosine")
    yield lambda: store.tables[name].vocabulary.ids_of_rows(0, num_rows)[0][:]
    yield lambda: store.tables[name].vocabulary.check(num_rows)

damaged = answered = 0
for _ in range(15):
    store = EmbeddingStore.open(path)
    for name, (of, _) in names.items():
        file = path / "tables" / f"{name}.safetensors"
        before = file.read_bytes()
        first = 8 + int.from_bytes(before[:8], "little")
        with file.open("r+b") as opened, mmap.mmap(opened.fileno(), len(before)) as mapped:
            for at in generator.integers(first, len(before) - 8, generator.integers(1, 40)).tolist():
                mapped[at : at + 8] = generator.choice([b"\\xff" * 8, generator.bytes(8)]).ljust(8, b"\\0")
        for use in uses(store, name, vocabularies[of][1], np.ones((1, 6))):
            try:
                use()
                answered += 1
            except DamagedArtifactError:
                damaged += 1
            except (ConfigError, IdTypeError):  # codes of a dense table, bytes as ids of strings, scores beyond fp32
                pass
        file.write_bytes(before)
print(damaged, answered)
"""


@pytest.mark.parametrize("seed", [0, 1])
def test_a_store_whose_files_change_answers_or_says_that_they_are_damaged(tmp_path, seed):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIBBLE, tmp_path / "artifact", str(seed)],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    damaged, answered = map(int, done.stdout.split())
    assert min(damaged, answered) > 20
