"""Lookups over HTTP, each form beside constant bytes of its length. In: flags. Out: requests a second, p99, ratios.

One worker on one core, wrk on another, connections kept alive. The constant bytes come from a handler in the same
server; JSON is compared with a lookup as FastAPI does one by default, models in and out.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpq_rec.wire import CODES
from service.http_bodies import ARROW, BINARY, JSON
from tests.benchmarks.record import append, line_of
from tests.benchmarks.rounds import POPULARITIES, Popularity
from tests.benchmarks.service.processes import Requests, run_wrk, running_server
from tests.benchmarks.service.setting import (
    TABLE,
    BenchConfig,
    draw_ids,
    make_artifact,
    make_ids,
    parse,
    use_second_core,
)
from tests.benchmarks.service.turns import Figures, report, summary, take_turns

PACKAGES = ("dpq-rec", "numpy", "uvicorn", "uvloop", "httptools", "fastapi", "orjson")
LOOKUP = f"/v1/tables/{TABLE}/lookup"
_NUM_BODIES = 512  # that take turns


def binary_of(ids_NI: NDArray[np.int64]) -> NDArray[np.uint8]:
    """A body of bytes for each row of ids."""
    return np.ascontiguousarray(ids_NI.astype("<i8")).view(np.uint8)


def json_of(ids_NI: NDArray[np.int64]) -> NDArray[np.uint8]:
    """A body of JSON for each row of ids, filled up with spaces to one length."""
    texts = [f'{{"ids": {ids_I.tolist()}}}'.encode() for ids_I in ids_NI]
    longest = max(map(len, texts))
    return np.frombuffer(b"".join(text.ljust(longest) for text in texts), np.uint8).reshape(len(texts), longest)


def measure(
    config: BenchConfig, popularity: Popularity, server: tuple[int, int], ids_V: NDArray[np.int64]
) -> dict[str, Any]:
    """Settings and figures of one kind of ids; `server` is a port and a process."""
    generator = np.random.default_rng()
    ids_NI = draw_ids(popularity, ids_V, _NUM_BODIES * config.num_ids, generator).reshape(_NUM_BODIES, config.num_ids)
    binary, text = binary_of(ids_NI), json_of(ids_NI[:64])
    num_bytes = {
        "float32": 4 * config.num_ids * config.embedding_dim,
        "float16": 2 * config.num_ids * config.embedding_dim,
        "codes": config.num_ids * config.layout.row_bytes,
    }
    paths = {"float32": LOOKUP, "float16": f"{LOOKUP}?dtype=float16", "codes": LOOKUP}

    def load(path: str, accept: str, bodies_NB: NDArray[np.uint8], given: str) -> Callable[[], Figures]:
        requests = Requests(path, {"Content-Type": given, "Accept": accept}, bodies_NB)
        return functools.partial(_figures, server, requests, config)

    contenders, baselines = {}, {}
    for form, path in paths.items():
        constant = f"constant {num_bytes[form]:,} bytes"
        contenders[constant] = load(f"/constant/{num_bytes[form]}", BINARY, binary, BINARY)
        contenders[form] = load(path, CODES if form == "codes" else BINARY, binary, BINARY)
        baselines[form] = constant
    contenders["arrow"] = load(LOOKUP, ARROW, binary, BINARY)
    contenders["FastAPI, jsonable_encoder"] = load(f"/default/encoder/{TABLE}", JSON, text, JSON)
    contenders["FastAPI, response_model"] = load(f"/default/{TABLE}", JSON, text, JSON)
    contenders["JSON"] = load(LOOKUP, JSON, text, JSON)
    baselines |= {"JSON": "FastAPI, jsonable_encoder", "arrow": "float32"}
    baselines |= {"FastAPI, response_model": "FastAPI, jsonable_encoder"}
    rounds = take_turns(contenders, config.num_rounds, f"{popularity} ids")
    return {"ids": popularity, "workers": 1, **vars(config), "contenders": summary(rounds, baselines)}


def _figures(server: tuple[int, int], requests: Requests, config: BenchConfig) -> Figures:
    return run_wrk(*server, requests, config)._asdict()


def main(flags: list[str]) -> None:
    """Measure, print, and add to the results."""
    config, results = parse("http", __doc__.split("\n")[0], flags)
    use_second_core()
    ids_V = make_ids(config)
    with tempfile.TemporaryDirectory(prefix="dpq-rec-bench-") as folder:
        artifact = make_artifact(config, ids_V, Path(folder) / "artifact")
        with running_server(artifact) as (ports, pid):
            for popularity in POPULARITIES:
                line = line_of("http", measure(config, popularity, (ports.http, pid), ids_V), PACKAGES)
                append(results, [line])
                print(report(line), end="\n\n")
