"""The README's examples, as pasted, against a real server."""

import re
from pathlib import Path

import numpy as np
import pytest

README = (Path(__file__).parents[2] / "service" / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def run(example, server, **names):
    exec(example.replace("http://localhost:8080", server.http).replace("localhost:8081", server.grpc), names)
    return names


def example_with(word):
    (found,) = [example for example in EXAMPLES if word in example]
    return found


def test_examples_are_all_run_here():
    assert len(EXAMPLES) == 5


def test_bytes_example(server, references):
    names = run(example_with("X-Dtype"), server)
    assert names["vectors"].tobytes() == references["user_id"].lookup([1, 2, 99], "float16")[0].tobytes()
    assert names["missing"].tolist() == [2]


def test_codes_example(server, references):
    names = run(example_with("CodesClient"), server)
    vectors, missing = references["item_id"].lookup([42, 7])
    assert (names["codes_vectors"].tobytes(), names["codes_missing"].tolist()) == (vectors.tobytes(), missing)


def test_arrow_example(server, references):
    rows = run(example_with("pyarrow"), server)["rows"].to_pydict()
    assert rows == {"id": [1, 99], "vector": [references["user_id"].vectors[1].tolist(), None]}


def test_bags_example(server, references):
    users = references["user_id"].vectors
    pooled = run(example_with("num_bags"), server)["pooled"]
    np.testing.assert_array_equal(pooled, [(users[1] + users[2]) / np.float32(2), [0], users[3]])


def test_grpc_example(server, capsys):
    example = example_with("StreamLookup")
    strings = next(line for line in example.splitlines() if "string_ids" in line)
    names = run(example.replace(strings, ""), server)  # this server has no table of strings
    assert (names["num_vectors"], capsys.readouterr().out) == (40, "(3, 1) [2]\n")
    names["channel"].close()


@pytest.mark.parametrize("word", ["X-Row-Bytes", "num_levels", "dpq-rec[arrow]", "bag_lengths", "StreamLookup"])
def test_readme_names_what_the_forms_need(word):
    assert word in README
