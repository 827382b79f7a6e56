"""Data larger than memory. Each rank may allocate a quarter at most of what the folder takes when it is loaded.

The window of train_batches is 65,536 rows here, and not its 4 million, which these data would fit into.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

NUM_ROWS, NUM_FILES, NUM_USERS, NUM_ITEMS = 1_600_000, 4, 5_000, 2_000
ALLOWED_BYTES = 100 << 20
TIMES_ALLOWED = 4
BATCH_SIZE = 1_000
RANK = """
import json, os, resource, sys
import numpy as np
import pyarrow.parquet as pq
from training.data.batches import train_batches
from training.data.interactions import Interactions
from training.data.vocabularies import build_vocabulary

folder, reader, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
used = next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (used + int(sys.argv[4]),) * 2)
if reader == "arrow":
    pq.read_table(folder)
interactions = Interactions.open(folder, features=["price", "tags"])
vocabularies = {name: build_vocabulary(interactions, name)[0] for name in interactions.id_kinds}
sums = {}
options = {"rank": rank, "world_size": 2, "window_rows": 1 << 16 if reader == "stream" else 1 << 40}
for batch in train_batches(interactions, vocabularies, batch_size=1000, **options):
    for name, bag in batch.bags.items():
        sums[name] = sums.get(name, 0) + np.bincount(bag.rows_T, minlength=5000)
    sums["price"] = sums.get("price", 0) + batch.dense_BF.sum(dtype=np.float64)
    sums["num_batches"] = sums.get("num_batches", 0) + 1
print(json.dumps({name: np.asarray(each).tolist() for name, each in sums.items()}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Random users, string items and lists of tags, so that nothing compresses in memory."""
    folder = tmp_path_factory.mktemp("large")
    rng = np.random.default_rng(0)
    items, tags = (pa.array([f"{name}-number-{i:050}" for i in range(NUM_ITEMS)]) for name in ("item", "tag"))
    for number in range(NUM_FILES):
        size = NUM_ROWS // NUM_FILES
        offsets = np.arange(0, 3 * size + 1, 3, dtype=np.int32)
        columns = {
            "user_id": rng.integers(0, NUM_USERS, size),
            "item_id": items.take(pa.array(rng.integers(0, NUM_ITEMS, size))),
            "price": rng.integers(0, 100, size).astype(np.float64),
            "tags": pa.ListArray.from_arrays(offsets, tags.take(pa.array(rng.integers(0, 50, 3 * size)))),
            "split": pa.array(np.zeros(size, np.int8)),
        }
        pq.write_table(pa.table(columns), folder / f"part-{number}.parquet", row_group_size=1 << 14)
    return folder


def start(folder, reader, rank):
    # malloc alone: other allocators reserve ahead, and so would many threads' arenas.
    environment = {"ARROW_DEFAULT_MEMORY_POOL": "system", "OMP_NUM_THREADS": "1", "ARROW_IO_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", RANK, folder, reader, str(rank), str(ALLOWED_BYTES)],
        env={**os.environ, **environment},
        cwd=Path(__file__).parents[3],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_ranks_read_their_shares_of_a_folder_that_does_not_fit(folder):
    ranks = [start(folder, "stream", rank) for rank in range(2)]
    outputs = [rank.communicate() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs[0][1] + outputs[1][1]
    sums = [{name: np.array(each) for name, each in json.loads(output).items()} for output, _ in outputs]
    assert [int(each["num_batches"]) for each in sums] == [NUM_ROWS // (2 * BATCH_SIZE)] * 2
    parts = [pq.read_table(file) for file in sorted(folder.glob("*.parquet"))]
    assert sum(part.nbytes for part in parts) > TIMES_ALLOWED * ALLOWED_BYTES
    data = pa.concat_tables([part.select(["user_id", "item_id", "price"]) for part in parts])
    for name in ("user_id", "item_id"):
        counts = np.sort(np.unique(data[name], return_counts=True)[1])[::-1]
        assert np.array_equal((sums[0][name] + sums[1][name])[: len(counts)], counts)
    assert sums[0]["price"] + sums[1]["price"] == data["price"].to_numpy().sum()
    assert (sums[0]["tags"] + sums[1]["tags"]).sum() == 3 * NUM_ROWS


@pytest.mark.parametrize("reader", ["arrow", "one window"])
def test_a_reader_that_loads_all_does_not_fit(folder, reader):
    rank = start(folder, reader, 0)
    _, errors = rank.communicate()
    assert rank.returncode == 1
    assert "MemoryError" in errors or "malloc" in errors
