"""The benchmarks, at sizes that say nothing."""

import json
import subprocess
import sys

import pytest


def bench(*arguments):
    command = [sys.executable, "-m", "dpq_rec.bench", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_decode_leaves_a_line_for_each_kind_of_ids(tmp_path):
    results = tmp_path / "results" / "decode.jsonl"
    sizes = ["--num-embeddings", 500, "--num-codes", 20, "--num-levels", 2, "--num-ids", 50, "--num-rounds", 3]
    done = bench("decode", *sizes, "--results", results)
    assert done.returncode == 0, done.stderr
    assert "V=500 E=64 D=16 K=20 L=2, 50 uniform ids, 1 thread, median of 3 rounds" in done.stdout
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert [line["ids"] for line in lines] == ["uniform", "hot"]
    assert lines[0]["command"] == " ".join(map(str, ["python -m dpq_rec.bench decode", *sizes]))
    for line in lines:
        assert line["contenders"]["torch.index_select"]["times_baseline"] == 1
        assert line["contenders"]["decode"]["per_second"] > 0
        assert {"date", "machine", "versions"} <= set(line)


@pytest.mark.parametrize("arguments", [["guess"], [], ["decode", "--num-rounds", "0"]])
def test_what_cannot_be_measured_is_named(arguments):
    done = bench(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert "want" in done.stderr
