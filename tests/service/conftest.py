"""A small artifact with its numpy reference, the application in this process, and real servers in others."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import grpc.aio
import httpx
import numpy as np
import pytest

from dpq_rec import (
    CodeLayout,
    EmbeddingStore,
    IdentityVocabulary,
    Int64Vocabulary,
    StringVocabulary,
    TableContents,
    pack_codes,
    publish,
    write_artifact,
)
from service.engine import Engine
from service.grpc_api import GrpcServer
from service.http_app import create_app
from service.metrics import Metrics
from service.settings import Settings

ROOT = Path(__file__).parents[2]
VERSION = "test-1"
NUM_ITEMS, ITEM_DIM = 500, 24


class Reference(NamedTuple):
    """A table as numpy sees it: row i holds ids[i] and vectors[i]."""

    ids: np.ndarray
    vectors: np.ndarray

    def lookup(self, ids: Any, dtype: str = "float32") -> tuple[np.ndarray, list[int]]:
        row_of = {int(i): row for row, i in enumerate(self.ids)}
        rows = [row_of.get(int(i), -1) for i in ids]
        vectors = np.stack([self.vectors[r] if r >= 0 else np.zeros_like(self.vectors[0]) for r in rows])
        return vectors.astype(dtype), [at for at, row in enumerate(rows) if row < 0]


def _contents() -> tuple[dict[str, TableContents], dict[str, Reference]]:
    rng = np.random.default_rng(7)
    layout = CodeLayout(num_subspaces=6, num_codes=5)
    codes = rng.integers(0, 5, (NUM_ITEMS, 6))
    values = rng.standard_normal((6, 5, ITEM_DIM // 6)).astype(np.float32)
    item_ids = rng.permutation(np.arange(-2000, 8000))[:NUM_ITEMS].astype(np.int64)
    items = np.concatenate([values[m, codes[:, m]] for m in range(6)], axis=1)
    users = rng.standard_normal((40, 1)).astype(np.float32)
    tables = {
        "item_id": TableContents(
            num_embeddings=NUM_ITEMS,
            embedding_dim=ITEM_DIM,
            vocabulary=Int64Vocabulary.from_ids(item_ids),
            chunks=[pack_codes(codes, layout)],
            layout=layout,
            values=values,
            features=("item", "history"),
        ),
        "user_id": TableContents(
            num_embeddings=40, embedding_dim=1, vocabulary=IdentityVocabulary(40), chunks=[users], features=("user",)
        ),
    }
    return tables, {"item_id": Reference(item_ids, items), "user_id": Reference(np.arange(40), users)}


@pytest.fixture(scope="session")
def references() -> dict[str, Reference]:
    return _contents()[1]


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_artifact(tmp_path_factory.mktemp("service") / "artifact", _contents()[0], version=VERSION)


@pytest.fixture(scope="session")
def store(artifact: Path) -> EmbeddingStore:
    return EmbeddingStore.open(artifact)


NAMES = {"a": 0, "ü": 1, "": 2, "7": 2}  # id -> row of the table `name`


@pytest.fixture(scope="session")
def string_store(tmp_path_factory: pytest.TempPathFactory) -> EmbeddingStore:
    """The table `name`, of string ids, two of which share a row; row v is [v + 1, -v]. And `user_id`."""
    contents = TableContents(
        num_embeddings=3,
        embedding_dim=2,
        vocabulary=StringVocabulary.from_pairs(list(NAMES), list(NAMES.values())),
        chunks=[np.array([[1, 0], [2, -1], [3, -2]], np.float32)],
    )
    tables = {"name": contents, "user_id": _contents()[0]["user_id"]}
    return EmbeddingStore.open(write_artifact(tmp_path_factory.mktemp("strings") / "artifact", tables))


@pytest.fixture
def make_engine(store: EmbeddingStore) -> Callable[..., Engine]:
    """make_engine(started=True, store=..., **settings): an engine in this process."""

    def make(*, started: bool = True, store: EmbeddingStore = store, **settings: Any) -> Engine:
        engine = Engine(store, Settings(artifact=Path("-"), **settings), Metrics(store.version))
        if started:
            engine.start()
        return engine

    return make


@pytest.fixture
def talk(make_engine: Callable[..., Engine]) -> Callable[..., Any]:
    """talk(use, engine=None): the result of `await use(channel)`, over a real channel to a server in this process."""

    def run(use: Callable[..., Any], engine: Engine | None = None) -> Any:
        async def scenario() -> Any:
            server = GrpcServer(engine or make_engine())
            port = await server.start("127.0.0.1:0")
            await server.serve()
            try:
                async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                    return await use(channel)
            finally:
                await server.stop(0)

        return asyncio.run(scenario())

    return run


@pytest.fixture
def call(make_engine: Callable[..., Engine]) -> Callable[..., httpx.Response]:
    """call(method, path, engine=None, **httpx arguments): one request to the application in this process."""

    def send(method: str, path: str, engine: Engine | None = None, **arguments: Any) -> httpx.Response:
        async def request() -> httpx.Response:
            transport = httpx.ASGITransport(create_app(engine or make_engine()))
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return await client.request(method, path, **arguments)

        return asyncio.run(request())

    return send


class Server:
    """`python -m service` in a process of its own."""

    def __init__(self, artifact: Path, *flags: str, environment: dict[str, str] | None = None) -> None:
        self.flags = [f"--artifact={artifact}", "--http-port=0", "--grpc-port=0", "--drain-seconds=0.1", *flags]
        self.environment = {**os.environ, **(environment or {})}
        self.artifact = artifact
        self.process = subprocess.Popen(
            [sys.executable, "-m", "service", *self.flags],
            cwd=ROOT,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.ready_line = ""

    def wait_until_ready(self) -> Server:
        assert self.process.stdout is not None
        self.ready_line = self.process.stdout.readline()
        found = re.match(r"ready: (http://\S+) grpc://(\S+) version (\S+) tables (.*)\n", self.ready_line)
        if not found:
            self.process.kill()
            pytest.fail(f"no ready line: {self.ready_line!r}; stderr: {self.process.communicate()[1]}")
        self.http, self.grpc, self.version, self.tables = found.groups()
        # A connection for each request, so that any worker may answer it.
        self.web = httpx.Client(
            base_url=self.http, limits=httpx.Limits(max_keepalive_connections=0), headers={"Connection": "close"}
        )
        return self

    def worker_pids(self) -> list[int]:
        return [
            int(pid) for pid in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        ]

    def end(self, number: int = signal.SIGTERM, timeout: float = 60) -> tuple[int, str]:
        """Exit code and what was logged."""
        self.process.send_signal(number)
        return self.wait(timeout)

    def wait(self, timeout: float = 60) -> tuple[int, str]:
        _, logged = self.process.communicate(timeout=timeout)
        return self.process.returncode, logged


@pytest.fixture
def start_server(artifact: Path) -> Iterator[Callable[..., Server]]:
    """start_server(*flags, artifact=..., environment=None): a server that is stopped after the test."""
    servers = []

    def start(*flags: str, artifact: Path = artifact, environment: dict[str, str] | None = None) -> Server:
        servers.append(Server(artifact, *flags, environment=environment))
        return servers[-1]

    yield start
    for server in servers:
        if server.process.poll() is None:
            server.end()
        for stream in (server.process.stdout, server.process.stderr):
            with contextlib.suppress(ValueError):
                stream.close()


@pytest.fixture(scope="session")
def server(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two workers that serve a store, where torch cannot be imported; for the tests that do them no harm."""
    folder = tmp_path_factory.mktemp("server")
    for name in ("torch", "torchrec"):
        (folder / f"{name}.py").write_text(f"raise RuntimeError('{name} was imported')")
    publish(artifact, folder / "store")
    server = Server(folder / "store", "--workers=2", environment={"PYTHONPATH": str(folder)}).wait_until_ready()
    yield server
    exit_code, logged = server.end()
    assert (exit_code, "was imported" in logged) == (0, False), logged
