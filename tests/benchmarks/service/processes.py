"""What runs while something is measured. In: an artifact. Out: a server's ports; what wrk measured of them."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dpq_rec import ConfigError
from tests.benchmarks.service.setting import BenchConfig, cores, need

_SCRIPT = """
local bodies = io.open("{file}", "rb"):read("*a")
local requests, at = {{}}, 0
init = function(args)
  for i = 1, #bodies / {size} do
    requests[i] = wrk.format("POST", "{path}", {headers}, string.sub(bodies, (i - 1) * {size} + 1, i * {size}))
  end
end
request = function() at = at % #requests + 1; return requests[at] end
"""
_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0}


class Ports(NamedTuple):
    """Of one server: HTTP, gRPC, and gRPC with threads."""

    http: int
    grpc: int
    threaded: int


class Measured(NamedTuple):
    """What wrk saw of a server, and what it cost the server.

    Attributes:
        per_second: replies.
        p50_seconds: that half of them took at most.
        p99_seconds: likewise of 99 in 100.
        processor_seconds: of the server's core for each reply, in its own code and in the kernel: what it costs, also
            where not the server but wrk is the limit.
    """

    per_second: float
    p50_seconds: float
    p99_seconds: float
    processor_seconds: float


@contextlib.contextmanager
def running_server(artifact: Path) -> Iterator[tuple[Ports, int]]:
    """A server of one worker on the first core: its ports, and its process."""
    command = [sys.executable, "-m", "tests.benchmarks.service.server", str(artifact), str(cores()[0])]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise ConfigError("the server did not start; it said why above")
        yield Ports(*map(int, line.split())), process.pid
    finally:
        process.kill()
        process.wait()


class Requests(NamedTuple):
    """What wrk sends: a path, headers, and bodies (uint8 [N, bytes]) that take turns."""

    path: str
    headers: Mapping[str, str]
    bodies_NB: NDArray[np.uint8]


def run_wrk(port: int, pid: int, requests: Requests, config: BenchConfig) -> Measured:
    """Measure the server of a port and a process from the second core.

    Raises:
        ConfigError: wrk is not installed, or a request was refused.
    """
    with tempfile.TemporaryDirectory(prefix="dpq-rec-wrk-") as folder:
        bodies, script = Path(folder) / "bodies", Path(folder) / "requests.lua"
        bodies.write_bytes(requests.bodies_NB.tobytes())
        headers = ", ".join(f'["{name}"] = "{value}"' for name, value in requests.headers.items())
        size = requests.bodies_NB.shape[1]
        script.write_text(_SCRIPT.format(file=bodies, size=size, path=requests.path, headers=f"{{{headers}}}"))
        command = ["taskset", "-c", str(cores()[1]), need("wrk", "wrk"), "-t1", f"-c{config.num_connections}"]
        command += [f"-d{config.seconds}s", "--latency", "-s", str(script), f"http://127.0.0.1:{port}"]
        before = processor_seconds(pid)
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        taken = processor_seconds(pid) - before
    if "Non-2xx" in said or "Socket errors" in said:
        raise ConfigError(f"{requests.path}: got refusals, want replies alone:\n{said}")
    num_replies, per_second = _found(r"(\d+) requests in", said), _found(r"Requests/sec:\s+(\S+)", said)
    return Measured(float(per_second), _seconds("50%", said), _seconds("99%", said), taken / int(num_replies))


def processor_seconds(pid: int) -> float:
    """What a process has taken of its processors, the kernel's work for it included (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    user, system = fields[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise ConfigError(f"wrk: got no {pattern!r} in:\n{text}")
    return match[1]


def _seconds(part: str, text: str) -> float:
    number, unit = re.fullmatch(r"([\d.]+)(\w+)", _found(rf"(?m)^\s+{part}\s+(\S+)", text)).groups()  # type: ignore[union-attr]
    return float(number) * _UNITS[unit]
