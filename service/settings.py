"""The server's settings. In: command line and environment. Out: Settings, checked."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from dpq_rec.errors import ConfigError

_BODY_BYTES_PER_ID = 64
_LEAST_BODY_BYTES = 1 << 20
_LIMITS: dict[tuple[float, float], tuple[str, ...]] = {  # the least and the most of each number
    (0, 65_535): ("http_port", "grpc_port"),
    (0, 86_400): ("drain_seconds", "stop_seconds", "min_ping_seconds", "send_seconds"),
    (2, 86_400): ("hang_seconds",),
    (1, math.inf): ("workers", "threads", "max_ids", "max_queries", "max_body_bytes", "max_in_flight",
                    "max_connections", "max_calls"),
}  # fmt: skip
_DESCRIPTION = """\
Serve the embedding tables of an artifact over HTTP and gRPC.
Every flag is also an environment variable: --http-port is DPQ_HTTP_PORT. The flag wins.

examples:
  python -m service --artifact run/artifact
  curl -s localhost:8080/v1/tables/item_id/lookup -H 'Content-Type: application/json' -d '{"ids": [42, 7]}'
  DPQ_ARTIFACT=/models/store DPQ_HOST=0.0.0.0 DPQ_API_KEY=secret python -m service --workers 4

Exit codes: 0 stopped by SIGTERM or SIGINT, 1 could not serve (the artifact, the ports, the workers), 2 usage.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The server's settings, which `--help` shows as they are described here.

    Attributes:
        artifact: artifact, or store of published artifacts, to serve
        host: address to listen on; 0.0.0.0 (or ::) for every interface, as a container needs
        http_port: port of the HTTP API; 0 takes any free one
        grpc_port: port of the gRPC API; 0 takes any free one
        workers: processes that answer requests; they share the mapped artifact
        threads: threads of a worker that answer its large requests
        max_ids: most ids in one request, all of its tables together
        max_queries: most queries in one search, each of which looks at every row
        max_body_bytes: most bytes in one HTTP body or gRPC message; if not set, 64 for each of --max-ids, at least
            1048576
        max_in_flight: requests that a worker holds at a time, from the end of the body until the reply is sent;
            more are refused (429)
        max_connections: HTTP connections of a worker; one more takes the place of an idle one, or gets 503;
            and as many of gRPC
        max_calls: gRPC calls that a worker holds at a time, idle streams too; one connection holds a quarter
        min_ping_seconds: time between keepalive pings of a gRPC client; one that sends them faster is disconnected
        send_seconds: time, and 1 s for each MiB, that a gRPC caller has to take a reply; then it is disconnected
        api_key: key that /v1, /metrics and the gRPC service ask for; better set in the environment, which ps does not
            show; if not set, none is asked for
        drain_seconds: time from SIGTERM, when readiness starts to fail, until connections are refused
        stop_seconds: time that requests in flight then have to finish
        hang_seconds: time without a sign of life after which a worker is killed and replaced
        log_level: what is logged on stderr

    Raises:
        ConfigError: a value that makes no sense.
    """

    artifact: Path
    host: str = "127.0.0.1"
    http_port: int = 8080
    grpc_port: int = 8081
    workers: int = 2
    threads: int = 2
    max_ids: int = 65_536
    max_queries: int = 64
    max_body_bytes: int | None = None
    max_in_flight: int = 256
    max_connections: int = 1000
    max_calls: int = 1024
    min_ping_seconds: float = 5.0
    send_seconds: float = 30.0
    api_key: str | None = dataclasses.field(default=None, repr=False)
    drain_seconds: float = 5.0
    stop_seconds: float = 25.0
    hang_seconds: float = 30.0
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    def __post_init__(self) -> None:
        for (least, most), names in _LIMITS.items():
            for name in names:
                got = getattr(self, name)
                if got is not None and not least <= got <= most:
                    wanted = f"{least} to {most}" if most < math.inf else f"{least} or more"
                    raise ConfigError(f"{name}: got {got}, want {wanted}")
        if not self.host or self.host != self.host.strip(" \t[]"):
            raise ConfigError(f"host: got {self.host!r}, want a name or an address, one of IPv6 without brackets")
        if self.http_port and self.http_port == self.grpc_port:
            raise ConfigError(f"grpc_port: got {self.grpc_port}, the HTTP port; want another")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable() and self.api_key):
            raise ConfigError("api_key: want one or more printable ASCII characters, or no key at all")
        if self.api_key is not None and self.api_key != self.api_key.strip():
            raise ConfigError(
                "api_key: got a blank at its start or end, which no HTTP header keeps: no caller could send it; "
                "take it away"
            )

    @property
    def body_limit_bytes(self) -> int:
        """Most bytes in one body: `max_body_bytes`, or what `max_ids` ids may take."""
        return self.max_body_bytes or max(_LEAST_BODY_BYTES, _BODY_BYTES_PER_ID * self.max_ids)


def read_settings(argv: Sequence[str], environment: Mapping[str, str]) -> Settings:
    """The settings that a command line and an environment give; the command line wins.

    Raises:
        SystemExit: 2, with a message on stderr, for usage errors; 0 for --help.
    """
    import tyro  # takes a tenth of a second, which importing Settings should not

    names = {f"DPQ_{field.name.upper()}": field.name for field in dataclasses.fields(Settings)}
    given = {variable: environment[variable] for variable in names if variable in environment}
    flags = [f"--{names[variable].replace('_', '-')}={value}" for variable, value in given.items()]
    try:
        return tyro.cli(
            Settings,
            prog="python -m service",
            description=_DESCRIPTION,
            args=[*flags, *argv],  # of a flag given twice, the last counts
            config=(tyro.conf.DisallowNone,),  # `--api-key None` is a key, not the lack of one
        )
    except SystemExit as error:
        if error.code and given:
            sys.stderr.write(f"set in the environment: {', '.join(given)}\n")
        raise
