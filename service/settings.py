"""What can be chosen. In: command line and environment. Out: Settings, checked."""
# ruff: noqa: RUF009 - `_option` is `dataclasses.field` with its metadata filled in

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dpq_rec.errors import ConfigError

LOG_LEVELS = ("debug", "info", "warning", "error")
_BODY_BYTES_PER_ID = 64
_LEAST_BODY_BYTES = 1 << 20
_MAX_BODY_HELP = (
    "most bytes in one HTTP body or gRPC message; if not set, "
    f"{_BODY_BYTES_PER_ID} for each of --max-ids, at least {_LEAST_BODY_BYTES}"
)
_MAX_IN_FLIGHT_HELP = (
    "requests that a worker holds at a time, from the end of the body until the reply is sent; more are refused (429)"
)
_API_KEY_HELP = (
    "key that /v1, /metrics and the gRPC service ask for; better set in the environment, which ps does not show; "
    "if not set, none is asked for"
)
_PROLOG = "Serve the embedding tables of an artifact over HTTP and gRPC. Every flag is also an environment variable:"
_EPILOG = """\
examples:
  python -m service --artifact run/artifact
  curl -s localhost:8080/v1/tables/item_id/lookup -H 'Content-Type: application/json' -d '{"ids": [42, 7]}'
  DPQ_ARTIFACT=/models/store DPQ_HOST=0.0.0.0 DPQ_API_KEY=secret python -m service --workers 4

Exit codes: 0 stopped by SIGTERM or SIGINT, 1 could not serve (the artifact, the ports, the workers), 2 usage.
"""


def _option(parse: Callable[[str], Any], metavar: str, text: str, default: Any = dataclasses.MISSING) -> Any:
    metadata = {"parse": parse, "metavar": metavar, "help": text}
    return dataclasses.field(default=default, metadata=metadata, repr=metavar != "KEY")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The server's settings; `python -m service --help` describes each.

    Raises:
        ConfigError: a value that makes no sense.
    """

    artifact: Path = _option(Path, "DIR", "artifact, or store of published artifacts, to serve (required)")
    host: str = _option(
        str, "HOST", "address to listen on; 0.0.0.0 (or ::) for every interface, as a container needs", "127.0.0.1"
    )
    http_port: int = _option(int, "PORT", "port of the HTTP API; 0 takes any free one", 8080)
    grpc_port: int = _option(int, "PORT", "port of the gRPC API; 0 takes any free one", 8081)
    workers: int = _option(int, "N", "processes that answer requests; they share the mapped artifact", 2)
    threads: int = _option(int, "N", "threads of a worker that answer its large requests", 2)
    max_ids: int = _option(int, "N", "most ids in one request, all of its tables together", 65_536)
    max_queries: int = _option(int, "N", "most queries in one search, each of which looks at every row", 64)
    max_body_bytes: int | None = _option(int, "N", _MAX_BODY_HELP, None)
    max_in_flight: int = _option(int, "N", _MAX_IN_FLIGHT_HELP, 256)
    max_connections: int = _option(
        int,
        "N",
        "HTTP connections of a worker; one more takes the place of an idle one, or gets 503; and as many of gRPC",
        1000,
    )
    max_calls: int = _option(
        int, "N", "gRPC calls that a worker holds at a time, idle streams too; one connection holds a quarter", 1024
    )
    min_ping_seconds: float = _option(
        float, "S", "time between keepalive pings of a gRPC client; one that sends them faster is disconnected", 5.0
    )
    send_seconds: float = _option(
        float, "S", "time, and 1 s for each MiB, that a gRPC caller has to take a reply; then it is disconnected", 30.0
    )
    api_key: str | None = _option(str, "KEY", _API_KEY_HELP, None)
    drain_seconds: float = _option(
        float, "S", "time from SIGTERM, when readiness starts to fail, until connections are refused", 5.0
    )
    stop_seconds: float = _option(float, "S", "time that requests in flight then have to finish", 25.0)
    hang_seconds: float = _option(
        float, "S", "time without a sign of life after which a worker is killed and replaced", 30.0
    )
    log_level: str = _option(str, "LEVEL", f"what is logged on stderr: {', '.join(LOG_LEVELS)}", "info")

    def __post_init__(self) -> None:
        for name in ("http_port", "grpc_port"):
            _check(name, getattr(self, name), 0 <= getattr(self, name) <= 65_535, "0 to 65535")
        is_host = bool(self.host) and self.host == self.host.strip(" \t[]")
        _check("host", repr(self.host), is_host, "a name or an address, one of IPv6 without brackets")
        if self.http_port and self.http_port == self.grpc_port:
            raise ConfigError(f"grpc_port: got {self.grpc_port}, the HTTP port; want another")
        for name in ("workers", "threads", "max_ids", "max_queries", "max_in_flight", "max_connections", "max_calls"):
            _check(name, getattr(self, name), getattr(self, name) >= 1, "1 or more")
        if self.max_body_bytes is not None:
            _check("max_body_bytes", self.max_body_bytes, self.max_body_bytes >= 1, "1 or more")
        for name in ("drain_seconds", "stop_seconds", "min_ping_seconds", "send_seconds"):
            _check(name, getattr(self, name), 0 <= getattr(self, name) <= 86_400, "0 to 86400")
        _check("hang_seconds", self.hang_seconds, 2 <= self.hang_seconds <= 86_400, "2 to 86400")
        _check("log_level", self.log_level, self.log_level in LOG_LEVELS, f"one of {', '.join(LOG_LEVELS)}")
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


def _check(name: str, got: object, is_sound: bool, wanted: str) -> None:
    if not is_sound:
        raise ConfigError(f"{name}: got {got}, want {wanted}")


def read_settings(argv: Sequence[str], environment: Mapping[str, str]) -> Settings:
    """The settings that a command line and an environment give; the command line wins.

    Raises:
        SystemExit: 2, with a line on stderr, for usage errors; 0 for --help.
    """
    parser = _parser()
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    texts = {**_from_environment(environment), **given}
    if "artifact" not in texts:
        parser.error("artifact: name the folder to serve: --artifact DIR, or DPQ_ARTIFACT")
    try:
        return Settings(**{name: _parse(name, *texts[name]) for name in texts})
    except ConfigError as error:
        parser.error(str(error))


def _fields() -> dict[str, dataclasses.Field[Any]]:
    return {field.name: field for field in dataclasses.fields(Settings)}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m service",
        description=f"{_PROLOG} --http-port is DPQ_HTTP_PORT. The flag wins.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for name, field in _fields().items():
        flag = "--" + name.replace("_", "-")
        shown = "" if field.default in (dataclasses.MISSING, None) else f" (default: {field.default})"
        parser.add_argument(
            flag, metavar=field.metadata["metavar"], help=field.metadata["help"] + shown, type=_Given(flag)
        )
    return parser


class _Given:
    """Keeps beside a text where it came from, for the error message."""

    def __init__(self, source: str) -> None:
        self.source = source

    def __call__(self, text: str) -> tuple[str, str]:
        return self.source, text


def _from_environment(environment: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    variables = {name: f"DPQ_{name.upper()}" for name in _fields()}
    return {name: (variable, environment[variable]) for name, variable in variables.items() if variable in environment}


def _parse(name: str, source: str, text: str) -> Any:
    parse = _fields()[name].metadata["parse"]
    try:
        return parse(text)
    except ValueError:
        raise ConfigError(f"{source}: got {text!r}, want a {'whole ' if parse is int else ''}number") from None
