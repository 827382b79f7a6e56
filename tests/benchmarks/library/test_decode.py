"""The benchmarks, at sizes that say nothing."""

import json
import subprocess
import sys

import pytest

CONTENDERS = {
    *("decode", "decode of one row", "decode, fp16", "decode, 2 threads", "decode, fp16, 2 threads"),
    *("torch.index_select", "fp32 gather with prefetch"),
    *("fbgemm int8", "fbgemm int8, bags of one", "fbgemm int4", "fbgemm int4, bags of one"),
}


def bench(*arguments):
    command = [sys.executable, "-m", "tests.benchmarks.library", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_decode_leaves_a_line_for_each_kind_of_ids(tmp_path):
    results = tmp_path / "results" / "decode.jsonl"
    sizes = ["--num-embeddings", 500, "--num-codes", 20, "--num-levels", 2, "--num-ids", 50, "--num-rounds", 3]
    done = bench("decode", *sizes, "--results", results)
    assert done.returncode == 0, done.stderr
    assert "V=500 E=64 D=16 K=20 L=2, 50 uniform ids, median of 3 rounds" in done.stdout
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert [line["ids"] for line in lines] == ["uniform", "hot"]
    assert lines[0]["command"] == " ".join(map(str, ["python -m tests.benchmarks.library decode", *sizes]))
    for line in lines:
        assert line["contenders"]["torch.index_select"]["times_baseline"] == 1
        assert set(line["contenders"]) == CONTENDERS
        assert line["contenders"]["decode"]["per_second"] > 0
        assert line["contenders"]["fp32 gather with prefetch"]["times_gather"] == 1
        assert {"date", "machine", "versions"} <= set(line)


def test_shapes_are_compared_with_the_first(tmp_path):
    results = tmp_path / "shapes.jsonl"
    done = bench("shapes", "--num-embeddings", 500, "--num-ids", 50, "--num-rounds", 3, "--results", results)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert [line["ids"] for line in lines] == ["uniform", "hot"]
    for line in lines:
        assert line["contenders"]["D=16 K=256 L=1"]["times_baseline"] == 1
        assert line["contenders"]["D=4 K=256 L=3"]["seconds"] > 0


def test_growth_leaves_lines_and_a_picture(tmp_path):
    results, plot = tmp_path / "growth.jsonl", tmp_path / "pictures" / "growth.png"
    sizes = ["--least-power", 2, "--most-power", 4, "--most-full-power", 3, "--num-ids", 50, "--num-rounds", 3]
    done = bench("growth", *sizes, "--results", results, "--plot", plot)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert [(line["num_embeddings"], line["ids"]) for line in lines] == [
        (num_embeddings, popularity) for num_embeddings in (100, 1_000, 10_000) for popularity in ("uniform", "hot")
    ]
    assert ["torch.index_select" in line["contenders"] for line in lines] == [True] * 4 + [False] * 2
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "arguments",
    [
        *(["guess"], [], ["decode", "--num-rounds", "0"], ["shapes", "--embedding-dim", "48"]),
        *(["growth", "--most-power", "4"], ["growth", "--num-subspaces", "3"]),
    ],
)
def test_what_cannot_be_measured_is_named(arguments):
    done = bench(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert "want" in done.stderr
