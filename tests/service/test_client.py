"""The client that takes codes, with real processes and threads, against a real server."""

import subprocess
import sys

import pytest

# Prints what it found wrong. A client that was used is inherited by processes and by threads, in every way that people
# make them; each looks up ids of its own, again and again, and compares.
SEVERAL = """
import concurrent.futures, multiprocessing, os, pickle, sys
import numpy as np
from dpq_rec import EmbeddingStore
from dpq_rec.client import CodesClient

url, artifact, how = sys.argv[1:]
client, store = CodesClient(url), EmbeddingStore.open(artifact)
ids = np.concatenate([store.tables["item_id"].vocabulary.ids_U[:200], [10**9]])
wanted = store.lookup("item_id", ids).vectors

def num_wrong(seed, client=client):
    wrong = 0
    for at in np.random.default_rng(seed).integers(0, len(ids), (60, 3)):
        wrong += client.lookup("item_id", ids[at]).vectors.tobytes() != wanted[at].tobytes()
    return wrong

class Rows:
    def __len__(self):
        return 4

    def __getitem__(self, seed):
        return num_wrong(seed)

def prefork():
    children = []
    for seed in range(4):
        if not (pid := os.fork()):
            os._exit(num_wrong(seed) != 0)
        children.append(pid)
    own = num_wrong(9)
    return own + sum(os.waitpid(pid, 0)[1] != 0 for pid in children)

assert num_wrong(0) == 0  # it has a connection
if how == "prefork":
    wrong = prefork()
elif how == "pool":
    with multiprocessing.get_context("fork").Pool(3) as pool:
        wrong = sum(pool.map(num_wrong, range(6)))
elif how == "loader":
    import torch
    wrong = sum(int(batch.sum()) for batch in torch.utils.data.DataLoader(Rows(), num_workers=2))
elif how == "threads":
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        wrong = sum(threads.map(num_wrong, range(16)))
elif how == "threads of a child":
    pid = os.fork()
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        wrong = sum(threads.map(num_wrong, range(8)))
    if not pid:
        os._exit(wrong != 0)
    wrong += os.waitpid(pid, 0)[1] != 0
elif how == "pickle":
    again = pickle.loads(pickle.dumps(client))
    wrong = num_wrong(1, again) + num_wrong(2)
elif how == "closed":
    client.close()
    wrong = prefork()
print(wrong)
"""


@pytest.mark.parametrize("how", ["prefork", "pool", "loader", "threads", "threads of a child", "pickle", "closed"])
def test_a_client_that_was_used_finds_the_same_in_every_process_and_thread(server, artifact, how):
    done = subprocess.run(
        [sys.executable, "-c", SEVERAL, server.http, artifact, how], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")
